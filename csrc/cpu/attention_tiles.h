// path_attention in bfloat16 on AMX tiles: the scores of a block of queries, their softmax and the sums behind it stay
// in the second-level cache, and what a tree's paths share is packed into tiles once.
//
// Every run of keys begins at a multiple of kStep columns, and columns and rows between are zero. Scores and their
// gradient are float32 until the softmax has read them; weights and the scores' gradient are rounded to bfloat16 once,
// sums are float32. Nothing depends on the number of threads.
#pragma once

#include "attention_paths.h"
#include "lora_tiles.h"

#if defined(COLLM_X86)

#include <array>
#include <cmath>

namespace collm::attention::tiles {

using lora::avx512::first;
using lora::avx512::transpose;
using lora::tiles::configure;
using lora::tiles::kStep;
using lora::tiles::kTile;
using lora::tiles::pack_tile;
using lora::tiles::settle;

constexpr int64_t kBlock = 128;  // rows of one block: its scores and their gradient stay in the second-level cache

COLLM_INLINE int64_t padded(const Problem<uint16_t>& p) { return round_up(p.width, kStep); }

// Memory of one thread, cut for the largest of its trees.
struct Scratch {
  uint16_t *key_terms, *value_terms, *key_pairs, *value_pairs;  // by width and by key: see `pack`
  uint16_t *query, *grad, *weights, *d_scores;                  // rows of a block
  uint16_t *query_turned, *grad_turned, *weight_pairs, *score_pairs;
  float *scores, *d_weights, *sums, *factor, *d_keys, *d_values;

