// lora_linear on the CPU: checks, the fused passes over x and over the gradient, the vendor GEMM, registration.
//
// Forward: one pass over x draws the mask, gives s = dropout(x) A^T and writes y = b + scaling s B^T; the vendor GEMM
// then adds x W^T (beta = 1). Backward: one pass over dy (ds, dB), one over x (dA, and dx's low-rank part, for which
// the mask is drawn once), and the GEMM adds dy W. No mask and no masked x ever leaves the first-level cache.
// Every sum has a fixed order that no number of threads and no vector width changes.
#include "isa.h"
#include "lora_checks.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#if defined(__x86_64__)
#define COLLM_X86 1
#define COLLM_AVX2 __attribute__((target("avx2,fma,f16c")))
#define COLLM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif
#define COLLM_INLINE inline __attribute__((always_inline))

namespace collm::lora {
namespace {

constexpr int64_t kRows = 8;       // rows in flight: eight independent sums hide the latency of an addition
constexpr int64_t kColumns = 512;  // columns in flight: kRows of them stay in the first-level cache
constexpr int64_t kBlock = 64;     // terms summed apart, as a GEMM does: the rounding error grows with the longest run
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

COLLM_INLINE int64_t padded(int64_t r) { return (r + kLanes - 1) / kLanes * kLanes; }

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

// One stretch of kRows rows in the wide type, dropped elements zero; rows past `rows` are zero.
template <typename T, typename W>
COLLM_INLINE void load_stretch(const T* v, int64_t stride, int64_t rows, int64_t n, const uint8_t* keep, W* out) {
  for (int64_t i = 0; i < kRows; ++i) {
    W* to = out + i * kColumns;
    if (i >= rows) {
      std::fill_n(to, n, W(0));
      continue;
    }
    const T* from = v + i * stride;
    if (keep == nullptr) {
      for (int64_t k = 0; k < n; ++k) {
        to[k] = widen(from[k]);
      }
    } else {
      const uint8_t* row = keep + i * kColumns;
      for (int64_t k = 0; k < n; ++k) {
        to[k] = row[k] ? widen(from[k]) : W(0);
      }
    }
  }
}

// out[i][j] += sum_k v[i][k] factor[k][j]: v [kRows][kColumns], factor [n][rp], out [kRows][rp].
template <typename W>
COLLM_INLINE void project(const W* v, int64_t n, const W* factor, int64_t rp, W* out) {
  typedef W Lanes __attribute__((vector_size(kLanes * sizeof(W)), aligned(alignof(W)), may_alias));
  for (int64_t j = 0; j < rp; j += kLanes) {
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
      Lanes sum[kRows] = {};
      for (int64_t k = k0; k < std::min(k0 + kBlock, n); ++k) {
        const Lanes f = *reinterpret_cast<const Lanes*>(factor + k * rp + j);
        for (int64_t i = 0; i < kRows; ++i) {
          sum[i] += v[i * kColumns + k] * f;
        }
      }
      for (int64_t i = 0; i < kRows; ++i) {
        *reinterpret_cast<Lanes*>(out + i * rp + j) += sum[i];
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

template <typename T>
struct Forward {
  using W = typename Wide<T>::type;
  const T* x;
  int64_t x_stride, K, N, r;
  const W *a, *b, *bias;  // a [K][rp], b [rp][N], bias [N]
  W scaling;
  bool has_mask;
  Dropout dropout;
  T* y;
  W* s;
};

template <typename T>
COLLM_INLINE void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {
  using W = typename Wide<T>::type;
  const int64_t rp = padded(f.r);
  alignas(64) uint8_t keep[kRows * kColumns];
  alignas(64) W v[kRows * kColumns];
  alignas(64) W s[kRows * kMaxRank];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = std::min(kRows, end - m);
    std::fill_n(s, kRows * rp, W(0));
    for (int64_t k = 0; k < f.K; k += kColumns) {
      const int64_t n = std::min(kColumns, f.K - k);
      for (int64_t i = 0; f.has_mask && i < rows; ++i) {
        draw_keep(f.dropout, static_cast<uint64_t>(m + i), k, n, keep + i * kColumns);
      }
      load_stretch<T, W>(f.x + m * f.x_stride + k, f.x_stride, rows, n, f.has_mask ? keep : nullptr, v);
      project<W>(v, n, f.a + k * rp, rp, s);
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
      expand<W>(s, rp, f.b + k, f.N, n, v);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < n; ++c) {
          f.y[(m + i) * f.N + k + c] = narrow<T, W>(v[i * kColumns + c]);
        }
      }
    }
  }
}

template <typename T>
struct Backward {
  using W = typename Wide<T>::type;
  const T *grad, *x;  // x null: dA is not wanted
  int64_t grad_stride, x_stride, K, N, r;
  const W *a, *b, *s;  // a [rp][K], b [N][rp], s [M][r]; s null: dB is not wanted
  W scaling;
  bool has_mask;
  Dropout dropout;
  T* dx;  // [M][K], null: not wanted
};

// The rows begin .. end - 1: dx's low-rank part, and what they add to dA [rp][K] and dB [rp][N].
template <typename T>
COLLM_INLINE void backward_rows(const Backward<T>& f, int64_t begin, int64_t end, typename Wide<T>::type* dA,
                                typename Wide<T>::type* dB) {
  using W = typename Wide<T>::type;
  const int64_t rp = padded(f.r);
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
      if (f.dx != nullptr || f.x != nullptr) {
        project<W>(v, n, f.b + k * rp, rp, ds);
      }
      if (f.s != nullptr) {
        outer<W>(s, rp, v, n, dB + k, f.N);
      }
    }
    // scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
    const W scale = f.scaling * static_cast<W>(f.dropout.scale);
    for (int64_t i = 0; i < kRows * rp; ++i) {
      ds[i] *= scale;
    }
    for (int64_t k = 0; k < f.K && (f.dx != nullptr || f.x != nullptr); k += kColumns) {
      const int64_t n = std::min(kColumns, f.K - k);
      for (int64_t i = 0; f.has_mask && i < rows; ++i) {
        draw_keep(f.dropout, static_cast<uint64_t>(m + i), k, n, keep + i * kColumns);
      }
      if (f.x != nullptr) {
        load_stretch<T, W>(f.x + m * f.x_stride + k, f.x_stride, rows, n, f.has_mask ? keep : nullptr, v);
        outer<W>(ds, rp, v, n, dA + k, f.K);
      }
      if (f.dx == nullptr) {
        continue;
      }
      for (int64_t i = 0; i < kRows; ++i) {
        std::fill_n(v + i * kColumns, n, W(0));
      }
      expand<W>(ds, rp, f.a + k, f.K, n, v);
      for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* row = keep + i * kColumns;
        T* to = f.dx + (m + i) * f.K + k;
        for (int64_t c = 0; c < n; ++c) {
          to[c] = narrow<T, W>(!f.has_mask || row[c] ? v[i * kColumns + c] : W(0));
        }
      }
    }
  }
}

