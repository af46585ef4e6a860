// Packing float32 into the block types of GGML: the same bytes as puna.kernels.encode, which defines them and says why.
//
// A tile is 16 stretches side by side, whatever the vectors' width: a lane is what shares a scale. Sums run over the
// positions of a stretch, one by one, and every product is rounded before it is added to (`times`), so the bytes are
// the same on every instruction set.

typedef int32_t vi_any __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));

constexpr int TILE_LANES = 16;
constexpr int SPREADS = 9;  // -1 to 1 in quarters

// A product that the compiler may not fuse with an addition.
INLINE vf times(vf a, vf b) {
    vf product = a * b;
    keep(product);
    return product;
}

// a / b, and 0 where that is no finite number.
INLINE vf ratio(vf a, vf b) {
    vf quotient = a / b;
    return select(absolute(quotient) < splat(INFINITE), quotient, (vf){});
}

INLINE vf clamp(vf x, float low, float high) {
    x = x < splat(low) ? splat(low) : x;
    return x > splat(high) ? splat(high) : x;
}

// To nearest, ties to even, for |x| < 2²².
INLINE vf rounded(vf x) {
    vf shifted = x + splat(12582912.0f);
    keep(shifted);
    return shifted - splat(12582912.0f);
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

static uint16_t to_half(float x) {
    uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x47800000u) return (uint16_t)(sign | 0x7c00);  // 65536 and above
    if (size < 0x38800000u) {                                   // below 2⁻¹⁴: adding 1/2 leaves steps of 2⁻²⁴
        float small;
        __builtin_memcpy(&small, &size, 4);
        return (uint16_t)(sign | (bits_of(small + 0.5f) - 0x3f000000u));
    }
    size += 0xfff + ((size >> 13) & 1);
    return (uint16_t)(sign | ((size - 0x38000000u) >> 13));
}

