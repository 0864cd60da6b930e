// lora_linear on the CPU: the choice of a kernel, the vendor's matrix product, registration.
//
// The passes over the rows are in lora_rows.h (any CPU) and lora_avx512.h; products of our own with them are in
// lora_product.h (float32) and in lora_tiles.h and lora_tile_passes.h (bfloat16 on AMX). Everywhere else the passes
// write the bias and the low-rank part, and the vendor's product is added to them (beta = 1).
#include "isa.h"
#include "lora_product.h"
#include "lora_rows.h"
#include "lora_scratch.h"
#include "lora_tile_passes.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <tuple>

namespace collm::lora {
namespace {

// The passes compiled for each instruction set; isa.h chooses, at run time.
template <typename T>
struct Rows {
  using W = typename Wide<T>::type;
  using ForwardFn = void (*)(const Forward<T>&, int64_t, int64_t);
  using BackwardFn = void (*)(const Backward<T>&, int64_t, int64_t, W*, W*);

  static void forward_plain(const Forward<T>& f, int64_t begin, int64_t end) { plain::forward_rows<T>(f, begin, end); }
  static void backward_plain(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    plain::backward_rows<T>(f, begin, end, dA, dB);
  }
#if defined(COLLM_X86)
  COLLM_AVX2 static void forward_avx2(const Forward<T>& f, int64_t begin, int64_t end) {
    plain::forward_rows<T>(f, begin, end);
  }
  COLLM_AVX2 static void backward_avx2(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    plain::backward_rows<T>(f, begin, end, dA, dB);
  }
  COLLM_AVX512 static void forward_avx512(const Forward<T>& f, int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, double>) {
      plain::forward_rows<T>(f, begin, end);
    } else {
      avx512::forward_rows<T>(f, begin, end);
    }
  }
  COLLM_AVX512 static void backward_avx512(const Backward<T>& f, int64_t begin, int64_t end, W* dA, W* dB) {
    if constexpr (std::is_same_v<T, double>) {
      plain::backward_rows<T>(f, begin, end, dA, dB);
    } else {
      avx512::backward_rows<T>(f, begin, end, dA, dB);
    }
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
void copy_factor(const Tensor& factor, int64_t si, int64_t sj, int64_t r, int64_t C, int64_t stride, W* out) {
  const T* from = static_cast<const T*>(factor.data_ptr());
  for (int64_t i = 0; i < r; ++i) {
    W* to = out + i * stride;
    for (int64_t j = 0; j < C; ++j) {
      to[j] = static_cast<W>(from[i * si + j * sj]);
    }
    std::fill(to + C, to + stride, W(0));
  }
  std::fill(out + r * stride, out + padded(r) * stride, W(0));
}

// Columns of a factor's row in memory: whole vectors, and rows that do not all fall on the same lines of a cache.
int64_t factor_stride(int64_t columns) {
  const int64_t stride = round_up(std::max<int64_t>(columns, 1), 32);
  return stride % 256 == 0 ? stride + 32 : stride;
}

// A tensor of any dtype and strides as a Factor: A [r, K] itself, B [N, r] transposed, a bias [N] as one row.
template <typename W>
struct Unpacked {
  int64_t stride;
  Buffer<W> buffer;

  Unpacked(const Tensor& t, int64_t si, int64_t sj, int64_t r, int64_t C)
      : stride(factor_stride(C)), buffer(padded(r) * stride) {
    COLLM_DISPATCH(t.scalar_type(), (copy_factor<W, scalar_t>(t, si, sj, r, C, stride, buffer.data())));
  }
  static Unpacked of_A(const Tensor& t) { return {t, t.stride(0), t.stride(1), t.size(0), t.size(1)}; }
  static Unpacked of_B(const Tensor& t) { return {t, t.stride(1), t.stride(0), t.size(1), t.size(0)}; }
  static Unpacked of_bias(const Tensor& t) { return {t, 0, t.stride(0), 1, t.size(0)}; }
  Factor<W> factor() const { return {buffer.data(), stride}; }
};

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

// The kernels of our own: whether they compute the product of a dtype, and how.
template <typename T>
struct Own {
  static bool serves(int64_t, int64_t) { return false; }
};
// Rows do not meet in any sum of the forward, so how they are shared out does not change a bit.
constexpr int64_t kUnit = 32;

#if defined(COLLM_X86)
template <typename T>
constexpr bool has_own = std::is_same_v<T, float> || std::is_same_v<T, torch::headeronly::BFloat16>;
template <>
struct Own<float> {
  using Right = product::Right;
  // On fewer rows the vendor's product makes up for the pass around it: it need not pack the weight.
  static constexpr int64_t kFewRows = 256;
  static bool serves(int64_t M, int64_t terms) { return M >= kFewRows && Right::serves(terms); }
  static constexpr auto pack = product::pack;
  static constexpr int64_t kPieces = 1;
  static int64_t rank_rows(int64_t r) { return padded(r); }

  static void forward(const Forward<float>& f, const Right& right, int64_t M) {
    torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 2, [&](int64_t begin, int64_t end) {
      const Buffer<float> s(right.scratch_size());
      product::forward_rows(f, right, begin * kUnit, std::min(end * kUnit, M), s.data());
    });
  }
  static void backward(const Backward<float>& f, const Right& right, const Parts<float>& parts) {
    torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> ds(right.scratch_size());
      const Buffer<uint16_t> keep(avx512::kBlockRows * avx512::keep_stride(f.K) + 4);
      for (int64_t p = begin; p < end; ++p) {
        parts.clear(p);
        product::backward_rows(f, right, parts.begin(p), parts.begin(p + 1), parts.A(p), parts.B(p), ds.data(),
                               keep.data());
      }
    });
  }
};

