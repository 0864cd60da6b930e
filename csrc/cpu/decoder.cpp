// What stands between the matrix products of a decoder layer, on a CPU: rms_norm, swiglu, rotate_heads and
// masked_softmax with their gradients, each in one pass over its operands where plain torch takes three to eight.
//
// The schemas, their torch form and the autograd formulas are collm_fast/ops/decoder.py; the loops are
// decoder_kernel.h. The layer itself is collm_fast/models/decoder.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "isa.h"

namespace collm::decoder {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kLanes = 32;
constexpr int64_t kElementsPerTask = 1 << 14;  // less is not worth waking a thread for

template <typename X, typename T, typename A>
struct NormLoops {
  A (*forward)(const X*, const T*, T*, int64_t, A);
  void (*backward)(const T*, const X*, const T*, A, const X*, X*, int64_t);
};

template <typename T, typename A>
struct Loops {
  void (*swiglu)(const T*, const T*, T*, int64_t);
  void (*swiglu_backward)(const T*, const T*, const T*, T*, T*, int64_t);
  void (*rotate)(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t);
  void (*rotate_backward)(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t);
};

template <typename T, typename O, typename A>
using SoftmaxRow = void (*)(const T*, const float*, A, O*, A*, int64_t);
template <typename G, typename T, typename O, typename A>
using SoftmaxRowBackward = void (*)(const G*, const T*, A, O*, int64_t);

#define COLLM_LOOPS "decoder_kernel.h"
#include "each_isa.h"

// COLLM_CHOOSE(name<types>) calls the function of that name for the chosen instruction set.
#if defined(__x86_64__)
#define COLLM_CHOOSE(...) \
  (isa() == Isa::avx512 ? avx512::__VA_ARGS__() : isa() == Isa::avx2 ? avx2::__VA_ARGS__() : baseline::__VA_ARGS__())
#else
#define COLLM_CHOOSE(...) baseline::__VA_ARGS__()
#endif

// Calls f(element, sum) with values of the element's type and of the type its sums are made in.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    case ScalarType::Half:
      return f(Half{}, float{});
    default:
      return f(double{}, double{});
  }
}

// The same of a norm's x and weight: f(x, weight, sum). A float32 x may have a weight, and a result, of less.
template <typename F>
void dispatch_norm(const Tensor& x, const Tensor& weight, const F& f) {
  dispatch(weight.scalar_type(), [&](auto element, auto sum) {
    if constexpr (sizeof(element) == 2) {
      if (x.scalar_type() == ScalarType::Float) {
        return f(float{}, element, sum);
      }
    }
    f(element, element, sum);
  });
}

// f(first, last) over blocks of rows of `width` elements.
template <typename F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width)), f);
}

void check_float(const char* op, const char* what, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const bool served = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double;
  COLLM_CHECK(served, op, what, " in float32, bfloat16, float16 or float64, got ", dtype(tensor));
}

void check_shape(const char* op, const char* what, const Tensor& tensor, const char* first, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t d = 0; same && d < like.dim(); ++d) {
    same = tensor.size(d) == like.size(d);
  }
  COLLM_CHECK(same, op, what, " of the shape of ", first, " ", shape(like), ", got ", shape(tensor));
}

void check_like(const char* op, const char* what, const Tensor& tensor, const char* first, const Tensor& like) {
  check_shape(op, what, tensor, first, like);
  COLLM_CHECK(tensor.scalar_type() == like.scalar_type(), op, what, " of the dtype of ", first, ", got ",
              dtype(tensor));
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

ScalarType sum_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> sizes_of(const Tensor& tensor, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) {
    sizes.push_back(tensor.size(d));
  }
  return sizes;
}

// The rows of x [..., W]; as many of no width.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    rows *= x.size(d);
  }
  return rows;
}

