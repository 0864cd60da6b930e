// The inner loops of lightgcn_propagate, compiled once for each instruction set.
//
// propagate_loops.h includes this file several times, each time inside another namespace and with another
// COLLM_LANE_BYTES and target attribute; so there is no include guard. The order of every sum is the order of the edges
// and no multiplication is fused with an addition (-ffp-contract=off): the bits do not depend on the instruction set.
// propagate_layer.h calls these loops.

#include "lane_kernel.h"

// --- the columns of a row, block by block ------------------------------------------------------------------------
// A bfloat16 table holds its columns by 32 in pairs: word j of 16 has column j in its lower half and column j + 16 in
// its upper one. So two vectors are read by one load, a shift and a mask, without a shuffle. The last D % 32 columns
// lie in their order. The layout is the same for every instruction set: ranks on different processors exchange tables.
constexpr int kPairColumns = 32;
template <typename T, int V, int BYTES>
constexpr bool kPaired = std::is_same_v<T, BFloat16> && V * BYTES / 4 % kPairColumns == 0;

template <typename S, typename A, int V, int BYTES>
__attribute__((always_inline)) inline void add_row(const S* row, Vector<A, BYTES> (&total)[V]) {
  constexpr int L = BYTES / sizeof(A);
  if constexpr (kPaired<S, V, BYTES>) {
    constexpr int kHalf = kPairColumns / 2 / L;  // vectors from a column to the other of its word
#pragma GCC unroll 8
    for (int i = 0; i < V / 2; ++i) {
      const int v = i / kHalf * 2 * kHalf + i % kHalf;
      Vector<uint32_t, BYTES> pair;
      __builtin_memcpy(&pair, row + i * 2 * L, sizeof(pair));
      const Vector<uint32_t, BYTES> low = pair << 16, high = pair & 0xFFFF0000u;
      Vector<A, BYTES> first, second;
      __builtin_memcpy(&first, &low, sizeof(first));
      __builtin_memcpy(&second, &high, sizeof(second));
      total[v] += first;
      total[v + kHalf] += second;
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      Vector<A, BYTES> value;
      load<BYTES>(row + v * L, value);
      total[v] += value;
    }
  }
}

// value = a x + b total. x may be null: zeros.
template <typename A, int BYTES>
__attribute__((always_inline)) inline void combine(const Vector<A, BYTES>& total, const A* x, A a, A b,
                                                   Vector<A, BYTES>& value) {
  value = total * b;
  if (x != nullptr) {
    Vector<A, BYTES> own;
    load<BYTES>(x, own);
    value += own * a;
  }
}

// out = a x + b total for the columns of one block, rounded once to T.
template <typename T, typename A, int V, int BYTES>
__attribute__((always_inline)) inline void finish(const Vector<A, BYTES> (&total)[V], const A* x, A a, A b,
                                                  bool is_table, T* out) {
  constexpr int L = BYTES / sizeof(A);
  if constexpr (kPaired<T, V, BYTES>) {
    if (is_table) {
      constexpr int kHalf = kPairColumns / 2 / L;
#pragma GCC unroll 8
      for (int i = 0; i < V / 2; ++i) {
        const int v = i / kHalf * 2 * kHalf + i % kHalf, w = v + kHalf;
        Vector<A, BYTES> first, second;
        combine<A, BYTES>(total[v], x == nullptr ? x : x + v * L, a, b, first);
        combine<A, BYTES>(total[w], x == nullptr ? x : x + w * L, a, b, second);
        const Vector<uint32_t, BYTES> pair = (rounded<BYTES>(first) >> 16) | (rounded<BYTES>(second) & 0xFFFF0000u);
        __builtin_memcpy(out + i * 2 * L, &pair, sizeof(pair));
      }
      return;
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    Vector<A, BYTES> value;
    combine<A, BYTES>(total[v], x == nullptr ? x : x + v * L, a, b, value);
    store<BYTES>(value, out + v * L);
  }
}

// total = the sum of the columns of one block over the edges of a row.
template <typename S, typename A, int V, int BYTES>
__attribute__((always_inline)) inline void gather(const LayerCall<A>& call, const RowWork<A>& work, int64_t d,
                                                  int64_t D, Vector<A, BYTES> (&total)[V]) {
  constexpr int L = BYTES / sizeof(A);
  const int32_t* col = work.col;
  const S* table = static_cast<const S*>(call.table) + d;
  const int64_t ahead = call.ahead;
  for (int64_t e = work.begin; e < work.end; ++e) {
    // Not pointer arithmetic: a column further on may not have been checked yet, and is only fetched, never read.
    const uintptr_t next = reinterpret_cast<uintptr_t>(table) +
                           static_cast<uintptr_t>(col[e + ahead < work.last ? e + ahead : e]) * D * sizeof(S);
#pragma GCC unroll 16
    for (size_t line = 0; line < V * L * sizeof(S); line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + line));
    }
    add_row<S, A, V, BYTES>(table + static_cast<int64_t>(col[e]) * D, total);
  }
}

