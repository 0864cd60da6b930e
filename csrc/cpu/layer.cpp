// lightgcn_layer on a CPU: one layer over a rectangular block of the graph, written where the caller wants it.
//
// The layer itself is propagate_layer.h, as in propagate.cpp, which runs all layers of a whole graph; so the sums have
// the same bits. collm_fast/distributed.py calls this op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <type_traits>

#include "../propagate.h"
#include "huge_pages.h"
#include "propagate_layer.h"
#include "propagate_loops.h"

namespace collm {
namespace {

constexpr const char* kOp = "lightgcn_layer";

void check_tensor(const char* what, const Tensor& tensor, std::initializer_list<int64_t> expected, const Tensor& x) {
  std::ostringstream rule;
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t d = 0;
  for (const int64_t size : expected) {
    rule << (d ? ", " : "") << size;
    same = same && tensor.size(d) == size;
    ++d;
  }
  COLLM_CHECK(same, kOp, what, " of shape [", rule.str(), "], got ", shape(tensor));
  COLLM_CHECK(tensor.is_contiguous(), kOp, what, " contiguous, got a strided one");
  check_device(kOp, tensor, x, what);
}

void check_type(const char* what, const Tensor& tensor, bool wide) {
  const ScalarType type = tensor.scalar_type();
  const bool served = wide ? type == ScalarType::Double : is_served(type, false);
  COLLM_CHECK(served, kOp, what, wide ? " in float64 where x is" : " in float32, bfloat16 or float16", ", got ",
              dtype(tensor));
}

void check(const Tensor& out, const std::optional<Tensor>& table, const Tensor& x, const Tensor& crow,
           const Tensor& col, const Tensor& inv, const std::optional<Tensor>& rows, const std::optional<Tensor>& slot) {
  COLLM_CHECK(x.dim() == 2, kOp, "x of shape [n, D], got ", shape(x));
  const int64_t n = x.size(0), D = x.size(1);
  const bool wide = x.scalar_type() == ScalarType::Double;
  COLLM_CHECK(is_served(x.scalar_type(), true), kOp, "x in float32, bfloat16, float16 or float64, got ", dtype(x));
  check_type("out", out, wide);
  if (table) {
    check_type("table", *table, wide);
    COLLM_CHECK(table->dim() == 2, kOp, "table of shape [M, D], got ", shape(*table));
    check_tensor("table", *table, {table->size(0), D}, x);
    COLLM_CHECK(table->size(0) <= INT32_MAX, kOp, "fewer than 2^31 rows of table, got ", table->size(0));
  }
  check_tensor("crow", crow, {n + 1}, x);
  COLLM_CHECK(crow.scalar_type() == ScalarType::Long, kOp, "crow in int64, got ", dtype(crow));
  check_tensor("col", col, {col.numel()}, x);
  COLLM_CHECK(col.scalar_type() == ScalarType::Int, kOp, "col in int32, got ", dtype(col));
  check_tensor("inv_sqrt_degree", inv, {n}, x);
  COLLM_CHECK(inv.scalar_type() == ScalarType::Float, kOp, "inv_sqrt_degree in float32, got ", dtype(inv));
  int64_t count = n;
  if (rows) {
    count = rows->numel();
    check_tensor("rows", *rows, {count}, x);
    COLLM_CHECK(rows->scalar_type() == ScalarType::Long, kOp, "rows in int64, got ", dtype(*rows));
    const int64_t* row = static_cast<const int64_t*>(rows->data_ptr());
    for (int64_t p = 0; p < count; ++p) {
      COLLM_CHECK(row[p] >= 0 && row[p] < n, kOp, "rows in [0, ", n, "), got ", row[p], " at position ", p);
    }
  }
  if (slot) {
    COLLM_CHECK(table, kOp, "a table where there are slots, got None");
    check_tensor("slot", *slot, {slot->numel()}, x);
    COLLM_CHECK(slot->scalar_type() == ScalarType::Int, kOp, "slot in int32, got ", dtype(*slot));
    COLLM_CHECK(slot->numel() <= INT32_MAX, kOp, "fewer than 2^31 slots, got ", slot->numel());
    const int32_t* values = static_cast<const int32_t*>(slot->data_ptr());
    const int64_t end = table->size(0);
    for (int64_t p = 0; p < slot->numel(); ++p) {
      COLLM_CHECK(values[p] >= -1 && values[p] < end, kOp, "slot in [-1, ", end, "), got ", values[p], " at position ",
                  p);
    }
  }
  check_tensor("out", out, {count, D}, x);
  const int64_t* start = static_cast<const int64_t*>(crow.data_ptr());
  bool rises = start[0] == 0 && start[n] == col.numel();
  for (int64_t i = 0; i < n; ++i) {
    rises &= start[i] <= start[i + 1];
  }
  COLLM_CHECK(rises, kOp, "crow to rise from 0 to nnz (", col.numel(), "), got ", start[0], " .. ", start[n]);
}

// The table's type decides how it is read; without a table there is nothing to read. A table without rows is one.
template <typename S>
void run(const Graph& graph, bool has_table, const int64_t* rows, int64_t count, const int32_t* slot,
         LayerCall<std::conditional_t<std::is_same_v<S, double>, double, float>> call) {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  if (has_table) {
    const Plan plan = make_plan(graph, rows, count);
    Layer<S, A> layer{kernel<S, A>(), graph, plan, call, slot, kOp};
    layer.run();
    return;
  }
  scale_rows<S, A>(rows, count, call);
}

void layer(const Tensor& out, std::optional<Tensor> table, const Tensor& x, const Tensor& crow, const Tensor& col,
           const Tensor& inv, std::optional<double> mean, std::optional<Tensor> rows, std::optional<Tensor> slot) {
  check(out, table, x, crow, col, inv, rows, slot);
  const int64_t D = x.size(1), count = out.size(0);
  if (count == 0 || D == 0) {
    return;
  }
  advise_huge_pages(out.data_ptr(), count * D * element_bytes(out.scalar_type()));
  const int64_t* begin = static_cast<const int64_t*>(crow.data_ptr());
  // `nodes` bounds the columns, and these are rows of the table, or slots.
  const Graph graph{begin,
                    begin + 1,
                    static_cast<const int32_t*>(col.data_ptr()),
                    static_cast<const float*>(inv.data_ptr()),
                    slot    ? slot->numel()
                    : table ? table->size(0)
                            : 0,
                    col.numel()};
  dispatch(table                                   ? table->scalar_type()
           : x.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                   : ScalarType::Float,
           [&](auto tag) {
             using S = decltype(tag);
             using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
             const Source<A> from{x.data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1)}};
             run<S>(graph, table.has_value(), rows ? static_cast<const int64_t*>(rows->data_ptr()) : nullptr, count,
                    slot ? static_cast<const int32_t*>(slot->data_ptr()) : nullptr,
                    {table ? table->data_ptr() : nullptr, D, graph.inv, from, out.data_ptr(), out.scalar_type(), !mean,
                     A(mean.value_or(1.0)), A(1), 0});
           });
}

}  // namespace
}  // namespace collm

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) { m.impl("lightgcn_layer", TORCH_BOX(&collm::layer)); }
