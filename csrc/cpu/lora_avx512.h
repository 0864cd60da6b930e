// The passes of lora_rows.h by hand for AVX-512: the mask as bits that zero what a load brings (lora_masks.h), sums in
// registers over eight ranks. Also the parts that lora_tiles.h builds on.
//
// A pass over rows in a cache costs 1.7 percent of the frozen product at K = N = 576 in float32, the mask 2.6.
#pragma once

#include "lora_masks.h"

#if defined(COLLM_X86)

namespace collm::lora::avx512 {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kRows = 32;              // rows of one stretch: what is read of a factor serves all of them
constexpr int64_t kWords = kColumns / 16;  // of 16 bits, a mask's row of one stretch

template <typename T>
COLLM_AVX512_INLINE __m512 load16(const T* p, __mmask16 keep) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(keep, p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, p)), 16));
  } else {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(keep, p));
  }
}

template <typename T>
COLLM_AVX512_INLINE void store16(T* p, __mmask16 keep, __m512 v) {
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, keep, v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    // As `narrow`: to nearest, ties to even, NaN stays NaN.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    _mm512_mask_cvtepi32_storeu_epi16(p, keep, rounded);
  } else {
    _mm256_mask_storeu_epi16(p, keep, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}

// What the loop reads or writes soon: from beyond the first-level cache its lines come too late otherwise.
template <typename T>
COLLM_AVX512_INLINE void ask_for(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// The transpose of sixteen vectors.
COLLM_AVX512_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[q], v[q + 1]), b = _mm512_unpackhi_epi32(v[q], v[q + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[q + 2], v[q + 3]), d = _mm512_unpackhi_epi32(v[q + 2], v[q + 3]);
    t[q] = _mm512_unpacklo_epi64(a, c), t[q + 1] = _mm512_unpackhi_epi64(a, c);
    t[q + 2] = _mm512_unpacklo_epi64(b, d), t[q + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[q + c] holds in its lane l column 4 l + c of the rows q .. q + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even0 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xDD);
    const __m512i even1 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xDD);
    v[c] = _mm512_shuffle_i32x4(even0, even1, 0x88), v[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
    v[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88), v[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
  }
}

// The sums of sixteen vectors, in order.
COLLM_AVX512_INLINE __m512 sums(const __m512 (&v)[16]) {
  __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xDD));
}

// out[i][j] += sum_k v[i][k] factor[j][k] over kept columns, for one or two rows i and eight ranks j.
template <typename T, int Rows>
COLLM_AVX512_INLINE void project8(const T* v, int64_t v_stride, const uint16_t* keep, int64_t keep_stride, int64_t n,
                                  Factor<float> factor, float* out, int64_t out_stride) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    sum[i] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < n; k += 16) {
    __m512 row[Rows];
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
      row[i] = load16(v + i * v_stride + k, keep[i * keep_stride + k / 16]);
      ask_for(v + (i + Rows) * v_stride + k);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512 f = _mm512_load_ps(factor.data + j * factor.stride + k);
      asm("" : "+v"(f));  // in a register: read anew for each row, it would take more loads than multiplications
#pragma GCC unroll 2
      for (int i = 0; i < Rows; ++i) {
        sum[8 * i + j] = _mm512_fmadd_ps(row[i], f, sum[8 * i + j]);
      }
    }
  }
  const __m512 both = sums(sum);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm512_castps512_ps256(both)));
  if constexpr (Rows == 2) {
    float* next = out + out_stride;
    _mm256_storeu_ps(next, _mm256_add_ps(_mm256_loadu_ps(next), _mm512_extractf32x8_ps(both, 1)));
  }
}

// out[i][j] += sum_k v[i][k] factor[j][k] over kept columns: factor rp rows, out [rows][rp].
template <typename T>
COLLM_AVX512_INLINE void project(const T* v, int64_t v_stride, int64_t rows, const uint16_t* keep, int64_t keep_stride,
                                 int64_t n, Factor<float> factor, int64_t rp, float* out) {
  for (int64_t j = 0; j < rp; j += 8) {
    const Factor<float> eight{factor.data + j * factor.stride, factor.stride};
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      project8<T, 2>(v + i * v_stride, v_stride, keep + i * keep_stride, keep_stride, n, eight, out + i * rp + j, rp);
    }
    if (i < rows) {
      project8<T, 1>(v + i * v_stride, v_stride, keep + i * keep_stride, keep_stride, n, eight, out + i * rp + j, rp);
    }
  }
}

