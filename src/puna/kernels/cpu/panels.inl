// Panels (see kernels.h): where a record lies, and how rows of blocks are regrouped into panels.
//
// What it is not: arithmetic on the numbers (packed.inl). What is surprising: regrouping knows nothing of a type but
// its BlockShape and the places of its words. The order of bits within a word stays; words of different rows are put
// side by side.

typedef uint32_t u4_any __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int64_t most_record_bytes() {
    int64_t most = 0;
    for (int type = BF16 + 1; type < WEIGHT_TYPES; type++)
        most = record_bytes(type, blocks_in_record(type)) > most ? record_bytes(type, blocks_in_record(type)) : most;
    return most;
}
constexpr int64_t MOST_RECORD_BYTES = most_record_bytes();

// Records [r0, r1) of the panel whose first row begins at `rows`; `count` <= 16 rows are there.
static void regroup_records(int type, const uint8_t* rows, int64_t row_bytes, int64_t count, int64_t in, int64_t r0,
                            int64_t r1, uint8_t* to) {
    const BlockShape shape = BLOCKS[type];
    const int64_t each = blocks_in_record(type), all = in / shape.numbers;
    const int64_t first_word = shape.half == 0 ? 2 : 0;
    for (int64_t r = r0; r < r1; r++) {
        int64_t b0 = r * each, blocks = smaller(each, all - b0);
        // Two records on, or in the next panel: 16 short stretches at a time are too many for the hardware to foresee.
        int64_t stretch = each * shape.bytes, next = (r + 2) * stretch;
        if (next >= row_bytes) next += (PANEL_ROWS - 1) * row_bytes;
        for (int64_t i = 0; i < count; i++)
            for (int64_t at = 0; at < stretch; at += 64) __builtin_prefetch(rows + i * row_bytes + next + at);
        uint8_t* words = to + halves_bytes(type, blocks);
        if (shape.half >= 0) {
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t i = 0; i < PANEL_ROWS; i++)
                    ((half_any*)to)[b * PANEL_ROWS + i] =
                        i < count ? *(const half_any*)(rows + i * row_bytes + (b0 + b) * shape.bytes + shape.half) : 0;
            for (uint8_t* pad = to + blocks * PANEL_ROWS * 2; pad < words; pad++) *pad = 0;
        }
        for (int64_t b = 0; b < blocks; b++, words += shape.words * PANEL_ROWS * 4)
            for (int64_t i = 0; i < PANEL_ROWS; i += 4) {
                const uint8_t* from[4];
                for (int64_t j = 0; j < 4; j++)
                    from[j] = i + j < count ? rows + (i + j) * row_bytes + (b0 + b) * shape.bytes + first_word : nullptr;
                int64_t w = 0;
                for (; w + 4 <= shape.words; w += 4) {
                    f4 x[4];
                    UNROLL for (int j = 0; j < 4; j++) x[j] = from[j] ? *(const f4_any*)(from[j] + w * 4) : (f4){};
                    transpose4(x[0], x[1], x[2], x[3]);
                    UNROLL for (int j = 0; j < 4; j++)
                        *(f4_any*)(words + (place_of(type, (int)w + j) * PANEL_ROWS + i) * 4) = x[j];
                }
                for (; w < shape.words; w++)
                    for (int64_t j = 0; j < 4; j++)
                        ((word_any*)words)[place_of(type, (int)w) * PANEL_ROWS + i + j] = from[j] ? *(const word_any*)(from[j] + w * 4) : 0;
            }
        to = words;
    }
}

struct RegroupJob {
    Regrouping* matrices;
    int count;
    bool mapped;
};

static int64_t panels_in_chunk(const Regrouping& m) {
    return larger(1, (1 << 20) / larger(1, panel_bytes(m.packed.type, m.in)));
}

static void regroup_chunk(void* data, int64_t chunk, int) {
    const RegroupJob& job = *(const RegroupJob*)data;
    const Regrouping* found = job.matrices;
    while (found + 1 < job.matrices + job.count && found[1].first_chunk <= chunk) found++;
    const Regrouping& m = *found;
    const BlockShape shape = BLOCKS[m.packed.type];
    const uint8_t* rows = (const uint8_t*)m.packed.data;
    int64_t row = m.in / shape.numbers * shape.bytes, panel = panel_bytes(m.packed.type, m.in);
    int64_t begin = (chunk - m.first_chunk) * panels_in_chunk(m);
    int64_t end = smaller(begin + panels_in_chunk(m), ceil_div(m.out, PANEL_ROWS));
    for (int64_t p = begin; p < end; p++)
        regroup_records(m.packed.type, rows + p * PANEL_ROWS * row, row, smaller(PANEL_ROWS, m.out - p * PANEL_ROWS), m.in,
                        0, ceil_div(m.in, RECORD), (uint8_t*)m.panels + p * panel);
    // Chunk by chunk, so that a matrix is never there twice. Linux maps 64 KiB around a page that is missed, so this
    // chunk's first pages brought back the last of the chunk before.
    if (job.mapped)
        puna_release_pages(rows + larger(0, begin * PANEL_ROWS * row - (64 << 10)),
                           rows + smaller(end * PANEL_ROWS, m.out) * row);
}

static void regroup(Regrouping* matrices, int count, bool mapped) {
    int64_t chunks = 0;
    for (int i = 0; i < count; i++) {
        matrices[i].first_chunk = chunks;
        chunks += ceil_div(ceil_div(matrices[i].out, PANEL_ROWS), panels_in_chunk(matrices[i]));
    }
    RegroupJob job = {matrices, count, mapped};
    puna_parallel(chunks, puna_threads(), regroup_chunk, &job);
    if (!mapped) return;
    for (int i = 0; i < count; i++) {  // what a neighbour on another thread brought back
        const Regrouping& m = matrices[i];
        const BlockShape shape = BLOCKS[m.packed.type];
        const uint8_t* rows = (const uint8_t*)m.packed.data;
        puna_release_pages(rows, rows + m.out * (m.in / shape.numbers * shape.bytes));
    }
}
