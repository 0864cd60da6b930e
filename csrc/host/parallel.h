// Contiguous blocks of a range on threads of its own: _C knows no torch, so it has no pool to share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace collm {

// Calls f(first, last) for blocks of at least `grain` that cover [0, n), on up to `threads` threads, this one among
// them. The exception of the lowest block that threw is thrown here once all have ended.
template <typename F>
void parallel_blocks(int64_t n, int64_t threads, int64_t grain, const F& f) {
  const int64_t blocks = std::max<int64_t>(1, std::min(threads, n / std::max<int64_t>(1, grain)));
  std::vector<std::exception_ptr> errors(blocks);
  const auto run = [&](int64_t block) noexcept {
    try {
      f(n * block / blocks, n * (block + 1) / blocks);
    } catch (...) {
      errors[block] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(blocks - 1);
  int64_t started = 1;
  try {
    for (; started < blocks; ++started) {
      others.emplace_back(run, started);
    }
  } catch (const std::exception&) {
    // The system gives no more threads: what is left runs here.
  }
  run(0);
  for (int64_t block = started; block < blocks; ++block) {
    run(block);
  }
  for (std::thread& other : others) {
    other.join();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace collm
