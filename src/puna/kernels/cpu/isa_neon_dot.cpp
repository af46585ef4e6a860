// NEON with the dot product of bytes (Armv8.2: Cortex-A76 and later, Neoverse, Apple silicon).
#define WIDTH 4
#define TABLE kernels_neon_dot
#include "isa.inl"
