// What inject_kernel.h works on, its loops compiled for every instruction set, and the choice among them.
//
// Internal to inject.cpp, which includes it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../inject.h"
#include "isa.h"

namespace collm::inject {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// scatter_rows sums the places of a row in runs of this many, and then the runs; the GPU's kernels do the same. So the
// error of a hub's sum grows with the number of runs.
constexpr int64_t kRun = 64;

// A tensor of rows that is read.
struct Source {
  const char* base;
  Strides strides;

  const char* row(int64_t i, int64_t element) const {
    // Asked first: a division costs as much as a short row.
    if (strides.split == 1) {
      return base + i * strides.outer * element;
    }
    return base + (i / strides.split * strides.outer + i % strides.split * strides.inner) * element;
  }
};

// The places of output row s are places[begin[s]] .. places[begin[s + 1] - 1], in order.
template <typename S>
struct Sums {
  const int64_t *begin, *places;
  Source grad;
  S* out;
  int64_t columns;
};

struct Loops {
  bool (*inside32)(const int32_t* index, int64_t count, int64_t low, int64_t high);
  bool (*inside64)(const int64_t* index, int64_t count, int64_t low, int64_t high);
  bool (*tokens_inside)(const int64_t* ids, const int32_t* row_index, int64_t count, int64_t vocabulary);
  void (*copy_rows)(const char* const* from, char* out, int64_t count, int64_t bytes, bool stream);
  void (*sum_float)(const Sums<float>& sums, int64_t first, int64_t last);
  void (*sum_double)(const Sums<double>& sums, int64_t first, int64_t last);
  void (*sum_half)(const Sums<Half>& sums, int64_t first, int64_t last);
  void (*sum_bfloat16)(const Sums<BFloat16>& sums, int64_t first, int64_t last);
};

#define COLLM_LOOPS "inject_kernel.h"
#include "each_isa.h"

const Loops& loops() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    return avx512::loops();
  }
  if (isa() == Isa::avx2) {
    return avx2::loops();
  }
#endif
  return baseline::loops();
}

}  // namespace
}  // namespace collm::inject
