// Baseline of the architecture, 4 lanes: SSE2 on x86-64.
#define WIDTH 4
#define TABLE kernels_scalar
#include "isa.inl"
