// lightgcn_propagate on a GPU: the kernels. No torch header; propagate_plan.h lays them out, propagate.cu checks and
// launches, and tests/cuda_on_cpu/propagate_main.cpp runs the same kernels on the host.
//
// As on the CPU, h_k = x + S A S h_{k-1} needs no buffer for the layer mean: a layer gathers rows of g = S h, writes
// the next g, and the last one writes the result. Gathering is all that costs, so everything serves it: 16-byte loads,
// kInFlight of them a lane on their way, several edges of a row at once, and equal work for every warp.
//
// Work: row r starts at crow[r] + kRowCost r, and a warp takes what starts in a window of that line: whole rows, and
// pieces of hubs. Whoever finishes a hub's last piece adds the pieces up in their order. The only atomics count those
// arrivals; each sum has one order, so bits repeat, whatever the grid.
//
// Layer 0, g = S x, is a pass of its own. Scaling while gathering would save it (8 N D bytes) but read a 32-byte
// sector of inv_sqrt_degree for each edge: more from an average degree of D / 4 on, and twice the bytes where the
// table is bfloat16.
#pragma once

#include "../philox.h"
#include "device_error.cuh"
#include "propagate_columns.cuh"
#include "propagate_plan.h"

#if !defined(COLLM_FAST_EMULATED)
#include <cooperative_groups.h>
#endif

namespace collm::propagate_cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 3;  // a multiprocessor: 80 registers a thread
constexpr int kGroup = 64;  // pieces that are added up at a time: a hub of 3 million edges has 23,000 of 128
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Layer {
  const int64_t* crow;
  const int32_t* col;
  const float* inv_sqrt_degree;
  int64_t nodes, nnz, D;
  uint32_t row_bytes;  // of the table
  int tiles;
  Schedule schedule;
  int32_t* first;       // [windows + 1], the first row that starts in a window
  float* partial;       // [slots, D], the sums of pieces
  int32_t* arrived;     // [tiles, slots], zero between layers
  uint8_t* requested;   // [N], whether `rows` names the node
  const int64_t* rows;  // position -> node at this stride; null: position = node
  int64_t rows_stride, count;
  const int32_t* slot;  // if given, the table has rows of these slots only: the first layer of a sparse backward
  Source x;
  float mean;           // 1 / (K + 1)
  float keep;           // 1 / (1 - p): the factor of an edge that dropout kept
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  ErrorRecord *bad_row, *bad_crow, *bad_col;
};

// Consecutive layers of a call: the first reads the even table and writes the odd one, and so on. They are no array:
// the compiler would lose sight of the address space.
struct Program {
  Layer layer;
  void *even, *odd;
  void* result;
  Type storage, result_type;
  bool is_result;  // or another table: the first layer of a sparse backward
  int64_t layers;
  int64_t begin, end;  // the steps of this launch
};

// rows: the hubs among them first, piece by piece and each once; then a warp a position.
enum class Pass { all, hubs, rows };

struct Step {
  Pass pass;
  const void* table;
  void* out;
  Type out_type;
  bool is_result;
};

__device__ __forceinline__ Step step_of(const Program& p, int64_t i) {
  const bool by_rows = p.layer.rows != nullptr;
  if (i + 1 < p.layers) {
    return {Pass::all, i % 2 == 0 ? p.even : p.odd, i % 2 == 0 ? p.odd : p.even, p.storage, false};
  }
  const Pass pass = !by_rows ? Pass::all : i + 1 == p.layers ? Pass::hubs : Pass::rows;
  return {pass, p.layers % 2 == 1 ? p.even : p.odd, p.result, p.result_type, p.is_result};
}

__device__ __forceinline__ void grid_barrier() {
#if defined(COLLM_FAST_EMULATED)
  emulator::grid_barrier();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// Which pointer a step takes hides its address space from the compiler, and a generic load costs more.
template <typename T>
__device__ __forceinline__ T* in_global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// One instruction: left to itself the compiler adds the column last, in four more, for each edge.
__device__ __forceinline__ const char* at_row(const char* column, uint32_t row, uint32_t row_bytes) {
#if defined(__CUDA_ARCH__)
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(row_bytes), "l"(__cvta_generic_to_global(column)));
  return static_cast<const char*>(__cvta_global_to_generic(address));
#else
  return column + static_cast<uint64_t>(row) * row_bytes;
#endif
}

