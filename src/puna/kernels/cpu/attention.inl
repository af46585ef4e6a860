// Causal grouped attention by online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): scores never leave the cache.
//
// The H / G query heads that share a key/value head, times the T tokens, are the *rows* of one (sequence, group). Rows
// of one token are neighbours. Two ways, by T:
// - few (decode, up to FEW_TOKENS): the lanes run along D. Keys are cut into stretches of fixed length, each a task, so
//   that one stream with a long context keeps all threads busy; the stretches' results are merged at the end. The
//   memory is the limit. Numbers of a cache are widened to float32 as they are read.
// - many (prefill): the rows lie in the lanes (see tile.inl): maxima, sums and exponentials need no shuffles. A block of
//   keys is brought into the form that the products like once, for several panels of rows. Keys beyond a panel's last
//   position are not touched. The multiply-adds are the limit.
// The cuts do not depend on T or B, so a row's bits depend on its own sequence only; between the two ways they differ.
//
// With AVX-512 BF16, a cache of 16 bits or less and the caller's leave (`bf16`), the second way rounds queries, keys,
// values and the softmax's numerators to bfloat16 (vdpbf16ps; sums, maxima and denominators stay float32).

struct AttentionJob {
    const float* q;
    const char *k, *v;
    const int32_t* positions;
    float* out;
    int64_t B, T, S, H, G, D, R;  // R = H / G, the heads of a group
    int64_t head, token;          // bytes of the cache from one head to the next, and from one token to the next
    float scale;                  // log2(e) / √D: all exponentials here are powers of 2
    char* thread_scratch;
    int64_t thread_bytes;
    int64_t tiles;         // many: tiles of rows
    int64_t stretches;     // few: stretches of keys
    int64_t parts;         // few: parts of the groups, each a task
    int64_t near;          // few: keys at a time
    int64_t threads;       // few: that share the stretches
    float* partial;        // few: [B, G, stretches, rows, PARTIAL_HEAD + padded D]: maximum, sum, weighted values
    int64_t partial_row;
};

// How many keys row i of sequence b sees.
INLINE int64_t keys_seen(const AttentionJob& job, int64_t b, int64_t i) {
    int64_t t = i / job.R;
    return (job.positions ? job.positions[b * job.T + t] : t) + 1;
}

// Where row i of (sequence b, group g) starts, in q and in out.
INLINE int64_t row_at(const AttentionJob& job, int64_t b, int64_t g, int64_t i) {
    return ((b * job.T + i / job.R) * job.H + g * job.R + i % job.R) * job.D;
}

// ---- many rows ----

constexpr int64_t KEY_BLOCK = 128;  // keys whose scores rest in L1/L2 at a time
constexpr int64_t QUERY_PANELS = 4;  // panels of rows that share a block of keys

#ifdef BF16_DOT
constexpr bool attends_in_pairs(int type, bool bf16) { return bf16 && type != F32; }

