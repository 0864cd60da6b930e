// lora_linear in bfloat16 on AMX tiles: the frozen product and the low-rank update in one kernel of our own.
//
// The vendor's product reaches a fifth of what the tiles can do, so no pass around it would be cheap. Here both
// factors are packed into tiles, and the update costs one more step of the contraction: forward as columns beside
// [x | s] [W | B]^T, backward in accumulators of its own, because the mask acts on them alone. A float32 number goes
// into the tiles as two bfloat16 numbers, high and low, and three products: what is lost is 2^-16 of the update.
// Every output is rounded once. Blocks are cut by shapes alone, so no number of threads changes a bit.
#pragma once

#include "isa.h"
#include "lora_avx512.h"

#if defined(COLLM_X86)

#define COLLM_TILES \
  __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define COLLM_TILES_INLINE COLLM_TILES COLLM_INLINE

namespace collm::lora::tiles {

using avx512::first;
using avx512::kBlockRows;
using avx512::kRows;
using torch::headeronly::BFloat16;

constexpr int64_t kTile = 16 * 32;   // bfloat16 numbers of one tile: 16 rows of 64 bytes
constexpr int64_t kPanel = 32;       // outputs, two tiles side by side; kRows = 32 rows are two tiles too
constexpr int64_t kStep = 32;        // terms of the contraction that one tile holds
constexpr int64_t kBlockSteps = 20;  // and so many steps of that panel: 40 KB
constexpr int64_t kParts = 3;        // products of high and low halves: high high, low high, high low

COLLM_INLINE int64_t steps_of(int64_t terms) { return round_up(terms, kStep) / kStep; }

// The right factor in tiles: [panels][steps + added][2][16][16][2], the rank's steps after the frozen ones.
struct Right {
  using Word = uint16_t;
  int64_t terms, outputs, r;
  const uint16_t* data = nullptr;

  static bool serves(int64_t) { return has_tiles(); }
  int64_t panels() const { return steps_of(outputs); }
  int64_t steps() const { return steps_of(terms); }
  int64_t added() const { return steps_of(kParts * r); }
  int64_t all() const { return steps() + added(); }
  int64_t size() const { return panels() * all() * 2 * kTile; }
  int64_t scratch_size() const { return kBlockRows * all() * kStep; }
  const uint16_t* panel(int64_t p) const { return data + p * all() * 2 * kTile; }
};

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

// The high half of a float32 number, or the low one, each a bfloat16 number.
COLLM_TILES_INLINE __m256i half_of(__m512 v, bool low) {
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(v);
  if (!low) {
    return high;
  }
  const __m512 widened = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  return (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, widened));
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

// The panels begin .. end - 1 of a factor one of whose strides is 1, and of the rank's factor, into `data`.
COLLM_TILES inline void pack(const BFloat16* weight, int64_t term_stride, int64_t output_stride, Factor<float> factor,
                             const Right& right, int64_t begin, int64_t end, uint16_t* data) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(weight);
  uint16_t* out = data + begin * right.all() * 2 * kTile;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t t = 0; t < right.all() * kStep; t += kStep) {
      const int64_t terms = right.terms - t;
      for (int64_t o = p * kPanel; o < (p + 1) * kPanel; o += 16, out += kTile) {
        if (terms > 0) {
          pack_tile(w + t * term_stride + o * output_stride, term_stride, output_stride, terms, right.outputs - o, out);
        } else {
          pack_added(factor, right.r, t - right.steps() * kStep, o, out);
        }
      }
    }
  }
}

// kRows rows of the left factor: `steps` pairs of tiles; zero past `rows` and past `terms`.
COLLM_TILES_INLINE void pack_left(const BFloat16* v, int64_t stride, int64_t rows, int64_t terms, uint16_t* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    uint16_t* to = out + i / 16 * kTile + i % 16 * 32;
    for (int64_t t = 0; t < terms; t += kStep, to += 2 * kTile) {
      const __mmask32 exist = i >= rows ? 0u : terms - t >= 32 ? ~0u : (1u << (terms - t)) - 1u;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(exist, v + i * stride + t));
    }
  }
}

