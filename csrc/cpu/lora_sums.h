// dA and dB of lora_linear from the sums of the parts that its rows were cut in. They are added in the order of the
// parts: where one thread computes several parts from the first on, it may do that on the way.
#pragma once

#include "isa.h"
#include "lora_rows.h"
#include "lora_scratch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

namespace collm::lora {

using PlaceFn = int64_t (*)(int64_t);

// out = scale times the sums of all parts, added in order: [ranks, columns], or transposed. What belongs to rank o and
// column c is in each part the sum of two numbers, `piece` apart, or one where that is 0, from c / kWhole * whole_step
// + o * rank_step on, at place(c % kWhole).
template <typename W>
struct Partial {
  static constexpr int64_t kWhole = 32;
  // Columns that one thread takes at least; what it takes at a time stays in the first-level cache.
  static constexpr int64_t kBeside = 64, kHeld = 8192;

  const W* data;
  int64_t parts, size, rank_step, whole_step = kWhole, piece = 0;
  PlaceFn place = nullptr;  // null: in order, and so are the columns of all wholes
  bool transposed = false;
  W scale = W(1);
  // What the parts before `first` add up to, each as a whole: [columns / kWhole][ranks][kWhole].
  const W* begun = nullptr;
  int64_t first = 0;

  // total (= or +=) what is in the place of the first part, in that order.
  void fold(int64_t ranks, int64_t columns, bool fresh, W* total) const {
    const AddFn add = chosen();
    for (int64_t w = 0; w * kWhole < columns; ++w, total += ranks * kWhole) {
      if (fresh) {
        std::fill_n(total, ranks * kWhole, W(0));
      }
      add(data + w * whole_step, piece, ranks * kWhole, total);
    }
  }

  // Every part is read from its beginning to its end: the processor sees the next lines coming.
  template <typename T>
  void reduce_into(const Tensor& out) const {
    const int64_t ranks = out.size(transposed ? 1 : 0), columns = out.size(transposed ? 0 : 1);
    T* to = static_cast<T*>(out.data_ptr());
    std::array<int64_t, kWhole> at;
    for (int64_t c = 0; c < kWhole; ++c) {
      at[c] = place == nullptr ? c : place(c);
    }
    const AddFn add = chosen();
    const int64_t each = std::max<int64_t>(1, kHeld / kBeside / std::max<int64_t>(ranks, 1));
    torch::stable::parallel_for(0, (columns + kBeside - 1) / kBeside, each, [&](int64_t begin, int64_t end) {
      const int64_t width = each * kBeside;
      const Buffer<W> sums(ranks * width);
      for (int64_t c0 = begin * kBeside; c0 < std::min(end * kBeside, columns); c0 += width) {
        const int64_t n = std::min({width, end * kBeside - c0, columns - c0});
        const int64_t held = place == nullptr ? n : round_up(n, kWhole), run = place == nullptr ? held : kWhole;
        std::fill_n(sums.data(), ranks * width, W(0));
        for (int64_t c = 0; first > 0 && c < held; c += kWhole) {
          for (int64_t o = 0; o < ranks; ++o) {
            std::copy_n(begun + (c0 + c) * ranks + o * kWhole, kWhole, sums.data() + o * width + c);
          }
        }
        for (int64_t p = first; p < parts; ++p) {
          for (int64_t c = 0; c < held; c += run) {
            const W* from = data + p * size + (c0 + c) / kWhole * whole_step;
            for (int64_t o = 0; o < ranks; ++o) {
              add(from + o * rank_step, piece, run, sums.data() + o * width + c);
            }
          }
        }
        for (int64_t o = 0; o < ranks; ++o) {
          const W* sum = sums.data() + o * width;
          T* into = to + (transposed ? c0 * ranks + o : o * columns + c0);
          const int64_t step = transposed ? ranks : 1;
          for (int64_t c = 0; c < n; ++c) {
            into[c * step] = static_cast<T>(scale * sum[c / kWhole * kWhole + at[c % kWhole]]);
          }
        }
      }
    });
  }

 private:
  using AddFn = void (*)(const W*, int64_t, int64_t, W*);

  // sums += the n elements from `from` on.
  COLLM_INLINE static void add(const W* __restrict__ from, int64_t piece, int64_t n, W* __restrict__ sums) {
    if (piece == 0) {
      for (int64_t l = 0; l < n; ++l) {
        sums[l] += from[l];
      }
    } else {
      for (int64_t l = 0; l < n; ++l) {
        sums[l] += from[l] + from[l + piece];
      }
    }
  }
  static void add_plain(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
#if defined(COLLM_X86)
  COLLM_AVX2 static void add_avx2(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
  COLLM_AVX512 static void add_avx512(const W* from, int64_t piece, int64_t n, W* sums) { add(from, piece, n, sums); }
#endif
  static AddFn chosen() {
#if defined(COLLM_X86)
    return of_isa(add_plain, add_avx2, add_avx512);
#else
    return add_plain;
#endif
  }
};

}  // namespace collm::lora
