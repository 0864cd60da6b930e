// The product of our own, in bfloat16 on AMX tiles (lora_tile_product.h, lora_tile_passes.h), as csrc/cpu/lora.cpp
// calls it: whether it serves, packing, both directions. Everywhere else the product is the vendor's.
#pragma once

#include "lora_scratch.h"
#include "lora_tile_passes.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace collm::lora {

// What it is asked for: rows, the terms of all projections together and of the widest, outputs.
struct Asked {
  int64_t M, terms, widest, outputs;
};

// Whether it computes the product of a dtype, and how.
template <typename T>
struct Own {
  static bool serves(const Asked&) { return false; }
};
// One frozen weight that goes into a right factor, and the factor of its rank.
struct Frozen {
  Tensor weight;
  Factor<float> factor;
  int64_t r;
};

// Rows do not meet in any sum of the forward, so how they are shared out does not change a bit.
constexpr int64_t kUnit = 32;
#if defined(COLLM_X86)
template <typename T>
constexpr bool has_own = std::is_same_v<T, torch::headeronly::BFloat16>;

// Frozen weights as the right factor of a product over their dimension `term`, packed one below the other.
class Packed {
 public:
  using T = torch::headeronly::BFloat16;

  Packed(const std::vector<Frozen>& parts, int64_t term)
      : right_{parts.front().weight.size(1 - term)}, buffer_(place(parts, term)) {
    right_.data = buffer_.data();
    for (size_t n = 0; n < parts.size(); ++n) {
      Tensor w = parts[n].weight;
      if (w.stride(0) != 1 && w.stride(1) != 1) {
        w = copied(w);
      }
      const T* from = static_cast<const T*>(w.data_ptr());
      const int64_t term_stride = w.stride(term), output_stride = w.stride(1 - term);
      torch::stable::parallel_for(0, right_.panels(), 4, [&](int64_t begin, int64_t end) {
        tiles::pack(from, term_stride, output_stride, parts[n].factor, right_, places_[n], begin, end, buffer_.data());
      });
    }
  }
  const tiles::Right& right() const { return right_; }
  const std::vector<tiles::Part>& places() const { return places_; }

 private:
  // Returns how much room they take.
  int64_t place(const std::vector<Frozen>& parts, int64_t term) {
    for (const Frozen& part : parts) {
      places_.push_back(right_.add(part.weight.size(term), part.r));
    }
    return right_.size();
  }

  tiles::Right right_;
  std::vector<tiles::Part> places_;
  Buffer<uint16_t> buffer_;
};

template <>
struct Own<torch::headeronly::BFloat16> {
  using T = torch::headeronly::BFloat16;
  // On fewer rows, or on fewer than one for so many numbers of the weight, it does not pay to pack that.
  static constexpr int64_t kFewRows = 32, kNumbersPerRow = int64_t{8} << 10;
  static bool serves(const Asked& a) {
    return a.M >= kFewRows && a.terms * a.outputs <= kNumbersPerRow * a.M && tiles::Right::serves(a.widest);
  }
  static constexpr auto kPlace = &tiles::interleaved;
  static int64_t piece(int64_t r) { return tiles::RankLeft{r}.piece(); }
  static int64_t rank_rows(int64_t r) { return tiles::RankLeft{r}.rows(); }

  // A, or B^T, packed.
  struct Rank {
    tiles::RankRight right;
    Buffer<uint16_t> buffer;

    Rank(Factor<float> factor, int64_t terms, int64_t r) : right{terms, r}, buffer(right.size()) {
      const Buffer<uint16_t> pieces(right.width() * right.steps() * tiles::kStep);
      tiles::pack_rank(factor, right, pieces.data(), buffer.data());
      right.data = buffer.data();
    }
  };

  static void forward(const Forward<T>& f, const Frozen& weight, int64_t M) {
    const Packed packed({weight}, 1);
    const Rank rank(f.a, f.K, f.r);
    torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 2, [&](int64_t begin, int64_t end) {
      const Buffer<uint16_t> scratch(tiles::forward_scratch(packed.right(), f.K));
      tiles::forward_rows(f, packed.right(), packed.places()[0], rank.right, begin * kUnit, std::min(end * kUnit, M),
                          scratch.data());
    });
  }
  template <typename Sums>
  static void backward(const std::vector<Backward<T>>& group, const std::vector<Frozen>& weights, Sums& sums) {
    for (size_t begin = 0, end = 0; begin < group.size(); begin = end) {
      int64_t terms = group[end++].N;
      while (end < group.size() && terms + group[end].N <= tiles::kMaxTerms) {
        terms += group[end++].N;
      }
      std::vector<Backward<T>> some(group.begin() + begin, group.begin() + end);
      some.front().add = begin > 0;
      backward_some(some, {weights.begin() + begin, weights.begin() + end},
                    [&](int64_t n) { sums.fold(begin + n, group[begin + n]); });
    }
  }

 private:
  // dx of these is one product.
  template <typename Fold>
  static void backward_some(const std::vector<Backward<T>>& group, const std::vector<Frozen>& weights,
                            const Fold& fold) {
    const Packed packed(weights, 0);
    std::vector<Rank> ranks;
    std::vector<tiles::Work> works;
    int64_t scratch = 0;
    for (size_t n = 0; n < group.size(); ++n) {
      ranks.emplace_back(group[n].b, group[n].N, group[n].r);
      works.emplace_back(packed.places()[n], ranks[n].right, group[n].K);
      scratch += works[n].scratch();
    }
    const int64_t masked = static_cast<int64_t>(group.size()) * 1024;
    torch::stable::parallel_for(0, group.front().parts.count, 1, [&](int64_t begin, int64_t end) {
      const Buffer<uint16_t> memory(scratch);
      const Buffer<float> sums(masked);
      std::vector<tiles::Work> own(works);
      uint16_t* at = memory.data();
      for (tiles::Work& work : own) {
        at = work.place(at);
      }
      tiles::backward_rows(group, packed.right(), own, begin, end, sums.data(), fold);
    });
  }
};
#else
template <typename T>
constexpr bool has_own = false;
#endif

}  // namespace collm::lora
