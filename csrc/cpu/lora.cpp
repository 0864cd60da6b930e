// lora_linear and lora_linear_group on the CPU: the choice of a kernel, the vendor's matrix product, registration. One
// projection is a group of one.
//
// The passes over the rows are in lora_rows.h (any CPU) and lora_avx512.h; the product of our own with them is behind
// lora_own.h. The vendor's product goes by blocks of rows, each followed by the passes (lora_vendor.h), or the passes
// write the bias and the low-rank part of all rows first and the product is added to them (beta = 1).
#include "isa.h"
#include "lora_group.h"
#include "lora_own.h"
#include "lora_rows.h"
#include "lora_scratch.h"
#include "lora_sums.h"
#include "lora_vendor.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <tuple>
#include <utility>
#include <vector>

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
    return of_isa(forward_plain, forward_avx2, forward_avx512);
#else
    return forward_plain;
#endif
  }
  static BackwardFn backward() {
#if defined(COLLM_X86)
    return of_isa(backward_plain, backward_avx2, backward_avx512);
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

  explicit Unpacked(int64_t C) : stride(factor_stride(C)), buffer(padded(1) * stride) {
    std::fill_n(buffer.data(), padded(1) * stride, W(0));
  }
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

// out = base + left right and out = left right, by the vendor's GEMM.
void add_product(const Tensor& out, const Tensor& base, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), base.get(), left.get(), right.get(), 1.0, 1.0));
}
void set_product(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}
// One or the other, for the rows past the whole blocks.
void multiply_rest(const vendor::Blocks& blocks, bool add, Tensor out, Tensor left, const Tensor& right) {
  const int64_t from = blocks.whole(), rows = blocks.M - from;
  if (rows == 0) {
    return;
  }
  const Tensor to = torch::stable::narrow(out, 0, from, rows);
  const Tensor of = torch::stable::narrow(left, 0, from, rows);
  add ? add_product(to, to, of, right) : set_product(to, of, right);
}

// The factors of a call's projections, unpacked.
template <typename T>
class Factors {
 public:
  using W = typename Wide<T>::type;

  Factor<W> of_A(const Tensor& t) { return keep(Unpacked<W>::of_A(t)); }
  Factor<W> of_B(const Tensor& t) { return keep(Unpacked<W>::of_B(t)); }
  const W* of_bias(const Tensor& t) { return keep(Unpacked<W>::of_bias(t)).data; }
  const W* zeros(int64_t n) { return keep(Unpacked<W>(n)).data; }

 private:
  Factor<W> keep(Unpacked<W>&& factor) {
    kept_.push_back(std::move(factor));
    return kept_.back().factor();
  }
  std::vector<Unpacked<W>> kept_;
};

// y and s of one projection for the rows [M, K] of x: those of a group share nothing but x, which a cache holds.
template <typename T>
void forward_into(const Tensor& x, const Projection& of, double scaling, double dropout_p, const Tensor& y,
                  const Tensor& s) {
  using W = typename Wide<T>::type;
  const int64_t M = x.size(0), K = x.size(1);
  const bool own = Own<T>::serves({M, K, K, of.weight.size(0)});
  Factors<T> factors;
  Forward<T> f{};
  f.x = static_cast<const T*>(x.data_ptr());
  f.x_stride = x.stride(0), f.K = K, f.N = of.weight.size(0), f.r = of.lora_A ? of.lora_A->size(0) : 0;
  f.scaling = static_cast<W>(scaling);
  f.y = static_cast<T*>(y.data_ptr()), f.s = static_cast<W*>(s.data_ptr());
  if (f.r > 0) {
    f.dropout = dropout(dropout_p, of.seed, of.stream);
    f.a = factors.of_A(*of.lora_A), f.b = factors.of_B(*of.lora_B);
  }
  if (of.bias && (f.r > 0 || own)) {
    f.bias = factors.of_bias(*of.bias);
  } else if (f.r > 0 && !own) {
    f.bias = factors.zeros(f.N);
  }
  if constexpr (has_own<T>) {
    if (own) {
      Own<T>::forward(f, {of.weight, f.b, f.r}, M);
      return;
    }
  }
  const std::array<int64_t, 2> flat{M, f.N};
  const Tensor out = torch::stable::view(y, flat), right = torch::stable::transpose(of.weight, 0, 1);
  if (f.r == 0) {
    of.bias ? add_product(out, *of.bias, x, right) : set_product(out, x, right);
    return;
  }
  const auto run = Rows<T>::forward();
  if constexpr (vendor::cuts<T>) {
    const vendor::Blocks blocks = vendor::Blocks::for_threads(M);
    if (blocks.serve(blocks.count, f.x_stride, K, f.N)) {
      const vendor::Packed packed(of.weight, 1, blocks.rows);
      multiply_rest(blocks, false, out, x, right);
      f.add = true;
      torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t m = blocks.begin(b);
          packed.multiply(f.x + m * f.x_stride, f.x_stride, false, f.y + m * f.N);
          run(f, m, blocks.begin(b + 1));
        }
      });
      return;
    }
  }
  torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 1,
                              [&](int64_t begin, int64_t end) { run(f, begin * kUnit, std::min(end * kUnit, M)); });
  add_product(out, out, x, right);
}

