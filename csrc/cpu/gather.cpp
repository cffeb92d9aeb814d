// Passes over rank pages (gather.h): bf16 on AMX tiles where there are any, everything else on fp32
// vectors.
//
// FLOPs: 2 r (K + N) an entry. Bytes it cannot avoid: the pages of the adapters in use, x and y,
// once each. With one or two entries for each adapter the time is that of reading the pages.
#include "lora_kernels/gather.h"

#include "tiles/gather_expand.h"
#include "tiles/gather_wgrad.h"
#include "vector/gather.h"

namespace lora_kernels {

#if LK_AMX

namespace {

// The number of entries must not matter here: a token's result must not depend on the rest of the
// batch.
bool on_tiles(const GatherPass& f) {
  return f.activations == Dtype::bf16 && f.dtype == Dtype::bf16;
}

bool shrink(const GatherPass& f, const MatrixView& m, void* s, int64_t stride,
            const Parallel& parallel) {
  return on_tiles(f) ? shrink_tiles(f, m, s, stride, parallel)
                     : vector::shrink(f, m, s, stride, parallel);
}

bool expand(const GatherPass& f, const float* factor, bool overwrite, const MatrixView& out,
            const Parallel& parallel) {
  return on_tiles(f) ? expand_tiles(f, factor, overwrite, out, parallel)
                     : vector::expand(f, factor, overwrite, out, parallel);
}

bool wgrad(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  return on_tiles(f) ? wgrad_tiles(f, m, parallel) : vector::wgrad(f, m, parallel);
}

}  // namespace

LK_TABLE(GatherKernels, gather) = {shrink, expand, wgrad, vector::add_sums};

#else

LK_TABLE(GatherKernels, gather) = {vector::shrink, vector::expand, vector::wgrad, vector::add_sums};

#endif

}  // namespace lora_kernels
