// Causal grouped attention by online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): scores never leave the cache.
//
// The H / G query heads that share a key/value head, times the T tokens, are the *rows* of one (sequence, group). Rows
// of one token are neighbours. Two ways, by their number:
// - few (decode): the lanes run along D. Keys are cut into stretches of fixed length, each a task, so that one stream
//   with a long context keeps all threads busy; the stretches' results are merged at the end. The memory is the limit.
// - many (prefill): the rows lie in the lanes (see tile.inl): maxima, sums and exponentials need no shuffles. Keys
//   beyond a tile's last position are not touched.
// The cuts depend on the length of the context only, so a sequence's bits do not depend on its neighbours in the batch.

struct AttentionJob {
    const float *q, *k, *v;
    const int32_t* positions;
    float* out;
    int64_t B, T, S, H, G, D, R;  // R = H / G, the heads of a group
    float scale;                  // log2(e) / √D: all exponentials here are powers of 2
    char* thread_scratch;
    int64_t thread_bytes;
    int64_t tiles;         // many: tiles of rows
    int64_t stretches;     // few: stretches of keys
    int64_t parts;         // few: parts of the groups, each a task
    float* partial;        // few: [B, G, stretches, rows, 2 + padded D]: maximum, sum, weighted values
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

template <int V>
static void attend_lanes(const AttentionJob& job, int64_t b, int64_t g, int64_t first, int64_t rows, float* scratch) {
    constexpr int64_t lanes = V * W;
    int64_t D = job.D, stride = job.G * D;
    const float* keys = job.k + (b * job.S * job.G + g) * D;
    const float* values = job.v + (b * job.S * job.G + g) * D;
    float *q = scratch, *scores = q + D * lanes, *sums = scores + KEY_BLOCK * lanes;
    pack_lanes([&](int64_t i) { return job.q + row_at(job, b, g, first + i); }, rows, lanes, D, job.scale, q);

    vi seen[V];
    int64_t most = 0, least = job.S;
    UNROLL for (int j = 0; j < V; j++)
        for (int l = 0; l < W; l++) {
            int64_t i = j * W + l, count = i < rows ? keys_seen(job, b, first + i) : 0;
            seen[j][l] = (int32_t)count;
            if (i >= rows) continue;
            most = larger(most, count);
            least = smaller(least, count);
        }
    vf peak[V], total[V];
    UNROLL for (int j = 0; j < V; j++) {
        peak[j] = splat(-INFINITE);
        total[j] = (vf){};
    }
    for (int64_t d = 0; d < D; d++) UNROLL for (int j = 0; j < V; j++) store(sums + (d * V + j) * W, (vf){});

    for (int64_t s0 = 0; s0 < most; s0 += KEY_BLOCK) {
        int64_t count = smaller(KEY_BLOCK, most - s0);
        vf top[V];
        UNROLL for (int j = 0; j < V; j++) top[j] = peak[j];
        for (int64_t s = 0; s < count; s += NR) {
            const float* key[NR];
            UNROLL for (int i = 0; i < NR; i++) key[i] = keys + smaller(s0 + s + i, most - 1) * stride;
            vf tile[NR][V];
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) tile[i][j] = (vf){};
            tile_rows<NR, V>(key, q, D, tile);
            bool masked = s0 + s + NR > least;
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) {
                if (masked) tile[i][j] = select((int32_t)(s0 + s + i) < seen[j], tile[i][j], splat(-INFINITE));
                top[j] = maximum(tile[i][j], top[j]);
                store(scores + ((s + i) * V + j) * W, tile[i][j]);
            }
        }
        vf shift[V], shrink[V];
        UNROLL for (int j = 0; j < V; j++) {
            shift[j] = select(top[j] == splat(-INFINITE), (vf){}, top[j]);  // a row that sees nothing yet
            shrink[j] = exponential2(peak[j] - shift[j]);
            peak[j] = top[j];
            total[j] *= shrink[j];
        }
        for (int64_t s = 0; s < count; s++) UNROLL for (int j = 0; j < V; j++) {
            float* at = scores + (s * V + j) * W;
            vf p = exponential2(load(at) - shift[j]);
            total[j] += p;
            store(at, p);
        }
        const float* value = values + s0 * stride;
        int64_t d = 0;
        for (; d + NR <= D; d += NR) {
            vf tile[NR][V];
            float* at = sums + d * V * W;
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++)
                tile[i][j] = load(at + (i * V + j) * W) * shrink[j];
            tile_columns<NR, V>(value + d, stride, scores, count, tile);
            UNROLL for (int i = 0; i < NR; i++) UNROLL for (int j = 0; j < V; j++) store(at + (i * V + j) * W, tile[i][j]);
        }
        for (; d < D; d++) {
            vf tile[1][V];
            float* at = sums + d * V * W;
            UNROLL for (int j = 0; j < V; j++) tile[0][j] = load(at + j * W) * shrink[j];
            tile_columns<1, V>(value + d, stride, scores, count, tile);
            UNROLL for (int j = 0; j < V; j++) store(at + j * W, tile[0][j]);
        }
    }
    vf norm[V];
    UNROLL for (int j = 0; j < V; j++) norm[j] = select(total[j] == (vf){}, (vf){}, splat(1.0f) / total[j]);
    for (int64_t d = 0; d < D; d++) UNROLL for (int j = 0; j < V; j++) {
        float* at = sums + (d * V + j) * W;
        store(at, load(at) * norm[j]);
    }
    unpack_lanes(sums, lanes, D, rows, [&](int64_t i) { return job.out + row_at(job, b, g, first + i); });
}

