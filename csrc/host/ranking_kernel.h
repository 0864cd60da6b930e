// The inner loop of top_items, compiled once for each instruction set: the scores of a tile, held in registers, against
// the score each user's list ends with. Scores that do not pass are never written anywhere.
//
// ranking.cpp includes this file several times, each time inside another namespace and with another COLLM_LANE_BYTES
// and target attribute; so there is no include guard, and nothing here includes anything. A score is one chain of fused
// multiply-adds over d = 0, 1, .., so its bits depend on neither the instruction set nor the tile.

template <typename T>
struct Lane {
  typedef T type __attribute__((vector_size(COLLM_LANE_BYTES)));
  static constexpr int count = COLLM_LANE_BYTES / sizeof(T);
};
template <typename T>
using Vector = typename Lane<T>::type;

#if COLLM_LANE_BYTES == 64
constexpr int kUsers = 12;  // 24 sums, 2 vectors of items and a broadcast in 32 registers
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
inline Vector<float> broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector<double> broadcast(double value) { return _mm512_set1_pd(value); }
inline uint32_t reaches(Vector<float> a, Vector<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t reaches(Vector<double> a, Vector<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
#elif COLLM_LANE_BYTES == 32
constexpr int kUsers = 6;  // 12 sums, 2 vectors of items and a broadcast in 16 registers
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
inline Vector<float> broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector<double> broadcast(double value) { return _mm256_set1_pd(value); }
inline uint32_t reaches(Vector<float> a, Vector<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
inline uint32_t reaches(Vector<double> a, Vector<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GE_OQ));
}
#else
constexpr int kUsers = 4;
template <typename V>
inline V multiply_add(V a, V b, V c) {
  for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) {
    c[lane] = std::fma(a[lane], b[lane], c[lane]);
  }
  return c;
}
template <typename T>
inline Vector<T> broadcast(T value) {
  Vector<T> out;
  for (int lane = 0; lane < Lane<T>::count; ++lane) {
    out[lane] = value;
  }
  return out;
}

template <typename V>
inline uint32_t reaches(V a, V b) {
  uint32_t mask = 0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) {
    mask |= static_cast<uint32_t>(a[lane] >= b[lane]) << lane;
  }
  return mask;
}
#endif

// Scores of kUsers users with two vectors of items: users [D, kUsers], items [D, 2 lanes]. True if one reaches its
// user's threshold: `scores` [kUsers, 2 lanes] and the bits `reached` [kUsers] are written then.
template <typename T>
bool tile(const T* users, const T* items, int64_t D, const T* threshold, T* scores, uint32_t* reached) {
  constexpr int L = Lane<T>::count;
  Vector<T> sum[kUsers][2] = {};
  for (int64_t d = 0; d < D; ++d) {
    Vector<T> low, high;
    __builtin_memcpy(&low, items + d * 2 * L, sizeof(low));
    __builtin_memcpy(&high, items + d * 2 * L + L, sizeof(high));
#pragma GCC unroll 16
    for (int u = 0; u < kUsers; ++u) {
      const Vector<T> value = broadcast(users[d * kUsers + u]);
      sum[u][0] = multiply_add(value, low, sum[u][0]);
      sum[u][1] = multiply_add(value, high, sum[u][1]);
    }
  }
  uint32_t any = 0, masks[kUsers];
#pragma GCC unroll 16
  for (int u = 0; u < kUsers; ++u) {
    const Vector<T> limit = broadcast(threshold[u]);
    masks[u] = reaches(sum[u][0], limit) | reaches(sum[u][1], limit) << L;
    any |= masks[u];
  }
  if (any == 0) {
    return false;
  }
#pragma GCC unroll 16
  for (int u = 0; u < kUsers; ++u) {
    __builtin_memcpy(scores + u * 2 * L, sum[u], sizeof(sum[u]));
    reached[u] = masks[u];
  }
  return true;
}

template <typename T>
Kernel<T> kernel() {
  return {tile<T>, kUsers, 2 * Lane<T>::count};
}