// Two vectors as one of bfloat16 pairs: (a[0], b[0]), (a[1], b[1]), ...
INLINE __m512i pair_up(vf a, vf b) {
    const __m512i order = (__m512i)(__v32hi){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// As tile_rows and tile_columns, over pairs of bfloat16: sums[i][j] += Σ_k words[i · step_i + k · step_k] · panel[k][j].
template <int R, int V>
INLINE void tile_words(const uint32_t* words, int64_t step_i, int64_t step_k, const float* panel, int64_t count,
                       vf (&sums)[R][V]) {
    for (int64_t k = 0; k < count; k++, words += step_k, panel += V * W) {
        __m512i x[V];
        UNROLL for (int j = 0; j < V; j++) x[j] = _mm512_load_si512(panel + j * W);
        UNROLL for (int i = 0; i < R; i++) {
            __m512i w = _mm512_set1_epi32((int)words[i * step_i]);
            UNROLL for (int j = 0; j < V; j++) dot_pairs(sums[i][j], w, x[j]);
        }
    }
}
#else
constexpr bool attends_in_pairs(int, bool) { return false; }
#endif

// Up to LANES rows and what is known of them so far.
struct Panel {
    int64_t first, rows;
    int64_t most, least;  // keys that any of them sees, that all of them see
    float *q, *sums;      // [D (or D/2 pairs)][lanes] and [D][lanes]
    float *peak, *total;  // [lanes]
    int32_t* seen;        // [lanes]
};

// KEY_BLOCK keys from s0 on. Float32: keys and values, key_row and value_row apart, in the cache itself where that is
// float32. Pairs: keys [key][D/2], values [key/2][D], pairs of neighbouring d and of neighbouring keys.
struct KeyBlock {
    int64_t s0, count;
    const float *keys, *values;
    int64_t key_row, value_row;
};

template <int TYPE, bool PAIRS>
INLINE void bring(const AttentionJob& job, int64_t b, int64_t g, float* keys, float* values, KeyBlock& block) {
    const char* key = job.k + (b * job.S + block.s0) * job.token + g * job.head;
    const char* value = job.v + (b * job.S + block.s0) * job.token + g * job.head;
    int64_t D = job.D;
    if constexpr (TYPE == F32) {
        block.keys = (const float*)key;
        block.values = (const float*)value;
        block.key_row = block.value_row = job.token / 4;
        return;
    }
    block.keys = keys;
    block.values = values;
    block.value_row = round_up(D, W);
    if constexpr (!PAIRS) {
        block.key_row = block.value_row;
        for (int64_t s = 0; s < block.count; s++)
            for (int64_t d = 0; d < D; d += W) {
                store(keys + s * block.key_row + d, cached<TYPE>(key + s * job.token, d, D - d));
                store(values + s * block.value_row + d, cached<TYPE>(value + s * job.token, d, D - d));
            }
        return;
    }
#ifdef BF16_DOT
    block.key_row = round_up(D, 32) / 2;
    for (int64_t s = 0; s < round_up(block.count, NR); s++) {
        __m512i* to = (__m512i*)(keys + s * block.key_row);
        const char* from = key + s * job.token;
        for (int64_t d = 0; d < D; d += 32) {
            vf low = {}, high = {};
            if (s < block.count) low = cached<TYPE>(from, d, D - d);
            if (s < block.count && d + W < D) high = cached<TYPE>(from, d + W, D - d - W);
            *to++ = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        }
    }
    for (int64_t s = 0; s < block.count; s += 2)
        for (int64_t d = 0; d < D; d += W) {
            vf odd = {};
            if (s + 1 < block.count) odd = cached<TYPE>(value + (s + 1) * job.token, d, D - d);
            _mm512_store_si512(values + s / 2 * block.value_row + d,
                               pair_up(cached<TYPE>(value + s * job.token, d, D - d), odd));
        }
#endif
}

// sums[i][j] = key s + i · query j, for NR keys.
template <bool PAIRS, int V>
INLINE void score_tile(const KeyBlock& a, const Panel& p, int64_t s, int64_t D, vf (&tile)[NR][V]) {
    UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) tile[i][j] = (vf){};
    if constexpr (!PAIRS) {
        const float* key[NR];
        UNROLL for (int i = 0; i < NR; i++) key[i] = a.keys + smaller(s + i, a.count - 1) * a.key_row;
        tile_rows<NR, V>(key, p.q, D, tile);
    } else {
#ifdef BF16_DOT
        tile_words<NR, V>((const uint32_t*)a.keys + s * a.key_row, a.key_row, 1, p.q, ceil_div(D, 2), tile);
#endif
    }
}

// R numbers of all rows' results: sums = sums · shrink + Σ value · weight, over the first `count` keys.
template <bool PAIRS, int R, int V>
INLINE void value_tile(const KeyBlock& a, float* sums, const float* weights, int64_t d, int64_t count, const vf (&shrink)[V]) {
    vf tile[R][V];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++)
        tile[i][j] = load(sums + ((d + i) * V + j) * W) * shrink[j];
    if constexpr (!PAIRS) tile_columns<R, V>(a.values + d, a.value_row, weights, count, tile);
#ifdef BF16_DOT
    if constexpr (PAIRS)
        tile_words<R, V>((const uint32_t*)a.values + d, 1, a.value_row, weights, ceil_div(count, 2), tile);
#endif
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++) store(sums + ((d + i) * V + j) * W, tile[i][j]);
}

