// top_items: for each user the k items with the largest dot product that the user has not seen, exactly.
//
// Its twin in torch, and the checks of what a user passes, are in collm_fast/ranking.py; the loop over D is in
// ranking_kernel.h. Scores are compared in registers with the last of each user's k best so far, and only those that
// reach it are written: about k ln(I / k) of I. Items pass by the longest first, |u . i| is at most |u| |i|, and so a
// user leaves once no item left can be long enough.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
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
  bool (*tile)(const T* users, const T* items, int64_t D, const T* threshold, T* scores, uint32_t* reached);
  int users, items;
};
constexpr int kMaxUsers = 12, kMaxTile = kMaxUsers * 32;
constexpr int kPanels = 8;  // so many tiles a user, then it is asked who is done

#define COLLM_LOOPS "../host/ranking_kernel.h"
#include "../cpu/each_isa.h"

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

// The items in the order they pass by: the longest embedding first.
struct Order {
  std::vector<int32_t> item;
  std::vector<double> length;
};

// |x|, with no overflow or underflow on the way.
template <typename T>
double length(const T* x, int64_t D) {
  double largest = 0, sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    largest = std::max(largest, std::abs(static_cast<double>(x[d])));
  }
  for (int64_t d = 0; d < D && largest > 0; ++d) {
    const double part = x[d] / largest;
    sum += part * part;
  }
  return largest * std::sqrt(sum);
}

