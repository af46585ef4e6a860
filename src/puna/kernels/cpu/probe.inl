// What the machine can do at most, for `puna bench`: bytes read from memory, and products by each kind of instruction
// that the kernels of this unit may use. Nothing is computed that anybody wants.
//
// What is surprising: `keep` has the compiler believe that a value changes, so that no instruction is saved.

constexpr int64_t PROBE_PIECE = 1 << 20;  // bytes a thread reads before it asks for more
constexpr int64_t PROBE_ROUNDS = 1 << 16; // rounds a thread computes before it asks for more
constexpr int PROBE_SUMS = 10;            // independent sums: more than latency times ports, fewer than registers

struct ProbeJob {
    const uint8_t* data;
    int64_t amount;
    int32_t sink;  // written by all; what it holds means nothing
};

static void probe_read_piece(void* data, int64_t piece, int) {
    ProbeJob& job = *(ProbeJob*)data;
    const float* p = (const float*)(job.data + piece * PROBE_PIECE);
    int64_t n = smaller(PROBE_PIECE, job.amount - piece * PROBE_PIECE) / 4;
    vi sums[8] = {};
    for (int64_t k = 0; k + 8 * W <= n; k += 8 * W)
        UNROLL for (int i = 0; i < 8; i++) sums[i] ^= (vi)load(p + k + i * W);
    for (int i = 1; i < 8; i++) sums[0] ^= sums[i];
    int32_t all = 0;
    for (int i = 0; i < W; i++) all ^= sums[0][i];
    __atomic_store_n(&job.sink, all, __ATOMIC_RELAXED);
}

struct ProbeF32 {
    static constexpr int64_t PRODUCTS = W;
    INLINE vf step(vf sum, vf a, vf b) { return sum + a * b; }
};

#ifdef BF16_DOT
struct ProbeBF16 {
    static constexpr int64_t PRODUCTS = 2 * W;
    INLINE vf step(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

#if defined(__AVX512VNNI__) && WIDTH == 16
#define HAVE_INT8_DOT 1
struct ProbeInt8 {
    static constexpr int64_t PRODUCTS = 4 * W;
    INLINE vf step(vf sum, vf a, vf b) { return (vf)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
};
#elif WIDTH == 16 || WIDTH == 8
#define HAVE_INT8_DOT 1
struct ProbeInt8 {  // without VNNI: two multiplications of pairs, and an addition
    static constexpr int64_t PRODUCTS = 4 * W;
    INLINE vf step(vf sum, vf a, vf b) {
#if WIDTH == 16
        __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
        return (vf)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
        __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
        return (vf)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }
};
#elif defined(__ARM_FEATURE_DOTPROD)
#define HAVE_INT8_DOT 1
struct ProbeInt8 {
    static constexpr int64_t PRODUCTS = 4 * W;
    INLINE vf step(vf sum, vf a, vf b) { return (vf)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b); }
};
#endif

template <typename Kind>
static void probe_products_piece(void* data, int64_t, int) {
    ProbeJob& job = *(ProbeJob*)data;
    // By name: of an array of them the compiler keeps some in memory.
    vf a = {}, b = {}, s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {}, s9 = {};
    for (int64_t round = 0; round < PROBE_ROUNDS; round++) {
        keep(a);
        keep(b);
#define PROBE_STEP(sum) sum = Kind::step(sum, a, b), keep(sum)
        PROBE_STEP(s0), PROBE_STEP(s1), PROBE_STEP(s2), PROBE_STEP(s3), PROBE_STEP(s4);
        PROBE_STEP(s5), PROBE_STEP(s6), PROBE_STEP(s7), PROBE_STEP(s8), PROBE_STEP(s9);
#undef PROBE_STEP
    }
    int32_t all = (int32_t)(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9)[0];
    __atomic_store_n(&job.sink, all, __ATOMIC_RELAXED);
}

template <typename Kind>
static int64_t probe_products(int64_t pieces) {
    ProbeJob job = {nullptr, pieces, 0};
    puna_parallel(pieces, puna_threads(), probe_products_piece<Kind>, &job);
    return pieces * PROBE_ROUNDS * PROBE_SUMS * Kind::PRODUCTS;
}

static int64_t probe(int what, const void* data, int64_t amount) {
    if (what == PROBE_READ) {
        ProbeJob job = {(const uint8_t*)data, amount, 0};
        puna_parallel(ceil_div(amount, PROBE_PIECE), puna_threads(), probe_read_piece, &job);
        return amount;
    }
    if (what == PROBE_FP32) return probe_products<ProbeF32>(amount);
#ifdef BF16_DOT
    if (what == PROBE_BF16) return probe_products<ProbeBF16>(amount);
#endif
#ifdef HAVE_INT8_DOT
    if (what == PROBE_INT8) return probe_products<ProbeInt8>(amount);
#endif
    return 0;
}
