// lightgcn_propagate on a GPU: the kernels. Device code only, no torch header; propagate.cu checks and launches, and
// tests/cuda_on_cpu/propagate_main.cpp runs the same kernels on the host.
//
// As on the CPU, h_k = x + S A S h_{k-1} needs no buffer for the layer mean: a layer gathers rows of g = S h, writes
// the next g, and the last one writes the result. Nothing is atomic: each sum has one order, so bits repeat.
#pragma once

#include "../philox.h"
#include "device_error.cuh"
#include "types.cuh"

namespace collm::propagate_cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPerLane = 4;           // columns a lane sums at a time
constexpr int kTile = 32 * kPerLane;  // columns a warp sums at a time
constexpr int64_t kHubEdges = 512;    // above this the whole block sums one row
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

enum class Type : int { float32, bfloat16, float16 };

// x at any strides or, with slot, the summed rows of a sparse gradient: float [*, D], zero wherever slot is -1.
struct Source {
  const void* data;
  Type type;
  int64_t row_stride, column_stride;
  const int32_t* slot;
};

struct Layer {
  const int64_t* crow;
  const int32_t* col;
  const float* inv_sqrt_degree;
  int64_t nodes, nnz, D;
  const int64_t* rows;  // position -> node at this stride; null: position = node
  int64_t rows_stride, count;
  const void* table;    // g of the layer before, in S
  const int32_t* slot;  // if given, the table has rows of these slots only: the first layer of a sparse backward
  Source x;
  void* out;
  Type out_type;
  bool is_result;
  float mean;           // 1 / (K + 1)
  float keep;           // 1 / (1 - p): the factor of an edge that dropout kept
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  ErrorRecord *bad_row, *bad_crow, *bad_col;
};

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

__device__ __forceinline__ void store_as(void* data, int64_t at, Type type, float value) {
  switch (type) {
    case Type::bfloat16:
      static_cast<__nv_bfloat16*>(data)[at] = narrow<__nv_bfloat16>(value);
      return;
    case Type::float16:
      static_cast<__half*>(data)[at] = narrow<__half>(value);
      return;
    default:
      static_cast<float*>(data)[at] = value;
  }
}

__device__ __forceinline__ float load_x(const Source& x, int64_t node, int64_t column, int64_t D) {
  if (x.slot != nullptr) {
    const int32_t slot = x.slot[node];
    return slot < 0 ? 0.0f : static_cast<const float*>(x.data)[slot * D + column];
  }
  return load_as(x.data, node * x.row_stride + column * x.column_stride, x.type);
}

struct Row {
  int64_t node, begin, end;
};

// The row of a position; node is -1 past the end and where `rows` names no node, which is reported.
__device__ __forceinline__ Row find_row(const Layer& a, int64_t position) {
  if (position >= a.count) {
    return {-1, 0, 0};
  }
  const int64_t node = a.rows == nullptr ? position : a.rows[position * a.rows_stride];
  if (!in_range(node, a.nodes, a.bad_row)) {
    return {-1, 0, 0};
  }
  const int64_t begin = a.crow[node], end = a.crow[node + 1];
  if (begin < 0 || end < begin || end > a.nnz) {
    report(a.bad_crow, begin < 0 ? begin : end, a.nnz);
    return {node, 0, 0};
  }
  // The two ends that no row sees, by the first row alone.
  if (position == 0 && (a.crow[0] != 0 || a.crow[a.nodes] != a.nnz)) {
    report(a.bad_crow, a.crow[0] != 0 ? a.crow[0] : a.crow[a.nodes], a.nnz);
  }
  return {node, begin, end};
}

// What lane's edge adds: a row of the table, or -1 where it is dropped, has no row, or names no node.
__device__ __forceinline__ int32_t table_row(const Layer& a, int64_t node, int64_t edge, uint64_t seed) {
  const int32_t c = a.col[edge];
  if (!in_range(c, a.nodes, a.bad_col)) {
    return -1;
  }
  if (a.seed != nullptr) {
    const uint32_t from = static_cast<uint32_t>(node), to = static_cast<uint32_t>(c);
    if (!edge_keep(seed, from < to ? from : to, from < to ? to : from, a.threshold)) {
      return -1;
    }
  }
  return a.slot == nullptr ? c : a.slot[c];
}

// One warp: sum[j] = the sum of column tile + lane + 32 j over the edges [begin, end), in their order.
template <typename S>
__device__ __forceinline__ void sum_edges(const Layer& a, int64_t node, int64_t begin, int64_t end, int64_t tile,
                                          int lane, float (&sum)[kPerLane]) {
  const S* table = static_cast<const S*>(a.table) + tile;
  const int64_t width = a.D - tile;
  const uint64_t seed = a.seed == nullptr ? 0 : static_cast<uint64_t>(*a.seed);
  for (int j = 0; j < kPerLane; ++j) {
    sum[j] = 0.0f;
  }
  for (int64_t first = begin; first < end; first += 32) {
    const int32_t mine = first + lane < end ? table_row(a, node, first + lane, seed) : -1;
    unsigned left = __ballot_sync(kAllLanes, mine >= 0);
    while (left != 0) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const S* row = table + static_cast<int64_t>(__shfl_sync(kAllLanes, mine, source)) * a.D;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        sum[j] += lane + 32 * j < width ? widen(row[lane + 32 * j]) : 0.0f;
      }
    }
  }
}

