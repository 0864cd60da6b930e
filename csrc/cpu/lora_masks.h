// The dropout mask by AVX-512, as bits: Philox in 64-bit lanes, four rows by 64 columns at a time.
//
// Drawing is work for the vector units alone. What leaves those idle, a product on AMX tiles, hands it out in slices
// between its own instructions: there it costs about half of what it costs alone.
#pragma once

#include "lora_rows.h"

#if defined(COLLM_X86)

// GCC 12 warns of the undefined operand that its own intrinsics pass on (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <array>

#define COLLM_AVX512_INLINE COLLM_AVX512 COLLM_INLINE

namespace collm::lora::avx512 {

// The first n of 16 columns; n may be negative or above 16.
COLLM_AVX512_INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xFFFFu : n <= 0 ? 0u : (1u << n) - 1u);
}

// Words of a mask's row.
COLLM_INLINE int64_t keep_stride(int64_t columns) { return round_up(columns, 64) / 16; }

// Bits of columns that exist, for n columns from a multiple of 64 on: what no mask drops.
COLLM_AVX512_INLINE void keep_all(int64_t n, uint16_t* keep) {
  for (int64_t w = 0; w < round_up(n, 64) / 16; ++w) {
    keep[w] = first(n - 16 * w);
  }
}

// c = one round of Philox of eight counters whose words lie in the low halves of 64-bit lanes: a product needs no
// shuffle there, and what a shift or an exclusive or leaves in the high halves the next product does not read.
COLLM_AVX512_INLINE void philox_round(__m512i (&c)[4], const uint64_t& k0, const uint64_t& k1) {
  const __m512i p0 = _mm512_mul_epu32(c[0], _mm512_set1_epi64(0xD2511F53u));
  const __m512i p1 = _mm512_mul_epu32(c[2], _mm512_set1_epi64(0xCD9E8D57u));
  c[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[1], _mm512_set1_epi64(k0), 0x96);
  c[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[3], _mm512_set1_epi64(k1), 0x96);
  c[1] = p1;
  c[3] = p0;
}

// The 64 bits of eight blocks' halves, compared; the blocks' lanes are in the order that `Drawing` gives them.
COLLM_AVX512_INLINE uint64_t compare(const __m512i (&c)[4], __m512i threshold) {
  const __m512i low = _mm512_mask_shuffle_epi32(c[0], 0xAAAA, c[1], _MM_PERM_CCAA);
  const __m512i high = _mm512_mask_shuffle_epi32(c[2], 0xAAAA, c[3], _MM_PERM_CCAA);
  const uint64_t left = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold);
  const uint64_t right = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold);
  return left | right << 32;
}

// Rows that the mask or the next pass is for: they are asked for while it is drawn, which leaves memory idle; in the
// order that they lie in, where nothing is between them: then the processor sees a stream.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes
  int64_t bytes = 0;   // of 64 columns; 0: nothing is asked for
  int64_t left = 0;    // bytes that are asked for where nothing is drawn

  template <typename T>
  static Ahead of(const T* rows, int64_t stride) {
    constexpr int64_t size = sizeof(T);
    return rows == nullptr ? Ahead{} : Ahead{reinterpret_cast<const char*>(rows), stride * size, 64 * size, 0};
  }
};

constexpr int64_t kGroup = 4;  // chains in flight: Philox is ten dependent rounds

// Bit k - k0 of keep[i] says whether element (row + i, k) is kept, for n columns from k0 (a multiple of 64) on. Whole
// groups of kGroup rows and of 64 columns are written; bits of columns that do not exist are 0.
class Drawing {
 public:
  // The counters of kGroup rows by 64 columns, on their way.
  struct Chains {
    __m512i c[kGroup][4];
  };
  static constexpr int kRounds = 8;            // of the ten, that are not shared by a row or a column
  static constexpr int kSlices = 2 * kRounds;  // half of the chains, one round

  Drawing() = default;
  COLLM_AVX512_INLINE Drawing(const Dropout& d, uint64_t row, int64_t rows, int64_t k0, int64_t n, uint16_t* keep,
                              int64_t stride, std::array<Ahead, 2> ahead)
      : row_(row),
        rows_(n > 0 ? rows : 0),
        k0_(k0),
        n_(n),
        keep_(keep),
        stride_(stride),
        ahead_(ahead),
        threshold_(d.threshold) {
    if (d.threshold == 0) {
      for (; row_done_ < rows_; ++row_done_) {
        if (row_done_ == 0) {
          keep_all(n, keep);
        } else {
          std::copy_n(keep, keep_stride(n), keep + row_done_ * stride);
        }
      }
      for (Ahead& ahead : ahead_) {
        ahead.left = ahead.bytes > 0 ? rows_ * ahead.stride : 0;
      }
      return;
    }
    for (uint32_t round = 0; round < 10; ++round) {
      key0_[round] = static_cast<uint32_t>(d.seed) + round * 0x9E3779B9u;
      key1_[round] = static_cast<uint32_t>(d.seed >> 32) + round * 0xBB67AE85u;
    }
    stream_ = d.stream ^ static_cast<uint32_t>(key1_[0]);
    enter_rows();
  }

  bool more() const { return row_done_ < rows_; }

