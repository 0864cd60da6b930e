// The argument checks that csrc/cpu/propagate.cpp and csrc/cuda/propagate.cu share: everything a tensor says of itself.
//
// What needs the values (crow rises, ids are in range) is checked by the CPU before it reads and guarded in the CUDA
// kernels. collm_fast/ops/propagate.py says the same sentences for the other backends.
#pragma once

#include <cstdint>
#include <optional>

#include "checks.h"

namespace collm {

inline void check_device(const char* op, const Tensor& tensor, const Tensor& x, const char* what) {
  const bool same = tensor.device() == x.device();
  COLLM_CHECK(same, op, what, " on the device of ", "x, got another");
}

inline void check_graph(const char* op, const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& inv,
                        int64_t nodes) {
  COLLM_CHECK(crow.dim() == 1 && crow.size(0) == nodes + 1, op, "crow of shape [", nodes + 1, "], got ", shape(crow));
  COLLM_CHECK(crow.scalar_type() == ScalarType::Long, op, "crow in int64, got ", dtype(crow));
  COLLM_CHECK(col.dim() == 1, op, "col of shape [nnz], got ", shape(col));
  COLLM_CHECK(col.scalar_type() == ScalarType::Int, op, "col in int32, got ", dtype(col));
  COLLM_CHECK(inv.dim() == 1 && inv.size(0) == nodes, op, "inv_sqrt_degree of shape [", nodes, "], got ", shape(inv));
  COLLM_CHECK(inv.scalar_type() == ScalarType::Float, op, "inv_sqrt_degree in float32, got ", dtype(inv));
  COLLM_CHECK(nodes <= INT32_MAX, op, "fewer than 2^31 nodes, got ", nodes);
  COLLM_CHECK(crow.is_contiguous() && col.is_contiguous() && inv.is_contiguous(), op,
              "contiguous crow, col and inv_sqrt_degree, got strided ones");
  check_device(op, crow, x, "crow");
  check_device(op, col, x, "col");
  check_device(op, inv, x, "inv_sqrt_degree");
}

inline bool is_served(ScalarType type, bool float64) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         (float64 && type == ScalarType::Double);
}

// x is grad in the backward op. float64 is served on the CPU alone, where it lets gradcheck reach this code.
inline void check_options(const char* op, const char* x_name, const Tensor& x, int64_t num_layers,
                          std::optional<ScalarType> storage, const std::optional<Tensor>& rows, double dropout_p,
                          const std::optional<Tensor>& seed, bool float64) {
  const ScalarType type = x.scalar_type();
  COLLM_CHECK(is_served(type, float64), op, x_name, " in float32, bfloat16, float16", float64 ? ", float64" : "",
              ", got ", dtype(x));
  COLLM_CHECK(num_layers >= 0, op, "num_layers >= 0, got ", num_layers);
  const bool wide = type == ScalarType::Double;
  COLLM_CHECK(!storage || (wide ? *storage == ScalarType::Double : is_served(*storage, false)), op,
              "storage_dtype None or ", wide ? "float64 where x is float64" : "one of float32, bfloat16, float16",
              ", got ", name(*storage));
  if (rows) {
    COLLM_CHECK(rows->dim() == 1, op, "rows of shape [B], got ", shape(*rows));
    COLLM_CHECK(rows->scalar_type() == ScalarType::Long, op, "rows in int64, got ", dtype(*rows));
    check_device(op, *rows, x, "rows");
  }
  COLLM_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p in [0, 1), got ", dropout_p);
  COLLM_CHECK(dropout_p == 0.0 || seed, op, "a seed where dropout_p > 0, got None");
  if (seed) {
    COLLM_CHECK(seed->scalar_type() == ScalarType::Long, op, "seed in int64, got ", dtype(*seed));
    COLLM_CHECK(seed->numel() == 1, op, "seed of one element, got ", shape(*seed));
    check_device(op, *seed, x, "seed");
  }
}

}  // namespace collm
