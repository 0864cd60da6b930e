// Argument checks of every registered kernel: one sentence, `<op>: expected <rule>, got <value>`.
//
// The checks themselves stand in csrc/cpu/<family>.cpp and csrc/cuda/<family>.cu, beside the kernel they guard. This
// header only formats. It needs torch's stable headers; device code (*.cuh) never includes it.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

// The headers of torch 2.10 know it by its older name only, later ones by both.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace collm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d ? ", " : "") << tensor.size(d);
  }
  text << "]";
  return text.str();
}

// Python's name of a dtype, so that C++, Triton and the reference say the same sentence.
inline std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {
      std::string text = torch::headeronly::toString(type);
      std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
      return text;
    }
  }
}

inline std::string dtype(const Tensor& tensor) { return name(tensor.scalar_type()); }

// Python's name of a tensor's device.
inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another";
}

template <typename T>
const T& as_text(const T& part) {
  return part;
}

// As Python's repr: the shortest digits that give the same number back, and 1.0 for one.
inline std::string as_text(double value) {
  if (!std::isfinite(value)) {
    return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
  }
  const double size = std::fabs(value);
  const bool fixed = size == 0.0 || (size >= 1e-4 && size < 1e16);
  char digits[64];
  const auto format = fixed ? std::chars_format::fixed : std::chars_format::scientific;
  const auto done = std::to_chars(digits, digits + sizeof(digits), value, format);
  const std::string text(digits, done.ptr);
  return fixed && text.find('.') == std::string::npos ? text + ".0" : text;
}

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": expected ";
  (text << ... << as_text(parts));
  // Not STD_TORCH_CHECK: it would put this file's name and line before the sentence.
  throw std::invalid_argument(text.str());
}

}  // namespace collm

// COLLM_CHECK(rows.dim() == 2, "embed_inject", "rows of shape [S, H], got ", collm::shape(rows));
#define COLLM_CHECK(condition, op, ...) \
  do {                                  \
    if (!(condition)) [[unlikely]] {    \
      ::collm::fail(op, __VA_ARGS__);   \
    }                                   \
  } while (false)
