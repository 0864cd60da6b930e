// build_graph: unsorted (user, item) pairs to the arrays of a BipartiteGraph, in parallel.
//
// Its NumPy twin is in collm_fast/graph.py; the sorts are in radix.h. Every pass but one reads and writes in order:
//   1. the pairs are checked and spread, as 64-bit keys, over ranges of users small enough for a core's cache;
//   2. each range is sorted there by (user, item) and written without duplicates: the users' half of col;
//   3. that half, in order, is spread over ranges of items;
//   4. each range, whose users ascend, is counted and written by item: the items' half of col.
// Memory beside the output: one key for each pair.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "host/parallel.h"
#include "host/radix.h"

namespace py = pybind11;

namespace {

constexpr int64_t kBlock = 2048;  // ids converted at once
// A range's pairs should fit, twice, a core's cache, and so should one line for each range.
constexpr int64_t kRangePairs = 1 << 15;
constexpr int kMaxRangeBits = 11;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "BipartiteGraph: expected ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// An array that becomes a NumPy array without a copy. Not initialised; on huge pages where it is large and the system
// has them: 4 KB pages would cost as many faults as the passes cost time.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    constexpr size_t kHugePage = size_t{1} << 21;
    const size_t needed = std::max<size_t>(1, static_cast<size_t>(count) * sizeof(T));
    const size_t unit = needed >= 4 * kHugePage ? kHugePage : 64;
    const size_t bytes = (needed + unit - 1) / unit * unit;
    data_ = static_cast<T*>(std::aligned_alloc(unit, bytes));
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
#if defined(__linux__)
    if (unit == kHugePage) {
      madvise(data_, bytes, MADV_HUGEPAGE);  // advice: where it is refused, nothing is lost but time
    }
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }

  // Gives back the memory behind the first `count` elements.
  void shrink(int64_t count) {
    if (void* smaller = std::realloc(data_, std::max<size_t>(1, static_cast<size_t>(count) * sizeof(T)))) {
      data_ = static_cast<T*>(smaller);
    }
    count_ = count;
  }

  py::array_t<T> to_numpy() && {
    T* data = std::exchange(data_, nullptr);
    return py::array_t<T>(count_, data, py::capsule(data, [](void* owned) { std::free(owned); }));
  }

 private:
  T* data_;
  int64_t count_;
};

// One array of ids, of any integer type and stride.
struct Ids {
  const char* name;
  const char* data;
  int64_t stride;  // bytes
  int64_t limit;
  // Converts ids [first, first + count); whether all lie in [0, limit).
  bool (*load)(const Ids& ids, int64_t first, int64_t count, uint32_t* out);
  std::string (*text)(const Ids& ids, int64_t row);
};

template <typename T>
T id_at(const Ids& ids, int64_t row) {
  return *reinterpret_cast<const T*>(ids.data + row * ids.stride);
}

template <typename T>
bool load(const Ids& ids, int64_t first, int64_t count, uint32_t* out) {
  const uint64_t limit = static_cast<uint64_t>(ids.limit);
  bool outside = false;
  if (ids.stride == sizeof(T)) {
    const T* from = reinterpret_cast<const T*>(ids.data) + first;
    for (int64_t k = 0; k < count; ++k) {
      outside |= static_cast<uint64_t>(from[k]) >= limit;  // a negative id becomes a huge one
      out[k] = static_cast<uint32_t>(from[k]);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) {
      const T id = id_at<T>(ids, first + k);
      outside |= static_cast<uint64_t>(id) >= limit;
      out[k] = static_cast<uint32_t>(id);
    }
  }
  return !outside;
}

template <typename T>
Ids ids_as(const py::array& array, const char* name, int64_t limit) {
  return {
      name, static_cast<const char*>(array.data()), array.strides(0), limit, load<T>, [](const Ids& ids, int64_t row) {
        return std::to_string(id_at<T>(ids, row));
      }};
}

