#include "lora_kernels/parallel.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora_kernels {

namespace {

constexpr size_t kHugePage = size_t(1) << 21;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

void run_serial(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
  body(begin, end, context);
}

}  // namespace

Parallel serial() { return {1, run_serial}; }

void* thread_scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.size) {
    std::free(buffer.data);
    const size_t unit = bytes >= kHugePage ? kHugePage : 4096;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    buffer.data = std::aligned_alloc(unit, rounded);
    buffer.size = buffer.data != nullptr ? rounded : 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Kernels stream through several parts of a large buffer at once: few pages, few TLB misses.
    if (unit == kHugePage && buffer.data != nullptr) madvise(buffer.data, rounded, MADV_HUGEPAGE);
#endif
  }
  return buffer.data;
}

}  // namespace lora_kernels
