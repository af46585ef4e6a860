// What the Python module demands of arrays before a kernel sees them: type, shape, order, alignment, and that ids and
// positions lie where they must. TypeError or ValueError, before any memory is touched.
//
// What it is not: conversions. nanobind would turn a float64 array into a float32 copy, and results written to such a
// copy would be lost; every entry is bound with `noconvert`, and a mismatch ends here.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "tables.h"

namespace nb = nanobind;
using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
// ---- what an error says ----

inline std::string type_name(nb::dlpack::dtype type) {
    const char* code = "?";
    switch ((nb::dlpack::dtype_code)type.code) {
        case nb::dlpack::dtype_code::Int: code = "int"; break;
        case nb::dlpack::dtype_code::UInt: code = "uint"; break;
        case nb::dlpack::dtype_code::Float: code = "float"; break;
        case nb::dlpack::dtype_code::Bfloat: code = "bfloat"; break;
        case nb::dlpack::dtype_code::Complex: code = "complex"; break;
        case nb::dlpack::dtype_code::Bool: return "bool";
        default: break;
    }
    return code + std::to_string(type.bits);
}

inline std::string numbers(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); i++) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

template <typename A>
std::string shape_of(const A& a) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < a.ndim(); i++) shape.push_back((int64_t)a.shape(i));
    return numbers(shape);
}

[[noreturn]] inline void bad_type(const char* name, const char* needed, nb::dlpack::dtype type) {
    throw nb::type_error((std::string(name) + " must be " + needed + ", not " + type_name(type)).c_str());
}

[[noreturn]] inline void bad_value(const std::string& what) { throw nb::value_error(what.c_str()); }

// ---- arrays ----

template <typename A>
void contiguous(const A& a, const char* name) {
    if (a.size() == 0) return;
    int64_t step = 1;
    for (size_t i = a.ndim(); i-- > 0;) {
        if (a.shape(i) != 1 && a.stride(i) != step) bad_value(std::string(name) + " must be C-contiguous");
        step *= (int64_t)a.shape(i);
    }
}

template <typename T, typename A>
T* checked(const A& a, const char* name) {
    nb::dlpack::dtype type = a.dtype(), want = nb::dtype<std::remove_const_t<T>>();
    if (!(type == want)) bad_type(name, std::is_same_v<std::remove_const_t<T>, float> ? "float32" : "int32", type);
    contiguous(a, name);
    if ((uintptr_t)a.data() % alignof(T)) bad_value(std::string(name) + " must be aligned to its numbers");
    return (T*)a.data();
}

inline Weights weights(const In& a, bool bf16, const char* name) {
    nb::dlpack::dtype type = a.dtype();
    int kind;
    if (bf16 && type == nb::dtype<uint16_t>()) kind = BF16;
    else if (!bf16 && type == nb::dtype<float>()) kind = F32;
    else if (!bf16 && type.code == (uint8_t)nb::dlpack::dtype_code::Float && type.bits == 16 && type.lanes == 1) kind = F16;
    else bad_type(name, "float32, float16 or BF16", type);
    contiguous(a, name);
    return {a.data(), kind};
}

// The bytes of [rows, columns] in a packed type, `| PANELS` or not. ValueError where there is no such matrix.
inline int64_t packed_bytes(int type, int64_t rows, int64_t columns, const char* name) {
    int kind = type & ~PANELS;
    if (kind <= BF16 || kind >= WEIGHT_TYPES) bad_value(std::string(name) + ": no such type");
    if (rows < 0 || columns < 0 || rows > int64_t(1) << 31 || columns > int64_t(1) << 31 || columns % BLOCKS[kind].numbers)
        bad_value(std::string(name) + ": there is no matrix [" + std::to_string(rows) + ", " + std::to_string(columns) +
                  "] of type " + TYPE_NAMES[kind]);
    int64_t each = type & PANELS ? panel_bytes(kind, columns) : columns / BLOCKS[kind].numbers * BLOCKS[kind].bytes;
    int64_t bytes, count = type & PANELS ? (rows + PANEL_ROWS - 1) / PANEL_ROWS : rows;
    if (__builtin_mul_overflow(each, count, &bytes)) bad_value(std::string(name) + " is too large");
    return bytes;
}

// A matrix [rows, columns]: dense (`type` F32: as the array says; BF16) or packed.
inline Weights matrix(const In& a, int type, int64_t rows, int64_t columns, const char* name) {
    if (type == F32 || type == BF16) {
        Weights w = weights(a, type == BF16, name);
        if (a.ndim() != 2 || (int64_t)a.shape(0) != rows || (int64_t)a.shape(1) != columns)
            bad_value(std::string(name) + " " + shape_of(a) + " is not of the shape said");
        return w;
    }
    int64_t bytes = packed_bytes(type, rows, columns, name);
    if (!(a.dtype() == nb::dtype<uint8_t>())) bad_type(name, "uint8", a.dtype());
    contiguous(a, name);
    if ((int64_t)a.size() != bytes)
        bad_value(std::string(name) + " must have " + std::to_string(bytes) + " bytes, not " + std::to_string(a.size()));
    if (type & PANELS && (uintptr_t)a.data() % 64) bad_value(std::string(name) + ": panels must be aligned to 64 bytes");
    return {a.data(), type};
}

