// Shows AddressSanitizer what tile instructions read and write. It does not know them, and would let them pass the end
// of any buffer, of the stack's arrays too. In other builds nothing is defined here.
#pragma once

#if defined(__SANITIZE_ADDRESS__) && defined(__x86_64__)

#include <immintrin.h>
#include <sanitizer/asan_interface.h>

#include <cstdint>

namespace collm {

// The sixteen rows of 64 bytes of one tile: an access to the first byte that is out of bounds, which ends the process.
template <bool Write>
inline void show_tile(const void* first, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    char* begin = static_cast<char*>(const_cast<void*>(first)) + row * stride;
    if (void* bad = __asan_region_is_poisoned(begin, 64)) {
      volatile char* byte = static_cast<volatile char*>(bad);
      if constexpr (Write) {
        *byte = 0;
      } else {
        (void)*byte;
      }
    }
  }
}

}  // namespace collm

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#define _tile_loadd(tile, base, stride)       \
  do {                                        \
    ::collm::show_tile<false>(base, stride);  \
    _tile_loadd_internal(tile, base, stride); \
  } while (false)
#define _tile_stream_loadd(tile, base, stride)       \
  do {                                               \
    ::collm::show_tile<false>(base, stride);         \
    _tile_stream_loadd_internal(tile, base, stride); \
  } while (false)
#define _tile_stored(tile, base, stride)       \
  do {                                         \
    ::collm::show_tile<true>(base, stride);    \
    _tile_stored_internal(tile, base, stride); \
  } while (false)

#endif
