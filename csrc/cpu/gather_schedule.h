// How threads share the work of the passes over rank pages (gather.h).
#pragma once

#include "lora_kernels/gather.h"

namespace lora_kernels {
namespace {

// Columns of a word of the dropout mask. Threads divide columns at its multiples.
constexpr int64_t kWord = 64;

LK_INLINE int64_t pages_of(const SlotGroup& g) { return (g.rank + kPage - 1) / kPage; }

template <class P>
LK_INLINE const P* page_row(const GatherPass& f, const SlotGroup& g, int64_t rank) {
  const int64_t row = g.pages[rank / kPage] * kPage + rank % kPage;
  return static_cast<const P*>(f.pages) + row * f.columns;
}

// The work of a group: `count` units, each of about this cost.
struct Work {
  int64_t count, cost;
};

// Calls fn(group, first, end) for ranges of units, so that every thread gets about the same cost.
template <class Of, class Fn>
void for_each_unit(const GatherPass& f, const Parallel& parallel, const Of& of, const Fn& fn) {
  int64_t total = 0;
  for (int64_t i = 0; i < f.group_count; ++i) {
    const Work u = of(f.groups[i]);
    total += u.count * u.cost;
  }
  // The units of all groups lie end to end on a line, each as long as its cost, and threads share
  // the line evenly. A unit that reaches into two shares belongs to the one in which it begins.
  parallel(0, total, 1, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < f.group_count && first < end; ++i) {
      const Work u = of(f.groups[i]);
      const int64_t next = first + u.count * u.cost;
      if (next > begin) {
        const int64_t from = begin > first ? (begin - first + u.cost - 1) / u.cost : 0;
        const int64_t to = end < next ? (end - first + u.cost - 1) / u.cost : u.count;
        if (from < to) fn(f.groups[i], from, to);
      }
      first = next;
    }
  });
}

// Calls fn(group, first column, end) until every group has had all columns. Where a token is in
// several groups, threads share only the columns, so that the groups add to a token in their order.
template <class Fn>
void for_each_column_block(const GatherPass& f, const Parallel& parallel, const Fn& fn) {
  const auto upto = [&](int64_t c) { return c < f.columns ? c : f.columns; };
  if (f.repeats) {
    parallel(0, (f.columns + kWord - 1) / kWord, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < f.group_count; ++i) fn(f.groups[i], begin * kWord, upto(end * kWord));
    });
    return;
  }
  constexpr int64_t kPiece = 8 * kWord;
  const int64_t pieces = (f.columns + kPiece - 1) / kPiece;
  for_each_unit(
      f, parallel, [&](const SlotGroup& g) { return Work{pieces, 2 * pages_of(g) + g.count}; },
      [&](const SlotGroup& g, int64_t from, int64_t to) {
        fn(g, from * kPiece, upto(to * kPiece));
      });
}

}  // namespace
}  // namespace lora_kernels
