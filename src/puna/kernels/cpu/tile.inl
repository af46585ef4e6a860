// The inner loops of the products with many rows, in linear and in attention: the *columns of the result* (activation
// rows, or queries) lie in the lanes, the other operand is read where it is, one number broadcast at a time. So neither
// weights nor keys nor values are ever rearranged; only the activations are, once, into panels [k][lanes].
//
// A tile is NR numbers × NV vectors of sums, kept in registers over all of k: 8 × 3 of 32 registers, 4 × 3 of 16. Each
// step of k loads NV vectors and broadcasts NR numbers for NR·NV multiply-adds.

constexpr int NR = REGISTERS == 32 ? 8 : 4;
constexpr int NV = 3;
constexpr int LANES = NV * W;  // activation rows (or queries) in a full panel

#ifdef BF16_DOT
// sums += w · x, pairs of bfloat16. In assembly because gcc 12 spills the tile's sums around the intrinsic.
INLINE void dot_pairs(vf& sums, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x)); }
#endif

// sums[i][j] += Σ_k rows[i][k] · panel[k][j], k < count. The rows may be weights.
template <int R, int V>
INLINE void tile_rows(const float_any* const* rows, const float* panel, int64_t count, vf (&sums)[R][V]) {
    for (int64_t k = 0; k < count; k++) {
        vf x[V];
        UNROLL for (int j = 0; j < V; j++) x[j] = load(panel + (k * V + j) * W);
        UNROLL for (int i = 0; i < R; i++) {
            vf w = splat(rows[i][k]);
            UNROLL for (int j = 0; j < V; j++) sums[i][j] += w * x[j];
        }
    }
}

// sums[i][j] += Σ_k columns[k · stride + i] · panel[k][j], k < count.
template <int R, int V>
INLINE void tile_columns(const float* columns, int64_t stride, const float* panel, int64_t count, vf (&sums)[R][V]) {
    for (int64_t k = 0; k < count; k++, columns += stride) {
        vf x[V];
        UNROLL for (int j = 0; j < V; j++) x[j] = load(panel + (k * V + j) * W);
        UNROLL for (int i = 0; i < R; i++) {
            vf w = splat(columns[i]);
            UNROLL for (int j = 0; j < V; j++) sums[i][j] += w * x[j];
        }
    }
}

// panel[k][lane] = scale · row(lane)[k] for k < count, lane < lanes; lanes from `rows` on are zero.
template <typename Row>
INLINE void pack_lanes(Row row, int64_t rows, int64_t lanes, int64_t count, float scale, float* panel) {
    for (int64_t lane = 0; lane < lanes; lane += 4) {
        const float* from[4];
        for (int64_t i = 0; i < 4; i++) from[i] = lane + i < rows ? row(lane + i) : nullptr;
        int64_t k = 0;
        for (; k + 4 <= count; k += 4) {
            f4 x[4];
            UNROLL for (int i = 0; i < 4; i++) x[i] = from[i] ? *(const f4_any*)(from[i] + k) * scale : (f4){};
            transpose4(x[0], x[1], x[2], x[3]);
            UNROLL for (int i = 0; i < 4; i++) *(f4_any*)(panel + (k + i) * lanes + lane) = x[i];
        }
        for (; k < count; k++)
            for (int i = 0; i < 4; i++) panel[k * lanes + lane + i] = from[i] ? from[i][k] * scale : 0.0f;
    }
}

// row(lane)[n] = tile[n][lane] for n < count, lane < rows; `tile` has `lanes` floats a line.
template <typename Row>
INLINE void unpack_lanes(const float* tile, int64_t lanes, int64_t count, int64_t rows, Row row) {
    int64_t lane = 0;
    for (; lane + 4 <= rows; lane += 4) {
        float* to[4];
        for (int64_t i = 0; i < 4; i++) to[i] = row(lane + i);
        int64_t n = 0;
        for (; n + 4 <= count; n += 4) {
            f4 x[4];
            UNROLL for (int i = 0; i < 4; i++) x[i] = *(const f4_any*)(tile + (n + i) * lanes + lane);
            transpose4(x[0], x[1], x[2], x[3]);
            UNROLL for (int i = 0; i < 4; i++) *(f4_any*)(to[i] + n) = x[i];
        }
        for (; n < count; n++)
            for (int i = 0; i < 4; i++) to[i][n] = tile[n * lanes + lane + i];
    }
    for (; lane < rows; lane++)
        for (int64_t n = 0; n < count; n++) row(lane)[n] = tile[n * lanes + lane];
}
