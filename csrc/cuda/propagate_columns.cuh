// Columns of a row as lanes hold them, and how they are loaded and stored: the ground of propagate.cuh.
//
// Device code only. Nothing here knows of graphs or layers.
#pragma once

#include <cstring>
#include <type_traits>

#include "propagate_plan.h"
#include "types.cuh"

namespace collm::propagate_cuda {

// Loads a lane keeps in flight; the compiler for sm_80 spills with 8. On an H100 24 warps of 8 have 96 KB in flight a
// multiprocessor, of which HBM needs about 20 KB and the L2 30: short rows and the steps between rows leave enough.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kInFlight = 4;
#else
constexpr int kInFlight = 8;
#endif

enum class Type : int { float32, bfloat16, float16 };

// x at any strides or, with slot, the summed rows of a sparse gradient: float [*, D], zero wherever slot is -1.
struct Source {
  const void* data;
  Type type;
  int64_t row_stride, column_stride;
  const int32_t* slot;
  bool vectors;  // vec neighbouring columns may be loaded in words of 16 bytes (8 where they are fewer)
};

// --- columns ----------------------------------------------------------------------------------------------------
// A lane holds vecs runs of vec neighbouring columns; `lanes` of them make a row, so a warp takes 32 / lanes edges.
template <typename S, int vec, int lanes>
struct Shape {
  using Element = S;
  using Word = std::conditional_t<vec == 1, S, uint4>;
  static constexpr int kVec = vec, kLanes = lanes, kEdges = 32 / lanes;
  static constexpr int kVecs = vec == 1 ? kScalarColumns : 1;
  static constexpr int kColumns = vec * lanes * kVecs;
  static constexpr int kLoads = kInFlight / kVecs > 2 ? kInFlight / kVecs : 2;  // edges of a lane
  static_assert(vec == 1 || sizeof(S) * vec == 16);
};

template <class F>
struct Lane {
  int column[F::kVecs];
  bool active[F::kVecs];  // whether the column exists
};

template <class F>
using Sums = float[F::kVecs][F::kVec];

template <class F>
__device__ __forceinline__ Lane<F> lane_of(int64_t D, int tile, int lane) {
  Lane<F> l;
#pragma unroll
  for (int v = 0; v < F::kVecs; ++v) {
    l.column[v] = tile * F::kColumns + (v * F::kLanes + lane % F::kLanes) * F::kVec;
    l.active[v] = l.column[v] < D;
  }
  return l;
}

// x and the result pass once: they must not push the table out of the cache.
template <typename T, int vec>
__device__ __forceinline__ void load_run(const void* data, int64_t at, float (&out)[vec]) {
  using Word = std::conditional_t<sizeof(T) * vec == 8, uint2, uint4>;
  constexpr int kPart = vec == 1 ? 1 : static_cast<int>(sizeof(Word) / sizeof(T));
  const T* from = static_cast<const T*>(data) + at;
#pragma unroll
  for (int part = 0; part < vec; part += kPart) {
    T values[kPart];
    if constexpr (vec == 1) {
      values[0] = *from;
    } else {
      const Word word = __ldcs(reinterpret_cast<const Word*>(from + part));
      memcpy(values, &word, sizeof(Word));
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      out[part + i] = widen(values[i]);
    }
  }
}

template <typename T, int vec>
__device__ __forceinline__ void store_run(void* data, int64_t at, bool is_result, const float (&values)[vec]) {
  using Word = std::conditional_t<sizeof(T) * vec == 8, uint2, uint4>;
  constexpr int kPart = vec == 1 ? 1 : static_cast<int>(sizeof(Word) / sizeof(T));
  T* to = static_cast<T*>(data) + at;
#pragma unroll
  for (int part = 0; part < vec; part += kPart) {
    T narrowed[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      narrowed[i] = narrow<T>(values[part + i]);
    }
    if constexpr (vec == 1) {
      *to = narrowed[0];
    } else {
      Word word;
      memcpy(&word, narrowed, sizeof(Word));
      if (is_result) {
        __stcs(reinterpret_cast<Word*>(to + part), word);
      } else {
        *reinterpret_cast<Word*>(to + part) = word;
      }
    }
  }
}

__device__ __forceinline__ float load_as(const void* data, int64_t at, Type type) {
  switch (type) {
    case Type::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(data)[at]);
    case Type::float16:
      return widen(static_cast<const __half*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// vec columns of x from `column` on, all of which exist.
template <int vec>
__device__ __forceinline__ void load_x(const Source& x, int64_t node, int64_t column, float (&out)[vec]) {
  const int64_t row = x.slot == nullptr ? node : x.slot[node];
  const int64_t at = row * x.row_stride + column * x.column_stride;
  if (row < 0) {
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      out[i] = 0.0f;
    }
  } else if (vec == 1 || !x.vectors) {
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      out[i] = load_as(x.data, at + i * x.column_stride, x.type);
    }
  } else if (x.type == Type::float32) {
    load_run<float>(x.data, at, out);
  } else if (x.type == Type::bfloat16) {
    load_run<__nv_bfloat16>(x.data, at, out);
  } else {
    load_run<__half>(x.data, at, out);
  }
}

template <int vec>
__device__ __forceinline__ void store_as(void* data, int64_t at, Type type, bool is_result,
                                         const float (&values)[vec]) {
  switch (type) {
    case Type::bfloat16:
      return store_run<__nv_bfloat16>(data, at, is_result, values);
    case Type::float16:
      return store_run<__half>(data, at, is_result, values);
    default:
      return store_run<float>(data, at, is_result, values);
  }
}

template <class F>
__device__ __forceinline__ void clear(Sums<F>& sum) {
#pragma unroll
  for (int v = 0; v < F::kVecs; ++v) {
#pragma unroll
    for (int i = 0; i < F::kVec; ++i) {
      sum[v][i] = 0.0f;
    }
  }
}

}  // namespace collm::propagate_cuda