static float from_half(uint16_t half) {
    uint32_t exponent = half & 0x7c00, bits;
    float small = (float)(half & 0x3ff) * 0x1p-24f;
    __builtin_memcpy(&bits, &small, 4);
    if (exponent) bits = ((uint32_t)(half & 0x7fff) << 13) + 0x38000000u;
    bits |= (uint32_t)(half & 0x8000) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// What a tile becomes: numbers, and for each lane a scale and a minimum.
struct Tile {
    alignas(64) float x[32][TILE_LANES];
    alignas(64) int32_t q[32][TILE_LANES];
    alignas(64) float scale[TILE_LANES], minimum[TILE_LANES];  // as fitted
    alignas(64) float unit[TILE_LANES], unit_min[TILE_LANES];  // what whole multiples of which they are stored as
    alignas(64) int32_t multiple[TILE_LANES], multiple_min[TILE_LANES];
};

// The sum of the squared errors of x ≈ scale · q - minimum, q the nearest whole number in [low, high].
template <int STRETCH>
INLINE vf misfit(const float (*x)[TILE_LANES], vf scale, vf minimum, float low, float high) {
    vf inverse = ratio(splat(1.0f), scale), total = {};
    for (int i = 0; i < STRETCH; i++) {
        vf value = load(x[i]);
        vf q = rounded(clamp(times(value + minimum, inverse), low, high));
        vf error = value - (times(q, scale) - minimum);
        vf square = times(error, error);
        total = i ? total + square : square;
    }
    return total;
}

template <int STRETCH>
INLINE void fit_range(Tile& tile, int v, int top) {
    const float(*x)[TILE_LANES] = (const float(*)[TILE_LANES])&tile.x[0][v];
    float most = (float)top;
    vf count = splat((float)STRETCH), low = load(x[0]), high = low, total = low;
    for (int i = 1; i < STRETCH; i++) {
        vf value = load(x[i]);
        low = value < low ? value : low;
        high = value > high ? value : high;
        total = total + value;
    }
    low = low < (vf){} ? low : (vf){};
    vf span = high - low, scale = span / splat(most), minimum = -low;
    vf least = misfit<STRETCH>(x, scale, minimum, 0.0f, most);
    for (int step = 0; step < SPREADS; step++) {
        vf inverse = ratio(splat(most + (float)(step - 4) * 0.25f), span), q1 = {}, q2 = {}, qx = {};
        for (int i = 0; i < STRETCH; i++) {
            vf value = load(x[i]), q = rounded(clamp(times(value - low, inverse), 0.0f, most));
            vf square = times(q, q), product = times(q, value);
            q1 = i ? q1 + q : q;
            q2 = i ? q2 + square : square;
            qx = i ? qx + product : product;
        }
        vf s = ratio(times(count, qx) - times(q1, total), times(count, q2) - times(q1, q1));
        vf m = (times(s, q1) - total) / count;
        s = select(m < (vf){}, ratio(qx, q2), s);
        m = maximum(m, (vf){});
        vf error = misfit<STRETCH>(x, s, m, 0.0f, most);
        vi better = (error < least) & (s > (vf){});
        scale = select(better, s, scale);
        minimum = select(better, m, minimum);
        least = select(better, error, least);
    }
    store(&tile.scale[v], scale);
    store(&tile.minimum[v], minimum);
}

// The number farthest from 0 of each lane, the first of equals.
template <int STRETCH>
INLINE vf peak_of(const float (*x)[TILE_LANES]) {
    vf peak = load(x[0]);
    for (int i = 1; i < STRETCH; i++) {
        vf value = load(x[i]);
        peak = select(absolute(value) > absolute(peak), value, peak);
    }
    return peak;
}

INLINE void fit_signed(Tile& tile, int v, int half) {
    const float(*x)[TILE_LANES] = (const float(*)[TILE_LANES])&tile.x[0][v];
    float low = (float)-half, high = (float)(half - 1);
    vf peak = peak_of<16>(x), scale = peak / splat(low), least = misfit<16>(x, scale, (vf){}, low, high);
    for (int step = 0; step < SPREADS; step++) {
        vf inverse = ratio(splat(low - (float)(step - 4) * 0.25f), peak), q2 = {}, qx = {};
        for (int i = 0; i < 16; i++) {
            vf value = load(x[i]), q = rounded(clamp(times(value, inverse), low, high));
            vf square = times(q, q), product = times(q, value);
            q2 = i ? q2 + square : square;
            qx = i ? qx + product : product;
        }
        vf s = ratio(qx, q2), error = misfit<16>(x, s, (vf){}, low, high);
        vi better = error < least;
        scale = select(better, s, scale);
        least = select(better, error, least);
    }
    store(&tile.scale[v], scale);
}

// Scale and minimum as whole multiples in [least, most] of the block's units: the nearest, or a neighbour that fits
// better. Then the numbers themselves.
template <int STRETCH, bool MINIMUM>
INLINE void settle(Tile& tile, int v, float least, float most, float low, float high) {
    const float(*x)[TILE_LANES] = (const float(*)[TILE_LANES])&tile.x[0][v];
    vf unit = load(&tile.unit[v]), unit_min = MINIMUM ? load(&tile.unit_min[v]) : (vf){};
    vf first = rounded(clamp(times(load(&tile.scale[v]), ratio(splat(1.0f), unit)), least, most)), first_min = {};
    if (MINIMUM) first_min = rounded(clamp(times(load(&tile.minimum[v]), ratio(splat(1.0f), unit_min)), least, most));
    vf best = first, best_min = first_min;
    vf smallest = misfit<STRETCH>(x, times(unit, best), times(unit_min, best_min), low, high);
    for (int step = -1; step <= 1; step++)
        for (int step_min = MINIMUM ? -1 : 0; step_min <= (MINIMUM ? 1 : 0); step_min++) {
            if (!step && !step_min) continue;
            vf s = rounded(clamp(first + splat((float)step), least, most)), m = {};
            if (MINIMUM) m = rounded(clamp(first_min + splat((float)step_min), least, most));
            vf error = misfit<STRETCH>(x, times(unit, s), times(unit_min, m), low, high);
            vi better = error < smallest;
            best = select(better, s, best);
            best_min = select(better, m, best_min);
            smallest = select(better, error, smallest);
        }
    vf scale = times(unit, best), minimum = times(unit_min, best_min), inverse = ratio(splat(1.0f), scale);
    for (int i = 0; i < STRETCH; i++) {
        vf q = rounded(clamp(times(load(x[i]) + minimum, inverse), low, high));
        *(vi_any*)&tile.q[i][v] = __builtin_convertvector(q, vi);
    }
    *(vi_any*)&tile.multiple[v] = __builtin_convertvector(best, vi);
    *(vi_any*)&tile.multiple_min[v] = __builtin_convertvector(best_min, vi);
}

static bool finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

static void put_half(uint8_t* out, uint16_t half) {
    out[0] = (uint8_t)half;
    out[1] = (uint8_t)(half >> 8);
}

// ---- types of 32 numbers: a lane is a block ----

static bool encode_32(int kind, Tile& tile, int blocks, uint8_t* out) {
    bool ranged = kind == Q4_1 || kind == Q5_1, five = kind == Q5_0 || kind == Q5_1;
    float steps = five ? 31.0f : 15.0f, half = five ? 16.0f : 8.0f;
    for (int v = 0; v < TILE_LANES; v += W) {
        const float(*x)[TILE_LANES] = (const float(*)[TILE_LANES])&tile.x[0][v];
        vf low = load(x[0]), high = low, peak = peak_of<32>(x);
        for (int i = 1; i < 32; i++) {
            vf value = load(x[i]);
            low = value < low ? value : low;
            high = value > high ? value : high;
        }
        low = low + (vf){};  // never -0
        vf scale = ranged ? (high - low + (vf){}) / splat(steps) : peak / splat(-half);
        if (kind == Q8_0) scale = absolute(peak) / splat(127.0f);
        vf inverse = ratio(splat(1.0f), scale), add = splat(ranged ? 0.5f : half + 0.5f);
        for (int i = 0; i < 32; i++) {
            vf value = load(x[i]);
            vi q;
            if (kind == Q8_0) {  // halves away from zero
                vf scaled = times(value, inverse), size = absolute(scaled);
                vf whole = __builtin_convertvector(__builtin_convertvector(size, vi), vf);
                vi up = __builtin_convertvector(splat(2.0f) * (size - whole), vi) + __builtin_convertvector(whole, vi);
                q = (scaled < (vf){}) ? -up : up;
            } else {
                vf shifted = times(ranged ? value - low : value, inverse) + add;
                q = __builtin_convertvector(shifted, vi);
                vi most = __builtin_convertvector(splat(steps), vi);
                q = q > most ? most : q;
            }
            *(vi_any*)&tile.q[i][v] = q;
        }
        store(&tile.scale[v], scale);
        store(&tile.minimum[v], low);
    }
    bool fits = true;
    for (int b = 0; b < blocks; b++) {
        uint16_t d = to_half(tile.scale[b]);
        fits &= finite_half(d);
        put_half(out, d);
        out += 2;
        if (ranged) {
            uint16_t m = to_half(tile.minimum[b]);
            fits &= finite_half(m);
            put_half(out, m);
            out += 2;
        }
        if (kind == Q8_0) {
            for (int i = 0; i < 32; i++) *out++ = (uint8_t)tile.q[i][b];
            continue;
        }
        if (five) {
            uint32_t high = 0;
            for (int i = 0; i < 32; i++) high |= (uint32_t)(tile.q[i][b] >> 4) << i;
            for (int i = 0; i < 4; i++) *out++ = (uint8_t)(high >> (8 * i));
        }
        for (int i = 0; i < 16; i++) *out++ = (uint8_t)((tile.q[i][b] & 15) | ((tile.q[i + 16][b] & 15) << 4));
    }
    return fits;
}

// ---- types of 256 numbers ----

// The numbers of one block in their order.
template <int STRETCH>
static void in_order(const Tile& tile, int first, int add, uint8_t* q) {
    for (int lane = 0; lane < 256 / STRETCH; lane++)
        for (int i = 0; i < STRETCH; i++) *q++ = (uint8_t)(tile.q[i][first + lane] + add);
}

// Two bits each: of 128 numbers, 32 bytes hold the four that lie 32 apart.
static uint8_t* put_crumbs(const uint8_t* q, int shift, uint8_t* out) {
    for (int n = 0; n < 256; n += 128)
        for (int i = 0; i < 32; i++) {
            int byte = 0;
            for (int k = 0; k < 4; k++) byte |= ((q[n + 32 * k + i] >> shift) & 3) << (2 * k);
            *out++ = (uint8_t)byte;
        }
    return out;
}

// One bit each: 32 bytes, each with the bits of the eight numbers that lie 32 apart.
static uint8_t* put_bits(const uint8_t* q, int shift, uint8_t* out) {
    for (int i = 0; i < 32; i++) {
        int byte = 0;
        for (int k = 0; k < 8; k++) byte |= ((q[32 * k + i] >> shift) & 1) << k;
        *out++ = (uint8_t)byte;
    }
    return out;
}

template <int STRETCH>
static bool encode_ranged(int kind, Tile& tile, int blocks, uint8_t* out) {
    constexpr int GROUPS = 256 / STRETCH;
    int top = kind == Q2_K ? 3 : kind == Q4_K ? 15 : 31;
    float most = kind == Q2_K ? 15.0f : 63.0f;
    for (int v = 0; v < TILE_LANES; v += W) fit_range<STRETCH>(tile, v, top);
    uint16_t d[TILE_LANES / GROUPS], dmin[TILE_LANES / GROUPS];
    bool fits = true;
    for (int b = 0; b < TILE_LANES / GROUPS; b++) {
        float scale = 0.0f, minimum = 0.0f;
        for (int g = b * GROUPS; g < (b + 1) * GROUPS; g++) {
            scale = tile.scale[g] > scale ? tile.scale[g] : scale;
            minimum = tile.minimum[g] > minimum ? tile.minimum[g] : minimum;
        }
        d[b] = to_half(scale / most);
        dmin[b] = to_half(minimum / most);
        fits &= finite_half(d[b]) && finite_half(dmin[b]);
        for (int g = b * GROUPS; g < (b + 1) * GROUPS; g++) {
            tile.unit[g] = from_half(d[b]);
            tile.unit_min[g] = from_half(dmin[b]);
        }
    }
    if (!fits) return false;
    for (int v = 0; v < TILE_LANES; v += W) settle<STRETCH, true>(tile, v, 0.0f, most, 0.0f, (float)top);
    for (int b = 0; b < blocks; b++) {
        uint8_t q[256];
        in_order<STRETCH>(tile, b * GROUPS, 0, q);
        const int32_t *sc = tile.multiple + b * GROUPS, *mn = tile.multiple_min + b * GROUPS;
        if (kind == Q2_K) {
            for (int g = 0; g < GROUPS; g++) *out++ = (uint8_t)(sc[g] | (mn[g] << 4));
            out = put_crumbs(q, 0, out);
        }
        put_half(out, d[b]);
        put_half(out + 2, dmin[b]);
        out += 4;
        if (kind == Q2_K) continue;
        for (int g = 0; g < 4; g++) {
            out[g] = (uint8_t)((sc[g] & 63) | ((sc[g + 4] >> 4) << 6));
            out[g + 4] = (uint8_t)((mn[g] & 63) | ((mn[g + 4] >> 4) << 6));
        }
        out += 8;
        for (int g = 4; g < 8; g++) *out++ = (uint8_t)((sc[g] & 15) | ((mn[g] & 15) << 4));
        if (kind == Q5_K) out = put_bits(q, 4, out);
        for (int n = 0; n < 256; n += 64)
            for (int i = n; i < n + 32; i++) *out++ = (uint8_t)((q[i] & 15) | ((q[i + 32] & 15) << 4));
    }
    return fits;
}

static bool encode_signed(int kind, Tile& tile, uint8_t* out) {
    int half = kind == Q3_K ? 4 : 32;
    float most = kind == Q3_K ? 31.0f : 127.0f;
    for (int v = 0; v < TILE_LANES; v += W) fit_signed(tile, v, half);
    float peak = tile.scale[0];
    for (int g = 1; g < TILE_LANES; g++)
        if (__builtin_fabsf(tile.scale[g]) > __builtin_fabsf(peak)) peak = tile.scale[g];
    uint16_t d = to_half(peak / (-most - 1.0f));
    if (!finite_half(d)) return false;
    for (int g = 0; g < TILE_LANES; g++) tile.unit[g] = from_half(d);
    for (int v = 0; v < TILE_LANES; v += W)
        settle<16, false>(tile, v, -most - 1.0f, most, (float)-half, (float)(half - 1));
    uint8_t q[256];
    in_order<16>(tile, 0, half, q);
    const int32_t* sc = tile.multiple;
    if (kind == Q6_K) {
        for (int n = 0; n < 256; n += 128)
            for (int i = n; i < n + 64; i++) *out++ = (uint8_t)((q[i] & 15) | ((q[i + 64] & 15) << 4));
        out = put_crumbs(q, 4, out);
        for (int g = 0; g < 16; g++) *out++ = (uint8_t)sc[g];
    } else {
        out = put_bits(q, 2, out);
        out = put_crumbs(q, 0, out);
        for (int g = 0; g < 8; g++) *out++ = (uint8_t)(((sc[g] + 32) & 15) | (((sc[g + 8] + 32) & 15) << 4));
        for (int g = 0; g < 4; g++) {
            int byte = 0;
            for (int k = 0; k < 4; k++) byte |= ((sc[4 * k + g] + 32) >> 4) << (2 * k);
            *out++ = (uint8_t)byte;
        }
    }
    put_half(out, d);
    return true;
}

struct EncodeJob {
    int kind, stretch, tile_blocks;
    int64_t blocks;
    const float* x;
    uint8_t* out;
    int failed;
};

constexpr int64_t TILES_AT_A_TIME = 16;

static void encode_tiles(void* argument, int64_t chunk, int) {
    EncodeJob& job = *(EncodeJob*)argument;
    int64_t span = job.tile_blocks * TILES_AT_A_TIME, end = smaller((chunk + 1) * span, job.blocks);
    int64_t numbers = BLOCKS[job.kind].numbers;
    Tile tile;
    for (int64_t at = chunk * span; at < end; at += job.tile_blocks) {
        int blocks = (int)smaller(job.tile_blocks, end - at), lanes = blocks * TILE_LANES / job.tile_blocks;
        const float* x = job.x + at * numbers;
        for (int lane = 0; lane < TILE_LANES; lane++)
            for (int i = 0; i < job.stretch; i++) tile.x[i][lane] = lane < lanes ? x[lane * job.stretch + i] : 0.0f;
        uint8_t* out = job.out + at * BLOCKS[job.kind].bytes;
        bool fits;
        if (job.tile_blocks == TILE_LANES) fits = encode_32(job.kind, tile, blocks, out);
        else if (job.stretch == 32) fits = encode_ranged<32>(job.kind, tile, blocks, out);
        else if (job.kind == Q2_K) fits = encode_ranged<16>(job.kind, tile, blocks, out);
        else fits = encode_signed(job.kind, tile, out);
        if (!fits) __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
    }
}

static bool encode(int kind, const float* x, int64_t blocks, uint8_t* out) {
    bool k = BLOCKS[kind].numbers == 256, wide = kind == Q4_K || kind == Q5_K;
    EncodeJob job = {kind, k && !wide ? 16 : 32, k ? (wide ? 2 : 1) : TILE_LANES, blocks, x, out, 0};
    puna_parallel(ceil_div(blocks, job.tile_blocks * TILES_AT_A_TIME), puna_threads(), encode_tiles, &job);
    return !job.failed;
}