template <typename... Ts>
Ids ids_of_any(const py::array& array, const char* name, int64_t limit) {
  Ids ids{};
  if (array.ndim() != 1) {
    fail(name, " of one dimension, got ", array.ndim());
  }
  if (!((py::isinstance<py::array_t<Ts>>(array) && (ids = ids_as<Ts>(array, name, limit), true)) || ...)) {
    fail(name, " of an integer dtype in native byte order, got ", py::str(array.dtype()).cast<std::string>());
  }
  return ids;
}

Ids ids_of(const py::array& array, const char* name, int64_t limit) {
  return ids_of_any<int64_t, int32_t, int16_t, int8_t, uint64_t, uint32_t, uint16_t, uint8_t>(array, name, limit);
}

// Loads a block, or fails with the first id outside.
void load_block(const Ids& ids, int64_t first, int64_t count, uint32_t* out) {
  if (!ids.load(ids, first, count, out)) [[unlikely]] {
    for (int64_t row = first;; ++row) {
      if (!ids.load(ids, row, 1, out)) {
        fail(ids.name, " in [0, ", ids.limit, "), got ", ids.text(ids, row), " at row ", row);
      }
    }
  }
}

// [0, limit) in ranges of 2^shift ids.
struct Ranges {
  int shift;
  int64_t limit, count;

  Ranges(int64_t limit, int64_t pairs) : limit(limit) {
    // 2^bits ranges at most: one for every kRangePairs pairs.
    const int bits = std::min<int>(kMaxRangeBits, std::bit_width(static_cast<uint64_t>(pairs / kRangePairs)));
    shift = std::max<int>(
        0, static_cast<int>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(limit, 1) - 1))) - bits);
    count = ((limit - 1) >> shift) + 1;
  }
  int64_t begin(int64_t range) const { return range << shift; }
  int64_t end(int64_t range) const { return std::min((range + 1) << shift, limit); }
};

// counts[part][range] become the places of each part's keys: by range, then by part. Returns where the ranges begin.
std::vector<int64_t> places(std::vector<std::vector<int64_t>>& counts, int64_t ranges) {
  std::vector<int64_t> begin(ranges + 1);
  int64_t sum = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    begin[r] = sum;
    for (std::vector<int64_t>& part : counts) {
      sum += std::exchange(part[r], sum);
    }
  }
  begin[ranges] = sum;
  return begin;
}

struct Builder {
  Ids users, items;
  int64_t pairs, num_users, num_items, threads;
  int64_t* crow;

