// The passes of lora_linear in bfloat16 on AMX tiles: what is read of x and dy, once, to feed the product of
// lora_tile_product.h. x A^T, dy B, ds^T x and s^T dy are products of tiles too: a float32 factor goes in as three
// bfloat16 numbers, which lose nothing, because what comes out is exact to float32.
#pragma once

#include "lora_tile_product.h"
#include "lora_tile_sums.h"

#include <vector>

#if defined(COLLM_X86)

namespace collm::lora::tiles {

// kRows rows of the left factor as `steps` pairs of tiles, zero past `rows` and past `terms`.
COLLM_TILES_INLINE void pack_left(const BFloat16* v, int64_t stride, int64_t rows, int64_t terms, uint16_t* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    uint16_t* to = out + i / 16 * kTile + i % 16 * 32;
    for (int64_t t = 0; t < terms; t += kStep, to += 2 * kTile) {
      const __mmask32 exist = i >= rows ? 0u : terms - t >= 32 ? ~0u : (1u << (terms - t)) - 1u;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(exist, v + i * stride + t));
    }
  }
}

// Those rows in place, if that is possible, or packed into `out`.
COLLM_TILES_INLINE Left left_of(const BFloat16* v, int64_t stride, int64_t rows, int64_t terms, uint16_t* out) {
  if (rows == kRows && Left::can_stay(v, stride, terms)) {
    return Left::in_place(v, stride);
  }
  pack_left(v, stride, rows, terms, out);
  return Left::packed(out);
}

// The columns t .. t + 31 of kRows rows, masked, as a pair of tiles: keep has no bit of what does not exist.
COLLM_TILES_INLINE void mask_step(const BFloat16* x, int64_t stride, int64_t rows, const uint16_t* keep,
                                  int64_t keep_stride, int64_t t, uint16_t* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    uint32_t bits = 0;
    if (i < rows) {
      std::memcpy(&bits, keep + i * keep_stride + t / 16, sizeof(bits));
    }
    _mm512_store_si512(out + i / 16 * kTile + i % 16 * 32, _mm512_maskz_loadu_epi16(bits, x + i * stride + t));
  }
}

// Tiles 0 .. 3 = two tiles of kRows rows of a left factor by one or two of the rank's; into pieces [kRows][width].
// left(s) gives the tiles of a step, which may have been made only just before: each is read a step later. The rank's
// tiles are read past the first-level cache, where the product will look for the rows.
template <int Tiles, typename Find>
COLLM_TILES_INLINE void project_tiles(const Find& left, const uint16_t* right, int64_t steps, int64_t width,
                                      float* pieces) {
  zero_sums();
  Left now = steps > 0 ? left(0) : Left{};
  for (int64_t s = 0; s < steps; ++s, right += kTile) {
    const Left next = s + 1 < steps ? left(s + 1) : now;
    settle();
    _tile_stream_loadd(6, right, 64);
    _tile_loadd(4, now.first, now.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Tiles == 2) {
      _tile_stream_loadd(7, right + steps * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, now.first + now.below, now.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Tiles == 2) {
      _tile_dpbf16ps(3, 5, 7);
    }
    now = next;
  }
  _tile_stored(0, pieces, width * 4);
  _tile_stored(2, pieces + 16 * width, width * 4);
  if constexpr (Tiles == 2) {
    _tile_stored(1, pieces + 16, width * 4);
    _tile_stored(3, pieces + 16 * width + 16, width * 4);
  }
}

// take(i, j, v) gets sixteen ranks from j on of row i of scale times kRows rows of a left factor by the rank's factor,
// zero past the rank; pieces has room for kRows * width.
template <typename Find, typename Take>
COLLM_TILES_INLINE void project(const Find& left, const RankRight& right, float scale, float* pieces,
                                const Take& take) {
  const int64_t width = right.width(), r = right.r, tiles = right.tiles();
  settle();
  int64_t t = 0;
  for (; t + 2 <= tiles; t += 2) {
    project_tiles<2>(left, right.tile(t), right.steps(), width, pieces + 16 * t);
  }
  if (t < tiles) {
    project_tiles<1>(left, right.tile(t), right.steps(), width, pieces + 16 * t);
  }
  settle();
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < r; j += 16) {
      const float* from = pieces + i * width + j;
      const __mmask16 exist = first(r - j);
      const __m512 low =
          _mm512_add_ps(_mm512_maskz_loadu_ps(exist, from + r), _mm512_maskz_loadu_ps(exist, from + 2 * r));
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(exist, from), low);
      take(i, j, _mm512_mul_ps(by, sum));
    }
  }
}