void run_forward(const Tensor& x, const Forwards& call, double scaling, double dropout_p) {
  const Tensor rows = as_rows(x);
  for (size_t n = 0; rows.size(0) > 0 && n < call.group.size(); ++n) {
    COLLM_DISPATCH(x.scalar_type(),
                   forward_into<scalar_t>(rows, call.group[n], scaling, dropout_p, call.ys[n], call.ss[n]));
  }
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                   double scaling, double dropout_p, std::optional<Tensor> seed, int64_t stream) {
  check_forward({"lora_linear"}, x, weight, bias, lora_A, lora_B, dropout_p, seed, stream);
  Forwards call;
  call.add(x, {weight, bias, lora_A, lora_B, seed, stream});
  run_forward(x, call, scaling, dropout_p);
  return {call.ys[0], call.ss[0]};
}

std::tuple<Tensors, Tensors> forward_group(Tensor x, Tensors weights, Tensors biases, Tensors lora_As, Tensors lora_Bs,
                                           double scaling, double dropout_p, Tensors seeds,
                                           std::vector<int64_t> streams) {
  const Masks masks{dropout_p, seeds, streams};
  check_group_forward(x, weights, biases, lora_As, lora_Bs, masks);
  const Forwards call = forwards_of(x, weights, biases, lora_As, lora_Bs, masks);
  run_forward(x, call, scaling, dropout_p);
  return {call.ys, call.ss};
}

// How many partial sums of dA and dB: a function of the shapes alone, at most 64 MiB of them.
int64_t partial_sums(int64_t M, int64_t bytes_each) {
  const int64_t wanted = std::clamp<int64_t>((M + 255) / 256, 1, 64);
  return std::max<int64_t>(1, std::min(wanted, (int64_t{64} << 20) / std::max<int64_t>(bytes_each, 1)));
}

// The sums of dA and dB of a whole call: in as many parts for every projection.
template <typename T>
class Sums {
 public:
  using W = typename Wide<T>::type;

  // Cuts the M rows between units, and gives each of `all` room for its sums.
  Sums(const std::vector<Gradient>& group, std::vector<Backward<T>>& all, int64_t M, int64_t unit, bool own) {
    int64_t bytes = 0;
    for (size_t n = 0; n < all.size(); ++n) {
      Backward<T>& f = all[n];
      int64_t rows = padded(f.r);
      if constexpr (has_own<T>) {
        rows = own ? Own<T>::rank_rows(f.r) : rows;
        place_ = own ? Own<T>::kPlace : nullptr;
      }
      f.parts = {M, unit, 1, group[n].x ? rows * f.a.stride : 0, group[n].s ? rows * f.b.stride : 0};
      bytes += (f.parts.size_A + f.parts.size_B) * static_cast<int64_t>(sizeof(W));
    }
    for (Backward<T>& f : all) {
      f.parts.count = partial_sums(M, bytes);
      f.parts.data_A = room(f.parts.count * f.parts.size_A);
      f.parts.data_B = room(f.parts.count * f.parts.size_B);
      totals_.push_back(place_ == nullptr ? Total{} : Total{room(f.parts.size_A), room(f.parts.size_B)});
    }
  }

  // Adds what is in the place of the first part of projection n to its parts before that: called by one thread, in the
  // order of the parts.
  void fold(size_t n, const Backward<T>& f) {
    Total& total = totals_[n];
    if (f.parts.size_A > 0) {
      partial_A(f).fold(f.r, f.K, total.parts == 0, total.A);
    }
    if (f.parts.size_B > 0) {
      partial_B(f).fold(f.r, f.N, total.parts == 0, total.B);
    }
    ++total.parts;
  }

