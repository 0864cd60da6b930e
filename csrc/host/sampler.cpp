// Samples for BPR, counter-based: every row's draw depends on the seed, the epoch and the row's number alone, so the
// number of threads changes nothing. And what a batch reads: its distinct nodes.
//
// The NumPy twins and oracles, and the words' exact use, are in collm_fast/data/sampler.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "philox.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// "BPRN" and "BPRT": no other use of a seed shares these last counter words.
constexpr uint32_t kNegativeStream = 0x4250524Eu;
constexpr uint32_t kTripleStream = 0x42505254u;
// Philox calls before the exact draw, four words each; the same number stands in sampler.py.
constexpr uint32_t kCalls = 8;
// Rows whose memory is fetched ahead together, and the least that is worth a thread.
constexpr int64_t kBlock = 32;
constexpr int64_t kGrain = 4096;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": expected ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// A word as a number in [0, range): its high bits, no division.
inline int64_t scaled(uint32_t word, int64_t range) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(range)) >> 32);
}

// The words of one row. Row numbers stay below 2^48, so the call's number has the upper half of the second counter
// word to itself.
struct Words {
  uint64_t seed;
  uint32_t epoch, stream;

  collm::PhiloxWords operator()(uint64_t row, uint32_t call) const {
    const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32) | (call << 16);
    return collm::philox(seed, low, high, epoch, stream);
  }
};

// Items first .. first + range - 1, of which `count` are positives, ascending.
template <typename T>
struct Candidates {
  const T* positives;
  int64_t count, first, range;

  bool take(uint32_t word, int64_t* item) const {
    *item = first + scaled(word, range);
    return !std::binary_search(positives, positives + count, static_cast<T>(*item));
  }

  // Words of calls `call` .. kCalls - 1 until one is no positive; then, for a user who likes nearly everything, the
  // k-th item that is none, exactly.
  int64_t draw(const Words& words, uint64_t row, uint32_t call) const {
    int64_t item;
    for (; call < kCalls; ++call) {
      for (const uint32_t word : words(row, call).word) {
        if (take(word, &item)) {
          return item;
        }
      }
    }
    item = first + scaled(words(row, kCalls).word[0], range - count);
    for (int64_t place = 0; place < count && positives[place] <= item; ++place) {
      ++item;
    }
    return item;
  }
};

void check_rows(const char* op, int64_t first_row, int64_t n, int64_t epoch) {
  if (first_row < 0 || first_row > (int64_t{1} << 48) - n || epoch < 0 || epoch > UINT32_MAX) {
    fail(op, "first_row and epoch in [0, 2^48 - n] and [0, 2^32), got ", first_row, " and ", epoch);
  }
}

py::array_t<int64_t> sample_negatives(const Array<int64_t>& users, const Array<int64_t>& offsets,
                                      const Array<int64_t>& positives, int64_t num_items, int64_t seed, int64_t epoch,
                                      int64_t first_row, int64_t threads) {
  constexpr const char* op = "sample_negatives";
  const int64_t num_users = offsets.size() - 1, n = users.size(), total = positives.size();
  const int64_t *user = users.data(), *at = offsets.data(), *positive = positives.data();
  if (num_items < 2 || num_items > INT32_MAX) {
    fail(op, "num_items in [2, ", INT32_MAX, "], got ", num_items);
  }
  check_rows(op, first_row, n, epoch);
  if (num_users < 0 || at[0] != 0 || at[num_users] != total) {
    fail(op, "offsets from 0 to ", total, ", got others");
  }
  const Words words{static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), kNegativeStream};
  py::array_t<int64_t> out(n);
  int64_t* to = out.mutable_data();
  py::gil_scoped_release release;
  collm::parallel_blocks(n, threads, kGrain, [&](int64_t begin_row, int64_t end_row) {
    for (int64_t row = begin_row; row < end_row; ++row) {
      if (user[row] < 0 || user[row] >= num_users) {
        fail(op, "users in [0, ", num_users, "), got ", user[row], " in row ", row);
      }
      const int64_t begin = at[user[row]], end = at[user[row] + 1];
      if (begin < 0 || begin > end || end > total) {
        fail(op, "offsets that do not decrease, got ", begin, " and ", end, " for user ", user[row]);
      }
      if (end - begin >= num_items - 1) {
        fail(op, "an item that user ", user[row], " has not, got all ", num_items - 1, " items as positives");
      }
      const Candidates<int64_t> candidates{positive + begin, end - begin, 1, num_items - 1};
      to[row] = candidates.draw(words, static_cast<uint64_t>(first_row + row), 0);
    }
  });
  return out;
}

