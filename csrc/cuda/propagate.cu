// lightgcn_propagate on a GPU: checks, launches, registration; the kernels are in propagate.cuh.
//
// Values that only the device knows (crow, col, rows) are guarded in the kernels and reported through device_error.h,
// so that no call waits. collm_fast::check_device_errors is registered here, for all families.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <utility>

#include <cuda_runtime.h>

#include "../propagate.h"
#include "device_error.h"
#include "propagate.cuh"

namespace collm {
namespace {

using namespace propagate_cuda;
using torch::stable::new_empty;

constexpr const char* kOp = "lightgcn_propagate";
constexpr const char* kBackward = "lightgcn_propagate_backward";

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Type type_of(ScalarType type) {
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
}

unsigned blocks(int64_t work, int64_t per_block) {
  const int64_t count = (work + per_block - 1) / per_block;
  COLLM_CHECK(count <= INT32_MAX, kOp, "at most 2^31 - 1 blocks of work, got ", count);
  return static_cast<unsigned>(count);
}

void launch_layer(const Layer& layer, Type table, cudaStream_t stream) {
  const unsigned grid = blocks(layer.count, kWarps);
  switch (table) {
    case Type::bfloat16:
      layer_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(layer);
      break;
    case Type::float16:
      layer_kernel<__half><<<grid, kThreads, 0, stream>>>(layer);
      break;
    default:
      layer_kernel<float><<<grid, kThreads, 0, stream>>>(layer);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_scale(const Layer& layer, cudaStream_t stream) {
  scale_kernel<<<blocks(layer.count * layer.D, kThreads), kThreads, 0, stream>>>(layer);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// What every layer of a call shares.
Layer common(const Tensor& crow, const Tensor& col, const Tensor& inv, int64_t D, int64_t num_layers, double dropout_p,
             const std::optional<Tensor>& seed) {
  Layer layer{};
  layer.crow = static_cast<const int64_t*>(crow.data_ptr());
  layer.col = static_cast<const int32_t*>(col.data_ptr());
  layer.inv_sqrt_degree = static_cast<const float*>(inv.data_ptr());
  layer.nodes = crow.numel() - 1;
  layer.nnz = col.numel();
  layer.D = D;
  layer.count = layer.nodes;
  layer.mean = static_cast<float>(1.0 / (static_cast<double>(num_layers) + 1.0));
  layer.keep = 1.0f;
  if (dropout_p > 0.0) {
    layer.seed = static_cast<const int64_t*>(seed->data_ptr());
    layer.threshold = edge_threshold(dropout_p);
    layer.keep = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  layer.bad_row = error_record("lightgcn_propagate: expected rows in [0, ");
  layer.bad_crow = error_record("lightgcn_propagate: expected crow to rise from 0 to nnz (");
  layer.bad_col = error_record("lightgcn_propagate: expected col in [0, ");
  return layer;
}

// Layers first .. K, from the table of layer first - 1 to the result.
void run_layers(Layer layer, int64_t first, int64_t K, Tensor table, const std::optional<Tensor>& rows,
                const Tensor& out, cudaStream_t stream) {
  const Type storage = type_of(table.scalar_type());
  Tensor spare = first < K ? new_empty(table, table.sizes()) : table;
  for (int64_t k = first; k < K; ++k) {
    layer.table = table.data_ptr();
    layer.out = spare.data_ptr();
    layer.out_type = storage;
    launch_layer(layer, storage, stream);
    std::swap(table, spare);
  }
  layer.table = table.data_ptr();
  layer.out = out.data_ptr();
  layer.out_type = type_of(out.scalar_type());
  layer.is_result = true;
  if (rows) {
    layer.rows = static_cast<const int64_t*>(rows->data_ptr());
    layer.rows_stride = rows->stride(0);
    layer.count = rows->numel();
  }
  launch_layer(layer, storage, stream);
}

Tensor propagate(const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& inv, int64_t num_layers,
                 std::optional<ScalarType> storage_dtype, std::optional<Tensor> rows, double dropout_p,
                 std::optional<Tensor> seed) {
  COLLM_CHECK(x.dim() == 2, kOp, "x of shape [N, D], got ", shape(x));
  const int64_t nodes = x.size(0), D = x.size(1);
  check_graph(kOp, x, crow, col, inv, nodes);
  check_options(kOp, "x", x, num_layers, storage_dtype, rows, dropout_p, seed, false);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t count = rows ? rows->numel() : nodes;
  Tensor out = new_empty(x, {count, D});
  if (count == 0 || D == 0) {
    return out;
  }
  const cudaStream_t stream = current_stream(x);
  Layer layer = common(crow, col, inv, D, num_layers, dropout_p, seed);
  layer.x = {x.data_ptr(), type_of(x.scalar_type()), x.stride(0), x.stride(1), nullptr};
  if (num_layers == 0) {
    layer.out = out.data_ptr();
    layer.out_type = type_of(out.scalar_type());
    layer.is_result = true;
    if (rows) {
      layer.rows = static_cast<const int64_t*>(rows->data_ptr());
      layer.rows_stride = rows->stride(0);
      layer.count = count;
    }
    launch_scale(layer, stream);
    return out;
  }
  if (nodes == 0) {
    // There are rows to fill and no node they could name: the last layer alone reports the first of them.
    run_layers(layer, 1, 1, new_empty(x, {0, D}, ScalarType::Float), rows, out, stream);
    return out;
  }
  Tensor table = new_empty(x, {nodes, D}, storage_dtype.value_or(ScalarType::Float));
  layer.out = table.data_ptr();
  layer.out_type = type_of(table.scalar_type());
  launch_scale(layer, stream);
  run_layers(layer, 1, num_layers, table, rows, out, stream);
  return out;
}

// The rows ascending and where each was; stable, so that repeated rows always sum in the order of their places.
std::pair<Tensor, Tensor> sort_rows(const Tensor& rows) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor propagate_backward(const Tensor& grad, const Tensor& crow, const Tensor& col, const Tensor& inv,
                          int64_t num_layers, std::optional<ScalarType> storage_dtype, const Tensor& rows,
                          double dropout_p, std::optional<Tensor> seed) {
  COLLM_CHECK(grad.dim() == 2, kBackward, "grad of shape [B, D], got ", shape(grad));
  COLLM_CHECK(crow.dim() == 1 && crow.numel() >= 1, kBackward, "crow of shape [N + 1], got ", shape(crow));
  const int64_t nodes = crow.numel() - 1, D = grad.size(1), count = grad.size(0);
  check_graph(kBackward, grad, crow, col, inv, nodes);
  check_options(kBackward, "grad", grad, num_layers, storage_dtype, rows, dropout_p, seed, false);
  COLLM_CHECK(rows.numel() == count, kBackward, "rows of shape [", count, "], got ", shape(rows));
  COLLM_CHECK(count <= INT32_MAX, kBackward, "fewer than 2^31 rows, got ", count);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor out = new_empty(grad, {nodes, D});
  if (nodes == 0 || D == 0) {
    return out;
  }
  const cudaStream_t stream = current_stream(grad);
  Layer layer = common(crow, col, inv, D, num_layers, dropout_p, seed);
  const Tensor sums = new_empty(grad, {count, D}, ScalarType::Float);
  const Tensor scaled = new_empty(grad, {count, D}, ScalarType::Float);
  const Tensor slot = new_empty(grad, {nodes}, ScalarType::Int);
  int32_t* slot_data = static_cast<int32_t*>(slot.data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(slot_data, 0xFF, sizeof(int32_t) * nodes, stream));
  if (count > 0) {
    const auto [sorted, order] = sort_rows(rows);
    const SparseGradient sparse{grad.data_ptr(),
                                type_of(grad.scalar_type()),
                                grad.stride(0),
                                grad.stride(1),
                                static_cast<const int64_t*>(sorted.data_ptr()),
                                static_cast<const int64_t*>(order.data_ptr()),
                                count,
                                nodes,
                                D,
                                layer.inv_sqrt_degree,
                                static_cast<float*>(sums.data_ptr()),
                                static_cast<float*>(scaled.data_ptr()),
                                slot_data,
                                layer.bad_row};
    sparse_gradient_kernel<<<blocks(count, kWarps), kThreads, 0, stream>>>(sparse);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  layer.x = {sums.data_ptr(), Type::float32, D, 1, slot_data};
  layer.is_result = num_layers <= 1;
  Tensor table = num_layers <= 1 ? out : new_empty(grad, {nodes, D}, storage_dtype.value_or(ScalarType::Float));
  layer.out = table.data_ptr();
  layer.out_type = type_of(table.scalar_type());
  if (num_layers == 0) {
    launch_scale(layer, stream);
    return out;
  }
  // The first layer runs over the edges of the gradient's rows alone.
  layer.table = scaled.data_ptr();
  layer.slot = slot_data;
  launch_layer(layer, Type::float32, stream);
  layer.slot = nullptr;
  if (num_layers > 1) {
    run_layers(layer, 2, num_layers, table, std::nullopt, out, stream);
  }
  return out;
}

void check_device_errors(bool synchronize) { raise_device_errors(synchronize); }

}  // namespace
}  // namespace collm

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CUDA, m) {
  m.impl("lightgcn_propagate", TORCH_BOX(&collm::propagate));
  m.impl("lightgcn_propagate_backward", TORCH_BOX(&collm::propagate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CompositeExplicitAutograd, m) {
  m.impl("check_device_errors", TORCH_BOX(&collm::check_device_errors));
}
