// The CUDA execution model on one host thread, so that csrc/cuda/*.cuh runs unmodified under g++ and its sanitizers.
//
// Every CUDA thread of a block is a fiber (ucontext). A fiber runs until it meets a barrier, a warp operation or its
// end; barriers are released when every thread that still lives has arrived, and a barrier that can never be released
// ends the program with a message. Blocks run one after the other. What this shows: wrong indices, reads out of
// bounds (each input is its own heap block), misaligned vector loads, missing barriers (run with order=1: threads in
// reverse order, and compare). A cooperative launch runs all blocks at once, for the barrier between them; its kernel
// must have no __shared__ variables, which are static here. What it does not show: speed, memory ordering between
// blocks, PTX, tensor cores.
//
// Include this before the .cuh. Kernels may use threadIdx, blockIdx, blockDim, gridDim, __shared__ of a static size,
// __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync and its kin, the atomics and the small types below.
// Inputs and outputs are raw files in the working directory; see read, write and number, and emulation.py.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define COLLM_FAST_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define __restrict__ __restrict
#define __grid_constant__

// --- types ------------------------------------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
inline To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half h) { return static_cast<float>(emulated_bits<_Float16>(h.bits)); }
inline __half __float2half_rn(float f) { return {emulated_bits<uint16_t>(static_cast<_Float16>(f))}; }
inline __half __float2half(float f) { return __float2half_rn(f); }
inline float __bfloat162float(__nv_bfloat16 b) { return emulated_bits<float>(static_cast<uint32_t>(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t u = emulated_bits<uint32_t>(f);
  if (std::isnan(f)) {
    return {static_cast<uint16_t>((u >> 16) | 0x40)};
  }
  return {static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }

// --- the machine ------------------------------------------------------------------------------------------------
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

enum class State { ready, at_block, at_warp, at_grid, done };

struct Fiber {
  ucontext_t context;
  uint3 index, block;
  State state;
  unsigned mask;           // of the warp operation this fiber waits in
  unsigned char slot[16];  // what this lane shows to its warp
  void* fake_stack;
};

inline constexpr size_t kStack = 256 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline int current = 0;
inline std::function<void()> kernel;
inline int order = 0;  // 1: threads run in reverse, to show a missing barrier

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u,%u,%u thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, current);
  std::exit(3);
}

inline void start_switch(void** save, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#else
  (void)save, (void)stack, (void)size;
#endif
}

inline void finish_switch(void* fake_stack, const void** old_stack, size_t* old_size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_size);
#else
  (void)fake_stack, (void)old_stack, (void)old_size;
#endif
}

// Gives the processor back; returns when the scheduler resumes this fiber.
inline void yield(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  start_switch(state == State::done ? nullptr : &self.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  finish_switch(self.fake_stack, nullptr, nullptr);
}

inline void enter() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  kernel();
  yield(State::done);
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = fiber.index;
  blockIdx = fiber.block;
  start_switch(&scheduler_fake_stack, stacks[thread].get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  finish_switch(scheduler_fake_stack, nullptr, nullptr);
}

// Frees those of the fibers [first, last) that wait in a barrier, if all of them have arrived at it or ended.
inline bool release_barrier(int first, int last, State barrier) {
  bool any = false;
  for (int t = first; t < last; ++t) {
    if (fibers[t].state != barrier && fibers[t].state != State::done) {
      return false;
    }
  }
  for (int t = first; t < last; ++t) {
    if (fibers[t].state == barrier) {
      fibers[t].state = State::ready;
      any = true;
    }
  }
  return any;
}

// Frees the threads whose barrier is complete; returns whether any was.
inline bool release() {
  const int threads = static_cast<int>(fibers.size());
  const int in_block = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  bool any = release_barrier(0, threads, State::at_grid);
  for (int first = 0; first < threads; first += in_block) {
    any |= release_barrier(first, first + in_block, State::at_block);
  }
  for (int first = 0; first < threads; first += warpSize) {
    const int lanes = std::min(warpSize, threads - first);
    unsigned complete = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = fibers[first + lane];
      if (fiber.state != State::at_warp) {
        continue;
      }
      bool arrived = (fiber.mask >> lane) & 1;
      for (int other = 0; other < lanes; ++other) {
        const Fiber& peer = fibers[first + other];
        if ((fiber.mask >> other) & 1) {
          arrived &= peer.state == State::done || (peer.state == State::at_warp && peer.mask == fiber.mask);
        }
      }
      complete |= arrived ? 1u << lane : 0u;
    }
    for (int lane = 0; lane < lanes; ++lane) {
      if ((complete >> lane) & 1) {
        fibers[first + lane].state = State::ready;
        any = true;
      }
    }
  }
  return any;
}

// Runs some blocks together; without a cooperative launch it is one.
inline void run_blocks(const std::vector<uint3>& blocks) {
  const int in_block = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int threads = in_block * static_cast<int>(blocks.size());
  fibers.resize(threads);
  while (static_cast<int>(stacks.size()) < threads) {
    stacks.emplace_back(new char[kStack]);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    const unsigned t = i % in_block;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    fiber.block = blocks[i / in_block];
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool ran = false;
    bool alive = false;
    for (int i = 0; i < threads; ++i) {
      const int t = order ? threads - 1 - i : i;
      if (fibers[t].state == State::ready) {
        resume(t);
        ran = true;
      }
      alive |= fibers[t].state != State::done;
    }
    if (!alive) {
      return;
    }
    if (!release() && !ran) {
      fail("a barrier that can never be released: threads wait in different places");
    }
  }
}