// Numbers of 16 bits that a call works in: the left factor where it is packed, the rank's steps, two masks.
inline int64_t forward_scratch(const Right& right, int64_t K) {
  return block_rows(right) * (right.all() * kStep + 2 * avx512::keep_stride(K));
}

// y = [x | scaling s] [W | B]^T + b and s for the rows begin .. end - 1.
COLLM_TILES inline void forward_rows(const Forward<BFloat16>& f, const Right& right, const Part& part,
                                     const RankRight& rank, int64_t begin, int64_t end, uint16_t* scratch) {
  const int64_t rp = round_up(f.r, 16), stride = avx512::keep_stride(f.K);
  const int64_t at_once = block_rows(right);
  const __m512 scaling = _mm512_set1_ps(f.scaling);
  uint16_t *added = scratch + at_once * right.steps * kStep, *keep = added + at_once * right.added * kStep;
  uint16_t* next_keep = keep + at_once * stride;
  alignas(64) float s[kRows * kMaxRank], pieces[kRows * kPieces * kMaxRank];
  alignas(64) uint16_t masked[2][2 * kTile];
  Left left[kBlockRows / kRows];
  const auto mask_from = [&](int64_t m0, uint16_t* to) COLLM_TILES {
    const int64_t rows = std::min(at_once, end - m0);
    const avx512::Ahead ahead = avx512::Ahead::of(f.x + m0 * f.x_stride, f.x_stride);
    return avx512::Drawing(f.dropout, static_cast<uint64_t>(m0), rows, 0, f.K, to, stride, {ahead});
  };
  configure();
  avx512::Drawing drawing = mask_from(begin, keep);
  for (int64_t m0 = begin; m0 < end; m0 += at_once) {
    const int64_t last = std::min(m0 + at_once, end);
    drawing.rest<_MM_HINT_T1>();
    for (int64_t m = m0; m < last; m += kRows) {
      const int64_t rows = std::min(kRows, last - m), block = (m - m0) / kRows;
      const BFloat16* x = f.x + m * f.x_stride;
      left[block] = left_of(x, f.x_stride, rows, f.K, scratch + block * right.steps * 2 * kTile);
      if (f.r == 0) {
        continue;
      }
      const auto mask = [&](int64_t step) COLLM_TILES {
        mask_step(x, f.x_stride, rows, keep + (m - m0) * stride, stride, step * kStep, masked[step % 2]);
        return Left::packed(masked[step % 2]);
      };
      const auto take = [&](int64_t i, int64_t j, __m512 v) COLLM_TILES {
        if (i < rows) {
          _mm512_mask_storeu_ps(f.s + (m + i) * f.r + j, first(f.r - j), v);
        }
        _mm512_store_ps(s + i * rp + j, _mm512_mul_ps(scaling, v));
      };
      project(mask, rank, static_cast<float>(f.dropout.scale), pieces, take);
      pack_left_added(s, f.r, rp, right.added, added + block * right.added * 2 * kTile);
    }
    drawing = mask_from(last, next_keep);
    std::swap(keep, next_keep);
    const Side side{left, added, part, nullptr, 0};
    multiply({&side, 1, right, last - m0, f.bias, nullptr, false, f.y + m0 * f.N, &drawing, 1});
  }
  _tile_release();
}

// Where the passes of a backward leave what the product and the sums over the rows read, for one projection.
struct Work {
  Part part;
  RankRight rank;
  RankLeft summed;
  int64_t keep_stride;
  uint16_t *packed = nullptr, *added = nullptr, *s = nullptr, *ds = nullptr, *keep = nullptr, *next_keep = nullptr;
  Left left[kBlockRows / kRows];

