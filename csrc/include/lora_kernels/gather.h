// Many adapters in one batch: passes over rank pages, and the table of their CPU kernels.
//
// A page holds 16 rows of A, or of Bᵀ; an adapter of rank r has ceil(r / 16), the last with rows
// past its rank that enter no sum. An entry is a token and the adapter that it uses; groups list
// the entries of an adapter. Sums are in fp32 and in a fixed order: a result depends on its own
// entry alone, not on what else is in the batch nor on the number of threads.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/matrix.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

constexpr int64_t kPage = 16;  // ranks

// Entries of one slot, and its adapter's pages.
struct SlotGroup {
  const int32_t* entries;
  int64_t count;
  int64_t rank;  // 0: no adapter
  const int32_t* pages;
  int64_t slot;  // -1: none
};

// Seeds and thresholds by slot, null: none; the mask's rows by entry.
struct SlotDropout {
  const int64_t* seeds;
  const int32_t* thresholds;
  const int32_t* rows;
  uint32_t stream;
};

struct GatherPass {
  const void* pages;  // [P, 16, columns]
  Dtype dtype;        // of the pages
  Dtype activations;  // of x: what the sums are rounded to beside pages of the same 16-bit type
  int64_t columns;
  const SlotGroup* groups;
  int64_t group_count;
  bool repeats;           // a token may be in several groups, which then add to it in their order
  const int32_t* tokens;  // by entry
  float* sums;            // by entry, `width` apart: as many as its slot's rank
  int64_t width;
  SlotDropout dropout;
};

struct GatherKernels {
  // sums[e, j] = Σ_c drop(m[token, c]) · page row j [c]; also to s [entries, ..] of rank_dtype,
  // rows `stride` apart, where not null. False: out of memory.
  bool (*shrink)(const GatherPass&, const MatrixView& m, void* s, int64_t stride, const Parallel&);
  // out[token, c] (+)= factor[e] · drop'(Σ_j sums[e, j] · page row j [c]); drop' scales and masks.
  // No token twice in a group. False: out of memory.
  bool (*expand)(const GatherPass&, const float* factor, bool overwrite, const MatrixView& out,
                 const Parallel&);
  // page row j [c] of `pages` = Σ_e sums[e, j] · drop(m[token, c]); zeros past the rank. Every slot
  // in one group; pages that no group names are left alone. False: out of memory.
  bool (*wgrad)(const GatherPass&, const MatrixView& m, const Parallel&);
  // out[rows] = (overwrite ? 0 : out) + sums [rows, columns] contiguous fp32; rows that are not
  // `touched` keep their bits, or become zeros.
  void (*add)(const float* sums, const uint8_t* touched, bool overwrite, const MatrixView& out,
              const Parallel&);
};

LK_DECLARE_FAMILY(GatherKernels, gather)

}  // namespace lora_kernels
