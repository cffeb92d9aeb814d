// What the NF4/FP4 linear kernel loads: codes with their scales, and x.
#pragma once

#include "nf4_linear.cuh"

namespace lora_kernels {
namespace nf4_linear {

struct Call {
  Nf4Linear c;
  float* parts;         // [splits, M, part_ld], where K is split
  int64_t part_ld;      // N rounded up to 4
  int steps;            // of kStep in K
  int steps_per_split;  // of a block
  int block_shift;      // log2 of the block size
  int nested_shift;     // log2 of the nested block size
};

// The run of codes of each of a lane's four rows, and their scales.
template <class S, bool kNested>
struct Runs {
  uint32_t code[kRunRows][S::kRun / 8];
  std::conditional_t<kNested, uint32_t, float> scale[kRunRows];  // nested: its code
};

// Makes a value opaque to the compiler, so that it is kept and not computed again in each step.
__device__ inline void keep(int& v) { asm volatile("" : "+r"(v)); }
__device__ inline void keep(unsigned& v) { asm volatile("" : "+r"(v)); }
template <class T>
__device__ void keep(const T*& v) {
  asm volatile("" : "+l"(v));
}

// Loads the runs of one step after the other, where rows are whole quantisation blocks and all
// addresses are aligned for wide loads. Pointers stay the same and an index moves, so an address is
// one multiply-add. Rows past N read the last row again; their results are not stored. Past K
// nothing is loaded: x is zero there.
template <class S, bool kNested>
class Loader {
 public:
  __device__ Loader(const Call& call, int64_t row, int k, int k_end)
      : q_(call.c.q),
        block_shift_(call.block_shift),
        nested_shift_(call.nested_shift),
        k_(k),
        k_end_(k_end) {
    const Nf4Linear& c = call.c;
#pragma unroll
    for (int i = 0; i < kRunRows; ++i) {
      const int64_t n = min(row + 8 * i, c.n - 1);
      codes_[i] = reinterpret_cast<const Wide*>(c.q.packed + n * (c.k >> 1));
      block_[i] = static_cast<int>(n * (c.k >> call.block_shift));
      scales_[i] = c.q.absmax + block_[i];
      keep(block_[i]);
      keep(codes_[i]);
      keep(scales_[i]);
      nested_[i] = 0.0f;
    }
  }
  __device__ void load(Runs<S, kNested>& runs) {
    unsigned run = static_cast<unsigned>(k_) / S::kRun;
    keep(run);
    if (k_ < k_end_) {
#pragma unroll
      for (int i = 0; i < kRunRows; ++i) {
        const Wide wide = __ldg(codes_[i] + run);
        __builtin_memcpy(runs.code[i], &wide, sizeof(wide));
      }
      const unsigned block = static_cast<unsigned>(k_) >> block_shift_;
#pragma unroll
      for (int i = 0; i < kRunRows; ++i) {
        if constexpr (kNested) {
          const unsigned at = block_[i] + block;
          runs.scale[i] = __ldg(q_.absmax8 + at);
          const unsigned before =
              block_[i] + (static_cast<unsigned>(k_ - S::kStep) >> block_shift_);
          if (first_ || (at ^ before) >> nested_shift_)  // another group of nested scales
            nested_[i] = __ldg(q_.nested_absmax + (at >> nested_shift_));
        } else {
          runs.scale[i] = __ldg(scales_[i] + block);
        }
      }
    }
    first_ = false;
    k_ += S::kStep;
  }
  // The fp32 scale of row i of the run that was loaded last.
  __device__ float scale(const Runs<S, kNested>& runs, int i, const float* map,
                         float offset) const {
    if constexpr (kNested)
      return __fadd_rn(__fmul_rn(map[runs.scale[i]], nested_[i]), offset);
    else
      return runs.scale[i];
  }