static void many_rows_chunk(void* data, int64_t chunk, int thread) {
    const AttentionJob& job = *(const AttentionJob*)data;
    // The last tiles see the most keys: they go first, so that no thread is left alone with one.
    int64_t tile = job.tiles - 1 - chunk / (job.B * job.G), g = chunk % job.G, b = chunk / job.G % job.B;
    int64_t first = tile * LANES, rows = smaller(LANES, job.T * job.R - first);
    float* scratch = (float*)(job.thread_scratch + thread * job.thread_bytes);
    if (rows > 2 * W) attend_lanes<3>(job, b, g, first, rows, scratch);
    else if (rows > W) attend_lanes<2>(job, b, g, first, rows, scratch);
    else attend_lanes<1>(job, b, g, first, rows, scratch);
}

// ---- few rows ----

constexpr int64_t FEW_ROWS = 8;
constexpr int64_t STRETCH = 512;                // keys a task
constexpr int64_t SCORES_ROW = STRETCH + 16;    // not a power of two, or all rows would meet in one set of the cache
constexpr int64_t PARTIAL_HEAD = 16;            // maximum and sum, before the weighted values
constexpr int few_rows_beside(int64_t rows) { return REGISTERS == 32 && rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }
constexpr int keys_beside(int n) { return REGISTERS == 32 || n == 1 ? 4 : 2; }

// scores[i][j] = q[i] · key[j] for N rows, of which `count` keys are there.
template <int N, int K>
INLINE void few_scores(const float* q, int64_t q_row, const float* const* key, int64_t D, int64_t count, float* scores) {
    vf sums[N][K];
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < K; j++) sums[i][j] = (vf){};
    for (int64_t d = 0; d < D; d += W) {
        vf row[N];
        UNROLL for (int i = 0; i < N; i++) keep(row[i] = load(q + i * q_row + d));
        UNROLL for (int j = 0; j < K; j++) {
            vf x = load_up_to(key[j] + d, D - d);
            UNROLL for (int i = 0; i < N; i++) sums[i][j] += x * row[i];
        }
    }
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < K; j++)
        if (j < count) scores[i * SCORES_ROW + j] = sum(sums[i][j]);
}

// out[i] += Σ_j p[i][j] · value[j] for N rows; p is 0 where value j is not there.
template <int N, int K>
INLINE void few_values(const float* p, const float* const* value, int64_t D, float* out, int64_t out_row) {
    vf weight[N][K];
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = 0; j < K; j++) weight[i][j] = splat(p[i * SCORES_ROW + j]);
    for (int64_t d = 0; d < D; d += W) {
        vf x[K];
        UNROLL for (int j = 0; j < K; j++) x[j] = load_up_to(value[j] + d, D - d);
        UNROLL for (int i = 0; i < N; i++) {
            vf sums = load(out + i * out_row + d);
            UNROLL for (int j = 0; j < K; j++) sums += weight[i][j] * x[j];
            store(out + i * out_row + d, sums);
        }
    }
}

struct Stretch {
    int64_t rows, count;  // rows of a group; keys that any of them sees
    int64_t g0, g1;       // groups
    const float *keys, *values;  // of group 0
    float *q, *scores, *partial;  // of group g0; partial of the next group lies partial_group further
    int64_t q_row, partial_group;
};

