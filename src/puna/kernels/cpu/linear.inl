// y = x · wᵀ + bias, for weights of three types in the order they lie in the file.
//
// Two ways, by the number of activation rows:
// - few (decode): the lanes run along k, and the weights stream through once, whatever the number of rows. The memory
//   is the limit. Sums of one row do not depend on the other rows of the call.
// - many (prefill): see tile.inl. A block of weights stays in L2 while all panels of activations pass, so weights
//   come from memory once per ROW_BLOCK rows. The multiply-adds are the limit. Again, a row's sums depend on it alone.
// `puna_invariant` has any number of rows go the first way, so that a row's sums are the same in decode and prefill.
//
// With AVX-512 BF16, bfloat16 weights meet activations rounded to bfloat16 (vdpbf16ps, sums in float32); everywhere
// else weights are widened exactly and activations stay float32.

struct LinearJob {
    const float* x;
    Weights w, bias;
    float* y;
    int64_t rows, in, out;
    char* packed;       // the activations: padded rows (few), or panels (many)
    int64_t packed_row;  // bytes of one padded row
    // few rows
    int64_t chunk;  // outputs a chunk
    // many rows
    int64_t first, count;       // the block of activation rows at work
    int64_t panels, groups;     // panels in it; groups of panels, each a chunk of its own
    char* thread_scratch;
    int64_t thread_bytes;
};

INLINE float widen_one(Weights w, int64_t i) {
    if (w.type == F32) return ((const float_any*)w.data)[i];
    half_any word = ((const half_any*)w.data)[i];
    return (w.type == BF16 ? widen_part<BF16>(&word, 1) : widen_part<F16>(&word, 1))[0];
}

INLINE float bias_of(const LinearJob& job, int64_t n) { return job.bias.data ? widen_one(job.bias, n) : 0.0f; }

#include "linear_packed.inl"

// ---- few rows ----

constexpr int64_t FEW_GROUP = 8;  // activation rows that share one pass over a chunk of weights

// One activation row takes one row of weights after the other where a vector is a cache line: the additions of a single
// chain keep up with the memory, whose prefetcher foresees the one stream that goes straight on.
constexpr bool single_stream(int m) { return W == 16 && m == 1; }

// How many rows of weights are read side by side: else as many streams as the registers have sums for.
constexpr int rows_beside(int m) {
    if (single_stream(m)) return 1;
    return REGISTERS == 32 ? (m <= 4 ? 4 : 3) : (m <= 2 ? 4 : m <= 4 ? 2 : 1);
}

#ifdef BF16_DOT
constexpr bool uses_dot(int type) { return type == BF16; }
#else
constexpr bool uses_dot(int) { return false; }
#endif

// One step: sums[i][j] += w[i] · x[j] over W (or 32, in pairs) values of k, or the `rest` < that which are left.
template <int TYPE, int R, int M>
INLINE void few_step(const typename Words<TYPE>::word* const* w, const char* x, int64_t x_row, int64_t k, int64_t rest,
                     vf (&sums)[R][M]) {
#ifdef BF16_DOT
    if constexpr (uses_dot(TYPE)) {
        __m512i weight[R];
        __mmask32 mask = rest < 32 ? (1u << rest) - 1 : 0;
        UNROLL for (int i = 0; i < R; i++)
            weight[i] = rest < 32 ? _mm512_maskz_loadu_epi16(mask, w[i] + k) : _mm512_loadu_si512(w[i] + k);
        UNROLL for (int j = 0; j < M; j++) {
            __m512i row = _mm512_load_si512(x + j * x_row + k * 2);
            UNROLL for (int i = 0; i < R; i++) dot_pairs(sums[i][j], weight[i], row);
        }
        return;
    }
#endif
    vf weight[R];
    UNROLL for (int i = 0; i < R; i++) weight[i] = widen_up_to<TYPE>(w[i] + k, rest);
    UNROLL for (int j = 0; j < M; j++) {
        vf row = load((const float*)(x + j * x_row) + k);
        keep(row);
        UNROLL for (int i = 0; i < R; i++) sums[i][j] += weight[i] * row;
    }
}

