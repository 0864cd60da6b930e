// What csrc/cpu/lora.cpp and csrc/cuda/lora.cu share of lora_linear_group: the argument checks, the projections of a
// call and the tensors that it gives. lora_linear is a group of one.
//
// The lists of a schema hold tensors only: what is absent (a bias, an adapter, a gradient) is a tensor without
// dimensions. collm_fast/ops/_lora_checks.py says the same sentences for the fake, Triton and the reference.
#pragma once

#include "lora_checks.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace collm::lora {

using Tensors = std::vector<Tensor>;

inline bool is_there(const Tensor& tensor) { return tensor.dim() > 0; }
inline std::optional<Tensor> if_there(const Tensor& tensor) {
  return is_there(tensor) ? std::optional(tensor) : std::nullopt;
}
inline Tensor absent(const Tensor& like, ScalarType type) {
  return torch::stable::new_zeros(like, std::vector<int64_t>{}, type);
}

inline void check_lengths(const char* op, const std::vector<size_t>& lengths) {
  for (const size_t length : lengths) {
    if (length != lengths[0]) {
      std::vector<int64_t> all(lengths.begin(), lengths.end());
      const int64_t last = all.back();
      all.pop_back();
      fail(op, "lists of equal length, got ", shape(all, last));
    }
  }
}

inline bool has_adapter(const Place& at, const Tensor& lora_A, const Tensor& lora_B) {
  COLLM_CHECK(is_there(lora_A) == is_there(lora_B), at.op, at.name("lora_A"), " and ", at.name("lora_B"),
              " both given or both absent, got one of them");
  return is_there(lora_A);
}

// The masks of a group: projection j draws stream streams[j] of seeds[j]; without a seed nothing is dropped.
struct Masks {
  double dropout_p;
  Tensors seeds;
  std::vector<int64_t> streams;

  std::optional<Tensor> seed(size_t j) const { return seeds.empty() ? std::nullopt : std::optional(seeds[j]); }
  size_t length() const { return seeds.empty() ? streams.size() : seeds.size(); }
};

inline void check_group_forward(const Tensor& x, const Tensors& weights, const Tensors& biases, const Tensors& lora_As,
                                const Tensors& lora_Bs, const Masks& masks) {
  const char* op = "lora_linear_group";
  check_lengths(op,
                {weights.size(), biases.size(), lora_As.size(), lora_Bs.size(), masks.streams.size(), masks.length()});
  for (size_t j = 0; j < weights.size(); ++j) {
    const Place at{op, static_cast<int64_t>(j)};
    if (has_adapter(at, lora_As[j], lora_Bs[j])) {
      check_forward(at, x, weights[j], if_there(biases[j]), lora_As[j], lora_Bs[j], masks.dropout_p, masks.seed(j),
                    masks.streams[j]);
    } else {
      check_linear(at, x, weights[j], if_there(biases[j]));
    }
  }
}

// What backward is asked for.
struct Wanted {
  bool dx;
  std::vector<bool> dA, dB;
};

inline void check_group_backward(const Tensors& grads, const Tensor& x, const Tensors& weights, const Tensors& lora_As,
                                 const Tensors& lora_Bs, const Tensors& ss, const Masks& masks, const Wanted& wanted) {
  const char* op = "lora_linear_group_backward";
  check_lengths(op, {grads.size(), weights.size(), lora_As.size(), lora_Bs.size(), ss.size(), wanted.dA.size(),
                     wanted.dB.size(), masks.streams.size(), masks.length()});
  const size_t first = static_cast<size_t>(std::find_if(grads.begin(), grads.end(), is_there) - grads.begin());
  COLLM_CHECK(first < grads.size(), op, "a gradient of one projection at least, got none");
  for (size_t j = first; j < grads.size(); ++j) {
    if (!is_there(grads[j])) {
      continue;
    }
    const Place at{op, static_cast<int64_t>(j)};
    const Tensor &grad = grads[j], &weight = weights[j];
    check_gradient(at, grad, weight);
    const int64_t N = weight.size(0), K = weights[first].size(1);
    COLLM_CHECK(has_shape(grad, leading(grads[first]), N), op, at.name("grad"), " of shape ",
                shape(leading(grads[first]), N), ", got ", collm::shape(grad));
    COLLM_CHECK(weight.size(1) == K, op, at.name("weight"), " of shape ", shape({N}, K), ", got ",
                collm::shape(weight));
    COLLM_CHECK(grad.scalar_type() == grads[first].scalar_type(), op, "grads in one dtype ", dtype(grads[first]),
                ", got ", dtype(grad));
    if (has_adapter(at, lora_As[j], lora_Bs[j])) {
      check_backward(at, grad, x, weight, lora_As[j], lora_Bs[j], ss[j], masks.dropout_p, masks.seed(j),
                     masks.streams[j], {wanted.dx, wanted.dA[j], wanted.dB[j]});
    } else {
      COLLM_CHECK(!wanted.dA[j] && !wanted.dB[j], op, "an adapter of projection ", at.index,
                  " whose gradient is asked for, got none");
      check_linear_dtypes(at, grad, weight, std::nullopt);
      check_device(at, "weight", weight, at.name("grad"), grad);
    }
    check_device(at, "grad", grad, Place{op, static_cast<int64_t>(first)}.name("grad"), grads[first]);
  }
  // It chose the backend, wanted or not.
  check_device({op}, "x", x, Place{op, static_cast<int64_t>(first)}.name("grad"), grads[first]);
}