template <>
struct Own<torch::headeronly::BFloat16> {
  using T = torch::headeronly::BFloat16;
  using Right = tiles::Right;
  static constexpr int64_t kFewRows = 32;
  static bool serves(int64_t M, int64_t terms) { return M >= kFewRows && Right::serves(terms); }
  static constexpr auto pack = tiles::pack;
  static constexpr int64_t kPieces = tiles::kPieces;
  static int64_t rank_rows(int64_t r) { return tiles::RankRight{0, r}.width(); }

  // A, or B^T, packed.
  struct Rank {
    tiles::RankRight right;
    Buffer<uint16_t> buffer;

    Rank(Factor<float> factor, int64_t terms, int64_t r) : right{terms, r}, buffer(right.size()) {
      const Buffer<uint16_t> pieces(right.width() * right.steps() * tiles::kStep);
      tiles::pack_rank(factor, right, pieces.data(), buffer.data());
      right.data = buffer.data();
    }
  };

  static void forward(const Forward<T>& f, const Right& right, int64_t M) {
    const Rank rank(f.a, f.K, f.r);
    torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 2, [&](int64_t begin, int64_t end) {
      const Buffer<uint16_t> scratch(tiles::forward_scratch(right));
      tiles::forward_rows(f, right, rank.right, begin * kUnit, std::min(end * kUnit, M), scratch.data());
    });
  }
  static void backward(const Backward<T>& f, const Right& right, const Parts<float>& parts) {
    const Rank rank(f.b, f.N, f.r);
    torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      const Buffer<uint16_t> scratch(tiles::backward_scratch(right, rank.right));
      tiles::backward_rows(f, right, rank.right, begin, end, parts, scratch.data());
    });
  }
};

// A frozen weight as the right factor of a product over the weight's dimension `term`, packed.
template <typename T>
class Packed {
 public:
  using Right = typename Own<T>::Right;