// kernel<<<grid, block>>>(...) is launch(grid, block, [&] { kernel(...); }).
inline void launch(dim3 grid, dim3 block, std::function<void()> body, bool cooperative = false) {
  if (block.x * block.y * block.z > 1024) {
    fail("more than 1024 threads in a block");
  }
  kernel = std::move(body);
  gridDim = grid;
  blockDim = block;
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blocks.push_back({x, y, z});
        if (!cooperative) {
          run_blocks(blocks);
          blocks.clear();
        }
      }
    }
  }
  if (cooperative) {
    run_blocks(blocks);
  }
}

// cudaLaunchCooperativeKernel; whole warps only.
inline void launch_cooperative(dim3 grid, dim3 block, std::function<void()> body) {
  if (block.x * block.y * block.z % warpSize != 0) {
    fail("a cooperative launch with half a warp");
  }
  launch(grid, block, std::move(body), true);
}

// cooperative_groups::this_grid().sync()
inline void grid_barrier() { yield(State::at_grid); }

inline int lane() { return current % warpSize; }

inline void warp_barrier(unsigned mask) {
  if (!((mask >> lane()) & 1)) {
    fail("a warp operation whose mask lacks the calling lane");
  }
  fibers[current].mask = mask;
  yield(State::at_warp);
}

// Every lane shows a value; the reader gets the value of lane `source`, or its own where there is none.
template <typename T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(Fiber::slot));
  std::memcpy(fibers[current].slot, &value, sizeof(T));
  warp_barrier(mask);
  const int peer = current - lane() + source;
  T result = value;
  if (source >= 0 && source < warpSize && peer < static_cast<int>(fibers.size())) {
    if (!((mask >> source) & 1) || fibers[peer].state == State::done) {
      fail("a shuffle that reads a lane outside its mask");
    }
    std::memcpy(&result, fibers[peer].slot, sizeof(T));
  }
  warp_barrier(mask);
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  const unsigned char bit = predicate;
  std::memcpy(fibers[current].slot, &bit, 1);
  warp_barrier(mask);
  unsigned result = 0;
  const int first = current - lane();
  for (int l = 0; l < warpSize && first + l < static_cast<int>(fibers.size()); ++l) {
    if (((mask >> l) & 1) && fibers[first + l].state != State::done && fibers[first + l].slot[0]) {
      result |= 1u << l;
    }
  }
  warp_barrier(mask);
  return result;
}

// --- files ------------------------------------------------------------------------------------------------------
// The whole of NAME.bin as an array of T. It ends where the heap block ends, so that AddressSanitizer sees a read
// past it. An absent file is an empty array.
template <typename T>
std::vector<T> read(const std::string& name) {
  std::ifstream file(name + ".bin", std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<T> values(bytes.size() / sizeof(T));
  values.shrink_to_fit();
  if (!values.empty()) {
    std::memcpy(static_cast<void*>(values.data()), bytes.data(), values.size() * sizeof(T));
  }
  return values;
}

template <typename T>
void write(const std::string& name, const std::vector<T>& values) {
  std::ofstream file(name + ".bin", std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// An output array whose every byte is 0xFF: NaN in each floating type, -1 in each integer.
template <typename T>
std::vector<T> poisoned(size_t count) {
  std::vector<T> values(count);
  if (count > 0) {
    std::memset(static_cast<void*>(values.data()), 0xFF, count * sizeof(T));
  }
  return values;
}

// The parameter NAME of params.txt (lines of `name value`).
inline double number(const std::string& name) {
  std::ifstream file("params.txt");
  std::string key, value;
  while (file >> key >> value) {
    if (key == name) {
      return std::strtod(value.c_str(), nullptr);
    }
  }
  fail(("no parameter " + name).c_str());
}

inline int64_t integer(const std::string& name) { return static_cast<int64_t>(number(name)); }

}  // namespace emulator

// --- barriers, warp operations, atomics, intrinsics -------------------------------------------------------------
inline void __syncthreads() { emulator::yield(emulator::State::at_block); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulator::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emulator::exchange(mask, value, emulator::lane() / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize) {
  const int target = emulator::lane() ^ flip;
  return emulator::exchange(mask, value, target / width == emulator::lane() / width ? target : emulator::lane());
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int target = emulator::lane() + static_cast<int>(delta);
  return emulator::exchange(mask, value, target / width == emulator::lane() / width ? target : emulator::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int target = emulator::lane() - static_cast<int>(delta);
  const bool inside = target >= emulator::lane() / width * width;
  return emulator::exchange(mask, value, inside ? target : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate == 0) == 0; }

// One host thread runs all fibers, so a plain read and write is atomic.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) {
    *address = value;
  }
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
using std::max;
using std::min;
