// path_attention by vectors of float32, compiled once for each instruction set: attention.cpp includes this file
// several times, each time inside another namespace and with another COLLM_LANE_BYTES, so there is no include guard and
// nothing but lane_kernel.h is included here.
//
// The scores of a block of rows, their softmax and the sums behind it stay in the caches. All operands are widened to
// float32 where they are packed, all sums are float32, results are rounded once. Nothing depends on the number of
// threads.

#include "lane_kernel.h"

constexpr int64_t kLanes = COLLM_LANE_BYTES / 4;
constexpr int kVectors = 3;                            // of columns in a product's inner block,
constexpr int kSums = COLLM_LANE_BYTES == 64 ? 8 : 4;  // and its rows: 24 of 32 or 12 of 16 registers
constexpr int64_t kPanel = kVectors * kLanes;          // columns packed together; a run of keys begins at a panel
constexpr int64_t kBlock = 48;                         // rows: their scores stay in the first-level cache, or nearly

static_assert(kLanes % kSums == 0 && kBlock % kSums == 0);  // what is filled up to whole vectors has whole rows of sums

typedef Vector<float, COLLM_LANE_BYTES> Lanes;
typedef Vector<int32_t, COLLM_LANE_BYTES> Places;
typedef Vector<uint32_t, COLLM_LANE_BYTES> Words;

COLLM_INLINE Lanes load_lanes(const float* from) {
  Lanes value;
  load<COLLM_LANE_BYTES>(from, value);
  return value;
}
COLLM_INLINE void store_lanes(Lanes value, float* to) { store<COLLM_LANE_BYTES>(value, to); }
// Not a sum: 0 + value is not value where that is -0, so it would cost an addition.
COLLM_INLINE Lanes all_lanes(float value) { return value - Lanes{}; }

// Memory of one thread, all of it float32, cut for the largest of its trees. Terms [panels][d][kPanel] have a
// contraction along d, rows [columns][d] one along the keys; d is filled up to whole vectors with zeros.
struct Scratch {
  float *key_terms, *value_terms, *key_rows, *value_rows;
  float *query, *grad, *scores, *d_weights, *sums, *factor;
  float *d_keys, *d_values;

  template <typename Take>
  void cut(int64_t width, int64_t columns, int64_t longest, bool gradient, const Take& take) {
    const int64_t wide = round_up(width, kLanes), keys = columns * wide, rows = kBlock * wide;
    take(key_terms, keys), take(query, rows), take(scores, kBlock * longest), take(sums, rows);
    if (gradient) {
      take(value_terms, keys), take(key_rows, keys), take(grad, rows), take(d_weights, kBlock * longest);
      take(d_keys, keys), take(d_values, keys);
    } else {
      take(value_rows, keys), take(factor, kBlock);
    }
  }
};

// One block of rows: for each of its path's runs where its columns begin in the block's rows, and how many keys count.
struct Block {
  const Path& path;
  int64_t begin, end, rows;  // rows of the path, and their number filled up
  std::array<int64_t, kMaxRuns + 1> at;
  std::array<int64_t, kMaxRuns> counted;

  COLLM_INLINE Block(int64_t window, int64_t repeat, const Path& path_, int64_t begin_)
      : path(path_), begin(begin_), end(std::min(begin_ + kBlock, path_.asked * repeat)) {
    rows = round_up(end - begin, kSums);
    at[0] = 0;
    for (size_t s = 0; s < path.runs.size(); ++s) {
      counted[s] = seen_by(window, path, path.runs[s], (end - 1) / repeat).end;
      at[s + 1] = at[s] + round_up(counted[s], kLanes);
    }
  }
  COLLM_INLINE int64_t width() const { return at[path.runs.size()]; }
};

// --- products ------------------------------------------------------------------------------------------------------
// a(i, t) = data[i row + t term]; b(t, j) = data[t term + j]; both float32.
struct Left {
  const float* data;
  int64_t row, term;
};
struct Right {
  const float* data;
  int64_t term;
};