// sums[i][j] += w[i] · x[j] over k in [k0, k1). Meanwhile the R rows that come next, `row` words further each, are
// fetched into L2: that doubles the bandwidth of one thread (20 to 41 GB/s for four activation rows). A single stream
// the hardware fetches better alone.
template <int TYPE, int R, int M>
INLINE void few_dots(const typename Words<TYPE>::word* const* w, int64_t row, const char* x, int64_t x_row, int64_t k0,
                     int64_t k1, vf (&sums)[R][M]) {
    constexpr int64_t LINE = 64 / sizeof(typename Words<TYPE>::word), STEP = uses_dot(TYPE) ? 32 : W;
    int64_t k = k0;
    for (; k + LINE <= k1; k += LINE) {
        if constexpr (!single_stream(M)) UNROLL for (int i = 0; i < R; i++) __builtin_prefetch(w[i] + R * row + k, 0, 2);
        UNROLL for (int64_t step = 0; step < LINE; step += STEP) few_step<TYPE, R, M>(w, x, x_row, k + step, STEP, sums);
    }
    for (; k + STEP <= k1; k += STEP) few_step<TYPE, R, M>(w, x, x_row, k, STEP, sums);
    if (k < k1) few_step<TYPE, R, M>(w, x, x_row, k, k1 - k, sums);
}

// Rows [n0, n1) of the weights with M activation rows from m0. Where these do not fit L1 together, k is done in parts,
// and the sums of SIDE rows rest in memory meanwhile.
template <int TYPE, int M>
static void few_block(const LinearJob& job, int64_t n0, int64_t n1, int64_t m0) {
    typedef typename Words<TYPE>::word word;
    constexpr int R = rows_beside(M), SIDE = 6 * R;
    constexpr int64_t PART = larger(512, (24 << 10) / (M * (uses_dot(TYPE) ? 2 : 4)) / 512 * 512);
    const char* x = job.packed + m0 * job.packed_row;
    vf rest[SIDE][M];
    for (int64_t side = n0; side < n1; side += SIDE)
        for (int64_t k0 = 0; k0 < job.in; k0 += PART) {
            int64_t k1 = smaller(k0 + PART, job.in);
            for (int64_t n = side; n < smaller(side + SIDE, n1); n += R) {
                const word* w[R];
                UNROLL for (int i = 0; i < R; i++) w[i] = (const word*)job.w.data + smaller(n + i, n1 - 1) * job.in;
                vf sums[R][M];
                UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < M; j++)
                    sums[i][j] = k0 ? rest[n - side + i][j] : (vf){};
                few_dots<TYPE, R, M>(w, job.in, x, job.packed_row, k0, k1, sums);
                if (k1 < job.in) {
                    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < M; j++)
                        rest[n - side + i][j] = sums[i][j];
                    continue;
                }
                int64_t valid = smaller(R, n1 - n);
                UNROLL for (int i = 0; i < R; i++) if (i < valid) {
                    float bias = bias_of(job, n + i);
                    UNROLL for (int j = 0; j < M; j++) job.y[(m0 + j) * job.out + n + i] = sum(sums[i][j]) + bias;
                }
            }
        }
}

template <int TYPE>
static void few_chunk(void* data, int64_t chunk, int) {
    const LinearJob& job = *(const LinearJob*)data;
    int64_t n0 = chunk * job.chunk, n1 = smaller(n0 + job.chunk, job.out);
    for (int64_t m = 0; m < job.rows; m += FEW_GROUP) {
        switch (smaller(job.rows - m, FEW_GROUP)) {
            case 1: few_block<TYPE, 1>(job, n0, n1, m); break;
            case 2: few_block<TYPE, 2>(job, n0, n1, m); break;
            case 3: few_block<TYPE, 3>(job, n0, n1, m); break;
            case 4: few_block<TYPE, 4>(job, n0, n1, m); break;
            case 5: few_block<TYPE, 5>(job, n0, n1, m); break;
            case 6: few_block<TYPE, 6>(job, n0, n1, m); break;
            case 7: few_block<TYPE, 7>(job, n0, n1, m); break;
            default: few_block<TYPE, 8>(job, n0, n1, m); break;
        }
    }
}