  template <typename Take>
  void cut(int64_t width, int64_t columns, int64_t longest, bool gradient, const Take& take) {
    const int64_t wide = round_up(width, kStep), keys = columns * wide, rows = kBlock * wide, block = kBlock * longest;
    take(key_terms, keys), take(query, rows), take(scores, block), take(sums, rows);
    take(gradient ? key_pairs : value_pairs, keys);
    if (gradient) {
      take(value_terms, keys), take(grad, rows), take(query_turned, rows), take(grad_turned, rows);
      take(d_scores, block), take(weight_pairs, block), take(score_pairs, block), take(d_weights, block);
      take(d_keys, keys), take(d_values, keys);
    } else {
      take(weights, block), take(factor, kBlock);
    }
  }
};

// c [m][n] (+)= a [m][k] b: m, n and k multiples of 32; a row by row, b in tiles.
struct Left {
  const uint16_t* data;
  int64_t stride;
};
struct Right {
  const uint16_t* data;
  int64_t step, next;  // from a step of k, and from sixteen columns, to the next
};

COLLM_TILES_INLINE void product(Left a, Right b, float* c, int64_t stride, int64_t m, int64_t n, int64_t k, bool add) {
  settle();
  const int64_t row = stride * 4, left = a.stride * 2;
  for (int64_t j = 0; j < n; j += 32) {
    for (int64_t i = 0; i < m; i += 32) {
      float* to = c + i * stride + j;
      if (add) {
        _tile_loadd(0, to, row);
        _tile_loadd(1, to + 16, row);
        _tile_loadd(2, to + 16 * stride, row);
        _tile_loadd(3, to + 16 * stride + 16, row);
      } else {
        lora::tiles::zero_sums();
      }
      const uint16_t *from = a.data + i * a.stride, *with = b.data + j / 16 * b.next;
      for (int64_t s = 0; s < k; s += kStep, from += kStep, with += b.step) {
        _tile_loadd(4, from, left);
        _tile_loadd(6, with, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, with + b.next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, from + 16 * a.stride, left);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, row);
      _tile_stored(1, to + 16, row);
      _tile_stored(2, to + 16 * stride, row);
      _tile_stored(3, to + 16 * stride + 16, row);
    }
  }
  settle();
}

// A tree's keys or values of one head: `terms` [d / 32][columns / 16] tiles, whose contraction runs along d, and
// `pairs` [columns / 32][d / 16] tiles, whose contraction runs along the keys.
COLLM_TILES_INLINE void pack(const Problem<uint16_t>& p, const Tree& tree, int64_t head, bool values, uint16_t* terms,
                             uint16_t* pairs) {
  const int64_t wide = padded(p);
  for (const Run& run : tree.runs) {
    const Rows<uint16_t>& rows = values ? p.values(run.past) : p.keys(run.past);
    const uint16_t* from = rows.data + head * rows.head + run.begin * rows.token;
    for (int64_t k = 0; k < round_up(run.size, kStep); k += 16) {
      const int64_t column = run.column + k, keys = run.size - k;
      for (int64_t d = 0; terms != nullptr && d < wide; d += kStep) {
        uint16_t* to = terms + (d / kStep * (tree.columns / 16) + column / 16) * kTile;
        pack_tile(from + k * rows.token + d, 1, rows.token, p.width - d, keys, to);
      }
      for (int64_t d = 0; pairs != nullptr && column % kStep == 0 && d < wide; d += 16) {
        uint16_t* to = pairs + (column / kStep * (wide / 16) + d / 16) * kTile;
        pack_tile(from + k * rows.token + d, rows.token, 1, keys, p.width - d, to);
      }
    }
  }
}

// The rows begin .. end - 1 of a path into `to` [32 n][wide], zero where there is none.
COLLM_TILES_INLINE void gather(const Problem<uint16_t>& p, const Rows<uint16_t>& rows, const Path& path, int64_t head,
                               int64_t begin, int64_t end, uint16_t* to) {
  const int64_t wide = padded(p), repeat = p.repeat();
  Row row(begin, repeat);
  for (int64_t r = begin; r < begin + round_up(end - begin, kStep); ++r, row.next(repeat), to += wide) {
    const uint16_t* from = rows.data + (head * repeat + row.head) * rows.head + (path.query + row.token) * rows.token;
    for (int64_t d = 0; d < wide; d += 16) {
      const __mmask16 exist = r < end ? first(p.width - d) : 0;
      _mm256_store_si256((__m256i*)(to + d), _mm256_maskz_loadu_epi16(exist, from + d));
    }
  }
}

// to [wide][rows] = from [rows][wide]^T
COLLM_TILES_INLINE void turn(const uint16_t* from, int64_t rows, int64_t wide, uint16_t* to) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t d = 0; d < wide; d += 32) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        v[i] = _mm512_loadu_si512(from + (r + i) * wide + d);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        uint16_t* at = to + (d + 2 * i) * rows + r;
        _mm256_store_si256((__m256i*)at, _mm512_cvtepi32_epi16(v[i]));
        _mm256_store_si256((__m256i*)(at + rows), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[i], 16)));
      }
    }
  }
}

// 2^x for x <= 0, within 2 ulp; 0 below -150.
COLLM_TILES_INLINE __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order a nan stays one
  const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(y, n);
}

COLLM_TILES_INLINE __mmask16 lanes(Seen seen, int64_t column) {
  return first(seen.end - column) & static_cast<__mmask16>(~first(seen.begin - column));
}

// One block of rows: for each of its path's runs where its columns begin in the block's rows, and how many count.
struct Block {
  const Path& path;
  int64_t begin, end, rows;  // rows of the path, and their number rounded up to kStep
  std::array<int64_t, kMaxRuns + 1> at;
  std::array<int64_t, kMaxRuns> counted;

  COLLM_INLINE Block(const Problem<uint16_t>& p, const Path& path_, int64_t begin_)
      : path(path_), begin(begin_), end(std::min(begin_ + kBlock, path_.asked * p.repeat())) {
    rows = round_up(end - begin, kStep);
    at[0] = 0;
    for (size_t s = 0; s < path.runs.size(); ++s) {
      counted[s] = round_up(seen_by(p.window, path, path.runs[s], (end - 1) / p.repeat()).end, kStep);
      at[s + 1] = at[s] + counted[s];
    }
  }
  COLLM_INLINE int64_t width() const { return at[path.runs.size()]; }
};

