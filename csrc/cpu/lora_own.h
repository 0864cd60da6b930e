// The products of our own behind one face, as csrc/cpu/lora.cpp calls them: whether they serve, packing, both
// directions.
//
// lora_product.h is the one in float32, lora_tile_product.h with lora_tile_passes.h the one in bfloat16. Where neither
// serves, the product is the vendor's.
#pragma once

#include "lora_product.h"
#include "lora_scratch.h"
#include "lora_tile_passes.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

namespace collm::lora {

// What a product is asked for: rows, the terms of all projections together and of the widest, outputs.
struct Asked {
  int64_t M, terms, widest, outputs;
};

// Whether they compute the product of a dtype, and how.
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
constexpr bool has_own = std::is_same_v<T, float> || std::is_same_v<T, torch::headeronly::BFloat16>;

// Frozen weights as the right factor of a product over their dimension `term`, packed one below the other.
template <typename T, typename R, typename P>
class Packed {
 public:
  using Pack = void (*)(const T*, int64_t, int64_t, Factor<float>, const R&, const P&, int64_t, int64_t,
                        typename R::Word*);

  Packed(const std::vector<Frozen>& parts, int64_t term, Pack pack)
      : right_{parts.front().weight.size(1 - term)}, buffer_(place(parts, term)) {
    right_.data = buffer_.data();
    for (size_t n = 0; n < parts.size(); ++n) {
      Tensor w = parts[n].weight;
      if (w.stride(0) != 1 && w.stride(1) != 1) {
        const std::array<int64_t, 2> sizes{w.size(0), w.size(1)};
        Tensor copy = torch::stable::new_empty(w, sizes);
        w = torch::stable::copy_(copy, w);
      }
      const T* from = static_cast<const T*>(w.data_ptr());
      const int64_t term_stride = w.stride(term), output_stride = w.stride(1 - term);
      torch::stable::parallel_for(0, right_.panels(), 4, [&](int64_t begin, int64_t end) {
        pack(from, term_stride, output_stride, parts[n].factor, right_, places_[n], begin, end, buffer_.data());
      });
    }
  }
  const R& right() const { return right_; }
  const std::vector<P>& places() const { return places_; }

 private:
  // Returns how much room they take.
  int64_t place(const std::vector<Frozen>& parts, int64_t term) {
    for (const Frozen& part : parts) {
      places_.push_back(right_.add(part.weight.size(term), part.r));
    }
    return right_.size();
  }

  R right_;
  std::vector<P> places_;
  Buffer<typename R::Word> buffer_;
};

template <>
struct Own<float> {
  using Packed = lora::Packed<float, product::Right, product::Part>;
  // On fewer rows the vendor's product makes up for the pass around it: it need not pack the weight.
  static constexpr int64_t kFewRows = 256;
  static bool serves(const Asked& a) { return a.M >= kFewRows && product::Right::serves(a.terms); }
  static constexpr auto kPlace = nullptr;
  static int64_t piece(int64_t) { return 0; }
  static int64_t rank_rows(int64_t r) { return padded(r); }

  static void forward(const Forward<float>& f, const Frozen& weight, int64_t M) {
    const Packed packed({weight}, 1, &product::pack);
    torch::stable::parallel_for(0, (M + kUnit - 1) / kUnit, 2, [&](int64_t begin, int64_t end) {
      const Buffer<float> s(product::kBlockRows * padded(f.r));
      product::forward_rows(f, packed.right(), packed.places()[0], begin * kUnit, std::min(end * kUnit, M), s.data());
    });
  }
  template <typename Sums>
  static void backward(const std::vector<Backward<float>>& group, const std::vector<Frozen>& weights, Sums&) {
    const Packed packed(weights, 0, &product::pack);
    const int64_t count = static_cast<int64_t>(group.size()), rows = product::kBlockRows;
    int64_t ranks = 0;
    for (const Backward<float>& f : group) {
      ranks += padded(f.r);
    }
    torch::stable::parallel_for(0, group.front().parts.count, 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> ds(rows * ranks);
      const Buffer<uint16_t> keep(count * rows * avx512::keep_stride(group.front().K) + 4);
      for (int64_t p = begin; p < end; ++p) {
        for (const Backward<float>& f : group) {
          f.parts.clear(p);
        }
        product::backward_rows(group, packed.right(), packed.places(), p, ds.data(), keep.data());
      }
    });
  }
};

template <>
struct Own<torch::headeronly::BFloat16> {
  using T = torch::headeronly::BFloat16;
  using Packed = lora::Packed<T, tiles::Right, tiles::Part>;
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
    const Packed packed({weight}, 1, &tiles::pack);
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
    const Packed packed(weights, 0, &tiles::pack);
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
