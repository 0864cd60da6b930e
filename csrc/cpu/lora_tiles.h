// What lora_linear in bfloat16 on AMX tiles works on: both factors of a product in tiles, and how they are packed.
// The product itself is in lora_tile_product.h, the passes that feed it, over x and dy, in lora_tile_passes.h.
//
// The update costs one more step of the contraction: forward as columns beside [x | s] [W | B]^T, backward in sums of
// its own, because the mask acts on them alone. A float32 number goes into the tiles as two bfloat16 numbers, high and
// low, and three products: what is lost is 2^-16 of the update.
#pragma once

#include "isa.h"
#include "lora_avx512.h"
#include "tile_checks.h"

#include <utility>

#if defined(COLLM_X86)

#define COLLM_TILES \
  __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define COLLM_TILES_INLINE COLLM_TILES COLLM_INLINE

namespace collm::lora::tiles {

using avx512::first;
using avx512::kRows;
using torch::headeronly::BFloat16;

constexpr int64_t kTile = 16 * 32;   // bfloat16 numbers of one tile: 16 rows of 64 bytes
constexpr int64_t kPanel = 32;       // outputs, two tiles side by side; kRows = 32 rows are two tiles too
constexpr int64_t kStep = 32;        // terms of the contraction that one tile holds
constexpr int64_t kBlockRows = 256;  // rows of a product that share a second-level cache with the right factor's panels
constexpr int64_t kMostTerms = 2048;  // of one projection: kBlockRows rows of more would leave that cache
constexpr int64_t kParts = 3;         // products of high and low halves: high high, low high, high low

COLLM_INLINE int64_t steps_of(int64_t terms) { return round_up(terms, kStep) / kStep; }

// Where the steps of one projection lie in a panel of a right factor: the frozen ones, and the rank's among those.
struct Part {
  int64_t terms, r, first, first_added;

  int64_t steps() const { return steps_of(terms); }
  int64_t added() const { return steps_of(kParts * r); }
};

// The right factor in tiles: [panels][steps + added][2][16][16][2], the ranks' steps after the frozen ones. Those of
// the projections of a group stand one below the other: dx is one product of [dy_0 | dy_1 | ...] by them.
struct Right {
  using Word = uint16_t;
  int64_t outputs, steps = 0, added = 0;
  const uint16_t* data = nullptr;

  static bool serves(int64_t widest) { return has_tiles() && widest <= kMostTerms; }
  Part add(int64_t terms, int64_t r) {
    const Part part{terms, r, steps, added};
    steps += part.steps(), added += part.added();
    return part;
  }
  int64_t panels() const { return steps_of(outputs); }
  int64_t all() const { return steps + added; }
  int64_t size() const { return panels() * all() * 2 * kTile; }
  const uint16_t* panel(int64_t p) const { return data + p * all() * 2 * kTile; }
};

// The other factor of the rank, [terms, r], as a right factor of its own. Its results stay in float32, so each number
// is cut in three: all high pieces, then all middle ones, then all low ones are its outputs.
constexpr int64_t kPieces = 3;
struct RankRight {
  int64_t terms, r;
  const uint16_t* data = nullptr;  // [tiles][steps][16][16][2]

  int64_t steps() const { return steps_of(terms); }
  int64_t tiles() const { return round_up(kPieces * r, 16) / 16; }
  int64_t width() const { return 16 * tiles(); }
  int64_t size() const { return tiles() * steps() * kTile; }
  const uint16_t* tile(int64_t t) const { return data + t * steps() * kTile; }
};

// Where column c of 32 lies in two tiles whose columns were made of two rows by unpacking words within quarters of a
// vector: those of the first, third, fifth, ... four columns are side by side, then those of the others.
COLLM_INLINE int64_t interleaved(int64_t c) { return c / 32 * 32 + c / 4 % 2 * 16 + c / 8 % 4 * 4 + c % 4; }

// The compiler does not know all that the instructions of tiles read: it must be in memory before.
COLLM_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

COLLM_TILES_INLINE void configure() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } alignas(64) config;
  settle();
  _tile_loadconfig(&config);
}

