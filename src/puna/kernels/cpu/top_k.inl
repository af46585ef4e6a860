// The k largest logits of each row, largest first, equals by their lower index; NaN counts as larger than any number.
//
// How: the maxima of parts of a row, in one pass; the k-th largest of these is a bound that at least k logits reach, so
// only parts that reach it are looked into. What passes is sorted: for k well below the number of parts that is little
// more than k, and the pass over the row is all that costs.

struct TopKJob {
    const float* logits;
    int32_t* ids;
    float* values;
    int64_t vocabulary, k;
    char* thread_scratch;
    int64_t thread_bytes;
};

constexpr int64_t TOP_PART = 64;

// A number whose order as an integer is the order of logits: NaN above infinity, zeros equal.
INLINE vi order_of(vf x) {
    vi bits = (vi)(x + splat(0.0f));  // -0 becomes 0
    vi key = bits ^ ((bits >> 31) & 0x7fffffff);
    vi nan = x != x;
    return (key & ~nan) | (nan & 0x7fffffff);
}

// The largest lane.
INLINE int32_t largest_key(vi x) {
#if WIDTH == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t best = x[0];
    for (int i = 1; i < W; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

// Of two candidates the one that comes later in the result is "less": a smaller key, or a higher index.
struct Candidate {
    int32_t key, id;
};
INLINE bool later(Candidate a, Candidate b) { return a.key < b.key || (a.key == b.key && a.id > b.id); }

// Lets heap[at] sink to where its children come earlier than it; heap[0] is the latest of all.
INLINE void sink(Candidate* heap, int64_t count, int64_t at) {
    Candidate moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && later(heap[child + 1], heap[child])) child++;
        if (!later(heap[child], moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

// A heap of at most `most` candidates: `heap` keeps the earliest of all that were offered.
INLINE void offer(Candidate* heap, int64_t& count, int64_t most, Candidate one) {
    if (count < most) {
        heap[count++] = one;
        if (count == most)
            for (int64_t i = most / 2; i-- > 0;) sink(heap, most, i);
    } else if (later(heap[0], one)) {
        heap[0] = one;
        sink(heap, most, 0);
    }
}

INLINE int64_t top_k_bytes(int64_t n, int64_t k) {
    return round_up(k * (int64_t)sizeof(Candidate) + ceil_div(n, TOP_PART) * 4, 64);
}

// The k largest of x [n]; scratch has top_k_bytes(n, k).
static void top_k_of(const float* x, int64_t n, int64_t k, int32_t* ids, float* values, char* scratch) {
    int64_t parts = ceil_div(n, TOP_PART), count = 0;
    Candidate* heap = (Candidate*)scratch;
    int32_t* tops = (int32_t*)(heap + k);
    for (int64_t p = 0; p < parts; p++) {
        int64_t last = smaller((p + 1) * TOP_PART, n);
        vi top = (vi){} + INT32_MIN;
        for (int64_t i = p * TOP_PART; i < last; i += W) {
            // Padding is minus infinity: it may equal a logit, never beat one.
            vf part = load_up_to(x + i, last - i);
            if (last - i < W)
                for (int64_t lane = last - i; lane < W; lane++) part[lane] = -INFINITE;
            vi key = order_of(part);
            top = key > top ? key : top;
        }
        tops[p] = largest_key(top);
    }
    int32_t bound = INT32_MIN;
    if (k <= parts) {
        for (int64_t p = 0; p < parts; p++) offer(heap, count, k, {tops[p], (int32_t)p});
        bound = heap[0].key;
        count = 0;
    }
    for (int64_t p = 0; p < parts; p++) {
        if (tops[p] < bound) continue;
        for (int64_t i = p * TOP_PART; i < smaller((p + 1) * TOP_PART, n); i++) {
            int32_t key = order_of(splat(x[i]))[0];
            if (key >= bound) offer(heap, count, k, {key, (int32_t)i});
        }
    }
    for (int64_t left = k; left > 0; left--) {  // the latest of those left goes to the end
        ids[left - 1] = heap[0].id;
        values[left - 1] = x[heap[0].id];
        heap[0] = heap[left - 1];
        sink(heap, left - 1, 0);
    }
}

static void top_k_row(void* data, int64_t row, int thread) {
    const TopKJob& job = *(const TopKJob*)data;
    top_k_of(job.logits + row * job.vocabulary, job.vocabulary, job.k, job.ids + row * job.k, job.values + row * job.k,
             job.thread_scratch + thread * job.thread_bytes);
}

static void top_k(const float* logits, int64_t rows, int64_t vocabulary, int64_t k, int32_t* ids, float* values) {
    int threads = rows > 1 && rows * vocabulary > 32 << 10 ? puna_threads() : 1;
    TopKJob job = {logits, ids, values, vocabulary, k, nullptr, 0};
    job.thread_bytes = top_k_bytes(vocabulary, k);
    job.thread_scratch = (char*)puna_scratch((size_t)(threads * job.thread_bytes));
    puna_parallel(rows, threads, top_k_row, &job);
}
