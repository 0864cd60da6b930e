// What lora_linear does to its rows on any CPU: what both directions are given, and passes in plain C++ that the
// compiler makes vectors of. lora_avx512.h has the same passes by hand, lora.cpp chooses between them.
//
// Forward: s = dropout(x) A^T, y = b + scaling s B^T. Backward: ds and dB from one pass over dy, dA and dx's low-rank
// part from one over x, for which the mask is drawn once. No mask and no masked x leaves the first-level cache.
// Every sum has a fixed order that no number of threads changes.
#pragma once

#include "lora_checks.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#define COLLM_X86 1
#define COLLM_AVX2 __attribute__((target("avx2,fma,f16c")))
#define COLLM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif
#define COLLM_INLINE inline __attribute__((always_inline))

namespace collm::lora {

constexpr int64_t kColumns = 640;  // columns in flight: eight rows of them in float32 stay in the first-level cache
constexpr int64_t kLanes = 8;      // the rank is padded to a multiple of this

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

struct Dropout {
  uint64_t seed = 0;
  uint32_t stream = 0, threshold = 0;
  double scale = 1.0;
};

// A factor with the rank along its rows, in the dtype of accumulation: [padded(r)][stride], zero outside [r][columns].
template <typename W>
struct Factor {
  const W* data;
  int64_t stride;
};

// One projection of a forward; r is 0 where it has no adapter.
template <typename T>
struct Forward {
  using W = typename Wide<T>::type;
  const T* x;
  int64_t x_stride, K, N, r;
  Factor<W> a, b;  // A and B^T
  const W* bias;   // [b.stride]; null, for a product of our own: none
  W scaling;
  Dropout dropout;
  T* y;
  bool add;  // to the frozen product that y holds
  W* s;
};

// The rows of a backward in parts of whole units, each with sums of its own of dA and dB^T; they are cut by the shapes
// alone. Rows past the last unit are the last part's.
template <typename W>
struct Parts {
  int64_t M, unit, count, size_A, size_B;
  W *data_A = nullptr, *data_B = nullptr;

  int64_t begin(int64_t part) const { return part == count ? M : M / unit * part / count * unit; }
  W* A(int64_t part) const { return data_A + part * size_A; }
  W* B(int64_t part) const { return data_B + part * size_B; }
  void clear(int64_t part) const {
    std::fill_n(A(part), size_A, W(0));
    std::fill_n(B(part), size_B, W(0));
  }
};

// One projection of a backward. Those of a group share their rows, K and dx.
template <typename T>
struct Backward {
  using W = typename Wide<T>::type;
  const T *grad, *x;  // x null: dA is not wanted
  int64_t grad_stride, x_stride, K, N, r;
  Factor<W> a, b;  // A and B^T
  const W* s;      // [M][r]; null: dB is not wanted
  W scaling;
  Dropout dropout;
  T* dx;           // [M][K], null: not wanted
  bool add;        // to what dx holds
  Parts<W> parts;  // of dA and dB

  bool wants_ds() const { return dx != nullptr || x != nullptr; }
};

COLLM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
COLLM_INLINE int64_t padded(int64_t r) { return round_up(r, kLanes); }

COLLM_INLINE float widen(torch::headeronly::BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
COLLM_INLINE float widen(torch::headeronly::Half v) { return static_cast<float>(v); }
COLLM_INLINE float widen(float v) { return v; }
COLLM_INLINE double widen(double v) { return v; }

template <typename T, typename W>
COLLM_INLINE T narrow(W v) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    // Without a branch, so that it vectorises; to nearest, ties to even, NaN stays NaN.
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return T(static_cast<uint16_t>(nan ? 0x7FC0u : rounded), T::from_bits());
  } else {
    return static_cast<T>(v);
  }
}

namespace plain {

constexpr int64_t kRows = 8;  // rows in flight

// keep[i] = 0xFF or 0 for the columns k0 .. k0 + n - 1 of one row; k0 is a multiple of 8, keep holds kColumns.
COLLM_INLINE void draw_keep(const Dropout& d, uint64_t row, int64_t k0, int64_t n, uint8_t* keep) {
  constexpr int kBlocks = 16;
  const int64_t first = k0 / 8, blocks = (n + 7) / 8;
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks], words[4 * kBlocks];
#pragma GCC unroll 1
#pragma GCC ivdep
    for (int i = 0; i < kBlocks; ++i) {
      c0[i] = static_cast<uint32_t>(first + b + i);
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = static_cast<uint32_t>(row >> 32);
      c3[i] = d.stream;
    }
    // collm::philox with sixteen counters side by side: the compiler makes vectors of the inner loop.
    uint32_t k_lo = static_cast<uint32_t>(d.seed), k_hi = static_cast<uint32_t>(d.seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 1
#pragma GCC ivdep
      for (int i = 0; i < kBlocks; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k_lo;
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k_hi;
        c1[i] = static_cast<uint32_t>(p1);
        c3[i] = static_cast<uint32_t>(p0);
      }
      k_lo += 0x9E3779B9u;
      k_hi += 0xBB67AE85u;
    }
#pragma GCC unroll 1
#pragma GCC ivdep
    for (int i = 0; i < kBlocks; ++i) {
      words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
    }
    // Little-endian: the low half of word 0 comes first, as the definition wants.
    uint16_t halves[8 * kBlocks];
    std::memcpy(halves, words, sizeof(halves));
    const int64_t count = std::min<int64_t>(8 * kBlocks, kColumns - 8 * b);
    for (int64_t i = 0; i < count; ++i) {
      keep[8 * b + i] = halves[i] >= d.threshold ? 0xFF : 0;
    }
  }
}

