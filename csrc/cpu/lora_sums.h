// dA and dB of lora_linear from the sums of the parts that its rows were cut in.
#pragma once

#include "isa.h"
#include "lora_rows.h"
#include "lora_scratch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

namespace collm::lora {

using PlaceFn = int64_t (*)(int64_t);

// out [R, C] = scale times the sums of all parts, added in order. Element (i, j) of a part is the sum of Pieces
// numbers, `piece` apart, from i * row_step + j * column_step on; one of the steps is 1, and what lies side by side may
// have places of its own.
template <typename W, int64_t Pieces>
struct Partial {
  // Elements side by side that one thread takes at least; what it takes at a time stays in the first-level cache; places
  // stay within so many.
  static constexpr int64_t kBeside = 64, kHeld = 8192, kWhole = 32;

  const W* data;
  int64_t parts, size, row_step, column_step, piece;
  PlaceFn place;  // null: where it belongs
  W scale;

  // Every part is read from its beginning to its end: the processor sees the next lines coming.
  template <typename T>
  void reduce_into(const Tensor& out) const {
    const bool down = row_step == 1;
    const int64_t R = out.size(0), C = out.size(1), lanes = down ? R : C, others = down ? C : R;
    const int64_t other_step = down ? column_step : row_step;
    T* to = static_cast<T*>(out.data_ptr());
    std::array<int64_t, kWhole> at;
    for (int64_t l = 0; l < kWhole; ++l) {
      at[l] = place == nullptr ? l : place(l);
    }
    const AddFn add = chosen();
    const int64_t each = std::max<int64_t>(1, kHeld / kBeside / std::max<int64_t>(others, 1));
    torch::stable::parallel_for(0, (lanes + kBeside - 1) / kBeside, each, [&](int64_t begin, int64_t end) {
      const int64_t width = each * kBeside;
      const Buffer<W> sums(others * width);
      for (int64_t l0 = begin * kBeside; l0 < std::min(end * kBeside, lanes); l0 += width) {
        const int64_t n = std::min({width, end * kBeside - l0, lanes - l0});
        const int64_t held = place == nullptr ? n : round_up(n, kWhole);
        std::fill_n(sums.data(), others * width, W(0));
        for (int64_t p = 0; p < parts; ++p) {
          for (int64_t o = 0; o < others; ++o) {
            add(data + p * size + o * other_step + l0, piece, held, sums.data() + o * width);
          }
        }
        for (int64_t o = 0; o < others; ++o) {
          const W* sum = sums.data() + o * width;
          T* first = to + (down ? l0 * C + o : o * C + l0);
          const int64_t step = down ? C : 1;
          for (int64_t l = 0; l < n; ++l) {
            first[l * step] = static_cast<T>(scale * sum[l / kWhole * kWhole + at[l % kWhole]]);
          }
        }
      }
    });
  }

 private:
  using AddFn = void (*)(const W*, int64_t, int64_t, W*);

  // sums += the n elements from `from` on.
  COLLM_INLINE static void add(const W* __restrict__ from, int64_t piece, int64_t n, W* __restrict__ sums) {
    for (int64_t l = 0; l < n; ++l) {
      W whole = from[l];
      for (int64_t i = 1; i < Pieces; ++i) {
        whole += from[l + i * piece];
      }
      sums[l] += whole;
    }
  }
  static void add_plain(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
#if defined(COLLM_X86)
  COLLM_AVX2 static void add_avx2(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
  COLLM_AVX512 static void add_avx512(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
#endif
  static AddFn chosen() {
#if defined(COLLM_X86)
    return isa() == Isa::avx512 ? add_avx512 : isa() == Isa::avx2 ? add_avx2 : add_plain;
#else
    return add_plain;
#endif
  }
};

}  // namespace collm::lora
