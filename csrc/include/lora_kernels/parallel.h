// How a kernel runs on several threads without knowing whose threads they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/isa.h"

namespace lora_kernels {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);

  int threads;
  // Calls body on consecutive pieces of [begin, end), each of at least `grain` except the last;
  // returns when all are done. Bodies must not throw.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  template <class F>
  LK_INLINE void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    run(
        begin, end, grain,
        [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// One thread: the caller's.
Parallel serial();

// A buffer of the calling thread, 64-byte aligned, kept for the thread's life so that a kernel does
// not pay page faults in every call. Content is not kept between calls with a larger size. Slots
// are independent; null when memory runs out.
constexpr int kScratchSlots = 5;
void* thread_scratch(int slot, size_t bytes);

}  // namespace lora_kernels
