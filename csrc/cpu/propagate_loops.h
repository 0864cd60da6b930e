// The inner loops of propagate_kernel.h, compiled for every instruction set, and the choice among them.
//
// Internal to each file that includes it, like everything the loops are made of.
#pragma once

#include <algorithm>
#include <array>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../philox.h"
#include "isa.h"
#include "propagate_layer.h"

namespace collm {
namespace {

using namespace propagation;

namespace baseline {
#define COLLM_LANE_BYTES 16
#include "propagate_kernel.h"
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
#include "propagate_kernel.h"
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
#include "propagate_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename S, typename A>
Kernel<S, A> kernel() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    return avx512::kernel<S, A>();
  }
  if (isa() == Isa::avx2) {
    return avx2::kernel<S, A>();
  }
#endif
  return baseline::kernel<S, A>();
}

// out[p] = a(node) x[node] for each position: what has no edges to sum.
template <typename S, typename A>
void scale_rows(const int64_t* rows, int64_t count, const LayerCall<A>& call) {
  constexpr int64_t kBlock = 512;
  static constexpr std::array<int64_t, kBlock> kNoEdges{};
  parallel_for(0, count, kBlock, [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> buffer(new A[call.D]);
    for (; first < last; first += kBlock) {
      kernel<S, A>().rows(call,
                          {nullptr, kNoEdges.data(), kNoEdges.data(), 0, rows, first, std::min(kBlock, last - first)},
                          buffer.get());
    }
  });
}

}  // namespace
}  // namespace collm
