// The block sizes: every default is within its limits and fits the cache that it is for, and what
// does not fit is refused. check_lora.cpp computes with the extremes.
#include "lora_kernels/tuning.h"

#include "check.h"

using namespace lora_kernels;

namespace {

bool same(const Tuning& a, const Tuning& b) {
  for (const Knob& knob : kKnobs)
    if (a.*knob.value != b.*knob.value) return false;
  return true;
}

void check_default(int64_t l2) {
  const Tuning t = default_tuning(l2);
  for (const Knob& knob : kKnobs)
    CHECK(knob.takes(t.*knob.value), "%s: %ld by default for %ld bytes", knob.name,
          long(t.*knob.value), long(l2));
  constexpr int64_t kTileBytes = 1024;
  const int64_t part = t.block_panels * t.nf4_k_tiles * kTileBytes;
  CHECK(t.nf4_sum_bytes + 2 * part <= l2, "the panels of a 4-bit weight do not fit %ld bytes",
        long(l2));
  CHECK(t.block_panels * t.dense_k_tiles * kTileBytes <= l2,
        "the panels of a dense weight do not fit %ld bytes", long(l2));
}

}  // namespace

int main() {
  static_assert(sizeof(Tuning) == sizeof(int64_t) * (sizeof(kKnobs) / sizeof(Knob)),
                "every member is a knob");
  for (const int64_t kib : {512, 1024, 1280, 2048, 16384}) check_default(kib << 10);
  CHECK(same(default_tuning(0), Tuning{}), "an unknown size is taken for 2 MiB");
  CHECK(same(default_tuning(int64_t(2) << 20), Tuning{}), "2 MiB is what was measured");
  CHECK(l2_bytes() >= 0 && l2_bytes() < int64_t(1) << 32, "%ld bytes of L2", long(l2_bytes()));
  CHECK(same(tuning(), default_tuning(l2_bytes())), "the default is used");

  for (const Knob& knob : kKnobs) {
    for (const int64_t v : {knob.least - 1, knob.most + 1, int64_t(-1), int64_t(0)}) {
      Tuning t = tuning();
      t.*knob.value = v;
      CHECK(!set_tuning(t), "%s took %ld", knob.name, long(v));
    }
    for (const int64_t v : {knob.least, knob.most}) {
      Tuning t = default_tuning(l2_bytes());
      t.*knob.value = v;
      CHECK(set_tuning(t) && same(tuning(), t), "%s did not take %ld", knob.name, long(v));
    }
  }
  return 0;
}