// --- sums -------------------------------------------------------------------------------------------------------
// The table's row of an edge to c, or -1 where it is dropped, has no row, or names no node.
__device__ __forceinline__ int32_t table_row(const Layer& a, int node, int32_t c) {
  if (!in_range(c, a.nodes, a.bad_col)) {
    return -1;
  }
  if (a.seed != nullptr) {
    const uint32_t from = static_cast<uint32_t>(node), to = static_cast<uint32_t>(c);
    if (!edge_keep(static_cast<uint64_t>(*a.seed), from < to ? from : to, from < to ? to : from, a.threshold)) {
      return -1;
    }
  }
  return a.slot == nullptr ? c : a.slot[c];
}

// Where the n-th set bit of a mask is; any position if there are fewer.
__device__ __forceinline__ int nth_bit(unsigned mask, int n) {
  int at = 0;
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    const int below = __popc((mask >> at) & ((1u << width) - 1));
    if (n >= below) {
      n -= below;
      at += width;
    }
  }
  return at;
}

// Adds loads x kEdges of a warp's `count` edges, from j on; lane i holds the table's row of edge i. `column` is the
// lane's first column in the table's first row.
template <class F, int loads>
__device__ __forceinline__ void gather(const char* column, uint32_t row_bytes, int32_t rows, int j, int count, int lane,
                                       const Lane<F>& l, Sums<F>& sum) {
  using Word = typename F::Word;
  Word words[loads][F::kVecs];
#pragma unroll
  for (int u = 0; u < loads; ++u) {
    const int edge = j + u * F::kEdges + lane / F::kLanes;
    const uint32_t row = static_cast<uint32_t>(__shfl_sync(kAllLanes, rows, edge));  // of lane edge % 32
    const char* from = at_row(column, row, row_bytes);
#pragma unroll
    for (int v = 0; v < F::kVecs; ++v) {
      const bool there = edge < count && l.active[v];
      words[u][v] = there ? *reinterpret_cast<const Word*>(from + v * F::kLanes * sizeof(Word)) : Word{};
    }
  }
#pragma unroll
  for (int u = 0; u < loads; ++u) {
#pragma unroll
    for (int v = 0; v < F::kVecs; ++v) {
      typename F::Element values[F::kVec];
      memcpy(values, &words[u][v], sizeof(Word));
#pragma unroll
      for (int i = 0; i < F::kVec; ++i) {
        sum[v][i] += widen(values[i]);
      }
    }
  }
}

// The groups of lanes hold sums of different edges; afterwards each holds the total.
template <class F>
__device__ __forceinline__ void combine(Sums<F>& sum) {
#pragma unroll
  for (int flip = F::kLanes; flip < 32; flip *= 2) {
#pragma unroll
    for (int v = 0; v < F::kVecs; ++v) {
#pragma unroll
      for (int i = 0; i < F::kVec; ++i) {
        sum[v][i] += __shfl_xor_sync(kAllLanes, sum[v][i], flip);
      }
    }
  }
}

