// lightgcn_propagate on a CPU: checks, division of the work, layers, registration.
//
// With S = D^-1/2 and h_0 = x, the recurrence h_k = x + S A S h_{k-1} ends in h_K = sum_k (S A S)^k x, so the layer
// mean costs no buffer and no extra pass: a layer gathers rows of g = S h and writes the next g. There are no edge
// values, and the scratch is two [N, D] tables at any number of layers. The inner loops are in propagate_kernel.h,
// the checks of shapes and dtypes in ../propagate.h, the division into tasks in propagate_plan.h, the specification in
// collm_fast/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../philox.h"
#include "../propagate.h"
#include "isa.h"
#include "propagate_plan.h"

namespace collm {
namespace {

using namespace propagation;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

constexpr const char* kOp = "lightgcn_propagate";
constexpr const char* kBackward = "lightgcn_propagate_backward";

// The inner loops of one instruction set, for tables stored as S and sums in A.
template <typename S, typename A>
struct Kernel {
  void (*gather)(const int32_t* col, int64_t begin, int64_t end, int64_t last, const S* table, int64_t D, A* sum);
  void (*store)(const A* x, A a, const A* sum, A b, int64_t D, S* out);
  bool (*any_outside)(const int32_t* col, int64_t begin, int64_t end, int64_t nodes);
};

namespace baseline {
#define COLLM_LANE_BYTES 16
#include "propagate_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define COLLM_LANE_BYTES 32
#include "propagate_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#define COLLM_LANE_BYTES 64
#include "propagate_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename S, typename A>
Kernel<S, A> kernel() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    return avx512::kernel<S, A>();
  }
  if (isa() == Isa::avx2) {
    return avx2::kernel<S, A>();
  }
#endif
  return baseline::kernel<S, A>();
}

template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      return f(double{});
  }
}

// --- what a layer adds to its sums ------------------------------------------------------------------------------
// x itself, at any strides, or (slot given) the sums of the gradient's rows, zero wherever slot is -1.
template <typename A>
struct Source {
  const void* data;
  ScalarType type;
  int64_t stride[2];
  int64_t D;
  const int32_t* slot = nullptr;

  // The row of a node in A; in place where it can be, else in `buffer`. Null: a row of zeros.
  const A* row(int64_t node, A* buffer) const {
    if (slot != nullptr) {
      return slot[node] < 0 ? nullptr : static_cast<const A*>(data) + slot[node] * D;
    }
    const A* result = buffer;
    dispatch(type, [&](auto tag) {
      using X = decltype(tag);
      const X* from = static_cast<const X*>(data) + node * stride[0];
      if constexpr (std::is_same_v<X, A>) {
        if (stride[1] == 1) {
          result = from;
          return;
        }
      }
      for (int64_t d = 0; d < D; ++d) {
        buffer[d] = static_cast<A>(from[d * stride[1]]);
      }
    });
    return result;
  }
};

template <typename A>
Source<A> source(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1)}, x.size(1)};
}

// Where a layer's rows go: the next table (every row scaled by its node's S once more), or the result.
struct Sink {
  void* data;
  ScalarType type;
  bool is_result;
  double mean;  // 1 / (K + 1), for the result
  double keep;  // 1 / (1 - p): the factor of an edge that dropout kept
};

// Names the first column outside the graph, which has one.
[[noreturn]] void fail_at_column(const char* op, const Graph& graph) {
  int64_t e = 0;
  while (graph.col[e] >= 0 && graph.col[e] < graph.nodes) {
    ++e;
  }
  fail(op, "col in [0, ", graph.nodes, "), got ", graph.col[e], " at edge ", e);
}

template <typename S, typename A>
struct Layer {
  const Graph& graph;
  const Plan& plan;
  const S* table;
  const int32_t* slot;  // if given, the table holds rows of these slots only: the first layer of a sparse backward
  Source<A> x;
  Sink sink;
  const char* check_columns;  // the op that rejects a column outside the graph; null: they were checked before
  std::atomic<bool> outside{false};

  int64_t D() const { return x.D; }

