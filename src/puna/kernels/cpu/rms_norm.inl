// x / sqrt(mean(x²) + eps) · weight, a row at a time. The squares are summed in float32, 4·W partial sums.

struct NormJob {
    const float* x;
    const void* weight;
    float* out;
    int64_t rows, dim, chunk;
    float eps;
};

template <int TYPE>
static void norm_chunk(void* data, int64_t chunk, int) {
    const NormJob& job = *(const NormJob*)data;
    const typename Words<TYPE>::word* weight = (const typename Words<TYPE>::word*)job.weight;
    int64_t dim = job.dim, last = smaller((chunk + 1) * job.chunk, job.rows);
    for (int64_t row = chunk * job.chunk; row < last; row++) {
        const float* x = job.x + row * dim;
        float* out = job.out + row * dim;
        vf squares[4] = {};
        int64_t k = 0;
        for (; k + 4 * W <= dim; k += 4 * W)
            UNROLL for (int i = 0; i < 4; i++) {
                vf part = load(x + k + i * W);
                squares[i] += part * part;
            }
        for (; k < dim; k += W) {
            vf part = load_up_to(x + k, dim - k);
            squares[0] += part * part;
        }
        float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)dim;
        vf scale = splat(1.0f / __builtin_sqrtf(mean + job.eps));
        for (k = 0; k + W <= dim; k += W) store(out + k, load(x + k) * scale * Words<TYPE>::widen(weight + k));
        if (k < dim) store_part(out + k, load_part(x + k, dim - k) * scale * widen_part<TYPE>(weight + k, dim - k), dim - k);
    }
}

static void rms_norm(const float* x, Weights weight, int64_t rows, int64_t dim, float eps, float* out) {
    NormJob job = {x, weight.data, out, rows, dim, larger(1, (32 << 10) / larger(dim, 1)), eps};
    Run run = weight.type == F32 ? norm_chunk<F32> : weight.type == F16 ? norm_chunk<F16> : norm_chunk<BF16>;
    int64_t chunks = ceil_div(rows, job.chunk);
    if (chunks == 1) run(&job, 0, 0);
    else puna_parallel(chunks, puna_threads(), run, &job);
}
