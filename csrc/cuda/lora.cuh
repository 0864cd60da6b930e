// Device code of lora_linear and lora_linear_group: kernels that serve forward and backward, and x as well as the
// gradient.
//
//   project  s[m][j]    = scale * sum_c keep(m, c) v[m][c] factor[j][c]       s = dropout(x) A^T, and ds = dy B
//   expand   out[m][c]  = bias[c] + keep(m, c) sum_j s[m][j] factor[j][c]     y before x W^T, and dx before dy W
//   expand_group          the sum of that over several projections, each with its own mask            dx of a group
//   outer    part[p][j][c] = sum over the rows m of part p of s[m][j] keep(m, c) v[m][c]                 dA and dB
//   reduce   out[j][c]  = scale * sum_p part[p][j][c], in the order of p
//
// The mask is drawn in the pass that reads or writes the element; no float atomics, so every sum has a fixed order.
// No torch header: tests/cuda_on_cpu runs this file on the host. Checks, launches and the GEMM are in lora.cu.
#pragma once

#include <cstdint>

#include "philox.h"
#include "types.cuh"

namespace collm::lora {

// One Philox counter holds the mask of 8 columns, so a thread owns 8.
constexpr int kColumns = 8;
constexpr int kThreads = 128;
constexpr int kRankTile = 8;
constexpr int kProjectRows = 4;  // a warp's: 4 rows x 8 ranks = one sum for each of its lanes
constexpr int kExpandRows = 8;
constexpr int kGroupRows = 4;   // of expand_group, which holds two sums for each element
constexpr int kOuterRows = 32;  // staged in shared memory at a time
constexpr int kMaxRankPadded = 256;

struct Mask {
  const int64_t* seed;  // on the device, so that a captured graph sees each step's seed; null: nothing is dropped
  uint32_t stream, threshold;
};

// One projection: its factor [r][C], and s [M][r], which project writes and expand reads.
template <typename F>
struct Side {
  const F* factor;
  int64_t factor_j, factor_c;
  float* s;
  int r;
  Mask mask;
};

constexpr int kMaxProjections = 4;  // of one launch
template <typename F>
struct Sides {
  Side<F> side[kMaxProjections];
  int count;
};

struct alignas(16) Chunk16 {
  uint4 bits;
};

__device__ __forceinline__ bool is_aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Eight columns of a row, zero past its end; 16-byte loads where the address allows them.
template <typename T>
__device__ __forceinline__ void load8(const T* row, int64_t c, int64_t C, float (&v)[kColumns]) {
  if (c + kColumns <= C && is_aligned16(row + c)) {
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int part = 0; part < kColumns / kPer; ++part) {
      union {
        Chunk16 chunk;
        T value[kPer];
      } u;
      u.chunk = *reinterpret_cast<const Chunk16*>(row + c + part * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        v[part * kPer + i] = widen(u.value[i]);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    v[i] = c + i < C ? widen(row[c + i]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store8(T* row, int64_t c, int64_t C, const float (&v)[kColumns]) {
  if (c + kColumns <= C && is_aligned16(row + c)) {
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int part = 0; part < kColumns / kPer; ++part) {
      union {
        Chunk16 chunk;
        T value[kPer];
      } u;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        u.value[i] = narrow<T>(v[part * kPer + i]);
      }
      *reinterpret_cast<Chunk16*>(row + c + part * kPer) = u.chunk;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (c + i < C) {
      row[c + i] = narrow<T>(v[i]);
    }
  }
}

template <bool kDrop>
__device__ __forceinline__ void drop8(const Mask& mask, uint64_t seed, int64_t m, int64_t c, float (&v)[kColumns]) {
  if constexpr (kDrop) {
    const uint32_t keep =
        dropout_keep8(seed, static_cast<uint64_t>(m), static_cast<uint32_t>(c / kColumns), mask.stream, mask.threshold);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      v[i] = (keep >> i) & 1u ? v[i] : 0.0f;
    }
  }
}

// A warp takes kProjectRows rows and a tile of kRankTile ranks of one projection; its lanes stride over the columns,
// then add up by shuffles. `abreast` (1, 2 or 4) warps of a block take tiles of the same rows, so that what the first
// reads of v the others find in the first-level cache: memory is read once for all projections. Grid: x = ceil(M / rows
// of a block), y = ceil(tiles of all projections / abreast).
template <typename T, typename F, bool kDrop>
__global__ void __launch_bounds__(kThreads) project(const T* __restrict__ v, int64_t v_stride, int64_t M, int64_t C,
                                                    const __grid_constant__ Sides<F> sides, int abreast, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t m0 = (static_cast<int64_t>(blockIdx.x) * (kThreads / 32 / abreast) + warp / abreast) * kProjectRows;
  int tile = static_cast<int>(blockIdx.y) * abreast + warp % abreast, n = 0;
  for (; n < sides.count && tile * kRankTile >= sides.side[n].r; ++n) {
    tile -= (sides.side[n].r + kRankTile - 1) / kRankTile;
  }
  if (n == sides.count) {
    return;  // a whole warp
  }
  const F* factor = sides.side[n].factor;
  const int64_t factor_j = sides.side[n].factor_j, factor_c = sides.side[n].factor_c;
  const int r = sides.side[n].r, j0 = tile * kRankTile;
  const Mask mask = sides.side[n].mask;
  const uint64_t seed = kDrop ? static_cast<uint64_t>(*mask.seed) : 0;
  float sum[kProjectRows][kRankTile] = {};
  for (int64_t c = lane * kColumns; c < C; c += 32 * kColumns) {
    float row[kProjectRows][kColumns];
#pragma unroll
    for (int i = 0; i < kProjectRows; ++i) {
      if (m0 + i < M) {
        load8(v + (m0 + i) * v_stride, c, C, row[i]);
        drop8<kDrop>(mask, seed, m0 + i, c, row[i]);
      } else {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          row[i][k] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRankTile; ++j) {
      if (j0 + j < r) {
        const F* f = factor + (j0 + j) * factor_j;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const float value = c + k < C ? widen(f[(c + k) * factor_c]) : 0.0f;
#pragma unroll
          for (int i = 0; i < kProjectRows; ++i) {
            sum[i][j] += row[i][k] * value;
          }
        }
      }
    }
  }
  // 32 sums over 32 lanes in 31 shuffles: each step hands half of a lane's sums to its partner, lane l ends with sum l.
  float all[kProjectRows * kRankTile];
#pragma unroll
  for (int e = 0; e < kProjectRows * kRankTile; ++e) {
    all[e] = sum[e / kRankTile][e % kRankTile];
  }
  static_assert(kProjectRows * kRankTile == 32);
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int half = 16 >> step;
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      if (e < half) {
        const float given = upper ? all[e] : all[e + half], kept = upper ? all[e + half] : all[e];
        all[e] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, half);
      }
    }
  }
  const int64_t m = m0 + lane / kRankTile;
  const int j = j0 + lane % kRankTile;
  if (m < M && j < r) {
    sides.side[n].s[m * r + j] = scale * all[0];
  }
}

