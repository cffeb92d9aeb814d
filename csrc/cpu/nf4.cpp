// NF4/FP4 quantise and dequantise. Results depend neither on the tier nor on the number of threads.
#include "lora_kernels/nf4.h"

#include "nf4_decode.h"
#include "nf4_encode.h"

namespace lora_kernels {
namespace {

// Elements that a thread takes at least: some tens of microseconds of work.
constexpr int64_t kGrain = 1 << 15;

LK_INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
LK_INLINE int64_t grain_blocks(int64_t block_size) {
  return (kGrain + block_size - 1) / block_size;
}

template <class In>
int64_t quantize(const void* data, int64_t n, int64_t block_size, int quant_type, uint8_t* packed,
                 float* absmax, const Parallel& parallel) {
  const In* x = static_cast<const In*>(data);
  const int64_t blocks = (n + block_size - 1) / block_size;
  int64_t first_bad = n;  // the lowest of all threads
  parallel(0, blocks, grain_blocks(block_size), [&](int64_t begin, int64_t end) {
    const Encoder encoder(quant_type);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * block_size;
      const int64_t count = at_most(n - at, block_size);
      if (encode(encoder, x + at, count, packed + at / 2, absmax + b)) continue;
      int64_t bad = at;
      while (magnitude_bits(x[bad]) < infinity_bits(x)) ++bad;
      int64_t lowest = __atomic_load_n(&first_bad, __ATOMIC_RELAXED);
      while (bad < lowest && !__atomic_compare_exchange_n(&first_bad, &lowest, bad, true,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
      return;
    }
  });
  return first_bad < n ? first_bad : -1;
}

template <class Out>
void dequantize(const QuantView& q, void* data, const Parallel& parallel) {
  Out* out = static_cast<Out*>(data);
  const float* table = kCodeTable[q.quant_type];
  parallel(0, q.blocks(), grain_blocks(q.block_size), [&](int64_t begin, int64_t end) {
    constexpr int64_t kScales = 256;
    float scales[kScales];
    for (int64_t first = begin; first < end; first += kScales) {
      const int64_t count = at_most(end - first, kScales);
      q.block_scales(first, count, scales);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * q.block_size;
        decode(q.packed + at / 2, at_most(q.n - at, q.block_size), table, scales[i], out + at);
      }
    }
  });
}

}  // namespace

LK_TABLE(Nf4Kernels, nf4) = {
    {quantize<float>, quantize<Half>, quantize<BFloat16>},
    {dequantize<float>, dequantize<Half>, dequantize<BFloat16>},
};

}  // namespace lora_kernels
