// embed_inject, gather_rows and scatter_rows on the CPU: the registered kernels with their loops.
//
// Argument checks are in ../inject.h, the schema and the autograd formulas in collm_fast/ops/inject.py, the GPU's twin
// in ../cuda/inject.cu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../inject.h"

// The same loop for three instruction sets, chosen by the loader. Sums of separate columns vectorise without changing
// their order, so every machine gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define COLLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define COLLM_CLONES
#endif

namespace collm::inject {
namespace {

// scatter_rows sums the places of a row in runs of this many, and then the runs; the GPU's kernels do the same.
constexpr int64_t kRun = 64;

constexpr int64_t kBytesPerTask = 1 << 16;  // less is not worth waking a thread for

int64_t grain(int64_t bytes_per_row) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_row));
}

template <typename Index>
void check_values(const char* op, const char* what, const Index* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    COLLM_CHECK(index[i] >= low && index[i] < high, op, what, " in [", low, ", ", high, "), got ", index[i]);
  }
}

struct Source {
  const char* base;
  Strides strides;

  const char* row(int64_t i, int64_t element) const {
    const int64_t outer = i / strides.split, inner = i % strides.split;
    return base + (outer * strides.outer + inner * strides.inner) * element;
  }
};

Source source(const Tensor& tensor, const Strides& strides) {
  return {static_cast<const char*>(tensor.const_data_ptr()), strides};
}

template <typename Unit>
void copy_columns(char* out, const char* from, int64_t columns, int64_t stride) {
  auto* to = reinterpret_cast<Unit*>(out);
  const auto* src = reinterpret_cast<const Unit*>(from);
  for (int64_t h = 0; h < columns; ++h) {
    to[h] = src[h * stride];
  }
}

void copy_row(char* out, const char* from, int64_t columns, int64_t stride, int64_t element) {
  if (stride == 1) {
    std::memcpy(out, from, static_cast<size_t>(columns * element));
  } else if (element == 8) {
    copy_columns<uint64_t>(out, from, columns, stride);
  } else if (element == 4) {
    copy_columns<uint32_t>(out, from, columns, stride);
  } else {
    copy_columns<uint16_t>(out, from, columns, stride);
  }
}

Tensor embed_inject(const Tensor& token_ids, const Tensor& table, const Tensor& rows, const Tensor& row_index) {
  check_embed_inject(token_ids, table, rows, row_index);
  const Tensor ids_tensor = packed(token_ids);
  const Tensor index_tensor = packed(row_index);
  const auto* ids = ids_tensor.const_data_ptr<int64_t>();
  const auto* index = index_tensor.const_data_ptr<int32_t>();
  const int64_t places = token_ids.numel(), columns = table.size(1), vocabulary = table.size(0);
  check_values("embed_inject", "row_index", index, places, -1, rows.size(0));
  for (int64_t i = 0; i < places; ++i) {
    // An injected place's token id is a placeholder: it may be anything.
    COLLM_CHECK(index[i] >= 0 || (ids[i] >= 0 && ids[i] < vocabulary), "embed_inject", "token_ids in [0, ", vocabulary,
                "), got ", ids[i]);
  }
  const auto sizes = shape_of_rows(token_ids, columns);
  Tensor out = torch::stable::new_empty(table, sizes);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t element = static_cast<int64_t>(table.element_size());
  const Source text = source(table, {1, table.stride(0), 0, table.stride(1)});
  const Source injected = source(rows, {1, rows.stride(0), 0, rows.stride(1)});
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, places, grain(columns * element), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Source& from = index[i] >= 0 ? injected : text;
      const char* row = from.row(index[i] >= 0 ? index[i] : ids[i], element);
      copy_row(to + i * columns * element, row, columns, from.strides.column, element);
    }
  });
  return out;
}

template <typename Index>
void gather(const Source& table, const Index* index, char* out, int64_t places, int64_t columns, int64_t element) {
  const int64_t bytes = columns * element;
  torch::stable::parallel_for(0, places, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] < 0) {
        std::memset(out + i * bytes, 0, static_cast<size_t>(bytes));
      } else {
        copy_row(out + i * bytes, table.row(index[i], element), columns, table.strides.column, element);
      }
    }
  });
}

Tensor gather_rows(const Tensor& table, const Tensor& index) {
  check_gather_rows(table, index);
  const Tensor dense = packed(index);
  const int64_t places = index.numel(), columns = table.size(1);
  Tensor out = THO_DISPATCH_V2(index.scalar_type(), "gather_rows", AT_WRAP([&]() -> Tensor {
                                 const auto* values = dense.const_data_ptr<scalar_t>();
                                 check_values("gather_rows", "index", values, places, -1, table.size(0));
                                 Tensor result = torch::stable::new_empty(table, shape_of_rows(index, columns));
                                 if (result.numel() == 0) {
                                   return result;
                                 }
                                 const Source from = source(table, {1, table.stride(0), 0, table.stride(1)});
                                 auto* to = static_cast<char*>(result.mutable_data_ptr());
                                 gather(from, values, to, places, columns, static_cast<int64_t>(table.element_size()));
                                 return result;
                               }),
                               ScalarType::Int, ScalarType::Long);
  return out;
}

