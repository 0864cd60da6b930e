// The product of lora_linear in bfloat16 on AMX tiles: up to kBlockRows rows against all panels of the right factor.
//
// The vendor's product reaches less than half of what the tiles can do, so no pass around it would be cheap. What holds
// a product of tiles up is not the tiles: it is where their numbers come from. One factor stays in the first-level
// cache while the other passes by out of the second. Between the steps the outputs before are rounded, the lines of
// these ones fetched, and the masks of the next rows drawn, in pieces: the vector units have little else to do, but
// whatever is long fills the queue in which the loads of the next tiles wait. Every output is rounded once for each
// kMaxTerms of terms. Blocks are cut by shapes alone, so no number of threads changes a bit.
#pragma once

#include "lora_tiles.h"

#if defined(COLLM_X86)

namespace collm::lora::tiles {

// Where kRows rows of the left factor stay in the first-level cache: up to so many steps, 40 KB, by so much of the
// right factor at a time.
constexpr int64_t kRowSteps = 20, kPanelBytes = int64_t{768} << 10;
// Where the left factor is wider, so many steps of a panel stay, 32 KB, with the sums of so many rows, 16 KB.
constexpr int64_t kPartSteps = 16, kPartRows = 128;
// Terms of projections side by side: more of kBlockRows rows would leave the second-level cache.
constexpr int64_t kMaxTerms = 1024;

// Rows of a product at a time. All panels pass by kRows rows where those stay in the first-level cache, so the pass
// that feeds the product leaves them there; else a few panels, or a part of one, are read for as many rows as there can
// be.
inline int64_t block_rows(const Right& right) {
  const bool stay = right.steps <= kRowSteps && right.size() * static_cast<int64_t>(sizeof(uint16_t)) <= kPanelBytes;
  return stay ? kRows : kBlockRows;
}

// Which factor's tiles of a block of sums stay in the first-level cache for the next one.
enum class Stays { left, right };

// What is done between the four products of a step: nothing, or four slices of a mask that is wanted later.
struct Idle {
  template <int>
  COLLM_TILES_INLINE void at() const {}
};
template <int Step>
struct Draw {
  const avx512::Drawing& drawing;
  avx512::Drawing::Chains& chains;

  template <int Product>
  COLLM_TILES_INLINE void at() const {
    drawing.slice<4 * Step + Product, _MM_HINT_T1, 1>(chains);
  }
};

// Tiles 0 .. 3 += two by two tiles of the left and the right factor. The one that does not stay is read past the
// first-level cache, where it would push out the other.
template <Stays stays, typename Between = Idle>
COLLM_TILES_INLINE void add_step(const Left& left, int64_t s, const uint16_t* right, const Between& between = {}) {
  const uint16_t *tile = left.first + s * left.step, *below = tile + left.below;
  if constexpr (stays == Stays::left) {
    _tile_stream_loadd(6, right, 64);
    _tile_loadd(4, tile, left.row_bytes);
  } else {
    _tile_stream_loadd(4, tile, left.row_bytes);
    _tile_loadd(6, right, 64);
  }
  _tile_dpbf16ps(0, 4, 6);
  between.template at<0>();
  if constexpr (stays == Stays::left) {
    _tile_stream_loadd(7, right + kTile, 64);
  } else {
    _tile_loadd(7, right + kTile, 64);
  }
  _tile_dpbf16ps(1, 4, 7);
  between.template at<1>();
  if constexpr (stays == Stays::left) {
    _tile_loadd(5, below, left.row_bytes);
  } else {
    _tile_stream_loadd(5, below, left.row_bytes);
  }
  _tile_dpbf16ps(2, 5, 6);
  between.template at<2>();
  _tile_dpbf16ps(3, 5, 7);
  between.template at<3>();
}

// What one projection brings to the product of up to kBlockRows rows.
struct Side {
  const Left* left;       // [rows / kRows]
  const uint16_t* added;  // the rank's steps of the same rows, packed: [rows / kRows][part.added()]
  Part part;
  const uint16_t* keep;  // null: the added terms are part of the sum; else a bit for each output that they may reach
  int64_t keep_stride;

