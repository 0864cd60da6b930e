// The vendor's product in blocks of rows, in float32: a block's product is followed by what lora_linear does to its
// rows, which finds them in a cache. Around one product of all rows the same passes wait for memory.
//
// The weight is packed once, by MKL's own calls: torch carries that library, linked into libtorch_cpu.so, on x86.
#pragma once

#include "lora_checks.h"
#include "lora_scratch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

// As in oneMKL's reference for C; weak, because a torch may be without them.
extern "C" {
#define COLLM_WEAK __attribute__((weak, visibility("default")))
COLLM_WEAK size_t cblas_sgemm_pack_get_size(int identifier, int m, int n, int k);
COLLM_WEAK void cblas_sgemm_pack(int layout, int identifier, int trans, int m, int n, int k, float alpha,
                                 const float* from, int stride, float* to);
COLLM_WEAK void cblas_sgemm_compute(int layout, int trans_a, int trans_b, int m, int n, int k, const float* a,
                                    int stride_a, const float* b, int stride_b, float beta, float* c, int stride_c);
COLLM_WEAK int MKL_Set_Num_Threads_Local(int threads);
#undef COLLM_WEAK
}

namespace collm::lora::vendor {

// Values of cblas.h and mkl_cblas.h.
constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112, kPacked = 151, kMatrixB = 162;

constexpr int64_t kBlockRows = 256;                // at most: both sides of a block and the weight share a cache
constexpr int64_t kFewRows = 128;                  // at least: on fewer a call costs more than it gains
constexpr int64_t kMaxNumbers = int64_t{8} << 20;  // of a packed weight: it is memory beyond what a product needs
constexpr int64_t kSlice = 1024;                   // outputs that a thread packs at least: narrower products are slower
constexpr int64_t kPackedRows = 2048;              // beside these packing is little: it takes 40 rows' time
constexpr int64_t kMost = std::numeric_limits<int>::max();

// Whether rows of T are cut in blocks at all.
template <typename T>
constexpr bool cuts = std::is_same_v<T, float>;

inline bool exists() {
  return cblas_sgemm_pack_get_size != nullptr && cblas_sgemm_pack != nullptr && cblas_sgemm_compute != nullptr &&
         MKL_Set_Num_Threads_Local != nullptr;
}

// The slices of outputs that a weight is packed in, each by one thread.
inline int64_t slices_of(int64_t outputs) {
  return std::clamp<int64_t>(outputs / kSlice, 1, torch::stable::get_num_threads());
}

// M rows as blocks of `rows`, the last of them with the rest, of fewer rows than there are blocks.
struct Blocks {
  int64_t M, count, rows;

  Blocks(int64_t M, int64_t count) : M(M), count(count), rows(M / count) {}
  // Whatever the number of threads.
  static Blocks of(int64_t M) { return {M, std::max<int64_t>(1, (M + kBlockRows - 1) / kBlockRows)}; }
  // As many for each thread, where each fills a good part of the cache.
  static Blocks for_threads(int64_t M) {
    const int64_t threads = torch::stable::get_num_threads(), at_once = threads * kBlockRows;
    return {M, threads * std::max<int64_t>(1, (M + at_once - 1) / at_once)};
  }

  int64_t whole() const { return count * rows; }
  int64_t begin(int64_t block) const { return block == count ? M : block * rows; }
  int64_t after(int64_t row) const { return begin(row / rows + 1); }

  // Whether their product, rows of `terms` that lie `stride` apart by [terms, outputs], is worth packing the weight,
  // where threads share them out in so many parts.
  bool serve(int64_t parts, int64_t stride, int64_t terms, int64_t outputs) const {
    const int64_t threads = torch::stable::get_num_threads();
    // Otherwise some threads would wait for the others, for their last part or while the weight is packed: a product of
    // all rows is cut by columns too.
    const bool even = parts % threads == 0 || parts >= 8 * threads;
    const bool packs = (threads / slices_of(outputs) - 1) * kPackedRows <= M;
    return exists() && rows >= kFewRows && even && packs && terms > 0 && outputs > 0 &&
           terms * outputs <= kMaxNumbers && stride >= terms && stride <= kMost;
  }
};

// A frozen weight as the right factor, over its dimension `term`, of products of `rows` rows each.
class Packed {
 public:
  Packed(const Tensor& weight, int64_t term, int64_t rows)
      : rows_(static_cast<int>(rows)),
        terms_(static_cast<int>(weight.size(term))),
        outputs_(static_cast<int>(weight.size(1 - term))) {
    Tensor w = weight;
    // A matrix whose rows lie one after the other, or whose columns do.
    const auto lies = [&](int64_t along) {
      const int64_t stride = w.stride(1 - along);
      return w.stride(along) == 1 && stride >= w.size(along) && stride <= kMost;
    };
    if (!lies(0) && !lies(1)) {
      w = copied(w);
    }
    const int64_t along = lies(1) ? 1 : 0, slices = slices_of(outputs_), apart = w.stride(1 - term);
    const float* from = static_cast<const float*>(w.data_ptr());
    for (int64_t s = 0; s < slices; ++s) {
      const int begin = static_cast<int>(outputs_ * s / slices), end = static_cast<int>(outputs_ * (s + 1) / slices);
      slices_.push_back({begin, end - begin, room(end - begin)});
    }
    torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      // Packed by several threads it would be slower to multiply by for the one that does.
      const int before = MKL_Set_Num_Threads_Local(1);
      for (const Slice* slice = &slices_[begin]; slice != slices_.data() + end; ++slice) {
        cblas_sgemm_pack(kRowMajor, kMatrixB, along == term ? kTransposed : kPlain, rows_, slice->outputs, terms_, 1.0f,
                         from + slice->begin * apart, static_cast<int>(w.stride(1 - along)), slice->data());
      }
      MKL_Set_Num_Threads_Local(before);
    });
  }

  // out = left times the factor, or that much more: left [rows][terms], its rows `stride` apart, out [rows][outputs].
  void multiply(const float* left, int64_t stride, bool add, float* out) const {
    for (const Slice& slice : slices_) {
      cblas_sgemm_compute(kRowMajor, kPlain, kPacked, rows_, slice.outputs, terms_, left, static_cast<int>(stride),
                          slice.data(), slice.outputs, add ? 1.0f : 0.0f, out + slice.begin, outputs_);
    }
  }

 private:
  struct Slice {
    int begin, outputs;
    Buffer<char> buffer;

    float* data() const { return reinterpret_cast<float*>(buffer.data()); }
  };

  // For so many outputs.
  Buffer<char> room(int outputs) const {
    return Buffer<char>(static_cast<int64_t>(cblas_sgemm_pack_get_size(kMatrixB, rows_, outputs, terms_)));
  }

  int rows_, terms_, outputs_;
  std::vector<Slice> slices_;
};

}  // namespace collm::lora::vendor
