// y = x · wᵀ + bias for packed weights: who does which part of the products of packed.inl.
//
// The activations are quantized once a call, then every product runs in one region. Two ways, by the number of rows:
// - few (decode): a panel is read once, straight from memory, for up to GROUP rows. The memory is the limit.
// - many (prefill): a record of a panel is unpacked to bytes, which stay in L1 while all groups of rows pass. The
//   multiply-adds are the limit.
// The activations lie record by record, and within it group by group, so both ways walk straight through them.
// Weights as the file has them are regrouped into panels a piece at a time; the rest is the same, and so are the bits.

struct PackedJob {
    const float* x;
    const Product* products;
    int count;
    int64_t in;
    int64_t first, rows, groups;  // the activation rows at work, in groups of GROUP
    char* activations[2];         // in blocks of 32, and of 256 (SUPER); null: no product needs them
    int64_t record_span;          // records quantized by one chunk
    int64_t chunk_bytes;          // of panels, few rows
    char* thread_scratch;
    int64_t thread_bytes;
};

constexpr int64_t ROWS_AT_ONCE = 516 / GROUP * GROUP;  // activation rows quantized at a time
constexpr int64_t PANELS_AT_ONCE = 8;                  // that share a record of activations in L2

// Bytes of one record of all groups: the last one is padded.
INLINE int64_t stride_of(const PackedJob& job, bool super) {
    return ((job.groups - 1) * GROUP + group_size(job.rows - (job.groups - 1) * GROUP)) * activation_bytes(super);
}

static void quantize_chunk(void* data, int64_t chunk, int) {
    const PackedJob& job = *(const PackedJob*)data;
    int64_t group = chunk % job.groups, records = ceil_div(job.in, RECORD);
    int64_t rows = smaller(GROUP, job.rows - group * GROUP), M = group_size(rows);
    int64_t r0 = chunk / job.groups * job.record_span, r1 = smaller(r0 + job.record_span, records);
    for (int super = 0; super < 2; super++) {
        if (!job.activations[super]) continue;
        char* to = job.activations[super] + group * GROUP * activation_bytes(super);
        for (int64_t m = 0; m < M; m++) {
            const float* x = m < rows ? job.x + (job.first + group * GROUP + m) * job.in : nullptr;
            for (int64_t r = r0; r < r1; r++) {
                int64_t k = r * RECORD, count = smaller(RECORD, job.in - k);
                char* record = to + r * stride_of(job, super);
                // The next row, too short a stretch for the hardware to see it coming: half of the time went by waiting.
                if (m + 1 < rows)
                    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + k + job.in + i);
                if (super) quantize_record<true>(x ? x + k : nullptr, count, record, m, M);
                else quantize_record<false>(x ? x + k : nullptr, count, record, m, M);
            }
        }
    }
}

// One tile to y: rows [first, first + rows) of the call, the outputs of panel p.
static void finish_tile(const Product& product, int64_t p, int64_t first, int64_t rows, const float* tile) {
    int64_t n = p * PANEL_ROWS, valid = smaller(PANEL_ROWS, product.out - n);
    for (int64_t i = 0; i < valid; i += W) {
        vf bias = {};
        if (product.bias.data)
            for (int64_t j = 0; j < smaller(W, valid - i); j++) bias[j] = widen_one(product.bias, n + i + j);
        for (int64_t m = 0; m < rows; m++)
            store_up_to(product.y + (first + m) * product.out + n + i, load(tile + m * PANEL_ROWS + i) + bias, valid - i);
    }
}

INLINE int packed_type(const Product& product) { return product.w.type & ~PANELS; }

INLINE int64_t panels_of_chunk(const PackedJob& job, const Product& product, bool many) {
    return many ? PANELS_AT_ONCE : larger(1, job.chunk_bytes / panel_bytes(packed_type(product), job.in));
}

// Records [r0, r1) of panel p, wherever the weights lie.
INLINE const uint8_t* panel_at(const PackedJob& job, const Product& product, int64_t p, int64_t r0, int64_t r1, char* scratch) {
    int type = packed_type(product);
    int64_t record = record_bytes(type, blocks_in_record(type));
    if (product.w.type & PANELS) return (const uint8_t*)product.w.data + p * panel_bytes(type, job.in) + r0 * record;
    int64_t row = job.in / BLOCKS[type].numbers * BLOCKS[type].bytes;
    regroup_records(type, (const uint8_t*)product.w.data + p * PANEL_ROWS * row, row,
                    smaller(PANEL_ROWS, product.out - p * PANEL_ROWS), job.in, r0, r1, (uint8_t*)scratch);
    return (const uint8_t*)scratch;
}

static void few_panels(const PackedJob& job, const Product& product, int64_t p0, int64_t p1, char* scratch) {
    int type = packed_type(product);
    const PackedOps& ops = PACKED[type];
    float tile[GROUP * PANEL_ROWS] __attribute__((aligned(64)));
    for (int64_t p = p0; p < p1; p++) {
        const uint8_t* panel = panel_at(job, product, p, 0, ceil_div(job.in, RECORD), scratch);
        for (int64_t g = 0; g < job.groups; g++) {
            int64_t rows = smaller(GROUP, job.rows - g * GROUP);
            ops.few(group_size(rows), panel, job.activations[ops.super] + g * GROUP * activation_bytes(ops.super),
                    stride_of(job, ops.super), job.in, tile);
            finish_tile(product, p, job.first + g * GROUP, rows, tile);
        }
    }
}

