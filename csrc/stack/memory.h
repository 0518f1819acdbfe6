// Memory of a stack and of a cache: several arrays in one mapping. Baseline only.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace pyargs::stack {

// The product of sizes; std::bad_alloc where it is more than any memory.
inline int64_t product_of(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = int64_t{1} << 56;
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product > kMost) throw std::bad_alloc();
  }
  return product;
}

// Bytes of several arrays one after the other, each on cache lines of its own.
class Layout {
 public:
  // sizes: those of the array, and the bytes of an element.
  int64_t add(std::initializer_list<int64_t> sizes) {
    const int64_t at = size_;
    size_ = product_of({1, size_ + (product_of(sizes) + 63) / 64 * 64});
#ifdef __SANITIZE_ADDRESS__
    fences_.push_back(size_);
    size_ += 64;
#endif
    return at;
  }
  int64_t size() const { return size_; }

  // With AddressSanitizer: nothing may be read or written behind an array.
  void fence([[maybe_unused]] char* data) const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data, size_);
    for (int64_t at : fences_) __asan_poison_memory_region(data + at, 64);
#endif
  }

 private:
  int64_t size_ = 0;
#ifdef __SANITIZE_ADDRESS__
  std::vector<int64_t> fences_;
#endif
};

// Zeroed memory in huge pages where the system has them: a pass reads gigabytes, and 4 KiB pages cost a part of the
// rate.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(); }

  // Makes room for these arrays. What was there before is lost.
  char* reserve(const Layout& layout) {
    if (layout.size() > room()) {
      free();
      const int64_t size = layout.size() + kHuge;
      void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      mapped_ = mapped;
      size_ = size;
#ifdef MADV_HUGEPAGE
      madvise(data(), room(), MADV_HUGEPAGE);
#endif
    }
    layout.fence(data());
    return data();
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;

  int64_t room() const { return size_ - kHuge; }
  char* data() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped_) + kHuge - 1) / kHuge * kHuge);
  }
  void free() {
    if (!mapped_) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(mapped_, size_);
#endif
    munmap(mapped_, size_);
    mapped_ = nullptr;
    size_ = kHuge;
  }

  void* mapped_ = nullptr;
  int64_t size_ = kHuge;
};

}  // namespace pyargs::stack