  void store(int64_t position, const A* sum, A* buffer) const {
    const int64_t node = plan.node(position);
    const A s = graph.inv[node];
    const A* row = x.row(node, buffer);
    const A a = sink.is_result ? A(sink.mean) : s;
    const A b = a * s * A(sink.keep);
    dispatch(sink.type, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (std::is_same_v<T, double> == std::is_same_v<A, double>) {
        kernel<T, A>().store(row, a, sum, b, D(), static_cast<T*>(sink.data) + position * D());
      }
    });
  }

  void sum_edges(int64_t begin, int64_t end, int64_t last, int32_t* list, A* sum) const {
    if (slot == nullptr) {
      kernel<S, A>().gather(graph.col, begin, end, last, table, D(), sum);
      return;
    }
    int64_t count = 0;
    for (int64_t e = begin; e < end; ++e) {
      const int32_t s = slot[graph.col[e]];
      list[count] = s;
      count += s >= 0;
    }
    kernel<S, A>().gather(list, 0, count, count, table, D(), sum);
  }

  bool reject(int64_t begin, int64_t end) {
    if (check_columns != nullptr && kernel<S, A>().any_outside(graph.col, begin, end, graph.nodes)) {
      outside.store(true, std::memory_order_relaxed);
      return true;
    }
    return false;
  }

  // The columns are checked task by task, just before they are read again: the check costs no pass over memory.
  void run_task(const Task& task, A* partial, A* sum, A* buffer, int32_t* list) {
    if (task.piece >= 0) {
      const Piece& piece = plan.pieces[task.piece];
      if (!reject(piece.begin, piece.end)) {
        sum_edges(piece.begin, piece.end, piece.end, list, partial + task.piece * D());
      }
      return;
    }
    const bool contiguous = plan.rows == nullptr;
    const int64_t last = contiguous ? graph.end[task.last - 1] : 0;
    if (contiguous && reject(graph.begin[task.first], last)) {
      return;
    }
    for (int64_t p = task.first; p < task.last; ++p) {
      const int64_t node = plan.node(p), begin = graph.begin[node], end = graph.end[node];
      if (!contiguous && reject(begin, end)) {
        continue;
      }
      sum_edges(begin, end, contiguous ? last : end, list, sum);
      store(p, sum, buffer);
    }
  }

  void run() {
    std::unique_ptr<A[]> partial(new A[plan.pieces.size() * D()]);
    parallel_for(0, static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<A[]> scratch(new A[2 * D()]);
      std::unique_ptr<int32_t[]> list(slot == nullptr ? nullptr : new int32_t[kHubEdges + 1]);
      for (int64_t t = first; t < last; ++t) {
        run_task(plan.tasks[t], partial.get(), scratch.get(), scratch.get() + D(), list.get());
      }
    });
    if (outside.load()) {
      fail_at_column(check_columns, graph);
    }
    parallel_for(0, static_cast<int64_t>(plan.hubs.size()), 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<A[]> buffer(new A[D()]);
      for (int64_t h = first; h < last; ++h) {
        A* sum = partial.get() + plan.hubs[h].first_piece * D();
        for (int64_t piece = plan.hubs[h].first_piece + 1; piece < plan.hubs[h].last_piece; ++piece) {
          for (int64_t d = 0; d < D(); ++d) {
            sum[d] += partial[piece * D() + d];
          }
        }
        store(plan.hubs[h].position, sum, buffer.get());
      }
    });
  }
};

// --- arguments --------------------------------------------------------------------------------------------------
void check_crow(const char* op, const int64_t* crow, int64_t nodes, int64_t nnz) {
  bool falls = false;
  for (int64_t i = 0; i < nodes; ++i) {
    falls |= crow[i + 1] < crow[i];
  }
  if (!falls && crow[0] == 0 && crow[nodes] == nnz) [[likely]] {
    return;
  }
  int64_t got = crow[0] != 0 ? crow[0] : crow[nodes];
  for (int64_t i = nodes; falls && i > 0; --i) {
    got = crow[i] < crow[i - 1] ? crow[i] : got;
  }
  fail(op, "crow to rise from 0 to nnz (", nnz, "), got ", got);
}

