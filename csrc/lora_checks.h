// The argument checks of lora_linear and its backward, one definition for csrc/cpu/lora.cpp and csrc/cuda/lora.cu.
// Those of a group are lora_group.h.
//
// collm_fast/ops/_lora_checks.py says the same sentences for the fake, Triton and the reference. No kernel lives here.
#pragma once

#include "checks.h"
#include "philox.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace collm::lora {

constexpr int64_t kMaxRank = 256;

inline ScalarType wide(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline std::string shape(std::vector<int64_t> sizes, int64_t last) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += std::to_string(size) + ", ";
  }
  return text + std::to_string(last) + "]";
}

// All dimensions but the last.
inline std::vector<int64_t> leading(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
}

inline bool has_shape(const Tensor& tensor, std::vector<int64_t> sizes, int64_t last) {
  sizes.push_back(last);
  const auto got = tensor.sizes();
  return std::vector<int64_t>(got.begin(), got.end()) == sizes;
}

// Whose arguments are checked: an op's own, or those of one projection of a group.
struct Place {
  const char* op;
  int64_t index = -1;

  // weight, or weights[1].
  std::string name(const std::string& argument) const {
    const char* plural = argument == "bias" ? "es[" : "s[";
    return index < 0 ? argument : argument + plural + std::to_string(index) + "]";
  }
};

inline void check_device(const Place& at, const char* name, const Tensor& tensor, const std::string& of,
                         const Tensor& x) {
  COLLM_CHECK(tensor.device() == x.device(), at.op, at.name(name), " on ", of, "'s device ", device_of(x), ", got ",
              device_of(tensor));
}

inline void check_linear_dtypes(const Place& at, const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  const bool low = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  COLLM_CHECK(low || (type == ScalarType::Double && x.is_cpu()), at.op, "x in float32, bfloat16, float16",
              x.is_cpu() ? ", float64" : "", ", got ", dtype(x));
  COLLM_CHECK(weight.scalar_type() == type, at.op, at.name("weight"), " in x's dtype ", dtype(x), ", got ",
              dtype(weight));
  COLLM_CHECK(!bias || bias->scalar_type() == type, at.op, at.name("bias"), " in x's dtype ", dtype(x), ", got ",
              dtype(*bias));
}

inline void check_dtypes(const Place& at, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& lora_A, const Tensor& lora_B) {
  check_linear_dtypes(at, x, weight, bias);
  const ScalarType type = x.scalar_type();
  COLLM_CHECK(lora_A.scalar_type() == type || (type != ScalarType::Double && lora_A.scalar_type() == ScalarType::Float),
              at.op, at.name("lora_A"), " in float32 or x's dtype ", dtype(x), ", got ", dtype(lora_A));
  COLLM_CHECK(lora_B.scalar_type() == lora_A.scalar_type(), at.op, at.name("lora_B"), " in ", at.name("lora_A"),
              "'s dtype ", dtype(lora_A), ", got ", dtype(lora_B));
}

inline void check_dropout(const char* op, const Tensor& x, double p, const std::optional<Tensor>& seed,
                          int64_t stream) {
  COLLM_CHECK(p >= 0.0 && p < 1.0 && dropout_threshold(p) < 65536u, op,
              "dropout_p in [0, 1) with round(dropout_p 2^16) below 2^16, got ", p);
  COLLM_CHECK(stream >= 0 && stream < (int64_t{1} << 32), op, "stream in [0, 2^32), got ", stream);
  if (!seed) {
    COLLM_CHECK(p == 0.0, op, "a seed where dropout_p > 0 in training, got None");
    return;
  }
  COLLM_CHECK(seed->scalar_type() == ScalarType::Long, op, "seed in int64, got ", dtype(*seed));
  COLLM_CHECK(seed->numel() == 1, op, "seed of one element, got ", collm::shape(*seed));
  check_device({op}, "seed", *seed, "x", x);
}

inline void check_adapters(const Place& at, int64_t N, int64_t K, const Tensor& lora_A, const Tensor& lora_B) {
  COLLM_CHECK(lora_A.dim() == 2 && lora_A.size(0) >= 1 && lora_A.size(0) <= kMaxRank && lora_A.size(1) == K, at.op,
              at.name("lora_A"), " of shape [r, ", K, "] with r in [1, 256], got ", collm::shape(lora_A));
  const int64_t r = lora_A.size(0);
  COLLM_CHECK(lora_B.dim() == 2 && lora_B.size(0) == N && lora_B.size(1) == r, at.op, at.name("lora_B"), " of shape [",
              N, ", ", r, "], got ", collm::shape(lora_B));
}

inline void check_linear_shapes(const Place& at, const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  COLLM_CHECK(x.dim() >= 1, at.op, "x of shape [..., K], got ", collm::shape(x));
  const int64_t K = x.size(x.dim() - 1);
  COLLM_CHECK(weight.dim() == 2 && weight.size(1) == K, at.op, at.name("weight"), " of shape [N, ", K, "], got ",
              collm::shape(weight));
  const int64_t N = weight.size(0);
  COLLM_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), at.op, at.name("bias"), " of shape [", N, "], got ",
              collm::shape(*bias));
}