  // f(part, first, last) for equal parts of [0, n), one a thread.
  template <typename F>
  void for_parts(int64_t n, const F& f) const {
    collm::parallel_blocks(threads, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        f(part, n * part / threads, n * (part + 1) / threads);
      }
    });
  }

  // f(range, part) for every range, by whichever thread is free: popular items make some ranges far larger than others.
  template <typename F>
  void for_ranges(int64_t count, const F& f) const {
    std::atomic<int64_t> next{0};
    for_parts(threads, [&](int64_t part, int64_t, int64_t) {
      for (int64_t range = next++; range < count; range = next++) {
        f(range, part);
      }
    });
  }

  // Pass 1. Keys are (user in its range, item).
  std::vector<int64_t> spread_pairs(const Ranges& ranges, int item_bits, uint64_t* keys) const {
    std::vector<std::vector<int64_t>> counts(threads, std::vector<int64_t>(ranges.count));
    for_parts(pairs, [&](int64_t part, int64_t first, int64_t last) {
      std::array<uint32_t, kBlock> user;
      std::vector<int64_t>& count = counts[part];
      for (int64_t row = first; row < last; row += kBlock) {
        const int64_t n = std::min(kBlock, last - row);
        load_block(users, row, n, user.data());
        for (int64_t k = 0; k < n; ++k) {
          ++count[user[k] >> ranges.shift];
        }
      }
    });
    std::vector<int64_t> begin = places(counts, ranges.count);
    const uint32_t low = (uint32_t{1} << ranges.shift) - 1;
    for_parts(pairs, [&](int64_t part, int64_t first, int64_t last) {
      std::array<uint32_t, kBlock> user, item;
      collm::radix::Spreader spreader(keys, std::move(counts[part]));
      for (int64_t row = first; row < last; row += kBlock) {
        const int64_t n = std::min(kBlock, last - row);
        load_block(users, row, n, user.data());
        load_block(items, row, n, item.data());
        for (int64_t k = 0; k < n; ++k) {
          spreader.put(user[k] >> ranges.shift, uint64_t{user[k] & low} << item_bits | item[k]);
        }
      }
      spreader.finish();
    });
    return begin;
  }

  // Pass 2. The items of each user as nodes, ascending, without duplicates; crow up to num_users becomes final.
  // Returns the number of edges.
  int64_t write_users(const Ranges& ranges, const std::vector<int64_t>& begin, int item_bits, uint64_t* keys,
                      int32_t* col) const {
    int64_t largest = 0;
    for (int64_t r = 0; r < ranges.count; ++r) {
      largest = std::max(largest, begin[r + 1] - begin[r]);
    }
    std::vector<std::vector<uint64_t>> scratch(threads);
    std::vector<int64_t> kept(ranges.count);
    for_ranges(ranges.count, [&](int64_t range, int64_t part) {
      scratch[part].resize(std::min(largest, collm::radix::kSortKeys));
      int64_t* degree = crow + 1 + ranges.begin(range);
      std::fill(degree, crow + 1 + ranges.end(range), 0);
      int32_t *const first = col + begin[range], *to = first;
      uint64_t last = ~uint64_t{0};
      const auto write = [&](const uint64_t* sorted, int64_t count) {
        for (int64_t k = 0; k < count; ++k) {
          if (sorted[k] != last) {
            last = sorted[k];
            *to++ = static_cast<int32_t>(num_users + static_cast<int64_t>(last & ((uint64_t{1} << item_bits) - 1)));
            ++degree[last >> item_bits];
          }
        }
      };
      collm::radix::for_sorted(keys + begin[range], scratch[part].data(), begin[range + 1] - begin[range],
                               item_bits + ranges.shift, write);
      kept[range] = to - first;
    });
    // Close the gaps that duplicates left.
    int64_t edges = 0;
    for (int64_t r = 0; r < ranges.count; ++r) {
      if (edges != begin[r]) {
        std::memmove(col + edges, col + begin[r], kept[r] * sizeof(int32_t));
      }
      edges += kept[r];
    }
    crow[0] = 0;
    for (int64_t u = 0; u < num_users; ++u) {
      crow[u + 1] += crow[u];
    }
    return edges;
  }

  // Calls f(user, item) for edges [first, last) of the users' half.
  template <typename F>
  void walk(const int32_t* col, int64_t first, int64_t last, const F& f) const {
    int64_t user = std::upper_bound(crow, crow + num_users + 1, first) - crow - 1;
    for (int64_t e = first; e < last; ++user) {
      for (const int64_t end = std::min(crow[user + 1], last); e < end; ++e) {
        f(user, col[e] - num_users);
      }
    }
  }

  // Pass 3. Keys are (item, user); in each range the users ascend.
  std::vector<int64_t> spread_edges(const Ranges& ranges, const int32_t* col, int64_t edges, uint64_t* keys) const {
    std::vector<std::vector<int64_t>> counts(threads, std::vector<int64_t>(ranges.count));
    for_parts(edges, [&](int64_t part, int64_t first, int64_t last) {
      std::vector<int64_t>& count = counts[part];
      for (int64_t e = first; e < last; ++e) {
        ++count[(col[e] - num_users) >> ranges.shift];
      }
    });
    std::vector<int64_t> begin = places(counts, ranges.count);
    for_parts(edges, [&](int64_t part, int64_t first, int64_t last) {
      collm::radix::Spreader spreader(keys, std::move(counts[part]));
      walk(col, first, last, [&](int64_t user, int64_t item) {
        spreader.put(item >> ranges.shift, static_cast<uint64_t>(item) << 32 | static_cast<uint64_t>(user));
      });
      spreader.finish();
    });
    return begin;
  }

  // Pass 4. The users of each item, ascending; crow from num_users on becomes final.
  void write_items(const Ranges& ranges, const std::vector<int64_t>& begin, const uint64_t* keys, int64_t edges,
                   int32_t* col) const {
    for_ranges(ranges.count, [&](int64_t range, int64_t) {
      // While an item is filled, crow[item + 1] is where its next user goes; in the end it is where the next item
      // begins.
      int64_t* next = crow + 1 + num_users;
      std::fill(next + ranges.begin(range), next + ranges.end(range), 0);
      for (int64_t k = begin[range]; k < begin[range + 1]; ++k) {
        ++next[keys[k] >> 32];
      }
      int64_t sum = edges + begin[range];
      for (int64_t i = ranges.begin(range); i < ranges.end(range); ++i) {
        sum += std::exchange(next[i], sum);
      }
      for (int64_t k = begin[range]; k < begin[range + 1]; ++k) {
        col[next[keys[k] >> 32]++] = static_cast<int32_t>(keys[k] & UINT32_MAX);
      }
    });
  }

  // All passes; returns the number of edges.
  int64_t build(int32_t* col, uint64_t* keys) const {
    if (pairs == 0) {
      std::fill(crow, crow + num_users + num_items + 1, 0);
      return 0;
    }
    const Ranges user_ranges(num_users, pairs), item_ranges(num_items, pairs);
    const int item_bits = std::bit_width(static_cast<uint64_t>(num_items - 1));
    const std::vector<int64_t> by_user = spread_pairs(user_ranges, item_bits, keys);
    const int64_t edges = write_users(user_ranges, by_user, item_bits, keys, col);
    const std::vector<int64_t> by_item = spread_edges(item_ranges, col, edges, keys);
    write_items(item_ranges, by_item, keys, edges, col);
    return edges;
  }
};