std::vector<int64_t> read_rows(const char* op, const Tensor& rows, int64_t nodes) {
  const int64_t *data = static_cast<const int64_t*>(rows.data_ptr()), stride = rows.stride(0);
  std::vector<int64_t> result(rows.numel());
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t row = data[static_cast<int64_t>(i) * stride];
    COLLM_CHECK(row >= 0 && row < nodes, op, "rows in [0, ", nodes, "), got ", row, " at position ", i);
    result[i] = row;
  }
  return result;
}

// The graph of one call: the tensors themselves or, under dropout, the edges that were kept.
struct CallGraph {
  Graph graph;
  std::unique_ptr<int32_t[]> col;
  std::unique_ptr<int64_t[]> end;
  double keep = 1.0;

  // `all_columns`: check them here, because the layers to come do not read all of them.
  CallGraph(const char* op, const Tensor& crow, const Tensor& columns, const Tensor& inv, double dropout_p,
            const std::optional<Tensor>& seed, bool all_columns) {
    const int64_t* begin = static_cast<const int64_t*>(crow.data_ptr());
    graph = {begin,
             begin + 1,
             static_cast<const int32_t*>(columns.data_ptr()),
             static_cast<const float*>(inv.data_ptr()),
             crow.numel() - 1,
             columns.numel()};
    if (dropout_p > 0.0) {
      drop(op, static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())), edge_threshold(dropout_p));
      keep = 1.0 / (1.0 - dropout_p);
    } else if (all_columns && kernel<float, float>().any_outside(graph.col, 0, graph.nnz, graph.nodes)) {
      fail_at_column(op, graph);
    }
  }

  // One decision for each undirected edge, drawn once a call. A row's kept columns stay where the row begins.
  void drop(const char* op, uint64_t seed, uint32_t threshold) {
    col.reset(new int32_t[graph.nnz]);
    end.reset(new int64_t[graph.nodes]);
    std::atomic<bool> outside{false};
    parallel_for(0, graph.nodes, 256, [&](int64_t first, int64_t last) {
      if (kernel<float, float>().any_outside(graph.col, graph.begin[first], graph.end[last - 1], graph.nodes)) {
        outside.store(true, std::memory_order_relaxed);
        return;
      }
      for (int64_t i = first; i < last; ++i) {
        int64_t next = graph.begin[i];
        for (int64_t e = graph.begin[i]; e < graph.end[i]; ++e) {
          const int32_t c = graph.col[e];
          const uint32_t user = static_cast<uint32_t>(std::min<int64_t>(i, c));
          const uint32_t item = static_cast<uint32_t>(std::max<int64_t>(i, c));
          col[next] = c;
          next += edge_keep(seed, user, item, threshold);
        }
        end[i] = next;
        // What lies behind is fetched ahead, and must be columns too.
        std::fill(col.get() + next, col.get() + graph.end[i], 0);
      }
    });
    if (outside.load()) {
      fail_at_column(op, graph);
    }
    graph.col = col.get();
    graph.end = end.get();
  }
};

ScalarType accumulator(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// f(S{}, A{}) for the storage type and the type it is summed in.
template <typename F>
void dispatch_storage(ScalarType type, const F& f) {
  dispatch(type, [&](auto tag) {
    using S = decltype(tag);
    f(tag, std::conditional_t<std::is_same_v<S, double>, double, float>{});
  });
}

// --- forward ----------------------------------------------------------------------------------------------------
// out[p] = a(node) x[node] for each position: layer 0, and the whole result where there are no layers.
template <typename A>
void scale_rows(const Graph& graph, const int64_t* rows, int64_t count, const Source<A>& x, const Sink& sink) {
  parallel_for(0, count, 512, [&](int64_t first, int64_t last) {
    std::unique_ptr<A[]> buffer(new A[x.D]);
    dispatch(sink.type, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (std::is_same_v<T, double> == std::is_same_v<A, double>) {
        const auto store = kernel<T, A>().store;
        for (int64_t p = first; p < last; ++p) {
          const int64_t node = rows == nullptr ? p : rows[p];
          const A a = sink.is_result ? A(1) : A(graph.inv[node]);
          store(x.row(node, buffer.get()), a, nullptr, A(0), x.D, static_cast<T*>(sink.data) + p * x.D);
        }
      }
    });
  });
}