// `count` floats at p: into L2. Without this, tasks that jump from head to head reach a third of the bandwidth.
INLINE void fetch(const float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i, 0, 2);
}

constexpr int64_t AHEAD = 32;  // keys

// Keys outside, groups inside: so keys and values are read in the order in which they lie in memory.
template <int N>
static void few_all_scores(const AttentionJob& job, const Stretch& a) {
    constexpr int K = keys_beside(N);
    int64_t stride = job.G * job.D;
    for (int64_t s = 0; s < a.count; s += K)
        for (int64_t g = a.g0; g < a.g1; g++) {
            const float* key[K];
            UNROLL for (int j = 0; j < K; j++) key[j] = a.keys + smaller(s + j, a.count - 1) * stride + g * job.D;
            fetch(a.keys + (s + AHEAD) * stride + g * K * job.D, K * job.D);
            int64_t row = (g - a.g0) * a.rows, i = 0;
            for (; i + N <= a.rows; i += N)
                few_scores<N, K>(a.q + (row + i) * a.q_row, a.q_row, key, job.D, a.count - s,
                                 a.scores + (row + i) * SCORES_ROW + s);
            for (; i < a.rows; i++)
                few_scores<1, K>(a.q + (row + i) * a.q_row, a.q_row, key, job.D, a.count - s,
                                 a.scores + (row + i) * SCORES_ROW + s);
        }
}

template <int N>
static void few_all_values(const AttentionJob& job, const Stretch& a) {
    constexpr int K = keys_beside(N);
    int64_t stride = job.G * job.D;
    for (int64_t s = 0; s < a.count; s += K)
        for (int64_t g = a.g0; g < a.g1; g++) {
            const float* value[K];
            UNROLL for (int j = 0; j < K; j++) value[j] = a.values + smaller(s + j, a.count - 1) * stride + g * job.D;
            fetch(a.values + (s + AHEAD) * stride + g * K * job.D, K * job.D);
            const float* p = a.scores + (g - a.g0) * a.rows * SCORES_ROW + s;
            float* out = a.partial + (g - a.g0) * a.partial_group + PARTIAL_HEAD;
            int64_t i = 0;
            for (; i + N <= a.rows; i += N)
                few_values<N, K>(p + i * SCORES_ROW, value, job.D, out + i * job.partial_row, job.partial_row);
            for (; i < a.rows; i++)
                few_values<1, K>(p + i * SCORES_ROW, value, job.D, out + i * job.partial_row, job.partial_row);
        }
}

static void few_rows_chunk(void* data, int64_t chunk, int thread) {
    const AttentionJob& job = *(const AttentionJob*)data;
    int64_t part = chunk % job.parts, stretch = chunk / job.parts % job.stretches, b = chunk / job.parts / job.stretches;
    int64_t s0 = stretch * STRETCH, D = job.D, seen[FEW_ROWS];
    Stretch a;
    a.rows = job.T * job.R;
    a.count = 0;
    for (int64_t i = 0; i < a.rows; i++) {
        seen[i] = smaller(keys_seen(job, b, i) - s0, STRETCH);
        a.count = larger(a.count, seen[i]);
    }
    if (a.count == 0) return;
    a.g0 = job.G * part / job.parts;
    a.g1 = job.G * (part + 1) / job.parts;
    a.keys = job.k + (b * job.S + s0) * job.G * D;
    a.values = job.v + (b * job.S + s0) * job.G * D;
    a.q_row = round_up(D, W);
    a.q = (float*)(job.thread_scratch + thread * job.thread_bytes);
    a.scores = a.q + (a.g1 - a.g0) * a.rows * a.q_row;
    a.partial_group = job.stretches * a.rows * job.partial_row;
    a.partial = job.partial + ((b * job.G + a.g0) * job.stretches + stretch) * a.rows * job.partial_row;
    for (int64_t g = a.g0; g < a.g1; g++)
        for (int64_t i = 0; i < a.rows; i++) {
            const float* from = job.q + row_at(job, b, g, i);
            float* to = a.q + ((g - a.g0) * a.rows + i) * a.q_row;
            for (int64_t d = 0; d < D; d += W) store(to + d, load_up_to(from + d, D - d) * job.scale);
        }
    int beside = few_rows_beside(a.rows);
    if (beside == 4) few_all_scores<few_rows_beside(4)>(job, a);
    else if (beside == 2) few_all_scores<2>(job, a);
    else few_all_scores<1>(job, a);
    for (int64_t g = a.g0; g < a.g1; g++)
        for (int64_t i = 0; i < a.rows; i++) {
            float* row = a.scores + ((g - a.g0) * a.rows + i) * SCORES_ROW;
            float* partial = a.partial + (g - a.g0) * a.partial_group + i * job.partial_row;
            for (int64_t s = larger(seen[i], 0); s < round_up(a.count, W); s++) row[s] = -INFINITE;
            vf top = splat(-INFINITE), total = {};
            for (int64_t s = 0; s < a.count; s += W) top = maximum(load(row + s), top);
            float peak = largest(top);
            vf shift = splat(peak == -INFINITE ? 0.0f : peak);
            for (int64_t s = 0; s < a.count; s += W) {
                vf p = exponential2(load(row + s) - shift);
                total += p;
                store(row + s, p);
            }
            partial[0] = peak;
            partial[1] = sum(total);
            for (int64_t d = 0; d < D; d += W) store(partial + PARTIAL_HEAD + d, (vf){});
        }
    if (beside == 4) few_all_values<few_rows_beside(4)>(job, a);
    else if (beside == 2) few_all_values<2>(job, a);
    else few_all_values<1>(job, a);
}