// scores [rows][width] of the block's rows in `left` against keys or values in `terms`.
COLLM_TILES_INLINE void against(const Problem<uint16_t>& p, const Tree& tree, const Block& b, const uint16_t* left,
                                const uint16_t* terms, float* scores) {
  const int64_t wide = padded(p);
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    const Right right{terms + b.path.runs[s].column / 16 * kTile, tree.columns / 16 * kTile, kTile};
    product({left, wide}, right, scores + b.at[s], b.width(), b.rows, b.counted[s], wide, false);
  }
}

// sums [rows][wide] = weights [rows][width] of keys or values in `pairs`.
COLLM_TILES_INLINE void over(const Problem<uint16_t>& p, const Block& b, const uint16_t* weights, const uint16_t* pairs,
                             float* sums) {
  const int64_t wide = padded(p), step = wide / 16 * kTile;
  bool add = false;
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    if (b.counted[s] > 0) {
      const Right right{pairs + b.path.runs[s].column / kStep * step, step, kTile};
      product({weights + b.at[s], b.width()}, right, sums, wide, b.rows, wide, b.counted[s], add);
      add = true;
    }
  }
}

COLLM_TILES_INLINE void weigh(const Problem<uint16_t>& p, const Block& b, int64_t head, Scratch& z) {
  const float factor = p.scale * 1.44269504f;
  const int64_t width = b.width(), repeat = p.repeat();
  const __m512 c = _mm512_set1_ps(factor);
  std::array<Seen, kMaxRuns> seen;
  Row row(b.begin, repeat);
  for (int64_t r = b.begin; r < b.begin + b.rows; ++r, row.next(repeat)) {
    const float* x = z.scores + (r - b.begin) * width;
    uint16_t* to = z.weights + (r - b.begin) * width;
    if (r >= b.end) {
      std::fill(to, to + width, uint16_t{0});
      continue;
    }
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (size_t s = 0; s < b.path.runs.size(); ++s) {
      if (r == b.begin || row.head == 0) {
        seen[s] = seen_by(p.window, b.path, b.path.runs[s], row.token);
      }
      for (int64_t j = seen[s].begin & ~15; j < seen[s].end; j += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_load_ps(x + b.at[s] + j), c);
        top = _mm512_mask_max_ps(top, lanes(seen[s], j), top, v);
      }
    }
    const float most = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (size_t s = 0; s < b.path.runs.size(); ++s) {
      for (int64_t j = 0; j < b.counted[s]; j += 16) {
        const __mmask16 some = lanes(seen[s], j);
        __m512 v = _mm512_setzero_ps();
        if (some) {
          v = _mm512_maskz_mov_ps(some, power(_mm512_fmsub_ps(_mm512_load_ps(x + b.at[s] + j), c, shift)));
          sum = _mm512_add_ps(sum, v);
        }
        _mm256_store_si256((__m256i*)(to + b.at[s] + j), (__m256i)_mm512_cvtneps_pbh(v));
      }
    }
    const float total = _mm512_reduce_add_ps(sum);
    z.factor[r - b.begin] = 1.0f / total;
    p.sums[(head * repeat + row.head) * p.queries + b.path.query + row.token] = most + std::log2(total);
  }
}

// The block's sums [rows][wide] in bfloat16, each times its factor where there are some, to rows at (head, token).
COLLM_TILES_INLINE void write(const Problem<uint16_t>& p, const Block& b, int64_t head, const float* sums,
                              const float* factor, uint16_t* out, int64_t head_stride, int64_t token_stride) {
  const int64_t wide = padded(p), repeat = p.repeat();
  Row row(b.begin, repeat);
  for (int64_t r = b.begin; r < b.end; ++r, row.next(repeat)) {
    const float* from = sums + (r - b.begin) * wide;
    const __m512 f = _mm512_set1_ps(factor == nullptr ? 1.0f : factor[r - b.begin]);
    uint16_t* to = out + (head * repeat + row.head) * head_stride + (b.path.query + row.token) * token_stride;
    for (int64_t d = 0; d < p.width; d += 16) {
      const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(from + d), f));
      _mm256_mask_storeu_epi16(to + d, first(p.width - d), v);
    }
  }
}

