#include "lora_kernels/parallel.h"

#include <cstdlib>

namespace lora_kernels {

namespace {

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
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    buffer.size = buffer.data != nullptr ? rounded : 0;
  }
  return buffer.data;
}

}  // namespace lora_kernels