template <int COUNT>
COLLM_INLINE void sums_of(Left a, Right b, float* c, int64_t stride, int64_t terms, bool add) {
  Lanes sum[kSums][COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      sum[i][j] = add ? load_lanes(c + i * stride + j * kLanes) : Lanes{};
    }
  }
  for (int64_t t = 0; t < terms; ++t, a.data += a.term, b.data += b.term) {
    Lanes right[COUNT];
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      right[j] = load_lanes(b.data + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      const Lanes left = all_lanes(a.data[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; ++j) {
        sum[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      store_lanes(sum[i][j], c + i * stride + j * kLanes);
    }
  }
}

// c [m][n] (+)= a [m][terms] b [terms][n]: m a multiple of kSums, n of kLanes and at most a panel.
inline void product_panel(Left a, Right b, float* c, int64_t stride, int64_t m, int64_t n, int64_t terms, bool add) {
  for (int64_t i = 0; i < m; i += kSums, a.data += kSums * a.row, c += kSums * stride) {
    switch (n / kLanes) {
      case 1:
        sums_of<1>(a, b, c, stride, terms, add);
        break;
      case 2:
        sums_of<2>(a, b, c, stride, terms, add);
        break;
      default:
        sums_of<3>(a, b, c, stride, terms, add);
    }
  }
}

// The same for any n; b's columns stand side by side.
inline void product(Left a, Right b, float* c, int64_t stride, int64_t m, int64_t n, int64_t terms, bool add) {
  for (int64_t j = 0; j < n;) {
    // Four vectors are two and two: three and one would leave registers idle.
    const int64_t left = n - j, take = left == 4 * kLanes ? 2 * kLanes : std::min(kPanel, left);
    product_panel(a, {b.data + j, b.term}, c + j, stride, m, take, terms, add);
    j += take;
  }
}

// scores [rows][width] of the block's rows in `left` against keys or values in `terms`.
inline void against(const Block& b, int64_t wide, const float* left, const float* terms, float* scores) {
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    for (int64_t k = 0; k < b.counted[s]; k += kPanel) {
      const Right right{terms + (b.path.runs[s].column + k) * wide, kPanel};
      const int64_t n = std::min(kPanel, round_up(b.counted[s] - k, kLanes));
      product_panel({left, wide, 1}, right, scores + b.at[s] + k, b.width(), b.rows, n, wide, false);
    }
  }
}

// sums [rows][wide] = weights [rows][width] of keys or values in `rows`.
inline void over(const Block& b, int64_t wide, const float* weights, const float* rows, float* sums) {
  bool add = false;
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    if (b.counted[s] > 0) {
      const Left left{weights + b.at[s], b.width(), 1};
      product(left, {rows + b.path.runs[s].column * wide, wide}, sums, wide, b.rows, wide, b.counted[s], add);
      add = true;
    }
  }
}

// sums [columns][wide] += weights [rows][width]^T right [rows][wide], for the keys that have a gradient.
inline void collect(const Block& b, int64_t wide, const float* weights, const float* right, float* sums) {
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    if (!b.path.runs[s].past && b.counted[s] > 0) {
      const Left left{weights + b.at[s], 1, b.width()};
      float* to = sums + b.path.runs[s].column * wide;
      product(left, {right, wide}, to, wide, round_up(b.counted[s], kSums), wide, b.end - b.begin, true);
    }
  }
}

// --- packing -------------------------------------------------------------------------------------------------------
template <typename T>
COLLM_INLINE void widen_row(const T* from, float* to, int64_t width, int64_t wide) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Lanes value;
    load<COLLM_LANE_BYTES>(from + d, value);
    store_lanes(value, to + d);
  }
  for (; d < width; ++d) {
    to[d] = static_cast<float>(from[d]);
  }
  for (; d < wide; ++d) {
    to[d] = 0.0f;
  }
}

// A tree's keys or values of one head, in either form or in both.
template <typename T>
void pack(const Problem<T>& p, const Tree& tree, int64_t head, bool values, float* terms, float* rows) {
  const int64_t wide = round_up(p.width, kLanes);
  for (const Run& run : tree.runs) {
    const Rows<T>& source = values ? p.values(run.past) : p.keys(run.past);
    const T* from = source.data + head * source.head + run.begin * source.token;
    for (int64_t k = 0; rows != nullptr && k < run.size; ++k) {
      widen_row(from + k * source.token, rows + (run.column + k) * wide, p.width, wide);
    }
    for (int64_t k = 0; terms != nullptr && k < run.size; k += kLanes) {
      float* to = terms + (run.column + k / kPanel * kPanel) * wide + k % kPanel;
      const int64_t keys = std::min(kLanes, run.size - k);
      for (int64_t d = 0; d < wide; d += kLanes) {
        // A square of one vector each way, turned in registers or the first-level cache.
        float square[kLanes][kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const T* key = from + (k + std::min(i, keys - 1)) * source.token;
          widen_row(key + d, square[i], i < keys ? std::min(kLanes, p.width - d) : 0, kLanes);
        }
        for (int64_t j = 0; j < kLanes; ++j) {
          for (int64_t i = 0; i < kLanes; ++i) {
            to[(d + j) * kPanel + i] = square[i][j];
          }
        }
      }
    }
  }
}