// One stretch of kRows rows in the wide type, dropped elements zero; rows past `rows` and columns past n are zero.
template <typename T, typename W>
COLLM_INLINE void load_stretch(const T* v, int64_t stride, int64_t rows, int64_t n, const uint8_t* keep, W* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    W* to = out + i * kColumns;
    if (i >= rows) {
      std::fill_n(to, n, W(0));
    } else if (keep == nullptr) {
      for (int64_t k = 0; k < n; ++k) {
        to[k] = widen(v[i * stride + k]);
      }
    } else {
      const uint8_t* row = keep + i * kColumns;
      for (int64_t k = 0; k < n; ++k) {
        to[k] = row[k] ? widen(v[i * stride + k]) : W(0);
      }
    }
    std::fill(to + n, to + round_up(n, kLanes), W(0));
  }
}

// out[i][j] += sum_k v[i][k] factor[j][k]: v [kRows][kColumns], factor rp rows, out [kRows][rp].
template <typename W>
COLLM_INLINE void project(const W* v, int64_t n, Factor<W> factor, int64_t rp, W* out) {
  typedef W Lanes __attribute__((vector_size(kLanes * sizeof(W)), aligned(alignof(W)), may_alias));
  for (int64_t j = 0; j < rp; j += kLanes) {
    for (int64_t i = 0; i < kRows; ++i) {
      // Eight lanes of eight ranks: sixty-four short sums, so the rounding error grows slowly.
      Lanes sum[kLanes] = {};
      for (int64_t k = 0; k < n; k += kLanes) {
        const Lanes row = *reinterpret_cast<const Lanes*>(v + i * kColumns + k);
        for (int64_t l = 0; l < kLanes; ++l) {
          sum[l] += row * *reinterpret_cast<const Lanes*>(factor.data + (j + l) * factor.stride + k);
        }
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        const Lanes& t = sum[l];
        out[i * rp + j + l] += ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
      }
    }
  }
}

// out[k] += sum_{i < 8} coefficient[i * step] rows[i * stride + k]: the inner step of `expand` and of `outer`.
template <typename W>
COLLM_INLINE void add_eight(W* out, int64_t n, const W* coefficient, int64_t step, const W* rows, int64_t stride) {
  static_assert(kRows == 8 && kLanes == 8);
  const W a = coefficient[0], b = coefficient[step], c = coefficient[2 * step], d = coefficient[3 * step];
  const W e = coefficient[4 * step], f = coefficient[5 * step], g = coefficient[6 * step], h = coefficient[7 * step];
  const W *r0 = rows, *r1 = rows + stride, *r2 = rows + 2 * stride, *r3 = rows + 3 * stride;
  const W *r4 = rows + 4 * stride, *r5 = rows + 5 * stride, *r6 = rows + 6 * stride, *r7 = rows + 7 * stride;
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    out[k] += ((a * r0[k] + b * r1[k]) + (c * r2[k] + d * r3[k])) + ((e * r4[k] + f * r5[k]) + (g * r6[k] + h * r7[k]));
  }
}

// out[i][k] += sum_j s[i][j] factor[j][k]: s [kRows][rp], factor [rp] rows of `stride`, out [kRows][kColumns].
template <typename W>
COLLM_INLINE void expand(const W* s, int64_t rp, const W* factor, int64_t stride, int64_t n, W* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < rp; j += kLanes) {
      add_eight(out + i * kColumns, n, s + i * rp + j, 1, factor + j * stride, stride);
    }
  }
}

// out[j][k] += sum_i s[i][j] v[i][k]: s [kRows][rp], v [kRows][kColumns], out [rp] rows of `stride`.
template <typename W>
COLLM_INLINE void outer(const W* s, int64_t rp, const W* v, int64_t n, W* out, int64_t stride) {
  for (int64_t j = 0; j < rp; ++j) {
    add_eight(out + j * stride, n, s + j, rp, v, kColumns);
  }
}

// to[c] = v[c], or that much more, for n columns of one row.
template <typename T, typename W>
COLLM_INLINE void store_stretch(const W* v, int64_t n, bool add, T* to) {
  for (int64_t c = 0; add && c < n; ++c) {
    to[c] = narrow<T, W>(v[c] + widen(to[c]));
  }
  for (int64_t c = 0; !add && c < n; ++c) {
    to[c] = narrow<T, W>(v[c]);
  }
}

