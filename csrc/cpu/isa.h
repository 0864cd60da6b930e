// Which instruction set the vector code of this process uses: one choice for every family that compiles its loops
// several times (propagate.cpp, inject.cpp, lora.cpp, decoder.cpp, attention.cpp).
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace collm {

enum class Isa { baseline, avx2, avx512 };

// avx2 stands for avx2, fma and f16c; avx512 for those and f, bw, dq, vl. COLLM_FAST_SIMD=avx2|baseline caps the
// choice, so that one machine can test every path.
inline Isa isa() {
#if defined(__x86_64__)
  static const Isa chosen = [] {
    const char* cap = std::getenv("COLLM_FAST_SIMD");
    const std::string_view name = cap == nullptr ? "" : cap;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (name == "baseline" || !avx2) {
      return Isa::baseline;
    }
    return name == "avx2" || !avx512 ? Isa::avx2 : Isa::avx512;
  }();
  return chosen;
#else
  return Isa::baseline;
#endif
}

// The one of three functions that are compiled for each instruction set.
template <typename Fn>
Fn* of_isa(Fn* baseline, Fn* avx2, Fn* avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : baseline;
}

// Whether bfloat16 products may use AMX tiles: the CPU has them and avx512_bf16, and the system grants their state.
inline bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    // COLLM_FAST_SIMD=avx512 caps the choice below the tiles, so that one machine can test both.
    const char* cap = std::getenv("COLLM_FAST_SIMD");
    const std::string_view name = cap == nullptr ? "" : cap;
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned int kTile = 1u << 24, kTileBf16 = 1u << 22, kAvx512Bf16 = 1u << 5;
    if (isa() != Isa::avx512 || name == "avx512" || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        (edx & kTile) == 0 || (edx & kTileBf16) == 0 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) ||
        (eax & kAvx512Bf16) == 0) {
      return false;
    }
    // Linux hands the 8 KB of tile state to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace collm