// The block's rows into `to` [rows][wide], zero where there is none.
template <typename T>
void gather(const Problem<T>& p, const Rows<T>& source, const Block& b, int64_t head, float* to) {
  const int64_t wide = round_up(p.width, kLanes), repeat = p.repeat();
  Row row(b.begin, repeat);
  for (int64_t r = b.begin; r < b.end; ++r, row.next(repeat), to += wide) {
    const T* from = source.data + (head * repeat + row.head) * source.head + (b.path.query + row.token) * source.token;
    widen_row(from, to, p.width, wide);
  }
  std::fill(to, to + (b.rows - (b.end - b.begin)) * wide, 0.0f);
}

template <typename T>
COLLM_INLINE void narrow_row(const float* from, float factor, T* to, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    store<COLLM_LANE_BYTES>(load_lanes(from + d) * factor, to + d);
  }
  for (; d < width; ++d) {
    to[d] = static_cast<T>(from[d] * factor);
  }
}

// The block's sums [rows][wide], each row times its factor where there are some, to rows at (head, token).
template <typename T>
void write(const Problem<T>& p, const Block& b, int64_t head, const float* sums, const float* factor, T* out,
           int64_t head_stride, int64_t token_stride) {
  const int64_t wide = round_up(p.width, kLanes), repeat = p.repeat();
  Row row(b.begin, repeat);
  for (int64_t r = 0; r < b.end - b.begin; ++r, row.next(repeat), sums += wide) {
    T* to = out + (head * repeat + row.head) * head_stride + (b.path.query + row.token) * token_stride;
    narrow_row(sums, factor == nullptr ? 1.0f : factor[r], to, p.width);
  }
}

// --- softmax -------------------------------------------------------------------------------------------------------
// 2^x for x <= 0, or what rounding leaves above, within 2 ulp; 0 below -126. A nan stays one.
COLLM_INLINE Lanes power(Lanes x) {
  constexpr float kLeast = -126.0f, kShift = 12582912.0f;  // 1.5 2^23: the low bits are the rounded number
  const Lanes capped = x < kLeast ? all_lanes(kLeast) : x;
  const Lanes shifted = capped + kShift, f = capped - (shifted - kShift);
  Lanes y = all_lanes(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
    y = y * f + c;
  }
  const Words exponent = ((Words)shifted + 127u) << 23;
  return x < kLeast ? Lanes{} : y * (Lanes)exponent;
}

COLLM_INLINE float sum_lanes(Lanes value) {
  float lane[kLanes];
  store_lanes(value, lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lane[i] += lane[i + half];
    }
  }
  return lane[0];
}

COLLM_INLINE float most_lanes(Lanes value) {
  float lane[kLanes];
  store_lanes(value, lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    }
  }
  return lane[0];
}

// `value` where a row sees the key of the column, else `other`.
COLLM_INLINE Lanes where_seen(Seen seen, int64_t column, Lanes value, Lanes other) {
  if (seen.begin <= column && column + kLanes <= seen.end) {
    return value;
  }
  Places place;
  for (int32_t i = 0; i < kLanes; ++i) {
    place[i] = i;
  }
  const Places inside = (place >= static_cast<int32_t>(seen.begin - column)) &  // columns fit: 2^31 keys would not
                        (place < static_cast<int32_t>(seen.end - column));
  return inside ? value : other;
}

// What lanes of scores weigh, 2^(factor score - shift), and 0 where a row does not see the key.
COLLM_INLINE Lanes weights_of(Seen seen, int64_t column, Lanes scores, float factor, float shift) {
  if (column + kLanes <= seen.begin || column >= seen.end) {
    return Lanes{};
  }
  return where_seen(seen, column, power(scores * factor - shift), Lanes{});
}

// Scores become weights, not yet divided by their sum.
template <typename T>
void weigh(const Problem<T>& p, const Block& b, int64_t head, Scratch& z) {
  const float factor = p.scale * 1.44269504f;
  const int64_t width = b.width(), repeat = p.repeat();
  const size_t runs = b.path.runs.size();
  std::array<Seen, kMaxRuns> seen;
  Row row(b.begin, repeat);
  for (int64_t r = 0; r < b.end - b.begin; ++r, row.next(repeat)) {
    float* x = z.scores + r * width;
    const Lanes none = all_lanes(-std::numeric_limits<float>::infinity());
    Lanes top = none;
    for (size_t s = 0; s < runs; ++s) {
      if (r == 0 || row.head == 0) {
        seen[s] = seen_by(p.window, b.path, b.path.runs[s], row.token);
      }
      for (int64_t j = seen[s].begin / kLanes * kLanes; j < seen[s].end; j += kLanes) {
        const Lanes v = where_seen(seen[s], j, load_lanes(x + b.at[s] + j) * factor, none);
        top = v > top ? v : top;
      }
    }
    const float most = most_lanes(top);
    Lanes sum{};
    for (size_t s = 0; s < runs; ++s) {
      float* to = x + b.at[s];
      for (int64_t j = 0; j < b.counted[s]; j += kLanes) {
        const Lanes v = weights_of(seen[s], j, load_lanes(to + j), factor, most);
        sum += v;
        store_lanes(v, to + j);
      }
    }
    const float total = sum_lanes(sum);
    z.factor[r] = 1.0f / total;
    p.sums[(head * repeat + row.head) * p.queries + b.path.query + row.token] = most + std::log2(total);
  }
}

