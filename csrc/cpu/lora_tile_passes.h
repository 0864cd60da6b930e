// The passes of lora_linear in bfloat16 on AMX tiles: what is read of x and dy, once, to feed the product of
// lora_tiles.h. x A^T, dy B, ds^T x and s^T dy are products of tiles too: a float32 factor goes in as three bfloat16
// numbers, which lose nothing, because what comes out is exact to float32.
#pragma once

#include "lora_tiles.h"

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
// left(s) gives the tiles of a step, which may have been made only just before: each is read a step later.
template <int Tiles, typename Find>
COLLM_TILES_INLINE void project_tiles(const Find& left, const uint16_t* right, int64_t steps, int64_t width,
                                      float* pieces) {
  zero_sums();
  Left now = steps > 0 ? left(0) : Left{};
  for (int64_t s = 0; s < steps; ++s, right += kTile) {
    const Left next = s + 1 < steps ? left(s + 1) : now;
    settle();
    _tile_loadd(6, right, 64);
    _tile_loadd(4, now.first, now.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, now.first + now.below, now.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Tiles == 2) {
      _tile_loadd(7, right + steps * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
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

// out [kRows][rp] = scale times kRows rows of a left factor by the rank's factor; pieces has room for kRows * width.
template <typename Find>
COLLM_TILES_INLINE void project(const Find& left, const RankRight& right, float scale, int64_t rp, float* pieces,
                                float* out) {
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
    for (int64_t j = 0; j < rp; j += 16) {
      const float* from = pieces + i * width + j;
      const __mmask16 exist = first(r - j);
      const __m512 low =
          _mm512_add_ps(_mm512_maskz_loadu_ps(exist, from + r), _mm512_maskz_loadu_ps(exist, from + 2 * r));
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(exist, from), low);
      _mm512_mask_storeu_ps(out + i * rp + j, first(rp - j), _mm512_mul_ps(by, sum));
    }
  }
}

// s [kRows][stride] transposed: a row for each rank's high piece, then for each middle one and each low one,
// [width][kRows].
COLLM_TILES_INLINE void pack_rank_left(const float* s, int64_t rows, int64_t r, int64_t stride, int64_t width,
                                       uint16_t* out) {
  for (int64_t j = kPieces * r; j < width; ++j) {
    _mm512_store_si512(out + j * kRows, _mm512_setzero_si512());
  }
  for (int64_t j = 0; j < r; j += 16) {
    for (int64_t h = 0; h < 2; ++h) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const __mmask16 exist = 16 * h + i < rows ? first(r - j) : 0;
        v[i] = _mm512_maskz_loadu_epi32(exist, s + (16 * h + i) * stride + j);
      }
      avx512::transpose(v);
      const int64_t n = std::min<int64_t>(16, r - j);
#pragma GCC unroll 16
      for (int64_t c = 0; c < 16; ++c) {
        if (c < n) {
          __m256i piece[kPieces];
          cut(_mm512_castsi512_ps(v[c]), piece);
#pragma GCC unroll 3
          for (int64_t i = 0; i < kPieces; ++i) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + (i * r + j + c) * kRows + 16 * h), piece[i]);
          }
        }
      }
    }
  }
}

// 32 columns of kRows rows as two tiles of a right factor whose terms are the rows; row(i) gives those of a row.
template <typename Row>
COLLM_TILES_INLINE void pair_rows(const Row& row, uint16_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i a = row(2 * i), b = row(2 * i + 1);
    _mm512_store_si512(out + 32 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(out + kTile + 32 * i, _mm512_permutex2var_epi16(a, high, b));
  }
}

// What is summed over up to kBlockRows rows: sum [width][stride] (= or +=) left^T [width][rows] by [rows][columns].
struct Outer {
  const uint16_t* left;  // [rows / kRows][width][kRows], see pack_rank_left
  int64_t width, row_blocks, columns;
  float* sum;
  int64_t stride;
  bool fresh;

  // row(block, i, t) gives the 32 columns from t on of a row.
  template <typename Row>
  COLLM_TILES_INLINE void add(const Row& row) const {
    for (int64_t c = 0; c < width; c += 32) {
      if (c + 16 < width) {
        add_tiles<2>(c, row);
      } else {
        add_tiles<1>(c, row);
      }
    }
  }

