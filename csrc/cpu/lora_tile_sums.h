// Sums over the rows on AMX tiles, for lora_linear in bfloat16: dA and dB^T, each a left factor whose terms are rows of
// ds or s, by rows of x or dy as they lie, whose numbers are paired here as the tiles want them.
//
// The left factor is float32 and goes in as three bfloat16 numbers, which lose nothing. They are terms of one sum: the
// sums are what a block of rows reads and writes beside its rows, so they have to be few.
#pragma once

#include "lora_tiles.h"

#if defined(COLLM_X86)

namespace collm::lora::tiles {

// kRows rows of a float32 factor of rank r, transposed, in tiles whose rows are ranks. Sixteen ranks have a tile for
// each of the three pieces. Up to eight ranks fill half of a tile: a piece lies below the first, and sums of its own.
struct RankLeft {
  int64_t r;

  bool half() const { return r <= 8; }
  int64_t rows() const { return round_up(r, 16); }            // of a sum
  int64_t groups() const { return rows() / 16; }              // of sixteen ranks
  int64_t each() const { return half() ? 2 : kPieces; }       // tiles of one group
  int64_t size() const { return groups() * each() * kTile; }  // numbers
  int64_t piece() const { return half() ? 8 : 0; }            // rows from a rank's sum to its second one; 0: none

  // s [rows][stride]; what does not exist counts as zero.
  COLLM_TILES_INLINE void pack(const float* s, int64_t rows, int64_t stride, uint16_t* out) const {
    if (half()) {
      for (int64_t i = 8; i < 16; ++i) {
        _mm512_store_si512(out + kTile + i * kRows, _mm512_setzero_si512());
      }
    }
    for (int64_t j = 0; j < r; j += 16, out += kPieces * kTile) {
      for (int64_t h = 0; h < 2; ++h) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
          const __mmask16 exist = 16 * h + i < rows ? first(r - j) : 0;
          v[i] = _mm512_maskz_loadu_epi32(exist, s + (16 * h + i) * stride + j);
        }
        avx512::transpose(v);
#pragma GCC unroll 16
        for (int64_t c = 0; c < 16; ++c) {
          if (c >= 8 && half()) {
            continue;
          }
          __m256i piece[kPieces];
          cut(_mm512_castsi512_ps(v[c]), piece);
#pragma GCC unroll 3
          for (int64_t i = 0; i < kPieces; ++i) {
            const int64_t row = (half() ? 8 : 16) * i + c;
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + row * kRows + 16 * h), piece[i]);
          }
        }
      }
    }
  }
};

// kRows rows whose columns are summed over: sixteen from each of two places on.
struct Summed {
  const uint16_t *upper, *lower;
  int64_t row, step;     // from a row to the next, and from 32 columns to the next
  const uint16_t* keep;  // null: all are kept
  int64_t keep_row;
  int64_t rows;  // that exist; those of what is not masked all do
};

// The columns t .. t + 31 of those rows as two tiles of a right factor whose terms are the rows. Rows are paired within
// quarters of a vector, by one instruction, so the columns of the two tiles are those of `interleaved`.
template <bool Masked>
COLLM_TILES_INLINE void pair_rows(const Summed& v, int64_t t, uint16_t* out) {
  const int64_t row = v.row, keep_row = v.keep_row;
  for (int64_t half = 0; half < 2; ++half) {
    const uint16_t* from = (half == 0 ? v.upper : v.lower) + t / kStep * v.step;
    const uint16_t* keep = Masked ? v.keep + half * 16 * keep_row + t / 16 : nullptr;
    const auto load = [&](int64_t i) COLLM_TILES {
      if constexpr (!Masked) {
        return _mm512_loadu_si512(from + i * row);
      }
      uint32_t bits;
      std::memcpy(&bits, keep + i * keep_row, sizeof(bits));
      return _mm512_maskz_loadu_epi16(bits, from + i * row);
    };
    const auto store = [&](__m512i a, __m512i b) COLLM_TILES {
      _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(out + kTile, _mm512_unpackhi_epi16(a, b));
      out += 32, from += 2 * row, keep += Masked ? 2 * keep_row : 0;
    };
    const int64_t exist = Masked ? std::clamp<int64_t>(v.rows - 16 * half, 0, 16) : 16;
    // Hardly unrolled: the addresses of 32 rows at once would not fit in registers.
#pragma GCC unroll 2
    for (int64_t i = 0; i < exist / 2; ++i) {
      store(load(0), load(1));
    }
    for (int64_t i = exist / 2; i < 8; ++i) {
      store(2 * i < exist ? load(0) : _mm512_setzero_si512(), _mm512_setzero_si512());
    }
  }
}