// The columns d .. d + V vectors of one row; D is call.D, a constant where the caller knows it.
template <typename S, typename A, int V, int BYTES>
__attribute__((always_inline)) inline void block(const LayerCall<A>& call, const RowWork<A>& work, int64_t d,
                                                 int64_t D) {
  constexpr int L = BYTES / sizeof(A);
  Vector<A, BYTES> total[V] = {};
  if (work.sum == nullptr) {
    gather<S, A, V, BYTES>(call, work, d, D, total);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      load<BYTES>(work.sum + d + v * L, total[v]);
    }
  }
  const A* x = work.x == nullptr ? nullptr : work.x + d;
  if constexpr (std::is_same_v<A, float>) {
    if (call.out_type == ScalarType::BFloat16) {
      finish<BFloat16, A, V, BYTES>(total, x, work.a, work.b, call.is_table, static_cast<BFloat16*>(work.out) + d);
      return;
    }
    if (call.out_type == ScalarType::Half) {
      finish<Half, A, V, BYTES>(total, x, work.a, work.b, call.is_table, static_cast<Half*>(work.out) + d);
      return;
    }
  }
  finish<A, A, V, BYTES>(total, x, work.a, work.b, call.is_table, static_cast<A*>(work.out) + d);
}

// The last columns, fewer than the narrowest vector holds.
template <typename S, typename A>
void rest(const LayerCall<A>& call, const RowWork<A>& work, int64_t d) {
  for (; d < call.D; ++d) {
    A total = work.sum == nullptr ? A(0) : work.sum[d];
    const S* table = static_cast<const S*>(call.table) + d;
    for (int64_t e = work.begin; work.sum == nullptr && e < work.end; ++e) {
      total += static_cast<A>(table[static_cast<int64_t>(work.col[e]) * call.D]);
    }
    const A value = (work.x == nullptr ? A(0) : work.x[d]) * work.a + total * work.b;
    if (call.out_type == ScalarType::BFloat16) {
      static_cast<BFloat16*>(work.out)[d] = static_cast<BFloat16>(static_cast<float>(value));
    } else if (call.out_type == ScalarType::Half) {
      static_cast<Half*>(work.out)[d] = static_cast<Half>(static_cast<float>(value));
    } else {
      static_cast<A*>(work.out)[d] = value;
    }
  }
}