  template <int Tiles, typename Row>
  COLLM_TILES_INLINE void add_tiles(int64_t c, const Row& row) const {
    // Rows are paired two products ahead, so that no tile waits for what has just been stored.
    constexpr int64_t kRing = 4, kAhead = 2;
    alignas(64) uint16_t ring[kRing][2 * kTile];
    int64_t paired = 0, block_ahead = 0, t_ahead = 0;
    const auto pair = [&]() COLLM_TILES {
      if (t_ahead < columns) {
        pair_rows([&](int64_t i) COLLM_TILES { return row(block_ahead, i, t_ahead); }, ring[paired++ % kRing]);
        if (++block_ahead == row_blocks) {
          block_ahead = 0, t_ahead += kStep;
        }
      }
    };
    for (int64_t i = 0; i < kAhead; ++i) {
      pair();
    }
    int64_t used = 0;
    for (int64_t t = 0; t < columns; t += kStep) {
      float *to = sum + c * stride + t, *below = to + 16 * stride;
      zero_sums();
      if (!fresh) {
        _tile_loadd(0, to, stride * 4);
        _tile_loadd(1, to + 16, stride * 4);
        if constexpr (Tiles == 2) {
          _tile_loadd(2, below, stride * 4);
          _tile_loadd(3, below + 16, stride * 4);
        }
      }
      for (int64_t block = 0; block < row_blocks; ++block) {
        pair();
        settle();
        const uint16_t *from = left + (block * width + c) * kRows, *right = ring[used++ % kRing];
        _tile_loadd(4, from, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (Tiles == 2) {
          _tile_loadd(5, from + 16 * kRows, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, stride * 4);
      _tile_stored(1, to + 16, stride * 4);
      if constexpr (Tiles == 2) {
        _tile_stored(2, below, stride * 4);
        _tile_stored(3, below + 16, stride * 4);
      }
    }
  }
};

// Numbers of 16 bits that a call works in: the left factor where it is packed, the rank's steps, a mask of kRows rows.
inline int64_t forward_scratch(const Right& right, int64_t K) {
  return kBlockRows * right.all() * kStep + kRows * avx512::keep_stride(K);
}

// y = [x | scaling s] [W | B]^T + b and s for the rows begin .. end - 1.
COLLM_TILES inline void forward_rows(const Forward<BFloat16>& f, const Right& right, const Part& part,
                                     const RankRight& rank, int64_t begin, int64_t end, uint16_t* scratch) {
  const int64_t rp = padded(f.r), stride = avx512::keep_stride(f.K);
  uint16_t *added = scratch + kBlockRows * right.steps * kStep, *keep = added + kBlockRows * right.added * kStep;
  alignas(64) float s[kRows * kMaxRank], pieces[kRows * kPieces * kMaxRank];
  alignas(64) uint16_t masked[2][2 * kTile];
  Left left[kBlockRows / kRows];
  configure();
  for (int64_t m0 = begin; m0 < end; m0 += kBlockRows) {
    const int64_t last = std::min(m0 + kBlockRows, end);
    for (int64_t m = m0; m < last; m += kRows) {
      const int64_t rows = std::min(kRows, last - m), block = (m - m0) / kRows;
      const BFloat16* x = f.x + m * f.x_stride;
      if (f.r == 0) {
        left[block] = left_of(x, f.x_stride, rows, f.K, scratch + block * right.steps * 2 * kTile);
        continue;
      }
      avx512::draw_keep<BFloat16>(f.dropout, static_cast<uint64_t>(m), rows, 0, f.K, keep, stride, {x, f.x_stride});
      left[block] = left_of(x, f.x_stride, rows, f.K, scratch + block * right.steps * 2 * kTile);
      const auto mask = [&](int64_t step) COLLM_TILES {
        mask_step(x, f.x_stride, rows, keep, stride, step * kStep, masked[step % 2]);
        return Left::packed(masked[step % 2]);
      };
      project(mask, rank, static_cast<float>(f.dropout.scale), rp, pieces, s);
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(f.s + (m + i) * f.r, s + i * rp, static_cast<size_t>(f.r) * sizeof(float));
      }
      for (int64_t i = 0; i < kRows * rp; ++i) {
        s[i] *= f.scaling;
      }
      pack_left_added(s, f.r, rp, right.added, added + block * right.added * 2 * kTile);
    }
    const Side side{left, added, part, nullptr, 0};
    multiply({&side, 1, right, last - m0, f.bias, nullptr, false, f.y + m0 * f.N});
  }
  _tile_release();
}

// Where the passes of a backward leave what the product and the sums over the rows read, for one projection.
struct Work {
  Part part;
  RankRight rank;
  int64_t keep_stride;
  uint16_t *packed = nullptr, *added = nullptr, *s = nullptr, *ds = nullptr, *keep = nullptr;
  Left left[kBlockRows / kRows];

  Work(const Part& part, const RankRight& rank, int64_t K)
      : part(part), rank(rank), keep_stride(avx512::keep_stride(K)) {}

  // Numbers of 16 bits: the left factor where it is packed, the rank's steps, s and ds transposed, the mask.
  int64_t scratch() const {
    return kBlockRows * ((part.steps() + part.added()) * kStep + 2 * rank.width() + keep_stride);
  }
  // Takes them from `memory`; returns what follows.
  uint16_t* place(uint16_t* memory) {
    packed = memory;
    added = packed + kBlockRows * part.steps() * kStep;
    s = added + kBlockRows * part.added() * kStep;
    ds = s + kBlockRows * rank.width();
    keep = ds + kBlockRows * rank.width();
    return memory + scratch();
  }
};

// The rows begin .. last - 1 of the block from m0 on: where dy is, ds beside it and transposed, s transposed, the mask.
COLLM_TILES_INLINE void prepare(const Backward<BFloat16>& f, int64_t m0, int64_t begin, int64_t last, Work& work) {
  const int64_t rp = padded(f.r), steps = work.part.steps(), added = work.part.added(), width = work.rank.width();
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
    project(find, work.rank, f.scaling * static_cast<float>(f.dropout.scale), rp, pieces, ds);
    pack_left_added(ds, f.r, rp, added, work.added + block * added * 2 * kTile);
    if (f.x != nullptr) {
      pack_rank_left(ds, rows, f.r, rp, width, work.ds + (m - m0) * width);
    }
    if (f.s != nullptr) {
      pack_rank_left(f.s + m * f.r, rows, f.r, f.r, width, work.s + (m - m0) * width);
    }
  }
  if (f.r == 0) {
    return;
  }
  const BFloat16* x = f.x == nullptr ? nullptr : f.x + begin * f.x_stride;
  avx512::draw_keep<BFloat16>(f.dropout, static_cast<uint64_t>(begin), last - begin, 0, f.K,
                              work.keep + (begin - m0) * work.keep_stride, work.keep_stride, {x, f.x_stride});
}

// What the same rows add to dB^T and dA.
COLLM_TILES_INLINE void add_sums(const Backward<BFloat16>& f, int64_t m0, int64_t begin, int64_t last, const Work& work,
                                 bool fresh, float* dA, float* dB) {
  const int64_t row_blocks = (last - begin + kRows - 1) / kRows, done = begin - m0, width = work.rank.width();
  if (f.s != nullptr) {
    const Outer outer{work.s + done * width, width, row_blocks, f.N, dB, f.b.stride, fresh};
    outer.add([&](int64_t block, int64_t i, int64_t t) COLLM_TILES {
      const Left& left = work.left[done / kRows + block];
      const uint16_t* tile = left.first + t / kStep * left.step + i / 16 * left.below;
      return _mm512_load_si512(tile + i % 16 * left.row_bytes / 2);
    });
  }
  if (f.x != nullptr) {
    const Outer outer{work.ds + done * width, width, row_blocks, f.K, dA, f.a.stride, fresh};
    outer.add([&](int64_t block, int64_t i, int64_t t) COLLM_TILES {
      const int64_t row = block * kRows + i;
      uint32_t bits = 0;
      if (row < last - begin) {
        std::memcpy(&bits, work.keep + (done + row) * work.keep_stride + t / 16, sizeof(bits));
      }
      return _mm512_maskz_loadu_epi16(bits, f.x + (begin + row) * f.x_stride + t);
    });
  }
}

// dx = sum over the projections of dy W + mask (ds A) for the parts begin .. end - 1 of the rows, and the parts' sums
// of dA and dB^T, each in kPieces times r rows. `masked` has room for [2][projections][1024] sums.
COLLM_TILES inline void backward_rows(const std::vector<Backward<BFloat16>>& group, const Right& right,
                                      std::vector<Work>& works, int64_t begin, int64_t end, float* masked) {
  const Backward<BFloat16>& any = group.front();
  const int64_t count = static_cast<int64_t>(group.size());
  // So many rows of x and dy stay in the second-level cache until they are read a second time.
  constexpr int64_t kSumBytes = int64_t{256} << 10;
  std::vector<Side> sides;
  for (const Work& work : works) {
    sides.push_back({work.left, work.added, work.part, work.keep, work.keep_stride});
  }
  configure();
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = any.parts.begin(part), stop = any.parts.begin(part + 1);
    for (int64_t m0 = first; m0 < stop; m0 += kBlockRows) {
      const int64_t last = std::min(m0 + kBlockRows, stop);
      for (int64_t n = 0; n < count; ++n) {
        const Backward<BFloat16>& f = group[n];
        const int64_t run = std::clamp<int64_t>(kSumBytes / (2 * (f.K + f.N)) / kRows, 2, kBlockRows / kRows) * kRows;
        for (int64_t m = m0; m < last; m += run) {
          const int64_t end_of_run = std::min(m + run, last);
          prepare(f, m0, m, end_of_run, works[n]);
          add_sums(f, m0, m, end_of_run, works[n], m == first, f.parts.A(part), f.parts.B(part));
        }
      }
      multiply({sides.data(), count, right, last - m0, nullptr, masked, any.add, any.dx + m0 * any.K});
    }
  }
  _tile_release();
}

}  // namespace collm::lora::tiles

#endif