// sum[i][k] += sum_j tile[i][j] factor[j][c + k], tile [kRows][r] in shared memory.
template <int kRows, typename F>
__device__ __forceinline__ void add_low_rank(const float* tile, int r, const F* factor, int64_t factor_j,
                                             int64_t factor_c, int64_t c, int64_t C, float (&sum)[kRows][kColumns]) {
  for (int j = 0; j < r; ++j) {
    float f[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      f[k] = c + k < C ? widen(factor[j * factor_j + (c + k) * factor_c]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float coefficient = tile[i * r + j];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        sum[i][k] += coefficient * f[k];
      }
    }
  }
}

// A thread takes 8 columns of kExpandRows rows. Grid: x = ceil(M / kExpandRows), y = ceil(C / (8 kThreads)).
template <typename T, typename F, bool kDrop>
__global__ void __launch_bounds__(kThreads)
    expand(const float* __restrict__ s, int64_t M, int r, const F* __restrict__ factor, int64_t factor_j,
           int64_t factor_c, int64_t C, float scale, const T* __restrict__ bias, Mask mask, T* __restrict__ out) {
  __shared__ float tile[kExpandRows * kMaxRankPadded];
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kExpandRows;
  for (int e = static_cast<int>(threadIdx.x); e < kExpandRows * r; e += kThreads) {
    tile[e] = m0 + e / r < M ? scale * s[m0 * r + e] : 0.0f;
  }
  __syncthreads();
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kColumns;
  if (c >= C) {
    return;
  }
  float sum[kExpandRows][kColumns] = {};
  add_low_rank(tile, r, factor, factor_j, factor_c, c, C, sum);
  const uint64_t seed = kDrop ? static_cast<uint64_t>(*mask.seed) : 0;
  float base[kColumns] = {};
  if (bias != nullptr) {
    load8(bias, c, C, base);
  }
#pragma unroll
  for (int i = 0; i < kExpandRows; ++i) {
    if (m0 + i < M) {
      drop8<kDrop>(mask, seed, m0 + i, c, sum[i]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        sum[i][k] += base[k];
      }
      store8(out + (m0 + i) * C, c, C, sum[i]);
    }
  }
}

