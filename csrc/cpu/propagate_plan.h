// How the rows of lightgcn_propagate are divided among threads: tasks of about equal cost.
//
// A row with more than kHubEdges edges is summed in pieces of kHubEdges, whose sums are added in order: neither the
// number of threads nor the division into tasks changes a bit. The layers that run the tasks are in propagate.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace collm::propagation {

constexpr int64_t kHubEdges = 2048;
constexpr int64_t kTaskCost = 4096;
constexpr int64_t kRowCost = 4;  // what a row costs beside its edges
// No task of whole rows has more.
constexpr int64_t kTaskEdges = kTaskCost + kHubEdges;
constexpr int64_t kTaskRows = kTaskCost / kRowCost + 1;

// Node i's neighbours are col[begin[i] .. end[i]).
struct Graph {
  const int64_t* begin;
  const int64_t* end;
  const int32_t* col;
  const float* inv;
  int64_t nodes;
  int64_t nnz;
};

struct Task {
  int64_t first, last;  // positions, or one piece of a hub where piece >= 0
  int64_t piece;
};
struct Piece {
  int64_t begin, end;  // edges
};
struct Hub {
  int64_t position, first_piece, last_piece;
};
struct Plan {
  const int64_t* rows;  // position -> node; null: position = node
  std::vector<Task> tasks;
  std::vector<Piece> pieces;
  std::vector<Hub> hubs;

  int64_t node(int64_t position) const { return rows == nullptr ? position : rows[position]; }
};

inline Plan make_plan(const Graph& graph, const int64_t* rows, int64_t count) {
  Plan plan{rows, {}, {}, {}};
  int64_t first = 0, cost = 0;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t node = plan.node(p), begin = graph.begin[node], end = graph.end[node];
    if (end - begin > kHubEdges) {
      if (first < p) {
        plan.tasks.push_back({first, p, -1});
      }
      const int64_t first_piece = static_cast<int64_t>(plan.pieces.size());
      for (int64_t e = begin; e < end; e += kHubEdges) {
        plan.tasks.push_back({p, p + 1, static_cast<int64_t>(plan.pieces.size())});
        plan.pieces.push_back({e, std::min(e + kHubEdges, end)});
      }
      plan.hubs.push_back({p, first_piece, static_cast<int64_t>(plan.pieces.size())});
      first = p + 1;
      cost = 0;
      continue;
    }
    cost += end - begin + kRowCost;
    if (cost >= kTaskCost) {
      plan.tasks.push_back({first, p + 1, -1});
      first = p + 1;
      cost = 0;
    }
  }
  if (first < count) {
    plan.tasks.push_back({first, count, -1});
  }
  return plan;
}

}  // namespace collm::propagation