template <int TYPE>
static void linear_few(LinearJob& job) {
    constexpr int64_t size = sizeof(typename Words<TYPE>::word);
    job.packed_row = round_up(job.in, 32) * (uses_dot(TYPE) ? 2 : 4);
    job.packed = (char*)puna_scratch((size_t)(job.rows * job.packed_row));
    for (int64_t m = 0; m < job.rows; m++) {
        const float* x = job.x + m * job.in;
        char* to = job.packed + m * job.packed_row;
        int64_t k = 0;
#ifdef BF16_DOT
        if constexpr (uses_dot(TYPE)) {
            for (; k < job.in; k += W)
                *(__m256i*)(to + k * 2) = (__m256i)_mm512_cvtneps_pbh((__m512)load_up_to(x + k, job.in - k));
            for (; k * 2 < job.packed_row; k += W) *(__m256i*)(to + k * 2) = (__m256i){};
            continue;
        }
#endif
        for (; k < job.in; k += W) store((float*)to + k, load_up_to(x + k, job.in - k));
        for (; k * 4 < job.packed_row; k += W) store((float*)to + k, (vf){});
    }
    int64_t bytes = job.out * job.in * size;
    // A region costs about a microsecond (ten where its threads sleep): below this the work is not worth one.
    constexpr int64_t INLINE_BYTES = 48 << 10;
    if (bytes * ceil_div(job.rows, 4) <= INLINE_BYTES) {
        job.chunk = job.out;
        few_chunk<TYPE>(&job, 0, 0);
        return;
    }
    int64_t chunk_bytes = smaller(larger(bytes / 16, 16 << 10), 128 << 10);
    job.chunk = round_up(larger(chunk_bytes / (job.in * size), 1), 8);
    puna_parallel(ceil_div(job.out, job.chunk), puna_threads(), few_chunk<TYPE>, &job);
}

// ---- many rows ----

constexpr int64_t ROW_BLOCK = 16 * LANES;  // activation rows packed at a time: their panels should stay in L3
constexpr int64_t OUT_BLOCK = 64;          // rows of weights that stay in L2 while the panels pass
// How much of k is done at a time, so that OUT_BLOCK rows of weights (256 KiB) and a panel stay in L2.
constexpr int64_t k_block(bool dot) { return dot ? 2048 : 1024; }

template <bool DOT>
INLINE int64_t lanes_bytes(int64_t in) {
    return round_up((DOT ? ceil_div(in, 2) : in) * LANES * 4, 64);
}

template <bool DOT>
static void pack_panel(void* data, int64_t panel, int) {
    const LinearJob& job = *(const LinearJob*)data;
    int64_t first = panel * LANES, rows = smaller(LANES, job.count - first), lanes = round_up(rows, W);
    const float* x = job.x + (job.first + first) * job.in;
    float* to = (float*)(job.packed + panel * lanes_bytes<DOT>(job.in));
    if constexpr (!DOT) {
        pack_lanes([&](int64_t i) { return x + i * job.in; }, rows, lanes, job.in, 1.0f, to);
    } else {
#ifdef BF16_DOT
        for (int64_t lane = 0; lane < lanes; lane += 4)
            for (int64_t k = 0; k < job.in; k += 8) {
                f4 pairs[4];
                UNROLL for (int i = 0; i < 4; i++) {
                    __m256 eight = _mm256_setzero_ps();
                    if (lane + i < rows)
                        eight = _mm256_maskz_loadu_ps((__mmask8)((1u << smaller(8, job.in - k)) - 1),
                                                      x + (lane + i) * job.in + k);
                    pairs[i] = (f4)_mm256_cvtneps_pbh(eight);
                }
                transpose4(pairs[0], pairs[1], pairs[2], pairs[3]);
                int64_t count = smaller(4, ceil_div(job.in - k, 2));
                UNROLL for (int i = 0; i < 4; i++)
                    if (i < count) *(f4_any*)(to + (k / 2 + i) * lanes + lane) = pairs[i];
            }
#endif
    }
}