// The same bodies compiled for each instruction set; isa.h chooses, at run time.
template <typename T>
struct Rows {
  using W = typename Wide<T>::type;
  using ForwardFn = void (*)(const Forward<T>&, int64_t, int64_t);
  using BackwardFn = void (*)(const Backward<T>&, int64_t, int64_t, W*, W*);

  static void forward_plain(const Forward<T>& f, int64_t begin, int64_t end) { forward_rows<T>(f, begin, end); }
  static void backward_plain(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    backward_rows<T>(f, begin, end, dA, dB);
  }
#if defined(COLLM_X86)
  COLLM_AVX2 static void forward_avx2(const Forward<T>& f, int64_t begin, int64_t end) {
    forward_rows<T>(f, begin, end);
  }
  COLLM_AVX2 static void backward_avx2(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    backward_rows<T>(f, begin, end, dA, dB);
  }
  COLLM_AVX512 static void forward_avx512(const Forward<T>& f, int64_t begin, int64_t end) {
    forward_rows<T>(f, begin, end);
  }
  COLLM_AVX512 static void backward_avx512(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    backward_rows<T>(f, begin, end, dA, dB);
  }
#endif

  static ForwardFn forward() {
#if defined(COLLM_X86)
    return isa() == Isa::avx512 ? forward_avx512 : isa() == Isa::avx2 ? forward_avx2 : forward_plain;
#else
    return forward_plain;
#endif
  }
  static BackwardFn backward() {
#if defined(COLLM_X86)
    return isa() == Isa::avx512 ? backward_avx512 : isa() == Isa::avx2 ? backward_avx2 : backward_plain;
#else
    return backward_plain;
#endif
  }
};

// One compile-time switch over the served dtypes; the body reads `scalar_t`.
#define COLLM_DISPATCH(type, body)                                                                      \
  THO_DISPATCH_V2(type, "lora_linear", AT_WRAP([&] { body; }), AT_FLOATING_TYPES, ScalarType::BFloat16, \
                  ScalarType::Half)

