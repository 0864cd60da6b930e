// What the CPU and the CUDA host of the inject family share: argument checks, and the strides of a tensor of rows.
//
// The kernels stand in cpu/inject.cpp and cuda/inject.cuh. Python's twin of the checks is collm_fast/ops/inject.py;
// both say the same sentences in the same order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace collm::inject {

// Row i of a tensor [..., H] begins at base + (i / split) * outer + i % split * inner elements, and its columns are
// `column` elements apart: two leading dimensions after merging, so that a transposed batch needs no copy.
struct Strides {
  int64_t split, outer, inner, column;
};

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_device(const char* op, const char* what, const Tensor& tensor, const char* first,
                         const Tensor& other) {
  COLLM_CHECK(tensor.device() == other.device(), op, what, " on ", first, "'s device ", device_of(other), ", got ",
              device_of(tensor));
}

inline bool is_index(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

inline bool leading_shape_matches(const Tensor& grad, const Tensor& index) {
  if (grad.dim() != index.dim() + 1) {
    return false;
  }
  for (int64_t d = 0; d < index.dim(); ++d) {
    if (grad.size(d) != index.size(d)) {
      return false;
    }
  }
  return true;
}

inline void check_embed_inject(const Tensor& token_ids, const Tensor& table, const Tensor& rows,
                               const Tensor& row_index) {
  constexpr const char* op = "embed_inject";
  COLLM_CHECK(token_ids.scalar_type() == ScalarType::Long, op, "token_ids of dtype int64, got ", dtype(token_ids));
  COLLM_CHECK(row_index.scalar_type() == ScalarType::Int, op, "row_index of dtype int32, got ", dtype(row_index));
  COLLM_CHECK(token_ids.sizes().equals(row_index.sizes()), op, "row_index of token_ids' shape ", shape(token_ids),
              ", got ", shape(row_index));
  COLLM_CHECK(table.dim() == 2, op, "table of shape [V, H], got ", shape(table));
  COLLM_CHECK(rows.dim() == 2, op, "rows of shape [S, H], got ", shape(rows));
  COLLM_CHECK(rows.size(1) == table.size(1), op, "rows of the table's ", table.size(1), " columns, got ", rows.size(1));
  COLLM_CHECK(is_float(table.scalar_type()), op, "table of dtype float32, bfloat16, float16 or float64, got ",
              dtype(table));
  COLLM_CHECK(rows.scalar_type() == table.scalar_type(), op, "rows of the table's dtype ", dtype(table), ", got ",
              dtype(rows));
  check_device(op, "token_ids", token_ids, "table", table);
  check_device(op, "rows", rows, "table", table);
  check_device(op, "row_index", row_index, "table", table);
}

inline void check_gather_rows(const Tensor& table, const Tensor& index) {
  constexpr const char* op = "gather_rows";
  COLLM_CHECK(is_index(index.scalar_type()), op, "index of dtype int32 or int64, got ", dtype(index));
  COLLM_CHECK(table.dim() == 2, op, "table of shape [V, H], got ", shape(table));
  COLLM_CHECK(is_float(table.scalar_type()), op, "table of dtype float32, bfloat16, float16 or float64, got ",
              dtype(table));
  check_device(op, "index", index, "table", table);
}

inline void check_scatter_rows(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  constexpr const char* op = "scatter_rows";
  COLLM_CHECK(is_index(index.scalar_type()), op, "index of dtype int32 or int64, got ", dtype(index));
  COLLM_CHECK(leading_shape_matches(grad, index), op, "grad of index's shape ", shape(index),
              " and one more dimension, got ", shape(grad));
  COLLM_CHECK(is_float(grad.scalar_type()), op, "grad of dtype float32, bfloat16, float16 or float64, got ",
              dtype(grad));
  COLLM_CHECK(num_rows >= 0 && num_rows <= INT32_MAX, op, "num_rows in [0, 2^31), got ", num_rows);
  check_device(op, "index", index, "grad", grad);
}

inline Tensor packed(const Tensor& tensor) {
  // Asked first: a call through the dispatcher costs as much as a small kernel.
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself and its strides; a contiguous copy of it only where its leading dimensions do not merge into two.
inline std::pair<Tensor, Strides> strided_rows(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> merged;  // (size, stride), outermost first
  const int64_t last = tensor.dim() - 1;
  for (int64_t d = 0; d < last; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) {
      continue;
    }
    if (!merged.empty() && merged.back().second == size * stride) {
      merged.back() = {merged.back().first * size, stride};
    } else {
      merged.emplace_back(size, stride);
    }
  }
  if (merged.size() > 2) {
    const Tensor copy = torch::stable::contiguous(tensor);
    return {copy, {1, copy.size(last), 0, 1}};
  }
  while (merged.size() < 2) {
    merged.emplace_back(1, 0);
  }
  return {tensor, {merged[1].first, merged[0].second, merged[1].second, tensor.stride(last)}};
}

// The output's shape: that of the index, and one row for each place.
inline std::vector<int64_t> shape_of_rows(const Tensor& index, int64_t columns) {
  std::vector<int64_t> sizes(index.sizes().begin(), index.sizes().end());
  sizes.push_back(columns);
  return sizes;
}

}  // namespace collm::inject
