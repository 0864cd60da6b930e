// What the kernels of path_attention share: where a tree's keys and queries lie, and who sees whom.
//
// A task is one key head of one tree. Its rows are (token, query head of that key head), so that all of them meet the
// same keys. A key stands in a column of its tree; a kernel says at which columns a run of keys may begin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lora_rows.h"

namespace collm::attention {

using lora::round_up;

// A run of keys that follow one another in memory, and in a path.
struct Run {
  int64_t begin, size;  // in the past or the own keys
  bool past;
  int64_t column, position;  // its first key's column in the tree and position in the path
};

constexpr size_t kMaxRuns = 4;  // of a path: the past and own keys of its prefix, and of its branch

struct Path {
  int64_t query, asked, keys;  // the first query of `asked`, the last of `keys` positions
  std::vector<Run> runs;
};

struct Tree {
  std::vector<Run> runs;
  std::vector<Path> paths;
  int64_t columns = 0, longest = 0;  // columns of the tree, and of its widest path
};

// Vectors of d numbers that are dense each.
template <typename T>
struct Rows {
  const T* data;
  int64_t head, token;  // strides
};

template <typename T>
struct Problem {
  int64_t heads, key_heads, width;  // query heads, key heads, d
  int64_t queries, tokens;
  float scale;
  int64_t window;  // 0: none
  Rows<T> query, key, value, past_key, past_value, grad;
  float* sums;                         // [heads][queries]: log2 of the softmax's sum
  T *out, *d_query, *d_key, *d_value;  // [Q][h][d], [h][Q][d], [hk][T][d], [T][hk][d]

  int64_t repeat() const { return heads / key_heads; }
  const Rows<T>& keys(bool past) const { return past ? past_key : key; }
  const Rows<T>& values(bool past) const { return past ? past_value : value; }
};

// A row of a path: its token there and which of the key head's query heads it is.
struct Row {
  int64_t token, head;

  COLLM_INLINE Row(int64_t row, int64_t repeat) : token(row / repeat), head(row % repeat) {}
  COLLM_INLINE void next(int64_t repeat) {
    if (++head == repeat) {
      head = 0;
      ++token;
    }
  }
};

// The keys of a run that a token of a path sees: [begin, end).
struct Seen {
  int64_t begin, end;
};

COLLM_INLINE Seen seen_by(int64_t window, const Path& path, const Run& run, int64_t token) {
  const int64_t position = path.keys - path.asked + token;
  const int64_t oldest = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  const int64_t end = std::clamp<int64_t>(position + 1 - run.position, 0, run.size);
  return {std::min(end, std::max<int64_t>(0, oldest - run.position)), end};
}

}  // namespace collm::attention
