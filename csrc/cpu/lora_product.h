// lora_linear in float32 for AVX-512: the frozen product and the low-rank update in one kernel of our own.
//
// A pass around the vendor's product reads x and writes y once more than the product itself does, from beyond the
// second-level cache: a tenth of the frozen layer's time at K = N = 576. Here the sums of a block start from the bias
// and the low-rank part, in registers, and the rows that gave s are still in the cache when the product reads them.
// Every sum has a fixed order that no number of threads changes.
#pragma once

#include "isa.h"
#include "lora_avx512.h"

#include <utility>
#include <vector>

#if defined(COLLM_X86)

namespace collm::lora::product {

using avx512::first;
using avx512::kRows;

constexpr int64_t kPanel = 48;      // outputs of one block of sums: three vectors
constexpr int64_t kSub = 8;         // and its rows: 24 sums in registers
constexpr int64_t kRun = 320;       // terms summed apart
constexpr int64_t kBlockRows = 64;  // rows that share a panel of a product while it is in a cache
// Of a whole group; longer sums leave the cache, and rows 4 KB apart share its lines.
constexpr int64_t kMaxTerms = 960;
constexpr int64_t kAhead = 24 * kPanel;  // what of a panel is asked for before it is used: 24 steps

// Where the terms of one projection lie among those of a right factor, and its rank.
struct Part {
  int64_t terms, r, first;
};

// The frozen factor [terms, outputs], packed: [panels][terms][48], zero past the outputs. Those of the projections of a
// group stand one below the other: dx is one product of [dy_0 | dy_1 | ...] by them.
struct Right {
  using Word = float;
  int64_t outputs, terms = 0;
  const float* data = nullptr;

  static bool serves(int64_t terms) { return isa() == Isa::avx512 && terms <= kMaxTerms; }
  Part add(int64_t more, int64_t r) { return {more, r, std::exchange(terms, terms + more)}; }
  int64_t panels() const { return round_up(outputs, kPanel) / kPanel; }
  int64_t size() const { return panels() * terms * kPanel; }
  const float* panel(int64_t p) const { return data + p * terms * kPanel; }
};

// The panels begin .. end - 1 of a factor one of whose strides is 1, into its part of `data`. The rank's factor stays
// outside.
COLLM_AVX512 inline void pack(const float* w, int64_t term_stride, int64_t output_stride, Factor<float>,
                              const Right& right, const Part& part, int64_t begin, int64_t end, float* data) {
  const int64_t terms = part.terms, outputs = right.outputs, panel = right.terms * kPanel;
  data += part.first * kPanel;
  if (output_stride == 1) {
    // Row by row of the factor, as it lies in memory.
    for (int64_t t = 0; t < terms; ++t) {
      for (int64_t o = begin * kPanel; o < end * kPanel; o += 16) {
        float* to = data + o / kPanel * panel + t * kPanel + o % kPanel;
        _mm512_store_ps(to, _mm512_maskz_loadu_ps(first(outputs - o), w + t * term_stride + o));
      }
    }
    return;
  }
  for (int64_t o = begin * kPanel; o < end * kPanel; o += 16) {
    float* to = data + o / kPanel * panel + o % kPanel;
    for (int64_t t = 0; t < terms; t += 16) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask16 exist = o + i < outputs ? first(terms - t) : 0;
        v[i] = _mm512_maskz_loadu_epi32(exist, w + (o + i) * output_stride + t);
      }
      avx512::transpose(v);
      const int64_t n = std::min<int64_t>(16, terms - t);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (i < n) {
          _mm512_store_si512(to + (t + i) * kPanel, v[i]);
        }
      }
    }
  }
}

// What one projection brings to the product of up to kBlockRows rows.
struct Side {
  const float* left;
  int64_t left_stride;
  Part part;
  const float* s;        // [round_up(rows, 8)][rp]
  Factor<float> factor;  // s factor is added where `keep` has a bit
  const uint16_t* keep;  // null: everywhere
  int64_t keep_stride;
};

// Rows that will be read soon, asked for a few lines at a time.
struct Upcoming {
  const float* data;
  int64_t stride, columns, rows, row = 0, column = 0;

  int64_t lines() const { return rows * ((columns + 15) / 16); }
  // Asks for up to n lines; returns how many of them are left to ask for.
  COLLM_AVX512_INLINE int64_t ask(int64_t n) {
    for (; n > 0 && row < rows; --n) {
      _mm_prefetch(reinterpret_cast<const char*>(data + row * stride + column), _MM_HINT_T1);
      column += 16;
      if (column >= columns) {
        column = 0, ++row;
      }
    }
    return n;
  }
};

struct Block {
  const Side* sides;
  int64_t count, rows;
  Right right;
  const float* start;  // [outputs], null: zero
  float* out;          // [rows][outputs]
  Upcoming* next;      // what the next block will read, asked for meanwhile
  int64_t nexts;
};

