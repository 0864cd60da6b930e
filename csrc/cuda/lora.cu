// lora_linear and lora_linear_group on CUDA: launches of lora.cuh, the vendor GEMM with beta = 1, registration. One
// projection is a group of one.
//
// Forward: project (x, mask -> s of all projections), then for each expand (b + scaling s B^T -> y) and y += x W^T.
// Backward: for each project (dy -> ds), outer + reduce (dA from x and the mask, dB from dy); then expand or
// expand_group (all ds, masks -> dx), and dx += dy W for each.
#include "lora_group.h"

#include "device_error.h"
#include "lora.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace collm::lora {
namespace {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  COLLM_CHECK(error == cudaSuccess, "lora_linear", "a launch without an error, got ", cudaGetErrorString(error));
}

unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// Calls body with a value of the device's type of `type`.
template <typename Body>
void with_type(ScalarType type, Body body) {
  if (type == ScalarType::Float) {
    body(float{});
  } else if (type == ScalarType::Half) {
    body(__half{});
  } else {
    body(__nv_bfloat16{});
  }
}

// The served pairs alone: a factor is in float32 or in the dtype T of x.
template <typename T, typename Body>
void with_factor_type(ScalarType type, Body body) {
  if (type == ScalarType::Float) {
    body(float{});
  } else {
    body(T{});
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// Nothing is dropped without a seed, nor by a p that rounds to no 16-bit step.
uint32_t threshold_of(double p, bool has_seed) { return has_seed ? dropout_threshold(p) : 0; }

Mask mask_of(double p, const std::optional<Tensor>& seed, int64_t stream) {
  const uint32_t threshold = threshold_of(p, seed.has_value());
  return {threshold > 0 ? data<int64_t>(*seed) : nullptr, static_cast<uint32_t>(stream), threshold};
}

// A factor as a matrix [r][C]; lora_B [N][r] is read as its transpose.
struct Factor {
  Tensor tensor;
  int64_t j, c;
};
Factor rows_of(const Tensor& lora_A) { return {lora_A, lora_A.stride(0), lora_A.stride(1)}; }
Factor columns_of(const Tensor& lora_B) { return {lora_B, lora_B.stride(1), lora_B.stride(0)}; }

// One projection on the side of its rank: a factor [r][C], s [M][r] and the mask between them.
struct RankSide {
  Factor factor;
  int64_t r;
  Tensor s;
  Mask mask;
};
using RankSides = std::vector<RankSide>;

// Calls body(sides) for as many projections at a time as one launch takes, all factors of one type. All of them draw
// masks, or none does.
template <typename F, typename Body>
void each_launch_of(ScalarType type, const RankSides& all, Body body) {
  Sides<F> sides{};
  const auto flush = [&] {
    if (sides.count > 0) {
      body(sides);
    }
    sides.count = 0;
  };
  for (const RankSide& one : all) {
    if (one.factor.tensor.scalar_type() == type) {
      sides.side[sides.count++] = {
          data<F>(one.factor.tensor), one.factor.j, one.factor.c, static_cast<float*>(one.s.data_ptr()),
          static_cast<int>(one.r),    one.mask};
      if (sides.count == kMaxProjections) {
        flush();
      }
    }
  }
  flush();
}
template <typename T, typename Body>
void each_launch(ScalarType type, const RankSides& all, Body body) {
  each_launch_of<float>(ScalarType::Float, all, body);
  if constexpr (!std::is_same_v<T, float>) {
    each_launch_of<T>(type, all, body);
  }
}

// Each projection's s from v [M][C].
void launch_project(const Tensor& v, const RankSides& all, double scale, cudaStream_t stream) {
  const int64_t M = v.size(0), C = v.size(1);
  with_type(v.scalar_type(), [&](auto type) {
    using T = decltype(type);
    each_launch<T>(v.scalar_type(), all, [&]<typename F>(const Sides<F>& sides) {
      int64_t tiles = 0;
      for (int n = 0; n < sides.count; ++n) {
        tiles += (sides.side[n].r + kRankTile - 1) / kRankTile;
      }
      const int abreast = tiles > 2 ? 4 : static_cast<int>(tiles);
      const dim3 grid(blocks(M, kThreads / 32 / abreast * kProjectRows), blocks(tiles, abreast));
      const auto kernel = sides.side[0].mask.seed ? &project<T, F, true> : &project<T, F, false>;
      kernel<<<grid, kThreads, 0, stream>>>(data<T>(v), v.stride(0), M, C, sides, abreast, static_cast<float>(scale));
      check_launch();
    });
  });
}

void launch_expand(const Tensor& s, const Factor& factor, int64_t r, double scale, const std::optional<Tensor>& bias,
                   const Mask& mask, const Tensor& out, int64_t M, int64_t C, cudaStream_t stream) {
  if (C == 0) {
    return;
  }
  const dim3 grid(blocks(M, kExpandRows), blocks(C, kThreads * kColumns));
  with_type(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    with_factor_type<T>(factor.tensor.scalar_type(), [&](auto factor_type) {
      using F = decltype(factor_type);
      const auto kernel = mask.seed ? &expand<T, F, true> : &expand<T, F, false>;
      kernel<<<grid, kThreads, 0, stream>>>(data<float>(s), M, static_cast<int>(r), data<F>(factor.tensor), factor.j,
                                            factor.c, C, static_cast<float>(scale), bias ? data<T>(*bias) : nullptr,
                                            mask, static_cast<T*>(out.data_ptr()));
    });
  });
  check_launch();
}

// out [M][C] = the sum of the projections' low-rank parts, each under its mask.
void launch_expand_group(const RankSides& all, const Tensor& out, int64_t M, int64_t C, cudaStream_t stream) {
  if (C == 0) {
    return;
  }
  const dim3 grid(blocks(M, kGroupRows), blocks(C, kThreads * kColumns));
  with_type(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    bool add = false;
    each_launch<T>(out.scalar_type(), all, [&]<typename F>(const Sides<F>& sides) {
      const auto kernel = sides.side[0].mask.seed ? &expand_group<T, F, true> : &expand_group<T, F, false>;
      kernel<<<grid, kThreads, 0, stream>>>(sides, M, C, add, static_cast<T*>(out.data_ptr()));
      check_launch();
      add = true;
    });
  });
}