// --- rms_norm -----------------------------------------------------------------------------------------------------
void check_norm(const char* op, const Tensor& x, const Tensor& weight) {
  COLLM_CHECK(x.dim() >= 1, op, "x of shape [..., W], got ", shape(x));
  check_float(op, "x", x);
  COLLM_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), op, "weight of shape [", x.size(-1), "], got ",
              shape(weight));
  const ScalarType type = weight.scalar_type();
  const bool narrower =
      x.scalar_type() == ScalarType::Float && (type == ScalarType::BFloat16 || type == ScalarType::Half);
  COLLM_CHECK(type == x.scalar_type() || narrower, op,
              "weight of the dtype of x, or in half precision for x in float32, got ", dtype(weight), " and ",
              dtype(x));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_norm("rms_norm", x, weight);
  const int64_t width = x.size(-1), rows = rows_of(x);
  const Tensor from = dense(x), w = dense(weight);
  Tensor y = torch::stable::new_empty(w, sizes_of(x, x.dim()));
  Tensor scale = torch::stable::new_empty(from, sizes_of(x, x.dim() - 1), sum_type(x));
  dispatch_norm(x, weight, [&](auto element, auto narrow, auto sum) {
    using X = decltype(element);
    using T = decltype(narrow);
    using A = decltype(sum);
    const auto row = COLLM_CHOOSE(norm_loops<X, T, A>).forward;
    const X* in = from.const_data_ptr<X>();
    const T* factor = w.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    A* kept = scale.mutable_data_ptr<A>();
    for_rows(rows, width, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        kept[r] = row(in + r * width, factor, out + r * width, width, static_cast<A>(eps));
      }
    });
  });
  return {y, scale};
}

Tensor rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& scale,
                         std::optional<Tensor> residual) {
  constexpr const char* op = "rms_norm_backward";
  check_norm(op, x, weight);
  check_shape(op, "grad", grad, "x", x);
  COLLM_CHECK(grad.scalar_type() == weight.scalar_type(), op, "grad of the dtype of weight, got ", dtype(grad));
  if (residual) {
    check_like(op, "residual", *residual, "x", x);
  }
  const int64_t width = x.size(-1), rows = rows_of(x);
  COLLM_CHECK(scale.numel() == rows && scale.scalar_type() == sum_type(x), op, "the scale that rms_norm gave, got ",
              dtype(scale), " of shape ", shape(scale));
  const Tensor from = dense(grad), at = dense(x), w = dense(weight), s = dense(scale);
  const Tensor beside = residual ? dense(*residual) : Tensor();
  Tensor dx = torch::stable::new_empty(at, sizes_of(x, x.dim()));
  dispatch_norm(x, weight, [&](auto element, auto narrow, auto sum) {
    using X = decltype(element);
    using T = decltype(narrow);
    using A = decltype(sum);
    const auto row = COLLM_CHOOSE(norm_loops<X, T, A>).backward;
    const T *g = from.const_data_ptr<T>(), *factor = w.const_data_ptr<T>();
    const X* in = at.const_data_ptr<X>();
    const X* other = residual ? beside.const_data_ptr<X>() : nullptr;
    const A* kept = s.const_data_ptr<A>();
    X* out = dx.mutable_data_ptr<X>();
    for_rows(rows, width, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t at_row = r * width;
        row(g + at_row, in + at_row, factor, kept[r], other == nullptr ? nullptr : other + at_row, out + at_row, width);
      }
    });
  });
  return dx;
}

