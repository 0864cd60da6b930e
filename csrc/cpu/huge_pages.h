// Huge pages for large fresh buffers: 18 MB in pages of 4 KB costs more page faults than the work done on it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace collm {

// Asks for huge pages in the whole 2 MB pages that lie inside a buffer; what is mapped already stays as it is. Only a
// wish: where the system refuses it, or has other sizes, everything works as before.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = (begin + bytes) & ~(kPage - 1);
  if (first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

// Whether memory stands behind the page of this address already. Where the system cannot tell, it is taken to.
inline bool is_resident(const void* address) {
#if defined(__linux__)
  constexpr uintptr_t kSmallPage = uintptr_t{4} << 10;
  const uintptr_t page = reinterpret_cast<uintptr_t>(address) & ~(kSmallPage - 1);
  unsigned char there = 1;
  return mincore(reinterpret_cast<void*>(page), 1, &there) != 0 || (there & 1) != 0;
#else
  (void)address;
  return true;
#endif
}

}  // namespace collm