  void reduce(size_t n, const Backward<T>& f, const Gradient& g) const {
    const auto reduce_into = [&](const Tensor& out, Partial<W> sums, const W* total, W scale) {
      sums.begun = total, sums.first = totals_[n].parts, sums.scale = scale;
      COLLM_DISPATCH(out.scalar_type(), sums.template reduce_into<scalar_t>(out));
    };
    if (g.x) {
      reduce_into(g.dA, partial_A(f), totals_[n].A, W(1));
    }
    if (g.s) {
      reduce_into(g.dB, partial_B(f), totals_[n].B, f.scaling);
    }
  }

 private:
  // The sums of dA and dB^T over the first parts, of one projection.
  struct Total {
    W *A = nullptr, *B = nullptr;  // room for them, where parts are folded
    int64_t parts = 0;
  };

  Partial<W> partial_A(const Backward<T>& f) const {
    return partial(f, f.parts.data_A, f.parts.size_A, f.a.stride, false);
  }
  Partial<W> partial_B(const Backward<T>& f) const {
    return partial(f, f.parts.data_B, f.parts.size_B, f.b.stride, true);
  }
  Partial<W> partial(const Backward<T>& f, const W* data, int64_t size, int64_t stride, bool transposed) const {
    Partial<W> sums{data, f.parts.count, size, stride};
    if constexpr (has_own<T>) {
      if (place_ != nullptr) {
        sums.rank_step = sums.kWhole, sums.whole_step = sums.kWhole * Own<T>::rank_rows(f.r);
        sums.piece = Own<T>::piece(f.r) * sums.rank_step;
      }
    }
    sums.place = place_, sums.transposed = transposed;
    return sums;
  }
  W* room(int64_t size) {
    buffers_.emplace_back(size);
    return buffers_.back().data();
  }
  PlaceFn place_ = nullptr;
  std::vector<Total> totals_;
  std::vector<Buffer<W>> buffers_;
};

// dx, and the parts' sums of dA and dB, where the product is the vendor's: of a block of rows before the passes over
// it, or of all rows after them.
template <typename T>
void by_vendor(const std::vector<Gradient>& group, std::vector<Backward<T>>& all, const vendor::Blocks& blocks,
               const std::optional<Tensor>& dx) {
  const Parts<typename Wide<T>::type>& parts = all.front().parts;
  const int64_t M = parts.M, K = all.front().K;
  const bool by_blocks = vendor::cuts<T> && dx && std::all_of(group.begin(), group.end(), [&](const Gradient& g) {
                           return blocks.serve(parts.count, g.grad.stride(0), g.of.weight.size(0), K);
                         });
  const std::array<int64_t, 2> flat{M, K};
  std::vector<vendor::Packed> packed;
  for (size_t n = 0; by_blocks && n < group.size(); ++n) {
    all[n].add = true;
    packed.emplace_back(group[n].of.weight, 0, blocks.rows);
    multiply_rest(blocks, n > 0, torch::stable::view(*dx, flat), group[n].grad, group[n].of.weight);
  }
  const auto run = Rows<T>::backward();
  const auto run_rows = [&](int64_t part, int64_t begin, int64_t end) {
    if constexpr (vendor::cuts<T>) {
      for (size_t n = 0; n < packed.size(); ++n) {
        const Backward<T>& f = all[n];
        packed[n].multiply(f.grad + begin * f.grad_stride, f.grad_stride, n > 0, f.dx + begin * K);
      }
    }
    for (const Backward<T>& f : all) {
      if (f.r > 0) {
        run(f, begin, end, f.parts.A(part), f.parts.B(part));
      }
    }
  };
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      for (const Backward<T>& f : all) {
        f.parts.clear(p);
      }
      int64_t begin = parts.begin(p), end = parts.begin(p + 1);
      while (begin < end) {
        const int64_t next = vendor::cuts<T> ? blocks.after(begin) : end;
        run_rows(p, begin, next);
        begin = next;
      }
    }
  });
  if (!dx || by_blocks || M == 0) {
    return;
  }
  const Tensor out = torch::stable::view(*dx, flat);
  bool begun = std::any_of(all.begin(), all.end(), [](const Backward<T>& f) { return f.r > 0; });
  for (const Gradient& g : group) {
    if (std::exchange(begun, true)) {
      add_product(out, out, g.grad, g.of.weight);
    } else {
      set_product(out, g.grad, g.of.weight);
    }
  }
}