// One projection of a call, as its op was given it.
struct Projection {
  Tensor weight;
  std::optional<Tensor> bias, lora_A, lora_B, seed;
  int64_t stream;
  size_t index = 0;  // in its group
};

struct Forwards {
  std::vector<Projection> group;
  Tensors ys, ss;

  void add(const Tensor& x, Projection of) {
    ys.push_back(new_rows(x, leading(x), of.weight.size(0), x.scalar_type()));
    const ScalarType type = wide(x.scalar_type());
    ss.push_back(of.lora_A ? new_rows(x, leading(x), of.lora_A->size(0), type) : absent(x, type));
    group.push_back(std::move(of));
  }
};

inline Forwards forwards_of(const Tensor& x, const Tensors& weights, const Tensors& biases, const Tensors& lora_As,
                            const Tensors& lora_Bs, const Masks& masks) {
  Forwards all;
  for (size_t j = 0; j < weights.size(); ++j) {
    all.add(x, {weights[j], if_there(biases[j]), if_there(lora_As[j]), if_there(lora_Bs[j]), masks.seed(j),
                masks.streams[j], j});
  }
  return all;
}

// What backward is given of one projection, and what it gives: its gradient [M, N], x and s where they are read.
struct Gradient {
  Projection of;
  Tensor grad;
  std::optional<Tensor> x, s;
  Tensor dA, dB;  // to be filled where x, s are
};

// What nobody wants is an empty tensor.
struct Backwards {
  std::vector<Gradient> group;
  Tensor dx;
  bool wants_dx;
  std::optional<Tensor> rows;  // of x, made for the first projection that reads it

  Backwards(const Tensor& grad, const Tensor& weight, bool wants_dx)
      : dx(wants_dx ? new_rows(grad, leading(grad), weight.size(1), grad.scalar_type()) : none(grad)),
        wants_dx(wants_dx) {}

  static Tensor none(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }
  static Tensor made_if(bool wanted, const Tensor& like) {
    const auto sizes = like.sizes();
    return wanted ? empty(like, std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type()) : none(like);
  }
  void add(const Projection& of, const Tensor& grad, const Tensor& x, const Tensor& s, bool dA, bool dB) {
    const Tensor &A = of.lora_A ? *of.lora_A : grad, &B = of.lora_B ? *of.lora_B : grad;
    Gradient g{of, as_rows(grad), std::nullopt, std::nullopt, made_if(dA, A), made_if(dB, B)};
    if (dA) {
      rows = rows ? rows : std::optional(as_rows(x));
      g.x = rows;
    }
    if (dB) {
      g.s = packed_rows(s);
    }
    group.push_back(std::move(g));
  }
  std::optional<Tensor> wanted_dx() const { return wants_dx ? std::optional(dx) : std::nullopt; }

  // The results of the op over `count` projections, those of an absent gradient too.
  std::tuple<Tensor, Tensors, Tensors> results(const Tensors& lora_As, const Tensors& lora_Bs) const {
    Tensors dAs, dBs;
    for (size_t j = 0; j < lora_As.size(); ++j) {
      dAs.push_back(none(lora_As[j]));
      dBs.push_back(none(lora_Bs[j]));
    }
    for (const Gradient& g : group) {
      const size_t j = g.of.index;
      dAs[j] = g.x ? g.dA : dAs[j], dBs[j] = g.s ? g.dB : dBs[j];
    }
    return {dx, dAs, dBs};
  }
};

inline Backwards backwards_of(const Tensors& grads, const Tensor& x, const Tensors& weights, const Tensors& lora_As,
                              const Tensors& lora_Bs, const Tensors& ss, const Masks& masks, const Wanted& wanted) {
  const size_t first = static_cast<size_t>(std::find_if(grads.begin(), grads.end(), is_there) - grads.begin());
  Backwards all(grads[first], weights[first], wanted.dx);
  for (size_t j = first; j < grads.size(); ++j) {
    if (is_there(grads[j])) {
      const Projection of{
          weights[j], std::nullopt, if_there(lora_As[j]), if_there(lora_Bs[j]), masks.seed(j), masks.streams[j], j};
      all.add(of, grads[j], x, ss[j], wanted.dA[j], wanted.dB[j]);
    }
  }
  return all;
}

}  // namespace collm::lora