#ifdef BF16_DOT
// As tile_rows, in pairs of k; the last k of an odd `count` is paired with zero.
template <int R, int V>
INLINE void tile_pairs(const half_any* const* rows, const float* panel, int64_t count, vf (&sums)[R][V]) {
    for (int64_t k = 0; k + 2 <= count; k += 2, panel += V * W) {
        __m512i x[V];
        UNROLL for (int j = 0; j < V; j++) x[j] = _mm512_load_si512(panel + j * W);
        UNROLL for (int i = 0; i < R; i++) {
            __m512i w = _mm512_set1_epi32((int)*(const word_any*)(rows[i] + k));
            UNROLL for (int j = 0; j < V; j++) dot_pairs(sums[i][j], w, x[j]);
        }
    }
    if (count % 2)
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++)
            dot_pairs(sums[i][j], _mm512_set1_epi32(rows[i][count - 1]), _mm512_load_si512(panel + j * W));
}
#endif

struct Block {
    int64_t n0, n1;       // rows of weights
    int64_t k0, k1;       // the part of k
    int64_t first, rows;  // activation rows, of the panel
    const float* panel;   // at k0
    float* sums;          // where sums rest between parts of k: [tile][NR][V·W]
    const void* w;        // row n0 at k0
    int64_t row;          // words from one row of w to the next
};

// All tiles of one block of weights against one panel.
template <bool DOT, int V>
static void many_tiles(const LinearJob& job, const Block& b) {
    typedef typename Words<DOT ? BF16 : F32>::word word;
    for (int64_t n = b.n0; n < b.n1; n += NR) {
        const word* w[NR];
        UNROLL for (int i = 0; i < NR; i++) w[i] = (const word*)b.w + (smaller(n + i, b.n1 - 1) - b.n0) * b.row;
        float* rest = b.sums + (n - b.n0) * V * W;
        vf sums[NR][V];
        if (b.k0 == 0)
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) sums[i][j] = (vf){};
        else
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++)
                sums[i][j] = load(rest + (i * V + j) * W);
#ifdef BF16_DOT
        if constexpr (DOT) tile_pairs<NR, V>(w, b.panel, b.k1 - b.k0, sums);
        else
#endif
            tile_rows<NR, V>(w, b.panel, b.k1 - b.k0, sums);
        if (b.k1 < job.in) {
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++)
                store(rest + (i * V + j) * W, sums[i][j]);
            continue;
        }
        float tile[NR * V * W] __attribute__((aligned(64)));
        int64_t valid = smaller(NR, b.n1 - n);
        UNROLL for (int i = 0; i < NR; i++) {
            vf bias = splat(i < valid ? bias_of(job, n + i) : 0.0f);
            UNROLL for (int j = 0; j < V; j++) store(tile + (i * V + j) * W, sums[i][j] + bias);
        }
        float* y = job.y + b.first * job.out + n;
        unpack_lanes(tile, V * W, valid, b.rows, [&](int64_t lane) { return y + lane * job.out; });
    }
}

// What one thread needs besides the panels: sums at rest, and the weights of a block widened to float32.
INLINE int64_t sums_bytes(int64_t panels) { return (OUT_BLOCK + NR) * panels * LANES * 4; }
constexpr int64_t WIDE_ROW = k_block(false) + 16;  // not a power of two, or all rows would meet in one set of the cache