COLLM_TILES inline void forward(const Problem<uint16_t>& p, const Tree& tree, int64_t head, Scratch& z) {
  configure();
  pack(p, tree, head, false, z.key_terms, nullptr);
  pack(p, tree, head, true, nullptr, z.value_pairs);
  for (const Path& path : tree.paths) {
    for (int64_t begin = 0; begin < path.asked * p.repeat(); begin += kBlock) {
      const Block b(p, path, begin);
      gather(p, p.query, path, head, b.begin, b.end, z.query);
      against(p, tree, b, z.query, z.key_terms, z.scores);
      weigh(p, b, head, z);
      over(p, b, z.weights, z.value_pairs, z.sums);
      write(p, b, head, z.sums, z.factor, p.out, p.width, p.heads * p.width);
    }
  }
  _tile_release();
}

// The weights again, and ds = scale p (dp - sum p dp) from dp: both in pairs of rows, ds also row by row.
COLLM_TILES_INLINE void weigh_backward(const Problem<uint16_t>& p, const Block& b, int64_t head, Scratch& z) {
  const int64_t width = b.width(), repeat = p.repeat(), runs = b.path.runs.size();
  const __m512 c = _mm512_set1_ps(p.scale * 1.44269504f), scale = _mm512_set1_ps(p.scale);
  Row next(b.begin, repeat);
  for (int64_t r = b.begin; r < b.begin + b.rows; r += 2) {
    std::array<std::array<Seen, kMaxRuns>, 2> seen{};
    __m512 inner[2];
    for (int64_t i = 0; i < 2; ++i, next.next(repeat)) {
      float* x = z.scores + (r + i - b.begin) * width;
      const float* dp = z.d_weights + (r + i - b.begin) * width;
      __m512 sum = _mm512_setzero_ps();
      if (r + i < b.end) {
        const int64_t query = b.path.query + next.token;
        const __m512 shift = _mm512_set1_ps(p.sums[(head * repeat + next.head) * p.queries + query]);
        for (int64_t s = 0; s < runs; ++s) {
          seen[i][s] = seen_by(p.window, b.path, b.path.runs[s], next.token);
          for (int64_t j = seen[i][s].begin & ~15; j < seen[i][s].end; j += 16) {
            const int64_t at = b.at[s] + j;
            const __m512 v = power(_mm512_fmsub_ps(_mm512_load_ps(x + at), c, shift));
            _mm512_store_ps(x + at, v);
            sum = _mm512_mask3_fmadd_ps(v, _mm512_load_ps(dp + at), sum, lanes(seen[i][s], j));
          }
        }
      }
      inner[i] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    }
    const int64_t row = r - b.begin, pair = row / kStep * (width / 16) * kTile + row % kStep / 2 * 32;
    for (int64_t s = 0; s < runs; ++s) {
      for (int64_t j = 0; j < b.counted[s]; j += 16) {
        const int64_t at = b.at[s] + j;
        __m512i both[2], d_both[2];
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
          const __mmask16 some = lanes(seen[i][s], j);
          const int64_t place = (row + i) * width + at;
          const __m512 v = _mm512_maskz_loadu_ps(some, z.scores + place);
          const __m512 dp = _mm512_sub_ps(_mm512_loadu_ps(z.d_weights + place), inner[i]);
          const __m512 ds = _mm512_maskz_mul_ps(some, _mm512_mul_ps(v, dp), scale);
          const __m256i d_half = (__m256i)_mm512_cvtneps_pbh(ds);
          _mm256_store_si256((__m256i*)(z.d_scores + place), d_half);
          both[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
          d_both[i] = _mm512_cvtepu16_epi32(d_half);
        }
        const int64_t to = pair + at / 16 * kTile;
        _mm512_store_si512(z.weight_pairs + to, _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16)));
        _mm512_store_si512(z.score_pairs + to, _mm512_or_si512(d_both[0], _mm512_slli_epi32(d_both[1], 16)));
      }
    }
  }
}

