// Decode attention over a Q8_0 cache in whole numbers: the two products of the way of few rows (see attention.inl) for
// AVX-512 with VNNI. Other instruction sets, and prefill, widen the cache to float32 instead.
//
// Widening a number costs as much as multiplying it, so a cache of half the bytes would not be read any faster. Here
// - queries become 15 bits and a sign, in blocks of 32 with a scale of their own, as two bytes: q = scale · (256 · high +
//   low). 16 keys at a time are transposed into the lanes, so that a quad (four bytes) of each stands beside the others
//   and the sums need no shuffles;
// - the softmax's numerators times the values' scales become 15 bits, with one scale for a row, a block of 32 columns and
//   the keys that are near each other. They meet pairs of keys, widened to 16 bits.
// Both roundings together are some hundredth of what the 8 bits of the cache are off by. A row is rounded by itself and
// sums of integers are exact, so its bits do not depend on the rows beside it.
//
// What is surprising: bytes of a key are read with 128 added (a flipped sign), because one factor of `vpdpbusd` is
// unsigned; the sums start from -128 · Σ q. And infinity or NaN in a query, or a scale that is NaN, makes NaN of
// everything it touches, as in float32.

constexpr int64_t STEP = 16;  // keys side by side: the lanes
constexpr int64_t NEAR_STEPS = NEAR / STEP;
constexpr int64_t STEP_LINES = 9;       // of 64 bytes, fetched with a step's blocks of 32: no fewer than those take
constexpr float QUERY_MOST = 32512.0f;  // 127 · 256: above it the high byte would not fit
constexpr float WEIGHT_MOST = 32767.0f;

// A function of its own: its sums then have all registers.
#define APART static __attribute__((noinline))

// 32 numbers of a query.
struct QueryBlock {
    int32_t offset;  // -128 · Σ q / scale
    float scale;
    char quads[Q8_BLOCK / 4][2][4];  // high, low
};

// STEP keys (or values) of a head that lie `token` bytes apart, in one page; of the last step there may be fewer.
struct KeyStep {
    const char* first;
    int64_t count;
};

INLINE void whole_query(const float* q, float factor, QueryBlock* block) {
    vf x[2], top = {}, faults = {};
    UNROLL for (int i = 0; i < 2; i++) {
        x[i] = load(q + i * W) * factor;
        top = maximum(absolute(x[i]), top);
        faults += x[i] * 0.0f;
    }
    float most = largest(top), fault = sum(faults), inverse = most == 0.0f ? 0.0f : QUERY_MOST / most;
    block->scale = fault != fault ? fault : most / QUERY_MOST;
    vi total = {};
    UNROLL for (int i = 0; i < 2; i++) {
        vi whole = (vi)_mm512_cvtps_epi32((__m512)(x[i] * inverse)), high = (whole + 128) >> 8;
        total += whole;
        __m128i a = _mm512_cvtepi32_epi8((__m512i)high), b = _mm512_cvtepi32_epi8((__m512i)(whole - (high << 8)));
        _mm_storeu_si128((__m128i*)block->quads[i * 4], _mm_unpacklo_epi32(a, b));
        _mm_storeu_si128((__m128i*)block->quads[i * 4 + 2], _mm_unpackhi_epi32(a, b));
    }
    block->offset = (int32_t)(-128u * (uint32_t)_mm512_reduce_add_epi32((__m512i)total));  // NaN leaves anything here
}

// The scales of the blocks at(0) to at(15).
template <typename At>
INLINE vf scales_of(At at) {
    auto half = [&](int j) { return (int)*(const half_any*)at(j); };
    auto eight = [&](int j) {
        __m128i x = _mm_cvtsi32_si128(half(j));
        x = _mm_insert_epi16(x, half(j + 1), 1);
        x = _mm_insert_epi16(x, half(j + 2), 2);
        x = _mm_insert_epi16(x, half(j + 3), 3);
        x = _mm_insert_epi16(x, half(j + 4), 4);
        x = _mm_insert_epi16(x, half(j + 5), 5);
        x = _mm_insert_epi16(x, half(j + 6), 6);
        return _mm_insert_epi16(x, half(j + 7), 7);
    };
    return (vf)_mm512_cvtph_ps(_mm256_set_m128i(eight(8), eight(0)));
}

// Calls run(at) with the place of key j of the step; those that are not there are the last one again.
template <typename Run>
INLINE void each_key(const KeyStep& step, int64_t skip, int64_t token, Run run) {
    const char* first = step.first + skip;
    if (step.count == STEP) run([=](int64_t j) { return first + j * token; });
    else run([=, last = step.count - 1](int64_t j) { return first + smaller(j, last) * token; });
}

