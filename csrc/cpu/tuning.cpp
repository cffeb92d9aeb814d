#include "lora_kernels/tuning.h"

#include <unistd.h>

#include <fstream>
#include <string>

namespace lora_kernels {

namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

// Linux describes the caches of a core as index0, index1, ..., a size as "2048K".
int64_t l2_bytes_of_sysfs() {
  const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index";
  for (int i = 0;; ++i) {
    std::ifstream level_file(folder + std::to_string(i) + "/level");
    int level = 0;
    if (!(level_file >> level)) return 0;
    std::ifstream size_file(folder + std::to_string(i) + "/size");
    int64_t kib = 0;
    char unit = 0;
    if (level == 2 && size_file >> kib >> unit && unit == 'K') return kib * kKiB;
  }
}

Tuning& in_use() {
  static Tuning t = default_tuning(l2_bytes());
  return t;
}

}  // namespace

bool Knob::takes(int64_t v) const { return v >= least && v <= most && v % unit == 0; }

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return l2_bytes_of_sysfs();
}

Tuning default_tuning(int64_t l2) {
  Tuning t;
  if (l2 == 0 || l2 >= 2 * kMiB) return t;
  // Computed, not measured. As with 2 MiB, the sums and the two buffers of a 4-bit weight take half
  // of the cache; the one buffer of a dense weight takes 9/16 of it.
  t.block_panels /= 2;
  const int64_t smaller = l2 >= kMiB ? 2 : 4;
  t.nf4_sum_bytes /= smaller;
  t.dense_sum_bytes /= smaller;
  if (smaller == 4) {
    t.nf4_k_tiles /= 2;
    t.dense_k_tiles /= 2;
  }
  return t;
}

const Tuning& tuning() { return in_use(); }

bool set_tuning(const Tuning& t) {
  for (const Knob& knob : kKnobs)
    if (!knob.takes(t.*knob.value)) return false;
  in_use() = t;
  return true;
}

}  // namespace lora_kernels
