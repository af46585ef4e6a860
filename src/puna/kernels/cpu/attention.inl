// Causal grouped attention over pages by online softmax (Milakov & Gimelshein 2018; Dao et al. 2022; pages: Kwon et al.
// 2023): scores never leave the cache, and keys and values are read where they lie.
//
// The H / G query heads that share a key/value head, times tokens of a sequence, are the *rows* of a group. Rows of one
// token are neighbours. Two ways, by the tokens a sequence has in the call:
// - few (decode, up to FEW_TOKENS): the lanes run along D. Keys are cut into stretches of fixed length, each a task, so
//   that one stream with a long context keeps all threads busy; the stretches' results are merged at the end. The
//   memory is the limit. Numbers of a cache are widened to float32 as they are read, or (Q8_0 with VNNI) multiplied as
//   the integers they are: attention_q8.inl.
// - many (prefill): the rows lie in the lanes (see tile.inl): maxima, sums and exponentials need no shuffles. A block of
//   keys is brought into the form that the products like once, for several panels of rows. Keys beyond a panel's last
//   position are not touched. The multiply-adds are the limit.
// All tasks of a call, of both ways and all sequences, are one parallel region. The cuts do not depend on the batch, nor
// on the size of a page, so a row's bits depend on its own sequence only; between the two ways they differ, and
// `puna_invariant` has all tokens go the first one, FEW_TOKENS at a time.
//
// With AVX-512 BF16, a cache of 16 bits or less and the caller's leave (`bf16`), the second way rounds queries, keys,
// values and the softmax's numerators to bfloat16 (vdpbf16ps; sums, maxima and denominators stay float32).

// Some tokens of one sequence that are attended the same way. With a chunk they are all of one, and keys and positions
// are counted from its beginning.
struct Span {
    const int32_t* pages;     // the sequence's, from the one in which key 0 lies
    int64_t skip;             // tokens of that page before key 0: a multiple of LEAST_PAGE
    int64_t token, tokens;    // rows of q and out
    int64_t position;         // of the first token
    int64_t pieces;           // many: tiles of rows; few: stretches of keys
    float* partial;           // few: [G, stretches, rows, PARTIAL_HEAD + padded D]: maximum, sum, weighted values
};

// Many: piece `index / G` (from the last one down) of group `index % G`. Few: stretch `index / parts`, part of the groups.
struct AttentionTask {
    int64_t span, index;
};

struct AttentionJob {
    const float* q;
    const char *k, *v;
    float* out;
    int64_t page, H, G, D, R;  // R = H / G, the heads of a group
    int64_t chunk;             // 0: none
    int64_t head, token;       // bytes of the cache from one head to the next, and from one token to the next
    float scale;               // log2(e) / √D: all exponentials here are powers of 2
    const Span* spans;         // those of many rows first
    int64_t many;              // how many those are
    int64_t first_few;         // the span at which the region's merge begins
    const AttentionTask* tasks;
    char* thread_scratch;
    int64_t thread_bytes;
    int64_t parts;        // few: parts of the groups, each a task
    int64_t near;         // few: keys at a time
    int64_t threads;      // few: that share the stretches
    int64_t partial_row;  // few: floats
};

// How many keys row i of a span sees.
INLINE int64_t keys_seen(const AttentionJob& job, const Span& span, int64_t i) { return span.position + i / job.R + 1; }

// Where row i of group g starts, in q and in out.
INLINE int64_t row_at(const AttentionJob& job, const Span& span, int64_t g, int64_t i) {
    return ((span.token + i / job.R) * job.H + g * job.R + i % job.R) * job.D;
}

// Keys that lie one after another, in one page: `offset` bytes from the cache's first.
struct KeyRun {
    int64_t first, count, offset;
};

