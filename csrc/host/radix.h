// Sorting of 64-bit keys for graph.cpp: spreading over buckets through one cache line each, and radix sorts of a
// bucket.
//
// What the keys mean, and which thread handles which, is in graph.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace collm::radix {

constexpr int64_t kLineKeys = 8;
// A bucket is sorted with scratch of its own size up to here; above, in place until its parts are that small.
constexpr int64_t kSortKeys = int64_t{1} << 18;

// Writes a full line past the caches: the line would only be read to be overwritten.
inline void write_line(uint64_t* to, const uint64_t* from) {
#if defined(__SSE2__)
  for (int64_t k = 0; k < kLineKeys; k += 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_load_si128(reinterpret_cast<const __m128i*>(from + k)));
  }
#else
  std::memcpy(to, from, kLineKeys * sizeof(uint64_t));
#endif
}

// Appends keys to buckets of one array. A key waits in its bucket's line until the line is full: thousands of write
// positions would each cost a miss of the caches and of the TLB, whole lines do not.
class Spreader {
 public:
  // `to` starts on a cache line; bucket b's keys go to to[begin[b]], to[begin[b] + 1], ...
  Spreader(uint64_t* to, std::vector<int64_t> begin)
      : to_(to), next_(begin), begin_(std::move(begin)), lines_(new Line[begin_.size()]) {}

  void put(int64_t bucket, uint64_t key) {
    const int64_t at = next_[bucket]++;
    lines_[bucket].key[at % kLineKeys] = key;
    if (at % kLineKeys == kLineKeys - 1) {
      const int64_t first = at + 1 - kLineKeys;
      if (first >= begin_[bucket]) [[likely]] {
        write_line(to_ + first, lines_[bucket].key);
      } else {
        copy(bucket, begin_[bucket], at + 1);
      }
    }
  }

  // Writes what still waits. The keys are only then all there.
  void finish() {
    for (size_t b = 0; b < next_.size(); ++b) {
      copy(b, std::max(begin_[b], next_[b] / kLineKeys * kLineKeys), next_[b]);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }

 private:
  struct alignas(64) Line {
    uint64_t key[kLineKeys];
  };

  // A line that another bucket or thread shares: only this one's keys of it.
  void copy(int64_t bucket, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      to_[at] = lines_[bucket].key[at % kLineKeys];
    }
  }

  uint64_t* to_;
  std::vector<int64_t> next_, begin_;
  std::unique_ptr<Line[]> lines_;
};

// Sorts by the low `bits` of the keys, least significant digit first. Returns where the sorted keys are: keys or
// scratch.
inline const uint64_t* sort_with_scratch(uint64_t* keys, uint64_t* scratch, int64_t count, int bits) {
  constexpr int kDigit = 11;
  constexpr int64_t kFew = 256;  // fewer keys than these are not worth the counters
  if (count <= kFew) {
    std::sort(keys, keys + count);
    return keys;
  }
  const int passes = std::max(1, (bits + kDigit - 1) / kDigit);
  const int digit = (bits + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  std::array<std::array<uint32_t, 1 << kDigit>, 6> counts;
  for (int pass = 0; pass < passes; ++pass) {
    std::fill_n(counts[pass].begin(), mask + 1, 0);
  }
  for (int64_t k = 0; k < count; ++k) {
    uint64_t key = keys[k];
    for (int pass = 0; pass < passes; ++pass, key >>= digit) {
      ++counts[pass][key & mask];
    }
  }
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t sum = 0;
    for (uint64_t d = 0; d <= mask; ++d) {
      sum += std::exchange(counts[pass][d], sum);
    }
    for (int64_t k = 0; k < count; ++k) {
      scratch[counts[pass][(keys[k] >> (pass * digit)) & mask]++] = keys[k];
    }
    std::swap(keys, scratch);
  }
  return keys;
}

// Calls emit(sorted, n) for stretches of the keys in ascending order. The keys differ in their low `bits` alone; they
// are moved about. `scratch` holds min(count, kSortKeys) keys.
template <typename Emit>
void for_sorted(uint64_t* keys, uint64_t* scratch, int64_t count, int bits, const Emit& emit) {
  if (count <= kSortKeys) {
    emit(sort_with_scratch(keys, scratch, count, bits), count);
    return;
  }
  if (bits == 0) {
    emit(keys, count);
    return;
  }
  // A bucket beyond the cache, such as a hub's: in place, most significant digit first (American flag sort).
  constexpr int kDigit = 8;
  const int digit = std::min(bits, kDigit), rest = bits - digit;
  const auto digit_of = [&](uint64_t key) { return (key >> rest) & ((uint64_t{1} << digit) - 1); };
  std::array<int64_t, (1 << kDigit) + 1> begin{};
  for (int64_t k = 0; k < count; ++k) {
    ++begin[digit_of(keys[k]) + 1];
  }
  for (int d = 0; d < 1 << kDigit; ++d) {
    begin[d + 1] += begin[d];
  }
  std::array<int64_t, 1 << kDigit> next;
  std::copy_n(begin.begin(), next.size(), next.begin());
  for (int d = 0; d < 1 << digit; ++d) {
    while (next[d] < begin[d + 1]) {
      uint64_t key = keys[next[d]];
      for (uint64_t of = digit_of(key); of != static_cast<uint64_t>(d); of = digit_of(key)) {
        std::swap(key, keys[next[of]++]);
      }
      keys[next[d]++] = key;
    }
  }
  for (int d = 0; d < 1 << digit; ++d) {
    for_sorted(keys + begin[d], scratch, begin[d + 1] - begin[d], rest, emit);
  }
}

}  // namespace collm::radix
