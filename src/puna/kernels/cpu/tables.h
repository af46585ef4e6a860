// What the Python module and the tests' driver need to know of the kernels: which instruction sets this build has and
// this machine runs, and the types of weights by name.
#pragma once

#include <vector>

#include "kernels.h"

// By WeightType; I8 has no name of ggml's.
constexpr const char* TYPE_NAMES[WEIGHT_TYPES] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0",   "Q5_1",   "Q8_0",
                                                  "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "I8"};

struct Table {
    const char* name;        // what --kernels calls it; of several with one name, the first that can run is taken
    const Kernels* kernels;
    bool runs;               // on this machine
    const char* reason;
};

// What puna_invariant says from now on; false at first.
void puna_set_invariant(bool invariant);

// All of this build, fastest first. The last one runs everywhere.
std::vector<Table> puna_tables();
