// Working memory of lora_linear and path_attention that a thread keeps between calls: fresh pages cost more than the
// passes over them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>
#include <utility>

namespace collm::lora {

// A few blocks that were given back, at most kKept bytes of them in each thread.
class Spare {
 public:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  static constexpr std::align_val_t kAlign{64};

  static Block take(int64_t bytes) {
    Spare& spare = of_this_thread();
    Block* best = nullptr;
    for (Block& block : spare.blocks_) {
      if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) {
        best = &block;
      }
    }
    // A block far too large would be missing where it fits.
    if (best != nullptr && best->bytes <= 2 * bytes + kSmall) {
      return std::exchange(*best, Block{});
    }
    return {::operator new(static_cast<size_t>(bytes), kAlign), bytes};
  }

  static void give_back(Block block) {
    Spare& spare = of_this_thread();
    if (block.bytes > kKept) {
      release(block);
      return;
    }
    int64_t kept = block.bytes;
    Block* least = &spare.blocks_[0];
    for (Block& other : spare.blocks_) {
      // What was used last is wanted first: the others make room.
      if (kept + other.bytes > kKept) {
        release(std::exchange(other, Block{}));
      }
      kept += other.bytes;
      least = other.bytes < least->bytes ? &other : least;
    }
    if (block.bytes > least->bytes) {
      std::swap(*least, block);
    }
    release(block);
  }

  ~Spare() {
    for (const Block& block : blocks_) {
      release(block);
    }
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  // The sanitizer sees the ends of blocks, and their use once they are given back, only where each is new.
  static constexpr int64_t kKept = 0;
#else
  static constexpr int64_t kKept = int64_t{32} << 20;
#endif
  static constexpr int64_t kSmall = int64_t{64} << 10;

  static Spare& of_this_thread() {
    thread_local Spare spare;
    return spare;
  }
  static void release(const Block& block) {
    if (block.data != nullptr) {
      ::operator delete(block.data, kAlign);
    }
  }
  std::array<Block, 8> blocks_{};
};

// Memory on a cache line's border, not initialised.
template <typename W>
class Buffer {
 public:
  explicit Buffer(int64_t size) : block_(Spare::take(std::max<int64_t>(size, 1) * static_cast<int64_t>(sizeof(W)))) {}
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, Spare::Block{})) {}
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { Spare::give_back(block_); }
  W* data() const { return static_cast<W*>(block_.data); }

 private:
  Spare::Block block_;
};

}  // namespace collm::lora