// The runs of keys first to first + count of a span, their `first` counted from there; returns how many there are.
INLINE int64_t runs_of(const AttentionJob& job, const Span& span, int64_t first, int64_t count, KeyRun* runs) {
    first += span.skip;
    int64_t n = 0, number = first / job.page, row = first % job.page;
    for (int64_t s = 0; s < count; number++, row = 0, n++) {
        runs[n] = {s, smaller(count - s, job.page - row), (span.pages[number] * job.page + row) * job.token};
        s += runs[n].count;
    }
    return n;
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

// KEY_BLOCK keys from s0 on, key_row and value_row floats apart. Pairs: keys [key][D/2], values [key/2][D], pairs of
// neighbouring d and of neighbouring keys.
struct KeyBlock {
    int64_t s0, count;
    float *keys, *values;
    int64_t key_row, value_row;
};

// Keys from..from + count of a block, which lie in one page.
template <int TYPE, bool PAIRS>
INLINE void bring_run(const KeyBlock& block, int64_t from, int64_t count, const char* key, const char* value,
                      int64_t token, int64_t D) {
    float *keys = block.keys + from * block.key_row, *values = block.values + (PAIRS ? from / 2 : from) * block.value_row;
    if constexpr (!PAIRS) {
        for (int64_t s = 0; s < count; s++)
            for (int64_t d = 0; d < D; d += W) {
                store(keys + s * block.key_row + d, cached<TYPE>(key + s * token, d, D - d));
                store(values + s * block.value_row + d, cached<TYPE>(value + s * token, d, D - d));
            }
        return;
    }
#ifdef BF16_DOT
    for (int64_t s = 0; s < count; s++) {
        __m512i* to = (__m512i*)(keys + s * block.key_row);
        const char* at = key + s * token;
        for (int64_t d = 0; d < D; d += 32) {
            vf low = cached<TYPE>(at, d, D - d), high = {};
            if (d + W < D) high = cached<TYPE>(at, d + W, D - d - W);
            *to++ = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        }
    }
    for (int64_t s = 0; s < count; s += 2)  // a run that is not the last one has an even count
        for (int64_t d = 0; d < D; d += W) {
            vf odd = {};
            if (s + 1 < count) odd = cached<TYPE>(value + (s + 1) * token, d, D - d);
            _mm512_store_si512(values + s / 2 * block.value_row + d,
                               pair_up(cached<TYPE>(value + s * token, d, D - d), odd));
        }
#endif
}

// The keys and values of a group, from their pages.
template <int TYPE, bool PAIRS>
INLINE void bring(const AttentionJob& job, const Span& span, int64_t g, KeyBlock& block) {
    block.value_row = round_up(job.D, W);
    block.key_row = PAIRS ? round_up(job.D, 32) / 2 : block.value_row;
    KeyRun runs[KEY_BLOCK / LEAST_PAGE + 1];
    int64_t count = runs_of(job, span, block.s0, block.count, runs);
    for (int64_t i = 0; i < count; i++) {
        int64_t offset = runs[i].offset + g * job.head;
        bring_run<TYPE, PAIRS>(block, runs[i].first, runs[i].count, job.k + offset, job.v + offset, job.token, job.D);
    }
    // Whole tiles of keys are multiplied; what comes of the last ones is not used.
    for (int64_t i = block.count * block.key_row; PAIRS && i < round_up(block.count, NR) * block.key_row; i++)
        block.keys[i] = 0.0f;
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
static void many_rows_task(const AttentionJob& job, const Span& span, int64_t index, int thread) {
    // The last tiles see the most keys: they go first, so that no thread is left alone with one.
    int64_t tile = span.pieces - 1 - index / job.G, g = index % job.G, D = job.D;
    int64_t first = tile * QUERY_PANELS * LANES, rows = smaller(QUERY_PANELS * LANES, span.tokens * job.R - first);
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
        p.least = span.position + span.tokens;
        for (int64_t i = 0; i < lanes; i++) {
            int64_t seen = i < p.rows ? keys_seen(job, span, p.first + i) : 0;
            p.seen[i] = (int32_t)seen;
            p.peak[i] = -INFINITE;
            p.total[i] = 0.0f;
            if (i >= p.rows) continue;
            p.most = larger(p.most, seen);
            p.least = smaller(p.least, seen);
        }
        most = larger(most, p.most);
        for (int64_t i = 0; i < D * lanes; i += W) store(p.sums + i, (vf){});
        pack_lanes([&](int64_t i) { return job.q + row_at(job, span, g, p.first + i); }, p.rows, lanes, D, job.scale, p.q);
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
    KeyBlock block = {};
    block.keys = keys, block.values = values;
    for (block.s0 = 0; block.s0 < most; block.s0 += KEY_BLOCK) {
        block.count = smaller(KEY_BLOCK, most - block.s0);
        bring<TYPE, PAIRS>(job, span, g, block);
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
        unpack_lanes(p.sums, lanes, D, p.rows, [&](int64_t i) { return job.out + row_at(job, span, g, p.first + i); });
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

// Keys (or values) that are fetched into L2, a little at each step of other work: without it, tasks that jump from head
// to head reach a third of the bandwidth, and all at once it would stall the core like any other read.
struct Ahead {
    const AttentionJob* job;
    const char* cache;
    const int32_t* pages;
    int64_t key, keys;  // the next page's first, and where they end
    const char *next, *end;

    __attribute__((always_inline)) bool more() {
        if (next < end) return true;
        if (key >= keys) return false;
        int64_t row = key % job->page, count = smaller(keys - key, job->page - row);
        next = cache + (pages[key / job->page] * job->page + row) * job->token;
        end = next + count * job->token;
        key += count;
        return true;
    }

    // For callers that fetch `bytes` from there, without a branch: what was fetched already where no more come.
    __attribute__((always_inline)) const char* take(int64_t bytes) {
        if (!more()) return cache;
        const char* at = next;
        next += bytes;
        return at;
    }

    __attribute__((always_inline)) void step(int64_t bytes) {
        for (; bytes > 0 && more(); bytes -= 64, next += 64) __builtin_prefetch(next, 0, 2);
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

// What N rows do with keys near each other, in a few runs. A type may have a form of its own (attention_q8.inl).
template <int TYPE, int N>
struct Near {
    // A row of q as `scores` wants it, in the place of D floats, padded.
    static void query(const AttentionJob& job, const float* q, float* to) {
        for (int64_t d = 0; d < job.D; d += W) store(to + d, load_up_to(q + d, job.D - d) * job.scale);
    }

    // scores[i][s] = q[i] · key s; up to round_up(count, W) numbers may be written.
    INLINE void scores(const AttentionJob& job, const float* q, int64_t q_row, const KeyRun* runs, int64_t run_count,
                       int64_t head, float* scores, Ahead& ahead) {
        for (int64_t r = 0; r < run_count; r++)
            few_scores<TYPE, N>(q, q_row, job.k + runs[r].offset + head, job.token, job.D, runs[r].count,
                                scores + runs[r].first, ahead);
    }

    // out[i] = out[i] · shrink[i] + Σ_s weights[i][s] · value s
    INLINE void values(const AttentionJob& job, const float* weights, float (&shrink)[N], const KeyRun* runs,
                       int64_t run_count, int64_t head, float* out, Ahead& ahead) {
        for (int64_t r = 0; r < run_count; r++) {
            few_values<TYPE, N>(weights + runs[r].first, shrink, job.v + runs[r].offset + head, job.token, job.D,
                                runs[r].count, out, job.partial_row, ahead);
            for (int i = 0; i < N; i++) shrink[i] = 1.0f;
        }
    }
};

#if WIDTH == 16 && defined(__AVX512VNNI__)
#include "attention_q8.inl"
#endif

// N rows of one group against `count` keys near each other, in a few runs. A row's partial result: its maximum and sum
// so far, then the weighted values.
template <int TYPE, int N>
static void few_near(const AttentionJob& job, const float* q, int64_t q_row, const int64_t* seen, const KeyRun* runs,
                     int64_t run_count, int64_t head, int64_t count, float* partial, Ahead& ahead_k, Ahead& ahead_v) {
    float scores[N * NEAR] __attribute__((aligned(64))), shrink[N];
    Near<TYPE, N>::scores(job, q, q_row, runs, run_count, head, scores, ahead_k);
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
    Near<TYPE, N>::values(job, scores, shrink, runs, run_count, head, partial + PARTIAL_HEAD, ahead_v);
}

template <int TYPE>
static void few_rows_task(const AttentionJob& job, const Span& span, int64_t index, int thread) {
    int64_t part = index % job.parts, stretch = index / job.parts;
    int64_t near = job.near, first = stretch * STRETCH, D = job.D, rows = span.tokens * job.R, most = 0;
    int64_t* seen = (int64_t*)(job.thread_scratch + thread * job.thread_bytes);
    for (int64_t i = 0; i < rows; i++) {
        seen[i] = smaller(keys_seen(job, span, i) - first, STRETCH);
        most = larger(most, seen[i]);
    }
    int64_t g0 = job.G * part / job.parts, g1 = job.G * (part + 1) / job.parts, q_row = round_up(D, W);
    int64_t* near_seen = seen + rows;  // the same for the keys that are near
    float* q = (float*)(seen + round_up(2 * rows, 8));
    auto partial_of = [&](int64_t g) { return span.partial + (g * span.pieces + stretch) * rows * job.partial_row; };
    for (int64_t g = g0; g < g1; g++)
        for (int64_t i = 0; i < rows; i++) {
            const float* from = job.q + row_at(job, span, g, i);
            float *to = q + ((g - g0) * rows + i) * q_row, *partial = partial_of(g) + i * job.partial_row;
            Near<TYPE, 1>::query(job, from, to);
            for (int64_t d = 0; d < job.partial_row; d += W) store(partial + d, (vf){});
            partial[0] = -INFINITE;
        }
    for (int64_t s0 = 0; s0 < most; s0 += near) {
        int64_t count = smaller(near, most - s0);
        for (int64_t i = 0; i < rows; i++) near_seen[i] = seen[i] - s0;
        KeyRun runs[NEAR / LEAST_PAGE + 1];
        int64_t run_count = runs_of(job, span, first + s0, count, runs);
        // What comes next: in this stretch, or the beginning of the one that this thread is likely to get.
        int64_t next = first + s0 + near, next_count = larger(smaller(near, most - s0 - near), 0);
        if (s0 + near >= STRETCH && stretch + job.threads < span.pieces) {
            next += (job.threads - 1) * STRETCH;
            next_count = smaller(near, span.position + span.tokens - next);
        }
        for (int64_t g = g0; g < g1; g++) {
            // This group's share of the keys that come next.
            int64_t from = next + (job.parts > 1 ? 0 : next_count * (g - g0) / (g1 - g0));
            int64_t to = next + (job.parts > 1 ? 0 : next_count * (g - g0 + 1) / (g1 - g0));
            Ahead ahead_k = {&job, job.k, span.pages, span.skip + from, span.skip + to, nullptr, nullptr}, ahead_v = ahead_k;
            ahead_v.cache = job.v;
            for (int64_t i = 0; i < rows;) {
                const float* row = q + ((g - g0) * rows + i) * q_row;
                float* partial = partial_of(g) + i * job.partial_row;
                int beside = few_rows_beside(rows - i);
                auto* attend = beside == 4 ? few_near<TYPE, few_rows_beside(4)> : beside == 2 ? few_near<TYPE, 2> : few_near<TYPE, 1>;
                attend(job, row, q_row, near_seen + i, runs, run_count, g * job.head, count, partial, ahead_k, ahead_v);
                i += beside;
            }
        }
    }
}

// The stretches of each row of one group of a span merged:
// out = Σ 2^(peak - top) · values / Σ 2^(peak - top) · sum.
static void few_rows_merge(void* data, int64_t chunk, int) {
    const AttentionJob& job = *(const AttentionJob*)data;
    const Span& span = job.spans[job.first_few + chunk / job.G];
    int64_t rows = span.tokens * job.R, D = job.D, g = chunk % job.G;
    for (int64_t i = 0; i < rows; i++) {
        float* out = job.out + row_at(job, span, g, i);
        int64_t stretches = ceil_div(keys_seen(job, span, i), STRETCH);
        const float* first = span.partial + (g * span.pieces * rows + i) * job.partial_row;
        int64_t step = rows * job.partial_row;
        float top = -INFINITE;
        for (int64_t s = 0; s < stretches; s++) top = first[s * step] > top ? first[s * step] : top;
        vf total = {};
        for (int64_t d = 0; d < D; d += W) store_up_to(out + d, (vf){}, D - d);
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

template <int TYPE, bool PAIRS>
static void attention_chunk(void* data, int64_t chunk, int thread) {
    const AttentionJob& job = *(const AttentionJob*)data;
    AttentionTask task = job.tasks[chunk];
    if (task.span < job.many) many_rows_task<TYPE, PAIRS>(job, job.spans[task.span], task.index, thread);
    else few_rows_task<TYPE>(job, job.spans[task.span], task.index, thread);
}

// Calls `take` with each span, and whether it is one of few rows; those come last.
template <typename Take>
INLINE void each_span(const AttentionJob& job, const PageTable& table, Take take) {
    bool all_few = puna_invariant();
    for (int64_t i = 0; i < 2 * table.sequences; i++) {
        int64_t b = i % table.sequences, start = table.starts[b], count = table.starts[b + 1] - start;
        bool few = i >= table.sequences;
        if (count == 0 || few != (count <= FEW_TOKENS || all_few)) continue;
        int64_t most = few ? FEW_TOKENS : count, tokens;
        for (int64_t t = 0; t < count; t += tokens) {
            int64_t position = table.positions[start + t], base = 0;
            tokens = smaller(most, count - t);
            if (job.chunk) {
                base = position / job.chunk * job.chunk;
                tokens = smaller(tokens, base + job.chunk - position);
            }
            position -= base;
            int64_t pieces = few ? ceil_div(position + tokens, STRETCH) : ceil_div(tokens * job.R, QUERY_PANELS * LANES);
            const int32_t* pages = table.pages + b * table.width + base / table.page;
            take(Span{pages, base % table.page, start + t, tokens, position, pieces, nullptr}, few);
        }
    }
}

// Floats of partial results that a region has room for, unless one span needs more: a long text of many tokens, and
// `puna_invariant`, would otherwise take gigabytes.
constexpr int64_t MOST_PARTIAL = 16 << 20;

template <int TYPE>
static void attention_of(AttentionJob& job, const PageTable& table, bool bf16) {
    int64_t D = job.D, spans = 0, tiles = 0, stretches = 0, few_rows = 0, work = 0, all_partial = 0, span_partial = 0;
    job.partial_row = PARTIAL_HEAD + round_up(D, W);
    auto partial_of = [&](const Span& span) { return job.H * span.pieces * span.tokens * job.partial_row; };
    each_span(job, table, [&](const Span& span, bool few) {
        spans++;
        work += span.tokens * (span.position + span.tokens);
        if (!few) {
            tiles += span.pieces;
            job.many = spans;
            return;
        }
        stretches += span.pieces;
        few_rows = larger(few_rows, span.tokens * job.R);
        all_partial += partial_of(span);
        span_partial = larger(span_partial, partial_of(span));
    });
    int threads = work * job.H * D <= 32 << 10 ? 1 : puna_threads();
    job.threads = threads;
    // These keys and values and the next, which are on their way, share L2.
    job.near = NEAR * job.token <= 128 << 10 ? NEAR : NEAR / 2;
    // Groups are kept together, as they lie in memory, unless there would be too few tasks.
    job.parts = smaller(job.G, ceil_div(4 * puna_threads(), larger(1, tiles * job.G + stretches)));
    job.thread_bytes = larger(
        tiles ? many_rows_scratch(D) : 0,
        round_up(round_up(2 * few_rows, 8) * 8 + ceil_div(job.G, job.parts) * few_rows * round_up(D, W) * 4, 64));
    int64_t room = smaller(all_partial, larger(MOST_PARTIAL, span_partial));
    int64_t sizes[] = {round_up(spans * sizeof(Span), 64), round_up(room * 4, 64), threads * job.thread_bytes,
                       (tiles * job.G + stretches * job.parts) * (int64_t)sizeof(AttentionTask)};
    char* at = (char*)puna_scratch((size_t)(sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    Span* span = (Span*)at;
    float* partial = (float*)(at + sizes[0]);
    job.thread_scratch = at + sizes[0] + sizes[1];
    AttentionTask* tasks = (AttentionTask*)(job.thread_scratch + sizes[2]);
    job.spans = span;
    job.tasks = tasks;
    each_span(job, table, [&](const Span& each, bool) { *span++ = each; });
    Run run = bf16 ? attention_chunk<TYPE, attends_in_pairs(TYPE, true)> : attention_chunk<TYPE, false>;
    for (int64_t next = 0; next < spans;) {
        job.first_few = larger(next, job.many);
        int64_t taken = 0, chunks = 0, merged = 0;
        for (; next < spans; next++) {
            Span& each = ((Span*)at)[next];
            bool few = next >= job.many;
            if (few && taken && taken + partial_of(each) > room) break;
            if (few) each.partial = partial + taken, taken += partial_of(each);
            int64_t pieces = each.pieces * (few ? job.parts : job.G);
            for (int64_t i = 0; i < pieces; i++) tasks[chunks++] = {next, i};
            if (few) merged += pieces * each.tokens * job.R;
        }
        puna_parallel(chunks, threads, run, &job);
        if (merged) puna_parallel((next - job.first_few) * job.G, merged > 64 ? threads : 1, few_rows_merge, &job);
    }
}

static void attention(const float* q, Weights k, Weights v, const PageTable& table, int64_t H, int64_t G, int64_t D,
                      bool bf16, int64_t chunk, float* out) {
    AttentionJob job = {};
    job.chunk = chunk;
    job.q = q, job.k = (const char*)k.data, job.v = (const char*)v.data, job.out = out;
    job.page = table.page, job.H = H, job.G = G, job.D = D, job.R = H / G;
    job.head = head_bytes(k.type, D), job.token = G * job.head;
    job.scale = LOG2_E / __builtin_sqrtf((float)D);
    if (k.type == F32) attention_of<F32>(job, table, bf16);
    else if (k.type == F16) attention_of<F16>(job, table, bf16);
    else if (k.type == BF16) attention_of<BF16>(job, table, bf16);
    else attention_of<Q8_0>(job, table, bf16);
}
