// One layer of lightgcn_propagate on a CPU: what it reads and writes, and how its tasks run on threads.
//
// The inner loops are in propagate_kernel.h, the division into tasks in propagate_plan.h, the order of the layers in
// propagate.cpp, which includes this file before it compiles the loops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>

#include "../propagate.h"
#include "propagate_plan.h"

namespace collm::propagation {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

// Rows are fetched this far ahead: a quarter of the smallest first-level cache in use, at most 64 rows.
constexpr int64_t kAheadBytes = 8192;

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

inline int64_t element_bytes(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// What a layer adds to its sums: x itself, at any strides, or (slot given) the summed rows of a sparse gradient, zero
// wherever slot is -1.
template <typename A>
struct Source {
  const void* data;
  ScalarType type;
  int64_t stride[2];
  const int32_t* slot = nullptr;

  // The first row, where every row can be read where it lies; else null.
  const A* in_place() const {
    constexpr ScalarType kA = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    return slot == nullptr && type == kA && stride[1] == 1 ? static_cast<const A*>(data) : nullptr;
  }

  // The row of a node in A, in place where it can be, else in `buffer`. Null: a row of zeros.
  const A* row(int64_t node, int64_t D, A* buffer) const {
    if (slot != nullptr) {
      return slot[node] < 0 ? nullptr : static_cast<const A*>(data) + slot[node] * D;
    }
    if (const A* first = in_place()) {
      return first + node * stride[0];
    }
    dispatch(type, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(data) + node * stride[0];
      for (int64_t d = 0; d < D; ++d) {
        buffer[d] = static_cast<A>(from[d * stride[1]]);
      }
    });
    return buffer;
  }
};

// out[p] = a x[node] + b sum of the node's table rows: with a = S the next table, with a = 1 / (K + 1) the result.
template <typename A>
struct LayerCall {
  const void* table;
  int64_t D;
  const float* inv;  // S of each node
  Source<A> x;
  void* out;
  ScalarType out_type;
  bool is_table;
  A mean;         // 1 / (K + 1), for the result
  A keep;         // 1 / (1 - p): the factor of an edge that dropout kept
  int64_t ahead;  // how many edges ahead a row is fetched

  A a(int64_t node) const { return is_table ? A(inv[node]) : mean; }
  A b(int64_t node) const { return a(node) * A(inv[node]) * keep; }
};

// One row. `sum`, if given, holds the sum of its edges; else they are gathered from the table.
template <typename A>
struct RowWork {
  const int32_t* col;
  int64_t begin, end, last;  // columns may be read up to `last`, to fetch rows ahead
  const A* sum;
  const A* x;  // null: zeros
  A a, b;
  void* out;
};

// The positions [first, first + count), whose edges are col[begin[i] .. end[i]); nodes maps positions to nodes.
struct RowRange {
  const int32_t* col;
  const int64_t *begin, *end;
  int64_t last;
  const int64_t* nodes;
  int64_t first, count;
};

// The inner loops of one instruction set, for tables stored as S and sums in A.
template <typename S, typename A>
struct Kernel {
  void (*rows)(const LayerCall<A>& call, const RowRange& range, A* buffer);
  void (*row)(const LayerCall<A>& call, const RowWork<A>& work);
  bool (*any_outside)(const int32_t* col, int64_t begin, int64_t end, int64_t nodes);
  int64_t (*compress)(const int32_t* col, int64_t begin, int64_t end, const int32_t* slot, int32_t* list);
  int64_t (*keep_edges)(uint64_t seed, uint32_t threshold, int32_t node, const int32_t* col, int64_t count,
                        int32_t* kept);
};

// Names the first column outside the graph, which has one.
[[noreturn]] inline void fail_at_column(const char* op, const Graph& graph) {
  int64_t e = 0;
  while (graph.col[e] >= 0 && graph.col[e] < graph.nodes) {
    ++e;
  }
  fail(op, "col in [0, ", graph.nodes, "), got ", graph.col[e], " at edge ", e);
}

template <typename S, typename A>
struct Layer {
  const Kernel<S, A> kernel;
  const Graph& graph;
  const Plan& plan;
  LayerCall<A> call;
  const int32_t* slot;  // if given, the table holds rows of these slots only: the first layer of a sparse backward
  const char* check_columns;  // the op that rejects a column outside the graph; null: they were checked before
  std::atomic<bool> outside{false};

  // What one thread needs: the columns of a task where they are not the graph's own, and one row.
  struct Scratch {
    std::unique_ptr<A[]> row;
    std::unique_ptr<int32_t[]> col;
    std::unique_ptr<int64_t[]> begin, end;

