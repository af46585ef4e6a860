// The first index of the largest number of a row; of the first NaN where there is one, as in NumPy. Two passes: the
// largest value, then where it first stands.

struct ArgmaxJob {
    const float* logits;
    int32_t* out;
    int64_t vocabulary;
};

static void argmax_row(void* data, int64_t row, int) {
    const ArgmaxJob& job = *(const ArgmaxJob*)data;
    const float* x = job.logits + row * job.vocabulary;
    int64_t n = job.vocabulary, k = 0;
    vf best[4];
    vi unordered = {};
    for (int i = 0; i < 4; i++) best[i] = splat(-INFINITE);
    for (; k + 4 * W <= n; k += 4 * W)
        UNROLL for (int i = 0; i < 4; i++) {
            vf part = load(x + k + i * W);
            unordered |= part != part;
            best[i] = maximum(part, best[i]);
        }
    bool nan = false;
    for (int i = 0; i < W; i++) nan |= unordered[i] != 0;
    float top = largest(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
    for (; k < n; k++) {
        nan |= x[k] != x[k];
        top = x[k] > top ? x[k] : top;
    }
    k = 0;
    if (nan) {
        while (x[k] == x[k]) k++;
    } else {
        for (; k + 4 * W <= n; k += 4 * W) {
            vi equal = {};
            UNROLL for (int i = 0; i < 4; i++) equal |= load(x + k + i * W) == splat(top);
            int found = 0;
            for (int i = 0; i < W; i++) found |= equal[i];
            if (found) break;
        }
        while (x[k] != top) k++;
    }
    job.out[row] = (int32_t)k;
}

static void argmax(const float* logits, int64_t rows, int64_t vocabulary, int32_t* out) {
    ArgmaxJob job = {logits, out, vocabulary};
    if (rows > 1 && rows * vocabulary > 32 << 10) puna_parallel(rows, puna_threads(), argmax_row, &job);
    else
        for (int64_t row = 0; row < rows; row++) argmax_row(&job, row, 0);
}