  Packed(const Tensor& weight, int64_t term, Factor<float> factor, int64_t r)
      : right_{weight.size(term), weight.size(1 - term), r}, buffer_(right_.size()) {
    right_.data = buffer_.data();
    Tensor w = weight;
    if (w.stride(0) != 1 && w.stride(1) != 1) {
      const std::array<int64_t, 2> sizes{w.size(0), w.size(1)};
      Tensor copy = torch::stable::new_empty(w, sizes);
      w = torch::stable::copy_(copy, w);
    }
    const T* from = static_cast<const T*>(w.data_ptr());
    const int64_t term_stride = w.stride(term), output_stride = w.stride(1 - term);
    torch::stable::parallel_for(0, right_.panels(), 4, [&](int64_t begin, int64_t end) {
      Own<T>::pack(from, term_stride, output_stride, factor, right_, begin, end, buffer_.data());
    });
  }
  const Right& right() const { return right_; }

 private:
  Right right_;
  Buffer<typename Right::Word> buffer_;
};
#else
template <typename T>
constexpr bool has_own = false;
#endif

// y and s for the rows [M, K] of x.
template <typename T>
void forward_into(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_A,
                  const Tensor& lora_B, double scaling, const Dropout& d, const Tensor& y, const Tensor& s) {
  using W = typename Wide<T>::type;
  const int64_t M = x.size(0), N = lora_B.size(0), r = lora_B.size(1);
  const auto a = Unpacked<W>::of_A(lora_A), b = Unpacked<W>::of_B(lora_B);
  const std::array<int64_t, 1> one{N};
  const auto c = Unpacked<W>::of_bias(bias ? *bias : torch::stable::new_zeros(x, one));
  Forward<T> f{};
  f.x = static_cast<const T*>(x.data_ptr());
  f.x_stride = x.stride(0), f.K = x.size(1), f.N = N, f.r = r;
  f.a = a.factor(), f.b = b.factor(), f.bias = c.factor().data;
  f.scaling = static_cast<W>(scaling), f.dropout = d;
  f.y = static_cast<T*>(y.data_ptr()), f.s = static_cast<W*>(s.data_ptr());
  if constexpr (has_own<T>) {
    if (Own<T>::serves(M, f.K)) {
      const Packed<T> packed(weight, 1, f.b, r);
      Own<T>::forward(f, packed.right(), M);
      return;
    }
  }
  const auto run = Rows<T>::forward();
  torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 1,
                              [&](int64_t begin, int64_t end) { run(f, begin * kUnit, std::min(end * kUnit, M)); });
  const std::array<int64_t, 2> flat{M, N};
  add_product(torch::stable::view(y, flat), x, torch::stable::transpose(weight, 0, 1));
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                   double scaling, double dropout_p, std::optional<Tensor> seed, int64_t stream) {
  check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream);
  Tensor y = new_rows(x, leading(x), weight.size(0), x.scalar_type());
  Tensor s = new_rows(x, leading(x), lora_A.size(0), wide(x.scalar_type()));
  const Tensor rows = as_rows(x);
  if (rows.size(0) > 0) {
    const Dropout d = dropout(dropout_p, seed, stream);
    COLLM_DISPATCH(x.scalar_type(), forward_into<scalar_t>(rows, weight, bias, lora_A, lora_B, scaling, d, y, s));
  }
  return {y, s};
}

// How many partial sums of dA and dB: a function of the shapes alone, at most 64 MiB of them.
int64_t partial_sums(int64_t M, int64_t bytes_each) {
  const int64_t wanted = std::clamp<int64_t>((M + 255) / 256, 1, 64);
  return std::max<int64_t>(1, std::min(wanted, (int64_t{64} << 20) / std::max<int64_t>(bytes_each, 1)));
}

// out [R, C] = scale times the sums of all parts, added in order. Element (i, j) of a part is the sum of `pieces`
// numbers, `piece` apart, from i * row_step + j * column_step on.
template <typename W>
struct Partial {
  const W* data;
  int64_t parts, size, row_step, column_step, pieces, piece;
  W scale;