// Users with a positive and with an item that is none; empty if all are such.
std::vector<int64_t> usable_users(const char* op, const int64_t* crow, int64_t num_users, int64_t num_items,
                                  int64_t nnz) {
  std::vector<int64_t> usable;
  usable.reserve(num_users);
  for (int64_t user = 0; user < num_users; ++user) {
    const int64_t begin = crow[user], end = crow[user + 1];
    if (begin < 0 || begin > end || end > nnz) {
      fail(op, "crow to rise from 0 to ", nnz, ", got ", begin, " and ", end, " for user ", user);
    }
    if (begin < end && end - begin < num_items) {
      usable.push_back(user);
    }
  }
  if (usable.empty()) {
    fail(op, "a user with a positive and with an item that is none, got none of ", num_users);
  }
  if (static_cast<int64_t>(usable.size()) == num_users) {
    usable.clear();
  }
  return usable;
}

py::array_t<int64_t> sample_triples(const Array<int64_t>& crow, const Array<int32_t>& col, int64_t num_users,
                                    int64_t num_items, int64_t count, int64_t seed, int64_t epoch, int64_t first_row,
                                    int64_t threads) {
  constexpr const char* op = "sample_triples";
  if (num_users < 1 || num_items < 1 || num_users + num_items > INT32_MAX || crow.size() <= num_users || count < 0) {
    fail(op, "1 <= num_users < len(crow), num_items >= 1 and count >= 0, got ", num_users, ", ", num_items, " and ",
         count, " with ", crow.size(), " of crow");
  }
  check_rows(op, first_row, count, epoch);
  const int64_t* at = crow.data();
  const int32_t* node = col.data();
  const std::vector<int64_t> usable = usable_users(op, at, num_users, num_items, col.size());
  const int64_t choices = usable.empty() ? num_users : static_cast<int64_t>(usable.size());
  const Words words{static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch), kTripleStream};
  py::array_t<int64_t> out({int64_t{3}, count});
  int64_t *users = out.mutable_data(), *positives = users + count, *negatives = positives + count;
  py::gil_scoped_release release;
  collm::parallel_blocks(count, threads, kGrain, [&](int64_t begin_row, int64_t end_row) {
    collm::PhiloxWords drawn[kBlock];
    for (int64_t block = begin_row; block < end_row; block += kBlock) {
      // Three passes over a few rows: every draw reads memory at random, and the waits overlap this way.
      const int64_t rows = std::min(kBlock, end_row - block);
      for (int64_t i = 0; i < rows; ++i) {
        drawn[i] = words(static_cast<uint64_t>(first_row + block + i), 0);
        const int64_t choice = scaled(drawn[i].word[0], choices);
        users[block + i] = usable.empty() ? choice : usable[choice];
        __builtin_prefetch(at + users[block + i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t begin = at[users[block + i]], degree = at[users[block + i] + 1] - begin;
        positives[block + i] = begin + scaled(drawn[i].word[1], degree);
        __builtin_prefetch(node + positives[block + i]);
        __builtin_prefetch(node + begin + degree / 2);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = block + i, begin = at[users[row]], degree = at[users[row] + 1] - begin;
        positives[row] = node[positives[row]] - num_users;
        if (positives[row] < 0 || positives[row] >= num_items) {
          fail(op, "items of users as nodes in [", num_users, ", ", num_users + num_items, "), got ",
               positives[row] + num_users, " for user ", users[row]);
        }
        const Candidates<int32_t> candidates{node + begin, degree, num_users, num_items};
        int64_t item;
        if (!candidates.take(drawn[i].word[2], &item) && !candidates.take(drawn[i].word[3], &item)) {
          item = candidates.draw(words, static_cast<uint64_t>(first_row + row), 1);
        }
        negatives[row] = item - num_users;
      }
    }
  });
  return out;
}

// One batch's distinct nodes, ascending: found in a bitmap of all nodes, which costs less than sorting the batch.
struct DistinctNodes {
  std::vector<uint64_t> seen;
  std::vector<int32_t> slot;  // [N], valid for the nodes of the present batch
  int64_t num_nodes;

  explicit DistinctNodes(int64_t nodes) : seen((nodes + 63) / 64), slot(nodes), num_nodes(nodes) {}

  void mark(const int64_t* node, int64_t n, int64_t first) {
    for (int64_t i = 0; i < n; ++i) {
      if (node[i] < 0 || node[i] >= num_nodes) {
        fail("batch_rows", "nodes in [0, ", num_nodes, "), got ", node[i], " in row ", first + i);
      }
      seen[node[i] >> 6] |= uint64_t{1} << (node[i] & 63);
    }
  }

  void collect(std::vector<int64_t>* rows) {
    for (size_t word = 0; word < seen.size(); ++word) {
      for (uint64_t bits = seen[word]; bits != 0; bits &= bits - 1) {
        const int64_t node = static_cast<int64_t>(word) * 64 + std::countr_zero(bits);
        slot[node] = static_cast<int32_t>(rows->size());
        rows->push_back(node);
      }
      seen[word] = 0;
    }
  }
};

template <typename T>
py::array_t<T> joined(const std::vector<std::vector<T>>& parts, int64_t total) {
  py::array_t<T> out(total);
  T* to = out.mutable_data();
  for (const std::vector<T>& part : parts) {
    to = std::copy(part.begin(), part.end(), to);
  }
  return out;
}

py::tuple batch_rows(const Array<int64_t>& nodes, int64_t num_nodes, int64_t batch_size, int64_t threads) {
  if (nodes.ndim() != 2 || num_nodes < 0 || num_nodes > INT32_MAX || batch_size < 1) {
    fail("batch_rows", "nodes [C, n], num_nodes in [0, 2^31) and batch_size >= 1, got ", nodes.ndim(), " dimensions, ",
         num_nodes, " and ", batch_size);
  }
  const int64_t columns = nodes.shape(0), n = nodes.shape(1), batches = n / batch_size + (n % batch_size != 0);
  const int64_t* node = nodes.data();
  py::array_t<int64_t> slots({columns, n}), offsets(batches + 1);
  int64_t *slot_of = slots.mutable_data(), *offset = offsets.mutable_data();
  std::vector<std::vector<int64_t>> rows(batches);
  std::vector<std::vector<float>> counts(batches);
  {
    py::gil_scoped_release release;
    collm::parallel_blocks(batches, threads, 1, [&](int64_t first, int64_t last) {
      DistinctNodes distinct(num_nodes);
      for (int64_t batch = first; batch < last; ++batch) {
        const int64_t begin = batch * batch_size, size = std::min(batch_size, n - begin);
        for (int64_t c = 0; c < columns; ++c) {
          distinct.mark(node + c * n + begin, size, begin);
        }
        rows[batch].reserve(std::min(columns * size, num_nodes));
        distinct.collect(&rows[batch]);
        counts[batch].assign(rows[batch].size(), 0.0f);
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t i = c * n + begin; i < c * n + begin + size; ++i) {
            slot_of[i] = distinct.slot[node[i]];
            counts[batch][slot_of[i]] += 1.0f;
          }
        }
      }
    });
    offset[0] = 0;
    for (int64_t batch = 0; batch < batches; ++batch) {
      offset[batch + 1] = offset[batch] + static_cast<int64_t>(rows[batch].size());
    }
  }
  return py::make_tuple(slots, offsets, joined(rows, offset[batches]), joined(counts, offset[batches]));
}

}  // namespace

void bind_sampler(py::module_& m) {
  m.def("sample_negatives", &sample_negatives, py::arg("users").noconvert(), py::arg("offsets").noconvert(),
        py::arg("positives").noconvert(), py::arg("num_items"), py::arg("seed"), py::arg("epoch"), py::arg("first_row"),
        py::arg("threads") = 1, "One negative item for each row; see collm_fast.data.sampler.sample_negatives.");
  m.def("sample_triples", &sample_triples, py::arg("crow").noconvert(), py::arg("col").noconvert(),
        py::arg("num_users"), py::arg("num_items"), py::arg("count"), py::arg("seed"), py::arg("epoch"),
        py::arg("first_row"), py::arg("threads") = 1,
        "(user, positive, negative) samples; see collm_fast.data.sampler.sample_triples.");
  m.def("batch_rows", &batch_rows, py::arg("nodes").noconvert(), py::arg("num_nodes"), py::arg("batch_size"),
        py::arg("threads") = 1, "The distinct nodes of each batch; see collm_fast.data.sampler.batches_of.");
}