// What is summed over up to kBlockRows rows: sum [columns / 32][ranks][32] (= or +=) left^T [ranks][rows] by
// [rows][columns], column c at interleaved(c).
struct Outer {
  const uint16_t* left;  // [row_blocks] packed by `rank`
  RankLeft rank;
  int64_t row_blocks, columns;
  float* sum;
  bool fresh;

  // rows [row_blocks]
  template <bool Masked>
  COLLM_TILES_INLINE void add(const Summed* rows) const {
    int64_t g = 0;
    for (; g + 2 <= rank.groups(); g += 2) {
      add_groups<2, kPieces, Masked>(g, rows);
    }
    if (g == rank.groups()) {
      return;
    }
    if (rank.half()) {
      add_groups<1, 2, Masked>(g, rows);
    } else {
      add_groups<1, kPieces, Masked>(g, rows);
    }
  }

 private:
  // Two groups of ranks by 32 columns, or one by 64, of a few rows each: four tiles of sums.
  template <int Groups, int Each, bool Masked>
  COLLM_TILES_INLINE void add_groups(int64_t g, const Summed* rows) const {
    constexpr int64_t kWhole = Groups == 2 ? kStep : 2 * kStep;
    // Rows are paired two products ahead, so that no tile waits for what has just been stored.
    constexpr int64_t kRing = 4, kAhead = 2;
    alignas(64) uint16_t ring[kRing][2 * kTile];
    int64_t paired = 0, block_ahead = 0, t_ahead = 0, within = 0;
    const auto pair = [&]() COLLM_TILES {
      if (t_ahead >= columns) {
        return;
      }
      pair_rows<Masked>(rows[block_ahead], t_ahead + within, ring[paired++ % kRing]);
      within += kStep;
      if (within == kWhole || t_ahead + within >= columns) {
        within = 0;
        if (++block_ahead == row_blocks) {
          block_ahead = 0, t_ahead += kWhole;
        }
      }
    };
    for (int64_t i = 0; i < kAhead; ++i) {
      pair();
    }
    constexpr int64_t stride = kStep * 4;
    int64_t used = 0;
    for (int64_t t = 0; t < columns; t += kWhole) {
      const bool both = Groups == 2 || t + kStep < columns;
      float* to = sum + t * rank.rows() + g * 16 * kStep;
      float* other = to + (Groups == 2 ? 16 : rank.rows()) * kStep;
      zero_sums();
      if (!fresh) {
        _tile_loadd(0, to, stride);
        _tile_loadd(1, to + 16, stride);
        if (both) {
          _tile_loadd(2, other, stride);
          _tile_loadd(3, other + 16, stride);
        }
      }
      for (int64_t block = 0; block < row_blocks; ++block) {
        const uint16_t* from = left + block * rank.size() + g * Each * kTile;
        pair();
        load_pair(ring[used++ % kRing]);
        add_group<0, Each>(from);
        if constexpr (Groups == 2) {
          add_group<1, Each>(from + Each * kTile);
        } else if (both) {
          pair();
          load_pair(ring[used++ % kRing]);
          add_group<1, Each, true>(from);
        }
      }
      _tile_stored(0, to, stride);
      _tile_stored(1, to + 16, stride);
      if (both) {
        _tile_stored(2, other, stride);
        _tile_stored(3, other + 16, stride);
      }
    }
  }

  COLLM_TILES_INLINE static void load_pair(const uint16_t* right) {
    settle();
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kTile, 64);
  }

  // Tiles 0 and 1, or 2 and 3, += all tiles of one group by the pair that is loaded.
  template <int Place, int Each, bool Again = false>
  COLLM_TILES_INLINE static void add_group(const uint16_t* from) {
    if constexpr (!Again || Each > 2) {
      _tile_loadd(4, from, 64);
      _tile_loadd(5, from + kTile, 64);
    }
    add_products<Place, 4>();
    add_products<Place, 5>();
    if constexpr (Each == 3) {
      _tile_loadd(4, from + 2 * kTile, 64);
      add_products<Place, 4>();
    }
  }

  // Tiles 0 and 1, or 2 and 3, += the left tile 4, or 5, by both of the pair. Instructions name their tiles.
  template <int Place, int Left>
  COLLM_TILES_INLINE static void add_products() {
    if constexpr (Place == 0 && Left == 4) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else if constexpr (Place == 0) {
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    } else if constexpr (Left == 4) {
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace collm::lora::tiles

#endif