// out[i][k] = start[k] + sum_j s[i][j] factor[j][k] where kept, else 0, or that much more: s [round_up(rows, 8)][rp];
// start may be null.
template <typename T>
COLLM_AVX512_INLINE void expand(const float* s, int64_t r, int64_t rp, int64_t rows, Factor<float> factor,
                                const float* start, const uint16_t* keep, int64_t keep_stride, int64_t n, bool add,
                                T* out, int64_t out_stride) {
  for (int64_t i0 = 0; i0 < rows; i0 += 8) {
    for (int64_t k = 0; k < n; k += 32) {
      __m512 sum[8][2];
      const __m512 s0 = start ? _mm512_load_ps(start + k) : _mm512_setzero_ps();
      const __m512 s1 = start ? _mm512_load_ps(start + k + 16) : _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        sum[i][0] = s0, sum[i][1] = s1;
        ask_for(out + (i0 + i) * out_stride + k + 32);
        ask_for(out + (i0 + i) * out_stride + k + 48);
      }
      for (int64_t j = 0; j < r; ++j) {
        const __m512 f0 = _mm512_load_ps(factor.data + j * factor.stride + k);
        const __m512 f1 = _mm512_load_ps(factor.data + j * factor.stride + k + 16);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512 c = _mm512_set1_ps(s[(i0 + i) * rp + j]);
          sum[i][0] = _mm512_fmadd_ps(c, f0, sum[i][0]);
          sum[i][1] = _mm512_fmadd_ps(c, f1, sum[i][1]);
        }
      }
      const __mmask16 e0 = first(n - k), e1 = first(n - k - 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        if (i0 + i < rows) {
          const uint16_t* bits = keep + (i0 + i) * keep_stride + k / 16;
          T* to = out + (i0 + i) * out_stride + k;
          const __m512 b0 = add ? load16(to, e0) : _mm512_setzero_ps(), b1 = add ? load16(to + 16, e1) : b0;
          const __m512 v0 = _mm512_mask_add_ps(b0, bits[0], b0, sum[i][0]);
          const __m512 v1 = _mm512_mask_add_ps(b1, bits[1], b1, sum[i][1]);
          store16(to, e0, v0);
          store16(to + 16, e1, v1);
        }
      }
    }
  }
}

// out[j][k] += sum_i s[i][j] v[i][k] over kept columns: s [rows][rp], out rp rows of `stride`.
template <typename T>
COLLM_AVX512_INLINE void outer(const float* s, int64_t rp, const T* v, int64_t v_stride, int64_t rows,
                               const uint16_t* keep, int64_t keep_stride, int64_t n, float* out, int64_t stride) {
  for (int64_t j0 = 0; j0 < rp; j0 += 8) {
    for (int64_t k = 0; k < n; k += 32) {
      float* to = out + j0 * stride + k;
      __m512 sum[8][2];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        sum[j][0] = _mm512_load_ps(to + j * stride), sum[j][1] = _mm512_load_ps(to + j * stride + 16);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const uint16_t* bits = keep + i * keep_stride + k / 16;
        const __m512 v0 = load16(v + i * v_stride + k, bits[0]), v1 = load16(v + i * v_stride + k + 16, bits[1]);
        ask_for(v + i * v_stride + k + 32);
        ask_for(v + i * v_stride + k + 48);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          const __m512 c = _mm512_set1_ps(s[i * rp + j0 + j]);
          sum[j][0] = _mm512_fmadd_ps(c, v0, sum[j][0]);
          sum[j][1] = _mm512_fmadd_ps(c, v1, sum[j][1]);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        _mm512_store_ps(to + j * stride, sum[j][0]), _mm512_store_ps(to + j * stride + 16, sum[j][1]);
      }
    }
  }
}