  bool masks() const { return keep != nullptr && part.r > 0; }
};

// Up to kBlockRows rows against all panels of the right factor.
struct Product {
  const Side* sides;
  int64_t count;
  Right right;
  int64_t rows;
  const float* start;  // [outputs], null: zero
  float* masked;       // room for [count][1024] sums
  bool add;            // to what `out` holds
  BFloat16* out;       // [rows][outputs]
  // Masks that the rows after these will want, drawn meanwhile as far as they go.
  avx512::Drawing* next;
  int64_t nexts;

  // How many projections have a mask.
  int64_t masks() const {
    return std::count_if(sides, sides + count, [](const Side& side) { return side.masks(); });
  }
};

// Two by two tiles of sums that wait to be rounded, and where they go to.
struct Waiting {
  const float* sums;
  int64_t row, output, rows = 0;
};

// How sums become outputs. `plain`: they are rounded. `masked`: after those of one projection's rank were added where
// its mask keeps them. `any`: all else.
enum class Write { plain, masked, any };

// Lines of outputs that are asked for, two at a time: `other` from the first, `step` from two to the next two.
struct Lines {
  const BFloat16* first;
  int64_t other, step;
};

// What is done at every step of a product besides: rows of the sums before are rounded, and the lines of as many
// outputs are asked for. Few instructions: those of the next steps' tiles wait behind them.
template <Write write>
class Aside {
 public:
  COLLM_TILES_INLINE Aside(const Product& p, const Waiting& w, Lines lines, int64_t share)
      : p_(p),
        w_(w),
        outputs_(p.right.outputs),
        more_(share - 1),
        sums_(w.sums),
        start_(p.start == nullptr ? nullptr : p.start + w.output),
        masked_(p.masked),
        to_(p.out + w.row * outputs_ + w.output),
        lines_(lines) {
    const int64_t left = outputs_ - w.output;
    exist_ = left >= 32 ? ~0u : (1u << left) - 1u;
    whole_ = w.rows == kRows;
    if constexpr (write == Write::masked) {
      keep_stride_ = p.sides->keep_stride;
      bits_ = p.sides->keep + w.row * keep_stride_ + w.output / 16;
    }
  }

  // Rows that lie sixteen apart, for two tiles of sums do.
  COLLM_TILES_INLINE void step() {
    one();
    for (int64_t n = more_; n > 0; --n) {
      one();
    }
  }
  COLLM_TILES_INLINE void rest() {
    while (whole_ && done_ < 16) {
      one();
    }
    for (int64_t row = whole_ ? kRows : 0; row < w_.rows; ++row) {
      write_row(row, row / 16 * 512 + row % 16 * 16, row);
    }
  }

 private:
  COLLM_TILES_INLINE void one() {
    if (done_ == 16) {
      return;
    }
    _mm_prefetch(reinterpret_cast<const char*>(lines_.first), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(lines_.first + lines_.other), _MM_HINT_T1);
    lines_.first += lines_.step;
    if (whole_) {
      write_row(done_, 0, 0);
      write_row(done_ + 16, 512, 16);
      to_ += outputs_, sums_ += 16;
      if constexpr (write != Write::plain) {
        masked_ += 16, bits_ += keep_stride_;
      }
    }
    ++done_;
  }