// Four quads, 16 bytes, of 16 keys: quads[k] has quad k of all keys in their order.
template <typename At>
INLINE void transposed(At at, int64_t offset, vu (&quads)[4]) {
    __m512i x[4];
    UNROLL for (int i = 0; i < 4; i++) {
        auto part = [&](int j) { return _mm_loadu_si128((const __m128i*)(at(4 * j + i) + offset)); };
        x[i] = _mm512_castsi128_si512(part(0));
        x[i] = _mm512_inserti32x4(x[i], part(1), 1);
        x[i] = _mm512_inserti32x4(x[i], part(2), 2);
        x[i] = _mm512_inserti32x4(x[i], part(3), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    quads[0] = (vu)_mm512_unpacklo_epi64(a, c), quads[1] = (vu)_mm512_unpackhi_epi64(a, c);
    quads[2] = (vu)_mm512_unpacklo_epi64(b, d), quads[3] = (vu)_mm512_unpackhi_epi64(b, d);
}

// scores[i][s] = q[i] · key s, for N rows and all keys of the steps (those that are not there: the last one's again).
template <int N>
APART void whole_scores(const float* q, int64_t q_row, const KeyStep* steps, int64_t count, int64_t token, int64_t blocks,
                        float* scores, Ahead& fetched) {
    Ahead ahead = fetched;  // in registers
    auto query = [=](int i, int64_t b) { return (const QueryBlock*)(q + i * q_row) + b; };
    for (int64_t t = 0; t < count; t++) {
        vf sums[N];
        UNROLL for (int i = 0; i < N; i++) sums[i] = (vf){};
        for (int64_t b = 0; b < blocks; b++)
            each_key(steps[t], b * Q8_BYTES, token, [&](auto at) {
                vi high[N], low[N];
                UNROLL for (int i = 0; i < N; i++) high[i] = (vi){}, low[i] = (vi){} + query(i, b)->offset;
                const char* next = ahead.take(STEP_LINES * 64);
                UNROLL for (int part = 0; part < 2; part++) {
                    vu quads[4];
                    transposed(at, 2 + part * 16, quads);
                    UNROLL for (int k = 0; k < 4; k++) {
                        __builtin_prefetch(next + (part * 4 + k) * 64, 0, 2);
                        quads[k] ^= 0x80808080u;
                        UNROLL for (int i = 0; i < N; i++) {
                            dot<false>(high[i], quads[k], query(i, b)->quads[part * 4 + k][0]);
                            dot<false>(low[i], quads[k], query(i, b)->quads[part * 4 + k][1]);
                        }
                    }
                }
                __builtin_prefetch(next + (STEP_LINES - 1) * 64, 0, 2);
                vf scales = scales_of(at);
                UNROLL for (int i = 0; i < N; i++)
                    sums[i] = fused(to_float((high[i] << 8) + low[i]), scales * query(i, b)->scale, sums[i]);
            });
        UNROLL for (int i = 0; i < N; i++) store(scores + i * NEAR + t * STEP, sums[i]);
    }
    fetched = ahead;
}

// out[i] = out[i] · shrink[i] + Σ_s weights[i][s] · value s, for N rows; weights of values that are not there are 0.
template <int N>
APART void whole_values(const float* weights, const float* shrink, const KeyStep* steps, int64_t count, int64_t token,
                        int64_t blocks, float* out, int64_t out_row, Ahead& fetched) {
    Ahead ahead = fetched;  // in registers
    constexpr int CHAINS = N == 4 ? 1 : 2;  // sums beside each other, so that few rows do not wait for them
    for (int64_t b = 0; b < blocks; b++) {
        float scales[NEAR_STEPS * STEP] __attribute__((aligned(64))), unit[N];
        int16_t whole[N][NEAR_STEPS * STEP] __attribute__((aligned(64)));
        for (int64_t t = 0; t < count; t++)
            each_key(steps[t], b * Q8_BYTES, token, [&](auto at) { store(scales + t * STEP, scales_of(at)); });
        UNROLL for (int i = 0; i < N; i++) {
            // Compared as integers: they are not negative, and NaN is the largest.
            __m512i top = {};
            for (int64_t t = 0; t < count; t++)
                top = _mm512_max_epu32((__m512i)(load(weights + i * NEAR + t * STEP) * load(scales + t * STEP)), top);
            uint32_t word = _mm512_reduce_max_epu32(top);
            float most;
            __builtin_memcpy(&most, &word, 4);
            unit[i] = most / WEIGHT_MOST;
            vf factor = splat(WEIGHT_MOST / most);  // infinity where all are 0: NaN, whose lower words are 0
            for (int64_t t = 0; t < count; t++) {
                vf x = load(weights + i * NEAR + t * STEP) * load(scales + t * STEP) * factor;
                __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x));
                _mm256_store_si256((__m256i*)(whole[i] + t * STEP), words);
            }
        }
        vi sums[N][CHAINS][2];
        UNROLL for (int i = 0; i < N; i++) UNROLL for (int c = 0; c < CHAINS; c++)
            sums[i][c][0] = (vi){}, sums[i][c][1] = (vi){};
        for (int64_t t = 0; t < count; t++)
            each_key(steps[t], b * Q8_BYTES, token, [&](auto at) {
                const char* next = ahead.take(STEP_LINES * 64);
                UNROLL for (int s = 0; s < STEP; s += 2) {
                    __builtin_prefetch(next + s * 32, 0, 2);
                    __m256i x = _mm256_loadu_si256((const __m256i*)(at(s) + 2));
                    __m256i y = _mm256_loadu_si256((const __m256i*)(at(s + 1) + 2));
                    vi low = (vi)_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));   // columns 0 to 7 and 16 to 23
                    vi high = (vi)_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));  // 8 to 15 and 24 to 31
                    UNROLL for (int i = 0; i < N; i++) {
                        const char* pair = (const char*)(whole[i] + t * STEP + s);
                        dot_halves(sums[i][s / 2 % CHAINS][0], low, pair);
                        dot_halves(sums[i][s / 2 % CHAINS][1], high, pair);
                    }
                }
                __builtin_prefetch(next + (STEP_LINES - 1) * 64, 0, 2);
            });
        UNROLL for (int i = 0; i < N; i++) {
            UNROLL for (int c = 1; c < CHAINS; c++) UNROLL for (int j = 0; j < 2; j++) sums[i][0][j] += sums[i][c][j];
            __m512i low = (__m512i)sums[i][0][0], high = (__m512i)sums[i][0][1];
            vi whole_columns[] = {(vi)_mm512_shuffle_i64x2(low, high, 0x44), (vi)_mm512_shuffle_i64x2(low, high, 0xEE)};
            UNROLL for (int j = 0; j < 2; j++) {
                float* to = out + i * out_row + b * Q8_BLOCK + j * W;
                store(to, fused(to_float(whole_columns[j]), splat(unit[i]), load(to) * shrink[i]));
            }
        }
    }
    fetched = ahead;
}

