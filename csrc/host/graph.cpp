// build_graph: unsorted (user, item) pairs to the CSR arrays of a BipartiteGraph.
//
// Its NumPy twin, and what checks ids before either runs, is collm_fast/graph.py. Two stable counting sorts order the
// pairs by (user, item) in linear time; no comparison sort, and never more than one id for each pair beside the output.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;

void check(const Ids& ids, int64_t limit, const char* name) {
  const int64_t* data = ids.data();
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    if (data[i] < 0 || data[i] >= limit) {
      throw std::invalid_argument(std::string("build_graph: expected ") + name + " in [0, " + std::to_string(limit) +
                                  "), got " + std::to_string(data[i]) + " at row " + std::to_string(i));
    }
  }
}

// counts[i + 1] holds how often i occurs; turns it into where i's group starts.
void exclusive_sum(std::vector<int64_t>& counts) {
  for (size_t i = 1; i < counts.size(); ++i) {
    counts[i] += counts[i - 1];
  }
}

// The items of each user, ascending; `start` becomes where each user's group starts. Duplicates are still there.
std::unique_ptr<int32_t[]> items_by_user(const Ids& users, const Ids& items, int64_t num_items,
                                         std::vector<int64_t>& start) {
  const int64_t pairs = users.size();
  const int64_t *user = users.data(), *item = items.data();
  std::vector<int64_t> item_start(num_items + 1, 0);
  for (int64_t e = 0; e < pairs; ++e) {
    ++item_start[item[e] + 1];
    ++start[user[e] + 1];
  }
  exclusive_sum(item_start);
  exclusive_sum(start);
  const std::unique_ptr<int32_t[]> users_by_item(new int32_t[pairs]);
  std::vector<int64_t> next(item_start.begin(), item_start.end() - 1);
  for (int64_t e = 0; e < pairs; ++e) {
    users_by_item[next[item[e]]++] = static_cast<int32_t>(user[e]);
  }
  // Walking the items in order fills every user's group in order.
  std::unique_ptr<int32_t[]> grouped(new int32_t[pairs]);
  next.assign(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < num_items; ++i) {
    for (int64_t e = item_start[i]; e < item_start[i + 1]; ++e) {
      grouped[next[users_by_item[e]]++] = static_cast<int32_t>(i);
    }
  }
  return grouped;
}

py::tuple build_graph(const Ids& users, const Ids& items, int64_t num_users, int64_t num_items) {
  if (users.ndim() != 1 || items.ndim() != 1 || users.size() != items.size()) {
    throw std::invalid_argument("build_graph: expected users and items of one equal length, got " +
                                std::to_string(users.size()) + " and " + std::to_string(items.size()));
  }
  if (num_users < 0 || num_items < 0 || num_users > INT32_MAX || num_items > INT32_MAX - num_users) {
    throw std::invalid_argument("build_graph: expected num_users + num_items in [0, 2^31), got " +
                                std::to_string(num_users) + " and " + std::to_string(num_items));
  }
  check(users, num_users, "users");
  check(items, num_items, "items");
  const int64_t nodes = num_users + num_items;
  py::array_t<int64_t> crow_array(nodes + 1);
  int64_t* crow = crow_array.mutable_data();
  std::unique_ptr<int32_t[]> grouped;
  std::vector<int64_t> start(num_users + 1, 0);
  {
    const py::gil_scoped_release release;
    grouped = items_by_user(users, items, num_items, start);
    std::fill(crow, crow + nodes + 1, int64_t{0});
    for (int64_t u = 0; u < num_users; ++u) {
      for (int64_t e = start[u]; e < start[u + 1]; ++e) {
        if (e == start[u] || grouped[e] != grouped[e - 1]) {
          ++crow[u + 1];
          ++crow[num_users + grouped[e] + 1];
        }
      }
    }
    for (int64_t i = 0; i < nodes; ++i) {
      crow[i + 1] += crow[i];
    }
  }
  py::array_t<int32_t> col_array(crow[nodes]);
  int32_t* col = col_array.mutable_data();
  {
    const py::gil_scoped_release release;
    std::vector<int64_t> next(crow, crow + nodes);
    for (int64_t u = 0; u < num_users; ++u) {
      for (int64_t e = start[u]; e < start[u + 1]; ++e) {
        if (e == start[u] || grouped[e] != grouped[e - 1]) {
          col[next[u]++] = static_cast<int32_t>(num_users + grouped[e]);
          col[next[num_users + grouped[e]]++] = static_cast<int32_t>(u);
        }
      }
    }
  }
  return py::make_tuple(crow_array, col_array);
}

}  // namespace

void bind_graph(py::module_& m) {
  m.def("build_graph", &build_graph, py::arg("users").noconvert(), py::arg("items").noconvert(), py::arg("num_users"),
        py::arg("num_items"),
        "(crow int64 [N+1], col int32 [nnz]) of the symmetric bipartite graph: duplicates merged, columns ascending.");
}