 private:
  using Wide = std::conditional_t<S::kRun == 32, uint4, uint2>;
  const DeviceQuantView& q_;
  const Wide* codes_[kRunRows];
  const float* scales_[kRunRows];
  int block_[kRunRows];
  float nested_[kRunRows];  // loaded again where another group begins
  bool first_ = true;
  int block_shift_, nested_shift_;
  int k_, k_end_;
};

// Brings x into shared memory step after step, zeros past K. Lanes take pairs of units, so that
// global memory is read by sectors, of eight tokens and lanes t, so that shared memory has no
// conflicts.
template <class S, bool kAligned>
class Stager {
 public:
  using T = typename S::T;
  // Steps that are fetched at a time, with one barrier for all of them; half of the ring at most.
  static constexpr int kFetch = kAligned && S::kStages > 2 ? 2 : 1;
  __device__ Stager(const T* x, int64_t ldx, int tokens, int k0, int k_end)
      : ldx_(ldx), k_end_(k_end) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int chunk = warp % S::kDepthWarps;
    const int u = warp % kPairs / S::kDepthWarps * 2 + (lane >> 4);
    const int t = lane & 3, token = warp / kPairs * 4 + (lane >> 2 & 3);
    k_ = k0 + chunk * S::kChunk + t * S::kRun + u * S::kUnit;
    left_ = tokens - token;
    from_ = x + token * ldx + k_;
    to_ = unit_offset((chunk * S::kRunUnits + u) * S::kTiles * 32 + token * 4 + t);
    keep(left_);
    keep(to_);
  }
  // The next kFetch steps, into the stages from `stage` on.
  __device__ void fetch(uint8_t* stage) {
#pragma unroll
    for (int step = 0; step < kFetch; ++step) {
      const int k = k_ + step * S::kStep;
#pragma unroll
      for (int i = 0; i < S::kTokens / kTokens; ++i) {
        const T* from = from_ + i * kTokens * ldx_ + step * S::kStep;
        uint8_t* to = stage + to_ + step * 2 * S::kStageBytes + i * kTokens / 2 * kLine;
        const bool there = i * kTokens < left_;
        if constexpr (kAligned) {  // units are whole inside K
          asm volatile(
              "{ .reg .pred p; setp.eq.b32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; "
              "}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
              "l"(from), "r"(int(there && k < k_end_))
              : "memory");
        } else if (there) {
          alignas(16) T unit[S::kUnit];
#pragma unroll
          for (int e = 0; e < S::kUnit; ++e)
            unit[e] = k + e < k_end_ ? from[e] : Math<T>::round(0.0f);
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(unit);
        }
      }
    }
    from_ += kFetch * S::kStep;
    k_ += kFetch * S::kStep;
  }

 private:
  static constexpr int kPairs =
      S::kDepthWarps * S::kRunUnits / 2;  // of units, of a token and lane t
  static_assert(S::kWarps % kPairs == 0, "a warp keeps to one pair");
  static constexpr int kTokens = S::kWarps / kPairs * 4;  // of all warps at once
  const T* from_;
  int64_t ldx_;
  int k_, k_end_, left_, to_;
};

template <int kGroups>
__device__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Runs of any rows, loaded byte by byte. Codes past K are those of zero. A run may have two scales:
// the second from element `cut` on.
template <class S>
struct RaggedRuns {
  uint32_t code[kRunRows][S::kRun / 8];
  float scale[kRunRows], next_scale[kRunRows];
  int cut[kRunRows];
};

__device__ inline float ragged_scale(const Call& call, const float* map, int64_t block) {
  const DeviceQuantView& q = call.c.q;
  if (q.absmax != nullptr) return __ldg(q.absmax + block);
  const float product =
      __fmul_rn(map[__ldg(q.absmax8 + block)], __ldg(q.nested_absmax + block / q.nested_block));
  return __fadd_rn(product, __ldg(q.nested_offset));
}

template <class S>
__device__ void load_ragged(RaggedRuns<S>& runs, const Call& call, const float* map, int64_t row,
                            int k) {
  const Nf4Linear& c = call.c;
  const uint32_t zero = c.q.quant_type == kNf4 ? 7 : 0;
#pragma unroll
  for (int i = 0; i < kRunRows; ++i) {
    const int64_t n = row + 8 * i, first = n * c.k + k;
    const int count = n < c.n ? min(max(static_cast<int>(c.k) - k, 0), S::kRun) : 0;
#pragma unroll
    for (int word = 0; word < S::kRun / 8; ++word) {
      uint32_t codes = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int64_t at = first + 8 * word + e;
        uint32_t code = zero;
        if (8 * word + e < count) code = c.q.packed[at >> 1] >> (at & 1 ? 0 : 4) & 15;
        codes |= code << (4 * (e ^ 1));
      }
      runs.code[i][word] = codes;
    }
    const int64_t block = first >> call.block_shift;
    runs.scale[i] = runs.next_scale[i] = 0.0f;
    runs.cut[i] = static_cast<int>(((block + 1) << call.block_shift) - first);
    if (count > 0) runs.scale[i] = ragged_scale(call, map, block);
    if (count > runs.cut[i]) runs.next_scale[i] = ragged_scale(call, map, block + 1);
  }
}

}  // namespace nf4_linear
}  // namespace lora_kernels
