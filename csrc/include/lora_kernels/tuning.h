// Block sizes of the CPU kernels. They decide how fast a product is; they change no bit of its
// result, as each element is summed in the same order whatever they are. Sizes that decide the
// order of a sum or fill registers are constants of the kernels instead.
#pragma once

#include <cstdint>

namespace lora_kernels {

// The defaults were measured with 2 MiB of L2 cache, 4096 x 4096 weights, 512 and 2048 rows, one
// thread.
struct Tuning {
  // Blocked products on tiles (csrc/cpu/tiles/blocked_gemm.h). A 4-bit weight and a dense one
  // have sizes of their own: to pack a dense weight takes four times the bytes. (A 4-bit weight
  // whose rows are not whole groups of one scale is slow to pack, and takes those of a dense one.)
  //
  // Tiles along K of a block of a 4-bit weight. With 16, a pair of activation panels (2 x 16 tiles)
  // takes 32 KiB of the 48 KiB of L1. Products alone, panels of 8 to 16 tiles, TFLOP/s by K tiles:
  // 12 1.75, 16 1.86, 20 1.87, 24 1.5, 64 1.3; without streaming loads 1.6 at most; with all tiles
  // loaded already 2.55. With packing between the products: 16 14.4 and 59 ms, 20 15.3 and 64, 32
  // 18.6 and 76.
  int64_t nf4_k_tiles = 16;
  // Partial sums that are kept between K blocks: rows whose sums do not fit decode the weight
  // again.
  int64_t nf4_sum_bytes = int64_t(512) << 10;
  // A dense weight: 18.4 and 68 ms; with the two sizes of a 4-bit one 18.8 and 78.
  int64_t dense_k_tiles = 72;
  int64_t dense_sum_bytes = int64_t(4) << 20;
  // Panels of a block of the weight. The activations, which no private cache holds, are read once
  // for each block: 16 14.5 and 59 ms; 8 14.9 and 68.
  int64_t block_panels = 16;
  // Activations that are packed at a time, but 512 rows at least. The weight is packed again for
  // each such piece.
  int64_t activation_bytes = int64_t(32) << 20;

  // Blocked products on fp32 vectors (csrc/cpu/vector/gemm.h): a packed block of rows takes
  // at most so many bytes, with these bounds on its rows.
  int64_t packed_bytes = int64_t(16) << 20;
  int64_t packed_fewest_rows = 96;
  int64_t packed_most_rows = 768;
};

// The most that the packers (tiles/pack.h) have room for.
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
    {"block_panels", &Tuning::block_panels, 8, kMostBlockPanels, 8},  // a chunk is eight panels
    {"activation_bytes", &Tuning::activation_bytes, 4096, int64_t(1) << 34, 4096},
    {"packed_bytes", &Tuning::packed_bytes, 4096, int64_t(1) << 34, 4096},
    {"packed_fewest_rows", &Tuning::packed_fewest_rows, 1, 1 << 16, 1},
    {"packed_most_rows", &Tuning::packed_most_rows, 1, 1 << 16, 1},
};

// Of a core of this machine; 0 where the system does not tell.
int64_t l2_bytes();
// By the size of the L2 cache, 0 being unknown.
Tuning default_tuning(int64_t l2);

// The block sizes in use: this machine's defaults, or what was set. Kernels read them once a call.
const Tuning& tuning();
// Returns false and changes nothing if a value is not allowed. Not to be called while kernels run.
bool set_tuning(const Tuning& t);

}  // namespace lora_kernels