COLLM_CLONES void add_row(double* sum, const double* row, int64_t columns) {
  for (int64_t h = 0; h < columns; ++h) {
    sum[h] += row[h];
  }
}

COLLM_CLONES void add_row(float* sum, const float* row, int64_t columns) {
  for (int64_t h = 0; h < columns; ++h) {
    sum[h] += row[h];
  }
}

COLLM_CLONES void add_row(float* sum, const torch::headeronly::BFloat16* row, int64_t columns) {
  for (int64_t h = 0; h < columns; ++h) {
    // By bits: the loop vectorises, and a bfloat16 is the upper half of a float32.
    const uint32_t bits = static_cast<uint32_t>(row[h].x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    sum[h] += value;
  }
}

COLLM_CLONES void add_row(float* sum, const torch::headeronly::Half* row, int64_t columns) {
  for (int64_t h = 0; h < columns; ++h) {
    sum[h] += static_cast<float>(row[h]);
  }
}

// The places of every output row, in order: places[begin[s]] .. places[begin[s + 1] - 1]. A counting sort.
struct Segments {
  std::vector<int64_t> begin, places;
};

template <typename Index>
Segments segments(const Index* index, int64_t count, int64_t num_rows) {
  Segments result{std::vector<int64_t>(static_cast<size_t>(num_rows) + 1, 0), {}};
  auto& begin = result.begin;
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= 0) {
      ++begin[static_cast<size_t>(index[i]) + 1];
    }
  }
  for (size_t s = 0; s < static_cast<size_t>(num_rows); ++s) {
    begin[s + 1] += begin[s];
  }
  result.places.resize(static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= 0) {
      result.places[static_cast<size_t>(next[static_cast<size_t>(index[i])]++)] = i;
    }
  }
  return result;
}

template <typename Value>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};

// One row is summed by one thread in the order of its places, in runs of kRun: the bits depend on nothing else, and the
// error of a hub's sum grows with the number of runs.
template <typename Value>
void scatter(const Segments& where, const Source& grad, Value* out, int64_t num_rows, int64_t columns) {
  using Sum = typename SumOf<Value>::Type;
  constexpr int64_t element = sizeof(Value);
  torch::stable::parallel_for(0, num_rows, grain(columns * element), [&](int64_t begin, int64_t end) {
    std::vector<Sum> total(static_cast<size_t>(columns)), run(static_cast<size_t>(columns));
    std::vector<Value> packed(grad.strides.column == 1 ? 0 : static_cast<size_t>(columns));
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = where.begin[static_cast<size_t>(s)], last = where.begin[static_cast<size_t>(s) + 1];
      Value* to = out + s * columns;
      if (first == last) {
        std::fill(to, to + columns, Value(0));
        continue;
      }
      const bool one_run = last - first <= kRun;
      if (!one_run) {
        std::fill(total.begin(), total.end(), Sum(0));
      }
      for (int64_t k = first; k < last; ++k) {
        if ((k - first) % kRun == 0) {
          std::fill(run.begin(), run.end(), Sum(0));
        }
        const auto* row = reinterpret_cast<const Value*>(grad.row(where.places[static_cast<size_t>(k)], element));
        if (grad.strides.column != 1) {
          for (int64_t h = 0; h < columns; ++h) {
            packed[static_cast<size_t>(h)] = row[h * grad.strides.column];
          }
          row = packed.data();
        }
        add_row(run.data(), row, columns);
        if (!one_run && ((k - first) % kRun == kRun - 1 || k == last - 1)) {
          add_row(total.data(), run.data(), columns);
        }
      }
      const Sum* sum = one_run ? run.data() : total.data();
      for (int64_t h = 0; h < columns; ++h) {
        to[h] = static_cast<Value>(sum[h]);
      }
    }
  });
}

Tensor scatter_rows(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  check_scatter_rows(grad, index, num_rows);
  const Tensor dense = packed(index);
  const int64_t places = index.numel(), columns = grad.size(grad.dim() - 1);
  const Segments where = THO_DISPATCH_V2(index.scalar_type(), "scatter_rows", AT_WRAP([&]() -> Segments {
                                           const auto* values = dense.const_data_ptr<scalar_t>();
                                           check_values("scatter_rows", "index", values, places, -1, num_rows);
                                           return segments(values, places, num_rows);
                                         }),
                                         ScalarType::Int, ScalarType::Long);
  const auto [readable, strides] = strided_rows(grad);
  Tensor out = torch::stable::new_empty(grad, std::vector<int64_t>{num_rows, columns});
  if (out.numel() == 0) {
    return out;
  }
  const Source from = source(readable, strides);
  THO_DISPATCH_V2(grad.scalar_type(), "scatter_rows", AT_WRAP([&]() {
                    scatter<scalar_t>(where, from, out.mutable_data_ptr<scalar_t>(), num_rows, columns);
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace
}  // namespace collm::inject

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("embed_inject", TORCH_BOX(&collm::inject::embed_inject));
  m.impl("gather_rows", TORCH_BOX(&collm::inject::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&collm::inject::scatter_rows));
}
