// What stands between the matrix products of a decoder layer, on a CPU: rms_norm, swiglu and rotate_heads with their
// gradients, each in one pass over its operands where plain torch takes three to eight.
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

}  // namespace
}  // namespace collm::decoder

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&collm::decoder::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&collm::decoder::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&collm::decoder::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&collm::decoder::swiglu_backward));
  m.impl("rotate_heads", TORCH_BOX(&collm::decoder::rotate_heads));
  m.impl("rotate_heads_backward", TORCH_BOX(&collm::decoder::rotate_heads_backward));
}
