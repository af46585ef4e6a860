// NEON, the baseline of 64-bit Arm: 4 lanes, 32 registers.
#define WIDTH 4
#define TABLE kernels_neon
#include "isa.inl"
