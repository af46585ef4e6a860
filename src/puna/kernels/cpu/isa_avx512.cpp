// AVX-512 F, BW, VL and DQ, 16 lanes (Skylake-X, Ice Lake).
#define WIDTH 16
#define TABLE kernels_avx512
#include "isa.inl"