// The sum of the table's rows over `edges` neighbours of a node.
template <class F>
__device__ __forceinline__ void sum_edges(const Layer& a, const void* table, int node, const int32_t* col, int edges,
                                          int lane, const Lane<F>& l, Sums<F>& sum) {
  constexpr int kMost = F::kLoads, kHalf = kMost / 2, kQuarter = kMost / 4;
  const char* column = static_cast<const char*>(table) + l.column[0] * sizeof(typename F::Element);
  clear<F>(sum);
  int32_t next = lane < edges ? __ldcs(col + lane) : 0;
  for (int first = lane; first - lane < edges; first += 32) {
    const int32_t c = next;
    next = first + 32 < edges ? __ldcs(col + first + 32) : 0;
    int32_t rows = first < edges ? table_row(a, node, c) : -1;
    const unsigned kept = __ballot_sync(kAllLanes, rows >= 0);
    const int count = __popc(kept);
    if ((kept & (kept + 1)) != 0) {
      // Dropped edges leave no holes, so that loads in flight stay many.
      rows = __shfl_sync(kAllLanes, rows, nth_bit(kept, lane));
    }
    // As many loads at a time as there are edges left for: a short row must not step through empty ones.
    for (int j = 0; j < count;) {
      if (count - j > F::kEdges * kHalf) {
        gather<F, kMost>(column, a.row_bytes, rows, j, count, lane, l, sum);
        j += F::kEdges * kMost;
      } else if (kQuarter == 0 || count - j > F::kEdges * kQuarter) {
        gather<F, kHalf>(column, a.row_bytes, rows, j, count, lane, l, sum);
        j += F::kEdges * kHalf;
      } else {
        gather<F, kQuarter == 0 ? 1 : kQuarter>(column, a.row_bytes, rows, j, count, lane, l, sum);
        j += F::kEdges * kQuarter;
      }
    }
  }
  combine<F>(sum);
}

// --- hubs -------------------------------------------------------------------------------------------------------
// Sums of pieces, in this layer's launch written by other multiprocessors: read past the first-level cache.
template <class F>
__device__ __forceinline__ void sum_partials(const Layer& a, int64_t slot, int stride, int count, int lane,
                                             const Lane<F>& l, Sums<F>& sum) {
  clear<F>(sum);
#pragma unroll 4
  for (int i = lane / F::kLanes; i < count; i += F::kEdges) {
    const float* from = a.partial + (slot + static_cast<int64_t>(i) * stride) * a.D;
#pragma unroll
    for (int v = 0; v < F::kVecs; ++v) {
      if (l.active[v]) {
        if constexpr (F::kVec == 1) {
          sum[v][0] += __ldcg(from + l.column[v]);
        } else {
#pragma unroll
          for (int part = 0; part < F::kVec; part += 4) {
            const float4 four = __ldcg(reinterpret_cast<const float4*>(from + l.column[v] + part));
            sum[v][part] += four.x;
            sum[v][part + 1] += four.y;
            sum[v][part + 2] += four.z;
            sum[v][part + 3] += four.w;
          }
        }
      }
    }
  }
  combine<F>(sum);
}

template <class F>
__device__ __forceinline__ void write_partial(const Layer& a, int64_t slot, int lane, const Lane<F>& l,
                                              const Sums<F>& sum) {
#pragma unroll
  for (int v = 0; v < F::kVecs; ++v) {
    if (lane < F::kLanes && l.active[v]) {
      store_run<float>(a.partial, slot * a.D + l.column[v], false, sum[v]);
    }
  }
}

// Whether this warp is the last of `members`, which then sees what all of them wrote. Leaves the counter at zero.
__device__ __forceinline__ bool arrive(int32_t* counter, int members, int lane) {
  __syncwarp();
  int last = 0;
  if (lane == 0) {
    // Lane 0's fences stand for the warp: the barriers around them order what its other lanes wrote and will read.
    __threadfence();
    last = atomicAdd(counter, 1) + 1 == members;
    if (last) {
      atomicExch(counter, 0);
    }
    __threadfence();
  }
  last = __shfl_sync(kAllLanes, last, 0);
  __syncwarp();
  return last;
}

// Hands in the sum of a piece; true for the warp that ends up with the sum of all. Two levels, each in a fixed order:
// kGroup neighbouring pieces, then the groups. slot is that of piece 0.
template <class F>
__device__ __forceinline__ bool join(const Layer& a, int tile, int64_t slot, int piece, int pieces, int lane,
                                     const Lane<F>& l, Sums<F>& sum) {
  int32_t* counters = a.arrived + tile * a.schedule.slots + slot;
  const int group = piece / kGroup * kGroup;
  const int members = pieces - group < kGroup ? pieces - group : kGroup;
  write_partial<F>(a, slot + piece, lane, l, sum);
  if (!arrive(counters + group, members, lane)) {
    return false;
  }
  sum_partials<F>(a, slot + group, 1, members, lane, l, sum);
  if (pieces <= kGroup) {
    return true;
  }
  write_partial<F>(a, slot + group, lane, l, sum);
  // Counter 1 is no group's.
  const int groups = (pieces + kGroup - 1) / kGroup;
  if (!arrive(counters + 1, groups, lane)) {
    return false;
  }
  sum_partials<F>(a, slot, kGroup, groups, lane, l, sum);
  return true;
}

