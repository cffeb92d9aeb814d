// The grid of the NF4/FP4 linear kernel, and its launches for each type.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "nf4_linear_load.cuh"

namespace lora_kernels {
namespace nf4_linear {

// Split-K: K is cut into `splits` parts of `steps_per_split` steps each; the last may be shorter.
struct Plan {
  int64_t groups, steps, steps_per_split, splits;
};

// Splits K until there are two blocks of a narrow tile for every multiprocessor, or one of a wide
// tile, as long as there are steps to share. Each further part costs 8 bytes of workspace traffic
// per output.
template <class S>
Plan plan(int64_t m, int64_t n, int64_t k) {
  const int64_t cores = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  Plan p;
  p.groups = ceil_div(n, kRows);
  p.steps = ceil_div(k, S::kStep);
  const int64_t blocks = std::max<int64_t>(p.groups * ceil_div(m, S::kTokens), 1);
  const int64_t splits = ceil_div(S::kNarrow ? 2 * cores : cores, blocks);
  p.steps_per_split = std::max<int64_t>(p.steps / splits, 1);
  p.splits = std::max<int64_t>(ceil_div(p.steps, p.steps_per_split), 1);
  return p;
}

// The launches of one type of x (nf4_linear_run.cuh); a file of its own for each, so that they
// compile side by side.
template <class T>
cudaError_t run_tokens(Call& call, float* workspace, cudaStream_t stream);

}  // namespace nf4_linear
}  // namespace lora_kernels