// sums [wide][columns] += left [rows][wide]^T right [rows][width], for the keys that have a gradient.
COLLM_TILES_INLINE void collect(const Problem<uint16_t>& p, const Tree& tree, const Block& b, const uint16_t* turned,
                                const uint16_t* pairs, float* sums) {
  for (size_t s = 0; s < b.path.runs.size(); ++s) {
    if (!b.path.runs[s].past) {
      const Right right{pairs + b.at[s] / 16 * kTile, b.width() / 16 * kTile, kTile};
      product({turned, b.rows}, right, sums + b.path.runs[s].column, tree.columns, padded(p), b.counted[s], b.rows,
              true);
    }
  }
}

// sums [wide][columns] of the tree's own keys, turned and in bfloat16, to rows at (head, token).
COLLM_TILES_INLINE void write_keys(const Problem<uint16_t>& p, const Tree& tree, int64_t head, const float* sums,
                                   uint16_t* out, int64_t head_stride, int64_t token_stride) {
  for (const Run& run : tree.runs) {
    for (int64_t k = 0; !run.past && k < run.size; k += 16) {
      for (int64_t d = 0; d < p.width; d += 16) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          v[i] = _mm512_load_si512(sums + (d + i) * tree.columns + run.column + k);
        }
        transpose(v);
        for (int64_t i = 0; i < std::min<int64_t>(16, run.size - k); ++i) {
          uint16_t* to = out + head * head_stride + (run.begin + k + i) * token_stride + d;
          const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(v[i]));
          _mm256_mask_storeu_epi16(to, first(p.width - d), half);
        }
      }
    }
  }
}

COLLM_TILES inline void backward(const Problem<uint16_t>& p, const Tree& tree, int64_t head, Scratch& z) {
  const int64_t wide = padded(p);
  configure();
  pack(p, tree, head, false, z.key_terms, z.key_pairs);
  pack(p, tree, head, true, z.value_terms, nullptr);
  std::fill(z.d_keys, z.d_keys + wide * tree.columns, 0.0f);
  std::fill(z.d_values, z.d_values + wide * tree.columns, 0.0f);
  for (const Path& path : tree.paths) {
    for (int64_t begin = 0; begin < path.asked * p.repeat(); begin += kBlock) {
      const Block b(p, path, begin);
      gather(p, p.query, path, head, b.begin, b.end, z.query);
      gather(p, p.grad, path, head, b.begin, b.end, z.grad);
      against(p, tree, b, z.query, z.key_terms, z.scores);
      against(p, tree, b, z.grad, z.value_terms, z.d_weights);
      weigh_backward(p, b, head, z);
      over(p, b, z.d_scores, z.key_pairs, z.sums);
      write(p, b, head, z.sums, nullptr, p.d_query, p.queries * p.width, p.width);
      turn(z.query, b.rows, wide, z.query_turned);
      turn(z.grad, b.rows, wide, z.grad_turned);
      collect(p, tree, b, z.query_turned, z.score_pairs, z.d_keys);
      collect(p, tree, b, z.grad_turned, z.weight_pairs, z.d_values);
    }
  }
  write_keys(p, tree, head, z.d_keys, p.d_key, p.tokens * p.width, p.width);
  write_keys(p, tree, head, z.d_values, p.d_value, p.width, p.key_heads * p.width);
  _tile_release();
}

}  // namespace collm::attention::tiles

#endif
