// Device code of embed_inject, gather_rows and scatter_rows: copies of rows, and sums of rows without atomics.
//
// No torch header: tests/cuda_on_cpu/inject_main.cpp runs these kernels on the host. Checks, launches and registration
// are in inject.cu. Indices are guarded here: one out of range is reported, read through by nobody, and gives zeros.
#pragma once

#include <cstdint>

#include "device_error.cuh"
#include "types.cuh"

namespace collm::inject_cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kCopyThreads = 256;
constexpr int kCopyWarps = kCopyThreads / kWarp;  // one place each
constexpr int kUnits = 4;                         // loads in flight in a lane
constexpr int kSumThreads = 128;
constexpr int kRun = 64;  // as in cpu/inject.cpp: the runs of a sum are the same, and so are its bits

// Where rows lie, in bytes: row i begins at base + i * row, its next unit `step` further.
struct Table {
  const char* base;
  int64_t row, step, count;
};

struct Copy {
  const int64_t* token_ids;
  const int32_t* row_index;
  const void* index;  // gather_rows: int32 or int64
  Table table, rows;
  char* out;
  int64_t places, units;  // units in a row
  ErrorRecord* bad_token;
  ErrorRecord* bad_row;
};

struct alignas(16) Bytes16 {
  uint64_t part[2];
};

// The largest of 16, 8, 4 and 2 bytes that divides everything a copy touches.
inline int unit_bytes(int64_t pieces) { return pieces % 16 == 0 ? 16 : pieces % 8 == 0 ? 8 : pieces % 4 == 0 ? 4 : 2; }

// One warp copies kUnits * kWarp units of one row; `from` is null for a row of zeros.
template <typename Unit>
__device__ __forceinline__ void copy_units(const char* from, int64_t step, char* out, int64_t units) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * (kUnits * kWarp) + threadIdx.x % kWarp;
  Unit value[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int64_t u = first + i * kWarp;
    value[i] = from != nullptr && u < units ? *reinterpret_cast<const Unit*>(from + u * step) : Unit{};
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int64_t u = first + i * kWarp;
    if (u < units) {
      reinterpret_cast<Unit*>(out)[u] = value[i];
    }
  }
}

__device__ __forceinline__ int64_t place_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kCopyWarps + threadIdx.x / kWarp;
}

// The first lane of a row's first block reports, so that a bad index is written once.
__device__ __forceinline__ bool reports() { return blockIdx.y == 0 && threadIdx.x % kWarp == 0; }

template <typename Unit>
__global__ void __launch_bounds__(kCopyThreads) embed_inject_kernel(Copy copy) {
  const int64_t place = place_of_warp();
  if (place >= copy.places) {
    return;
  }
  const int64_t row = copy.row_index[place];
  const bool injected = row != -1;
  // An injected place's token id is a placeholder: it is not looked at.
  const int64_t index = injected ? row : copy.token_ids[place];
  const int64_t count = injected ? copy.rows.count : copy.table.count;
  const bool good = static_cast<uint64_t>(index) < static_cast<uint64_t>(count);
  if (!good && reports()) {
    report(injected ? copy.bad_row : copy.bad_token, index, count);
  }
  // Field by field: a chosen reference would copy the parameters to the stack.
  const char* base = injected ? copy.rows.base : copy.table.base;
  const int64_t stride = injected ? copy.rows.row : copy.table.row;
  const int64_t step = injected ? copy.rows.step : copy.table.step;
  char* out = copy.out + place * copy.units * static_cast<int64_t>(sizeof(Unit));
  copy_units<Unit>(good ? base + index * stride : nullptr, step, out, copy.units);
}

template <typename Unit, typename Index>
__global__ void __launch_bounds__(kCopyThreads) gather_rows_kernel(Copy copy) {
  const int64_t place = place_of_warp();
  if (place >= copy.places) {
    return;
  }
  const int64_t index = static_cast<const Index*>(copy.index)[place];
  const bool good = static_cast<uint64_t>(index) < static_cast<uint64_t>(copy.table.count);
  if (!good && index != -1 && reports()) {
    report(copy.bad_row, index, copy.table.count);
  }
  const char* from = good ? copy.table.base + index * copy.table.row : nullptr;
  char* out = copy.out + place * copy.units * static_cast<int64_t>(sizeof(Unit));
  copy_units<Unit>(from, copy.table.step, out, copy.units);
}

struct Sum {
  const void* grad;  // row i begins at (i / split) * outer + i % split * inner elements; columns are `column` apart
  int64_t split, outer, inner, column;
  const void* index;     // int32 or int64; sorted for scatter_sorted_kernel
  const int64_t* order;  // scatter_sorted_kernel: the place of each sorted index
  int64_t places, num_rows, columns;
  bool vector;  // a thread's columns may be read as one 16-byte unit
  void* out;
  ErrorRecord* bad;
};

