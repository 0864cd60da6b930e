// The one definition of the random stream for C++, CUDA and the host emulation of device code.
//
// collm_fast/reference.py (philox, dropout_mask, edge_mask) is the specification and kernels/lora.py the Triton twin;
// tests/ops/test_philox.py holds all of them to the same bits. No torch header: device code includes this file.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define COLLM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace collm {

// The last counter word names the use, so that no two uses of one seed ever share random words.
constexpr uint32_t kEdgeStream = 0x45444745u;

struct PhiloxWords {
  uint32_t word[4];
};

// Philox4x32-10 of the counter (c0, c1, c2, c3); the key is the seed's low and high word.
COLLM_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bit i is set where element (row, 8 * block + i) is kept: its 16-bit half (low half of word 0 first) >= threshold.
COLLM_HOST_DEVICE uint32_t dropout_keep8(uint64_t seed, uint64_t row, uint32_t block, uint32_t stream,
                                         uint32_t threshold) {
  const PhiloxWords w = philox(seed, block, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), stream);
  uint32_t keep = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) {
    keep |= static_cast<uint32_t>((w.word[i] & 0xFFFFu) >= threshold) << (2 * i);
    keep |= static_cast<uint32_t>((w.word[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return keep;
}

// p as a 16-bit threshold, rounded half to even as Python's round: p * 65536 is exact, and so are its halves.
inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 65536.0;
  const uint32_t floor = static_cast<uint32_t>(scaled);
  const double rest = scaled - floor;
  return floor + static_cast<uint32_t>(rest > 0.5 || (rest == 0.5 && (floor & 1u)));
}

// 1 / (1 - q) for the q that the threshold stands for, so that the mask has mean exactly 1.
inline double dropout_scale(uint32_t threshold) { return 65536.0 / (65536.0 - threshold); }

// An undirected edge is kept where word 0 >= floor(p 2^32).
COLLM_HOST_DEVICE bool edge_keep(uint64_t seed, uint32_t user, uint32_t item, uint32_t threshold) {
  return philox(seed, user, item, 0u, kEdgeStream).word[0] >= threshold;
}

inline uint32_t edge_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace collm
