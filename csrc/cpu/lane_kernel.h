// Vectors of the small float types: loads that widen to float32, stores that round to nearest even.
//
// Included several times, each time inside another namespace and with another COLLM_LANE_BYTES and target attribute
// (propagate_loops.h, inject_loops.h, attention_vectors.h); so there is no include guard, and nothing here includes
// anything. BFloat16 and Half are torch's. What is loaded and stored does not depend on the instruction set.

template <typename A, int BYTES>
struct VectorOf {
  typedef A type __attribute__((vector_size(BYTES)));
};
template <typename A, int BYTES>
using Vector = typename VectorOf<A, BYTES>::type;

template <int BYTES>
__attribute__((always_inline)) inline void load(const float* from, Vector<float, BYTES>& to) {
  __builtin_memcpy(&to, from, sizeof(to));
}

template <int BYTES>
__attribute__((always_inline)) inline void load(const double* from, Vector<double, BYTES>& to) {
  __builtin_memcpy(&to, from, sizeof(to));
}

template <int BYTES>
__attribute__((always_inline)) inline void load(const BFloat16* from, Vector<float, BYTES>& to) {
  Vector<uint16_t, BYTES / 2> halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const Vector<uint32_t, BYTES> words = __builtin_convertvector(halves, Vector<uint32_t, BYTES>) << 16;
  __builtin_memcpy(&to, &words, sizeof(to));
}

// float16 by the processor's instruction where there is one; else by its bits. Neither ever holds a subnormal float32,
// so small values survive torch.set_flush_denormal.
template <int BYTES>
__attribute__((always_inline)) inline void load(const Half* from, Vector<float, BYTES>& to) {
#if COLLM_LANE_BYTES >= 32
  if constexpr (BYTES == 16) {
    __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128 value = _mm_cvtph_ps(bits);
    __builtin_memcpy(&to, &value, sizeof(to));
    return;
  }
  if constexpr (BYTES == 32) {
    __m128i bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    const __m256 value = _mm256_cvtph_ps(bits);
    __builtin_memcpy(&to, &value, sizeof(to));
    return;
  }
#endif
#if COLLM_LANE_BYTES == 64
  if constexpr (BYTES == 64) {
    __m256i bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    // Zeroed, not undefined, is what a masked-out lane would be: g++ 12 warns of the plain intrinsic.
    const __m512 value = _mm512_maskz_cvtph_ps(static_cast<__mmask16>(0xFFFF), bits);
    __builtin_memcpy(&to, &value, sizeof(to));
    return;
  }
#endif
  typedef Vector<uint32_t, BYTES> Words;
  Vector<uint16_t, BYTES / 2> halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words);
  const Words exponent = words & 0x7C00u, shifted = (words & 0x7FFFu) << 13;
  // A normal number's exponent moves by 127 - 15; infinity's and NaN's to the end.
  const Words normal = shifted + (112u << 23) + ((Words)(exponent == 0x7C00u) & (112u << 23));
  // A subnormal m 2^-24 is (2^-14 + m 2^-24) - 2^-14.
  const Words one = Words{} + (113u << 23), sum = shifted + one;
  Vector<float, BYTES> small, offset;
  __builtin_memcpy(&small, &sum, sizeof(small));
  __builtin_memcpy(&offset, &one, sizeof(offset));
  small -= offset;
  Words subnormal;
  __builtin_memcpy(&subnormal, &small, sizeof(subnormal));
  const Words tiny = (Words)(exponent == 0u);
  const Words result = (tiny & subnormal) | (~tiny & normal) | ((words & 0x8000u) << 16);
  __builtin_memcpy(&to, &result, sizeof(to));
}

// A float32 word rounded to bfloat16, to nearest and even, in its upper half; NaN stays NaN. By bits: the processor's
// own conversion would flush subnormals.
template <int BYTES>
__attribute__((always_inline)) inline Vector<uint32_t, BYTES> rounded(const Vector<float, BYTES>& value) {
  typedef Vector<uint32_t, BYTES> Words;
  Words bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const Words nearest = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const Words nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return (nan & 0x7FC00000u) | (~nan & nearest);
}

template <int BYTES>
__attribute__((always_inline)) inline void store(const Vector<float, BYTES>& value, float* to) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <int BYTES>
__attribute__((always_inline)) inline void store(const Vector<double, BYTES>& value, double* to) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <int BYTES>
__attribute__((always_inline)) inline void store(const Vector<float, BYTES>& value, BFloat16* to) {
  const Vector<uint16_t, BYTES / 2> halves =
      __builtin_convertvector(rounded<BYTES>(value) >> 16, Vector<uint16_t, BYTES / 2>);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

template <int BYTES>
__attribute__((always_inline)) inline void store(const Vector<float, BYTES>& value, Half* to) {
#if COLLM_LANE_BYTES >= 32
  // By eight lanes and four: every F16C processor has these two forms.
  for (size_t i = 0; i < BYTES / sizeof(float); i += BYTES >= 32 ? 8 : 4) {
    if constexpr (BYTES >= 32) {
      __m256 part;
      __builtin_memcpy(&part, reinterpret_cast<const float*>(&value) + i, sizeof(part));
      const __m128i bits = _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT);
      __builtin_memcpy(to + i, &bits, sizeof(bits));
    } else {
      __m128 part;
      __builtin_memcpy(&part, &value, sizeof(part));
      const __m128i bits = _mm_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT);
      __builtin_memcpy(to, &bits, BYTES / 2);
    }
  }
#else
  for (size_t i = 0; i < BYTES / sizeof(float); ++i) {
    to[i] = static_cast<Half>(value[i]);
  }
#endif
}