static void many_panels(const PackedJob& job, const Product& product, int64_t p0, int64_t p1, char* scratch) {
    int type = packed_type(product);
    const PackedOps& ops = PACKED[type];
    constexpr int64_t TILE = GROUP * PANEL_ROWS;
    float* tiles = (float*)scratch;  // [panel][group][row][16]
    char* unpacked = scratch + PANELS_AT_ONCE * job.groups * TILE * 4;
    char* regrouped = unpacked + ops.unpacked_bytes;
    int64_t whole = job.rows / GROUP, rest = job.rows % GROUP;
    for (int64_t i = 0; i < (p1 - p0) * job.groups * TILE; i += W) store(tiles + i, (vf){});
    const char* x = job.activations[ops.super];
    for (int64_t r = 0; r < ceil_div(job.in, RECORD); r++, x += stride_of(job, ops.super)) {
        int64_t columns = smaller(RECORD, job.in - r * RECORD);
        for (int64_t p = p0; p < p1; p++) {
            float* of_panel = tiles + (p - p0) * job.groups * TILE;
            ops.unpack(panel_at(job, product, p, r, r + 1, regrouped), columns, unpacked);
            ops.many(GROUP, unpacked, x, whole, columns, of_panel);
            if (rest)
                ops.many(group_size(rest), unpacked, x + whole * GROUP * activation_bytes(ops.super), 1, columns,
                         of_panel + whole * TILE);
        }
    }
    for (int64_t p = p0; p < p1; p++)
        for (int64_t g = 0; g < job.groups; g++)
            finish_tile(product, p, job.first + g * GROUP, smaller(GROUP, job.rows - g * GROUP),
                        tiles + ((p - p0) * job.groups + g) * TILE);
}

template <bool MANY>
static void packed_chunk(void* data, int64_t chunk, int thread) {
    const PackedJob& job = *(const PackedJob*)data;
    char* scratch = job.thread_scratch + thread * job.thread_bytes;
    const Product* product = job.products;
    for (;; product++) {
        int64_t panels = ceil_div(product->out, PANEL_ROWS), each = panels_of_chunk(job, *product, MANY);
        if (chunk >= ceil_div(panels, each)) {
            chunk -= ceil_div(panels, each);
            continue;
        }
        int64_t p0 = chunk * each, p1 = smaller(p0 + each, panels);
        if (MANY) many_panels(job, *product, p0, p1, scratch);
        else few_panels(job, *product, p0, p1, scratch);
        return;
    }
}

// From this many rows on unpacking first is quicker.
constexpr int64_t UNPACK_FROM = 2 * GROUP;

// All products have packed weights.
static void linear_packed(const float* x, int64_t rows, int64_t in, const Product* products, int count) {
    PackedJob job = {};
    job.x = x;
    job.products = products;
    job.count = count;
    job.in = in;
    bool many = rows > UNPACK_FROM, needs[2] = {};
    int threads = puna_threads();
    int64_t at_once = many ? smaller(rows, ROWS_AT_ONCE) : rows, groups = ceil_div(at_once, GROUP), bytes = 0, own = 0;
    for (int i = 0; i < count; i++) {
        int type = packed_type(products[i]);
        needs[PACKED[type].super] = true;
        bytes += panel_bytes(type, in) * ceil_div(products[i].out, PANEL_ROWS);
        int64_t unpacked = PANELS_AT_ONCE * groups * GROUP * PANEL_ROWS * 4 + PACKED[type].unpacked_bytes;
        int64_t regrouped = panel_bytes(type, many ? smaller(in, RECORD) : in);
        own = larger(own, (many ? unpacked : 0) + (products[i].w.type & PANELS ? 0 : regrouped));
    }
    job.thread_bytes = round_up(own, 64);
    int64_t all[2];
    for (int super = 0; super < 2; super++) all[super] = needs[super] ? round_up(ceil_div(in, RECORD) * groups * GROUP * activation_bytes(super), 64) : 0;
    char* scratch = (char*)puna_scratch((size_t)(all[0] + all[1] + threads * job.thread_bytes + 64));
    if (needs[0]) job.activations[0] = scratch;
    if (needs[1]) job.activations[1] = scratch + all[0];
    job.thread_scratch = scratch + all[0] + all[1];
    // A region costs about a microsecond (ten where its threads sleep): below this the work is not worth one.
    constexpr int64_t ALONE_BYTES = 48 << 10, ALONE_NUMBERS = 16 << 10;
    // Long stretches: the hardware must find the stream anew in each chunk.
    job.chunk_bytes = smaller(larger(bytes / (threads * 8), 16 << 10), 512 << 10);
    int64_t chunks = 0, records = ceil_div(in, RECORD);
    for (int i = 0; i < count; i++)
        chunks += ceil_div(ceil_div(products[i].out, PANEL_ROWS), panels_of_chunk(job, products[i], many));
    for (job.first = 0; job.first < rows; job.first += at_once) {
        job.rows = smaller(at_once, rows - job.first);
        job.groups = ceil_div(job.rows, GROUP);
        job.record_span = larger(1, smaller(records, ALONE_NUMBERS / RECORD / GROUP));
        int64_t spans = ceil_div(records, job.record_span) * job.groups;
        puna_parallel(spans, job.rows * in <= ALONE_NUMBERS ? 1 : threads, quantize_chunk, &job);
        int workers = bytes * ceil_div(job.rows, 4) <= ALONE_BYTES ? 1 : threads;
        puna_parallel(chunks, workers, many ? packed_chunk<true> : packed_chunk<false>, &job);
    }
}
