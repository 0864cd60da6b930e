// embed_inject, gather_rows and scatter_rows on a GPU: checks, launches, registration; the kernels are in inject.cuh.
//
// Argument checks are in ../inject.h. Indices are guarded in the kernels and reported through device_error.h, so that
// no call waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include "../inject.h"
#include "device_error.h"
#include "inject.cuh"

namespace collm::inject {
namespace {

using namespace inject_cuda;

// Above this many comparisons sorting the index is cheaper than letting every row look at all of it.
constexpr int64_t kMostScanned = int64_t{1} << 24;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

dim3 grid_of(const char* op, int64_t x, int64_t y) {
  COLLM_CHECK(x <= INT32_MAX, op, "at most 2^31 - 1 blocks of rows, got ", x);
  COLLM_CHECK(y <= 65535, op, "at most 65535 blocks of columns, got ", y);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Everything whose common divisor limits the unit of a copy, as one number: only its low bits matter.
int64_t pieces(const Tensor& table) {
  const int64_t element = static_cast<int64_t>(table.element_size());
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.const_data_ptr())) | table.stride(0) * element |
         table.size(1) * element;
}

Table table_of(const Tensor& table, int64_t unit) {
  const int64_t element = static_cast<int64_t>(table.element_size());
  const int64_t step = table.stride(1) == 1 ? unit : table.stride(1) * element;
  return {static_cast<const char*>(table.const_data_ptr()), table.stride(0) * element, step, table.size(0)};
}

// Calls body with a value of the type that has `bytes` bytes.
template <typename Body>
void with_unit(int64_t bytes, const Body& body) {
  switch (bytes) {
    case 16:
      return body(Bytes16{});
    case 8:
      return body(uint64_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint16_t{});
  }
}

template <typename Body>
void with_index(ScalarType type, const Body& body) {
  type == ScalarType::Int ? body(int32_t{}) : body(int64_t{});
}

template <typename Body>
void with_value(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

Tensor embed_inject(const Tensor& token_ids, const Tensor& table, const Tensor& rows, const Tensor& row_index) {
  constexpr const char* op = "embed_inject";
  check_embed_inject(token_ids, table, rows, row_index);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const int64_t element = static_cast<int64_t>(table.element_size()), columns = table.size(1);
  const bool units_fit = table.stride(1) == 1 && rows.stride(1) == 1;
  const int64_t unit = units_fit ? unit_bytes(pieces(table) | (rows.size(0) > 0 ? pieces(rows) : 0)) : element;
  const int64_t places = token_ids.numel(), units = columns * element / unit;
  const dim3 grid = grid_of(op, divided_up(places, kCopyWarps), divided_up(units, kUnits * kWarp));
  Tensor out = torch::stable::new_empty(table, shape_of_rows(token_ids, columns));
  if (places == 0 || columns == 0) {
    return out;
  }
  const Tensor ids = packed(token_ids), index = packed(row_index);
  Copy copy{};
  copy.token_ids = ids.const_data_ptr<int64_t>();
  copy.row_index = index.const_data_ptr<int32_t>();
  copy.table = table_of(table, unit);
  copy.rows = table_of(rows, unit);
  copy.out = static_cast<char*>(out.mutable_data_ptr());
  copy.places = places;
  copy.units = units;
  copy.bad_token = error_record("embed_inject: expected token_ids in [0, ");
  copy.bad_row = error_record("embed_inject: expected row_index in [-1, ");
  const cudaStream_t stream = current_stream(table);
  with_unit(unit, [&](auto u) { embed_inject_kernel<decltype(u)><<<grid, kCopyThreads, 0, stream>>>(copy); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor gather_rows(const Tensor& table, const Tensor& index) {
  constexpr const char* op = "gather_rows";
  check_gather_rows(table, index);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const int64_t element = static_cast<int64_t>(table.element_size()), columns = table.size(1);
  const int64_t unit = table.stride(1) == 1 ? unit_bytes(pieces(table)) : element;
  const int64_t places = index.numel(), units = columns * element / unit;
  const dim3 grid = grid_of(op, divided_up(places, kCopyWarps), divided_up(units, kUnits * kWarp));
  Tensor out = torch::stable::new_empty(table, shape_of_rows(index, columns));
  if (places == 0 || columns == 0) {
    return out;
  }
  const Tensor dense = packed(index);
  Copy copy{};
  copy.index = dense.const_data_ptr();
  copy.table = table_of(table, unit);
  copy.out = static_cast<char*>(out.mutable_data_ptr());
  copy.places = places;
  copy.units = units;
  copy.bad_row = error_record("gather_rows: expected index in [-1, ");
  const cudaStream_t stream = current_stream(table);
  with_index(index.scalar_type(), [&](auto i) {
    with_unit(unit,
              [&](auto u) { gather_rows_kernel<decltype(u), decltype(i)><<<grid, kCopyThreads, 0, stream>>>(copy); });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// torch's stable sort: (values, places).
std::pair<Tensor, Tensor> sorted(const Tensor& index) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(index), from(std::optional<bool>(true)), from(static_cast<int64_t>(0)),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

bool allows_vectors(const Tensor& grad, const Strides& strides, int64_t columns) {
  const int64_t element = static_cast<int64_t>(grad.element_size());
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad.const_data_ptr())) |
                      strides.outer * element | strides.inner * element | columns * element;
  return strides.column == 1 && all % 16 == 0;
}

Tensor scatter_rows(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  constexpr const char* op = "scatter_rows";
  check_scatter_rows(grad, index, num_rows);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t places = index.numel(), columns = grad.size(grad.dim() - 1);
  const int64_t columns_of_block = kSumThreads * (16 / static_cast<int64_t>(grad.element_size()));
  const dim3 grid = grid_of(op, std::max<int64_t>(1, num_rows), divided_up(columns, columns_of_block));
  const auto [readable, strides] = strided_rows(grad);
  Tensor out = torch::stable::new_empty(grad, std::vector<int64_t>{num_rows, columns});
  if (columns == 0 || (num_rows == 0 && places == 0)) {
    return out;
  }
  Tensor flat = torch::stable::reshape(index, std::vector<int64_t>{places});
  flat = packed(flat);
  const bool scan = num_rows == 0 || places <= kMostScanned / num_rows;
  std::optional<Tensor> order;
  if (!scan) {
    std::tie(flat, order) = sorted(flat);
  }
  Sum sum{};
  sum.grad = readable.const_data_ptr();
  sum.split = strides.split;
  sum.outer = strides.outer;
  sum.inner = strides.inner;
  sum.column = strides.column;
  sum.index = flat.const_data_ptr();
  sum.order = order ? order->const_data_ptr<int64_t>() : nullptr;
  sum.places = places;
  sum.num_rows = num_rows;
  sum.columns = columns;
  sum.vector = allows_vectors(readable, strides, columns);
  sum.out = out.mutable_data_ptr();
  sum.bad = error_record("scatter_rows: expected index in [-1, ");
  const cudaStream_t stream = current_stream(grad);
  with_value(grad.scalar_type(), [&](auto v) {
    with_index(index.scalar_type(), [&](auto i) {
      if (scan) {
        scatter_scan_kernel<decltype(v), decltype(i)><<<grid, kSumThreads, 0, stream>>>(sum);
      } else {
        scatter_sorted_kernel<decltype(v), decltype(i)><<<grid, kSumThreads, 0, stream>>>(sum);
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace collm::inject

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CUDA, m) {
  m.impl("embed_inject", TORCH_BOX(&collm::inject::embed_inject));
  m.impl("gather_rows", TORCH_BOX(&collm::inject::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&collm::inject::scatter_rows));
}
