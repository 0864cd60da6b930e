// The layout of a packed batch of prompt trees; its NumPy twin and oracle is packing.plan_tree_numpy.
//
// Works on NumPy arrays and is bounds checked throughout: a bad array is a ValueError, never a read outside it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace py = pybind11;

namespace {

// No forcecast: an array of another dtype is refused instead of copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "plan_tree: expected ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

struct Prompts {
  const int64_t* offsets;
  const int32_t* token_ids;
  const uint8_t* slot_role;
  const int32_t* slot_id;

  int64_t length(int64_t row) const { return offsets[row + 1] - offsets[row]; }

  // How many of the first `most` tokens two rows have in common.
  int64_t common(int64_t row, int64_t other, int64_t most) const {
    const int64_t a = offsets[row], b = offsets[other];
    int64_t same = 0;
    while (same < most && token_ids[a + same] == token_ids[b + same] && slot_id[a + same] == slot_id[b + same] &&
           slot_role[a + same] == slot_role[b + same]) {
      ++same;
    }
    return same;
  }
};

struct Tree {
  std::vector<int64_t> branches;  // places in `rows`
  int64_t prefix = 0;
};

void check(const Array<int64_t>& offsets, int64_t total, const Array<uint8_t>& slot_role, const Array<int32_t>& slot_id,
           int64_t n, const Array<int64_t>& rows) {
  if (slot_role.size() != total || slot_id.size() != total) {
    fail("token_ids, slot_role and slot_id of one length, got ", total, ", ", slot_role.size(), " and ",
         slot_id.size());
  }
  const int64_t* at = offsets.data();
  if (offsets.size() != n + 1 || at[0] != 0 || at[n] != total) {
    fail(n + 1, " offsets from 0 to ", total, ", got ", offsets.size(), " others");
  }
  for (int64_t b = 0; b < rows.size(); ++b) {
    const int64_t row = rows.data()[b];
    if (row < 0 || row >= n) {
      fail("rows in [0, ", n, "), got ", row);
    }
    if (at[row] < 0 || at[row] >= at[row + 1] || at[row + 1] > total) {
      fail("at least one token in every row, got none in row ", row);
    }
  }
}

std::vector<Tree> grow(const Prompts& prompts, const int64_t* group, const int64_t* rows, int64_t num_rows) {
  std::vector<Tree> trees;
  std::unordered_map<int64_t, size_t> number;
  for (int64_t b = 0; b < num_rows; ++b) {
    const int64_t row = rows[b];
    const auto [place, is_new] = number.emplace(group[row], trees.size());
    if (is_new) {
      trees.emplace_back();
    }
    Tree& tree = trees[place->second];
    const int64_t most = prompts.length(row) - 1;
    // Every row keeps at least its last token for itself: that is where its answer is read.
    tree.prefix = is_new ? most : prompts.common(rows[tree.branches[0]], row, std::min(tree.prefix, most));
    tree.branches.push_back(b);
  }
  return trees;
}

py::tuple plan_tree(const Array<int64_t>& offsets, const Array<int32_t>& token_ids, const Array<uint8_t>& slot_role,
                    const Array<int32_t>& slot_id, const Array<int64_t>& group, const Array<int64_t>& rows) {
  check(offsets, token_ids.size(), slot_role, slot_id, group.size(), rows);
  const Prompts prompts{offsets.data(), token_ids.data(), slot_role.data(), slot_id.data()};
  std::vector<Tree> trees;
  int64_t total = 0;
  {
    py::gil_scoped_release release;
    trees = grow(prompts, group.data(), rows.data(), rows.size());
    for (const Tree& tree : trees) {
      total += tree.prefix;
      for (const int64_t b : tree.branches) {
        total += prompts.length(rows.data()[b]) - tree.prefix;
      }
    }
  }
  py::array_t<int64_t> source(total), position(total), answer(rows.size());
  py::array_t<int32_t> tree_of(total), branch_of(total);
  int64_t *to_source = source.mutable_data(), *to_position = position.mutable_data(),
          *to_answer = answer.mutable_data();
  int32_t *to_tree = tree_of.mutable_data(), *to_branch = branch_of.mutable_data();
  const int64_t* from = rows.data();
  {
    py::gil_scoped_release release;
    int64_t t = 0;
    for (size_t number = 0; number < trees.size(); ++number) {
      const auto put = [&](int64_t row, int64_t begin, int64_t end, int64_t branch) {
        for (int64_t place = begin; place < end; ++place, ++t) {
          to_source[t] = prompts.offsets[row] + place;
          to_position[t] = place;
          to_tree[t] = static_cast<int32_t>(number);
          to_branch[t] = static_cast<int32_t>(branch);
        }
      };
      const Tree& tree = trees[number];
      put(from[tree.branches[0]], 0, tree.prefix, -1);
      for (const int64_t b : tree.branches) {
        put(from[b], tree.prefix, prompts.length(from[b]), b);
        to_answer[b] = t - 1;
      }
    }
  }
  return py::make_tuple(source, position, tree_of, branch_of, answer);
}

}  // namespace

void bind_planner(py::module_& m) {
  m.def("plan_tree", &plan_tree, py::arg("offsets").noconvert(), py::arg("token_ids").noconvert(),
        py::arg("slot_role").noconvert(), py::arg("slot_id").noconvert(), py::arg("group").noconvert(),
        py::arg("rows").noconvert(),
        "(source, position, tree, branch, answer) of a packed batch; see collm_fast.data.packing.plan_tree.");
}