// Scores become weights again, and dp becomes ds = scale p (dp - sum p dp).
template <typename T>
void weigh_backward(const Problem<T>& p, const Block& b, int64_t head, Scratch& z) {
  const float factor = p.scale * 1.44269504f;
  const int64_t width = b.width(), repeat = p.repeat();
  const size_t runs = b.path.runs.size();
  std::array<Seen, kMaxRuns> seen;
  Row row(b.begin, repeat);
  for (int64_t r = 0; r < b.end - b.begin; ++r, row.next(repeat)) {
    float *x = z.scores + r * width, *dp = z.d_weights + r * width;
    const float shift = p.sums[(head * repeat + row.head) * p.queries + b.path.query + row.token];
    Lanes sum{};
    for (size_t s = 0; s < runs; ++s) {
      if (r == 0 || row.head == 0) {
        seen[s] = seen_by(p.window, b.path, b.path.runs[s], row.token);
      }
      for (int64_t j = 0; j < b.counted[s]; j += kLanes) {
        float* at = x + b.at[s] + j;
        const Lanes v = weights_of(seen[s], j, load_lanes(at), factor, shift);
        sum += where_seen(seen[s], j, v * load_lanes(dp + b.at[s] + j), Lanes{});
        store_lanes(v, at);
      }
    }
    const float inner = sum_lanes(sum);
    for (size_t s = 0; s < runs; ++s) {
      for (int64_t j = 0; j < b.counted[s]; j += kLanes) {
        float* at = dp + b.at[s] + j;
        const Lanes v = load_lanes(x + b.at[s] + j) * (load_lanes(at) - inner) * p.scale;
        store_lanes(where_seen(seen[s], j, v, Lanes{}), at);
      }
    }
  }
}

// --- a task --------------------------------------------------------------------------------------------------------
template <typename T>
void forward(const Problem<T>& p, const Tree& tree, int64_t head, Scratch& z) {
  const int64_t wide = round_up(p.width, kLanes);
  pack(p, tree, head, false, z.key_terms, nullptr);
  pack(p, tree, head, true, nullptr, z.value_rows);
  for (const Path& path : tree.paths) {
    for (int64_t begin = 0; begin < path.asked * p.repeat(); begin += kBlock) {
      const Block b(p.window, p.repeat(), path, begin);
      gather(p, p.query, b, head, z.query);
      against(b, wide, z.query, z.key_terms, z.scores);
      weigh(p, b, head, z);
      over(b, wide, z.scores, z.value_rows, z.sums);
      write(p, b, head, z.sums, z.factor, p.out, p.width, p.heads * p.width);
    }
  }
}

template <typename T>
void backward(const Problem<T>& p, const Tree& tree, int64_t head, Scratch& z) {
  const int64_t wide = round_up(p.width, kLanes);
  pack(p, tree, head, false, z.key_terms, z.key_rows);
  pack(p, tree, head, true, z.value_terms, nullptr);
  std::fill(z.d_keys, z.d_keys + wide * tree.columns, 0.0f);
  std::fill(z.d_values, z.d_values + wide * tree.columns, 0.0f);
  for (const Path& path : tree.paths) {
    for (int64_t begin = 0; begin < path.asked * p.repeat(); begin += kBlock) {
      const Block b(p.window, p.repeat(), path, begin);
      gather(p, p.query, b, head, z.query);
      gather(p, p.grad, b, head, z.grad);
      against(b, wide, z.query, z.key_terms, z.scores);
      against(b, wide, z.grad, z.value_terms, z.d_weights);
      weigh_backward(p, b, head, z);
      over(b, wide, z.d_weights, z.key_rows, z.sums);
      write<T>(p, b, head, z.sums, nullptr, p.d_query, p.queries * p.width, p.width);
      collect(b, wide, z.d_weights, z.query, z.d_keys);
      collect(b, wide, z.scores, z.grad, z.d_values);
    }
  }
  for (const Run& run : tree.runs) {
    for (int64_t k = 0; !run.past && k < run.size; ++k) {
      const int64_t from = (run.column + k) * wide, token = run.begin + k;
      narrow_row(z.d_keys + from, 1.0f, p.d_key + (head * p.tokens + token) * p.width, p.width);
      narrow_row(z.d_values + from, 1.0f, p.d_value + (token * p.key_heads + head) * p.width, p.width);
    }
  }
}