template <typename T>
COLLM_INLINE void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {
  using W = typename Wide<T>::type;
  const int64_t rp = padded(f.r);
  const bool has_mask = f.dropout.threshold > 0;
  alignas(64) uint8_t keep[kRows * kColumns];
  alignas(64) W v[kRows * kColumns];
  alignas(64) W s[kRows * kMaxRank];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    std::fill_n(s, kRows * rp, W(0));
    for (int64_t k = 0; k < f.K; k += kColumns) {
      const int64_t n = std::min(kColumns, f.K - k);
      for (int64_t i = 0; has_mask && i < rows; ++i) {
        draw_keep(f.dropout, static_cast<uint64_t>(m + i), k, n, keep + i * kColumns);
      }
      load_stretch<T, W>(f.x + m * f.x_stride + k, f.x_stride, rows, n, has_mask ? keep : nullptr, v);
      project<W>(v, n, {f.a.data + k, f.a.stride}, rp, s);
    }
    const W scale = static_cast<W>(f.dropout.scale);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < f.r; ++j) {
        s[i * rp + j] *= scale;
        f.s[(m + i) * f.r + j] = s[i * rp + j];
      }
    }
    for (int64_t i = 0; i < kRows * rp; ++i) {
      s[i] *= f.scaling;
    }
    for (int64_t k = 0; k < f.N; k += kColumns) {
      const int64_t n = std::min(kColumns, f.N - k);
      for (int64_t i = 0; i < kRows; ++i) {
        std::copy_n(f.bias + k, n, v + i * kColumns);
      }
      expand<W>(s, rp, f.b.data + k, f.b.stride, n, v);
      for (int64_t i = 0; i < rows; ++i) {
        store_stretch<T, W>(v + i * kColumns, n, f.add, f.y + (m + i) * f.N + k);
      }
    }
  }
}

// The rows begin .. end - 1: dx's low-rank part, and what they add to dA [rp][a.stride] and dB^T [rp][b.stride].
template <typename T>
COLLM_INLINE void backward_rows(const Backward<T>& f, int64_t begin, int64_t end, typename Wide<T>::type* dA,
                                typename Wide<T>::type* dB) {
  using W = typename Wide<T>::type;
  const int64_t rp = padded(f.r);
  const bool has_mask = f.dropout.threshold > 0;
  alignas(64) uint8_t keep[kRows * kColumns];
  alignas(64) W v[kRows * kColumns];
  alignas(64) W s[kRows * kMaxRank];
  alignas(64) W ds[kRows * kMaxRank];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    std::fill_n(s, kRows * rp, W(0));
    std::fill_n(ds, kRows * rp, W(0));
    for (int64_t i = 0; f.s != nullptr && i < rows; ++i) {
      std::copy_n(f.s + (m + i) * f.r, f.r, s + i * rp);
    }
    for (int64_t k = 0; k < f.N; k += kColumns) {
      const int64_t n = std::min(kColumns, f.N - k);
      load_stretch<T, W>(f.grad + m * f.grad_stride + k, f.grad_stride, rows, n, nullptr, v);
      if (f.wants_ds()) {
        project<W>(v, n, {f.b.data + k, f.b.stride}, rp, ds);
      }
      if (f.s != nullptr) {
        outer<W>(s, rp, v, n, dB + k, f.b.stride);
      }
    }
    // scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
    const W scale = f.scaling * static_cast<W>(f.dropout.scale);
    for (int64_t i = 0; i < kRows * rp; ++i) {
      ds[i] *= scale;
    }
    for (int64_t k = 0; k < f.K && f.wants_ds(); k += kColumns) {
      const int64_t n = std::min(kColumns, f.K - k);
      for (int64_t i = 0; has_mask && i < rows; ++i) {
        draw_keep(f.dropout, static_cast<uint64_t>(m + i), k, n, keep + i * kColumns);
      }
      if (f.x != nullptr) {
        load_stretch<T, W>(f.x + m * f.x_stride + k, f.x_stride, rows, n, has_mask ? keep : nullptr, v);
        outer<W>(ds, rp, v, n, dA + k, f.a.stride);
      }
      if (f.dx == nullptr) {
        continue;
      }
      for (int64_t i = 0; i < kRows; ++i) {
        std::fill_n(v + i * kColumns, n, W(0));
      }
      expand<W>(ds, rp, f.a.data + k, f.a.stride, n, v);
      for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* row = keep + i * kColumns;
        T* to = f.dx + (m + i) * f.K + k;
        W* from = v + i * kColumns;
        for (int64_t c = 0; has_mask && c < n; ++c) {
          from[c] = row[c] ? from[c] : W(0);
        }
        store_stretch<T, W>(from, n, f.add, to);
      }
    }
  }
}

}  // namespace plain
}  // namespace collm::lora