template <typename W, typename T>
void copy_factor(const Tensor& factor, int64_t row_step, int64_t column_step, W* out) {
  const int64_t R = factor.size(0), C = factor.dim() == 2 ? factor.size(1) : 1;
  const int64_t si = factor.stride(0), sj = factor.dim() == 2 ? factor.stride(1) : 0;
  const T* from = static_cast<const T*>(factor.data_ptr());
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < C; ++j) {
      out[i * row_step + j * column_step] = static_cast<W>(from[i * si + j * sj]);
    }
  }
}

// A factor [R, C] of any dtype and strides, as W with element (i, j) at i * row_step + j * column_step; the rest zero.
template <typename W>
std::vector<W> unpack(const Tensor& factor, int64_t size, int64_t row_step, int64_t column_step) {
  std::vector<W> out(static_cast<size_t>(std::max<int64_t>(size, 1)), W(0));
  COLLM_DISPATCH(factor.scalar_type(), (copy_factor<W, scalar_t>(factor, row_step, column_step, out.data())));
  return out;
}

Dropout dropout(double p, const std::optional<Tensor>& seed, int64_t stream) {
  Dropout d;
  d.threshold = seed ? dropout_threshold(p) : 0;
  if (d.threshold > 0) {
    d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    d.stream = static_cast<uint32_t>(stream);
    d.scale = dropout_scale(d.threshold);
  }
  return d;
}

// out += left right, by the vendor's GEMM.
void add_product(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
}

// s, and y = b + scaling s B^T, for the rows [M, K] of x.
template <typename T>
void low_rank_forward(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                      double scaling, const Dropout& d, const Tensor& y, const Tensor& s) {
  using W = typename Wide<T>::type;
  const int64_t M = x.size(0), K = x.size(1), N = lora_B.size(0), r = lora_B.size(1), rp = padded(r);
  const std::vector<W> a = unpack<W>(lora_A, K * rp, 1, rp), b = unpack<W>(lora_B, rp * N, 1, N);
  const std::vector<W> c = bias ? unpack<W>(*bias, N, 1, 0) : std::vector<W>(static_cast<size_t>(N), W(0));
  Forward<T> f{};
  f.x = static_cast<const T*>(x.data_ptr());
  f.x_stride = x.stride(0), f.K = K, f.N = N, f.r = r;
  f.a = a.data(), f.b = b.data(), f.bias = c.data();
  f.scaling = static_cast<W>(scaling), f.has_mask = d.threshold > 0, f.dropout = d;
  f.y = static_cast<T*>(y.data_ptr()), f.s = static_cast<W*>(s.data_ptr());
  const auto run = Rows<T>::forward();
  // Rows do not meet in any sum, so how they are shared out does not change a bit.
  torch::stable::parallel_for(0, (M + kRows - 1) / kRows, 4,
                              [&](int64_t begin, int64_t end) { run(f, begin * kRows, std::min(end * kRows, M)); });
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                   double scaling, double dropout_p, std::optional<Tensor> seed, int64_t stream) {
  check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream);
  const int64_t N = weight.size(0);
  Tensor y = new_rows(x, leading(x), N, x.scalar_type());
  Tensor s = new_rows(x, leading(x), lora_A.size(0), wide(x.scalar_type()));
  const Tensor rows = as_rows(x);
  if (rows.size(0) > 0) {
    const Dropout d = dropout(dropout_p, seed, stream);
    COLLM_DISPATCH(x.scalar_type(), low_rank_forward<scalar_t>(rows, bias, lora_A, lora_B, scaling, d, y, s));
    const std::array<int64_t, 2> flat{rows.size(0), N};
    add_product(torch::stable::view(y, flat), rows, torch::stable::transpose(weight, 0, 1));
  }
  return {y, s};
}

// How many partial sums of dA and dB: a function of the shapes alone, at most 64 MiB of them.
int64_t partial_sums(int64_t M, int64_t bytes_each) {
  const int64_t wanted = std::clamp<int64_t>(M / 256, 1, 64);
  return std::max<int64_t>(1, std::min(wanted, (int64_t{64} << 20) / std::max<int64_t>(bytes_each, 1)));
}

