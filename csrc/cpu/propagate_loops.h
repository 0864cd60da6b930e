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

#define COLLM_LOOPS "propagate_kernel.h"
#include "each_isa.h"

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
