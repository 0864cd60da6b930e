// lightgcn_propagate on a GPU: what runs before the layers of propagate.cuh, and in their place where there are none.
//
// Device code only.
#pragma once

#include "propagate.cuh"

namespace collm::propagate_cuda {

__device__ __forceinline__ void check_crow(const Layer& a, int64_t row) {
  const int64_t begin = a.crow[row], end = a.crow[row + 1];
  if (begin < 0 || end < begin || end > a.nnz) {
    report(a.bad_crow, begin < 0 ? begin : end, a.nnz);
  } else if (row == 0 && (begin != 0 || a.crow[a.nodes] != a.nnz)) {
    // The two ends that no row sees.
    report(a.bad_crow, begin != 0 ? begin : a.crow[a.nodes], a.nnz);
  }
}

// The first row that starts at or behind the start of a window.
__device__ __forceinline__ int64_t first_row(const Layer& a, int64_t window) {
  int64_t low = 0, high = a.nodes;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (start_of(a, middle, a.crow[middle]) < window * a.schedule.window) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Prepare {
  Layer layer;
  void* table;  // of layer 0; null: none is wanted
  Type table_type;
  int64_t counters;
};

// Everything that the layers of a call share, in one launch: what crow says is checked, windows find their rows,
// counters are cleared, requested rows marked (`requested` is zero on entry), and layer 0 is written.
template <int vec>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const Prepare p) {
  const Layer& a = p.layer;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = begin; i < a.nodes; i += threads) {
    check_crow(a, i);
  }
  for (int64_t i = begin; i <= a.schedule.windows; i += threads) {
    a.first[i] = static_cast<int32_t>(i == a.schedule.windows ? a.nodes : first_row(a, i));
  }
  for (int64_t i = begin; i < p.counters; i += threads) {
    a.arrived[i] = 0;
  }
  for (int64_t i = begin; a.rows != nullptr && i < a.count; i += threads) {
    const int64_t node = a.rows[i * a.rows_stride];
    if (in_range(node, a.nodes, a.bad_row)) {
      a.requested[node] = 1;
    }
  }
  const int64_t runs = a.D / vec, all = p.table == nullptr ? 0 : a.nodes * runs;
  for (int64_t i = begin; i < all; i += threads) {
    // Division of 64 bits costs more than the copy.
    const int64_t node = all <= UINT32_MAX ? static_cast<uint32_t>(i) / static_cast<uint32_t>(runs) : i / runs;
    const int64_t column = (i - node * runs) * vec;
    float values[vec];
    load_x(a.x, node, column, values);
    const float s = a.inv_sqrt_degree[node];
#pragma unroll
    for (int j = 0; j < vec; ++j) {
      values[j] *= s;
    }
    store_as(p.table, node * a.D + column, p.table_type, false, values);
  }
}

// out[p, d] = x[node, d]: the whole result where there are no layers.
__global__ void __launch_bounds__(kThreads) copy_kernel(const Layer a, void* out, Type out_type) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.count * a.D; at += threads) {
    const int64_t position = at / a.D;
    const int64_t node = a.rows == nullptr ? position : a.rows[position * a.rows_stride];
    float value[1] = {0.0f};
    if (in_range(node, a.nodes, a.bad_row)) {
      load_x(a.x, node, at % a.D, value);
    }
    store_as(out, at, out_type, false, value);
  }
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