// --- rows -------------------------------------------------------------------------------------------------------
struct Row {
  int node;           // -1: `rows` names none
  int64_t begin;      // its first edge
  int piece, pieces;  // pieces 0: nothing of this row is to be done here
  int64_t edges;
};

// Where a row starts on the line that windows divide; in range also where crow is damaged.
__device__ __forceinline__ int64_t start_of(const Layer& a, int64_t row, int64_t begin) {
  const int64_t edges = begin < 0 ? 0 : begin > a.nnz ? a.nnz : begin;
  return edges + kRowCost * row;
}

// The row of a position; no edges where crow is damaged, which prepare_kernel reports.
__device__ __forceinline__ Row find_row(const Layer& a, Pass pass, int position) {
  int64_t node = position;
  if (pass == Pass::rows) {
    node = a.rows[position * a.rows_stride];
    if (!in_range(node, a.nodes, a.bad_row)) {
      return {-1, 0, 0, 1, 0};
    }
  }
  const int64_t begin = a.crow[node], end = a.crow[node + 1];
  if (begin < 0 || end < begin || end > a.nnz) {
    return {static_cast<int>(node), 0, 0, 1, 0};
  }
  const int pieces = static_cast<int>((end - begin) >> a.schedule.piece_shift);
  return {static_cast<int>(node), begin, 0, pieces < 2 ? 1 : pieces, end - begin};
}

// What of a row belongs to a window: piece 0 where the row starts in it; else the piece that starts in it. No window
// is longer than a piece, so there is one at most.
__device__ __forceinline__ void choose_piece(const Layer& a, Pass pass, int window, bool starts_here, Row& row) {
  const int shift = a.schedule.piece_shift;
  if (pass == Pass::hubs && (row.pieces == 1 || !a.requested[row.node])) {
    row.pieces = 0;
  } else if (!starts_here) {
    const int64_t from = window * a.schedule.window - start_of(a, row.node, row.begin);
    const int64_t piece = (from + (int64_t{1} << shift) - 1) >> shift;
    const bool here = piece > 0 && piece < row.pieces && (piece << shift) < from + a.schedule.window;
    row.piece = static_cast<int>(piece);
    row.pieces = here ? row.pieces : 0;
  }
}

template <class F>
__device__ __forceinline__ void run_row(const Layer& a, const Step& step, int tile, int position, const Row& row,
                                        int lane, const Lane<F>& l) {
  // Asked for before the edges, to arrive meanwhile.
  const float s = row.node < 0 ? 0.0f : a.inv_sqrt_degree[row.node];
  Sums<F> own, sum;
  clear<F>(own);
#pragma unroll
  for (int v = 0; v < F::kVecs; ++v) {
    if (row.node >= 0 && lane < F::kLanes && l.active[v]) {
      load_x(a.x, row.node, l.column[v], own[v]);
    }
  }
  const int shift = a.schedule.piece_shift;
  const int64_t slot = row.begin >> shift;
  if (step.pass == Pass::rows && row.pieces > 1) {
    sum_partials<F>(a, slot, 0, lane < F::kLanes ? 1 : 0, lane, l, sum);
  } else {
    const int64_t before = static_cast<int64_t>(row.piece) << shift;
    const int edges = row.piece + 1 < row.pieces ? 1 << shift : static_cast<int>(row.edges - before);
    sum_edges<F>(a, step.table, row.node, a.col + row.begin + before, edges, lane, l, sum);
    if (row.pieces > 1) {
      if (!join<F>(a, tile, slot, row.piece, row.pieces, lane, l, sum)) {
        return;
      }
      if (step.pass == Pass::hubs) {
        return write_partial<F>(a, slot, lane, l, sum);
      }
    }
  }
  const float scale = step.is_result ? a.mean : s;
#pragma unroll
  for (int v = 0; v < F::kVecs; ++v) {
    if (lane < F::kLanes && l.active[v]) {
#pragma unroll
      for (int i = 0; i < F::kVec; ++i) {
        own[v][i] = scale * own[v][i] + scale * s * a.keep * sum[v][i];
      }
      store_as(in_global(step.out), position * a.D + l.column[v], step.out_type, step.is_result, own[v]);
    }
  }
}

