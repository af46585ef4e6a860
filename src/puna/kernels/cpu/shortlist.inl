// What a sampler needs to know of a row of logits: its k largest (top_k.inl), and the sum of exp((x - max) · scale) over
// each part of SUM_PART logits. Also rows with the logits away that a grammar's mask does not allow.
//
// The second pass over a row finds it in L2. A part's sum is float32 in the lanes; whoever adds the parts does it in
// float64. A row whose largest logit is not finite has sums that mean nothing.

struct ShortlistJob {
    const float* const* rows;
    const float* scales;
    int64_t vocabulary, k;
    int32_t* ids;
    float *values, *sums;
    char* thread_scratch;
    int64_t thread_bytes;
};

// The sums over parts of x [n] of exp((x - top) · scale), of those above `bound` only.
static void exponential_sums(const float* x, int64_t n, float top, float scale, float bound, float* sums) {
    vf tops = splat(top), scales = splat(scale * LOG2_E), bounds = splat(bound);
    for (int64_t from = 0; from < n; from += SUM_PART) {
        int64_t i = from, last = smaller(i + SUM_PART, n);
        vf total[4] = {};
        for (; i + 4 * W <= last; i += 4 * W)
            UNROLL for (int j = 0; j < 4; j++) {
                vf part = load(x + i + j * W);
                total[j] += (vf)((vi)exponential2((part - tops) * scales) & (part > bounds));
            }
        for (; i < last; i += W) {
            vf part = load_up_to(x + i, last - i);
            for (int64_t lane = last - i; lane < W; lane++) part[lane] = -INFINITE;
            total[0] += (vf)((vi)exponential2((part - tops) * scales) & (part > bounds));
        }
        sums[from / SUM_PART] = sum((total[0] + total[1]) + (total[2] + total[3]));
    }
}

static void shortlist_row(void* data, int64_t row, int thread) {
    const ShortlistJob& job = *(const ShortlistJob*)data;
    int64_t n = job.vocabulary, k = job.k, parts = ceil_div(n, (int64_t)SUM_PART);
    const float* x = job.rows[row];
    top_k_of(x, n, k, job.ids + row * k, job.values + row * k, job.thread_scratch + thread * job.thread_bytes);
    exponential_sums(x, n, job.values[row * k], job.scales[row], -INFINITE, job.sums + row * parts);
}

static void shortlist(const float* const* rows, int64_t count, int64_t vocabulary, const float* scales, int64_t k,
                      int32_t* ids, float* values, float* sums) {
    int threads = count > 1 && count * vocabulary > 32 << 10 ? puna_threads() : 1;
    ShortlistJob job = {rows, scales, vocabulary, k, ids, values, sums, nullptr, top_k_bytes(vocabulary, k)};
    job.thread_scratch = (char*)puna_scratch((size_t)(threads * job.thread_bytes));
    puna_parallel(count, threads, shortlist_row, &job);
}

struct AboveJob {
    const float* const* rows;
    const float *scales, *tops, *bounds;
    int64_t vocabulary;
    float* sums;
};

static void above_row(void* data, int64_t row, int) {
    const AboveJob& job = *(const AboveJob*)data;
    exponential_sums(job.rows[row], job.vocabulary, job.tops[row], job.scales[row], job.bounds[row],
                     job.sums + row * ceil_div(job.vocabulary, (int64_t)SUM_PART));
}

static void above(const float* const* rows, int64_t count, int64_t vocabulary, const float* scales, const float* tops,
                  const float* bounds, float* sums) {
    AboveJob job = {rows, scales, tops, bounds, vocabulary, sums};
    puna_parallel(count, count > 1 && count * vocabulary > 32 << 10 ? puna_threads() : 1, above_row, &job);
}

struct AllowedJob {
    const float* const* rows;
    const uint32_t* const* masks;
    int64_t vocabulary;
    float* out;
};

static void allowed_row(void* data, int64_t row, int) {
    const AllowedJob& job = *(const AllowedJob*)data;
    int64_t n = job.vocabulary;
    const float* x = job.rows[row];
    const uint32_t* mask = job.masks[row];
    float* out = job.out + row * n;
    vi lane_bits = {};
    for (int lane = 0; lane < W; lane++) lane_bits[lane] = 1 << lane;
    for (int64_t i = 0; i < n; i += W) {
        int32_t word = (int32_t)(mask[i / 32] >> (i % 32));
        vi chosen = (((vi){} + word) & lane_bits) != 0;
        store_up_to(out + i, select(chosen, load_up_to(x + i, n - i), splat(-INFINITE)), n - i);
    }
}

static void allowed(const float* const* rows, const uint32_t* const* masks, int64_t count, int64_t vocabulary, float* out) {
    AllowedJob job = {rows, masks, vocabulary, out};
    puna_parallel(count, count > 1 && count * vocabulary > 32 << 10 ? puna_threads() : 1, allowed_row, &job);
}
