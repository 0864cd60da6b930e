// The inner loops of lightgcn_propagate, compiled once for each instruction set.
//
// propagate.cpp includes this file several times, each time inside another namespace and with another COLLM_LANE_BYTES
// and target attribute; so there is no include guard, and nothing here includes anything. The order of every sum is
// the order of the edges, whatever the instruction set; only the last multiplication and addition of a row may be
// fused or not.

// How many edges ahead a row is fetched: about the latency of memory over the time of one row.
constexpr int64_t kAhead = 16;

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(COLLM_LANE_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(COLLM_LANE_BYTES)));
};
typedef uint32_t Words __attribute__((vector_size(COLLM_LANE_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(COLLM_LANE_BYTES / 2)));

template <typename A>
constexpr int kLanes = COLLM_LANE_BYTES / sizeof(A);

template <typename A>
__attribute__((always_inline)) inline void load(const A* from, typename Vector<A>::type& to) {
  __builtin_memcpy(&to, from, sizeof(to));
}

__attribute__((always_inline)) inline void load(const BFloat16* from, Vector<float>::type& to) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  __builtin_memcpy(&to, &words, sizeof(to));
}

// float16 by the processor's instruction where there is one; else by its bits. Neither ever holds a subnormal float32,
// so small values survive torch.set_flush_denormal.
__attribute__((always_inline)) inline void load(const Half* from, Vector<float>::type& to) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
#if COLLM_LANE_BYTES == 64
  __m256i bits;
  __builtin_memcpy(&bits, &halves, sizeof(bits));
  // Zeroed, not undefined, is what a masked-out lane would be: g++ 12 warns of the plain intrinsic.
  const __m512 value = _mm512_maskz_cvtph_ps(static_cast<__mmask16>(0xFFFF), bits);
  __builtin_memcpy(&to, &value, sizeof(to));
#elif COLLM_LANE_BYTES == 32
  __m128i bits;
  __builtin_memcpy(&bits, &halves, sizeof(bits));
  const __m256 value = _mm256_cvtph_ps(bits);
  __builtin_memcpy(&to, &value, sizeof(to));
#else
  const Words words = __builtin_convertvector(halves, Words);
  const Words exponent = words & 0x7C00u, shifted = (words & 0x7FFFu) << 13;
  // A normal number's exponent moves by 127 - 15; infinity's and NaN's to the end.
  const Words normal = shifted + (112u << 23) + ((Words)(exponent == 0x7C00u) & (112u << 23));
  // A subnormal m 2^-24 is (2^-14 + m 2^-24) - 2^-14.
  const Words one = Words{} + (113u << 23), sum = shifted + one;
  Vector<float>::type small, offset;
  __builtin_memcpy(&small, &sum, sizeof(small));
  __builtin_memcpy(&offset, &one, sizeof(offset));
  small -= offset;
  Words subnormal;
  __builtin_memcpy(&subnormal, &small, sizeof(subnormal));
  const Words tiny = (Words)(exponent == 0u);
  const Words result = (tiny & subnormal) | (~tiny & normal) | ((words & 0x8000u) << 16);
  __builtin_memcpy(&to, &result, sizeof(to));
#endif
}

// sum[0 .. V lanes) = the sum of those columns of the rows col[begin .. end). Accumulators stay in registers.
template <typename S, typename A, int V>
__attribute__((always_inline)) inline void gather_columns(const int32_t* col, int64_t begin, int64_t end, int64_t last,
                                                          const S* table, int64_t width, A* sum) {
  constexpr int L = kLanes<A>;
  typename Vector<A>::type total[V] = {};
  for (int64_t e = begin; e < end; ++e) {
    // Not pointer arithmetic: a column further on may not have been checked yet, and is only fetched, never read.
    const uintptr_t next = reinterpret_cast<uintptr_t>(table) +
                           static_cast<uintptr_t>(col[e + kAhead < last ? e + kAhead : e]) * width * sizeof(S);
#pragma GCC unroll 8
    for (size_t line = 0; line < V * L * sizeof(S); line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + line));
    }
    const S* row = table + static_cast<int64_t>(col[e]) * width;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      typename Vector<A>::type value;
      load(row + v * L, value);
      total[v] += value;
    }
  }
  __builtin_memcpy(sum, total, sizeof(total));
}

// sum[0 .. D) = the sum of the rows col[begin .. end) of table [*, D]; col may be read up to `last`.
template <typename S, typename A>
void gather(const int32_t* col, int64_t begin, int64_t end, int64_t last, const S* table, int64_t D, A* sum) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + 8 * L <= D; d += 8 * L) {
    gather_columns<S, A, 8>(col, begin, end, last, table + d, D, sum + d);
  }
  if (d + 4 * L <= D) {
    gather_columns<S, A, 4>(col, begin, end, last, table + d, D, sum + d);
    d += 4 * L;
  }
  if (d + 2 * L <= D) {
    gather_columns<S, A, 2>(col, begin, end, last, table + d, D, sum + d);
    d += 2 * L;
  }
  if (d + L <= D) {
    gather_columns<S, A, 1>(col, begin, end, last, table + d, D, sum + d);
    d += L;
  }
  if (d == D) {
    return;
  }
  const int rest = static_cast<int>(D - d);
  A total[L] = {};
  for (int64_t e = begin; e < end; ++e) {
    const S* row = table + static_cast<int64_t>(col[e]) * D + d;
    for (int c = 0; c < rest; ++c) {
      total[c] += static_cast<A>(row[c]);
    }
  }
  __builtin_memcpy(sum + d, total, sizeof(A) * rest);
}

// out = a x + b sum, rounded once to T. Either input may be absent.
template <typename T, typename A>
void combine(const A* x, A a, const A* sum, A b, int64_t D, T* out) {
  if (x == nullptr) {
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(sum == nullptr ? A(0) : b * sum[d]);
    }
  } else if (sum == nullptr) {
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(a * x[d]);
    }
  } else {
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(a * x[d] + b * sum[d]);
    }
  }
}

// Whether any column lies outside [0, nodes).
inline bool any_outside(const int32_t* col, int64_t begin, int64_t end, int64_t nodes) {
  uint32_t outside = 0;
  const uint32_t limit = static_cast<uint32_t>(nodes);
  for (int64_t e = begin; e < end; ++e) {
    outside |= static_cast<uint32_t>(static_cast<uint32_t>(col[e]) >= limit);
  }
  return outside != 0;
}

template <typename S, typename A>
constexpr Kernel<S, A> kernel() {
  return {&gather<S, A>, &combine<S, A>, &any_outside};
}
