// lightgcn_propagate on a GPU: checks, launches, registration; the kernels are in propagate.cuh.
//
// Values that only the device knows (crow, col, rows) are guarded in the kernels and reported through device_error.h,
// so that no call waits. collm_fast::check_device_errors is registered here, for all families.
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

#include <cuda_runtime.h>

#include "../propagate.h"
#include "device_error.h"
#include "propagate.cuh"
#include "propagate_prepare.cuh"

namespace collm {
namespace {

using namespace propagate_cuda;
using torch::stable::new_empty;

constexpr int64_t kMostColumns = int64_t{1} << 29;  // the bytes of a row are counted in 32 bits
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

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Loops in the kernels take what a grid leaves; warps are counted in 32 bits there.
constexpr int64_t kMostBlocks = int64_t{1} << 27;

unsigned grid_of(int64_t blocks, int64_t most = kMostBlocks) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(blocks, most)));
}

struct Device {
  int multiprocessors = 0, cooperative = 0;
  Machine machine{};
};

Device current_device() {
  int index = 0, l2_bytes = 0;
  Device device;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.cooperative, cudaDevAttrCooperativeLaunch, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, index));
  device.machine = {l2_bytes, int64_t{device.multiprocessors} * kBlocks * kWarps};
  return device;
}

// One call: what its layers share, and the memory they work in.
struct Call {
  Device device;
  cudaStream_t stream;
  Layer layer{};
  Type storage;
  int64_t table_bytes;
  Tiling tiling;
  std::array<Tensor, 4> memory;
};