// The sums of kSub rows by one panel from `start` (null: zero) on: the low-rank part, masked.
COLLM_AVX512_INLINE void start_sums(const Side& p, int64_t outputs, const float* start, int64_t row, int64_t o,
                                    __m512 (&sum)[kSub][3]) {
#pragma GCC unroll 3
  for (int v = 0; v < 3; ++v) {
    const __m512 value =
        start ? _mm512_maskz_loadu_ps(first(outputs - o - 16 * v), start + o + 16 * v) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < kSub; ++i) {
      sum[i][v] = value;
    }
  }
  const int64_t rp = padded(p.part.r);
  const float* s = p.s + row * rp;
  for (int64_t j = 0; j < p.part.r; ++j) {
    const float* f = p.factor.data + j * p.factor.stride + o;
    const __m512 f0 = _mm512_maskz_loadu_ps(first(outputs - o), f);
    const __m512 f1 = _mm512_maskz_loadu_ps(first(outputs - o - 16), f + 16);
    const __m512 f2 = _mm512_maskz_loadu_ps(first(outputs - o - 32), f + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kSub; ++i) {
      const __m512 c = _mm512_set1_ps(s[i * rp + j]);
      sum[i][0] = _mm512_fmadd_ps(c, f0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(c, f1, sum[i][1]);
      sum[i][2] = _mm512_fmadd_ps(c, f2, sum[i][2]);
    }
  }
  if (p.keep != nullptr && p.part.r > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kSub; ++i) {
      const uint16_t* bits = p.keep + (row + i) * p.keep_stride + o / 16;
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        sum[i][v] = _mm512_maskz_mov_ps(bits[v], sum[i][v]);
      }
    }
  }
}

// The lines of kSub rows of one panel's outputs: they are written when the sums are there, and come from far.
COLLM_AVX512_INLINE void ask_for_outputs(const Block& p, int64_t row, int64_t panel) {
  for (int64_t i = row; i < std::min(row + kSub, p.rows); ++i) {
    const char* to = reinterpret_cast<const char*>(p.out + i * p.right.outputs + panel * kPanel);
#pragma GCC unroll 3
    for (int64_t v = 0; v < 3; ++v) {
      _mm_prefetch(to + 64 * v, _MM_HINT_T0);
    }
  }
}

COLLM_AVX512_INLINE void ask_for(const float* right) {
#pragma GCC unroll 3
  for (int v = 0; v < 3; ++v) {
    _mm_prefetch(reinterpret_cast<const char*>(right + 16 * v), _MM_HINT_T0);
  }
}

// total = sum, or total += sum; and the sums are zero again.
COLLM_AVX512_INLINE void set_aside(__m512 (&sum)[kSub][3], float (&total)[kSub][kPanel], bool first_run) {
#pragma GCC unroll 8
  for (int i = 0; i < kSub; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      float* to = total[i] + 16 * v;
      _mm512_store_ps(to, first_run ? sum[i][v] : _mm512_add_ps(_mm512_load_ps(to), sum[i][v]));
      sum[i][v] = _mm512_setzero_ps();
    }
  }
}

COLLM_AVX512_INLINE void multiply_panel(const Block& p, int64_t row, int64_t panel) {
  const int64_t o = panel * kPanel, rows = std::min(kSub, p.rows - row), outputs = p.right.outputs;
  __m512 sum[kSub][3];
  alignas(64) float total[kSub][kPanel];
  bool aside = false;
  for (int64_t n = 0; n < p.count; ++n) {
    if (n > 0) {
      set_aside(sum, total, !std::exchange(aside, true));
    }
    start_sums(p.sides[n], outputs, n == 0 ? p.start : nullptr, row, o, sum);
  }
  for (int64_t n = 0; n < p.count; ++n) {
    const Side& side = p.sides[n];
    // A row that does not exist repeats the last one, and is not written.
    const float* left[kSub];
#pragma GCC unroll 8
    for (int i = 0; i < kSub; ++i) {
      left[i] = side.left + (row + std::min<int64_t>(i, rows - 1)) * side.left_stride;
    }
    const float* right = p.right.panel(panel) + side.part.first * kPanel;
    // Runs of terms are summed apart, as a vendor's product does: the rounding error grows with the longest run.
    const int64_t terms = side.part.terms, runs = std::max<int64_t>(1, (terms + kRun - 1) / kRun);
    for (int64_t run = 0; run < runs; ++run) {
      if (n > 0 || run > 0) {
        set_aside(sum, total, !std::exchange(aside, true));
      }
      const int64_t end = terms * (run + 1) / runs;
      for (int64_t t = terms * run / runs; t < end; ++t, right += kPanel) {
        ask_for(right + kAhead);
        const __m512 w0 = _mm512_load_ps(right), w1 = _mm512_load_ps(right + 16), w2 = _mm512_load_ps(right + 32);
#pragma GCC unroll 8
        for (int i = 0; i < kSub; ++i) {
          const __m512 c = _mm512_set1_ps(left[i][t]);
          sum[i][0] = _mm512_fmadd_ps(c, w0, sum[i][0]);
          sum[i][1] = _mm512_fmadd_ps(c, w1, sum[i][1]);
          sum[i][2] = _mm512_fmadd_ps(c, w2, sum[i][2]);
        }
      }
    }
  }
  if (aside) {
#pragma GCC unroll 8
    for (int i = 0; i < kSub; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        sum[i][v] = _mm512_add_ps(_mm512_load_ps(total[i] + 16 * v), sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSub; ++i) {
    if (i < rows) {
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        float* to = p.out + (row + i) * outputs + o + 16 * v;
        _mm512_mask_storeu_ps(to, first(outputs - o - 16 * v), sum[i][v]);
      }
    }
  }
}

COLLM_AVX512_INLINE void multiply(const Block& p) {
  // The next block is asked for beside the last panels: what comes earlier the packed factor has pushed out by then.
  const int64_t panels = p.right.panels(), late = panels - (panels + 3) / 4;
  int64_t lines = 0;
  for (int64_t n = 0; n < p.nexts; ++n) {
    lines += p.next[n].lines();
  }
  const int64_t calls = std::max<int64_t>(1, (panels - late) * ((p.rows + kSub - 1) / kSub));
  const int64_t share = (lines + calls - 1) / calls;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t row = 0; row < p.rows; row += kSub) {
      int64_t left = panel < late ? 0 : share;
      for (int64_t n = 0; n < p.nexts && left > 0; ++n) {
        left = p.next[n].ask(left);
      }
      const bool more = row + kSub < p.rows;
      ask_for_outputs(p, more ? row + kSub : 0, more ? panel : panel + 1);
      multiply_panel(p, row, panel);
    }
  }
}