template <typename S, typename A>
void row(const LayerCall<A>& call, const RowWork<A>& work) {
  constexpr int B = COLLM_LANE_BYTES;
  constexpr int64_t L = B / sizeof(A);
  const int64_t D = call.D;
  int64_t d = 0;
#if COLLM_LANE_BYTES == 64
  // Only here are there registers enough for 16 sums.
  for (; d + 16 * L <= D; d += 16 * L) {
    block<S, A, 16, B>(call, work, d, D);
  }
#endif
  for (; d + 8 * L <= D; d += 8 * L) {
    block<S, A, 8, B>(call, work, d, D);
  }
  if (d + 4 * L <= D) {
    block<S, A, 4, B>(call, work, d, D);
    d += 4 * L;
  }
  if (d + 2 * L <= D) {
    block<S, A, 2, B>(call, work, d, D);
    d += 2 * L;
  }
  if (d + L <= D) {
    block<S, A, 1, B>(call, work, d, D);
    d += L;
  }
#if COLLM_LANE_BYTES > 32
  if (d + 32 / static_cast<int64_t>(sizeof(A)) <= D) {
    block<S, A, 1, 32>(call, work, d, D);
    d += 32 / sizeof(A);
  }
#endif
#if COLLM_LANE_BYTES > 16
  if (d + 16 / static_cast<int64_t>(sizeof(A)) <= D) {
    block<S, A, 1, 16>(call, work, d, D);
    d += 16 / sizeof(A);
  }
#endif
  if (d < D) {
    rest<S, A>(call, work, d);
  }
}

// Rows of a layer whose D is V vectors; V = 0: of any D.
template <typename S, typename A, int V>
__attribute__((always_inline)) inline void rows_of(const LayerCall<A>& call, const RowRange& range, A* buffer) {
  constexpr int64_t kD = V * COLLM_LANE_BYTES / static_cast<int64_t>(sizeof(A));
  const int64_t D = V > 0 ? kD : call.D;
  const int64_t bytes = D * element_bytes(call.out_type);
  const A* x = call.x.in_place();
  for (int64_t i = 0; i < range.count; ++i) {
    const int64_t position = range.first + i, node = range.nodes == nullptr ? position : range.nodes[position];
    const A* own;
    if (x != nullptr) {
      own = x + node * call.x.stride[0];
      // Two rows on, while this one's edges are gathered. Fetched only, so the row need not exist.
      const uintptr_t next = reinterpret_cast<uintptr_t>(own) + 2 * call.x.stride[0] * sizeof(A);
      for (int64_t line = 0; line < D * static_cast<int64_t>(sizeof(A)); line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(next + line));
      }
    } else {
      own = call.x.row(node, D, buffer);
    }
    const RowWork<A> work{range.col,    range.begin[i], range.end[i],
                          range.last,   nullptr,        own,
                          call.a(node), call.b(node),   static_cast<char*>(call.out) + position * bytes};
    if constexpr (V > 0) {
      block<S, A, V, COLLM_LANE_BYTES>(call, work, 0, D);
    } else {
      row<S, A>(call, work);
    }
  }
}

