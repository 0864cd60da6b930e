// Runs the kernels of csrc/cuda/propagate.cuh in the order in which propagate.cu launches them; test_propagate.py
// gives the inputs and compares the result with the reference.
#include "emulator.h"

#include "cuda/propagate.cuh"

#include "philox.h"

using namespace collm;
using namespace collm::propagate_cuda;
using emulator::integer;

namespace {

using Bytes = std::vector<unsigned char>;

size_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

unsigned blocks(int64_t work, int64_t per_block) { return static_cast<unsigned>((work + per_block - 1) / per_block); }

void launch_layer(const Layer& layer, Type table) {
  emulator::launch(blocks(layer.count, kWarps), kThreads, [&] {
    switch (table) {
      case Type::bfloat16:
        return layer_kernel<__nv_bfloat16>(layer);
      case Type::float16:
        return layer_kernel<__half>(layer);
      default:
        return layer_kernel<float>(layer);
    }
  });
}

void launch_scale(const Layer& layer) {
  emulator::launch(blocks(layer.count * layer.D, kThreads), kThreads, [&] { scale_kernel(layer); });
}

// The layers of `first` .. K; table is the one of layer first - 1.
void run_layers(Layer layer, int64_t first, int64_t K, Bytes table, Type storage, const std::vector<int64_t>* rows,
                Bytes& out, Type out_type) {
  Bytes spare = emulator::poisoned<unsigned char>(table.size());
  for (int64_t k = first; k <= K; ++k) {
    layer.is_result = k == K;
    layer.table = table.data();
    layer.out = layer.is_result ? out.data() : spare.data();
    layer.out_type = layer.is_result ? out_type : storage;
    if (layer.is_result && rows != nullptr) {
      layer.rows = rows->data();
      layer.rows_stride = 1;
      layer.count = static_cast<int64_t>(rows->size());
    }
    launch_layer(layer, storage);
    std::swap(table, spare);
  }
}

}  // namespace

int main() {
  const int64_t K = integer("num_layers"), D = integer("D"), count = integer("count");
  const bool backward = integer("backward") != 0, has_rows = integer("has_rows") != 0;
  const Type type = static_cast<Type>(integer("type")), storage = static_cast<Type>(integer("storage"));
  emulator::order = static_cast<int>(integer("order"));
  const auto crow = emulator::read<int64_t>("crow");
  const auto col = emulator::read<int32_t>("col");
  const auto inv = emulator::read<float>("inv_sqrt_degree");
  const auto rows = emulator::read<int64_t>("rows");
  const auto sorted = emulator::read<int64_t>("sorted"), order = emulator::read<int64_t>("sort_order");
  const auto seed = emulator::read<int64_t>("seed");
  const auto x = emulator::read<unsigned char>("x");
  std::vector<ErrorRecord> errors(3, ErrorRecord{0, 0, 0});

  Layer layer{};
  layer.crow = crow.data();
  layer.col = col.data();
  layer.inv_sqrt_degree = inv.data();
  layer.nodes = static_cast<int64_t>(inv.size());
  layer.nnz = static_cast<int64_t>(col.size());
  layer.D = D;
  layer.count = layer.nodes;
  layer.mean = static_cast<float>(1.0 / (static_cast<double>(K) + 1.0));
  layer.keep = 1.0f;
  if (!seed.empty()) {
    const double p = emulator::number("dropout_p");
    layer.seed = seed.data();
    layer.threshold = edge_threshold(p);
    layer.keep = static_cast<float>(1.0 / (1.0 - p));
  }
  layer.bad_row = &errors[0];
  layer.bad_crow = &errors[1];
  layer.bad_col = &errors[2];

  const int64_t out_rows = backward || !has_rows ? layer.nodes : count;
  Bytes out = emulator::poisoned<unsigned char>(out_rows * D * size_of(type));
  Bytes table = emulator::poisoned<unsigned char>(layer.nodes * D * size_of(storage));
  if (!backward) {
    layer.x = {x.data(), type, integer("row_stride"), integer("column_stride"), nullptr};
    if (K == 0) {
      layer.out = out.data();
      layer.out_type = type;
      layer.is_result = true;
      layer.rows = has_rows ? rows.data() : nullptr;
      layer.rows_stride = 1;
      layer.count = out_rows;
      launch_scale(layer);
    } else {
      layer.out = table.data();
      layer.out_type = storage;
      launch_scale(layer);
      run_layers(layer, 1, K, table, storage, has_rows ? &rows : nullptr, out, type);
    }
  } else {
    auto sums = emulator::poisoned<float>(count * D), scaled = emulator::poisoned<float>(count * D);
    auto slot = emulator::poisoned<int32_t>(layer.nodes);
    const SparseGradient sparse{x.data(),
                                type,
                                integer("row_stride"),
                                integer("column_stride"),
                                sorted.data(),
                                order.data(),
                                count,
                                layer.nodes,
                                D,
                                inv.data(),
                                sums.data(),
                                scaled.data(),
                                slot.data(),
                                &errors[0]};
    emulator::launch(blocks(count, kWarps), kThreads, [&] { sparse_gradient_kernel(sparse); });
    layer.x = {sums.data(), Type::float32, D, 1, slot.data()};
    layer.is_result = K <= 1;
    layer.out = K <= 1 ? out.data() : table.data();
    layer.out_type = K <= 1 ? type : storage;
    if (K == 0) {
      launch_scale(layer);
    } else {
      layer.table = scaled.data();
      layer.slot = slot.data();
      launch_layer(layer, Type::float32);
      layer.slot = nullptr;
      if (K > 1) {
        run_layers(layer, 2, K, table, storage, nullptr, out, type);
      }
    }
  }
  emulator::write("out", out);
  emulator::write("errors", errors);
}