// out[j][c] (at out_j, out_c) = scale * sum_m s[m][j] keep(m, c) v[m][c]. The number of parts depends on the shapes
// alone, and their buffer has at most 64 MiB.
void launch_outer(const Tensor& v, const Tensor& s, int64_t r, double scale, const Mask& mask, const Tensor& out,
                  int64_t out_j, int64_t out_c, cudaStream_t stream) {
  const int64_t M = v.size(0), C = v.size(1);
  if (C == 0) {
    return;
  }
  const int64_t fit = std::max<int64_t>(1, (int64_t{64} << 20) / (r * C * static_cast<int64_t>(sizeof(float))));
  const int64_t wanted = std::clamp<int64_t>((M + 63) / 64, 1, std::min<int64_t>(128, fit));
  const int64_t rows = std::max<int64_t>(1, (M + wanted - 1) / wanted), parts = (M + rows - 1) / rows;
  const std::vector<int64_t> sizes{parts, r, C};
  const Tensor partial = torch::stable::new_empty(v, sizes, ScalarType::Float);
  if (parts > 0) {
    const dim3 grid(blocks(C, kThreads * kColumns), static_cast<unsigned>(parts), blocks(r, kRankTile));
    with_type(v.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto kernel = mask.seed ? &outer<T, true> : &outer<T, false>;
      kernel<<<grid, kThreads, 0, stream>>>(data<T>(v), v.stride(0), M, C, data<float>(s), static_cast<int>(r), rows,
                                            mask, static_cast<float*>(partial.data_ptr()));
    });
    check_launch();
  }
  with_type(out.scalar_type(), [&](auto type) {
    using F = decltype(type);
    reduce<F><<<blocks(r * C, kThreads), kThreads, 0, stream>>>(data<float>(partial), static_cast<int>(parts),
                                                                static_cast<int>(r), C, static_cast<float>(scale),
                                                                out_j, out_c, static_cast<F*>(out.data_ptr()));
  });
  check_launch();
}

// out = beta base + left right, by the vendor's GEMM.
void set_product(const Tensor& out, const Tensor& base, double beta, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), base.get(), left.get(), right.get(), beta, 1.0));
}

Tensor matrix(const Tensor& tensor, int64_t M, int64_t C) {
  const std::array<int64_t, 2> flat{M, C};
  return torch::stable::view(tensor, flat);
}

// ys and ss from x: x is read once for every s.
void run_forward(const Tensor& x, const Forwards& call, double scaling, double dropout_p) {
  const std::vector<Projection>& group = call.group;
  const Tensor rows = as_rows(x);
  const int64_t M = rows.size(0);
  if (M == 0) {
    return;
  }
  const cudaStream_t queue = current_stream(x);
  const Mask none{};
  RankSides sides;
  bool has_seed = false;
  for (size_t n = 0; n < group.size(); ++n) {
    const Projection& g = group[n];
    if (g.lora_A) {
      sides.push_back({rows_of(*g.lora_A), g.lora_A->size(0), call.ss[n], mask_of(dropout_p, g.seed, g.stream)});
      has_seed = g.seed.has_value();
    }
  }
  launch_project(rows, sides, dropout_scale(threshold_of(dropout_p, has_seed)), queue);
  for (size_t n = 0; n < group.size(); ++n) {
    const Projection& g = group[n];
    const int64_t N = g.weight.size(0);
    const Tensor y = matrix(call.ys[n], M, N), right = torch::stable::transpose(g.weight, 0, 1);
    if (g.lora_B) {
      const std::optional<Tensor> b =
          g.bias && N > 1 && g.bias->stride(0) != 1 ? torch::stable::clone(*g.bias) : g.bias;
      launch_expand(call.ss[n], columns_of(*g.lora_B), g.lora_B->size(1), scaling, b, none, y, M, N, queue);
      set_product(y, y, 1.0, rows, right);
    } else {
      set_product(y, g.bias ? *g.bias : y, g.bias ? 1.0 : 0.0, rows, right);
    }
  }
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                   double scaling, double dropout_p, std::optional<Tensor> seed, int64_t stream) {
  raise_device_errors();
  check_forward({"lora_linear"}, x, weight, bias, lora_A, lora_B, dropout_p, seed, stream);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forwards call;
  call.add(x, {weight, bias, lora_A, lora_B, seed, stream});
  run_forward(x, call, scaling, dropout_p);
  return {call.ys[0], call.ss[0]};
}