// y and s for the rows begin .. end - 1; s has room for kBlockRows rows.
COLLM_AVX512 inline void forward_rows(const Forward<float>& f, const Right& right, const Part& part, int64_t begin,
                                      int64_t end, float* s) {
  const int64_t rp = padded(f.r);
  for (int64_t m0 = begin; m0 < end; m0 += kBlockRows) {
    const int64_t last = std::min(m0 + kBlockRows, end);
    for (int64_t m = m0; m < last && f.r > 0; m += kRows) {
      avx512::project_x(f, m, std::min(kRows, last - m), s + (m - m0) * rp);
    }
    const Side side{f.x + m0 * f.x_stride, f.x_stride, part, s, f.b, nullptr, 0};
    Upcoming next{f.x + last * f.x_stride, f.x_stride, f.K, std::min(kBlockRows, end - last)};
    multiply({&side, 1, last - m0, right, f.bias, f.y + m0 * f.N, &next, 1});
  }
}

// dx and the sums of dA and dB^T of one part of the rows. ds and keep have room for kBlockRows rows of each projection.
COLLM_AVX512 inline void backward_rows(const std::vector<Backward<float>>& group, const Right& right,
                                       const std::vector<Part>& places, int64_t part, float* ds, uint16_t* keep) {
  const Backward<float>& any = group.front();
  const int64_t stride = avx512::keep_stride(any.K), end = any.parts.begin(part + 1);
  std::vector<Side> sides(group.size());
  std::vector<Upcoming> next;
  for (int64_t m0 = any.parts.begin(part); m0 < end; m0 += kBlockRows) {
    const int64_t last = std::min(m0 + kBlockRows, end);
    const int64_t more = std::min(kBlockRows, any.parts.M - last);
    float* coefficients = ds;
    uint16_t* bits = keep;
    bool reads_x = false;
    next.clear();
    for (size_t n = 0; n < group.size(); ++n) {
      const Backward<float>& f = group[n];
      const int64_t rp = padded(f.r);
      for (int64_t m = m0; m < last && f.r > 0; m += kRows) {
        const int64_t rows = std::min(kRows, last - m);
        float* to = coefficients + (m - m0) * rp;
        avx512::project_grad(f, m, rows, to, f.parts.B(part));
        avx512::mask_x(f, m, rows, to, bits + (m - m0) * stride, f.parts.A(part));
      }
      sides[n] = {f.grad + m0 * f.grad_stride, f.grad_stride, places[n], coefficients, f.a, bits, stride};
      next.push_back({f.grad + last * f.grad_stride, f.grad_stride, f.N, more});
      if (f.x != nullptr && !std::exchange(reads_x, true)) {
        next.push_back({f.x + last * f.x_stride, f.x_stride, f.K, more});
      }
      coefficients += kBlockRows * rp;
      bits += kBlockRows * stride;
    }
    const int64_t count = static_cast<int64_t>(group.size());
    multiply({sides.data(), count, last - m0, right, nullptr, any.dx + m0 * any.K, next.data(),
              static_cast<int64_t>(next.size())});
  }
}

}  // namespace collm::lora::product

#endif
