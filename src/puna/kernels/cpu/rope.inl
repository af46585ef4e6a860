// Pairs of numbers turned by an angle a token: (x[i], x[i + D/2]), or neighbours when interleaved.

struct RopeJob {
    const float *x, *cos, *sin;
    float* out;
    int64_t tokens, heads, D, chunk;
    bool interleaved;
};

static void rope_chunk(void* data, int64_t chunk, int) {
    const RopeJob& job = *(const RopeJob*)data;
    int64_t half = job.D / 2, last = smaller((chunk + 1) * job.chunk, job.tokens);
    for (int64_t token = chunk * job.chunk; token < last; token++) {
        const float *cos = job.cos + token * half, *sin = job.sin + token * half;
        for (int64_t head = 0; head < job.heads; head++) {
            const float* x = job.x + (token * job.heads + head) * job.D;
            float* out = job.out + (token * job.heads + head) * job.D;
            if (!job.interleaved) {
                for (int64_t i = 0; i < half; i += W) {
                    int64_t n = half - i;
                    vf a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
                    vf c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
                    store_up_to(out + i, a * c - b * s, n);
                    store_up_to(out + half + i, b * c + a * s, n);
                }
                continue;
            }
            int64_t i = 0;
            for (; i + 4 <= half; i += 4) {
                f4 low = *(const f4_any*)(x + 2 * i), high = *(const f4_any*)(x + 2 * i + 4);
                f4 a = SHUFFLE(low, high, 0, 2, 4, 6), b = SHUFFLE(low, high, 1, 3, 5, 7);
                f4 c = *(const f4_any*)(cos + i), s = *(const f4_any*)(sin + i);
                f4 p = a * c - b * s, q = b * c + a * s;
                *(f4_any*)(out + 2 * i) = SHUFFLE(p, q, 0, 4, 1, 5);
                *(f4_any*)(out + 2 * i + 4) = SHUFFLE(p, q, 2, 6, 3, 7);
            }
            for (; i < half; i++) {
                float a = x[2 * i], b = x[2 * i + 1];
                out[2 * i] = a * cos[i] - b * sin[i];
                out[2 * i + 1] = b * cos[i] + a * sin[i];
            }
        }
    }
}

static void rope(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t D,
                 bool interleaved, float* out) {
    RopeJob job = {x, cos, sin, out, tokens, heads, D, larger(1, (32 << 10) / larger(heads * D, 1)), interleaved};
    int64_t chunks = ceil_div(tokens, job.chunk);
    if (chunks == 1) rope_chunk(&job, 0, 0);
    else puna_parallel(chunks, puna_threads(), rope_chunk, &job);
}
