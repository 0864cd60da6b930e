// Runs the kernels of csrc/cuda/propagate.cuh in the order in which propagate.cu launches them; test_propagate.py
// gives the inputs and compares the result with the reference.
#include "emulator.h"

#include "cuda/propagate.cuh"
#include "cuda/propagate_prepare.cuh"

using namespace collm;
using namespace collm::propagate_cuda;
using emulator::integer;

namespace {

using Bytes = std::vector<unsigned char>;

unsigned blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(std::max<int64_t>(1, (work + per_block - 1) / per_block));
}

// The size of the GPU that is laid out for, and whether layers share one cooperative launch.
struct Settings {
  Machine machine;
  bool together;
  unsigned grid;  // at most
};

void launch(const Settings& settings, Program program, const Tiling& tiling) {
  set_table(program.layer, program.storage, tiling);
  with_shape(program.storage, tiling, [&](auto shape) {
    using F = decltype(shape);
    const int64_t steps = steps_of(program);
    if (settings.together && steps > 1) {
      program.end = steps;
      emulator::launch_cooperative(settings.grid, kThreads, [&] { layers_kernel<F>(program); });
      return;
    }
    for (program.begin = 0; program.begin < steps; ++program.begin) {
      program.end = program.begin + 1;
      const unsigned grid = std::min(settings.grid, blocks(items_of(program, program.begin), kWarps));
      emulator::launch(grid, kThreads, [&] { layers_kernel<F>(program); });
    }
  });
}

void launch_prepare(const Prepare& p, const Tiling& tiling) {
  const int64_t work = std::max({p.layer.nodes, p.layer.schedule.windows + 1, p.counters, p.layer.count});
  emulator::launch(blocks(work, kThreads), kThreads, [&] {
    return tiling.vec == 8 ? prepare_kernel<8>(p) : tiling.vec == 4 ? prepare_kernel<4>(p) : prepare_kernel<1>(p);
  });
}

void launch_copy(const Layer& layer, Bytes& out, Type type) {
  emulator::launch(blocks(layer.count * layer.D, kThreads), kThreads, [&] { copy_kernel(layer, out.data(), type); });
}

// As make_tables in propagate.cu: the result is one of the tables where it is large enough.
struct Tables {
  void* buffers[2]{};
  Bytes memory[2];
};

Tables make_tables(int64_t table_bytes, Bytes& out, int64_t layers) {
  Tables tables;
  for (int64_t i = 0; i < std::min<int64_t>(layers, 2); ++i) {
    const int64_t parity = (layers - 1 - i) % 2;
    if (i == 1 && static_cast<int64_t>(out.size()) >= table_bytes) {
      tables.buffers[parity] = out.data();
    } else {
      tables.memory[parity] = emulator::poisoned<unsigned char>(table_bytes);
      tables.buffers[parity] = tables.memory[parity].data();
    }
  }
  return tables;
}

}  // namespace

int main() {
  const int64_t K = integer("num_layers"), D = integer("D"), count = integer("count");
  const bool backward = integer("backward") != 0, has_rows = integer("has_rows") != 0;
  const Type type = static_cast<Type>(integer("type")), storage = static_cast<Type>(integer("storage"));
  const Settings settings{
      {integer("l2_bytes"), integer("warps")}, integer("together") != 0, static_cast<unsigned>(integer("grid"))};
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
  if (!backward && has_rows) {
    layer.rows = rows.data();
    layer.rows_stride = 1;
    layer.count = count;
  }
  layer.x = {x.data() + integer("x_offset"), type, integer("row_stride"), integer("column_stride"), nullptr, false};
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

  Bytes out = emulator::poisoned<unsigned char>(layer.count * D * size_of(type));
  const int64_t table_bytes = layer.nodes * D * size_of(storage);
  const Tiling tiling = make_tiling(layer.nodes, D, size_of(storage), settings.machine);
  layer.schedule = make_schedule(layer.nodes, layer.nnz, tiling.tiles, table_bytes, settings.machine);
  const int64_t counters = counters_of(D, layer.schedule);
  auto first = emulator::poisoned<int32_t>(layer.schedule.windows + 1);
  auto partial = emulator::poisoned<float>(layer.schedule.slots * D);
  auto arrived = emulator::poisoned<int32_t>(counters);
  std::vector<uint8_t> requested(layer.rows == nullptr ? 0 : layer.nodes, 0);
  layer.first = first.data();
  layer.partial = partial.data();
  layer.arrived = arrived.data();
  layer.requested = requested.data();
  if (!backward && K == 0) {
    launch_copy(layer, out, type);
  } else if (!backward) {
    const Tables tables = make_tables(table_bytes, out, K);
    set_table(layer, storage, tiling);
    launch_prepare({layer, tables.buffers[0], storage, counters}, tiling);
    launch(settings, {layer, tables.buffers[0], tables.buffers[1], out.data(), storage, type, true, K, 0, 0}, tiling);
  } else {
    auto sums = emulator::poisoned<float>(count * D), scaled = emulator::poisoned<float>(count * D);
    auto slot = emulator::poisoned<int32_t>(layer.nodes);
    const SparseGradient sparse{layer.x.data,
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
    layer.x = {sums.data(), Type::float32, D, 1, slot.data(), false};
    if (K == 0) {
      launch_copy(layer, out, type);
    } else {
      const Tables tables = make_tables(table_bytes, out, K - 1);
      set_table(layer, storage, tiling);
      launch_prepare({layer, nullptr, storage, counters}, tiling);
      Program program{layer,
                      scaled.data(),
                      nullptr,
                      K == 1 ? out.data() : tables.buffers[0],
                      Type::float32,
                      K == 1 ? type : storage,
                      K == 1,
                      1,
                      0,
                      0};
      program.layer.slot = slot.data();
      launch(settings, program, make_tiling(count, D, 4, settings.machine));
      if (K > 1) {
        launch(settings, {layer, tables.buffers[0], tables.buffers[1], out.data(), storage, type, true, K - 1, 0, 0},
               tiling);
      }
    }
  }
  emulator::write("out", out);
  emulator::write("errors", errors);
}
