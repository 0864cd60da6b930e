// Kernels that use what the emulator promises, and three that are wrong on purpose; test_emulator.py runs them.
#include "emulator.h"

namespace {

// out[i] = the sum of the block's values up to i: shuffles inside a warp, shared memory between warps.
__global__ void block_scan(const float* in, float* out, int n) {
  __shared__ float totals[32];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float value = i < n ? in[i] : 0.0f;
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_up_sync(0xFFFFFFFFu, value, step);
    value += lane >= step ? other : 0.0f;
  }
  if (lane == 31) {
    totals[warp] = value;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    value += totals[w];
  }
  if (i < n) {
    out[i] = value;
  }
}

__global__ void missing_barrier(float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void out_of_bounds(const float* in, float* out, int n) { out[threadIdx.x] = in[threadIdx.x + n - 31]; }

__global__ void divergent_barrier() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// out[i] = the value of the same thread in the next block, which only a barrier between blocks makes visible.
__global__ void exchange_between_blocks(const float* in, float* between, float* out) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  between[i] = in[i];
  emulator::grid_barrier();
  out[i] = between[(i + blockDim.x) % n];
}

}  // namespace

int main() {
  const int fault = static_cast<int>(emulator::integer("fault"));
  emulator::order = static_cast<int>(emulator::integer("order"));
  const auto in = emulator::read<float>("in");
  auto out = emulator::poisoned<float>(in.size());
  const int n = static_cast<int>(in.size());
  switch (fault) {
    case 0:
      emulator::launch((n + 127) / 128, 128, [&] { block_scan(in.data(), out.data(), n); });
      break;
    case 1:
      emulator::launch(1, 64, [&] { missing_barrier(out.data()); });
      break;
    case 2:
      emulator::launch(1, 32, [&] { out_of_bounds(in.data(), out.data(), n); });
      break;
    case 4: {
      auto between = emulator::poisoned<float>(in.size());
      emulator::launch_cooperative(n / 64, 64, [&] { exchange_between_blocks(in.data(), between.data(), out.data()); });
      break;
    }
    default:
      emulator::launch(1, 32, [] { divergent_barrier(); });
  }
  emulator::write("out", out);
}
