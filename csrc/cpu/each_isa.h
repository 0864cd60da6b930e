// Compiles the file that COLLM_LOOPS names once for each instruction set that isa() chooses among: into the namespaces
// baseline, avx2 and avx512, with COLLM_LANE_BYTES the width of a vector there. No include guard: a file may ask for
// several, each inside a namespace of its own.
//
//     #define COLLM_LOOPS "decoder_kernel.h"
//     #include "each_isa.h"
namespace baseline {
#define COLLM_LANE_BYTES 16
#include COLLM_LOOPS
#undef COLLM_LANE_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define COLLM_LANE_BYTES 32
#include COLLM_LOOPS
#undef COLLM_LANE_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace avx512 {
#define COLLM_LANE_BYTES 64
#include COLLM_LOOPS
#undef COLLM_LANE_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#undef COLLM_LOOPS
