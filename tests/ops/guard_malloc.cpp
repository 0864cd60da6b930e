// An allocator for tests: every aligned block of this process ends at a page that nobody may touch, and begins behind
// another one.
//
// Loaded before everything else (LD_PRELOAD). torch takes the memory of CPU tensors from posix_memalign and the kernels
// take theirs from operator new with an alignment, which asks aligned_alloc; malloc stays as it is. An alignment leaves
// bytes between the end of a block and the page: they hold a mark, looked at when the block is given back. A block is
// full of NaN when it is new, and out of reach once it was given back: nothing is used a second time. The kernels of
// LoRA and attention keep their working memory (csrc/cpu/lora_scratch.h): theirs is new in the first cases of a
// process, later it may be larger than they asked for.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" {
void __libc_free(void*);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

constexpr size_t kPage = 4096, kReserved = size_t{1} << 36;
constexpr unsigned char kMark = 0xA5, kNew = 0xFF;

char* reserve(size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    abort();
  }
  return static_cast<char*>(at);
}

// All blocks, in the order in which they were asked for, and the size of each at the number of its first page.
struct Arena {
  char* begin = reserve(kReserved, PROT_NONE);
  size_t* sizes = reinterpret_cast<size_t*>(reserve(kReserved / kPage * sizeof(size_t), PROT_READ | PROT_WRITE));
  std::atomic<size_t> used{kPage};

  bool holds(const void* block) const {
    const char* at = static_cast<const char*>(block);
    return at >= begin && at < begin + kReserved;
  }
  size_t& size_of(const void* block) const {
    return sizes[static_cast<size_t>(static_cast<const char*>(block) - begin) / kPage];
  }
};

// Made at the first call, which may come before any constructor of this library runs.
Arena& arena() {
  static Arena made;
  return made;
}

size_t round_up(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

void* take(size_t alignment, size_t size) {
  if (alignment > kPage) {
    return __libc_memalign(alignment, size);
  }
  Arena& a = arena();
  const size_t whole = round_up(size == 0 ? 1 : size, alignment), pages = round_up(whole, kPage);
  const size_t at = a.used.fetch_add(pages + kPage);
  if (at + pages + kPage > kReserved || mprotect(a.begin + at, pages, PROT_READ | PROT_WRITE) != 0) {
    return nullptr;
  }
  char* block = a.begin + at + pages - whole;
  memset(a.begin + at, kMark, pages);
  memset(block, kNew, size);
  a.size_of(block) = size;
  return block;
}

bool holds_mark(const char* begin, const char* end) {
  for (; begin < end; ++begin) {
    if (static_cast<unsigned char>(*begin) != kMark) {
      return false;
    }
  }
  return true;
}

void give_back(void* pointer) {
  Arena& a = arena();
  char* block = static_cast<char*>(pointer);
  const size_t size = a.size_of(block), offset = static_cast<size_t>(block - a.begin) % kPage;
  char *first = block - offset, *end = first + round_up(offset + (size == 0 ? 1 : size), kPage);
  if (!holds_mark(first, block) || !holds_mark(block + size, end)) {
    constexpr char kText[] = "guard_malloc: something was written outside a block\n";
    (void)!write(STDERR_FILENO, kText, sizeof(kText) - 1);
    abort();
  }
  // Gives the memory back to the system and keeps its addresses.
  mmap(first, static_cast<size_t>(end - first), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
}

}  // namespace

extern "C" {

int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = take(alignment, size);
  return *block == nullptr ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t size) { return take(alignment, size); }

void* memalign(size_t alignment, size_t size) { return take(alignment, size); }

void free(void* block) {
  if (block != nullptr && arena().holds(block)) {
    give_back(block);
  } else {
    __libc_free(block);
  }
}

void* realloc(void* block, size_t size) {
  if (block == nullptr || !arena().holds(block)) {
    return __libc_realloc(block, size);
  }
  void* moved = malloc(size);
  if (moved != nullptr) {
    const size_t before = arena().size_of(block);
    memcpy(moved, block, before < size ? before : size);
    give_back(block);
  }
  return moved;
}
}
