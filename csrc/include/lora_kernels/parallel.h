// Threads for the kernels: the caller says how to run a loop in parallel (torch's threads in the
// extension, its own in the checks).
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

// A 64-byte aligned buffer of the calling thread. It is kept until the thread ends, so that a
// kernel has no page faults in every call. Its content is lost when a larger size is asked for.
// Each slot is a buffer of its own. Null when memory runs out.
constexpr int kScratchSlots = 5;
void* thread_scratch(int slot, size_t bytes);

}  // namespace lora_kernels