__device__ __forceinline__ void store_tile(const Layer& a, int64_t position, int64_t node, int64_t tile, int lane,
                                           const float (&sum)[kPerLane]) {
  const float s = node < 0 ? 0.0f : a.inv_sqrt_degree[node];
  const float scale = a.is_result ? a.mean : s;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int64_t column = tile + lane + 32 * j;
    if (column < a.D) {
      const float x = node < 0 ? 0.0f : load_x(a.x, node, column, a.D);
      store_as(a.out, position * a.D + column, a.out_type, scale * x + scale * s * a.keep * sum[j]);
    }
  }
}

// One warp per row: degrees are skewed, a thread per row would wait for the popular items. A row of more than
// kHubEdges edges is left to the whole block: eight runs of its edges, whose sums are added in order. Four blocks a
// multiprocessor: asked for more, the compiler for sm_80 spills.
template <typename S>
__global__ void __launch_bounds__(kThreads, 4) layer_kernel(const Layer a) {
  __shared__ float partial[kWarps][kTile];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kWarps;
  const Row own = find_row(a, base + warp);
  float sum[kPerLane];
  if (base + warp < a.count && own.end - own.begin <= kHubEdges) {
    for (int64_t tile = 0; tile < a.D; tile += kTile) {
      sum_edges<S>(a, own.node, own.begin, own.end, tile, lane, sum);
      store_tile(a, base + warp, own.node, tile, lane, sum);
    }
  }
  for (int w = 0; w < kWarps; ++w) {
    const Row hub = find_row(a, base + w);
    const int64_t edges = hub.end - hub.begin;
    if (edges <= kHubEdges) {
      continue;
    }
    const int64_t run = (edges + kWarps - 1) / kWarps;
    const int64_t begin = hub.begin + warp * run;
    const int64_t end = begin + run < hub.end ? begin + run : hub.end;
    for (int64_t tile = 0; tile < a.D; tile += kTile) {
      sum_edges<S>(a, hub.node, begin, end, tile, lane, sum);
      for (int j = 0; j < kPerLane; ++j) {
        partial[warp][lane + 32 * j] = sum[j];
      }
      __syncthreads();
      if (warp == 0) {
        for (int j = 0; j < kPerLane; ++j) {
          for (int other = 1; other < kWarps; ++other) {
            sum[j] += partial[other][lane + 32 * j];
          }
        }
        store_tile(a, base + w, hub.node, tile, lane, sum);
      }
      __syncthreads();
    }
  }
}

// out[p, d] = x[node, d], times S unless it is the result: layer 0, and the whole result where there are no layers.
__global__ void __launch_bounds__(kThreads) scale_kernel(const Layer a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.count * a.D) {
    return;
  }
  const int64_t position = at / a.D, column = at % a.D;
  const int64_t node = a.rows == nullptr ? position : a.rows[position * a.rows_stride];
  float value = 0.0f;
  if (in_range(node, a.nodes, a.bad_row)) {
    value = load_x(a.x, node, column, a.D) * (a.is_result ? 1.0f : a.inv_sqrt_degree[node]);
  }
  store_as(a.out, at, a.out_type, value);
}

// The gradient of the rows form, summed for each distinct node in the order of its places.
struct SparseGradient {
  const void* grad;
  Type type;
  int64_t row_stride, column_stride;
  const int64_t* sorted;  // [B], the rows ascending
  const int64_t* order;   // [B], where each was
  int64_t count, nodes, D;
  const float* inv_sqrt_degree;
  float* sums;    // [B, D], filled at the first place of each node
  float* scaled;  // the same times the node's S: the table of layer 0
  int32_t* slot;  // [N], -1 on entry
  ErrorRecord* bad_row;
};

// One warp per place; it works where the place is the first of its node.
__global__ void __launch_bounds__(kThreads) sparse_gradient_kernel(const SparseGradient a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (p >= a.count) {
    return;
  }
  const int64_t node = a.sorted[p];
  if (!in_range(node, a.nodes, a.bad_row) || (p > 0 && a.sorted[p - 1] == node)) {
    return;
  }
  for (int64_t column = lane; column < a.D; column += 32) {
    float sum = 0.0f;
    for (int64_t q = p; q < a.count && a.sorted[q] == node; ++q) {
      sum += load_as(a.grad, a.order[q] * a.row_stride + column * a.column_stride, a.type);
    }
    a.sums[p * a.D + column] = sum;
    a.scaled[p * a.D + column] = sum * a.inv_sqrt_degree[node];
  }
  if (lane == 0) {
    a.slot[node] = static_cast<int32_t>(p);
  }
}

}  // namespace collm::propagate_cuda