// Layers `first` .. K over tables of the storage type, from the table of layer first - 1 to the result.
template <typename S, typename A>
void run_layers(const Graph& graph, const Source<A>& x, int64_t first, int64_t K, Tensor table, const Plan* all,
                const Plan& last, const Tensor& out, double keep) {
  Tensor spare;
  const ScalarType storage = table.scalar_type();
  if (first < K) {
    spare = torch::stable::new_empty(table, table.sizes());
  }
  for (int64_t k = first; k <= K; ++k) {
    const bool is_result = k == K;
    const Tensor& target = is_result ? out : spare;
    const Sink sink{target.data_ptr(), is_result ? out.scalar_type() : storage, is_result, 1.0 / (K + 1.0), keep};
    Layer<S, A> layer{graph, is_result ? last : *all, static_cast<const S*>(table.data_ptr()), nullptr, x,
                      sink,  k == 1 ? kOp : nullptr};
    layer.run();
    std::swap(table, spare);
  }
}

Tensor propagate(const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& inv, int64_t num_layers,
                 std::optional<ScalarType> storage_dtype, std::optional<Tensor> rows, double dropout_p,
                 std::optional<Tensor> seed) {
  COLLM_CHECK(x.dim() == 2, kOp, "x of shape [N, D], got ", shape(x));
  const int64_t nodes = x.size(0), D = x.size(1);
  check_graph(kOp, x, crow, col, inv, nodes);
  check_options(kOp, "x", x, num_layers, storage_dtype, rows, dropout_p, seed, true);
  check_crow(kOp, static_cast<const int64_t*>(crow.data_ptr()), nodes, col.numel());
  const std::vector<int64_t> wanted = rows ? read_rows(kOp, *rows, nodes) : std::vector<int64_t>();
  const int64_t* wanted_data = rows ? wanted.data() : nullptr;
  const int64_t count = rows ? static_cast<int64_t>(wanted.size()) : nodes;
  Tensor out = torch::stable::new_empty(x, {count, D});
  if (count == 0 || D == 0) {
    return out;
  }
  const bool all_columns = num_layers == 0 || (rows && num_layers == 1);
  const CallGraph call(kOp, crow, col, inv, num_layers > 0 ? dropout_p : 0.0, seed, all_columns);
  const ScalarType storage = storage_dtype.value_or(accumulator(x.scalar_type()));
  dispatch_storage(storage, [&](auto s_tag, auto a_tag) {
    using S = decltype(s_tag);
    using A = decltype(a_tag);
    const Source<A> from = source<A>(x);
    if (num_layers == 0) {
      scale_rows<A>(call.graph, wanted_data, count, from, {out.data_ptr(), out.scalar_type(), true, 1.0, 1.0});
      return;
    }
    Tensor table = torch::stable::new_empty(x, {nodes, D}, storage);
    scale_rows<A>(call.graph, nullptr, nodes, from, {table.data_ptr(), storage, false, 1.0, 1.0});
    const Plan last = make_plan(call.graph, wanted_data, count);
    const Plan all = rows && num_layers > 1 ? make_plan(call.graph, nullptr, nodes) : Plan{};
    run_layers<S, A>(call.graph, from, 1, num_layers, table, rows ? &all : &last, last, out, call.keep);
  });
  return out;
}

// --- backward of the rows form ----------------------------------------------------------------------------------
// The gradient is zero outside `rows`: it is kept as one summed row for each distinct node, and a map from node to it.
template <typename A>
struct SparseGradient {
  std::vector<int64_t> nodes;  // distinct, ascending
  std::vector<int32_t> slot;   // [N], -1: no gradient
  std::unique_ptr<A[]> sums;   // [nodes, D]