  // Row `row` of the sums that wait, which lies at `at` from here on; its outputs are `down` rows below.
  COLLM_TILES_INLINE void write_row(int64_t row, int64_t at, int64_t down) const {
    __m512 a = _mm512_load_ps(sums_ + at), b = _mm512_load_ps(sums_ + at + 256);
    BFloat16* to = to_ + down * outputs_;
    if (write != Write::masked && start_ != nullptr) {
      a = _mm512_add_ps(a, _mm512_loadu_ps(start_));
      b = _mm512_add_ps(b, _mm512_loadu_ps(start_ + 16));
    }
    if constexpr (write == Write::masked) {
      const uint16_t* bits = bits_ + down * keep_stride_;
      a = _mm512_mask_add_ps(a, bits[0], a, _mm512_load_ps(masked_ + at));
      b = _mm512_mask_add_ps(b, bits[1], b, _mm512_load_ps(masked_ + at + 256));
    }
    for (int64_t n = 0; write == Write::any && n < p_.count; ++n) {
      const Side& side = p_.sides[n];
      if (side.masks()) {
        const uint16_t* kept = side.keep + (w_.row + row) * side.keep_stride + w_.output / 16;
        const float* masked = masked_ + n * 1024 + at;
        a = _mm512_mask_add_ps(a, kept[0], a, _mm512_load_ps(masked));
        b = _mm512_mask_add_ps(b, kept[1], b, _mm512_load_ps(masked + 256));
      }
    }
    if (write == Write::any && p_.add) {
      const __m512i before = _mm512_maskz_loadu_epi16(exist_, to);
      a = _mm512_add_ps(a, widened(_mm512_castsi512_si256(before)));
      b = _mm512_add_ps(b, widened(_mm512_extracti64x4_epi64(before, 1)));
    }
    _mm512_mask_storeu_epi16(to, exist_, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }

  const Product& p_;
  const Waiting w_;
  const int64_t outputs_, more_;
  const float *sums_, *start_, *masked_;
  BFloat16* to_;
  Lines lines_;
  const uint16_t* bits_ = nullptr;  // of the one mask, where `masked`
  int64_t keep_stride_ = 0, done_ = 0;
  __mmask32 exist_;
  bool whole_;
};

// The ranks' steps of a block of sums: into `sum` itself, or beside it, where a mask acts on them.
COLLM_TILES_INLINE void add_ranks(const Product& p, int64_t row_block, const uint16_t* right, float* sum) {
  bool stored = false;
  for (int64_t n = 0; n < p.count; ++n) {
    const Side& side = p.sides[n];
    if (side.masks()) {
      if (!std::exchange(stored, true)) {
        store_sums(sum);
      }
      zero_sums();
    }
    const Left rank = Left::packed(side.added + row_block * side.part.added() * 2 * kTile);
    for (int64_t s = 0; s < side.part.added(); ++s) {
      add_step<Stays::left>(rank, s, right + (side.part.first_added + s) * 2 * kTile);
    }
    if (side.masks()) {
      store_sums(p.masked + n * 1024);
    }
  }
  if (!stored) {
    store_sums(sum);
  }
}

// One product: its blocks of kRows by kPanel sums in turn, each rounded while the next is summed.
template <Write write>
class Multiply {
 public:
  COLLM_TILES_INLINE explicit Multiply(const Product& p) : p_(p) {}

  // The panels that a second-level cache holds pass by the rows that stay in the first.
  COLLM_TILES_INLINE void by_rows() {
    const int64_t panels = p_.right.panels(), bytes = p_.right.all() * 2 * kTile * 2;
    const int64_t blocks = std::max<int64_t>(1, (panels * bytes + kPanelBytes - 1) / kPanelBytes);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t row = 0; row < p_.rows; row += kRows) {
        for (int64_t panel = panels * b / blocks; panel < panels * (b + 1) / blocks; ++panel) {
          add<Stays::left>(row, panel, 0, p_.right.steps, sums_[0], nullptr);
        }
      }
    }
    Aside<write>(p_, waiting_, {p_.out, 0, 0}, 1).rest();
  }

