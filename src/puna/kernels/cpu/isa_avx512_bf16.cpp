// AVX-512 as in isa_avx512.cpp, with the dot products of bytes (VNNI) and of bfloat16 (Cooper Lake, Sapphire
// Rapids, Zen 4).
#define WIDTH 16
#define TABLE kernels_avx512_bf16
#define BF16_DOT 1
#include "isa.inl"