  SparseGradient(const Tensor& grad, const std::vector<int64_t>& rows, int64_t num_nodes) {
    // Stable, so that a node that occurs several times always sums in the order of its places.
    std::vector<int64_t> order(rows.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
    std::vector<int64_t> start;
    slot.assign(num_nodes, -1);
    for (size_t i = 0; i < order.size(); ++i) {
      if (i == 0 || rows[order[i]] != rows[order[i - 1]]) {
        slot[rows[order[i]]] = static_cast<int32_t>(nodes.size());
        nodes.push_back(rows[order[i]]);
        start.push_back(static_cast<int64_t>(i));
      }
    }
    start.push_back(static_cast<int64_t>(order.size()));
    const Source<A> from = source<A>(grad);
    const int64_t D = from.D;
    sums.reset(new A[nodes.size() * D]);
    parallel_for(0, static_cast<int64_t>(nodes.size()), 64, [&](int64_t first, int64_t last) {
      std::unique_ptr<A[]> buffer(new A[D]);
      for (int64_t n = first; n < last; ++n) {
        A* sum = sums.get() + n * D;
        std::fill(sum, sum + D, A(0));
        for (int64_t i = start[n]; i < start[n + 1]; ++i) {
          const A* row = from.row(order[i], buffer.get());
          for (int64_t d = 0; d < D; ++d) {
            sum[d] += row[d];
          }
        }
      }
    });
  }
};

template <typename S, typename A>
void propagate_sparse(const Graph& graph, const SparseGradient<A>& sparse, int64_t K, ScalarType storage,
                      const Tensor& out, double keep) {
  const int64_t D = out.size(1);
  const Source<A> from{sparse.sums.get(), accumulator(storage), {D, 1}, D, sparse.slot.data()};
  if (K == 0) {
    scale_rows<A>(graph, nullptr, graph.nodes, from, {out.data_ptr(), out.scalar_type(), true, 1.0, 1.0});
    return;
  }
  const int64_t distinct = static_cast<int64_t>(sparse.nodes.size());
  std::unique_ptr<A[]> scaled(new A[distinct * D]);
  for (int64_t n = 0; n < distinct; ++n) {
    const A s = graph.inv[sparse.nodes[n]];
    kernel<A, A>().store(sparse.sums.get() + n * D, s, nullptr, A(0), D, scaled.get() + n * D);
  }
  const Plan all = make_plan(graph, nullptr, graph.nodes);
  Tensor table = K == 1 ? out : torch::stable::new_empty(out, {graph.nodes, D}, storage);
  const Sink sink{table.data_ptr(), table.scalar_type(), K == 1, 1.0 / (K + 1.0), keep};
  Layer<A, A> layer{graph, all, scaled.get(), sparse.slot.data(), from, sink, kBackward};
  layer.run();
  if (K > 1) {
    run_layers<S, A>(graph, from, 2, K, table, &all, all, out, keep);
  }
}

Tensor propagate_backward(const Tensor& grad, const Tensor& crow, const Tensor& col, const Tensor& inv,
                          int64_t num_layers, std::optional<ScalarType> storage_dtype, const Tensor& rows,
                          double dropout_p, std::optional<Tensor> seed) {
  constexpr const char* op = kBackward;
  COLLM_CHECK(grad.dim() == 2, op, "grad of shape [B, D], got ", shape(grad));
  COLLM_CHECK(crow.dim() == 1 && crow.numel() >= 1, op, "crow of shape [N + 1], got ", shape(crow));
  const int64_t nodes = crow.numel() - 1, D = grad.size(1);
  check_graph(op, grad, crow, col, inv, nodes);
  check_options(op, "grad", grad, num_layers, storage_dtype, rows, dropout_p, seed, true);
  COLLM_CHECK(rows.numel() == grad.size(0), op, "rows of shape [", grad.size(0), "], got ", shape(rows));
  check_crow(op, static_cast<const int64_t*>(crow.data_ptr()), nodes, col.numel());
  const std::vector<int64_t> wanted = read_rows(op, rows, nodes);
  Tensor out = torch::stable::new_empty(grad, {nodes, D});
  if (nodes == 0 || D == 0) {
    return out;
  }
  const CallGraph call(op, crow, col, inv, num_layers > 0 ? dropout_p : 0.0, seed, num_layers == 0);
  const ScalarType storage = storage_dtype.value_or(accumulator(grad.scalar_type()));
  dispatch_storage(storage, [&](auto s_tag, auto a_tag) {
    using A = decltype(a_tag);
    const SparseGradient<A> sparse(grad, wanted, nodes);
    propagate_sparse<decltype(s_tag), A>(call.graph, sparse, num_layers, storage, out, call.keep);
  });
  return out;
}

}  // namespace
}  // namespace collm

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("lightgcn_propagate", TORCH_BOX(&collm::propagate));
  m.impl("lightgcn_propagate_backward", TORCH_BOX(&collm::propagate_backward));
}