  template <typename T>
  void reduce_into(const Tensor& out) const {
    const int64_t R = out.size(0), C = out.size(1);
    T* to = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, R, std::max<int64_t>(1, 4096 / std::max<int64_t>(C, 1)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    for (int64_t j = 0; j < C; ++j) {
                                      const W* from = data + i * row_step + j * column_step;
                                      W sum = 0;
                                      for (int64_t p = 0; p < parts; ++p) {
                                        W whole = from[p * size];
                                        for (int64_t n = 1; n < pieces; ++n) {
                                          whole += from[p * size + n * piece];
                                        }
                                        sum += whole;
                                      }
                                      to[i * C + j] = static_cast<T>(scale * sum);
                                    }
                                  }
                                });
  }
};

// dx, dA and dB, each where it is defined, for the rows [M, N] of grad and [M, K] of x.
template <typename T>
void backward_into(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, const std::optional<Tensor>& s, double scaling, const Dropout& d,
                   const std::optional<Tensor>& dx, const Tensor& dA, const Tensor& dB) {
  using W = typename Wide<T>::type;
  const int64_t M = grad.size(0), N = lora_B.size(0), r = lora_B.size(1), K = lora_A.size(1);
  const auto a = Unpacked<W>::of_A(lora_A), b = Unpacked<W>::of_B(lora_B);
  Backward<T> f{};
  f.grad = static_cast<const T*>(grad.data_ptr());
  f.grad_stride = grad.stride(0), f.K = K, f.N = N, f.r = r;
  f.x = x ? static_cast<const T*>(x->data_ptr()) : nullptr;
  f.x_stride = x ? x->stride(0) : 0;
  f.a = a.factor(), f.b = b.factor();
  f.s = s ? static_cast<const W*>(s->data_ptr()) : nullptr;
  f.scaling = static_cast<W>(scaling), f.dropout = d;
  f.dx = dx ? static_cast<T*>(dx->data_ptr()) : nullptr;
  const bool own = dx && Own<T>::serves(M, N);
  // Rows of the partial sums; our own may keep the pieces of a rank apart.
  int64_t rows = padded(r), pieces = 1;
  if constexpr (has_own<T>) {
    if (own) {
      rows = Own<T>::rank_rows(r), pieces = Own<T>::kPieces;
    }
  }
  const int64_t size_A = x ? rows * a.stride : 0, size_B = s ? rows * b.stride : 0;
  Parts<W> parts{M, partial_sums(M, (size_A + size_B) * static_cast<int64_t>(sizeof(W))), size_A, size_B};
  const Buffer<W> partial_A(parts.count * size_A), partial_B(parts.count * size_B);
  parts.data_A = partial_A.data(), parts.data_B = partial_B.data();
  if constexpr (has_own<T>) {
    if (own) {
      const Packed<T> packed(weight, 0, f.a, r);
      Own<T>::backward(f, packed.right(), parts);
    }
  }
  if (!own) {
    const auto run = Rows<T>::backward();
    torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        parts.clear(p);
        run(f, parts.begin(p), parts.begin(p + 1), parts.A(p), parts.B(p));
      }
    });
    if (dx && M > 0) {
      const std::array<int64_t, 2> flat{M, K};
      add_product(torch::stable::view(*dx, flat), grad, weight);
    }
  }
  if (x) {
    const Partial<W> sums{parts.data_A, parts.count, size_A, a.stride, 1, pieces, r * a.stride, W(1)};
    COLLM_DISPATCH(dA.scalar_type(), sums.template reduce_into<scalar_t>(dA));
  }
  if (s) {
    const Partial<W> sums{parts.data_B, parts.count, size_B, 1, b.stride, pieces, r * b.stride, f.scaling};
    COLLM_DISPATCH(dB.scalar_type(), sums.template reduce_into<scalar_t>(dB));
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
  COLLM_DISPATCH(grad.scalar_type(),
                 backward_into<scalar_t>(rows, v, weight, lora_A, lora_B, h, scaling, d, out, dA, dB));
  return {dx, dA, dB};
}

}  // namespace
}  // namespace collm::lora

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&collm::lora::forward));
  m.impl("lora_linear_backward", TORCH_BOX(&collm::lora::backward));
}
