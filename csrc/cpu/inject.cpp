// embed_inject, gather_rows and scatter_rows on the CPU: the registered kernels, and how their loops are called.
//
// The loops are in inject_kernel.h, argument checks in ../inject.h, the schema and the autograd formulas in
// collm_fast/ops/inject.py, the GPU's twin in ../cuda/inject.cu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../inject.h"
#include "huge_pages.h"
#include "inject_loops.h"

namespace collm::inject {
namespace {

constexpr int64_t kBytesPerTask = 1 << 16;  // less is not worth waking a thread for
constexpr int64_t kRowsAtOnce = 128;        // whose addresses are found before they are copied

// An output of this size may be new memory, where the page faults cost more than the copy.
constexpr int64_t kMaybeNew = int64_t{4} << 20;
// From here on an output is stored past the caches. Below, whoever reads it next loses more than the copy gains: on a
// Xeon with 2 MB of L2, copy and one reading of it take 0.93 ms instead of 0.86 for 6 MB, but 2.7 instead of 3.3
// for 16.
constexpr int64_t kStreamed = int64_t{8} << 20;

int64_t grain(int64_t bytes_per_row) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_row));
}

// --- checks of values: all of them before the first byte is written ----------------------------------------------
bool all_inside(const int32_t* index, int64_t count, int64_t low, int64_t high) {
  return loops().inside32(index, count, low, high);
}

bool all_inside(const int64_t* index, int64_t count, int64_t low, int64_t high) {
  return loops().inside64(index, count, low, high);
}

template <typename Index>
void check_values(const char* op, const char* what, const Index* index, int64_t count, int64_t low, int64_t high) {
  if (!all_inside(index, count, low, high)) {
    for (int64_t i = 0; i < count; ++i) {
      COLLM_CHECK(index[i] >= low && index[i] < high, op, what, " in [", low, ", ", high, "), got ", index[i]);
    }
  }
}

// An injected place's token id is a placeholder: it may be anything.
void check_tokens(const int64_t* ids, const int32_t* row_index, int64_t count, int64_t vocabulary) {
  if (!loops().tokens_inside(ids, row_index, count, vocabulary)) {
    for (int64_t i = 0; i < count; ++i) {
      COLLM_CHECK(row_index[i] >= 0 || (ids[i] >= 0 && ids[i] < vocabulary), "embed_inject", "token_ids in [0, ",
                  vocabulary, "), got ", ids[i]);
    }
  }
}

// --- copies ------------------------------------------------------------------------------------------------------
template <typename Unit>
void copy_columns(char* out, const char* from, int64_t columns, int64_t stride) {
  auto* to = reinterpret_cast<Unit*>(out);
  const auto* src = reinterpret_cast<const Unit*>(from);
  for (int64_t h = 0; h < columns; ++h) {
    to[h] = src[h * stride];
  }
}

// A row whose neighbouring columns are `stride` elements apart; null: zeros.
void copy_strided(char* out, const char* from, int64_t columns, int64_t stride, int64_t element) {
  if (from == nullptr) {
    std::memset(out, 0, static_cast<size_t>(columns * element));
  } else if (element == 8) {
    copy_columns<uint64_t>(out, from, columns, stride);
  } else if (element == 4) {
    copy_columns<uint32_t>(out, from, columns, stride);
  } else {
    copy_columns<uint16_t>(out, from, columns, stride);
  }
}

// Makes large new memory cheap to write. Returns whether to store past the caches: not where the pages are new, as the
// system zeroes them and so brings them in.
bool prepare(void* out, int64_t bytes) {
  if (bytes < kMaybeNew) {
    return false;
  }
  if (!is_resident(static_cast<char*>(out) + bytes / 2)) {
    advise_huge_pages(out, bytes);
    return false;
  }
  return bytes >= kStreamed;
}

Source source(const Tensor& table) {
  return {static_cast<const char*>(table.const_data_ptr()), {1, table.stride(0), 0, table.stride(1)}};
}

// out[i] is the row that find(i) gives: its address, and how far apart its columns are.
struct Row {
  const char* from;
  int64_t stride;
};

template <typename Find>
void copy(Tensor& out, int64_t places, int64_t columns, bool packed, const Find& find) {
  const int64_t element = static_cast<int64_t>(out.element_size()), bytes = columns * element;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const bool aligned = (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 64 == 0;
  const bool stream = prepare(to, places * bytes) && aligned;
  torch::stable::parallel_for(0, places, grain(bytes), [&](int64_t begin, int64_t end) {
    if (!packed) {
      for (int64_t i = begin; i < end; ++i) {
        const Row row = find(i);
        copy_strided(to + i * bytes, row.from, columns, row.stride, element);
      }
      return;
    }
    const char* from[kRowsAtOnce];
    for (; begin < end; begin += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, end - begin);
      for (int64_t i = 0; i < count; ++i) {
        from[i] = find(begin + i).from;
      }
      loops().copy_rows(from, to + begin * bytes, count, bytes, stream);
    }
  });
}