  Work(const Part& part, const RankRight& rank, int64_t K)
      : part(part), rank(rank), summed{rank.r}, keep_stride(avx512::keep_stride(K)) {}

  // Numbers of 16 bits: the left factor where it is packed, the rank's steps, two masks, s and ds transposed.
  int64_t scratch() const {
    return kBlockRows * ((part.steps() + part.added()) * kStep + 2 * keep_stride) +
           kBlockRows / kRows * 2 * summed.size();
  }
  // Takes them from `memory`; returns what follows.
  uint16_t* place(uint16_t* memory) {
    packed = memory;
    added = packed + kBlockRows * part.steps() * kStep;
    s = added + kBlockRows * part.added() * kStep;
    ds = s + kBlockRows / kRows * summed.size();
    keep = ds + kBlockRows / kRows * summed.size();
    next_keep = keep + kBlockRows * keep_stride;
    return memory + scratch();
  }
  // What it brings to the product of the rows from `done` on.
  Side side(int64_t done, bool masks) const {
    const int64_t block = done / kRows;
    const uint16_t* mask = masks ? keep + done * keep_stride : nullptr;
    return {left + block, added + block * part.added() * 2 * kTile, part, mask, keep_stride};
  }
};

// The rows begin .. last - 1 of the block from m0 on: where dy is, ds beside it and transposed, s transposed.
COLLM_TILES_INLINE void prepare(const Backward<BFloat16>& f, int64_t m0, int64_t begin, int64_t last, Work& work) {
  const int64_t rp = round_up(f.r, 16), steps = work.part.steps(), added = work.part.added();
  alignas(64) float ds[kRows * kMaxRank], pieces[kRows * kPieces * kMaxRank];
  for (int64_t m = begin; m < last; m += kRows) {
    const int64_t rows = std::min(kRows, last - m), block = (m - m0) / kRows;
    const BFloat16* grad = f.grad + m * f.grad_stride;
    Left& left = work.left[block];
    left = left_of(grad, f.grad_stride, rows, f.N, work.packed + block * steps * 2 * kTile);
    if (f.r == 0) {
      continue;
    }
    const auto find = [&](int64_t step)
                          COLLM_TILES { return Left{left.first + step * left.step, 0, left.below, left.row_bytes}; };
    const auto take = [&](int64_t i, int64_t j, __m512 v) COLLM_TILES { _mm512_store_ps(ds + i * rp + j, v); };
    project(find, work.rank, f.scaling * static_cast<float>(f.dropout.scale), pieces, take);
    pack_left_added(ds, f.r, rp, added, work.added + block * added * 2 * kTile);
    if (f.x != nullptr) {
      work.summed.pack(ds, rows, rp, work.ds + block * work.summed.size());
    }
    if (f.s != nullptr) {
      work.summed.pack(f.s + m * f.r, rows, f.r, work.s + block * work.summed.size());
    }
  }
}

// The mask of the `rows` rows from m on, into `to`; what the passes will read of them is asked for meanwhile.
COLLM_TILES_INLINE avx512::Drawing mask_from(const Backward<BFloat16>& f, int64_t m, int64_t rows, uint16_t* to) {
  const avx512::Ahead x = f.x == nullptr ? avx512::Ahead{} : avx512::Ahead::of(f.x + m * f.x_stride, f.x_stride);
  const avx512::Ahead grad = avx512::Ahead::of(f.grad + m * f.grad_stride, f.grad_stride);
  return {f.dropout, static_cast<uint64_t>(m), rows, 0, f.K, to, avx512::keep_stride(f.K), {grad, x}};
}

// So many rows of x and dy stay in a cache until they are read a second time: they are summed over before a product of
// more rows, and after those of fewer.
constexpr int64_t kSumRows = 2 * kRows;

