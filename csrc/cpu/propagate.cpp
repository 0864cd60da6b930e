// lightgcn_propagate on a CPU: checks, division of the work, layers, registration.
//
// With S = D^-1/2 and h_0 = x, the recurrence h_k = x + S A S h_{k-1} ends in h_K = sum_k (S A S)^k x, so the layer
// mean costs no buffer and no extra pass: a layer gathers rows of g = S h and writes the next g. There are no edge
// values, and at any number of layers the scratch is one [N, D] table: the result's memory serves as the other. The
// inner loops are in propagate_kernel.h, a layer in propagate_layer.h, the checks of shapes and dtypes in
// ../propagate.h, the specification in collm_fast/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "../philox.h"
#include "../propagate.h"
#include "huge_pages.h"
#include "propagate_layer.h"
#include "propagate_loops.h"

namespace collm {
namespace {

constexpr const char* kOp = "lightgcn_propagate";
constexpr const char* kBackward = "lightgcn_propagate_backward";

template <typename A>
Source<A> source(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1)}};
}

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
    const Kernel<float, float> loops = kernel<float, float>();
    parallel_for(0, graph.nodes, 256, [&](int64_t first, int64_t last) {
      if (loops.any_outside(graph.col, graph.begin[first], graph.end[last - 1], graph.nodes)) {
        outside.store(true, std::memory_order_relaxed);
        return;
      }
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = graph.begin[i], count = graph.end[i] - begin;
        end[i] = begin + loops.keep_edges(seed, threshold, static_cast<int32_t>(i), graph.col + begin, count,
                                          col.get() + begin);
        // What lies behind is fetched ahead, and must be columns too.
        std::fill(col.get() + end[i], col.get() + begin + count, 0);
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
Tensor large_tensor(const Tensor& like, int64_t rows, int64_t D, ScalarType type) {
  Tensor result = torch::stable::new_empty(like, {rows, D}, type);
  advise_huge_pages(result.data_ptr(), rows * D * element_bytes(type));
  return result;
}

// The tables g_0 .. g_{K-1} of one call in the memory of two. The last layer reads from scratch of our own, so the
// tables between may lie where the result will, if that is large enough.
struct Tables {
  int64_t K;
  ScalarType type;
  Tensor own;
  Tensor other;

  Tables(const Tensor& out, int64_t nodes, int64_t D, int64_t layers, ScalarType storage, int64_t first)
      : K(layers), type(storage) {
    own = large_tensor(out, nodes, D, storage);
    if (first < K - 1) {
      const bool fits = out.size(0) == nodes && element_bytes(out.scalar_type()) >= element_bytes(storage);
      other = fits ? out : large_tensor(out, nodes, D, storage);
    }
  }

  // Where g_k lies.
  void* of(int64_t k) const { return (K - 1 - k) % 2 == 0 ? own.data_ptr() : other.data_ptr(); }
};

// Layers `first` .. K, from g_{first-1} to the result.
template <typename S, typename A>
void run_layers(const CallGraph& graph, const Source<A>& x, int64_t first, const Tables& tables, const Plan* all,
                const Plan& last, const Tensor& out) {
  for (int64_t k = first; k <= tables.K; ++k) {
    const bool is_result = k == tables.K;
    const LayerCall<A> call{tables.of(k - 1),
                            out.size(1),
                            graph.graph.inv,
                            x,
                            is_result ? out.data_ptr() : tables.of(k),
                            is_result ? out.scalar_type() : tables.type,
                            !is_result,
                            A(1.0 / (tables.K + 1.0)),
                            A(graph.keep),
                            0};
    Layer<S, A> layer{kernel<S, A>(), graph.graph, is_result ? last : *all, call, nullptr, k == 1 ? kOp : nullptr};
    layer.run();
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
  const Tensor out = large_tensor(x, count, D, x.scalar_type());
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
      scale_rows<S, A>(wanted_data, count,
                       {nullptr, D, call.graph.inv, from, out.data_ptr(), out.scalar_type(), false, A(1), A(1), 0});
      return;
    }
    const Tables tables(out, nodes, D, num_layers, storage, 0);
    scale_rows<S, A>(nullptr, nodes, {nullptr, D, call.graph.inv, from, tables.of(0), storage, true, A(1), A(1), 0});
    const Plan last = make_plan(call.graph, wanted_data, count);
    const Plan all = rows && num_layers > 1 ? make_plan(call.graph, nullptr, nodes) : Plan{};
    run_layers<S, A>(call, from, 1, tables, rows ? &all : &last, last, out);
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
    const int64_t D = grad.size(1);
    sums.reset(new A[nodes.size() * D]);
    parallel_for(0, static_cast<int64_t>(nodes.size()), 64, [&](int64_t first, int64_t last) {
      std::unique_ptr<A[]> buffer(new A[D]);
      for (int64_t n = first; n < last; ++n) {
        A* sum = sums.get() + n * D;
        std::fill(sum, sum + D, A(0));
        for (int64_t i = start[n]; i < start[n + 1]; ++i) {
          const A* row = from.row(order[i], D, buffer.get());
          for (int64_t d = 0; d < D; ++d) {
            sum[d] += row[d];
          }
        }
      }
    });
  }
};

template <typename S, typename A>
void propagate_sparse(const CallGraph& graph, const SparseGradient<A>& sparse, int64_t K, ScalarType storage,
                      const Tensor& out) {
  const int64_t D = out.size(1), nodes = graph.graph.nodes;
  const Source<A> from{sparse.sums.get(), accumulator(storage), {D, 1}, sparse.slot.data()};
  LayerCall<A> call{nullptr,           D,     graph.graph.inv,    from,          out.data_ptr(),
                    out.scalar_type(), false, A(1.0 / (K + 1.0)), A(graph.keep), 0};
  if (K == 0) {
    scale_rows<S, A>(nullptr, nodes, call);
    return;
  }
  const int64_t distinct = static_cast<int64_t>(sparse.nodes.size());
  const std::unique_ptr<A[]> scaled(new A[distinct * D]);
  for (int64_t n = 0; n < distinct; ++n) {
    const A s = graph.graph.inv[sparse.nodes[n]];
    for (int64_t d = n * D; d < (n + 1) * D; ++d) {
      scaled[d] = s * sparse.sums[d];
    }
  }
  const Plan all = make_plan(graph.graph, nullptr, nodes);
  std::optional<Tables> tables;
  call.table = scaled.get();
  if (K > 1) {
    tables.emplace(out, nodes, D, K, storage, 1);
    call.out = tables->of(1);
    call.out_type = storage;
    call.is_table = true;
  }
  Layer<A, A> layer{kernel<A, A>(), graph.graph, all, call, sparse.slot.data(), kBackward};
  layer.run();
  if (K > 1) {
    run_layers<S, A>(graph, from, 2, *tables, &all, all, out);
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
  const Tensor out = large_tensor(grad, nodes, D, grad.scalar_type());
  if (nodes == 0 || D == 0) {
    return out;
  }
  const CallGraph call(op, crow, col, inv, num_layers > 0 ? dropout_p : 0.0, seed, num_layers == 0);
  const ScalarType storage = storage_dtype.value_or(accumulator(grad.scalar_type()));
  dispatch_storage(storage, [&](auto s_tag, auto a_tag) {
    using A = decltype(a_tag);
    const SparseGradient<A> sparse(grad, wanted, nodes);
    propagate_sparse<decltype(s_tag), A>(call, sparse, num_layers, storage, out);
  });
  return out;
}

}  // namespace
}  // namespace collm

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("lightgcn_propagate", TORCH_BOX(&collm::propagate));
  m.impl("lightgcn_propagate_backward", TORCH_BOX(&collm::propagate_backward));
}