template <typename Value>
struct Accumulate {
  using Type = float;
  static __device__ __forceinline__ float load(Value value) { return widen(value); }
  static __device__ __forceinline__ Value store(float value) { return narrow<Value>(value); }
};
template <>
struct Accumulate<double> {
  using Type = double;
  static __device__ __forceinline__ double load(double value) { return value; }
  static __device__ __forceinline__ double store(double value) { return value; }
};

// A thread's columns of one output row: kWidth neighbours where 16-byte reads are allowed, else kWidth columns a block
// apart, so that a warp reads neighbours either way.
template <typename Value>
struct Columns {
  using Number = typename Accumulate<Value>::Type;
  static constexpr int kWidth = 16 / sizeof(Value);
  struct alignas(16) Pack {
    Value value[kWidth];
  };

  Number total[kWidth] = {}, run[kWidth] = {};
  int in_run = 0;
  int64_t first;
  int spread;

  __device__ __forceinline__ explicit Columns(const Sum& sum) {
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * kSumThreads * kWidth;
    first = tile + static_cast<int64_t>(threadIdx.x) * (sum.vector ? kWidth : 1);
    spread = sum.vector ? 1 : kSumThreads;
  }

  __device__ __forceinline__ void end_run() {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      total[i] += run[i];
      run[i] = Number(0);
    }
    in_run = 0;
  }

  __device__ __forceinline__ void add(const Sum& sum, int64_t place) {
    const int64_t offset =
        sum.split == 1 ? place * sum.outer : place / sum.split * sum.outer + place % sum.split * sum.inner;
    const Value* row = static_cast<const Value*>(sum.grad) + offset;
    if (in_run == kRun) {
      end_run();
    }
    ++in_run;
    if (sum.vector) {
      if (first < sum.columns) {
        const Pack pack = *reinterpret_cast<const Pack*>(row + first);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          run[i] += Accumulate<Value>::load(pack.value[i]);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t column = first + i * spread;
      if (column < sum.columns) {
        run[i] += Accumulate<Value>::load(row[column * sum.column]);
      }
    }
  }

  __device__ __forceinline__ void store(const Sum& sum, int64_t row) {
    end_run();
    Value* out = static_cast<Value*>(sum.out) + row * sum.columns;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t column = first + i * spread;
      if (column < sum.columns) {
        out[column] = Accumulate<Value>::store(total[i]);
      }
    }
  }
};

// Few output rows: every block looks at all indices and adds the places of its row in their order. One launch, no sort.
template <typename Value, typename Index>
__global__ void __launch_bounds__(kSumThreads) scatter_scan_kernel(Sum sum) {
  __shared__ unsigned matches[kSumThreads / kWarp];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Columns<Value> columns(sum);
  for (int64_t base = 0; base < sum.places; base += kSumThreads) {
    const int64_t place = base + threadIdx.x;
    const int64_t index = place < sum.places ? static_cast<int64_t>(static_cast<const Index*>(sum.index)[place]) : -1;
    if (row == 0 && blockIdx.y == 0 && (index < -1 || index >= sum.num_rows)) {
      report(sum.bad, index, sum.num_rows);
    }
    const unsigned word = __ballot_sync(kFullWarp, index == row && row < sum.num_rows);
    if (lane == 0) {
      matches[warp] = word;
    }
    __syncthreads();
    for (int w = 0; w < kSumThreads / kWarp; ++w) {
      for (unsigned bits = matches[w]; bits != 0; bits &= bits - 1) {
        columns.add(sum, base + w * kWarp + __ffs(static_cast<int>(bits)) - 1);
      }
    }
    __syncthreads();
  }
  if (row < sum.num_rows) {
    columns.store(sum, row);
  }
}

// The first position in the sorted index whose value is at least `value`.
template <typename Index>
__device__ __forceinline__ int64_t lower_bound(const Index* index, int64_t count, int64_t value) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (static_cast<int64_t>(index[middle]) < value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Many output rows: the index was sorted (stably, so the order of a row's places is kept).
template <typename Value, typename Index>
__global__ void __launch_bounds__(kSumThreads) scatter_sorted_kernel(Sum sum) {
  const int64_t row = blockIdx.x;
  const Index* index = static_cast<const Index*>(sum.index);
  if (row == 0 && blockIdx.y == 0 && threadIdx.x == 0 && sum.places > 0) {
    const int64_t lowest = index[0], highest = index[sum.places - 1];
    if (lowest < -1 || highest >= sum.num_rows) {
      report(sum.bad, lowest < -1 ? lowest : highest, sum.num_rows);
    }
  }
  Columns<Value> columns(sum);
  const int64_t last = lower_bound(index, sum.places, row + 1);
  for (int64_t k = lower_bound(index, last, row); k < last; ++k) {
    columns.add(sum, sum.order[k]);
  }
  columns.store(sum, row);
}

}  // namespace collm::inject_cuda