    Scratch(int64_t D, bool lists) : row(new A[D]) {
      if (lists) {
        col.reset(new int32_t[kTaskEdges + 16]);
        begin.reset(new int64_t[kTaskRows]);
        end.reset(new int64_t[kTaskRows]);
      }
    }
  };

  bool reject(int64_t begin, int64_t end) {
    if (check_columns != nullptr && kernel.any_outside(graph.col, begin, end, graph.nodes)) {
      outside.store(true, std::memory_order_relaxed);
      return true;
    }
    return false;
  }

  // Appends a row's table rows to the task's own list, so that fetching ahead goes on from row to row.
  int64_t append(int64_t begin, int64_t end, int32_t* list) const {
    if (slot != nullptr) {
      return kernel.compress(graph.col, begin, end, slot, list);
    }
    std::copy(graph.col + begin, graph.col + end, list);
    return end - begin;
  }

  void run_piece(const Piece& piece, A* sum, Scratch& scratch) {
    if (reject(piece.begin, piece.end)) {
      return;
    }
    LayerCall<A> to_sum = call;
    to_sum.is_table = false;
    to_sum.out_type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    RowWork<A> work{graph.col, piece.begin, piece.end, piece.end, nullptr, nullptr, A(0), A(1), sum};
    if (slot != nullptr) {
      const int64_t count = append(piece.begin, piece.end, scratch.col.get());
      work = {scratch.col.get(), 0, count, count, nullptr, nullptr, A(0), A(1), sum};
    }
    kernel.row(to_sum, work);
  }

  // The columns are checked task by task, just before they are read again: the check costs no pass over memory.
  void run_task(const Task& task, A* partial, Scratch& scratch) {
    if (task.piece >= 0) {
      run_piece(plan.pieces[task.piece], partial + task.piece * call.D, scratch);
      return;
    }
    const int64_t count = task.last - task.first;
    const bool contiguous = plan.rows == nullptr;
    if (contiguous && reject(graph.begin[task.first], graph.end[task.last - 1])) {
      return;
    }
    if (contiguous && slot == nullptr) {
      kernel.rows(call,
                  {graph.col, graph.begin + task.first, graph.end + task.first, graph.end[task.last - 1], nullptr,
                   task.first, count},
                  scratch.row.get());
      return;
    }
    int64_t edges = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t node = plan.node(task.first + i);
      if (!contiguous && reject(graph.begin[node], graph.end[node])) {
        return;
      }
      scratch.begin[i] = edges;
      edges += append(graph.begin[node], graph.end[node], scratch.col.get() + edges);
      scratch.end[i] = edges;
    }
    kernel.rows(call, {scratch.col.get(), scratch.begin.get(), scratch.end.get(), edges, plan.rows, task.first, count},
                scratch.row.get());
  }

  // The sums of a hub's pieces, added in order.
  void run_hub(const Hub& hub, A* partial, A* buffer) {
    A* sum = partial + hub.first_piece * call.D;
    for (int64_t piece = hub.first_piece + 1; piece < hub.last_piece; ++piece) {
      for (int64_t d = 0; d < call.D; ++d) {
        sum[d] += partial[piece * call.D + d];
      }
    }
    const int64_t node = plan.node(hub.position);
    void* out = static_cast<char*>(call.out) + hub.position * call.D * element_bytes(call.out_type);
    kernel.row(call, {nullptr, 0, 0, 0, sum, call.x.row(node, call.D, buffer), call.a(node), call.b(node), out});
  }

  void run() {
    call.ahead = std::clamp<int64_t>(kAheadBytes / static_cast<int64_t>(call.D * sizeof(S)), 8, 64);
    const std::unique_ptr<A[]> partial(new A[plan.pieces.size() * call.D]);
    parallel_for(0, static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t first, int64_t last) {
      Scratch scratch(call.D, slot != nullptr || plan.rows != nullptr);
      for (int64_t t = first; t < last; ++t) {
        run_task(plan.tasks[t], partial.get(), scratch);
      }
    });
    if (outside.load()) {
      fail_at_column(check_columns, graph);
    }
    parallel_for(0, static_cast<int64_t>(plan.hubs.size()), 1, [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> buffer(new A[call.D]);
      for (int64_t h = first; h < last; ++h) {
        run_hub(plan.hubs[h], partial.get(), buffer.get());
      }
    });
  }
};

}  // namespace collm::propagation
