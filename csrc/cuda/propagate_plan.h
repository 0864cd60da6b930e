// How lightgcn_propagate is laid over a GPU: windows of equal work, pieces of hubs, tiles of columns, or one launch.
//
// Host arithmetic on sizes alone, so that no call waits for the device; no torch and no CUDA header. The kernels that
// follow it are in propagate.cuh, the launches in propagate.cu and, on the host, tests/cuda_on_cpu/propagate_main.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

namespace collm::propagate_cuda {

constexpr int64_t kPieceEdges = 128;    // at least; a row is split from twice as many on
constexpr int64_t kRowCost = 4;         // a row reads x and crow and writes: about as much as 4 edges
constexpr int64_t kWindowsPerWarp = 4;  // of a graph too small to fill the GPU many times over
constexpr int64_t kLeastWindow = 32;
constexpr int kMostShift = 29;     // the edges of a piece are counted in 32 bits
constexpr int kScalarColumns = 4;  // columns a lane takes where rows are not whole 16-byte words

struct Machine {
  int64_t l2_bytes;
  int64_t warps;  // resident at once
};

// Lanes that share a row, 16 bytes each (vec elements), or 32 lanes of kScalarColumns single elements (vec 1).
struct Tiling {
  int vec, lanes;
  int64_t tiles;
};

struct Schedule {
  int piece_shift;          // a piece has 2^piece_shift edges, the last of a row up to twice as many less one
  int64_t window, windows;  // units of work of a warp: an edge counts 1, a row kRowCost
  int64_t slots;            // pieces of hubs at most
};

// An H100's L2 is two halves, and what both sides of the chip read lies in both: half of it counts.
inline bool stays_in_cache(int64_t bytes, const Machine& machine) { return bytes <= machine.l2_bytes / 2; }

// Small graphs run all layers in one cooperative launch: a layer there takes 5 to 100 us, and the launches between
// layers drain the GPU. On larger ones a launch a layer is better: the hardware hands out blocks as others finish.
inline bool one_launch(int64_t table_bytes, const Machine& machine) { return stays_in_cache(table_bytes, machine); }

// A table beyond the cache is gathered tile by tile if that makes each tile fit; if not, the widest rows are best.
inline Tiling make_tiling(int64_t rows, int64_t D, int64_t element, const Machine& machine) {
  const int64_t vec = 16 / element;
  if (D % vec != 0) {
    return {1, 32, (D + 32 * kScalarColumns - 1) / (32 * kScalarColumns)};
  }
  int64_t lanes = D <= 8 * vec ? 8 : D <= 16 * vec ? 16 : 32;
  if (!stays_in_cache(rows * D * element, machine)) {
    const int64_t widest = lanes;
    while (lanes > 8 && !stays_in_cache(rows * lanes * 16, machine)) {
      lanes /= 2;
    }
    lanes = stays_in_cache(rows * lanes * 16, machine) ? lanes : widest;
  }
  return {static_cast<int>(vec), static_cast<int>(lanes), (D + lanes * vec - 1) / (lanes * vec)};
}

// Pieces are counted from a row's first edge and windows are a choice of speed: neither the grid nor the window
// changes a bit. The sums of pieces take at most one float32 table, and an eighth of one where the table is large.
inline Schedule make_schedule(int64_t nodes, int64_t nnz, int64_t tiles, int64_t table_bytes, const Machine& machine) {
  const int64_t share = stays_in_cache(table_bytes, machine) ? 1 : 8;
  int shift = 0;
  while ((int64_t{1} << shift) < kPieceEdges || (shift < kMostShift && nnz >> shift > nodes / share)) {
    ++shift;
  }
  const int64_t total = nnz + kRowCost * nodes, shares = machine.warps * kWindowsPerWarp;
  const int64_t window = std::clamp((total * tiles + shares - 1) / shares, kLeastWindow, int64_t{1} << shift);
  return {shift, window, (total + window - 1) / window, (nnz >> shift) + 1};
}

// Arrivals at a hub are counted for each tile by itself; no tile is narrower than 32 columns.
inline int64_t counters_of(int64_t D, const Schedule& schedule) { return (D + 31) / 32 * schedule.slots; }

}  // namespace collm::propagate_cuda