// out = the sum over the projections of what expand gives, or that much more, with neither scale nor bias. A thread
// takes 8 columns of kGroupRows rows. Grid: x = ceil(M / kGroupRows), y = ceil(C / (8 kThreads)).
template <typename T, typename F, bool kDrop>
__global__ void __launch_bounds__(kThreads)
    expand_group(const __grid_constant__ Sides<F> sides, int64_t M, int64_t C, bool add, T* __restrict__ out) {
  __shared__ float tile[kGroupRows * kMaxRankPadded];
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kGroupRows;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kColumns;
  float total[kGroupRows][kColumns] = {};
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    if (add && c < C && m0 + i < M) {
      load8(out + (m0 + i) * C, c, C, total[i]);
    }
  }
  for (int n = 0; n < sides.count; ++n) {
    const Side<F>& side = sides.side[n];
    const int r = side.r;
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < kGroupRows * r; e += kThreads) {
      tile[e] = m0 + e / r < M ? side.s[m0 * r + e] : 0.0f;
    }
    __syncthreads();
    if (c < C) {
      const uint64_t seed = kDrop ? static_cast<uint64_t>(*side.mask.seed) : 0;
      float sum[kGroupRows][kColumns] = {};
      add_low_rank(tile, r, side.factor, side.factor_j, side.factor_c, c, C, sum);
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) {
        drop8<kDrop>(side.mask, seed, m0 + i, c, sum[i]);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          total[i][k] += sum[i][k];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    if (c < C && m0 + i < M) {
      store8(out + (m0 + i) * C, c, C, total[i]);
    }
  }
}

// A thread takes 8 columns and 8 ranks, and walks down the rows of its part.
// Grid: x = ceil(C / (8 kThreads)), y = parts, z = ceil(r / kRankTile).
template <typename T, bool kDrop>
__global__ void __launch_bounds__(kThreads)
    outer(const T* __restrict__ v, int64_t v_stride, int64_t M, int64_t C, const float* __restrict__ s, int r,
          int64_t rows_per_part, Mask mask, float* __restrict__ partial) {
  __shared__ float tile[kOuterRows * kRankTile];
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kColumns;
  const int j0 = static_cast<int>(blockIdx.z) * kRankTile;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_per_part;
  const int64_t end = begin + rows_per_part < M ? begin + rows_per_part : M;
  const uint64_t seed = kDrop ? static_cast<uint64_t>(*mask.seed) : 0;
  float sum[kRankTile][kColumns] = {};
  for (int64_t m0 = begin; m0 < end; m0 += kOuterRows) {
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < kOuterRows * kRankTile; e += kThreads) {
      const int64_t m = m0 + e / kRankTile;
      const int j = j0 + e % kRankTile;
      tile[e] = m < end && j < r ? s[m * r + j] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; c < C && i < kOuterRows && m0 + i < end; ++i) {
      float row[kColumns];
      load8(v + (m0 + i) * v_stride, c, C, row);
      drop8<kDrop>(mask, seed, m0 + i, c, row);
#pragma unroll
      for (int j = 0; j < kRankTile; ++j) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          sum[j][k] += tile[i * kRankTile + j] * row[k];
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRankTile; ++j) {
    if (c < C && j0 + j < r) {
      store8(partial + (static_cast<int64_t>(blockIdx.y) * r + j0 + j) * C, c, C, sum[j]);
    }
  }
}

// Grid: x = ceil(r C / kThreads).
template <typename F>
__global__ void __launch_bounds__(kThreads) reduce(const float* __restrict__ partial, int parts, int r, int64_t C,
                                                   float scale, int64_t out_j, int64_t out_c, F* __restrict__ out) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= r * C) {
    return;
  }
  float sum = 0.0f;
  for (int p = 0; p < parts; ++p) {
    sum += partial[p * (r * C) + e];
  }
  out[(e / C) * out_j + (e % C) * out_c] = narrow<F>(scale * sum);
}

}  // namespace collm::lora
