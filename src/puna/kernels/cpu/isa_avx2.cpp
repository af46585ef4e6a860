// AVX2 with FMA and F16C, 8 lanes.
#define WIDTH 8
#define TABLE kernels_avx2
#include "isa.inl"
