// All ops of one instruction set: included once by each isa_*.cpp, which defines WIDTH and TABLE. Everything lies in a
// namespace without a name; the table is the only thing the linker sees.
#include "kernels.h"

#if defined(__x86_64__) && WIDTH > 4
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {
#include "vec.inl"
#include "tile.inl"

#include "panels.inl"
#include "packed.inl"

#include "argmax.inl"
#include "kv.inl"
#include "attention.inl"
#include "embedding.inl"
#include "encode.inl"
#include "linear.inl"
#include "probe.inl"
#include "rms_norm.inl"
#include "rope.inl"
#include "swiglu.inl"
#include "top_k.inl"

#include "shortlist.inl"  // which stands on top_k.inl
}  // namespace

const Kernels TABLE = {embedding, rms_norm, linear, regroup, rope, write_kv, attention,
                       swiglu,    argmax,   top_k,  shortlist, above,  allowed, encode, probe};