std::tuple<Tensors, Tensors> forward_group(Tensor x, Tensors weights, Tensors biases, Tensors lora_As, Tensors lora_Bs,
                                           double scaling, double dropout_p, Tensors seeds,
                                           std::vector<int64_t> streams) {
  const Masks masks{dropout_p, seeds, streams};
  raise_device_errors();
  check_group_forward(x, weights, biases, lora_As, lora_Bs, masks);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Forwards call = forwards_of(x, weights, biases, lora_As, lora_Bs, masks);
  run_forward(x, call, scaling, dropout_p);
  return {call.ys, call.ss};
}

// ds of each projection that has an adapter, dA and dB where they are wanted, and dx where it is defined: one buffer,
// to which every product is added.
void run_backward(const Backwards& call, double scaling, double dropout_p) {
  const std::vector<Gradient>& group = call.group;
  const std::optional<Tensor> dx = call.wanted_dx();
  const Tensor& any = group.front().grad;
  const int64_t M = any.size(0), K = group.front().of.weight.size(1);
  const cudaStream_t queue = current_stream(any);
  RankSides sides;
  for (const Gradient& g : group) {
    if (!g.of.lora_A) {
      continue;
    }
    const Mask dropped = mask_of(dropout_p, g.of.seed, g.of.stream), kept{};
    const int64_t r = g.of.lora_A->size(0);
    const std::vector<int64_t> sizes{M, r};
    const Tensor ds = torch::stable::new_empty(any, sizes, ScalarType::Float);
    if (M > 0 && (dx || g.x)) {
      // scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
      const double scale = scaling * dropout_scale(dropped.threshold);
      launch_project(g.grad, {{columns_of(*g.of.lora_B), r, ds, kept}}, scale, queue);
    }
    if (g.x) {
      launch_outer(*g.x, ds, r, 1.0, dropped, g.dA, K, 1, queue);
    }
    if (g.s) {
      launch_outer(g.grad, *g.s, r, scaling, kept, g.dB, 1, r, queue);
    }
    sides.push_back({rows_of(*g.of.lora_A), r, ds, dropped});
  }
  if (!dx || M == 0) {
    return;
  }
  const Tensor out = matrix(*dx, M, K);
  if (sides.size() == 1) {
    const RankSide& one = sides.front();
    launch_expand(one.s, one.factor, one.r, 1.0, std::nullopt, one.mask, out, M, K, queue);
  } else {
    launch_expand_group(sides, out, M, K, queue);
  }
  bool begun = !sides.empty();
  for (const Gradient& g : group) {
    set_product(out, out, std::exchange(begun, true) ? 1.0 : 0.0, g.grad, g.of.weight);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                            Tensor s, double scaling, double dropout_p, std::optional<Tensor> seed,
                                            int64_t stream, std::vector<bool> mask) {
  raise_device_errors();
  check_backward({"lora_linear_backward"}, grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Backwards call(grad, weight, mask[0]);
  call.add({weight, std::nullopt, lora_A, lora_B, seed, stream}, grad, x, s, mask[1], mask[2]);
  run_backward(call, scaling, dropout_p);
  return {call.dx, call.group[0].dA, call.group[0].dB};
}

std::tuple<Tensor, Tensors, Tensors> backward_group(Tensors grads, Tensor x, Tensors weights, Tensors lora_As,
                                                    Tensors lora_Bs, Tensors ss, double scaling, double dropout_p,
                                                    Tensors seeds, std::vector<int64_t> streams, bool dx,
                                                    std::vector<bool> dA, std::vector<bool> dB) {
  raise_device_errors();
  const Masks masks{dropout_p, seeds, streams};
  const Wanted wanted{dx, dA, dB};
  check_group_backward(grads, x, weights, lora_As, lora_Bs, ss, masks, wanted);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Backwards call = backwards_of(grads, x, weights, lora_As, lora_Bs, ss, masks, wanted);
  run_backward(call, scaling, dropout_p);
  return call.results(lora_As, lora_Bs);
}

}  // namespace
}  // namespace collm::lora

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&collm::lora::forward));
  m.impl("lora_linear_backward", TORCH_BOX(&collm::lora::backward));
  m.impl("lora_linear_group", TORCH_BOX(&collm::lora::forward_group));
  m.impl("lora_linear_group_backward", TORCH_BOX(&collm::lora::backward_group));
}