template <class F>
__device__ __forceinline__ void run_step(const Layer& a, const Step& step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool by_rows = step.pass == Pass::rows;
  // Neither passes 2^31: a.count is checked, and 2^31 windows would be a terabyte of edges.
  const unsigned units = static_cast<unsigned>(by_rows ? a.count : a.schedule.windows);
  const unsigned warps = gridDim.x * kWarps;
  unsigned unit = blockIdx.x * kWarps + threadIdx.x / 32;
  for (int tile = 0; tile < a.tiles; ++tile) {
    const Lane<F> l = lane_of<F>(a.D, tile, lane);
    for (; unit < units; unit += warps) {
      const int window = static_cast<int>(unit);
      const int first = by_rows ? window : a.first[window], end = by_rows ? window + 1 : a.first[window + 1];
      for (int position = by_rows || first == 0 ? first : first - 1; position < end; ++position) {
        Row row = find_row(a, step.pass, position);
        if (!by_rows) {
          choose_piece(a, step.pass, window, position >= first, row);
        }
        if (row.pieces > 0) {
          run_row<F>(a, step, tile, position, row, lane, l);
        }
      }
    }
    unit -= units;
  }
}

// The steps [begin, end) of a program; more than one only in a cooperative launch.
template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks) layers_kernel(const Program p) {
  for (int64_t i = p.begin; i < p.end; ++i) {
    if (i > p.begin) {
      grid_barrier();
    }
    run_step<F>(p.layer, step_of(p, i));
  }
}

// --- on the host, for whoever launches --------------------------------------------------------------------------
inline int64_t steps_of(const Program& p) { return p.layers + (p.layer.rows != nullptr ? 1 : 0); }

// What warps divide among themselves in a step: windows or positions, times tiles.
inline int64_t items_of(const Program& p, int64_t step) {
  return p.layer.tiles * (step == p.layers ? p.layer.count : p.layer.schedule.windows);
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// How a layer reads a table of this type, and x beside it.
inline void set_table(Layer& a, Type storage, const Tiling& tiling) {
  const int64_t element = size_of(a.x.type), word = element * tiling.vec < 16 ? element * tiling.vec : 16;
  a.row_bytes = static_cast<uint32_t>(a.D * size_of(storage));
  a.tiles = static_cast<int>(tiling.tiles);
  a.x.vectors = tiling.vec > 1 && a.x.column_stride == 1 && a.x.row_stride * element % word == 0 &&
                reinterpret_cast<uintptr_t>(a.x.data) % static_cast<uintptr_t>(word) == 0;
}

template <typename S, typename Body>
void with_lanes(const Tiling& tiling, const Body& body) {
  constexpr int kVec = 16 / sizeof(S);
  if (tiling.vec == 1) {
    body(Shape<S, 1, 32>{});
  } else if (tiling.lanes == 8) {
    body(Shape<S, kVec, 8>{});
  } else if (tiling.lanes == 16) {
    body(Shape<S, kVec, 16>{});
  } else {
    body(Shape<S, kVec, 32>{});
  }
}

// Calls body with the Shape of a table.
template <typename Body>
void with_shape(Type storage, const Tiling& tiling, const Body& body) {
  switch (storage) {
    case Type::bfloat16:
      return with_lanes<__nv_bfloat16>(tiling, body);
    case Type::float16:
      return with_lanes<__half>(tiling, body);
    default:
      return with_lanes<float>(tiling, body);
  }
}

}  // namespace collm::propagate_cuda
