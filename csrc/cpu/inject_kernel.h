// The inner loops of the inject family, compiled once for each instruction set: checks, copies and sums of rows.
//
// inject_loops.h includes this file several times, each time inside another namespace and with another
// COLLM_LANE_BYTES and target attribute; so there is no include guard. Every column is summed on its own, in one order:
// the bits do not depend on the instruction set.

#include "lane_kernel.h"

// --- checks ------------------------------------------------------------------------------------------------------
// Without a branch, so that the loop is vector code; who wants to know the bad value looks for it.
template <typename Index>
bool inside(const Index* index, int64_t count, int64_t low, int64_t high) {
  using Unsigned = std::make_unsigned_t<Index>;
  const Unsigned range = static_cast<Unsigned>(std::min<int64_t>(high - 1, std::numeric_limits<Index>::max()) -
                                               low);  // of both ends: high may be 2^31
  Unsigned outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    outside |= static_cast<Unsigned>(static_cast<Unsigned>(index[i]) - static_cast<Unsigned>(low)) > range;
  }
  return outside == 0;
}

inline bool tokens_inside(const int64_t* ids, const int32_t* row_index, int64_t count, int64_t vocabulary) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t is_text = row_index[i] < 0;
    outside |= is_text & static_cast<uint64_t>(static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(vocabulary));
  }
  return outside == 0;
}

// --- copies ------------------------------------------------------------------------------------------------------
typedef Vector<uint8_t, COLLM_LANE_BYTES> Lane;

template <bool STREAM>
__attribute__((always_inline)) inline void put(const Lane& lane, char* to) {
#if defined(__x86_64__)
  if constexpr (STREAM) {
#if COLLM_LANE_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)lane);
#elif COLLM_LANE_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)lane);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)lane);
#endif
    return;
  }
#endif
  __builtin_memcpy(to, &lane, sizeof(lane));
}

template <bool STREAM>
__attribute__((always_inline)) inline void copy_row(const char* from, char* to, int64_t bytes) {
  constexpr int64_t B = COLLM_LANE_BYTES;
  Lane lane{};
  int64_t at = 0;
  for (; at + B <= bytes; at += B) {
    if (from != nullptr) {
      __builtin_memcpy(&lane, from + at, sizeof(lane));
    }
    put<STREAM>(lane, to + at);
  }
  if (at == bytes) {
    return;
  }
  if (bytes >= B) {  // the last lane overlaps the one before it
    if (from != nullptr) {
      __builtin_memcpy(&lane, from + bytes - B, sizeof(lane));
    }
    put<false>(lane, to + bytes - B);
  } else if (from != nullptr) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  } else {
    std::memset(to, 0, static_cast<size_t>(bytes));
  }
}

// Row i of `out` is what from[i] points to, zeros where that is null.
inline void copy_rows(const char* const* from, char* out, int64_t count, int64_t bytes, bool stream) {
  if (!stream) {
    for (int64_t i = 0; i < count; ++i) {
      copy_row<false>(from[i], out + i * bytes, bytes);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    copy_row<true>(from[i], out + i * bytes, bytes);
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- sums --------------------------------------------------------------------------------------------------------
// Columns d .. d + V vectors of one run: to = (add ? to : 0) + the sum of the rows, in their order.
template <typename S, typename A, typename T, int V, int BYTES>
__attribute__((always_inline)) inline void add_block(const S* const* rows, int64_t count, int64_t d, bool add, T* to) {
  constexpr int L = BYTES / sizeof(A);
  Vector<A, BYTES> run[V] = {};
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vector<A, BYTES> value;
      load<BYTES>(rows[k] + d + v * L, value);
      run[v] += value;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (std::is_same_v<T, A>) {
      if (add) {
        Vector<A, BYTES> before;
        load<BYTES>(to + d + v * L, before);
        run[v] += before;
      }
    }
    store<BYTES>(run[v], to + d + v * L);
  }
}

template <typename S, typename A, typename T>
void add_run(const S* const* rows, int64_t count, int64_t columns, bool add, T* to) {
  constexpr int B = COLLM_LANE_BYTES;
  constexpr int64_t L = B / sizeof(A);
  int64_t d = 0;
  for (; d + 8 * L <= columns; d += 8 * L) {
    add_block<S, A, T, 8, B>(rows, count, d, add, to);
  }
  if (d + 4 * L <= columns) {
    add_block<S, A, T, 4, B>(rows, count, d, add, to);
    d += 4 * L;
  }
  for (; d + L <= columns; d += L) {
    add_block<S, A, T, 1, B>(rows, count, d, add, to);
  }
  for (; d < columns; ++d) {
    A run = A(0);
    for (int64_t k = 0; k < count; ++k) {
      run += static_cast<A>(rows[k][d]);
    }
    if constexpr (std::is_same_v<T, A>) {
      run += add ? to[d] : A(0);
    }
    to[d] = static_cast<T>(run);
  }
}

// The same where neighbouring columns are `stride` elements apart: row by row through a buffer of sums.
template <typename S, typename A>
void add_strided_run(const S* const* rows, int64_t count, int64_t columns, int64_t stride, bool add, A* run, A* to) {
  std::fill(run, run + columns, A(0));
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t d = 0; d < columns; ++d) {
      run[d] += static_cast<A>(rows[k][d * stride]);
    }
  }
  for (int64_t d = 0; d < columns; ++d) {
    to[d] = add ? to[d] + run[d] : run[d];
  }
}

// Rows first .. last - 1 of the output. One run is the whole sum of most rows, and then goes straight to its place.
template <typename S, typename A>
void sum_rows(const Sums<S>& sums, int64_t first, int64_t last) {
  const int64_t columns = sums.columns, stride = sums.grad.strides.column;
  std::unique_ptr<A[]> buffer;  // the totals, and for strided columns the run beside them
  const S* rows[kRun];
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = sums.begin[s], end = sums.begin[s + 1];
    S* out = sums.out + s * columns;
    if (begin == end) {
      copy_row<false>(nullptr, reinterpret_cast<char*>(out), columns * static_cast<int64_t>(sizeof(S)));
      continue;
    }
    const bool direct = end - begin <= kRun && stride == 1;
    if (!direct && !buffer) {
      buffer.reset(new A[2 * columns]);
    }
    for (int64_t k = begin; k < end; k += kRun) {
      const int64_t count = std::min(kRun, end - k);
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = reinterpret_cast<const S*>(sums.grad.row(sums.places[k + i], sizeof(S)));
      }
      if (direct) {
        add_run<S, A, S>(rows, count, columns, false, out);
      } else if (stride == 1) {
        add_run<S, A, A>(rows, count, columns, k != begin, buffer.get());
      } else {
        add_strided_run<S, A>(rows, count, columns, stride, k != begin, buffer.get() + columns, buffer.get());
      }
    }
    if (!direct) {
      const A* total = buffer.get();
      add_run<A, A, S>(&total, 1, columns, false, out);
    }
  }
}

inline const Loops& loops() {
  static constexpr Loops kLoops{
      inside<int32_t>,        inside<int64_t>,          tokens_inside,         copy_rows,
      sum_rows<float, float>, sum_rows<double, double>, sum_rows<Half, float>, sum_rows<BFloat16, float>};
  return kLoops;
}