// --- swiglu -------------------------------------------------------------------------------------------------------
Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_float("swiglu", "gate", gate);
  check_like("swiglu", "up", up, "gate", gate);
  const Tensor g = dense(gate), u = dense(up);
  Tensor out = torch::stable::new_empty(g, sizes_of(gate, gate.dim()));
  dispatch(gate.scalar_type(), [&](auto element, auto sum) {
    using T = decltype(element);
    const auto span = COLLM_CHOOSE(loops<T, decltype(sum)>).swiglu;
    const T *a = g.const_data_ptr<T>(), *b = u.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(gate.numel(), 1,
             [&](int64_t first, int64_t last) { span(a + first, b + first, to + first, last - first); });
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  constexpr const char* op = "swiglu_backward";
  check_float(op, "gate", gate);
  check_like(op, "up", up, "gate", gate);
  check_like(op, "grad", grad, "gate", gate);
  const Tensor from = dense(grad), g = dense(gate), u = dense(up);
  Tensor d_gate = torch::stable::new_empty(g, sizes_of(gate, gate.dim()));
  Tensor d_up = torch::stable::new_empty(g, sizes_of(gate, gate.dim()));
  dispatch(gate.scalar_type(), [&](auto element, auto sum) {
    using T = decltype(element);
    const auto span = COLLM_CHOOSE(loops<T, decltype(sum)>).swiglu_backward;
    const T *d = from.const_data_ptr<T>(), *a = g.const_data_ptr<T>(), *b = u.const_data_ptr<T>();
    T *to_gate = d_gate.mutable_data_ptr<T>(), *to_up = d_up.mutable_data_ptr<T>();
    for_rows(gate.numel(), 1, [&](int64_t first, int64_t last) {
      span(d + first, a + first, b + first, to_gate + first, to_up + first, last - first);
    });
  });
  return {d_gate, d_up};
}

// --- rotate_heads -------------------------------------------------------------------------------------------------
void check_rotary(const char* op, const Tensor& x, int64_t tokens, const Tensor& cos, const Tensor& sin) {
  check_float(op, "x", x);
  COLLM_CHECK(cos.dim() == 2 && cos.size(0) == tokens && cos.size(1) > 0 && cos.size(1) % 2 == 0, op, "cos of shape [",
              tokens, ", d] with d even, got ", shape(cos));
  check_like(op, "sin", sin, "cos", cos);
  COLLM_CHECK(cos.scalar_type() == x.scalar_type(), op, "cos of the dtype of x, got ", dtype(cos));
}

Tensor rotate_heads(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  constexpr const char* op = "rotate_heads";
  COLLM_CHECK(x.dim() == 2, op, "x of shape [T, h d], got ", shape(x));
  const int64_t tokens = x.size(0);
  check_rotary(op, x, tokens, cos, sin);
  const int64_t width = cos.size(1), heads = x.size(1) / width;
  COLLM_CHECK(x.size(1) == heads * width, op, "x of a multiple of ", width, " columns, got ", x.size(1));
  const Tensor from = dense(x), c = dense(cos), s = dense(sin);
  Tensor out = torch::stable::new_empty(from, {heads, tokens, width});
  dispatch(x.scalar_type(), [&](auto element, auto sum) {
    using T = decltype(element);
    const auto row = COLLM_CHOOSE(loops<T, decltype(sum)>).rotate;
    const T *in = from.const_data_ptr<T>(), *cosine = c.const_data_ptr<T>(), *sine = s.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(tokens, heads * width, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        row(in + t * heads * width, cosine + t * width, sine + t * width, to + t * width, width / 2, heads,
            tokens * width);
      }
    });
  });
  return out;
}

Tensor rotate_heads_backward(const Tensor& grad, const Tensor& cos, const Tensor& sin) {
  constexpr const char* op = "rotate_heads_backward";
  COLLM_CHECK(grad.dim() == 3, op, "grad of shape [h, T, d], got ", shape(grad));
  const int64_t heads = grad.size(0), tokens = grad.size(1), width = grad.size(2);
  check_rotary(op, grad, tokens, cos, sin);
  COLLM_CHECK(cos.size(1) == width, op, "cos of ", width, " columns, got ", cos.size(1));
  const Tensor from = dense(grad), c = dense(cos), s = dense(sin);
  Tensor dx = torch::stable::new_empty(from, {tokens, heads * width});
  dispatch(grad.scalar_type(), [&](auto element, auto sum) {
    using T = decltype(element);
    const auto row = COLLM_CHOOSE(loops<T, decltype(sum)>).rotate_backward;
    const T *g = from.const_data_ptr<T>(), *cosine = c.const_data_ptr<T>(), *sine = s.const_data_ptr<T>();
    T* to = dx.mutable_data_ptr<T>();
    for_rows(tokens, heads * width, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        row(g + t * width, cosine + t * width, sine + t * width, to + t * heads * width, width / 2, heads,
            tokens * width);
      }
    });
  });
  return dx;
}

// --- masked_softmax -----------------------------------------------------------------------------------------------
// f(scores, weights, sum): all of one type, or float32 scores and bfloat16 weights.
template <typename F>
void dispatch_softmax(const char* op, ScalarType scores, ScalarType weights, const F& f) {
  if (scores == weights) {
    return dispatch(scores, [&](auto element, auto sum) { f(element, element, sum); });
  }
  COLLM_CHECK(scores == ScalarType::Float && weights == ScalarType::BFloat16, op,
              "weights of the dtype of the scores, or bfloat16 ones of float32 scores, got ", name(weights), " and ",
              name(scores));
  f(float{}, BFloat16{}, float{});
}