// The added terms of kRows rows of s [kRows][rp]: halves high, low, high on this side.
COLLM_TILES_INLINE void pack_left_added(const float* s, int64_t r, int64_t rp, int64_t added, uint16_t* out) {
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

// Tiles 0 .. 3 += two by two tiles of the left and the right factor, over `steps` steps. The left factor is read past
// the first-level cache, where it would push out the panel that all rows share.
COLLM_TILES_INLINE void add_steps(const uint16_t* left, const uint16_t* right, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, left += 2 * kTile, right += 2 * kTile) {
    _tile_stream_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, left + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

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

// Up to kBlockRows rows against all panels of the right factor.
struct Product {
  const uint16_t* left;  // packed, [rows / kRows][steps + added]
  Right right;
  int64_t rows;
  const float* start;    // [outputs], null: zero
  const uint16_t* keep;  // null: the added terms are part of the sum; else a bit for each output that they may reach
  int64_t keep_stride;
  BFloat16* out;  // [rows][outputs]
};

COLLM_TILES_INLINE void write_panel(const Product& p, int64_t row, int64_t output, const float* sums,
                                    const float* added) {
  const int64_t rows = std::min(kRows, p.rows - row), outputs = p.right.outputs - output;
  const __mmask32 exist = outputs >= 32 ? ~0u : (1u << outputs) - 1u;
  const __m512 s0 = p.start ? _mm512_loadu_ps(p.start + output) : _mm512_setzero_ps();
  const __m512 s1 = p.start ? _mm512_loadu_ps(p.start + output + 16) : _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i / 16 * 512 + i % 16 * 16;
    __m512 a = _mm512_add_ps(_mm512_load_ps(sums + at), s0), b = _mm512_add_ps(_mm512_load_ps(sums + at + 256), s1);
    if (p.keep != nullptr) {
      const uint16_t* bits = p.keep + (row + i) * p.keep_stride + output / 16;
      a = _mm512_mask_add_ps(a, bits[0], a, _mm512_load_ps(added + at));
      b = _mm512_mask_add_ps(b, bits[1], b, _mm512_load_ps(added + at + 256));
    }
    _mm512_mask_storeu_epi16(p.out + (row + i) * p.right.outputs + output, exist, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

COLLM_TILES_INLINE void multiply(const Product& p) {
  alignas(64) float sums[kBlockRows / kRows][1024];
  alignas(64) float added[1024];
  settle();
  const int64_t all = p.right.all(), steps = p.keep == nullptr ? all : p.right.steps();
  const int64_t blocks = std::max<int64_t>(1, (steps + kBlockSteps - 1) / kBlockSteps);
  for (int64_t panel = 0; panel * kPanel < p.right.outputs; ++panel) {
    const uint16_t* right = p.right.panel(panel);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = steps * b / blocks, end = steps * (b + 1) / blocks;
      for (int64_t row = 0; row < p.rows; row += kRows) {
        const uint16_t* left = p.left + row / kRows * all * 2 * kTile;
        float* sum = sums[row / kRows];
        if (b == 0) {
          zero_sums();
        } else {
          load_sums(sum);
        }
        add_steps(left + begin * 2 * kTile, right + begin * 2 * kTile, end - begin);
        store_sums(sum);
        if (b + 1 < blocks) {
          continue;
        }
        if (p.keep != nullptr) {
          zero_sums();
          add_steps(left + steps * 2 * kTile, right + steps * 2 * kTile, p.right.added());
          store_sums(added);
        }
        write_panel(p, row, panel * kPanel, sum, added);
      }
    }
  }
}

// y = [x | scaling s] [W | B]^T + b and s for the rows begin .. end - 1.
COLLM_TILES inline void forward_rows(const Forward<BFloat16>& f, const Right& right, int64_t begin, int64_t end,
                                     uint16_t* left) {
  const int64_t all = right.all();
  alignas(64) float s[kRows * kMaxRank];
  configure();
  for (int64_t m0 = begin; m0 < end; m0 += kBlockRows) {
    const int64_t last = std::min(m0 + kBlockRows, end);
    uint16_t* to = left;
    for (int64_t m = m0; m < last; m += kRows, to += all * 2 * kTile) {
      const int64_t rows = std::min(kRows, last - m);
      avx512::project_x(f, m, rows, s);
      pack_left(f.x + m * f.x_stride, f.x_stride, rows, f.K, to);
      pack_left_added(s, f.r, padded(f.r), right.added(), to + right.steps() * 2 * kTile);
    }
    multiply({left, right, last - m0, f.bias, nullptr, 0, f.y + m0 * f.N});
  }
  _tile_release();
}

// dx = dy W + mask (ds A) and what the rows begin .. end - 1 add to dA and dB^T; keep holds kBlockRows rows.
COLLM_TILES inline void backward_rows(const Backward<BFloat16>& f, const Right& right, int64_t begin, int64_t end,
                                      float* dA, float* dB, uint16_t* left, uint16_t* keep) {
  const int64_t all = right.all(), stride = avx512::keep_stride(f.K), rp = padded(f.r);
  alignas(64) float ds[kRows * kMaxRank];
  configure();
  for (int64_t m0 = begin; m0 < end; m0 += kBlockRows) {
    const int64_t last = std::min(m0 + kBlockRows, end);
    uint16_t* to = left;
    for (int64_t m = m0; m < last; m += kRows, to += all * 2 * kTile) {
      const int64_t rows = std::min(kRows, last - m);
      avx512::project_grad(f, m, rows, ds, dB);
      pack_left(f.grad + m * f.grad_stride, f.grad_stride, rows, f.N, to);
      pack_left_added(ds, f.r, rp, right.added(), to + right.steps() * 2 * kTile);
      avx512::mask_x(f, m, rows, ds, keep + (m - m0) * stride, dA);
    }
    multiply({left, right, last - m0, nullptr, keep, stride, f.dx + m0 * f.K});
  }
  _tile_release();
}

}  // namespace collm::lora::tiles

#endif
