// Rows of a table, widened to float32. It is as fast as memory on one thread.

template <int TYPE>
static void embedding_of(const void* table, int64_t dim, const int32_t* ids, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) {
        const typename Words<TYPE>::word* row = (const typename Words<TYPE>::word*)table + ids[i] * dim;
        for (int64_t k = 0; k < dim; k += W)
            store_up_to(out + i * dim + k, widen_up_to<TYPE>(row + k, dim - k), dim - k);
    }
}

static void embedding(Weights table, int64_t dim, const int32_t* ids, int64_t count, float* out) {
    if (table.type == F32) embedding_of<F32>(table.data, dim, ids, count, out);
    else if (table.type == F16) embedding_of<F16>(table.data, dim, ids, count, out);
    else embedding_of<BF16>(table.data, dim, ids, count, out);
}
