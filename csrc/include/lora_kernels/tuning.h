// Sizes of the CPU kernels' blocks: they decide how fast a product is and not a bit of its result,
// as an element is summed in the same order whatever they are. Sizes that set an order of summation
// or fill registers stay constants of the kernels.
#pragma once

#include <cstdint>

namespace lora_kernels {

// The defaults were measured with 2 MiB of L2 cache, 4096 x 4096 weights, 512 and 2048 rows, one
// thread.
struct Tuning {
  // Long products on AMX tiles (csrc/cpu/amx/blocked_gemm.h): a weight whose tiles are cheap to
  // make (NF4), and one whose making reads four times the bytes or takes a detour.
  //
  // Tiles of a part of the reduction. A pair of activation strips, 2 x 16 tiles, takes 32 KiB of
  // the 48 KiB of L1. Products alone, strips of 8 to 16 tiles, by depth, in TFLOP/s: 12 1.75,
  // 16 1.86, 20 1.87, 24 1.5, 64 1.3; no operand streaming 1.6 at most; tiles that are already
  // loaded 2.55. With the decoding between the products: 16 14.4 and 59 ms, 20 15.3 and 64,
  // 32 18.6 and 76.
  int64_t nf4_k_tiles = 16;
  // Rows whose sums fit meet a block together; others read the weight again.
  int64_t nf4_sum_bytes = int64_t(512) << 10;
  // A dense weight: 18.4 and 68 ms; with the two sizes of cheap tiles 18.8 and 78.
  int64_t dense_k_tiles = 72;
  int64_t dense_sum_bytes = int64_t(4) << 20;
  // Strips of a block of the weight. The activations, which are in no private cache, are read once
  // a block: 16 14.5 and 59 ms; 8 14.9 and 68.
  int64_t block_panels = 16;
  // Activations packed at a time, at most (but 512 rows); the weight is made into tiles again for
  // each piece.
  int64_t activation_bytes = int64_t(32) << 20;

  // Blocked products on fp32 vectors (csrc/cpu/vector/gemm.h): a packed block of rows takes this
  // many bytes at most, but has so many rows at least, and at most.
  int64_t packed_bytes = int64_t(16) << 20;
  int64_t packed_fewest_rows = 96;
  int64_t packed_most_rows = 768;
};

// What a part's row and a block's column of chunks find room for in the feeders (amx/pack.h).
constexpr int64_t kMostKTiles = 512, kMostBlockPanels = 128;

// A member of Tuning and the values it takes: multiples of `unit`.
struct Knob {
  const char* name;
  int64_t Tuning::* value;
  int64_t least, most, unit;

  bool takes(int64_t v) const;
};

constexpr Knob kKnobs[] = {
    {"nf4_k_tiles", &Tuning::nf4_k_tiles, 4, kMostKTiles, 4},  // a chunk of 128 is four tiles
    {"nf4_sum_bytes", &Tuning::nf4_sum_bytes, 4096, int64_t(1) << 30, 4096},
    {"dense_k_tiles", &Tuning::dense_k_tiles, 4, kMostKTiles, 4},
    {"dense_sum_bytes", &Tuning::dense_sum_bytes, 4096, int64_t(1) << 30, 4096},
    {"block_panels", &Tuning::block_panels, 8, kMostBlockPanels, 8},  // a chunk is eight strips
    {"activation_bytes", &Tuning::activation_bytes, 4096, int64_t(1) << 34, 4096},
    {"packed_bytes", &Tuning::packed_bytes, 4096, int64_t(1) << 34, 4096},
    {"packed_fewest_rows", &Tuning::packed_fewest_rows, 1, 1 << 16, 1},
    {"packed_most_rows", &Tuning::packed_most_rows, 1, 1 << 16, 1},
};

// Of a core of this machine; 0 where the system does not tell.
int64_t l2_bytes();
// By the size of the L2 cache, 0 being unknown.
Tuning default_tuning(int64_t l2);

// The one in use: the default of this machine, or what was set. Kernels read it once a call.
const Tuning& tuning();
// False, and no change, where a knob does not take its value. Not to be called while kernels run.
bool set_tuning(const Tuning& t);

}  // namespace lora_kernels
