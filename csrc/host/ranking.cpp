// top_items: for each user the k items with the largest dot product that the user has not seen, exactly.
//
// Its twin in torch, and the checks of what a user passes, are in collm_fast/ranking.py; the loop over D is in
// ranking_kernel.h. Scores are compared in registers with the last of each user's k best so far, and only those that
// pass are written: about k ln(I / k) of I.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../cpu/isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace collm {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// The tile of one instruction set: `users` users by `items` items.
template <typename T>
struct Kernel {
  bool (*tile)(const T* users, const T* items, int64_t D, const T* threshold, T* scores, uint32_t* above);
  int users, items;
};
constexpr int kMaxTile = 12 * 32;

namespace baseline {
#define COLLM_LANE_BYTES 16
#include "ranking_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define COLLM_LANE_BYTES 32
#include "ranking_kernel.h"
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
#include "ranking_kernel.h"
#undef COLLM_LANE_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename T>
Kernel<T> kernel() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    return avx512::kernel<T>();
  }
  if (isa() == Isa::avx2) {
    return avx2::kernel<T>();
  }
#endif
  return baseline::kernel<T>();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "top_items: expected ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <typename T>
struct Entry {
  T score;
  int32_t item;

  // Equal scores: the lower item id comes first.
  bool operator<(const Entry& other) const {
    return score > other.score || (score == other.score && item < other.item);
  }
};

template <typename T>
struct Tables {
  const T *user, *item;
  int64_t users, items, D;
  // The user's seen items: seen[begin[u]] .. seen[end[u] - 1], ascending.
  const int64_t *begin, *end;
  const int32_t* seen;
  int64_t seen_size;
};

// Rows first .. first + rows of table [*, D] as [groups, D, width], missing rows as zeros: what a tile reads in order.
template <typename T>
void pack(const T* table, int64_t first, int64_t rows, int64_t D, int64_t width, T* to) {
  for (int64_t group = 0; group < rows; group += width) {
    const int64_t count = std::min(width, rows - group);
    for (int64_t d = 0; d < D; ++d, to += width) {
      const T* from = table + (first + group) * D + d;
      for (int64_t row = 0; row < count; ++row) {
        to[row] = from[row * D];
      }
      std::fill(to + count, to + width, T(0));
    }
  }
}

// The lists of some users, filled while the items pass by in ascending order.
template <typename T>
class Selection {
 public:
  Selection(const Tables<T>& tables, int64_t k, int64_t height, int64_t width)
      : tables_(tables),
        k_(k),
        // Room for as many again before the list is cut back to k.
        capacity_(std::min(2 * k + 16, std::max(tables.items, k))),
        entries_(height * capacity_),
        count_(height),
        next_seen_(height),
        threshold_((height + width - 1) / width * width) {}

  void start(int64_t first, int64_t users) {
    first_ = first;
    // A place in a tile that has no user lets nothing pass.
    std::fill(threshold_.begin(), threshold_.end(), std::numeric_limits<T>::infinity());
    std::fill_n(threshold_.begin(), users, -std::numeric_limits<T>::infinity());
    std::fill(count_.begin(), count_.end(), 0);
    std::copy_n(tables_.begin + first, users, next_seen_.begin());
  }

  const T* threshold(int64_t user) const { return threshold_.data() + user; }

  // Scores of the items first_item, first_item + 1, .. whose bits are set.
  void add(int64_t user, int64_t first_item, const T* scores, uint32_t above) {
    const int64_t end = tables_.end[first_ + user];
    int64_t& next = next_seen_[user];
    Entry<T>* entries = entries_.data() + user * capacity_;
    for (; above != 0; above &= above - 1) {
      const int lane = std::countr_zero(above);
      const int64_t item = first_item + lane;
      while (next < end && tables_.seen[next] < item) {
        ++next;
      }
      if (item >= tables_.items || (next < end && tables_.seen[next] == item) || !(scores[lane] > threshold_[user])) {
        continue;
      }
      entries[count_[user]++] = {scores[lane], static_cast<int32_t>(item)};
      if (count_[user] == capacity_) {
        // Every later item has a higher id: one that only equals the k-th score does not belong.
        std::nth_element(entries, entries + k_ - 1, entries + capacity_);
        threshold_[user] = entries[k_ - 1].score;
        count_[user] = k_;
      }
    }
  }

  void finish(int64_t user, int64_t* items, T* scores) {
    Entry<T>* entries = entries_.data() + user * capacity_;
    const int64_t filled = std::min(count_[user], k_);
    std::partial_sort(entries, entries + filled, entries + count_[user]);
    for (int64_t place = 0; place < k_; ++place) {
      items[place] = place < filled ? entries[place].item : -1;
      scores[place] = place < filled ? entries[place].score : -std::numeric_limits<T>::infinity();
    }
  }