Tensor embed_inject(const Tensor& token_ids, const Tensor& table, const Tensor& rows, const Tensor& row_index) {
  check_embed_inject(token_ids, table, rows, row_index);
  const Tensor ids_tensor = packed(token_ids);
  const Tensor index_tensor = packed(row_index);
  const auto* ids = ids_tensor.const_data_ptr<int64_t>();
  const auto* index = index_tensor.const_data_ptr<int32_t>();
  const int64_t places = token_ids.numel(), columns = table.size(1);
  check_values("embed_inject", "row_index", index, places, -1, rows.size(0));
  check_tokens(ids, index, places, table.size(0));
  Tensor out = torch::stable::new_empty(table, shape_of_rows(token_ids, columns));
  if (out.numel() == 0) {
    return out;
  }
  const int64_t element = static_cast<int64_t>(table.element_size());
  const Source text = source(table), injected = source(rows);
  copy(out, places, columns, text.strides.column == 1 && injected.strides.column == 1, [=](int64_t i) -> Row {
    return index[i] >= 0 ? Row{injected.row(index[i], element), injected.strides.column}
                         : Row{text.row(ids[i], element), text.strides.column};
  });
  return out;
}

template <typename Index>
Tensor gather(const Tensor& table, const Index* index, int64_t places, const std::vector<int64_t>& shape) {
  check_values("gather_rows", "index", index, places, -1, table.size(0));
  Tensor out = torch::stable::new_empty(table, shape);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t element = static_cast<int64_t>(table.element_size());
  const Source from = source(table);
  copy(out, places, table.size(1), from.strides.column == 1,
       [=](int64_t i) -> Row { return {index[i] >= 0 ? from.row(index[i], element) : nullptr, from.strides.column}; });
  return out;
}

Tensor gather_rows(const Tensor& table, const Tensor& index) {
  check_gather_rows(table, index);
  const Tensor dense = packed(index);
  const std::vector<int64_t> shape = shape_of_rows(index, table.size(1));
  return index.scalar_type() == ScalarType::Int ? gather(table, dense.const_data_ptr<int32_t>(), index.numel(), shape)
                                                : gather(table, dense.const_data_ptr<int64_t>(), index.numel(), shape);
}

// --- sums --------------------------------------------------------------------------------------------------------
// The places of every output row, as in Sums. A counting sort: stable, so a row's places keep their order.
struct Segments {
  std::vector<int64_t> begin, places;
};

template <typename Index>
Segments segments(const Index* index, int64_t count, int64_t num_rows) {
  check_values("scatter_rows", "index", index, count, -1, num_rows);
  // Counted two further on and filled one further on: what is left at the end is where each row begins.
  Segments result{std::vector<int64_t>(static_cast<size_t>(num_rows) + 2, 0), {}};
  int64_t* begin = result.begin.data();
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= 0) {
      ++begin[index[i] + 2];
    }
  }
  for (int64_t s = 0; s < num_rows; ++s) {
    begin[s + 2] += begin[s + 1];
  }
  result.places.resize(static_cast<size_t>(begin[num_rows + 1]));
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= 0) {
      result.places[static_cast<size_t>(begin[index[i] + 1]++)] = i;
    }
  }
  return result;
}

// One row is summed by one thread, in the order of its places: the bits depend on nothing else.
template <typename S>
void scatter(const Segments& where, const Source& grad, Tensor& out,
             void (*sum_rows)(const Sums<S>&, int64_t, int64_t)) {
  const int64_t num_rows = out.size(0), columns = out.size(1);
  const Sums<S> sums{where.begin.data(), where.places.data(), grad, static_cast<S*>(out.mutable_data_ptr()), columns};
  (void)prepare(sums.out, num_rows * columns * static_cast<int64_t>(sizeof(S)));
  torch::stable::parallel_for(0, num_rows, grain(columns * static_cast<int64_t>(sizeof(S))),
                              [&](int64_t first, int64_t last) { sum_rows(sums, first, last); });
}

Tensor scatter_rows(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  check_scatter_rows(grad, index, num_rows);
  const Tensor dense = packed(index);
  const int64_t places = index.numel(), columns = grad.size(grad.dim() - 1);
  const Segments where = index.scalar_type() == ScalarType::Int
                             ? segments(dense.const_data_ptr<int32_t>(), places, num_rows)
                             : segments(dense.const_data_ptr<int64_t>(), places, num_rows);
  const auto [readable, strides] = strided_rows(grad);
  Tensor out = torch::stable::new_empty(grad, std::vector<int64_t>{num_rows, columns});
  if (out.numel() == 0) {
    return out;
  }
  const Source from{static_cast<const char*>(readable.const_data_ptr()), strides};
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      scatter(where, from, out, loops().sum_double);
      break;
    case ScalarType::Half:
      scatter(where, from, out, loops().sum_half);
      break;
    case ScalarType::BFloat16:
      scatter(where, from, out, loops().sum_bfloat16);
      break;
    default:
      scatter(where, from, out, loops().sum_float);
  }
  return out;
}

}  // namespace
}  // namespace collm::inject

STABLE_TORCH_LIBRARY_IMPL(collm_fast, CPU, m) {
  m.impl("embed_inject", TORCH_BOX(&collm::inject::embed_inject));
  m.impl("gather_rows", TORCH_BOX(&collm::inject::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&collm::inject::scatter_rows));
}