  // A few rows pass by the part of a panel that stays in the first-level cache with their sums; what is asked for is
  // the next panel.
  COLLM_TILES_INLINE void by_panels() {
    const int64_t steps = p_.right.steps, blocks = (steps + kPartSteps - 1) / kPartSteps;
    for (int64_t panel = 0; panel < p_.right.panels(); ++panel) {
      const uint16_t* next = p_.right.panel(panel + 1);
      for (int64_t first = 0; first < p_.rows; first += kPartRows) {
        const int64_t last = std::min(first + kPartRows, p_.rows);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t begin = steps * b / blocks, end = steps * (b + 1) / blocks;
          for (int64_t row = first; row < last; row += kRows) {
            const uint16_t* share = next + begin * 2 * kTile + row / kRows * kShare;
            add<Stays::right>(row, panel, begin, end, sums_[(row - first) / kRows], share);
          }
        }
      }
    }
    Aside<write>(p_, waiting_, {p_.out, 0, 0}, 1).rest();
  }

 private:
  // Words of each pair of tiles that one of kBlockRows / kRows blocks of rows asks for.
  static constexpr int64_t kShare = 2 * kTile / (kBlockRows / kRows);

  // What is asked for beside the sums of one block: its outputs, or, where all panels pass by the same rows, as many of
  // the outputs of the next rows, in the order that they lie in.
  template <Stays stays>
  COLLM_TILES_INLINE Lines lines(int64_t row, int64_t panel) const {
    const int64_t outputs = p_.right.outputs;
    if constexpr (stays == Stays::left) {
      return {p_.out + (row + kRows) * outputs + panel * kPanel * kRows, 32, 64};
    } else {
      return {p_.out + row * outputs + panel * kPanel, 16 * outputs, outputs};
    }
  }

  // The steps begin .. end - 1 of a block of sums; meanwhile this block's share of the steps from `next` on is asked
  // for.
  template <Stays stays>
  COLLM_TILES_INLINE void add(int64_t row, int64_t panel, int64_t begin, int64_t end, float* sum,
                              const uint16_t* next) {
    const uint16_t* right = p_.right.panel(panel);
    const int64_t steps = std::max<int64_t>(1, end - begin), share = (16 + steps - 1) / steps;
    Aside<write> aside(p_, waiting_, lines<stays>(row, panel), share);
    settle();
    if (begin == 0) {
      zero_sums();
    } else {
      load_sums(sum);
    }
    for (int64_t n = 0; n < p_.count; ++n) {
      const Side& side = p_.sides[n];
      const Left left = side.left[row / kRows];
      const int64_t first = side.part.first, stop = std::min(end, first + side.part.steps());
      // Always inlined: the chains of `between` have to stay in registers.
      const auto step = [&](int64_t s, const auto& between) COLLM_TILES __attribute__((always_inline)) {
        add_step<stays>(left, s - first, right + s * 2 * kTile, between);
        aside.step();
        if constexpr (stays == Stays::right) {
          ask_for(next + (s - begin) * 2 * kTile, kShare);
        }
      };
      int64_t s = std::max(begin, first);
      for (; s + 4 <= stop && draws(); s += 4) {
        avx512::Drawing::Chains chains;
        next_->begin(chains);
        step(s, Draw<0>{*next_, chains});
        step(s + 1, Draw<1>{*next_, chains});
        step(s + 2, Draw<2>{*next_, chains});
        step(s + 3, Draw<3>{*next_, chains});
        next_->end(chains);
      }
      for (; s < stop; ++s) {
        step(s, Idle{});
        if (asks_) {
          ask();
        }
      }
    }
    aside.rest();
    if (end == p_.right.steps) {
      add_ranks(p_, row / kRows, right + p_.right.steps * 2 * kTile, sum);
      waiting_ = {sum, row, panel * kPanel, std::min(kRows, p_.rows - row)};
    } else {
      store_sums(sum);
      waiting_ = {};
    }
    settle();
  }

  // Whether there is a mask to draw, which next_ points to.
  COLLM_TILES_INLINE bool draws() {
    while (next_ < p_.next + p_.nexts && !next_->more()) {
      ++next_;
    }
    return next_ < p_.next + p_.nexts;
  }

  COLLM_TILES_INLINE void ask() const {
    for (int64_t n = 0; n < p_.nexts; ++n) {
      p_.next[n].template ask<_MM_HINT_T1>();
    }
  }

  const Product& p_;
  avx512::Drawing* next_ = p_.next;
  const bool asks_ = p_.nexts > 0 && !p_.next->more();
  alignas(64) float sums_[kPartRows / kRows][1024];
  Waiting waiting_{};
};

template <Write write>
COLLM_TILES_INLINE void multiply_as(const Product& p) {
  Multiply<write> product(p);
  if (p.right.steps <= kRowSteps) {
    product.by_rows();
  } else {
    product.by_panels();
  }
}

COLLM_TILES_INLINE void multiply(const Product& p) {
  if (p.masks() == 0 && !p.add) {
    multiply_as<Write::plain>(p);
  } else if (p.masks() == 1 && p.count == 1 && p.start == nullptr && !p.add) {
    multiply_as<Write::masked>(p);
  } else {
    multiply_as<Write::any>(p);
  }
}

}  // namespace collm::lora::tiles

#endif