// out [R, C] = scale times the partial sums, added in order; element (i, j) of each is at i * row_step + j *
// column_step.
template <typename W, typename T>
void reduce_into(const Tensor& out, const std::vector<W>& partial, int64_t parts, int64_t row_step, int64_t column_step,
                 W scale) {
  const int64_t R = out.size(0), C = out.size(1), size = static_cast<int64_t>(partial.size()) / parts;
  T* to = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, R * C, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const W* from = partial.data() + (e / C) * row_step + (e % C) * column_step;
      W sum = 0;
      for (int64_t p = 0; p < parts; ++p) {
        sum += from[p * size];
      }
      to[e] = static_cast<T>(scale * sum);
    }
  });
}

// dA, dB and dx's low-rank part, each where it is defined, for the rows [M, N] of grad and [M, K] of x.
template <typename T>
void low_rank_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& lora_A, const Tensor& lora_B,
                       const std::optional<Tensor>& s, double scaling, const Dropout& d,
                       const std::optional<Tensor>& dx, const Tensor& dA, const Tensor& dB) {
  using W = typename Wide<T>::type;
  const int64_t M = grad.size(0), N = lora_B.size(0), r = lora_B.size(1), K = lora_A.size(1), rp = padded(r);
  const std::vector<W> a = unpack<W>(lora_A, rp * K, K, 1), b = unpack<W>(lora_B, N * rp, rp, 1);
  Backward<T> f{};
  f.grad = static_cast<const T*>(grad.data_ptr());
  f.grad_stride = grad.stride(0), f.K = K, f.N = N, f.r = r;
  f.x = x ? static_cast<const T*>(x->data_ptr()) : nullptr;
  f.x_stride = x ? x->stride(0) : 0;
  f.a = a.data(), f.b = b.data();
  f.s = s ? static_cast<const W*>(s->data_ptr()) : nullptr;
  f.scaling = static_cast<W>(scaling), f.has_mask = d.threshold > 0, f.dropout = d;
  f.dx = dx ? static_cast<T*>(dx->data_ptr()) : nullptr;
  const int64_t size_A = x ? rp * K : 0, size_B = s ? rp * N : 0;
  const int64_t parts = partial_sums(M, (size_A + size_B) * static_cast<int64_t>(sizeof(W)));
  std::vector<W> partial_A(static_cast<size_t>(parts * size_A)), partial_B(static_cast<size_t>(parts * size_B));
  const auto run = Rows<T>::backward();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      run(f, M * p / parts, M * (p + 1) / parts, partial_A.data() + p * size_A, partial_B.data() + p * size_B);
    }
  });
  if (x) {
    COLLM_DISPATCH(dA.scalar_type(), (reduce_into<W, scalar_t>(dA, partial_A, parts, K, 1, W(1))));
  }
  if (s) {
    COLLM_DISPATCH(dB.scalar_type(), (reduce_into<W, scalar_t>(dB, partial_B, parts, 1, N, static_cast<W>(scaling))));
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                            Tensor s, double scaling, double dropout_p, std::optional<Tensor> seed,
                                            int64_t stream, std::vector<bool> mask) {
  check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask);
  const int64_t N = weight.size(0), K = weight.size(1), r = lora_A.size(0);
  const std::vector<int64_t> none{0};
  Tensor dx = mask[0] ? new_rows(grad, leading(grad), K, grad.scalar_type()) : torch::stable::new_empty(grad, none);
  Tensor dA = torch::stable::new_empty(lora_A, mask[1] ? std::vector<int64_t>{r, K} : none);
  Tensor dB = torch::stable::new_empty(lora_B, mask[2] ? std::vector<int64_t>{N, r} : none);
  const Tensor rows = as_rows(grad);
  const std::optional<Tensor> v = mask[1] ? std::optional(as_rows(x)) : std::nullopt;
  const std::optional<Tensor> h = mask[2] ? std::optional(packed_rows(s)) : std::nullopt;
  const std::optional<Tensor> out = mask[0] ? std::optional(dx) : std::nullopt;
  const Dropout d = dropout(dropout_p, seed, stream);
  COLLM_DISPATCH(grad.scalar_type(), low_rank_backward<scalar_t>(rows, v, lora_A, lora_B, h, scaling, d, out, dA, dB));
  if (mask[0] && rows.size(0) > 0) {
    const std::array<int64_t, 2> flat{rows.size(0), K};
    add_product(torch::stable::view(dx, flat), rows, weight);
  }
  return {dx, dA, dB};
}

}  // namespace
}  // namespace collm::lora

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&collm::lora::forward));
  m.impl("lora_linear_backward", TORCH_BOX(&collm::lora::backward));
}
