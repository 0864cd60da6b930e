// The inner loops of the decoder ops, compiled once for each instruction set: decoder.cpp includes this file several
// times, each time inside another namespace and under another target, so there is no include guard and nothing here
// includes anything.
//
// Plain loops over contiguous rows that a compiler vectorises. Sums run in kLanes fixed lanes and nothing is fused
// (-ffp-contract=off), so the bits depend on neither the instruction set nor the number of threads.

// --- elements: bfloat16 by its bits, so that the loops vectorise ---------------------------------------------------
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Half value) { return static_cast<float>(value); }
inline float widen(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16); }

inline void narrow(float value, float& to) { to = value; }
inline void narrow(double value, double& to) { to = value; }
inline void narrow(float value, Half& to) { to = static_cast<Half>(value); }
inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  to.x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// The value as it is once stored.
template <typename T, typename A>
inline A rounded(A value) {
  T stored;
  narrow(value, stored);
  return widen(stored);
}

// e^x within 2 ulp for x in [-87, 88]; 0 below. A nan stays one.
inline float exponential(float x) {
  const float capped = x > 88.0f ? 88.0f : x;
  const float shifted = capped * 1.44269504f + 12582912.0f;  // 1.5 2^23: the low bits are the rounded product
  const float n = shifted - 12582912.0f;
  const float r = (capped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float value = p * std::bit_cast<float>(power);
  return x < -87.0f ? 0.0f : value;
}
inline double exponential(double x) { return std::exp(x); }

template <typename A>
inline A sum_of(const A (&lanes)[kLanes]) {
  A part[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    part[l] = lanes[l];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) {
      part[l] += part[l + half];
    }
  }
  return part[0];
}

// sum of term(i), i < n, in kLanes interleaved sums.
template <typename A, typename F>
inline A sum_over(int64_t n, const F& term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] += term(i + l);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    lanes[l] += term(i + l);
  }
  return sum_of(lanes);
}

// --- y = w x r, r = (mean x^2 + eps)^-1/2 ------------------------------------------------------------------------
template <typename X, typename T, typename A>
A norm_row(const X* x, const T* weight, T* y, int64_t width, A eps) {
  const A square = sum_over<A>(width, [&](int64_t i) {
    const A value = widen(x[i]);
    return value * value;
  });
  const A scale = A(1) / std::sqrt(square / static_cast<A>(width) + eps);
  for (int64_t i = 0; i < width; ++i) {
    // Rounded to the dtype of x before the weight as well, as the models themselves do.
    narrow(widen(weight[i]) * rounded<X>(widen(x[i]) * scale), y[i]);
  }
  return scale;
}

// dx = r (g w - x r^2 mean(g w x)) + what arrived along the residual connection, if there is one.
template <typename X, typename T, typename A>
void norm_row_backward(const T* grad, const X* x, const T* weight, A scale, const X* residual, X* dx, int64_t width) {
  const A inner = sum_over<A>(width, [&](int64_t i) { return widen(grad[i]) * widen(weight[i]) * widen(x[i]); });
  const A factor = inner / static_cast<A>(width) * scale * scale;
  if (residual == nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      narrow((widen(grad[i]) * widen(weight[i]) - widen(x[i]) * factor) * scale, dx[i]);
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    narrow((widen(grad[i]) * widen(weight[i]) - widen(x[i]) * factor) * scale + widen(residual[i]), dx[i]);
  }
}

// --- silu(gate) up, silu(g) = g / (1 + e^-g) -----------------------------------------------------------------------
template <typename T, typename A>
void swiglu_span(const T* gate, const T* up, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A g = widen(gate[i]);
    narrow(rounded<T>(g / (A(1) + exponential(-g))) * widen(up[i]), out[i]);
  }
}

template <typename T, typename A>
void swiglu_span_backward(const T* grad, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A g = widen(gate[i]), from = widen(grad[i]);
    const A s = A(1) / (A(1) + exponential(-g));
    narrow(from * widen(up[i]) * s * (A(1) + g * (A(1) - s)), d_gate[i]);
    narrow(from * rounded<T>(g * s), d_up[i]);
  }
}

// --- rotary positions of the heads of one token --------------------------------------------------------------------
// One head in halves. No operand overlaps another, which a loop over so few elements must not have to find out.
template <typename T, typename A>
inline void rotate_halves(const T* __restrict x, const T* __restrict y, const T* __restrict cos,
                          const T* __restrict sin, T* __restrict low, T* __restrict high, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const A first = widen(x[i]), second = widen(y[i]);
    narrow(first * widen(cos[i]) - second * widen(sin[i]), low[i]);
    narrow(second * widen(cos[i + half]) + first * widen(sin[i + half]), high[i]);
  }
}

template <typename T, typename A>
inline void rotate_halves_backward(const T* __restrict x, const T* __restrict y, const T* __restrict cos,
                                   const T* __restrict sin, T* __restrict low, T* __restrict high, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const A first = widen(x[i]), second = widen(y[i]);
    narrow(first * widen(cos[i]) + second * widen(sin[i + half]), low[i]);
    narrow(second * widen(cos[i + half]) - first * widen(sin[i]), high[i]);
  }
}

// From heads that follow one another to heads `step` apart; backward the other way.
template <typename T, typename A>
void rotate_token(const T* x, const T* cos, const T* sin, T* out, int64_t half, int64_t heads, int64_t step) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half, out += step) {
    rotate_halves<T, A>(x, x + half, cos, sin, out, out + half, half);
  }
}

template <typename T, typename A>
void rotate_token_backward(const T* grad, const T* cos, const T* sin, T* dx, int64_t half, int64_t heads,
                           int64_t step) {
  for (int64_t h = 0; h < heads; ++h, grad += step, dx += 2 * half) {
    rotate_halves_backward<T, A>(grad, grad + half, cos, sin, dx, dx + half, half);
  }
}

template <typename X, typename T, typename A>
NormLoops<X, T, A> norm_loops() {
  return {norm_row<X, T, A>, norm_row_backward<X, T, A>};
}

template <typename T, typename A>
Loops<T, A> loops() {
  return {swiglu_span<T, A>, swiglu_span_backward<T, A>, rotate_token<T, A>, rotate_token_backward<T, A>};
}