// Rows [first, first + count) of a layer: their edges are col[begin[i] .. end[i]); all of col up to `last` is readable.
// The widths that are one block of vectors have a loop of their own: a row has few edges, and what it costs beside them
// shows.
template <typename S, typename A>
void rows(const LayerCall<A>& call, const RowRange& range, A* buffer) {
  constexpr int64_t L = COLLM_LANE_BYTES / static_cast<int64_t>(sizeof(A));
  if (call.D == 4 * L) {
    rows_of<S, A, 4>(call, range, buffer);
  } else if (call.D == 8 * L) {
    rows_of<S, A, 8>(call, range, buffer);
  } else {
    rows_of<S, A, 0>(call, range, buffer);
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

// list = slot[col[begin .. end)] without what is negative; returns how many. list has room for 16 more.
inline int64_t compress(const int32_t* col, int64_t begin, int64_t end, const int32_t* slot, int32_t* list) {
  int64_t count = 0, e = begin;
#if COLLM_LANE_BYTES == 64
  for (; e + 16 <= end; e += 16) {
    const __m512i c = _mm512_loadu_si512(col + e);
    const __m512i s = _mm512_mask_i32gather_epi32(c, static_cast<__mmask16>(0xFFFF), c, slot, 4);
    const __mmask16 kept = _mm512_cmpge_epi32_mask(s, _mm512_setzero_si512());
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(kept, s));
    count += __builtin_popcount(kept);
  }
#endif
  for (; e < end; ++e) {
    const int32_t s = slot[col[e]];
    list[count] = s;
    count += s >= 0;
  }
  return count;
}

// --- edge dropout ------------------------------------------------------------------------------------------------
// The low 32 bits of each 64-bit lane, times a constant.
typedef Vector<uint64_t, COLLM_LANE_BYTES> Wide;
__attribute__((always_inline)) inline Wide times(const Wide& value, uint32_t factor) {
  Wide result;
#if COLLM_LANE_BYTES == 64
  __m512i bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  // Zeroed, as above: g++ 12 warns of the plain intrinsic.
  bits = _mm512_maskz_mul_epu32(static_cast<__mmask8>(0xFF), bits, _mm512_set1_epi32(static_cast<int>(factor)));
  __builtin_memcpy(&result, &bits, sizeof(bits));
#elif COLLM_LANE_BYTES == 32
  __m256i bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits = _mm256_mul_epu32(bits, _mm256_set1_epi32(static_cast<int>(factor)));
  __builtin_memcpy(&result, &bits, sizeof(bits));
#else
  result = (value & 0xFFFFFFFFu) * factor;
#endif
  return result;
}

// philox.h's edge_keep for as many edges as there are lanes: its first word, all ones where it reaches the threshold.
typedef Vector<uint32_t, COLLM_LANE_BYTES> Lanes;
__attribute__((always_inline)) inline Lanes edges_kept(uint64_t seed, const Lanes& user, const Lanes& item,
                                                       uint32_t threshold) {
  Lanes c0 = user, c1 = item, c2 = {}, c3 = Lanes{} + kEdgeStream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const auto product = [](const Lanes& value, uint32_t factor, Lanes& low, Lanes& high) {
    Wide all;
    __builtin_memcpy(&all, &value, sizeof(all));
    const Wide even = times(all, factor), odd = times(all >> 32, factor);
    const Wide lows = (even & 0xFFFFFFFFu) | (odd << 32), highs = (even >> 32) | (odd & 0xFFFFFFFF00000000u);
    __builtin_memcpy(&low, &lows, sizeof(low));
    __builtin_memcpy(&high, &highs, sizeof(high));
  };
  for (int round = 0; round < 10; ++round) {
    Lanes low0, high0, low1, high1;
    product(c0, 0xD2511F53u, low0, high0);
    product(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (Lanes)(c0 >= threshold);
}

// kept = the columns of a node that dropout keeps, in their order; returns how many. `kept` has room for all of them.
inline int64_t keep_edges(uint64_t seed, uint32_t threshold, int32_t node, const int32_t* col, int64_t count,
                          int32_t* kept) {
  constexpr int L = COLLM_LANE_BYTES / 4;
  int64_t next = 0;
  for (int64_t e = 0; e < count; e += L) {
    const int lanes = count - e < L ? static_cast<int>(count - e) : L;
    Vector<int32_t, COLLM_LANE_BYTES> c{};
    __builtin_memcpy(&c, col + e, sizeof(int32_t) * lanes);
    const Vector<int32_t, COLLM_LANE_BYTES> is_user = c > node;
    const Lanes user = (Lanes)((c & ~is_user) | (node & is_user)), item = (Lanes)((c & is_user) | (node & ~is_user));
    const Lanes keep = edges_kept(seed, user, item, threshold);
    for (int lane = 0; lane < lanes; ++lane) {
      kept[next] = c[lane];
      next += keep[lane] & 1;
    }
  }
  return next;
}

template <typename S, typename A>
constexpr Kernel<S, A> kernel() {
  return {&rows<S, A>, &row<S, A>, &any_outside, &compress, &keep_edges};
}
