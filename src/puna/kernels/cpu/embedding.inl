// Rows of a table in float32. For the dense types it is as fast as memory on one thread.

template <int TYPE>
static void embedding_of(const void* table, int64_t dim, const int32_t* ids, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) {
        const typename Words<TYPE>::word* row = (const typename Words<TYPE>::word*)table + ids[i] * dim;
        for (int64_t k = 0; k < dim; k += W)
            store_up_to(out + i * dim + k, widen_up_to<TYPE>(row + k, dim - k), dim - k);
    }
}

static void embedding_packed(Weights table, int64_t dim, const int32_t* ids, int64_t count, float* out) {
    int type = table.type & ~PANELS;
    int64_t record = record_bytes(type, blocks_in_record(type));
    int64_t row = dim / BLOCKS[type].numbers * BLOCKS[type].bytes, panel = panel_bytes(type, dim);
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < dim; k += RECORD) {
            int64_t r = k / RECORD, lane = 0;
            uint8_t own[MOST_RECORD_BYTES] __attribute__((aligned(64)));
            const uint8_t* from = own;
            if (table.type & PANELS) {
                from = (const uint8_t*)table.data + ids[i] / PANEL_ROWS * panel + r * record;
                lane = ids[i] % PANEL_ROWS;
            } else {
                regroup_records(type, (const uint8_t*)table.data + ids[i] * row, row, 1, dim, r, r + 1, own);
            }
            PACKED[type].values(from, smaller(RECORD, dim - k), lane, out + i * dim + k);
        }
}

static void embedding(Weights table, int64_t dim, const int32_t* ids, int64_t count, float* out) {
    if (table.type == F32) embedding_of<F32>(table.data, dim, ids, count, out);
    else if (table.type == F16) embedding_of<F16>(table.data, dim, ids, count, out);
    else if (table.type != BF16) embedding_packed(table, dim, ids, count, out);
    else embedding_of<BF16>(table.data, dim, ids, count, out);
}