py::tuple build_graph(const py::array& users, const py::array& items, int64_t num_users, int64_t num_items,
                      int64_t threads) {
  if (num_users < 0 || num_items < 0 || num_users > INT32_MAX || num_items > INT32_MAX - num_users) {
    fail("num_users >= 0 and num_items >= 0 with a sum below 2^31, got ", num_users, " and ", num_items);
  }
  const Ids user = ids_of(users, "users", num_users), item = ids_of(items, "items", num_items);
  if (users.size() != items.size()) {
    fail("users and items of equal length, got ", users.size(), " and ", items.size());
  }
  const int64_t pairs = users.size(), nodes = num_users + num_items;
  const int64_t useful = std::clamp<int64_t>(pairs / kRangePairs, 1, std::max<int64_t>(1, threads));
  Buffer<int64_t> crow(nodes + 1);
  Buffer<int32_t> col(2 * pairs);
  Buffer<float> inv(nodes);
  {
    const py::gil_scoped_release release;
    const Builder builder{user, item, pairs, num_users, num_items, useful, crow.data()};
    {
      Buffer<uint64_t> keys(pairs);
      col.shrink(2 * builder.build(col.data(), keys.data()));
    }
    builder.for_parts(nodes, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t degree = crow.data()[i + 1] - crow.data()[i];
        inv.data()[i] = degree == 0 ? 0.0f : static_cast<float>(1.0 / std::sqrt(static_cast<double>(degree)));
      }
    });
  }
  return py::make_tuple(std::move(crow).to_numpy(), std::move(col).to_numpy(), std::move(inv).to_numpy());
}

}  // namespace

void bind_graph(py::module_& m) {
  m.def("build_graph", &build_graph, py::arg("users").noconvert(), py::arg("items").noconvert(), py::arg("num_users"),
        py::arg("num_items"), py::arg("threads"),
        "(crow int64 [N+1], col int32 [nnz], inv_sqrt_degree float32 [N]) of the symmetric bipartite graph: duplicates "
        "merged, columns ascending.");
}