// dx where it is defined, and each projection's dA and dB, for the rows [M, N] of the gradients and [M, K] of x. dx is
// one sum: of products of our own, each of as many projections as it holds, or of the vendor's, each added to it.
template <typename T>
void backward_into(const Backwards& call, double scaling, double dropout_p) {
  using W = typename Wide<T>::type;
  const std::vector<Gradient>& group = call.group;
  const std::optional<Tensor> dx = call.wanted_dx();
  const int64_t M = group.front().grad.size(0), K = group.front().of.weight.size(1);
  Factors<T> factors;
  std::vector<Backward<T>> all;
  int64_t terms = 0, widest = 0;
  bool begun = false;
  for (const Gradient& g : group) {
    Backward<T> f{};
    f.grad = static_cast<const T*>(g.grad.data_ptr());
    f.grad_stride = g.grad.stride(0), f.K = K, f.N = g.of.weight.size(0);
    f.r = g.of.lora_A ? g.of.lora_A->size(0) : 0;
    f.x = g.x ? static_cast<const T*>(g.x->data_ptr()) : nullptr;
    f.x_stride = g.x ? g.x->stride(0) : 0;
    f.s = g.s ? static_cast<const W*>(g.s->data_ptr()) : nullptr;
    f.scaling = static_cast<W>(scaling);
    f.dx = dx ? static_cast<T*>(dx->data_ptr()) : nullptr;
    if (f.r > 0) {
      f.dropout = dropout(dropout_p, g.of.seed, g.of.stream);
      f.a = factors.of_A(*g.of.lora_A), f.b = factors.of_B(*g.of.lora_B);
      f.add = std::exchange(begun, true);
    }
    terms += f.N, widest = std::max(widest, f.N);
    all.push_back(f);
  }
  const bool own = dx && Own<T>::serves({M, terms, widest, K});
  // In float32 the rows are cut as the blocks are, whether or not these threads go by them: dA and dB have the same
  // bits with any number of threads.
  const vendor::Blocks blocks = vendor::Blocks::of(M);
  Sums<T> sums(group, all, M, vendor::cuts<T> ? std::max<int64_t>(blocks.rows, 1) : 1, own);
  if constexpr (has_own<T>) {
    if (own) {
      std::vector<Frozen> weights;
      for (size_t n = 0; n < group.size(); ++n) {
        weights.push_back({group[n].of.weight, all[n].a, all[n].r});
      }
      Own<T>::backward(all, weights, sums);
    }
  }
  if (!own) {
    by_vendor(group, all, blocks, dx);
  }
  for (size_t n = 0; n < group.size(); ++n) {
    sums.reduce(n, all[n], group[n]);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                            Tensor s, double scaling, double dropout_p, std::optional<Tensor> seed,
                                            int64_t stream, std::vector<bool> mask) {
  check_backward({"lora_linear_backward"}, grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask);
  Backwards call(grad, weight, mask[0]);
  call.add({weight, std::nullopt, lora_A, lora_B, seed, stream}, grad, x, s, mask[1], mask[2]);
  COLLM_DISPATCH(grad.scalar_type(), backward_into<scalar_t>(call, scaling, dropout_p));
  return {call.dx, call.group[0].dA, call.group[0].dB};
}

std::tuple<Tensor, Tensors, Tensors> backward_group(Tensors grads, Tensor x, Tensors weights, Tensors lora_As,
                                                    Tensors lora_Bs, Tensors ss, double scaling, double dropout_p,
                                                    Tensors seeds, std::vector<int64_t> streams, bool dx,
                                                    std::vector<bool> dA, std::vector<bool> dB) {
  const Masks masks{dropout_p, seeds, streams};
  const Wanted wanted{dx, dA, dB};
  check_group_backward(grads, x, weights, lora_As, lora_Bs, ss, masks, wanted);
  const Backwards call = backwards_of(grads, x, weights, lora_As, lora_Bs, ss, masks, wanted);
  COLLM_DISPATCH(call.dx.scalar_type(), backward_into<scalar_t>(call, scaling, dropout_p));
  return call.results(lora_As, lora_Bs);
}

}  // namespace
}  // namespace collm::lora

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&collm::lora::forward));
  m.impl("lora_linear_backward", TORCH_BOX(&collm::lora::backward));
  m.impl("lora_linear_group", TORCH_BOX(&collm::lora::forward_group));
  m.impl("lora_linear_group_backward", TORCH_BOX(&collm::lora::backward_group));
}