template <typename A>
void same_shape(const A& a, const char* name, const std::vector<int64_t>& shape) {
    bool same = a.ndim() == shape.size();
    for (size_t i = 0; same && i < shape.size(); i++) same = (int64_t)a.shape(i) == shape[i];
    if (!same) bad_value(std::string(name) + " must have the shape " + numbers(shape) + ", not " + shape_of(a));
}

// That the first `leading` dimensions of both are the same.
template <typename A, typename C>
void like(const A& a, const char* name, const C& other, const char* other_name, size_t leading) {
    bool same = a.ndim() >= leading && other.ndim() >= leading;
    for (size_t i = 0; same && i < leading; i++) same = a.shape(i) == other.shape(i);
    if (!same)
        bad_value(std::string(name) + " " + shape_of(a) + " and " + other_name + " " + shape_of(other) + " do not fit");
}

// That both have the same shape.
template <typename A, typename C>
void like(const A& a, const char* name, const C& other, const char* other_name) {
    like(a, name, other, other_name, a.ndim() > other.ndim() ? a.ndim() : other.ndim());
}

template <typename A>
void dims(const A& a, const char* name, size_t least, size_t most) {
    if (a.ndim() < least || a.ndim() > most)
        bad_value(std::string(name) + " has the wrong number of dimensions: " + shape_of(a));
}

// The product of the dimensions from `first` to `last` exclusive.
template <typename A>
int64_t product(const A& a, size_t first, size_t last) {
    int64_t out = 1;
    for (size_t i = first; i < last; i++) out *= (int64_t)a.shape(i);
    return out;
}

// ---- the cache ----

// A table of pages (layouts.PageTable): positions, starts, pages.
using TableArrays = std::tuple<In, In, In>;

// The table of `tokens` tokens over a cache of `count` pages of `page` tokens each. With a chunk, pages before that of a
// sequence's first token are not needed, and so not looked at.
inline PageTable checked_table(const TableArrays& arrays, const std::string& op, int64_t tokens, int64_t count,
                               int64_t page, int64_t chunk = 0) {
    const auto& [positions, starts, pages] = arrays;
    std::string name = op + "table.positions";
    PageTable table = {};
    table.positions = checked<const int32_t>(positions, name.c_str());
    same_shape(positions, name.c_str(), {tokens});
    name = op + "table.starts";
    table.starts = checked<const int32_t>(starts, name.c_str());
    dims(starts, name.c_str(), 1, 1);
    table.sequences = (int64_t)starts.shape(0) - 1;
    if (table.sequences < 0 || table.starts[0] != 0 || table.starts[table.sequences] != tokens)
        bad_value(name + " must go from 0 to " + std::to_string(tokens) + ", the number of tokens");
    for (int64_t b = 0; b < table.sequences; b++)
        if (table.starts[b + 1] <= table.starts[b]) bad_value(name + " must ascend: each sequence has a token");
    name = op + "table.pages";
    table.pages = checked<const int32_t>(pages, name.c_str());
    dims(pages, name.c_str(), 2, 2);
    table.width = (int64_t)pages.shape(1);
    same_shape(pages, name.c_str(), {table.sequences, table.width});
    if (page < LEAST_PAGE || page % LEAST_PAGE)
        bad_value(op + "a cache has pages of " + std::to_string(page) + " tokens; they must be a multiple of " +
                  std::to_string(LEAST_PAGE));
    table.page = page;
    for (int64_t b = 0; b < table.sequences; b++) {
        int64_t start = table.starts[b], last = table.starts[b + 1] - 1;
        for (int64_t i = start; i <= last; i++)
            if (table.positions[i] < 0 || table.positions[i] != table.positions[start] + (i - start))
                bad_value(op + "table.positions: " + std::to_string(table.positions[i]) +
                          " is not the position after the one before, or is negative");
        int64_t needed = table.positions[last] / page + 1;
        if (needed > table.width)
            bad_value(name + " has " + std::to_string(table.width) + " pages a sequence, and position " +
                      std::to_string(table.positions[last]) + " needs " + std::to_string(needed));
        for (int64_t i = chunk ? table.positions[start] / chunk * chunk / page : 0; i < needed; i++)
            if (int32_t number = table.pages[b * table.width + i]; number < 0 || number >= count)
                bad_value(name + ": " + std::to_string(number) + " is not in a cache of " + std::to_string(count));
    }
    return table;
}

// A KV cache [pages, page, G, D] of the type `kind`, a WeightType; Q8_0 as bytes, with the blocks of a head in the last
// dimension. `shape` gets its four numbers.
template <typename A>
Weights cache_of(const A& a, int kind, const char* name, std::vector<int64_t>& shape) {
    nb::dlpack::dtype type = a.dtype();
    bool half = type.code == (uint8_t)nb::dlpack::dtype_code::Float && type.bits == 16 && type.lanes == 1;
    bool fits = kind == F32 ? type == nb::dtype<float>() : kind == F16 ? half
              : kind == BF16 ? type == nb::dtype<uint16_t>() : kind == Q8_0 && type == nb::dtype<uint8_t>();
    if (!fits) bad_type(name, "float32, float16, BF16 or Packed Q8_0", type);
    dims(a, name, 4, 4);
    contiguous(a, name);
    shape = {(int64_t)a.shape(0), (int64_t)a.shape(1), (int64_t)a.shape(2), (int64_t)a.shape(3)};
    if (kind == Q8_0) {
        if (shape[3] % 34) bad_value(std::string(name) + " has heads that are not whole blocks of Q8_0");
        shape[3] = shape[3] / 34 * 32;
    }
    return {a.data(), kind};
}
