// BPR negatives, counter-based: every row's draw depends on the seed, the epoch and the row's number alone.
//
// The NumPy twin and oracle, and the words' exact use, are in collm_fast/data/sampler.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// "BPRN": no other use of a seed shares this last counter word.
constexpr uint32_t kNegativeStream = 0x4250524Eu;
// Philox calls before the exact draw, four words each; the same number stands in sampler.py.
constexpr uint32_t kCalls = 8;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "sample_negatives: expected ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// A word as a number in [0, range): its high bits, no division.
inline int64_t scaled(uint32_t word, int64_t range) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(range)) >> 32);
}

int64_t draw(const int64_t* positives, int64_t count, int64_t num_items, uint64_t seed, uint32_t epoch, uint64_t row) {
  const uint32_t low = static_cast<uint32_t>(row);
  // Row numbers stay below 2^48, so the call's number has the upper half of the second counter word to itself.
  const uint32_t high = static_cast<uint32_t>(row >> 32);
  for (uint32_t call = 0; call < kCalls; ++call) {
    const collm::PhiloxWords words = collm::philox(seed, low, high | (call << 16), epoch, kNegativeStream);
    for (const uint32_t word : words.word) {
      const int64_t item = 1 + scaled(word, num_items - 1);
      if (!std::binary_search(positives, positives + count, item)) {
        return item;
      }
    }
  }
  // A user who likes nearly everything: the k-th item that is not a positive, exactly.
  const collm::PhiloxWords words = collm::philox(seed, low, high | (kCalls << 16), epoch, kNegativeStream);
  int64_t item = 1 + scaled(words.word[0], num_items - 1 - count);
  for (int64_t place = 0; place < count && positives[place] <= item; ++place) {
    ++item;
  }
  return item;
}

py::array_t<int64_t> sample_negatives(const Array<int64_t>& users, const Array<int64_t>& offsets,
                                      const Array<int64_t>& positives, int64_t num_items, int64_t seed, int64_t epoch,
                                      int64_t first_row) {
  const int64_t num_users = offsets.size() - 1, n = users.size();
  const int64_t *user = users.data(), *at = offsets.data(), *positive = positives.data();
  if (num_items < 2 || num_items > INT32_MAX) {
    fail("num_items in [2, ", INT32_MAX, "], got ", num_items);
  }
  if (first_row < 0 || first_row > (int64_t{1} << 48) - n || epoch < 0 || epoch > UINT32_MAX) {
    fail("first_row and epoch in [0, 2^48 - n] and [0, 2^32), got ", first_row, " and ", epoch);
  }
  if (num_users < 0 || at[0] != 0 || at[num_users] != positives.size()) {
    fail("offsets from 0 to ", positives.size(), ", got others");
  }
  py::array_t<int64_t> out(n);
  int64_t* to = out.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t row = 0; row < n; ++row) {
      if (user[row] < 0 || user[row] >= num_users) {
        fail("users in [0, ", num_users, "), got ", user[row], " in row ", row);
      }
      const int64_t begin = at[user[row]], end = at[user[row] + 1];
      if (begin < 0 || begin > end || end > positives.size()) {
        fail("offsets that do not decrease, got ", begin, " and ", end, " for user ", user[row]);
      }
      if (end - begin >= num_items - 1) {
        fail("an item that user ", user[row], " has not, got all ", num_items - 1, " items as positives");
      }
      to[row] = draw(positive + begin, end - begin, num_items, static_cast<uint64_t>(seed),
                     static_cast<uint32_t>(epoch), static_cast<uint64_t>(first_row + row));
    }
  }
  return out;
}

}  // namespace

void bind_sampler(py::module_& m) {
  m.def("sample_negatives", &sample_negatives, py::arg("users").noconvert(), py::arg("offsets").noconvert(),
        py::arg("positives").noconvert(), py::arg("num_items"), py::arg("seed"), py::arg("epoch"), py::arg("first_row"),
        "One negative item for each row; see collm_fast.data.sampler.sample_negatives.");
}
