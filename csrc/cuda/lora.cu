// lora_linear on CUDA: checks, launches of lora.cuh, the vendor GEMM with beta = 1, registration.
//
// Forward: project (x, mask -> s), expand (b + scaling s B^T -> y), then y += x W^T. Backward: project (dy -> ds),
// outer + reduce (dA from x and the mask, dB from dy), expand (ds, mask -> dx), then dx += dy W.
#include "lora_checks.h"

#include "device_error.h"
#include "lora.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

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

Mask mask_of(double p, const std::optional<Tensor>& seed, int64_t stream) {
  const uint32_t threshold = seed ? dropout_threshold(p) : 0;
  return {threshold > 0 ? data<int64_t>(*seed) : nullptr, static_cast<uint32_t>(stream), threshold};
}

// A factor as a matrix [r][C]; lora_B [N][r] is read as its transpose.
struct Factor {
  Tensor tensor;
  int64_t j, c;
};
Factor rows_of(const Tensor& lora_A) { return {lora_A, lora_A.stride(0), lora_A.stride(1)}; }
Factor columns_of(const Tensor& lora_B) { return {lora_B, lora_B.stride(1), lora_B.stride(0)}; }

void launch_project(const Tensor& v, const Factor& factor, int64_t r, double scale, const Mask& mask, const Tensor& out,
                    cudaStream_t stream) {
  const int64_t M = v.size(0), C = v.size(1);
  const dim3 grid(blocks(M, kThreads / 32 * kProjectRows), blocks(r, kRankTile));
  with_type(v.scalar_type(), [&](auto type) {
    using T = decltype(type);
    with_factor_type<T>(factor.tensor.scalar_type(), [&](auto factor_type) {
      using F = decltype(factor_type);
      const auto kernel = mask.seed ? &project<T, F, true> : &project<T, F, false>;
      kernel<<<grid, kThreads, 0, stream>>>(data<T>(v), v.stride(0), M, C, data<F>(factor.tensor), factor.j, factor.c,
                                            static_cast<int>(r), static_cast<float>(scale), mask,
                                            static_cast<float*>(out.data_ptr()));
    });
  });
  check_launch();
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

// out += left right, by the vendor's GEMM.
void add_product(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                   double scaling, double dropout_p, std::optional<Tensor> seed, int64_t stream) {
  raise_device_errors();
  check_forward(x, weight, bias, lora_A, lora_B, dropout_p, seed, stream);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t N = weight.size(0), r = lora_A.size(0);
  Tensor y = new_rows(x, leading(x), N, x.scalar_type());
  Tensor s = new_rows(x, leading(x), r, ScalarType::Float);
  const Tensor rows = as_rows(x);
  const int64_t M = rows.size(0);
  if (M == 0) {
    return {y, s};
  }
  const cudaStream_t queue = current_stream(x);
  const Mask mask = mask_of(dropout_p, seed, stream), none{};
  const std::optional<Tensor> b = bias && N > 1 && bias->stride(0) != 1 ? torch::stable::clone(*bias) : bias;
  launch_project(rows, rows_of(lora_A), r, dropout_scale(mask.threshold), mask, s, queue);
  launch_expand(s, columns_of(lora_B), r, scaling, b, none, y, M, N, queue);
  const std::array<int64_t, 2> flat{M, N};
  add_product(torch::stable::view(y, flat), rows, torch::stable::transpose(weight, 0, 1));
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B,
                                            Tensor s, double scaling, double dropout_p, std::optional<Tensor> seed,
                                            int64_t stream, std::vector<bool> mask) {
  raise_device_errors();
  check_backward(grad, x, weight, lora_A, lora_B, s, dropout_p, seed, stream, mask);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t N = weight.size(0), K = weight.size(1), r = lora_A.size(0);
  const std::vector<int64_t> none{0};
  Tensor dx = mask[0] ? new_rows(grad, leading(grad), K, grad.scalar_type()) : torch::stable::new_empty(grad, none);
  Tensor dA = torch::stable::new_empty(lora_A, mask[1] ? std::vector<int64_t>{r, K} : none);
  Tensor dB = torch::stable::new_empty(lora_B, mask[2] ? std::vector<int64_t>{N, r} : none);
  const Tensor rows = as_rows(grad);
  const int64_t M = rows.size(0);
  const cudaStream_t queue = current_stream(grad);
  const Mask dropped = mask_of(dropout_p, seed, stream), kept{};
  const std::vector<int64_t> sizes{M, r};
  const Tensor ds = torch::stable::new_empty(grad, sizes, ScalarType::Float);
  if (M > 0 && (mask[0] || mask[1])) {
    // scaling and the mask's 1 / (1 - q) go into ds once: dx and dA both want them.
    const double scale = scaling * dropout_scale(dropped.threshold);
    launch_project(rows, columns_of(lora_B), r, scale, kept, ds, queue);
  }
  if (mask[1]) {
    launch_outer(as_rows(x), ds, r, 1.0, dropped, dA, K, 1, queue);
  }
  if (mask[2]) {
    launch_outer(rows, packed_rows(s), r, scaling, kept, dB, 1, r, queue);
  }
  if (mask[0] && M > 0) {
    launch_expand(ds, rows_of(lora_A), r, 1.0, std::nullopt, dropped, dx, M, K, queue);
    const std::array<int64_t, 2> flat{M, K};
    add_product(torch::stable::view(dx, flat), rows, weight);
  }
  return {dx, dA, dB};
}

}  // namespace
}  // namespace collm::lora

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&collm::lora::forward));
  m.impl("lora_linear_backward", TORCH_BOX(&collm::lora::backward));
}