void launch(const Call& call, Program program, const Tiling& tiling) {
  set_table(program.layer, program.storage, tiling);
  with_shape(program.storage, tiling, [&](auto shape) {
    const auto kernel = layers_kernel<decltype(shape)>;
    const int64_t steps = steps_of(program);
    if (steps > 1 && call.device.cooperative != 0 && one_launch(call.table_bytes, call.device.machine)) {
      int resident = 0;
      STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
      const int64_t items = std::max(items_of(program, 0), items_of(program, steps - 1));
      const unsigned grid = grid_of(divided_up(items, kWarps), int64_t{resident} * call.device.multiprocessors);
      program.end = steps;
      void* arguments[] = {&program};
      STD_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, grid, kThreads, arguments, 0, call.stream));
      return;
    }
    for (program.begin = 0; program.begin < steps; ++program.begin) {
      program.end = program.begin + 1;
      const unsigned grid = grid_of(divided_up(items_of(program, program.begin), kWarps));
      kernel<<<grid, kThreads, 0, call.stream>>>(program);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

void launch_copy(const Call& call, const Tensor& out) {
  const unsigned grid = grid_of(divided_up(call.layer.count * call.layer.D, kThreads));
  copy_kernel<<<grid, kThreads, 0, call.stream>>>(call.layer, out.data_ptr(), type_of(out.scalar_type()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// rows: those of the result, null for all.
Call make_call(const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& inv, int64_t num_layers,
               ScalarType storage, const Tensor* rows, double dropout_p, const std::optional<Tensor>& seed) {
  Call call{current_device(), current_stream(x), {}, type_of(storage), 0, {}, {}};
  Layer& layer = call.layer;
  layer.crow = static_cast<const int64_t*>(crow.data_ptr());
  layer.col = static_cast<const int32_t*>(col.data_ptr());
  layer.inv_sqrt_degree = static_cast<const float*>(inv.data_ptr());
  layer.nodes = crow.numel() - 1;
  layer.nnz = col.numel();
  layer.D = x.size(1);
  layer.count = layer.nodes;
  if (rows != nullptr) {
    layer.rows = static_cast<const int64_t*>(rows->data_ptr());
    layer.rows_stride = rows->stride(0);
    layer.count = rows->numel();
  }
  layer.x = {x.data_ptr(), type_of(x.scalar_type()), x.stride(0), x.stride(1), nullptr, false};
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
  return call;
}

// Lays the call over the device, takes its memory, and writes layer 0 into `table` (null: there is none to write).
void prepare(Call& call, const Tensor& like, void* table) {
  Layer& layer = call.layer;
  const int64_t element = size_of(call.storage);
  call.tiling = make_tiling(layer.nodes, layer.D, element, call.device.machine);
  layer.schedule = make_schedule(layer.nodes, layer.nnz, call.tiling.tiles, call.table_bytes, call.device.machine);
  const int64_t counters = counters_of(layer.D, layer.schedule);
  call.memory = {new_empty(like, {layer.schedule.windows + 1}, ScalarType::Int),
                 new_empty(like, {layer.schedule.slots, layer.D}, ScalarType::Float),
                 new_empty(like, {counters}, ScalarType::Int),
                 new_empty(like, {layer.rows == nullptr ? 0 : layer.nodes}, ScalarType::Byte)};
  layer.first = static_cast<int32_t*>(call.memory[0].data_ptr());
  layer.partial = static_cast<float*>(call.memory[1].data_ptr());
  layer.arrived = static_cast<int32_t*>(call.memory[2].data_ptr());
  layer.requested = static_cast<uint8_t*>(call.memory[3].data_ptr());
  if (layer.rows != nullptr && layer.nodes > 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(layer.requested, 0, layer.nodes, call.stream));
  }
  set_table(layer, call.storage, call.tiling);
  const Prepare p{layer, table, call.storage, counters};
  const int64_t runs = table == nullptr ? 0 : layer.nodes * (layer.D / call.tiling.vec);
  const int64_t work = std::max({layer.nodes, layer.schedule.windows + 1, counters, layer.count, runs});
  const unsigned grid = grid_of(divided_up(work, kThreads));
  const auto kernel = call.tiling.vec == 8   ? prepare_kernel<8>
                      : call.tiling.vec == 4 ? prepare_kernel<4>
                                             : prepare_kernel<1>;
  kernel<<<grid, kThreads, 0, call.stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The tables that `layers` layers alternate between. Where it is large enough, the result is one of them: it is not
// written before the last layer, which reads the other. So N D numbers are all the memory that the full form takes.
struct Tables {
  std::array<void*, 2> buffers{};
  std::array<std::optional<Tensor>, 2> memory;
};

Tables make_tables(const Call& call, const Tensor& out, int64_t layers) {
  const ScalarType storage = call.storage == Type::float32    ? ScalarType::Float
                             : call.storage == Type::bfloat16 ? ScalarType::BFloat16
                                                              : ScalarType::Half;
  Tables tables;
  for (int64_t i = 0; i < std::min<int64_t>(layers, 2); ++i) {
    const int64_t parity = (layers - 1 - i) % 2;
    if (i == 1 && out.numel() * size_of(type_of(out.scalar_type())) >= call.table_bytes) {
      tables.buffers[parity] = out.data_ptr();
    } else {
      tables.memory[parity] = new_empty(out, {call.layer.nodes, call.layer.D}, storage);
      tables.buffers[parity] = tables.memory[parity]->data_ptr();
    }
  }
  return tables;
}

Tensor propagate(const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& inv, int64_t num_layers,
                 std::optional<ScalarType> storage_dtype, std::optional<Tensor> rows, double dropout_p,
                 std::optional<Tensor> seed) {
  COLLM_CHECK(x.dim() == 2, kOp, "x of shape [N, D], got ", shape(x));
  const int64_t nodes = x.size(0), D = x.size(1);
  check_graph(kOp, x, crow, col, inv, nodes);
  check_options(kOp, "x", x, num_layers, storage_dtype, rows, dropout_p, seed, false);
  COLLM_CHECK(!rows || rows->numel() <= INT32_MAX, kOp, "fewer than 2^31 rows, got ", rows->numel());
  COLLM_CHECK(D <= kMostColumns, kOp, "at most 2^29 columns, got ", D);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty(x, {rows ? rows->numel() : nodes, D});
  if (out.numel() == 0) {
    return out;
  }
  Call call = make_call(x, crow, col, inv, num_layers, storage_dtype.value_or(ScalarType::Float),
                        rows ? &*rows : nullptr, dropout_p, seed);
  if (num_layers == 0) {
    launch_copy(call, out);
    return out;
  }
  call.table_bytes = nodes * D * size_of(call.storage);
  const Tables tables = make_tables(call, out, num_layers);
  prepare(call, x, tables.buffers[0]);
  launch(call,
         {call.layer, tables.buffers[0], tables.buffers[1], out.data_ptr(), call.storage, type_of(out.scalar_type()),
          true, num_layers, 0, 0},
         call.tiling);
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
  COLLM_CHECK(D <= kMostColumns, kBackward, "at most 2^29 columns, got ", D);
  raise_device_errors();
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor out = new_empty(grad, {nodes, D});
  if (nodes == 0 || D == 0) {
    return out;
  }
  Call call =
      make_call(grad, crow, col, inv, num_layers, storage_dtype.value_or(ScalarType::Float), nullptr, dropout_p, seed);
  const Tensor sums = new_empty(grad, {count, D}, ScalarType::Float);
  const Tensor scaled = new_empty(grad, {count, D}, ScalarType::Float);
  const Tensor slot = new_empty(grad, {nodes}, ScalarType::Int);
  int32_t* slot_data = static_cast<int32_t*>(slot.data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(slot_data, 0xFF, sizeof(int32_t) * nodes, call.stream));
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
                                call.layer.inv_sqrt_degree,
                                static_cast<float*>(sums.data_ptr()),
                                static_cast<float*>(scaled.data_ptr()),
                                slot_data,
                                call.layer.bad_row};
    sparse_gradient_kernel<<<grid_of(divided_up(count, kWarps), INT32_MAX), kThreads, 0, call.stream>>>(sparse);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  call.layer.x = {sums.data_ptr(), Type::float32, D, 1, slot_data, false};
  if (num_layers == 0) {
    launch_copy(call, out);
    return out;
  }
  call.table_bytes = nodes * D * size_of(call.storage);
  const Type out_type = type_of(out.scalar_type());
  const Tables tables = make_tables(call, out, num_layers - 1);
  prepare(call, grad, nullptr);
  // The first layer runs over the edges of the gradient's rows alone.
  const bool one = num_layers == 1;
  Program first{call.layer,
                scaled.data_ptr(),
                nullptr,
                one ? out.data_ptr() : tables.buffers[0],
                Type::float32,
                one ? out_type : call.storage,
                one,
                1,
                0,
                0};
  first.layer.slot = slot_data;
  launch(call, first, make_tiling(count, D, 4, call.device.machine));
  if (!one) {
    launch(call,
           {call.layer, tables.buffers[0], tables.buffers[1], out.data_ptr(), call.storage, out_type, true,
            num_layers - 1, 0, 0},
           call.tiling);
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