// One panel of rows against one block of keys.
template <bool PAIRS, int V>
static void attend_block(const KeyBlock& a, const Panel& p, int64_t D, float* scores) {
    int64_t count = smaller(a.count, p.most - a.s0);
    vi seen[V];
    vf peak[V], top[V];
    UNROLL for (int j = 0; j < V; j++) {
        seen[j] = *(const vi*)(p.seen + j * W) - (int32_t)a.s0;
        top[j] = peak[j] = load(p.peak + j * W);
    }
    for (int64_t s = 0; s < count; s += NR) {
        vf tile[NR][V];
        score_tile<PAIRS, V>(a, p, s, D, tile);
        bool masked = a.s0 + s + NR > p.least;
        UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) {
            if (masked) tile[i][j] = select((int32_t)(s + i) < seen[j], tile[i][j], splat(-INFINITE));
            top[j] = maximum(tile[i][j], top[j]);
            store(scores + ((s + i) * V + j) * W, tile[i][j]);
        }
    }
    vf shift[V], shrink[V], total[V];
    UNROLL for (int j = 0; j < V; j++) {
        shift[j] = select(top[j] == splat(-INFINITE), (vf){}, top[j]);  // a row that sees nothing yet
        shrink[j] = exponential2(peak[j] - shift[j]);
        store(p.peak + j * W, top[j]);
        total[j] = load(p.total + j * W) * shrink[j];
    }
    if constexpr (!PAIRS) {
        for (int64_t s = 0; s < count; s++) UNROLL for (int j = 0; j < V; j++) {
            float* at = scores + (s * V + j) * W;
            vf x = exponential2(load(at) - shift[j]);
            total[j] += x;
            store(at, x);
        }
    } else {
#ifdef BF16_DOT
        // Pairs of keys; of an odd last one the second was masked above. They take the scores' place.
        for (int64_t s = 0; s < count; s += 2) UNROLL for (int j = 0; j < V; j++) {
            vf x = exponential2(load(scores + (s * V + j) * W) - shift[j]);
            vf y = exponential2(load(scores + ((s + 1) * V + j) * W) - shift[j]);
            total[j] += x;
            total[j] += y;
            _mm512_store_si512(scores + (s / 2 * V + j) * W, pair_up(x, y));
        }
#endif
    }
    UNROLL for (int j = 0; j < V; j++) store(p.total + j * W, total[j]);
    int64_t d = 0;
    for (; d + NR <= D; d += NR) value_tile<PAIRS, NR, V>(a, p.sums, scores, d, count, shrink);
    for (; d < D; d++) value_tile<PAIRS, 1, V>(a, p.sums, scores, d, count, shrink);
}

