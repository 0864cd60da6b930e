// Runs csrc/cuda/lora.cuh on the host: the low-rank half of forward and of backward, launched as lora.cu launches it,
// of one projection or of a group.
//
// dtype 0 float32, 1 float16, 2 bfloat16 of x, bias and grad; factor_dtype the same for lora_A and lora_B. The dense
// products belong to the vendor's GEMM and are not here.
#include "emulator.h"

#include "cuda/lora.cuh"

using namespace collm::lora;
using emulator::integer;

namespace {

int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }
dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <typename T, typename F>
void launch_project(const T* v, int64_t v_stride, int64_t M, int64_t C, const Sides<F>& sides, float scale) {
  int64_t tiles = 0;
  for (int n = 0; n < sides.count; ++n) {
    tiles += blocks(sides.side[n].r, kRankTile);
  }
  const int abreast = tiles > 2 ? 4 : static_cast<int>(tiles);
  const auto size = grid(blocks(M, kThreads / 32 / abreast * kProjectRows), blocks(tiles, abreast));
  const auto kernel = sides.side[0].mask.seed ? &project<T, F, true> : &project<T, F, false>;
  emulator::launch(size, kThreads, [&] { kernel(v, v_stride, M, C, sides, abreast, scale); });
}

// s of every projection from one x, and dx from them: the first `split` projections, and then the others added.
template <typename T, typename F>
void run_group() {
  const int64_t M = integer("M"), K = integer("K"), stride = integer("x_stride");
  const int count = static_cast<int>(integer("count")), split = static_cast<int>(integer("split"));
  const uint32_t threshold = collm::dropout_threshold(emulator::number("dropout_p"));
  const auto x = emulator::read<T>("x");
  const auto seed = emulator::read<int64_t>("seed");
  std::vector<std::vector<F>> factors;
  std::vector<std::vector<float>> ss;
  Sides<F> sides{}, before{}, after{};
  for (int n = 0; n < count; ++n) {
    factors.push_back(emulator::read<F>("lora_A" + std::to_string(n)));
    const int r = static_cast<int>(integer("r" + std::to_string(n)));
    ss.push_back(emulator::poisoned<float>(M * r));
    const Mask mask{threshold > 0 ? seed.data() + n : nullptr, static_cast<uint32_t>(2 * n + 1), threshold};
    sides.side[sides.count++] = {factors[n].data(), K, 1, ss[n].data(), r, mask};
    Sides<F>& half = n < split ? before : after;
    half.side[half.count++] = sides.side[n];
  }
  launch_project(x.data(), stride, M, K, sides, static_cast<float>(collm::dropout_scale(threshold)));
  auto dx = emulator::poisoned<T>(M * K);
  const auto size = grid(blocks(M, kGroupRows), blocks(K, kThreads * kColumns));
  const auto kernel = threshold > 0 ? &expand_group<T, F, true> : &expand_group<T, F, false>;
  emulator::launch(size, kThreads, [&] { kernel(before, M, K, false, dx.data()); });
  if (after.count > 0) {
    emulator::launch(size, kThreads, [&] { kernel(after, M, K, true, dx.data()); });
  }
  for (int n = 0; n < count; ++n) {
    emulator::write("s" + std::to_string(n), ss[n]);
  }
  emulator::write("dx", dx);
}

