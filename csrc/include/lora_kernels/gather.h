// Many adapters in one batch: passes over rank pages, and the table of their CPU kernels.
//
// A page holds 16 rows of A, or of Bᵀ; an adapter of rank r has ceil(r / 16), the last with rows
// past its rank that are never read. Entries (a token and the adapter it uses) come sorted by slot,
// in groups. Sums are in fp32 and in a fixed order: a result depends on its own entry alone, not on
// what else is in the batch nor on the number of threads.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/linear.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

constexpr int64_t kPage = 16;  // ranks

// The entries of one slot: [begin, end) of those sorted, and its adapter's pages.
struct SlotGroup {
  int64_t begin, end;
  int64_t rank;  // 0: no adapter
  const int32_t* pages;
  int64_t slot;  // -1: none
};

// Of each slot its own, [S]; null seeds: none. rows: of the mask, by sorted entry.
struct SlotDropout {
  const int64_t* seeds;
  const int32_t* thresholds;
  const int32_t* rows;
  uint32_t stream;
};

struct GatherPass {
  const void* pages;  // [P, 16, columns]
  Dtype dtype;        // of the pages
  int64_t columns;
  const SlotGroup* groups;
  int64_t group_count;
  const int32_t* tokens;  // by sorted entry
  float* sums;            // by sorted entry, `width` apart: as many as its slot's rank
  int64_t width;
  SlotDropout dropout;
};

struct GatherKernels {
  // sums[e, j] = Σ_c drop(m[token, c]) · page row j [c]
  void (*shrink)(const GatherPass&, const MatrixView& m, const Parallel&);
  // out[token, c] (+)= factor[e] · drop'(Σ_j sums[e, j] · page row j [c]); drop' scales and masks.
  // A token that has two entries is added to twice: then out should be fp32.
  void (*expand)(const GatherPass&, const float* factor, bool overwrite, const MatrixView& out,
                 const Parallel&);
  // page row j [c] of `pages` = Σ_e sums[e, j] · drop(m[token, c]); zeros past the rank. Pages that
  // no group names are left alone.
  void (*outer)(const GatherPass&, const MatrixView& m, const Parallel&);
  // out = (overwrite ? 0 : out) + sums [rows, columns] contiguous fp32
  void (*add)(const float* sums, bool overwrite, const MatrixView& out, const Parallel&);
};

LK_DECLARE_FAMILY(GatherKernels, gather)

}  // namespace lora_kernels