// One tile of the right factor: row i holds the terms 2 i and 2 i + 1 of sixteen outputs. Of the factor exist `terms`
// terms and `outputs` outputs; one of the strides is 1.
COLLM_TILES_INLINE void pack_tile(const uint16_t* w, int64_t term_stride, int64_t output_stride, int64_t terms,
                                  int64_t outputs, uint16_t* out) {
  if (term_stride == 1) {
    const __mmask32 exist = terms >= 32 ? ~0u : (1u << terms) - 1u;
    __m512i v[16];
#pragma GCC unroll 16
    for (int o = 0; o < 16; ++o) {
      v[o] = o < outputs ? _mm512_maskz_loadu_epi16(exist, w + o * output_stride) : _mm512_setzero_si512();
    }
    avx512::transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(out + 32 * i, v[i]);
    }
    return;
  }
  for (int64_t i = 0; i < 16; ++i) {
    const __mmask16 even = 2 * i < terms ? first(outputs) : 0, odd = 2 * i + 1 < terms ? first(outputs) : 0;
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, w + 2 * i * term_stride));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, w + (2 * i + 1) * term_stride));
    _mm512_store_si512(out + 32 * i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

// The lines of n numbers that will be read; they need not exist.
COLLM_TILES_INLINE void ask_for(const uint16_t* v, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    _mm_prefetch(reinterpret_cast<const char*>(v + i), _MM_HINT_T1);
  }
}

COLLM_TILES_INLINE __m512 widened(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The high half of a float32 number, or the low one, each a bfloat16 number.
COLLM_TILES_INLINE __m256i half_of(__m512 v, bool low) {
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(v);
  if (!low) {
    return high;
  }
  return (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, widened(high)));
}

// The three bfloat16 numbers whose sum is a float32 number.
COLLM_TILES_INLINE void cut(__m512 v, __m256i (&piece)[kPieces]) {
#pragma GCC unroll 3
  for (int64_t i = 0; i < kPieces; ++i) {
    piece[i] = half_of(v, false);
    v = _mm512_sub_ps(v, widened(piece[i]));
  }
}

// One tile of the added terms: part t / r of rank t % r, whose halves on this side are high, high, low.
COLLM_TILES_INLINE void pack_added(Factor<float> factor, int64_t r, int64_t term, int64_t output, uint16_t* out) {
  for (int64_t i = 0; i < 16; ++i) {
    __m512i pair[2];
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t t = term + 2 * i + b;
      pair[b] = _mm512_setzero_si512();
      if (t < kParts * r) {
        const __m512 v = _mm512_load_ps(factor.data + t % r * factor.stride + output);
        pair[b] = _mm512_cvtepu16_epi32(half_of(v, t / r == 2));
      }
    }
    _mm512_store_si512(out + 32 * i, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
  }
}

// The panels begin .. end - 1 of a factor one of whose strides is 1, and of the rank's factor, into its part of `data`.
COLLM_TILES inline void pack(const BFloat16* weight, int64_t term_stride, int64_t output_stride, Factor<float> factor,
                             const Right& right, const Part& part, int64_t begin, int64_t end, uint16_t* data) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(weight);
  const auto panel = [&](int64_t p) { return data + p * right.all() * 2 * kTile + part.first * 2 * kTile; };
  const auto pair = [&](int64_t p, int64_t s) COLLM_TILES {
    const int64_t t = s * kStep, o = p * kPanel;
    const uint16_t* from = w + t * term_stride + o * output_stride;
    uint16_t* out = panel(p) + s * 2 * kTile;
    pack_tile(from, term_stride, output_stride, part.terms - t, right.outputs - o, out);
    pack_tile(from + 16 * output_stride, term_stride, output_stride, part.terms - t, right.outputs - o - 16,
              out + kTile);
  };
  // Along the rows of the weight, and what will be packed is asked for in the order it lies in: the processor sees a
  // stream.
  if (term_stride == 1) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t s = 0; s < part.steps(); ++s) {
        ask_for(w + (p + 1) * kPanel * output_stride + s * kTile * 2, 2 * kTile);
        pair(p, s);
      }
    }
  } else {
    for (int64_t s = 0; s < part.steps(); ++s) {
      for (int64_t p = begin; p < end; ++p) {
        ask_for(w + (s + 1) * kStep * term_stride + p * kTile * 2, 2 * kTile);
        pair(p, s);
      }
    }
  }
  for (int64_t p = begin; p < end; ++p) {
    uint16_t* out = panel(p) + (right.steps - part.first + part.first_added) * 2 * kTile;
    for (int64_t t = 0; t < part.added() * kStep; t += kStep) {
      for (int64_t o = p * kPanel; o < (p + 1) * kPanel; o += 16, out += kTile) {
        pack_added(factor, part.r, t, o, out);
      }
    }
  }
}