inline void check_linear_devices(const Place& at, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias) {
  check_device(at, "weight", weight, "x", x);
  if (bias) {
    check_device(at, "bias", *bias, "x", x);
  }
}

// Where there is no adapter.
inline void check_linear(const Place& at, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_linear_shapes(at, x, weight, bias);
  check_linear_dtypes(at, x, weight, bias);
  check_linear_devices(at, x, weight, bias);
}

inline void check_forward(const Place& at, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& lora_A, const Tensor& lora_B, double dropout_p,
                          const std::optional<Tensor>& seed, int64_t stream) {
  check_linear_shapes(at, x, weight, bias);
  check_adapters(at, weight.size(0), weight.size(1), lora_A, lora_B);
  check_dtypes(at, x, weight, bias, lora_A, lora_B);
  check_linear_devices(at, x, weight, bias);
  check_device(at, "lora_A", lora_A, "x", x);
  check_device(at, "lora_B", lora_B, "x", x);
  check_dropout(at.op, x, dropout_p, seed, stream);
}

inline void check_gradient(const Place& at, const Tensor& grad, const Tensor& weight) {
  COLLM_CHECK(weight.dim() == 2, at.op, at.name("weight"), " of shape [N, K], got ", collm::shape(weight));
  const int64_t N = weight.size(0);
  COLLM_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == N, at.op, at.name("grad"), " of shape [..., ", N,
              "], got ", collm::shape(grad));
}

// x is read for lora_A's gradient alone, and s for lora_B's: whoever does not ask may pass empty tensors.
inline void check_backward(const Place& at, const Tensor& grad, const Tensor& x, const Tensor& weight,
                           const Tensor& lora_A, const Tensor& lora_B, const Tensor& s, double dropout_p,
                           const std::optional<Tensor>& seed, int64_t stream, const std::vector<bool>& mask) {
  const char* op = at.op;
  COLLM_CHECK(mask.size() == 3, op, "mask of 3 booleans, got ", mask.size());
  check_gradient(at, grad, weight);
  const int64_t K = weight.size(1);
  check_adapters(at, weight.size(0), K, lora_A, lora_B);
  const auto rows = leading(grad);
  COLLM_CHECK(!mask[1] || has_shape(x, rows, K), op, "x of shape ", shape(rows, K), ", got ", collm::shape(x));
  COLLM_CHECK(!mask[2] || has_shape(s, rows, lora_A.size(0)), op, at.name("s"), " of shape ",
              shape(rows, lora_A.size(0)), ", got ", collm::shape(s));
  check_dtypes(at, grad, weight, std::nullopt, lora_A, lora_B);
  COLLM_CHECK(x.scalar_type() == grad.scalar_type(), op, "x in ", at.name("grad"), "'s dtype ", dtype(grad), ", got ",
              dtype(x));
  COLLM_CHECK(s.scalar_type() == wide(grad.scalar_type()), op, at.name("s"), " in ", name(wide(grad.scalar_type())),
              ", got ", dtype(s));
  COLLM_CHECK(x.device() == grad.device(), op, "x on ", at.name("grad"), "'s device ", device_of(grad), ", got ",
              device_of(x));
  check_device(at, "weight", weight, at.name("grad"), grad);
  check_device(at, "lora_A", lora_A, at.name("grad"), grad);
  check_device(at, "lora_B", lora_B, at.name("grad"), grad);
  check_device(at, "s", s, at.name("grad"), grad);
  check_dropout(op, grad, dropout_p, seed, stream);
}

// A new tensor on the device of `like`, past the dispatcher: a call makes up to four, and their time shows.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device, index, &made));
  return Tensor(made);
}

// The same matrix, row after row.
inline Tensor copied(const Tensor& matrix) {
  const std::array<int64_t, 2> sizes{matrix.size(0), matrix.size(1)};
  Tensor copy = torch::stable::new_empty(matrix, sizes);
  return torch::stable::copy_(copy, matrix);
}

// [..., C] as [M, C] whose rows are contiguous; a view where the strides allow it, as in torch's own linear.
inline Tensor as_rows(const Tensor& tensor) {
  const int64_t C = tensor.size(tensor.dim() - 1);
  if (tensor.dim() == 2 && (C <= 1 || tensor.stride(1) == 1)) {
    return tensor;
  }
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
    M *= tensor.size(d);
  }
  const std::array<int64_t, 2> sizes{M, C};
  const Tensor rows = torch::stable::reshape(tensor, sizes);
  return C > 1 && rows.stride(1) != 1 ? copied(rows) : rows;
}

// The same without gaps between the rows.
inline Tensor packed_rows(const Tensor& tensor) {
  const Tensor rows = as_rows(tensor);
  return rows.is_contiguous() ? rows : copied(rows);
}

inline Tensor new_rows(const Tensor& like, std::vector<int64_t> sizes, int64_t last, ScalarType type) {
  sizes.push_back(last);
  return empty(like, sizes, type);
}

}  // namespace collm::lora
