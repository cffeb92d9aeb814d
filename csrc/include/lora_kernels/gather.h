// Many adapters in one batch: passes over rank pages, and the table of their CPU kernels.
//
// A page holds 16 rank rows of A, or of Bᵀ. An adapter of rank r has ceil(r / 16) pages; rows of
// the last one past its rank enter no sum. An entry is a pair of a token and the slot of its
// adapter; a group lists the entries of one slot. Sums are in fp32 and in a fixed order: the result
// of an entry depends neither on what else is in the batch nor on the number of threads.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/matrix.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

constexpr int64_t kPage = 16;  // ranks

// The entries of one slot, and the pages of its adapter.
struct SlotGroup {
  const int32_t* entries;
  int64_t count;
  int64_t rank;  // 0: no adapter
  const int32_t* pages;
  int64_t slot;  // -1: none
};

// Dropout of each slot: seeds (null: none) and thresholds by slot, rows of the mask by entry.
struct SlotDropout {
  const int64_t* seeds;
  const int32_t* thresholds;
  const int32_t* rows;
  uint32_t stream;
};

struct GatherPass {
  const void* pages;  // [P, 16, columns]
  Dtype dtype;        // of the pages
  Dtype activations;  // of x; sums are rounded to it where it is 16-bit and the pages are too
  int64_t columns;
  const SlotGroup* groups;
  int64_t group_count;
  bool repeats;           // a token may be in several groups: they add to it in their order
  const int32_t* tokens;  // by entry
  float* sums;            // [entries, width]; an entry has as many as its slot's rank
  int64_t width;
  SlotDropout dropout;
};

struct GatherKernels {
  // sums[e, j] = Σ_c drop(m[token, c]) · page row j [c]; rounded to rank_dtype they also go to s
  // [entries, ..], rows `stride` apart, if it is not null. False: out of memory.
  bool (*shrink)(const GatherPass&, const MatrixView& m, void* s, int64_t stride, const Parallel&);
  // out[token, c] (+)= factor[e] · drop'(Σ_j sums[e, j] · page row j [c]); drop' scales and masks.
  // A group must not have a token twice. False: out of memory.
  bool (*expand)(const GatherPass&, const float* factor, bool overwrite, const MatrixView& out,
                 const Parallel&);
  // page row j [c] of `pages` = Σ_e sums[e, j] · drop(m[token, c]); zeros past the rank. A slot
  // must not be in two groups. Pages of no group are left alone. False: out of memory.
  bool (*wgrad)(const GatherPass&, const MatrixView& m, const Parallel&);
  // out[rows] = (overwrite ? 0 : out) + sums [rows, columns] contiguous fp32; rows that are not
  // `touched` keep their bits, or become zeros.
  void (*add)(const float* sums, const uint8_t* touched, bool overwrite, const MatrixView& out,
              const Parallel&);
};

LK_DECLARE_FAMILY(GatherKernels, gather)

}  // namespace lora_kernels