template <typename T>
Order longest_first(const Tables<T>& tables) {
  std::vector<double> lengths(tables.items);
  for (int64_t i = 0; i < tables.items; ++i) {
    lengths[i] = length(tables.item + i * tables.D, tables.D);
  }
  Order order{std::vector<int32_t>(tables.items), std::vector<double>(tables.items)};
  std::iota(order.item.begin(), order.item.end(), 0);
  std::stable_sort(order.item.begin(), order.item.end(), [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
  for (int64_t i = 0; i < tables.items; ++i) {
    order.length[i] = lengths[order.item[i]];
  }
  return order;
}

// These rows of table [*, D] as [groups, D, width], missing rows as zeros: what a tile reads in order.
template <typename T>
void pack(const T* table, const int32_t* rows, int64_t count, int64_t D, int64_t width, T* to) {
  for (; count > 0; rows += width, count -= width) {
    const int64_t present = std::min(width, count);
    for (int64_t d = 0; d < D; ++d, to += width) {
      for (int64_t row = 0; row < present; ++row) {
        to[row] = table[rows[row] * D + d];
      }
      std::fill(to + present, to + width, T(0));
    }
  }
}

// Whether an ascending list holds the item. Without branches on what it holds: they would be mispredicted.
inline bool contains(const int32_t* list, int64_t size, int32_t item) {
  if (size == 0) {
    return false;
  }
  while (size > 1) {
    const int64_t half = size / 2;
    list += list[half] <= item ? half : 0;
    size -= half;
  }
  return *list == item;
}

// The lists of a block of users while the items pass by, and the places in tiles of those who still need more items.
template <typename T>
class Block {
 public:
  Block(const Tables<T>& tables, const Kernel<T>& kernel, int64_t k, int64_t height)
      : tables_(tables),
        kernel_(kernel),
        k_(k),
        // Room for as many again before a list is cut back to k.
        capacity_(std::min(2 * k + 16, std::max(tables.items, k))),
        entries_(height * capacity_),
        count_(height),
        last_(height),
        length_(height),
        packed_((height + kernel.users - 1) / kernel.users * kernel.users * tables.D),
        threshold_((height + kernel.users - 1) / kernel.users * kernel.users) {}

  void start(int64_t first, int64_t users) {
    first_ = first;
    active_.resize(users);
    std::iota(active_.begin(), active_.end(), 0);
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(last_.begin(), last_.end(), Entry<T>{-std::numeric_limits<T>::infinity(), INT32_MAX});
    for (int64_t u = 0; u < users; ++u) {
      length_[u] = length(tables_.user + (first + u) * tables_.D, tables_.D);
    }
    seat();
  }

  // Users whom no item of at most this length can serve any more leave; false once nobody is left. As |u . i| is at
  // most |u| |i|, this loses nothing; the factor and the last term are more than the rounding of u . i and of the
  // lengths.
  bool dismiss(double item_length) {
    const double D = static_cast<double>(tables_.D);
    const double factor = item_length * (1 + (2 * D + 8) * std::numeric_limits<T>::epsilon());
    const double least = D * std::numeric_limits<T>::min();
    const auto done = [&](int32_t u) { return length_[u] * factor + least < last_[u].score; };
    const int64_t left = active_.size() - std::count_if(active_.begin(), active_.end(), done);
    // Moving users costs about two panels of their products.
    if (left < static_cast<int64_t>(active_.size()) * 7 / 8 || left == 0) {
      std::erase_if(active_, done);
      seat();
    }
    return left > 0;
  }

  // The scores of one panel of items with everybody who is left.
  void pass(const T* packed_items, const int32_t* items, int64_t count) {
    T scores[kMaxTile];
    uint32_t reached[kMaxUsers];
    const int64_t users = active_.size();
    const uint32_t present = count >= 32 ? ~0u : (1u << count) - 1;
    for (int64_t place = 0; place < users; place += kernel_.users) {
      if (kernel_.tile(packed_.data() + place * tables_.D, packed_items, tables_.D, &threshold_[place], scores,
                       reached)) {
        for (int64_t row = 0; row < std::min<int64_t>(kernel_.users, users - place); ++row) {
          if ((reached[row] & present) != 0) {
            const int32_t user = active_[place + row];
            add(user, items, scores + row * kernel_.items, reached[row] & present);
            threshold_[place + row] = last_[user].score;
          }
        }
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
  void seat() {
    pack(tables_.user + first_ * tables_.D, active_.data(), active_.size(), tables_.D, kernel_.users, packed_.data());
    // A place without a user lets nothing pass.
    std::fill(threshold_.begin(), threshold_.end(), std::numeric_limits<T>::infinity());
    for (size_t place = 0; place < active_.size(); ++place) {
      threshold_[place] = last_[active_[place]].score;
    }
  }

  void add(int32_t user, const int32_t* items, const T* scores, uint32_t reached) {
    const int64_t begin = tables_.begin[first_ + user], size = tables_.end[first_ + user] - begin;
    Entry<T>* entries = entries_.data() + user * capacity_;
    for (; reached != 0; reached &= reached - 1) {
      const int lane = std::countr_zero(reached);
      const Entry<T> entry{scores[lane], items[lane]};
      if (!(entry < last_[user]) || contains(tables_.seen + begin, size, entry.item)) {
        continue;
      }
      entries[count_[user]++] = entry;
      if (count_[user] == capacity_) {
        std::nth_element(entries, entries + k_ - 1, entries + capacity_);
        last_[user] = entries[k_ - 1];
        count_[user] = k_;
      }
    }
  }

  const Tables<T>& tables_;
  const Kernel<T>& kernel_;
  int64_t k_, capacity_, first_ = 0;
  std::vector<Entry<T>> entries_;
  std::vector<int64_t> count_;
  std::vector<Entry<T>> last_;  // what a new item must precede: the k-th of those seen when the list was last cut
  std::vector<double> length_;
  std::vector<int32_t> active_;
  std::vector<T> packed_, threshold_;
};

// Users [first, last), `height` at a time: their packed rows stay in the cache while the items pass by once.
template <typename T>
void rank_users(const Tables<T>& tables, const Order& order, int64_t k, int64_t height, int64_t first, int64_t last,
                int64_t* items, T* scores) {
  const Kernel<T> kernel = collm::kernel<T>();
  // Blocks of about equal height; a height may be as large as a number can be.
  const int64_t blocks = (last - first) / height + ((last - first) % height != 0);
  height = blocks == 0 ? 0 : (last - first + blocks - 1) / blocks;
  std::vector<T> panel(kernel.items * tables.D);
  Block<T> block(tables, kernel, k, height);
  for (; first < last; first += height) {
    const int64_t rows = std::min(height, last - first);
    block.start(first, rows);
    for (int64_t i = 0; i < tables.items; i += kernel.items) {
      if (i % (kPanels * kernel.items) == 0 && !block.dismiss(order.length[i])) {
        break;
      }
      const int64_t count = std::min<int64_t>(kernel.items, tables.items - i);
      pack(tables.item, order.item.data() + i, count, tables.D, kernel.items, panel.data());
      block.pass(panel.data(), order.item.data() + i, count);
    }
    for (int64_t u = 0; u < rows; ++u) {
      block.finish(u, items + (first + u) * k, scores + (first + u) * k);
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
    const Order order = longest_first(tables);
    // Fewer users than fill a tile are not worth a thread.
    parallel_blocks(tables.users, threads, kMaxTile / 16, [&](int64_t first, int64_t last) {
      rank_users(tables, order, k, height, first, last, to_items, to_scores);
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