// The rank's factor [rp][stride], into `data`; `pieces` has room for [width][steps * kStep].
COLLM_TILES inline void pack_rank(Factor<float> factor, const RankRight& right, uint16_t* pieces, uint16_t* data) {
  const int64_t stride = right.steps() * kStep, used = kPieces * right.r;
  std::fill_n(pieces + used * stride, (right.width() - used) * stride, uint16_t{0});
  for (int64_t j = 0; j < right.r; ++j) {
    for (int64_t t = 0; t < stride; t += 16) {
      __m256i piece[kPieces];
      cut(_mm512_load_ps(factor.data + j * factor.stride + t), piece);
#pragma GCC unroll 3
      for (int64_t i = 0; i < kPieces; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pieces + (i * right.r + j) * stride + t), piece[i]);
      }
    }
  }
  for (int64_t o = 0; o < right.width(); o += 16) {
    for (int64_t t = 0; t < stride; t += kStep, data += kTile) {
      pack_tile(pieces + o * stride + t, 1, stride, kStep, 16, data);
    }
  }
}

// The added terms of kRows rows of s [kRows][rp]: halves high, low, high on this side.
COLLM_TILES_INLINE void pack_left_added(const float* s, int64_t r, int64_t rp, int64_t added, uint16_t* out) {
  if (r <= 16) {
    // All of a row are words of one vector: its high halves, then its low ones.
    uint16_t from[2][kStep];
    __mmask32 exist[2] = {};
    for (int64_t t = 0; t < added * kStep; ++t) {
      from[t / kStep][t % kStep] = static_cast<uint16_t>(t < r ? t : t < 2 * r ? t - r + 16 : t - 2 * r);
      exist[t / kStep] |= t < kParts * r ? __mmask32{1} << t % kStep : 0;
    }
    for (int64_t i = 0; i < kRows; ++i) {
      const __m512 v = _mm512_maskz_loadu_ps(first(r), s + i * rp);
      const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(half_of(v, false)), half_of(v, true), 1);
      for (int64_t e = 0; e < added; ++e) {
        const __m512i terms = _mm512_maskz_permutexvar_epi16(exist[e], _mm512_loadu_si512(from[e]), halves);
        _mm512_store_si512(out + (2 * e + i / 16) * kTile + i % 16 * 32, terms);
      }
    }
    return;
  }
  alignas(64) uint16_t row[kMaxRank * kParts + 32];
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t e = 0; e < added; ++e) {
      _mm512_store_si512(row + e * kStep, _mm512_setzero_si512());
    }
    for (int64_t j = 0; j < r; j += 16) {
      const __mmask16 exist = first(r - j);
      const __m512 v = _mm512_maskz_loadu_ps(exist, s + i * rp + j);
      const __m256i high = half_of(v, false), low = half_of(v, true);
      _mm256_mask_storeu_epi16(row + j, exist, high);
      _mm256_mask_storeu_epi16(row + r + j, exist, low);
      _mm256_mask_storeu_epi16(row + 2 * r + j, exist, high);
    }
    for (int64_t e = 0; e < added; ++e) {
      _mm512_store_si512(out + (2 * e + i / 16) * kTile + i % 16 * 32, _mm512_load_si512(row + e * kStep));
    }
  }
}

COLLM_TILES_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// kRows rows of a left factor, two tiles for each of its steps: packed, or as they lie in memory.
struct Left {
  const uint16_t* first;
  int64_t step, below;  // from a tile to that of the next step, and to that of the next sixteen rows
  int64_t row_bytes;

  static Left packed(const uint16_t* tiles) { return {tiles, 2 * kTile, kTile, 64}; }
  static Left in_place(const BFloat16* v, int64_t stride) {
    return {reinterpret_cast<const uint16_t*>(v), kStep, 16 * stride, 2 * stride};
  }
  // Rows that are cut in whole tiles, on the borders of cache lines, and that do not all fall on the same few sets of a
  // cache.
  static bool can_stay(const BFloat16* v, int64_t stride, int64_t terms) {
    return terms % kStep == 0 && stride % kStep == 0 && stride % 1024 != 0 && reinterpret_cast<uintptr_t>(v) % 64 == 0;
  }
};

COLLM_TILES_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
}
COLLM_TILES_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

}  // namespace collm::lora::tiles

#endif