template <int N>
struct Near<Q8_0, N> {
    // The steps of all runs: runs start STEP keys apart, for pages do.
    INLINE int64_t steps_of(const AttentionJob& job, const char* cache, const KeyRun* runs, int64_t run_count,
                            KeyStep* steps) {
        int64_t n = 0;
        for (int64_t r = 0; r < run_count; r++)
            for (int64_t s = 0; s < runs[r].count; s += STEP)
                steps[n++] = {cache + runs[r].offset + s * job.token, smaller(STEP, runs[r].count - s)};
        return n;
    }

    static void query(const AttentionJob& job, const float* q, float* to) {
        static_assert(sizeof(QueryBlock) <= Q8_BLOCK * sizeof(float), "a row fits in the place of its floats");
        for (int64_t d = 0; d < job.D; d += Q8_BLOCK) whole_query(q + d, job.scale, (QueryBlock*)to + d / Q8_BLOCK);
    }

    INLINE void scores(const AttentionJob& job, const float* q, int64_t q_row, const KeyRun* runs, int64_t run_count,
                       int64_t head, float* scores, Ahead& ahead) {
        KeyStep steps[NEAR_STEPS];
        int64_t count = steps_of(job, job.k + head, runs, run_count, steps);
        whole_scores<N>(q, q_row, steps, count, job.token, job.D / Q8_BLOCK, scores, ahead);
    }

    INLINE void values(const AttentionJob& job, const float* weights, float (&shrink)[N], const KeyRun* runs,
                       int64_t run_count, int64_t head, float* out, Ahead& ahead) {
        KeyStep steps[NEAR_STEPS];
        int64_t count = steps_of(job, job.v + head, runs, run_count, steps);
        whole_values<N>(weights, shrink, steps, count, job.token, job.D / Q8_BLOCK, out, job.partial_row, ahead);
    }
};