template <int TYPE>
static void many_chunk(void* data, int64_t chunk, int thread) {
    typedef typename Words<TYPE>::word word;
    constexpr bool DOT = uses_dot(TYPE), WIDEN = !DOT && TYPE != F32;
    const LinearJob& job = *(const LinearJob*)data;
    char* own = job.thread_scratch + thread * job.thread_bytes;
    int64_t each = ceil_div(job.panels, job.groups), group = chunk % job.groups;
    int64_t p0 = group * each, p1 = smaller(p0 + each, job.panels);
    Block b;
    b.n0 = chunk / job.groups * OUT_BLOCK;
    b.n1 = smaller(b.n0 + OUT_BLOCK, job.out);
    const word* w = (const word*)job.w.data + b.n0 * job.in;
    for (b.k0 = 0; b.k0 < job.in; b.k0 = b.k1) {
        b.k1 = smaller(b.k0 + k_block(DOT), job.in);
        if constexpr (WIDEN) {
            float* wide = (float*)(own + sums_bytes(job.panels));
            for (int64_t n = 0; n < b.n1 - b.n0; n++)
                for (int64_t k = b.k0; k < b.k1; k += W)
                    store_up_to(wide + n * WIDE_ROW + k - b.k0, widen_up_to<TYPE>(w + n * job.in + k, b.k1 - k), b.k1 - k);
            b.w = wide;
            b.row = WIDE_ROW;
        } else {
            b.w = w + b.k0;
            b.row = job.in;
        }
        for (int64_t p = p0; p < p1; p++) {
            int64_t rows = smaller(LANES, job.count - p * LANES), vectors = ceil_div(rows, W);
            b.first = job.first + p * LANES;
            b.rows = rows;
            b.panel = (const float*)(job.packed + p * lanes_bytes<DOT>(job.in)) + (DOT ? b.k0 / 2 : b.k0) * vectors * W;
            b.sums = (float*)own + (p - p0) * (OUT_BLOCK + NR) * LANES;
            if (vectors == 3) many_tiles<DOT, 3>(job, b);
            else if (vectors == 2) many_tiles<DOT, 2>(job, b);
            else many_tiles<DOT, 1>(job, b);
        }
    }
}

template <int TYPE>
static void linear_many(LinearJob& job) {
    constexpr bool DOT = uses_dot(TYPE);
    int threads = puna_threads();
    int64_t most = ceil_div(smaller(job.rows, ROW_BLOCK), LANES), all = most * lanes_bytes<DOT>(job.in);
    job.thread_bytes = round_up(sums_bytes(most) + (DOT || TYPE == F32 ? 0 : OUT_BLOCK * WIDE_ROW * 4), 64);
    job.packed = (char*)puna_scratch((size_t)(all + threads * job.thread_bytes));
    job.thread_scratch = job.packed + all;
    int64_t blocks = ceil_div(job.out, OUT_BLOCK);
    for (job.first = 0; job.first < job.rows; job.first += ROW_BLOCK) {
        job.count = smaller(ROW_BLOCK, job.rows - job.first);
        job.panels = ceil_div(job.count, LANES);
        // Enough chunks for every thread to get several, or the last one works alone.
        job.groups = smaller(job.panels, ceil_div(4 * threads, blocks));
        job.groups = ceil_div(job.panels, ceil_div(job.panels, job.groups));
        puna_parallel(job.panels, threads, pack_panel<DOT>, &job);
        puna_parallel(blocks * job.groups, threads, many_chunk<TYPE>, &job);
    }
}

// From this many rows on the second way is quicker.
constexpr int64_t MANY = W == 16 ? 13 : 9;

template <int TYPE>
static void linear_of(LinearJob& job) {
    if (job.rows < MANY || puna_invariant()) linear_few<TYPE>(job);
    else linear_many<TYPE>(job);
}

static void linear_dense(const float* x, int64_t rows, int64_t in, const Product& product) {
    LinearJob job = {};
    job.x = x;
    job.w = product.w;
    job.bias = product.bias;
    job.y = product.y;
    job.rows = rows;
    job.in = in;
    job.out = product.out;
    if (job.w.type == F32) linear_of<F32>(job);
    else if (job.w.type == F16) linear_of<F16>(job);
    else linear_of<BF16>(job);
}

// Runs of packed products go together; each dense one is a call of its own.
static void linear(const float* x, int64_t rows, int64_t in, const Product* products, int count) {
    for (int i = 0, packed; i < count; i += packed + (packed == 0)) {
        for (packed = 0; i + packed < count && products[i + packed].w.type > BF16;) packed++;
        if (packed) linear_packed(x, rows, in, products + i, packed);
        else linear_dense(x, rows, in, products[i]);
    }
}