// s = dropout(x) A^T of kRows rows from m on, into `s` [kRows][rp] and, unpadded, into f.s; zero past `rows`.
template <typename T>
COLLM_AVX512_INLINE void project_x(const Forward<T>& f, int64_t m, int64_t rows, float* s) {
  alignas(64) uint16_t keep[kRows * kWords];
  const int64_t rp = padded(f.r);
  std::fill_n(s, kRows * rp, 0.0f);
  for (int64_t k = 0; k < f.K; k += kColumns) {
    const int64_t n = std::min(kColumns, f.K - k);
    const Ahead ahead = Ahead::of(f.x + m * f.x_stride + k, f.x_stride);
    draw_keep(f.dropout, static_cast<uint64_t>(m), rows, k, n, keep, kWords, ahead);
    project(f.x + m * f.x_stride + k, f.x_stride, rows, keep, kWords, n, {f.a.data + k, f.a.stride}, rp, s);
  }
  const float scale = static_cast<float>(f.dropout.scale);
  for (int64_t i = 0; i < rows * rp; ++i) {
    s[i] *= scale;
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(f.s + (m + i) * f.r, s + i * rp, static_cast<size_t>(f.r) * sizeof(float));
  }
  for (int64_t i = 0; i < rows * rp; ++i) {
    s[i] *= f.scaling;
  }
}

template <typename T>
COLLM_AVX512_INLINE void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {
  const int64_t rp = padded(f.r);
  alignas(64) float s[kRows * kMaxRank];
  alignas(64) uint16_t all[kWords];
  std::fill_n(all, kWords, uint16_t{0xFFFF});
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    project_x(f, m, rows, s);
    for (int64_t k = 0; k < f.N; k += kColumns) {
      const int64_t n = std::min(kColumns, f.N - k);
      expand<T>(s, f.r, rp, rows, {f.b.data + k, f.b.stride}, f.bias + k, all, 0, n, f.add, f.y + m * f.N + k, f.N);
    }
  }
}

// ds = scaling / (1 - q) dy B of kRows rows from m on, into `ds` [kRows][rp], zero past `rows`; dB^T += s^T dy.
template <typename T>
COLLM_AVX512_INLINE void project_grad(const Backward<T>& f, int64_t m, int64_t rows, float* ds, float* dB) {
  const int64_t rp = padded(f.r);
  alignas(64) float s[kRows * kMaxRank];
  alignas(64) uint16_t all[kWords];
  std::fill_n(ds, kRows * rp, 0.0f);
  if (f.s != nullptr && f.r != rp) {
    std::fill_n(s, rows * rp, 0.0f);
  }
  for (int64_t i = 0; f.s != nullptr && i < rows; ++i) {
    std::memcpy(s + i * rp, f.s + (m + i) * f.r, static_cast<size_t>(f.r) * sizeof(float));
  }
  for (int64_t k = 0; k < f.N; k += kColumns) {
    const int64_t n = std::min(kColumns, f.N - k);
    const T* grad = f.grad + m * f.grad_stride + k;
    keep_all(n, all);
    // First what takes a strip of every row at once: where dy comes from memory, its misses overlap.
    if (f.s != nullptr) {
      outer(s, rp, grad, f.grad_stride, rows, all, 0, n, dB + k, f.b.stride);
    }
    if (f.wants_ds()) {
      project(grad, f.grad_stride, rows, all, 0, n, {f.b.data + k, f.b.stride}, rp, ds);
    }
  }
  const float scale = f.scaling * static_cast<float>(f.dropout.scale);
  for (int64_t i = 0; i < rows * rp; ++i) {
    ds[i] *= scale;
  }
}

template <typename T>
COLLM_AVX512_INLINE void backward_rows(const Backward<T>& f, int64_t begin, int64_t end, float* dA, float* dB) {
  const int64_t rp = padded(f.r);
  alignas(64) float ds[kRows * kMaxRank];
  alignas(64) uint16_t keep[kRows * kWords];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    project_grad(f, m, rows, ds, dB);
    for (int64_t k = 0; k < f.K && f.wants_ds(); k += kColumns) {
      const int64_t n = std::min(kColumns, f.K - k);
      const T* x = f.x == nullptr ? nullptr : f.x + m * f.x_stride + k;
      draw_keep(f.dropout, static_cast<uint64_t>(m), rows, k, n, keep, kWords, Ahead::of(x, f.x_stride));
      if (x != nullptr) {
        outer(ds, rp, x, f.x_stride, rows, keep, kWords, n, dA + k, f.a.stride);
      }
      if (f.dx != nullptr) {
        T* dx = f.dx + m * f.K + k;
        expand<T>(ds, f.r, rp, rows, {f.a.data + k, f.a.stride}, nullptr, keep, kWords, n, f.add, dx, f.K);
      }
    }
  }
}

}  // namespace collm::lora::avx512

#endif