template <int TYPE, bool PAIRS>
static void many_rows_chunk(void* data, int64_t chunk, int thread) {
    const AttentionJob& job = *(const AttentionJob*)data;
    // The last tiles see the most keys: they go first, so that no thread is left alone with one.
    int64_t tile = job.tiles - 1 - chunk / (job.B * job.G), g = chunk % job.G, b = chunk / job.G % job.B;
    int64_t first = tile * QUERY_PANELS * LANES, rows = smaller(QUERY_PANELS * LANES, job.T * job.R - first), D = job.D;
    float* free = (float*)(job.thread_scratch + thread * job.thread_bytes);
    auto take = [&](int64_t count) { float* at = free; free += round_up(count, 16); return at; };
    float *scores = take((KEY_BLOCK + NR) * LANES), *keys = take((KEY_BLOCK + NR) * round_up(D, 32)),
          *values = take(KEY_BLOCK * round_up(D, W));
    Panel panels[QUERY_PANELS];
    int64_t count = ceil_div(rows, LANES), most = 0;
    for (int64_t n = 0; n < count; n++) {
        Panel& p = panels[n];
        p.first = first + n * LANES;
        p.rows = smaller(LANES, rows - n * LANES);
        int64_t lanes = round_up(p.rows, W);
        p.q = take(D * lanes + LANES);
        p.sums = take(D * lanes);
        p.peak = take(lanes);
        p.total = take(lanes);
        p.seen = (int32_t*)take(lanes);
        p.most = 0;
        p.least = job.S;
        for (int64_t i = 0; i < lanes; i++) {
            int64_t seen = i < p.rows ? keys_seen(job, b, p.first + i) : 0;
            p.seen[i] = (int32_t)seen;
            p.peak[i] = -INFINITE;
            p.total[i] = 0.0f;
            if (i >= p.rows) continue;
            p.most = larger(p.most, seen);
            p.least = smaller(p.least, seen);
        }
        most = larger(most, p.most);
        for (int64_t i = 0; i < D * lanes; i += W) store(p.sums + i, (vf){});
        pack_lanes([&](int64_t i) { return job.q + row_at(job, b, g, p.first + i); }, p.rows, lanes, D, job.scale, p.q);
#ifdef BF16_DOT
        if constexpr (PAIRS)  // in place: pair d/2 lies no further than row d
            for (int64_t d = 0; d < D; d += 2)
                for (int64_t i = 0; i < lanes; i += W) {
                    vf odd = {};
                    if (d + 1 < D) odd = load(p.q + (d + 1) * lanes + i);
                    _mm512_store_si512(p.q + d / 2 * lanes + i, pair_up(load(p.q + d * lanes + i), odd));
                }
#endif
    }
    KeyBlock block;
    for (block.s0 = 0; block.s0 < most; block.s0 += KEY_BLOCK) {
        block.count = smaller(KEY_BLOCK, most - block.s0);
        bring<TYPE, PAIRS>(job, b, g, keys, values, block);
        for (int64_t n = 0; n < count; n++) {
            const Panel& p = panels[n];
            if (block.s0 >= p.most) continue;
            if (p.rows > 2 * W) attend_block<PAIRS, 3>(block, p, D, scores);
            else if (p.rows > W) attend_block<PAIRS, 2>(block, p, D, scores);
            else attend_block<PAIRS, 1>(block, p, D, scores);
        }
    }
    for (int64_t n = 0; n < count; n++) {
        const Panel& p = panels[n];
        int64_t lanes = round_up(p.rows, W);
        for (int64_t i = 0; i < lanes; i += W) {
            vf total = load(p.total + i);
            store(p.total + i, select(total == (vf){}, (vf){}, splat(1.0f) / total));
        }
        for (int64_t d = 0; d < D; d++)
            for (int64_t i = 0; i < lanes; i += W) {
                float* at = p.sums + d * lanes + i;
                store(at, load(at) * load(p.total + i));
            }
        unpack_lanes(p.sums, lanes, D, p.rows, [&](int64_t i) { return job.out + row_at(job, b, g, p.first + i); });
    }
}

INLINE int64_t many_rows_scratch(int64_t D) {
    int64_t wide = round_up(D, 32);
    return round_up(((KEY_BLOCK + NR) * (LANES + wide) + KEY_BLOCK * wide + QUERY_PANELS * (2 * D + 4 + 5) * LANES) * 4 + 4096, 64);
}

// ---- few rows ----

