// What the files of the Python module puna.kernels._cpu share: the table that serves calls, and what each adds.
#pragma once

#include <nanobind/nanobind.h>

#include "kernels.h"

// The table of the chosen instruction set (module.cpp).
extern const Kernels* puna_active;

void puna_bind_packing(nanobind::module_& m);  // packing.cpp
void puna_bind_decoder(nanobind::module_& m);  // decoder.cpp
