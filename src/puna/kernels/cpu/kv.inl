// The KV cache: how a head's D numbers lie in each type, reading them as float32, and `write_kv`, which stores them.
//
// What is surprising: float16 saturates. A key or value beyond 65,504 becomes 65,504, not infinity, which would make
// every later score of its head NaN; NaN stays NaN. bfloat16 and float16 round to nearest, ties to even. Q8_0 has
// ggml's arithmetic: 32 numbers share d = max|x| / 127, kept in float16, and are round(x / d), halves away from zero.
// There a block with infinity or NaN in it becomes NaN as a whole, so that damage is seen.

constexpr int64_t Q8_BLOCK = 32, Q8_BYTES = 34;  // a block of Q8_0: its scale in float16, then 32 of int8

INLINE int64_t head_bytes(int type, int64_t D) {
    return type == F32 ? D * 4 : type == Q8_0 ? D / Q8_BLOCK * Q8_BYTES : D * 2;
}

// The scale of a block of Q8_0.
INLINE float block_scale(const char* block) {
    uint16_t word;
    __builtin_memcpy(&word, block, 2);
#if WIDTH >= 8
    return _cvtsh_ss(word);
#elif defined(__aarch64__)
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(word))), 0);
#else
    return widen_part<F16>(&word, 1)[0];
#endif
}

// W of int8, as float32.
INLINE vf widen_bytes(const char* p) {
#if WIDTH == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif WIDTH == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t vb __attribute__((vector_size(W)));
    vb x;
    __builtin_memcpy(&x, p, W);
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}

// Numbers d to d + W of a head, zeros from `rest` on. Q8_0 heads are whole blocks, so there `rest` is at least W.
template <int TYPE>
INLINE vf cached(const char* head, int64_t d, int64_t rest) {
    if constexpr (TYPE == Q8_0) {
        const char* block = head + d / Q8_BLOCK * Q8_BYTES;
        return widen_bytes(block + 2 + d % Q8_BLOCK) * splat(block_scale(block));
    } else {
        return widen_up_to<TYPE>((const typename Words<TYPE>::word*)head + d, rest);
    }
}

// ---- storing ----

INLINE vh to_halves(vf x) {
    const vf most = splat(65504.0f);
    x = x > most ? most : x;  // false for NaN, which stays
    x = x < -most ? -most : x;
#if WIDTH == 16
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif WIDTH == 8
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (vh)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
#else
    // Normal halves: mend the exponent's bias and round off 13 bits. Subnormal ones: adding 1/2, whose last place is
    // 2⁻²⁴ as theirs, has the processor round.
    vf size = absolute(x);
    vu word = (vu)size, normal = (word - (112u << 23) + 0xfff + ((word >> 13) & 1)) >> 13;
    vu small = (vu)(size + splat(0.5f)) - (vu)splat(0.5f), is_small = (vu)(size < splat(0x1p-14f));
    vu half = (small & is_small) | (normal & ~is_small), is_nan = (vu)(x != x);
    half = (half & ~is_nan) | (0x7e00u & is_nan) | (((vu)x >> 16) & 0x8000u);
    return __builtin_convertvector(half, vh);
#endif
}

INLINE vh to_bfloats(vf x) {
    vu word = (vu)x, rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16, is_nan = (vu)(x != x);
    return __builtin_convertvector((rounded & ~is_nan) | (((word >> 16) | 0x40u) & is_nan), vh);
}

// One block of Q8_0 from 32 numbers.
INLINE void store_block(const float* x, char* block) {
    vf parts[Q8_BLOCK / W], top = {}, faults = {};
    UNROLL for (int i = 0; i < Q8_BLOCK / W; i++) {
        parts[i] = load(x + i * W);
        top = maximum(absolute(parts[i]), top);
        faults += parts[i] * 0.0f;  // NaN for NaN and infinity
    }
    float scale = largest(top) / 127.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    if (float fault = sum(faults); fault != fault) scale = fault, inverse = 0.0f;
    vh word = to_halves(splat(scale));
    __builtin_memcpy(block, &word, 2);
    UNROLL for (int i = 0; i < Q8_BLOCK / W; i++) {
        vf scaled = inverse == 0.0f ? (vf){} : parts[i] * inverse, size = absolute(scaled);
        vi whole = __builtin_convertvector(size, vi);
        whole -= (vi)(size - __builtin_convertvector(whole, vf) >= splat(0.5f));  // a mask is -1
        vi sign = (vi)scaled >> 31;
        typedef int8_t vb __attribute__((vector_size(W)));
        vb bytes = __builtin_convertvector((whole ^ sign) - sign, vb);
        __builtin_memcpy(block + 2 + i * W, &bytes, W);
    }
}

struct WriteJob {
    const float *k, *v;
    char *cache_k, *cache_v;
    PageTable table;
    int64_t row, row_bytes, chunk;  // row: numbers of a token; chunk: tokens
};

template <int TYPE>
INLINE void store_row(const float* from, char* to, int64_t count) {
    if constexpr (TYPE == F32) {
        __builtin_memcpy(to, from, (size_t)count * 4);
    } else if constexpr (TYPE == Q8_0) {
        for (int64_t i = 0; i < count; i += Q8_BLOCK) store_block(from + i, to + i / Q8_BLOCK * Q8_BYTES);
    } else {
        for (int64_t i = 0; i < count; i += W) {
            vf x = load_up_to(from + i, count - i);
            vh words = TYPE == F16 ? to_halves(x) : to_bfloats(x);
            __builtin_memcpy(to + i * 2, &words, (size_t)smaller(W, count - i) * 2);
        }
    }
}

template <int TYPE>
static void write_chunk(void* data, int64_t chunk, int) {
    const WriteJob& job = *(const WriteJob*)data;
    const PageTable& table = job.table;
    int64_t first = chunk * job.chunk, last = smaller(first + job.chunk, table.starts[table.sequences]), b = 0;
    for (int64_t i = first; i < last; i++) {
        while (i >= table.starts[b + 1]) b++;
        int64_t position = table.positions[i], page = table.pages[b * table.width + position / table.page];
        int64_t at = (page * table.page + position % table.page) * job.row_bytes;
        store_row<TYPE>(job.k + i * job.row, job.cache_k + at, job.row);
        store_row<TYPE>(job.v + i * job.row, job.cache_v + at, job.row);
    }
}

static void write_kv(Weights cache_k, Weights cache_v, const float* k, const float* v, const PageTable& table,
                     int64_t G, int64_t D) {
    int type = cache_k.type;
    WriteJob job = {k, v, (char*)cache_k.data, (char*)cache_v.data, table, G * D, G * head_bytes(type, D),
                    larger(1, (16 << 10) / larger(1, G * D))};
    Run run = type == F32 ? write_chunk<F32> : type == F16 ? write_chunk<F16> : type == BF16 ? write_chunk<BF16>
                                                                              : write_chunk<Q8_0>;
    int64_t chunks = ceil_div(table.starts[table.sequences], job.chunk);
    if (chunks <= 1) run(&job, 0, 0);
    else puna_parallel(chunks, puna_threads(), run, &job);
}