Tensor masked_softmax(const Tensor& scores, std::optional<Tensor> mask, double scale, std::optional<ScalarType> type) {
  constexpr const char* op = "masked_softmax";
  COLLM_CHECK(scores.dim() >= 2, op, "scores of shape [..., Q, K], got ", shape(scores));
  check_float(op, "scores", scores);
  const int64_t keys = scores.size(-1), queries = scores.size(-2);
  if (mask) {
    COLLM_CHECK(mask->dim() == 2 && mask->size(0) == queries && mask->size(1) == keys, op, "mask of shape [", queries,
                ", ", keys, "], got ", shape(*mask));
    COLLM_CHECK(mask->scalar_type() == ScalarType::Float, op, "mask in float32, got ", dtype(*mask));
  }
  const ScalarType wanted = type.value_or(scores.scalar_type());
  Tensor out;
  dispatch_softmax(op, scores.scalar_type(), wanted, [&](auto element, auto weight, auto sum) {
    using T = decltype(element);
    using O = decltype(weight);
    using A = decltype(sum);
    const Tensor from = dense(scores), limits = mask ? dense(*mask) : Tensor();
    out = torch::stable::new_empty(from, sizes_of(scores, scores.dim()), wanted);
    const int64_t rows = keys == 0 ? 0 : scores.numel() / keys;
    const SoftmaxRow<T, O, A> row = COLLM_CHOOSE(softmax_loop<T, O, A>);
    const T* in = from.const_data_ptr<T>();
    const float* limit = mask ? limits.const_data_ptr<float>() : nullptr;
    O* to = out.mutable_data_ptr<O>();
    for_rows(rows, keys, [&](int64_t first, int64_t last) {
      // Whole lanes: the row is filled up with what has no weight.
      std::vector<A> buffer(static_cast<size_t>((keys + kLanes - 1) / kLanes * kLanes));
      for (int64_t r = first; r < last; ++r) {
        row(in + r * keys, limit == nullptr ? nullptr : limit + r % queries * keys, static_cast<A>(scale),
            to + r * keys, buffer.data(), keys);
      }
    });
  });
  return out;
}

template <typename G, typename T, typename O, typename A>
void softmax_backward(const Tensor& grad, const Tensor& weights, double scale, const Tensor& out) {
  const int64_t keys = weights.size(-1), rows = keys == 0 ? 0 : weights.numel() / keys;
  const SoftmaxRowBackward<G, T, O, A> row = COLLM_CHOOSE(softmax_backward_loop<G, T, O, A>);
  const Tensor from = dense(grad), p = dense(weights);
  const G* g = from.const_data_ptr<G>();
  const T* w = p.const_data_ptr<T>();
  O* to = out.mutable_data_ptr<O>();
  for_rows(rows, keys, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      row(g + r * keys, w + r * keys, static_cast<A>(scale), to + r * keys, keys);
    }
  });
}

Tensor masked_softmax_backward(const Tensor& grad, const Tensor& weights, double scale,
                               std::optional<ScalarType> type) {
  constexpr const char* op = "masked_softmax_backward";
  COLLM_CHECK(weights.dim() >= 2, op, "weights of shape [..., Q, K], got ", shape(weights));
  check_float(op, "weights", weights);
  check_shape(op, "grad", grad, "weights", weights);
  const ScalarType from = grad.scalar_type(), kept = weights.scalar_type(), to = type.value_or(from);
  const bool alike = from == kept && to == kept;
  const bool mixed = kept == ScalarType::BFloat16 && ((from == ScalarType::Float && to == ScalarType::BFloat16) ||
                                                      (from == ScalarType::BFloat16 && to == ScalarType::Float));
  COLLM_CHECK(alike || mixed, op, "grad and result of the dtype of weights, or one of them float32 for bfloat16, got ",
              name(from), " and ", name(to));
  const Tensor out = torch::stable::new_empty(dense(weights), sizes_of(weights, weights.dim()), to);
  if (alike) {
    dispatch(kept, [&](auto element, auto sum) {
      using T = decltype(element);
      softmax_backward<T, T, T, decltype(sum)>(grad, weights, scale, out);
    });
  } else if (from == ScalarType::Float) {
    softmax_backward<float, BFloat16, BFloat16, float>(grad, weights, scale, out);
  } else {
    softmax_backward<BFloat16, BFloat16, float, float>(grad, weights, scale, out);
  }
  return out;
}

}  // namespace
}  // namespace collm::decoder

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&collm::decoder::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&collm::decoder::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&collm::decoder::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&collm::decoder::swiglu_backward));
  m.impl("rotate_heads", TORCH_BOX(&collm::decoder::rotate_heads));
  m.impl("rotate_heads_backward", TORCH_BOX(&collm::decoder::rotate_heads_backward));
  m.impl("masked_softmax", TORCH_BOX(&collm::decoder::masked_softmax));
  m.impl("masked_softmax_backward", TORCH_BOX(&collm::decoder::masked_softmax_backward));
}