template <typename T, typename F>
void run() {
  const int64_t M = integer("M"), K = integer("K"), N = integer("N"), stride = integer("x_stride");
  const int r = static_cast<int>(integer("r"));
  const int64_t rows_per_part = integer("rows_per_part");
  const float scaling = static_cast<float>(emulator::number("scaling"));
  const uint32_t threshold = collm::dropout_threshold(emulator::number("dropout_p"));
  const float keep_scale = static_cast<float>(collm::dropout_scale(threshold));
  const auto x = emulator::read<T>("x"), bias = emulator::read<T>("bias"), grad = emulator::read<T>("grad");
  const auto a = emulator::read<F>("lora_A"), b = emulator::read<F>("lora_B");
  const auto seed = emulator::read<int64_t>("seed");
  const Mask mask{threshold > 0 ? seed.data() : nullptr, static_cast<uint32_t>(integer("stream")), threshold};
  const Mask none{};

  const auto project_into = [&](const T* v, int64_t v_stride, int64_t C, const F* factor, int64_t fj, int64_t fc,
                                float scale, const Mask& m, std::vector<float>& out) {
    Sides<F> sides{};
    sides.side[0] = {factor, fj, fc, out.data(), r, m};
    sides.count = 1;
    launch_project(v, v_stride, M, C, sides, scale);
  };
  const auto expand_into = [&](const std::vector<float>& s, const F* factor, int64_t fj, int64_t fc, int64_t C,
                               float scale, const T* add, const Mask& m, std::vector<T>& out) {
    const auto size = grid(blocks(M, kExpandRows), blocks(C, kThreads * kColumns));
    const auto kernel = m.seed ? &expand<T, F, true> : &expand<T, F, false>;
    emulator::launch(size, kThreads, [&] { kernel(s.data(), M, r, factor, fj, fc, C, scale, add, m, out.data()); });
  };
  const auto outer_into = [&](const T* v, int64_t v_stride, int64_t C, const std::vector<float>& s, float scale,
                              const Mask& m, int64_t oj, int64_t oc, std::vector<F>& out) {
    const int64_t parts = blocks(M, rows_per_part);
    auto partial = emulator::poisoned<float>(parts * r * C);
    const auto size = grid(blocks(C, kThreads * kColumns), parts, blocks(r, kRankTile));
    const auto kernel = m.seed ? &outer<T, true> : &outer<T, false>;
    emulator::launch(size, kThreads, [&] { kernel(v, v_stride, M, C, s.data(), r, rows_per_part, m, partial.data()); });
    emulator::launch(grid(blocks(r * C, kThreads)), kThreads,
                     [&] { reduce<F>(partial.data(), static_cast<int>(parts), r, C, scale, oj, oc, out.data()); });
  };

  auto s = emulator::poisoned<float>(M * r), ds = emulator::poisoned<float>(M * r);
  auto y = emulator::poisoned<T>(M * N), dx = emulator::poisoned<T>(M * K);
  auto dA = emulator::poisoned<F>(r * K), dB = emulator::poisoned<F>(N * r);
  project_into(x.data(), stride, K, a.data(), K, 1, keep_scale, mask, s);
  expand_into(s, b.data(), 1, r, N, scaling, bias.empty() ? nullptr : bias.data(), none, y);
  project_into(grad.data(), N, N, b.data(), 1, r, scaling * keep_scale, none, ds);
  outer_into(x.data(), stride, K, ds, 1.0f, mask, K, 1, dA);
  outer_into(grad.data(), N, N, s, scaling, none, 1, r, dB);
  expand_into(ds, a.data(), K, 1, K, 1.0f, nullptr, mask, dx);
  emulator::write("s", s);
  emulator::write("y", y);
  emulator::write("dx", dx);
  emulator::write("dA", dA);
  emulator::write("dB", dB);
}

template <typename T, typename F>
void run_mode() {
  integer("mode") == 3 ? run_group<T, F>() : run<T, F>();
}

// The mask alone, as 0 and 1: test_philox.py compares it bit for bit.
void write_mask() {
  const int64_t M = integer("M"), K = integer("K"), first = integer("first_row");
  const auto seed = emulator::read<int64_t>("seed");
  const uint32_t threshold = collm::dropout_threshold(emulator::number("dropout_p"));
  std::vector<uint8_t> kept(M * K);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      const uint32_t keep =
          collm::dropout_keep8(static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(first + m),
                               static_cast<uint32_t>(k / 8), static_cast<uint32_t>(integer("stream")), threshold);
      kept[m * K + k] = (keep >> (k % 8)) & 1u;
    }
  }
  emulator::write("mask", kept);
}

// Words of given counters: rows of (key low, key high, c0, c1, c2, c3).
void write_words() {
  const auto in = emulator::read<uint32_t>("counters");
  std::vector<uint32_t> words;
  for (size_t i = 0; i < in.size(); i += 6) {
    const uint64_t seed = in[i] | static_cast<uint64_t>(in[i + 1]) << 32;
    const collm::PhiloxWords w = collm::philox(seed, in[i + 2], in[i + 3], in[i + 4], in[i + 5]);
    words.insert(words.end(), w.word, w.word + 4);
  }
  emulator::write("words", words);
}

}  // namespace

int main() {
  switch (integer("mode")) {
    case 1:
      write_mask();
      return 0;
    case 2:
      write_words();
      return 0;
    default:
      break;
  }
  emulator::order = static_cast<int>(integer("order"));
  const bool wide_factor = integer("factor_dtype") == 0;
  switch (integer("dtype")) {
    case 0:
      run_mode<float, float>();
      break;
    case 1:
      wide_factor ? run_mode<__half, float>() : run_mode<__half, __half>();
      break;
    default:
      wide_factor ? run_mode<__nv_bfloat16, float>() : run_mode<__nv_bfloat16, __nv_bfloat16>();
  }
  return 0;
}
