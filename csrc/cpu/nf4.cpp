// NF4/FP4 quantise and dequantise. Results depend neither on the tier nor on the number of threads.
#include "lora_kernels/nf4.h"

#include "nf4_decode.h"
#include "nf4_encode_words.h"
#include "nf4_scales.h"
#include "nf4_stream.h"

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
  const int64_t whole = n / block_size;  // all blocks but a short last one
  int64_t first_bad = n;                 // the lowest of all threads
  parallel(0, blocks, grain_blocks(block_size), [&](int64_t begin, int64_t end) {
    const int64_t stop = at_most(end, whole);
    int64_t b = begin;
    if (b < stop) {
      const int64_t at = b * block_size;
      b += encode_blocks(quant_type, x + at, stop - b, block_size, packed + at / 2, absmax + b);
    }
    if (b == whole && b < end) {
      const int64_t at = b * block_size;
      const Encoder encoder(quant_type);
      b += encode(encoder, x + at, n - at, packed + at / 2, absmax + b) ? 1 : 0;
    }
    if (b == end) return;
    int64_t bad = b * block_size;
    while (magnitude_bits(x[bad]) < infinity_bits(x)) ++bad;
    int64_t lowest = __atomic_load_n(&first_bad, __ATOMIC_RELAXED);
    while (bad < lowest && !__atomic_compare_exchange_n(&first_bad, &lowest, bad, true,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  return first_bad < n ? first_bad : -1;
}

template <bool kPast, class Out>
void dequantize_to(const QuantView& q, Out* out, const Parallel& parallel) {
  const float* table = kCodeTable[q.quant_type];
  const int64_t whole = q.n / q.block_size;  // all blocks but a short last one
  parallel(0, q.blocks(), grain_blocks(q.block_size), [&](int64_t begin, int64_t end) {
    constexpr int64_t kScales = 256;
    alignas(64) float scales[kScales];
    for (int64_t first = begin; first < end; first += kScales) {
      const int64_t count = at_most(end - first, kScales);
      const int64_t at = first * q.block_size;
      gather_scales(q, first, count, scales);
      decode_blocks<kPast>(q.packed + at / 2, scales, at_most(whole - first, count), q.block_size,
                           table, out + at);
    }
    if (end > whole) {
      const int64_t at = whole * q.block_size;
      decode(q.packed + at / 2, q.n - at, table, q.block_scale(whole), out + at);
    }
#if LK_AVX512
    if (kPast) _mm_sfence();
#endif
  });
}

template <class Out>
void dequantize(const QuantView& q, void* data, bool past_caches, const Parallel& parallel) {
  Out* out = static_cast<Out*>(data);
  if (past_caches && reinterpret_cast<uintptr_t>(data) % 64 == 0)
    dequantize_to<true>(q, out, parallel);
  else
    dequantize_to<false>(q, out, parallel);
}

int64_t quantize_scales(const float* absmax, int64_t blocks, int64_t nested_block, const float* map,
                        float offset, uint8_t* codes, float* nested_absmax,
                        const Parallel& parallel) {
  for (int64_t i = 0; i < blocks; ++i)
    if (magnitude_bits(absmax[i]) >= infinity_bits(absmax)) return i;
  const ScaleGrid grid(map);
  const int64_t groups = (blocks + nested_block - 1) / nested_block;
  parallel(0, groups, grain_blocks(nested_block), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t at = g * nested_block;
      grid.encode(absmax + at, at_most(blocks - at, nested_block), offset, codes + at,
                  nested_absmax + g);
    }
  });
  return -1;
}

}  // namespace

LK_TABLE(Nf4Kernels, nf4) = {
    {quantize<float>, quantize<Half>, quantize<BFloat16>},
    {dequantize<float>, dequantize<Half>, dequantize<BFloat16>},
    quantize_scales,
};

}  // namespace lora_kernels