constexpr int64_t FEW_TOKENS = 8;
constexpr int64_t STRETCH = 512;      // keys a task
constexpr int64_t NEAR = 128;         // keys at a time, at most (job.near)
constexpr int64_t PARTIAL_HEAD = 16;  // maximum and sum, before the weighted values
constexpr int few_rows_beside(int64_t rows) { return REGISTERS == 32 && rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

// The sums of N vectors; of each the same tree as `sum`, so that it does not matter how many are summed together.
template <int N>
INLINE void sum_each(const vf (&x)[N], float* out) {
#if WIDTH == 16
    static_assert(N == 16, "one vector of sums");
    // Halves added, then quarters, then pairs: two vectors become one at each step.
    auto halves = [](vf a, vf b) {
        return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE);
    };
    auto quarters = [](vf a, vf b) {
        return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD);
    };
    auto pairs = [](vf a, vf b) {
        return (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44) + (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xEE);
    };
    auto singles = [](vf a, vf b) {
        return (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88) + (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD);
    };
    vf quarter[4];
    UNROLL for (int i = 0; i < 4; i++) quarter[i] = quarters(halves(x[i], x[i + 4]), halves(x[i + 8], x[i + 12]));
    store(out, singles(pairs(quarter[0], quarter[1]), pairs(quarter[2], quarter[3])));
#elif WIDTH == 8
    static_assert(N % 8 == 0, "whole vectors of sums");
    for (int n = 0; n < N; n += 8) {
        vf half[4];
        UNROLL for (int i = 0; i < 4; i++) {
            __m256 a = (__m256)x[n + i], b = (__m256)x[n + i + 4];
            half[i] = (vf)_mm256_permute2f128_ps(a, b, 0x20) + (vf)_mm256_permute2f128_ps(a, b, 0x31);
        }
        vf pair[2];
        UNROLL for (int i = 0; i < 2; i++) {
            __m256 a = (__m256)half[2 * i], b = (__m256)half[2 * i + 1];
            pair[i] = (vf)_mm256_shuffle_ps(a, b, 0x44) + (vf)_mm256_shuffle_ps(a, b, 0xEE);
        }
        store(out + n, (vf)_mm256_shuffle_ps((__m256)pair[0], (__m256)pair[1], 0x88) +
                           (vf)_mm256_shuffle_ps((__m256)pair[0], (__m256)pair[1], 0xDD));
    }
#else
    static_assert(N % 4 == 0, "whole vectors of sums");
    for (int n = 0; n < N; n += 4) {
        f4 a = x[n], b = x[n + 1], c = x[n + 2], d = x[n + 3];
        transpose4(a, b, c, d);
        store(out + n, (a + c) + (b + d));
    }
#endif
}

constexpr int SUMS = W == 16 ? 16 : 8;  // sums kept beside each other by few_scores

