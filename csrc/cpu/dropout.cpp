// The dropout mask of philox.h.
#include "lora_kernels/dropout.h"

#include "philox_simd.h"

namespace lora_kernels {
namespace {

// Elements that a thread takes at least.
constexpr int64_t kGrain = 1 << 15;

void mask(const Dropout& dropout, int64_t rows, int64_t cols, uint8_t* keep,
          const Parallel& parallel) {
  const int64_t chunks = (cols + 63) / 64;  // of a row
  parallel(0, rows * chunks, kGrain / 64, [&](int64_t begin, int64_t end) {
    int64_t m = begin / chunks, chunk = begin % chunks;
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* out = keep + m * cols + chunk * 64;
      const uint64_t bits = keep_mask64(dropout, uint32_t(m), uint32_t(chunk));
      const int64_t rest = cols - chunk * 64;
      if (rest >= 64) {
        store_bits(bits, out);
      } else {
        for (int64_t k = 0; k < rest; ++k) out[k] = (bits >> k) & 1u;
      }
      if (++chunk == chunks) {
        chunk = 0;
        ++m;
      }
    }
  });
}

}  // namespace

LK_TABLE(DropoutKernels, dropout) = {mask};

}  // namespace lora_kernels