// What the same rows add to dB^T and dA.
COLLM_TILES_INLINE void add_sums(const Backward<BFloat16>& f, int64_t m0, int64_t begin, int64_t last, const Work& work,
                                 bool fresh, float* dA, float* dB) {
  const int64_t row_blocks = (last - begin + kRows - 1) / kRows, first = (begin - m0) / kRows;
  Summed rows[kBlockRows / kRows];
  if (f.s != nullptr) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      const Left& left = work.left[first + block];
      rows[block] = {left.first, left.first + left.below, left.row_bytes / 2, left.step, nullptr, 0, kRows};
    }
    const Outer outer{work.s + first * work.summed.size(), work.summed, row_blocks, f.N, dB, fresh};
    outer.add<false>(rows);
  }
  if (f.x != nullptr) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t m = begin + block * kRows;
      const uint16_t* x = reinterpret_cast<const uint16_t*>(f.x + m * f.x_stride);
      const uint16_t* keep = work.keep + (m - m0) * work.keep_stride;
      rows[block] = {x, x + 16 * f.x_stride, f.x_stride, kStep, keep, work.keep_stride, std::min(kRows, last - m)};
    }
    const Outer outer{work.ds + first * work.summed.size(), work.summed, row_blocks, f.K, dA, fresh};
    outer.add<true>(rows);
  }
}

// dx = sum over the projections of dy W + mask (ds A) for the parts begin .. end - 1 of the rows, and the parts' sums
// of dA and dB^T. From the first part on each part's stand in the place of the first, and fold(n) adds those of
// projection n up, while they are in a cache. `masked` has room for [projections][1024] sums.
template <typename Fold>
COLLM_TILES inline void backward_rows(const std::vector<Backward<BFloat16>>& group, const Right& right,
                                      std::vector<Work>& works, int64_t begin, int64_t end, float* masked,
                                      const Fold& fold) {
  const Backward<BFloat16>& any = group.front();
  const int64_t count = static_cast<int64_t>(group.size()), at_once = block_rows(right);
  const auto rows_of = [&](int64_t part) { return any.parts.begin(part + 1) - any.parts.begin(part); };
  std::vector<Side> sides(group.size());
  std::vector<avx512::Drawing> drawings(group.size());
  configure();
  for (int64_t n = 0; n < count; ++n) {
    drawings[n] = mask_from(group[n], any.parts.begin(begin), std::min(at_once, rows_of(begin)), works[n].keep);
  }
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = any.parts.begin(part), stop = any.parts.begin(part + 1), place = begin == 0 ? 0 : part;
    for (int64_t m = first, m0 = first; m < stop; m += at_once) {
      const int64_t last = std::min(m + at_once, stop), done = m - m0;
      const int64_t more = last < stop ? stop - last : part + 1 < end ? rows_of(part + 1) : 0;
      const bool ends = last == stop || last - m0 == kBlockRows;
      const auto add = [&](int64_t n, int64_t from, int64_t to) COLLM_TILES {
        const Backward<BFloat16>& f = group[n];
        add_sums(f, m0, from, to, works[n], from == first, f.parts.A(place), f.parts.B(place));
      };
      for (int64_t n = 0; n < count; ++n) {
        const Backward<BFloat16>& f = group[n];
        Work& work = works[n];
        drawings[n].rest<_MM_HINT_T1>();
        for (int64_t from = m; from < last; from += kSumRows) {
          const int64_t to = std::min(from + kSumRows, last);
          prepare(f, m0, from, to, work);
          if (kSumRows <= at_once) {
            add(n, from, to);
          }
        }
        sides[n] = work.side(done, f.dropout.threshold > 0);
        uint16_t* keep = ends ? work.next_keep : work.keep + (last - m0) * work.keep_stride;
        drawings[n] = mask_from(f, last, std::min(at_once, more), keep);
      }
      multiply(
          {sides.data(), count, right, last - m, nullptr, masked, any.add, any.dx + m * any.K, drawings.data(), count});
      for (int64_t n = 0; n < count; ++n) {
        if (kSumRows > at_once && (ends || (last - m0) % kSumRows == 0)) {
          add(n, m0 + (last - m0 - 1) / kSumRows * kSumRows, last);
        }
        if (ends) {
          std::swap(works[n].keep, works[n].next_keep);
        }
      }
      m0 = ends ? last : m0;
    }
    for (int64_t n = 0; begin == 0 && n < count; ++n) {
      fold(n);
    }
  }
  _tile_release();
}

}  // namespace collm::lora::tiles

#endif