 private:
  const Tables<T>& tables_;
  int64_t k_, capacity_, first_ = 0;
  std::vector<Entry<T>> entries_;
  std::vector<int64_t> count_, next_seen_;
  std::vector<T> threshold_;
};

// Users [first, last), `height` at a time: their packed rows stay in the cache while all items pass by once.
template <typename T>
void rank_users(const Tables<T>& tables, int64_t k, int64_t height, int64_t first, int64_t last, int64_t* items,
                T* scores) {
  const Kernel<T> kernel = collm::kernel<T>();
  const int64_t D = tables.D, blocks = (last - first + height - 1) / height;
  height = blocks == 0 ? 0 : (last - first + blocks - 1) / blocks;
  const int64_t groups = (height + kernel.users - 1) / kernel.users;
  std::vector<T> user(groups * kernel.users * D), item(kernel.items * D);
  Selection<T> selection(tables, k, height, kernel.users);
  T tile[kMaxTile];
  uint32_t above[kMaxTile];
  for (; first < last; first += height) {
    const int64_t rows = std::min(height, last - first);
    pack(tables.user, first, rows, D, kernel.users, user.data());
    selection.start(first, rows);
    for (int64_t panel = 0; panel < tables.items; panel += kernel.items) {
      pack(tables.item, panel, std::min<int64_t>(kernel.items, tables.items - panel), D, kernel.items, item.data());
      for (int64_t u = 0; u < rows; u += kernel.users) {
        if (kernel.tile(user.data() + u * D, item.data(), D, selection.threshold(u), tile, above)) {
          for (int64_t row = 0; row < kernel.users; ++row) {
            if (above[row] != 0) {
              selection.add(u + row, panel, tile + row * kernel.items, above[row]);
            }
          }
        }
      }
    }
    for (int64_t u = 0; u < rows; ++u) {
      selection.finish(u, items + (first + u) * k, scores + (first + u) * k);
    }
  }
}

template <typename T>
py::tuple top_items(const Array<T>& user, const Array<T>& item, const Array<int64_t>& begin, const Array<int64_t>& end,
                    const Array<int32_t>& seen, int64_t k, int64_t height, int64_t threads) {
  if (user.ndim() != 2 || item.ndim() != 2 || user.shape(1) != item.shape(1) || item.shape(0) > INT32_MAX) {
    fail("user [U, D] and item [I, D] with I < 2^31, got others");
  }
  const Tables<T> tables{user.data(),  item.data(), user.shape(0), item.shape(0), user.shape(1),
                         begin.data(), end.data(),  seen.data(),   seen.size()};
  if (begin.size() != tables.users || end.size() != tables.users) {
    fail("begin and end of ", tables.users, " users, got ", begin.size(), " and ", end.size());
  }
  if (k < 1 || height < 1 || threads < 1) {
    fail("k, height and threads of at least 1, got ", k, ", ", height, " and ", threads);
  }
  for (int64_t u = 0; u < tables.users; ++u) {
    if (tables.begin[u] < 0 || tables.begin[u] > tables.end[u] || tables.end[u] > tables.seen_size) {
      fail("spans in [0, ", tables.seen_size, "], got ", tables.begin[u], " to ", tables.end[u], " for user ", u);
    }
  }
  Array<int64_t> items({tables.users, k});
  Array<T> scores({tables.users, k});
  int64_t* to_items = items.mutable_data();
  T* to_scores = scores.mutable_data();
  {
    const py::gil_scoped_release release;
    // Fewer users than fill a tile are not worth a thread.
    parallel_blocks(tables.users, threads, kMaxTile / 16, [&](int64_t first, int64_t last) {
      rank_users(tables, k, height, first, last, to_items, to_scores);
    });
  }
  return py::make_tuple(items, scores);
}

template <typename T>
void bind(py::module_& m) {
  m.def("top_items", &top_items<T>, py::arg("user").noconvert(), py::arg("item").noconvert(),
        py::arg("begin").noconvert(), py::arg("end").noconvert(), py::arg("seen").noconvert(), py::arg("k"),
        py::arg("height"), py::arg("threads"),
        "(items int64 [U, k], scores [U, k]); see collm_fast.ranking.top_items.");
}

}  // namespace
}  // namespace collm

void bind_ranking(py::module_& m) {
  collm::bind<float>(m);
  collm::bind<double>(m);
}