  // Without dropout nothing is drawn, but what is ahead is wanted all the same: two lines of each.
  template <_mm_hint Hint>
  COLLM_AVX512_INLINE void ask() {
    for (Ahead& ahead : ahead_) {
      if (ahead.left > 0) {
        _mm_prefetch(ahead.data, Hint);
        _mm_prefetch(ahead.data + 64, Hint);
        ahead.data += 128, ahead.left -= 128;
      }
    }
  }

  COLLM_AVX512_INLINE void begin(Chains& chains) const {
    const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i block = _mm512_add_epi64(_mm512_set1_epi64((k0_ + column_) / 8), lanes);
    const __m512i p0 = _mm512_mul_epu32(block, _mm512_set1_epi64(0xD2511F53u));
    const __m512i c2 = _mm512_xor_si512(_mm512_srli_epi64(p0, 32), _mm512_set1_epi64(stream_));
    const __m512i p1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(0xCD9E8D57u));
#pragma GCC unroll 4
    for (int64_t g = 0; g < kGroup; ++g) {
      chains.c[g][0] = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), _mm512_set1_epi64(second0_[g]));
      chains.c[g][1] = p1;
      chains.c[g][2] = _mm512_xor_si512(p0, _mm512_set1_epi64(second2_[g]));
      chains.c[g][3] = _mm512_set1_epi64(second3_[g]);
    }
  }

  // Each asks for a line or two of what is ahead: all at once would fill the buffers that every miss needs.
  template <int Slice, _mm_hint Hint, int Lines = 2>
  COLLM_AVX512_INLINE void slice(Chains& chains) const {
    constexpr int round = 10 - kRounds + Slice / 2, half = kGroup / 2;
    const Ahead& ahead = ahead_[Slice / 8];
    if (ahead.bytes > 0) {
      _mm_prefetch(ahead.data + Slice % 8 * 64, Hint);
    }
    if (Lines > 1 && ahead.bytes > 128) {
      _mm_prefetch(ahead.data + 512 + Slice % 8 * 64, Hint);
    }
#pragma GCC unroll 2
    for (int g = Slice % 2 * half; g < Slice % 2 * half + half; ++g) {
      philox_round(chains.c[g], key0_[round], key1_[round]);
    }
  }

  COLLM_AVX512_INLINE void end(const Chains& chains) {
    const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(threshold_));
    const uint64_t exists = n_ - column_ >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n_ - column_)) - 1;
    uint16_t* to = keep_ + row_done_ * stride_ + column_ / 16;
#pragma GCC unroll 4
    for (int64_t g = 0; g < kGroup; ++g) {
      const uint64_t bits = compare(chains.c[g], threshold) & exists;
      std::memcpy(to + g * stride_, &bits, sizeof(bits));
    }
    column_ += 64;
    for (Ahead& ahead : ahead_) {
      ahead.data += kGroup * ahead.bytes;
    }
    if (column_ >= n_) {
      for (Ahead& ahead : ahead_) {
        ahead.data += kGroup * ahead.stride - column_ / 64 * kGroup * ahead.bytes;
      }
      column_ = 0, row_done_ += kGroup;
      enter_rows();
    }
  }

  // All that is not drawn yet.
  template <_mm_hint Hint>
  COLLM_AVX512_INLINE void rest() {
    while (more()) {
      Chains chains;
      begin(chains);
      all_slices<Hint>(chains, std::make_integer_sequence<int, kSlices>());
      end(chains);
    }
  }

 private:
  template <_mm_hint Hint, int... Slices>
  COLLM_AVX512_INLINE void all_slices(Chains& chains, std::integer_sequence<int, Slices...>) const {
    (slice<Slices, Hint>(chains), ...);
  }

  // What the first round makes of a row, and the second of that, does not depend on the column.
  COLLM_AVX512_INLINE void enter_rows() {
    for (int64_t g = 0; g < kGroup; ++g) {
      const uint64_t m = row_ + static_cast<uint64_t>(row_done_ + g);
      const uint64_t p1 = (m >> 32) * 0xCD9E8D57u;
      const uint32_t c0 = static_cast<uint32_t>((p1 >> 32) ^ m ^ key0_[0]);
      const uint64_t p0 = uint64_t{c0} * 0xD2511F53u;
      second0_[g] = static_cast<uint32_t>(p1 ^ key0_[1]);
      second2_[g] = static_cast<uint32_t>((p0 >> 32) ^ key1_[1]);
      second3_[g] = static_cast<uint32_t>(p0);
    }
  }

  uint64_t row_ = 0;
  int64_t rows_ = 0, k0_ = 0, n_ = 0;
  uint16_t* keep_ = nullptr;
  int64_t stride_ = 0;
  std::array<Ahead, 2> ahead_{};
  uint32_t threshold_ = 0, stream_ = 0;
  int64_t row_done_ = 0, column_ = 0;
  // Sixty-four bits each, so that an instruction can read them into all lanes itself.
  uint64_t key0_[10]{}, key1_[10]{}, second0_[kGroup]{}, second2_[kGroup]{}, second3_[kGroup]{};
};

// All of it at once.
COLLM_AVX512_INLINE void draw_keep(const Dropout& d, uint64_t row, int64_t rows, int64_t k0, int64_t n, uint16_t* keep,
                                   int64_t stride, Ahead ahead) {
  Drawing drawing(d, row, rows, k0, n, keep, stride, {ahead});
  drawing.rest<_MM_HINT_T0>();
}

}  // namespace collm::lora::avx512

#endif