// The stretches of each row merged: out = Σ 2^(peak - top) · values / Σ 2^(peak - top) · sum.
static void few_rows_merge(const AttentionJob& job, int64_t b) {
    int64_t rows = job.T * job.R, D = job.D;
    for (int64_t g = 0; g < job.G; g++)
        for (int64_t i = 0; i < rows; i++) {
            float* out = job.out + row_at(job, b, g, i);
            int64_t stretches = ceil_div(keys_seen(job, b, i), STRETCH);
            const float* first = job.partial + ((b * job.G + g) * job.stretches * rows + i) * job.partial_row;
            int64_t step = rows * job.partial_row;
            float top = -INFINITE;
            for (int64_t s = 0; s < stretches; s++) top = first[s * step] > top ? first[s * step] : top;
            vf total = {};
            for (int64_t d = 0; d < D; d += W) store_part(out + d, (vf){}, smaller(W, D - d));
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

static void attention(const float* q, const float* k, const float* v, const int32_t* positions, int64_t B, int64_t T,
                      int64_t S, int64_t H, int64_t G, int64_t D, float* out) {
    AttentionJob job = {};
    job.q = q, job.k = k, job.v = v, job.positions = positions, job.out = out;
    job.B = B, job.T = T, job.S = S, job.H = H, job.G = G, job.D = D, job.R = H / G;
    job.scale = LOG2_E / __builtin_sqrtf((float)D);
    int threads = puna_threads();
    int64_t rows = T * job.R;
    if (rows > FEW_ROWS) {
        job.tiles = ceil_div(rows, LANES);
        job.thread_bytes = round_up((2 * D + KEY_BLOCK) * LANES * 4, 64);
        job.thread_scratch = (char*)puna_scratch((size_t)(threads * job.thread_bytes));
        puna_parallel(job.tiles * B * G, threads, many_rows_chunk, &job);
        return;
    }
    int64_t most = 0, work = 0;  // keys of the longest sequence, and of all
    for (int64_t b = 0; b < B; b++) {
        int64_t longest = 0;
        for (int64_t i = 0; i < rows; i += job.R) longest = larger(longest, keys_seen(job, b, i));
        most = larger(most, longest);
        work += longest;
    }
    job.stretches = larger(1, ceil_div(most, STRETCH));
    // Groups are kept together (see few_all_scores) unless there would be too few tasks.
    job.parts = smaller(G, ceil_div(4 * threads, B * job.stretches));
    job.partial_row = PARTIAL_HEAD + round_up(D, W);
    job.thread_bytes = round_up(ceil_div(G, job.parts) * rows * (round_up(D, W) + SCORES_ROW) * 4, 64);
    int64_t all = round_up(B * G * job.stretches * rows * job.partial_row * 4, 64);
    job.partial = (float*)puna_scratch((size_t)(all + threads * job.thread_bytes));
    job.thread_scratch = (char*)job.partial + all;
    int64_t chunks = B * job.stretches * job.parts;
    if (work * H * D <= 32 << 10)
        for (int64_t chunk = 0; chunk < chunks; chunk++) few_rows_chunk(&job, chunk, 0);
    else puna_parallel(chunks, threads, few_rows_chunk, &job);
    for (int64_t b = 0; b < B; b++) few_rows_merge(job, b);
}
