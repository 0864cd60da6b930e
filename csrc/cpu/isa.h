// Which instruction set the vector code of this process uses: one choice for every family that compiles its loops
// several times (propagate.cpp, inject.cpp, lora.cpp, decoder.cpp).
#pragma once

#include <cstdlib>
#include <string_view>

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

}  // namespace collm
