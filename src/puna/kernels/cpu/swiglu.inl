// gate / (1 + e^-gate) · up.

struct SwigluJob {
    const float *gate, *up;
    float* out;
    int64_t count;
};

constexpr int64_t SWIGLU_CHUNK = 16 << 10;  // numbers; about 10 µs

static void swiglu_chunk(void* data, int64_t chunk, int) {
    const SwigluJob& job = *(const SwigluJob*)data;
    int64_t last = smaller((chunk + 1) * SWIGLU_CHUNK, job.count);
    for (int64_t i = chunk * SWIGLU_CHUNK; i < last; i += W) {
        int64_t n = last - i;
        vf gate = load_up_to(job.gate + i, n), up = load_up_to(job.up + i, n);
        // Where e^-gate would overflow, 2¹²⁶ does as well: gate / 2¹²⁶ is below float32's precision of 0.
        vf power = gate * -LOG2_E;
        power = power > splat(126.0f) ? splat(126.0f) : power;
        store_up_to(job.out + i, gate / (splat(1.0f) + exponential2(power)) * up, n);
    }
}

static void swiglu(const float* gate, const float* up, int64_t count, float* out) {
    SwigluJob job = {gate, up, out, count};
    int64_t chunks = ceil_div(count, SWIGLU_CHUNK);
    if (chunks == 1) swiglu_chunk(&job, 0, 0);
    else puna_parallel(chunks, puna_threads(), swiglu_chunk, &job);
}