// A stretch of memory that is fetched into L2, a little at each step of other work: without it, tasks that jump from
// head to head reach a third of the bandwidth, and all at once it would stall the core like any other read.
struct Ahead {
    const char *next, *end;
    __attribute__((always_inline)) void step(int64_t bytes) {
        const char* until = next + bytes < end ? next + bytes : end;
        for (; next < until; next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// scores[i][s] = q[i] · key s, for N rows and `count` keys (rounded up to whole steps: the last one again).
template <int TYPE, int N>
INLINE void few_scores(const float* q, int64_t q_row, const char* keys, int64_t token, int64_t D, int64_t count,
                       float* scores, Ahead& ahead) {
    constexpr int K = SUMS / N;
    int64_t head = head_bytes(TYPE, D);
    for (int64_t s = 0; s < count; s += K) {
        ahead.step(K * head);
        const char* key[K];
        UNROLL for (int j = 0; j < K; j++) key[j] = keys + smaller(s + j, count - 1) * token;
        vf sums[N * K];
        UNROLL for (int i = 0; i < N * K; i++) sums[i] = (vf){};
        for (int64_t d = 0; d < D; d += W) {
            vf row[N];
            UNROLL for (int i = 0; i < N; i++) keep(row[i] = load(q + i * q_row + d));
            UNROLL for (int j = 0; j < K; j++) {
                vf x = cached<TYPE>(key[j], d, D - d);
                UNROLL for (int i = 0; i < N; i++) sums[i * K + j] += x * row[i];
            }
        }
        float each[N * K];
        sum_each<N * K>(sums, each);
        UNROLL for (int i = 0; i < N; i++) __builtin_memcpy(scores + i * NEAR + s, each + i * K, K * 4);
    }
}

// out[i] = out[i] · shrink[i] + Σ_s weights[i][s] · value s, for N rows.
template <int TYPE, int N, int V>
INLINE void few_columns(const float* weights, const float* shrink, const char* values, int64_t token, int64_t d,
                        int64_t rest, int64_t count, float* out, int64_t out_row, Ahead& ahead) {
    vf sums[N][V];
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < V; j++)
        sums[i][j] = load(out + i * out_row + d + j * W) * shrink[i];
    for (int64_t s = 0; s < count; s++, values += token) {
        ahead.step(head_bytes(TYPE, V * W));
        vf x[V];
        UNROLL for (int j = 0; j < V; j++) keep(x[j] = cached<TYPE>(values, d + j * W, rest - j * W));
        UNROLL for (int i = 0; i < N; i++) {
            vf weight = splat(weights[i * NEAR + s]);
            UNROLL for (int j = 0; j < V; j++) sums[i][j] += weight * x[j];
        }
    }
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < V; j++)
        store(out + i * out_row + d + j * W, sums[i][j]);
}

template <int TYPE, int N>
INLINE void few_values(const float* weights, const float* shrink, const char* values, int64_t token, int64_t D,
                       int64_t count, float* out, int64_t out_row, Ahead& ahead) {
    int64_t d = 0;
    for (; d + 4 * W <= D; d += 4 * W)
        few_columns<TYPE, N, 4>(weights, shrink, values, token, d, 4 * W, count, out, out_row, ahead);
    for (; d < D; d += W) few_columns<TYPE, N, 1>(weights, shrink, values, token, d, D - d, count, out, out_row, ahead);
}

// N rows of one group against `count` keys near each other. A row's partial result: its maximum and sum so far, then
// the weighted values.
template <int TYPE, int N>
static void few_near(const AttentionJob& job, const float* q, int64_t q_row, const int64_t* seen, const char* keys,
                     const char* values, int64_t count, float* partial, Ahead& ahead_k, Ahead& ahead_v) {
    float scores[N * NEAR] __attribute__((aligned(64))), shrink[N];
    few_scores<TYPE, N>(q, q_row, keys, job.token, job.D, count, scores, ahead_k);
    for (int i = 0; i < N; i++) {
        float *row = scores + i * NEAR, *so_far = partial + i * job.partial_row;
        for (int64_t s = larger(smaller(seen[i], count), 0); s < round_up(count, W); s++) row[s] = -INFINITE;
        vf top = splat(so_far[0]), total = {};
        for (int64_t s = 0; s < count; s += W) top = maximum(load(row + s), top);
        float peak = largest(top);
        vf shift = splat(peak == -INFINITE ? 0.0f : peak);
        for (int64_t s = 0; s < count; s += W) {
            vf x = exponential2(load(row + s) - shift);
            total += x;
            store(row + s, x);
        }
        shrink[i] = exponential2(splat(so_far[0]) - shift)[0];
        so_far[0] = peak;
        so_far[1] = so_far[1] * shrink[i] + sum(total);
    }
    few_values<TYPE, N>(scores, shrink, values, job.token, job.D, count, partial + PARTIAL_HEAD, job.partial_row,
                        ahead_v);
}

template <int TYPE>
static void few_rows_chunk(void* data, int64_t chunk, int thread) {
    const AttentionJob& job = *(const AttentionJob*)data;
    int64_t part = chunk % job.parts, stretch = chunk / job.parts % job.stretches, b = chunk / job.parts / job.stretches;
    int64_t near = job.near, first = stretch * STRETCH, D = job.D, rows = job.T * job.R, most = 0;
    int64_t* seen = (int64_t*)(job.thread_scratch + thread * job.thread_bytes);
    for (int64_t i = 0; i < rows; i++) {
        seen[i] = smaller(keys_seen(job, b, i) - first, STRETCH);
        most = larger(most, seen[i]);
    }
    if (most == 0) return;
    int64_t g0 = job.G * part / job.parts, g1 = job.G * (part + 1) / job.parts, q_row = round_up(D, W);
    int64_t* near_seen = seen + rows;  // the same for the keys that are near
    float* q = (float*)(seen + round_up(2 * rows, 8));
    auto partial_of = [&](int64_t g) {
        return job.partial + ((b * job.G + g) * job.stretches + stretch) * rows * job.partial_row;
    };
    for (int64_t g = g0; g < g1; g++)
        for (int64_t i = 0; i < rows; i++) {
            const float* from = job.q + row_at(job, b, g, i);
            float *to = q + ((g - g0) * rows + i) * q_row, *partial = partial_of(g) + i * job.partial_row;
            for (int64_t d = 0; d < D; d += W) store(to + d, load_up_to(from + d, D - d) * job.scale);
            for (int64_t d = 0; d < job.partial_row; d += W) store(partial + d, (vf){});
            partial[0] = -INFINITE;
        }
    const char* keys = job.k + (b * job.S + first) * job.token + g0 * job.head;
    const char* values = job.v + (b * job.S + first) * job.token + g0 * job.head;
    for (int64_t s0 = 0; s0 < most; s0 += near, keys += near * job.token, values += near * job.token) {
        int64_t count = smaller(near, most - s0);
        for (int64_t i = 0; i < rows; i++) near_seen[i] = seen[i] - s0;
        // What comes next: in this stretch, or the beginning of the one that this thread is likely to get.
        const char *next_keys = keys + near * job.token, *next_values = values + near * job.token;
        int64_t next = larger(smaller(near, most - s0 - near), 0) * job.token;
        if (s0 + near >= STRETCH && stretch + job.threads < job.stretches) {
            next_keys += (job.threads - 1) * STRETCH * job.token;
            next_values += (job.threads - 1) * STRETCH * job.token;
            next = near * job.token;
        }
        for (int64_t g = g0; g < g1; g++) {
            // This group's share of the keys that come next, in the order in which they lie in memory.
            int64_t from = job.parts > 1 ? 0 : next * (g - g0) / (g1 - g0) / 64 * 64;
            int64_t to = job.parts > 1 ? 0 : next * (g - g0 + 1) / (g1 - g0) / 64 * 64;
            Ahead ahead_k = {next_keys + from, next_keys + to}, ahead_v = {next_values + from, next_values + to};
            const char *key = keys + (g - g0) * job.head, *value = values + (g - g0) * job.head;
            for (int64_t i = 0; i < rows;) {
                const float* row = q + ((g - g0) * rows + i) * q_row;
                float* partial = partial_of(g) + i * job.partial_row;
                int beside = few_rows_beside(rows - i);
                auto* attend = beside == 4 ? few_near<TYPE, few_rows_beside(4)> : beside == 2 ? few_near<TYPE, 2> : few_near<TYPE, 1>;
                attend(job, row, q_row, near_seen + i, key, value, count, partial, ahead_k, ahead_v);
                i += beside;
            }
        }
    }
}

// The stretches of each row of one (sequence, group) merged:
// out = Σ 2^(peak - top) · values / Σ 2^(peak - top) · sum.
static void few_rows_merge(void* data, int64_t chunk, int) {
    const AttentionJob& job = *(const AttentionJob*)data;
    int64_t rows = job.T * job.R, D = job.D, b = chunk / job.G, g = chunk % job.G;
    for (int64_t i = 0; i < rows; i++) {
        float* out = job.out + row_at(job, b, g, i);
        int64_t stretches = ceil_div(keys_seen(job, b, i), STRETCH);
        const float* first = job.partial + (chunk * job.stretches * rows + i) * job.partial_row;
        int64_t step = rows * job.partial_row;
        float top = -INFINITE;
        for (int64_t s = 0; s < stretches; s++) top = first[s * step] > top ? first[s * step] : top;
        vf total = {};
        for (int64_t d = 0; d < D; d += W) store_up_to(out + d, (vf){}, D - d);
        if (stretches == 0) continue;
        if (stretches == 1) {
            vf norm = splat(1.0f) / splat(first[1]);
            for (int64_t d = 0; d < D; d += W) store_up_to(out + d, load(first + PARTIAL_HEAD + d) * norm, D - d);
            continue;
        }
        for (int64_t s = 0; s < stretches; s++) total += exponential2(splat(first[s * step] - top)) * first[s * step + 1];
        for (int64_t s = 0; s < stretches; s++) {
            const float* partial = first + s * step;
            vf share = exponential2(splat(partial[0] - top)) / total;
            for (int64_t d = 0; d < D; d += W)
                store_up_to(out + d, load_up_to(out + d, D - d) + load(partial + PARTIAL_HEAD + d) * share, D - d);
        }
    }
}

template <int TYPE>
static void attention_of(AttentionJob& job, bool bf16) {
    int threads = puna_threads();
    int64_t rows = job.T * job.R, D = job.D;
    if (job.T > FEW_TOKENS) {
        job.tiles = ceil_div(rows, QUERY_PANELS * LANES);
        job.thread_bytes = many_rows_scratch(D);
        job.thread_scratch = (char*)puna_scratch((size_t)(threads * job.thread_bytes));
        Run run = bf16 ? many_rows_chunk<TYPE, attends_in_pairs(TYPE, true)> : many_rows_chunk<TYPE, false>;
        puna_parallel(job.tiles * job.B * job.G, threads, run, &job);
        return;
    }
    int64_t most = 0, work = 0;  // keys of the longest sequence, and of all
    for (int64_t b = 0; b < job.B; b++) {
        int64_t longest = 0;
        for (int64_t i = 0; i < rows; i += job.R) longest = larger(longest, keys_seen(job, b, i));
        most = larger(most, longest);
        work += longest;
    }
    job.stretches = larger(1, ceil_div(most, STRETCH));
    // These keys and values and the next, which are on their way, share L2.
    job.near = NEAR * job.token <= 128 << 10 ? NEAR : NEAR / 2;
    // Groups are kept together, as they lie in memory, unless there would be too few tasks.
    job.parts = smaller(job.G, ceil_div(4 * threads, job.B * job.stretches));
    job.partial_row = PARTIAL_HEAD + round_up(D, W);
    job.thread_bytes = round_up(round_up(2 * rows, 8) * 8 + ceil_div(job.G, job.parts) * rows * round_up(D, W) * 4, 64);
    int64_t all = round_up(job.B * job.G * job.stretches * rows * job.partial_row * 4, 64);
    job.partial = (float*)puna_scratch((size_t)(all + threads * job.thread_bytes));
    job.thread_scratch = (char*)job.partial + all;
    job.threads = threads;
    int64_t chunks = job.B * job.stretches * job.parts;
    if (work * job.T * job.H * D <= 32 << 10) threads = 1;
    puna_parallel(chunks, threads, few_rows_chunk<TYPE>, &job);
    puna_parallel(job.B * job.G, chunks * rows > 64 ? threads : 1, few_rows_merge, &job);
}

static void attention(const float* q, Weights k, Weights v, const int32_t* positions, int64_t B, int64_t T, int64_t S,
                      int64_t H, int64_t G, int64_t D, bool bf16, float* out) {
    AttentionJob job = {};
    job.q = q, job.k = (const char*)k.data, job.v = (const char*)v.data, job.positions = positions, job.out = out;
    job.B = B, job.T = T, job.S = S, job.H = H, job.G = G, job.D = D, job.R = H / G;
    job.head = head_bytes(k.type, D), job.token = G * job.head;
    job.scale = LOG2_E / __builtin_sqrtf((float)D);
    if (k.type == F32) attention_of<F32>(job, bf16);
    else if (k.type == F16) attention_of<F16>(job, bf16);
    else if (k.type == BF16) attention_of<BF16>(job, bf16);
    else attention_of<Q8_0>(job, bf16);
}
