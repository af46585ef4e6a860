// The module's packed matrices: their types, regrouping into panels, and the encoders.
//
// What it is not: a format. Blocks are ggml's, panels are kernels.h's; here arrays are checked and memory is made.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <new>
#include <tuple>
#include <vector>

#include "binding.h"
#include "checks.h"
#include "kernels.h"
#include "memory.h"
#include "tables.h"
#include "unlocked.h"

namespace {

nb::dict packed_types() {
    nb::dict out;
    for (int type = BF16 + 1; type < WEIGHT_TYPES; type++) out[TYPE_NAMES[type]] = type;
    return out;
}

using Panelled = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Panelled regroup(const In& packed, int type, int64_t rows, int64_t columns) {
    if (type <= BF16 || type & PANELS) bad_value("regroup: no such type");
    Weights w = matrix(packed, type, rows, columns, "regroup: weight");
    size_t bytes = (size_t)packed_bytes(type | PANELS, rows, columns, "regroup: weight");
    void* data = panel_memory(bytes);
    nb::capsule owner(data, free_panel_memory);
    if (bytes) {
        Unlocked unlocked((int64_t)bytes);
        Regrouping matrix = {w, rows, columns, data, 0};
        puna_active->regroup(&matrix, 1, false);
    }
    return {data, {bytes}, owner};
}

// Matrices of one mapped file, whose pages are given back as they are read, into one piece of memory, so that small
// matrices lie in huge pages too. One call for all of them, for another thread may hold the interpreter's lock for long
// (a tokenizer being built), and each call would wait for it.
std::vector<Panelled> regroup_mapped(const std::vector<std::tuple<In, int, int64_t, int64_t>>& matrices) {
    std::vector<Regrouping> wanted;
    std::vector<size_t> begins = {0}, sizes;
    for (const auto& [array, type, rows, columns] : matrices) {
        if (type <= BF16 || type & PANELS) bad_value("regroup_mapped: no such type");
        Weights packed = matrix(array, type, rows, columns, "regroup_mapped: weight");
        sizes.push_back((size_t)packed_bytes(type | PANELS, rows, columns, "regroup_mapped: weight"));
        size_t end;
        if (__builtin_add_overflow(begins.back(), (sizes.back() + 63) / 64 * 64, &end)) throw std::bad_alloc();
        wanted.push_back({packed, rows, columns, nullptr, 0});
        begins.push_back(end);
    }
    char* data = (char*)panel_memory(begins.back());
    nb::capsule owner(data, free_panel_memory);
    for (size_t i = 0; i < wanted.size(); i++) wanted[i].panels = data + begins[i];
    {
        Unlocked unlocked((int64_t)begins.back());
        puna_active->regroup(wanted.data(), (int)wanted.size(), true);
    }
    std::vector<Panelled> out;
    for (size_t i = 0; i < sizes.size(); i++) out.push_back({data + begins[i], {sizes[i]}, owner});
    return out;
}

// Whether every scale fits float16; the numbers are finite.
bool encode(int kind, const In& values, const Out& out) {
    const float* x = checked<const float>(values, "encode: values");
    if (!(out.dtype() == nb::dtype<uint8_t>())) bad_type("encode: out", "uint8", out.dtype());
    contiguous(out, "encode: out");
    if (kind < Q4_0 || kind > Q6_K) bad_value("encode: no type " + std::to_string(kind));
    int64_t numbers = BLOCKS[kind].numbers, blocks = values.size() / numbers;
    if (blocks * numbers != (int64_t)values.size() || blocks * BLOCKS[kind].bytes != (int64_t)out.size())
        bad_value("encode: values " + shape_of(values) + " and out " + shape_of(out) + " do not fit");
    if (blocks == 0) return true;
    Unlocked unlocked(values.size() * PER_NUMBER * 16);
    return puna_active->encode(kind, x, blocks, (uint8_t*)out.data());
}

}  // namespace

void puna_bind_packing(nb::module_& m) {
    using nb::arg;
    m.def("packed_types", packed_types);
    m.attr("PANELS") = (int)PANELS;
    m.def("regroup", regroup, arg().noconvert(), arg(), arg(), arg());
    m.def("regroup_mapped", regroup_mapped);
    m.def("encode", encode, arg(), arg().noconvert(), arg().noconvert());
}
