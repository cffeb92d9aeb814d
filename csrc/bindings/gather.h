// The arguments of the multi-adapter ops (lora_kernels/ops/gather/schema.py). Their values are
// checked too: every slot, token and page that they name must exist before any memory is read.
#pragma once

#include "bindings/lora.h"
#include "lora_kernels/gather.h"

namespace lora_kernels {

inline void check_range(const std::string& name, int64_t value, const char* at, int64_t index,
                        int64_t low, int64_t end) {
  LK_CHECK(value >= low && value < end, name, ": got ", value, " at ", at, index, ", expected ",
           low, " to ", end - 1);
}

// The entries (a token and a slot each), sorted by slot. Where tokens have several entries they are
// also sorted by turn: turn i holds the i-th entry of every token, so that the entries of a token
// are added in the order in which they are given, whatever their slots.
struct Entries {
  int64_t count, slots, rows;
  bool mixture;                    // tokens are given: one may have no entry, or several
  bool repeats = false;            // some token has several entries with a slot
  std::vector<int32_t> tokens;     // by entry
  const float* weights = nullptr;  // by entry; null: ones
  struct Run {
    int64_t slot, begin, end;
  };
  struct Order {
    std::vector<int32_t> entries;
    std::vector<Run> runs;  // the entries of a slot (of a turn) are consecutive, in their order
  };
  Order by_slot, by_turn;  // by_turn: those with a slot; empty unless `repeats`

  float weight(int64_t e) const { return weights != nullptr ? weights[e] : 1.0f; }
  const Order& in_order() const { return repeats ? by_turn : by_slot; }

  Entries(const std::vector<Tensor>& entries, int64_t slot_count, int64_t token_count)
      : slots(slot_count), rows(token_count) {
    LK_CHECK(entries.size() == 1 || entries.size() == 3, "entries: got ", entries.size(),
             " tensors, expected 1 or 3");
    mixture = entries.size() == 3;
    check_shape("slots", entries[0], {-1});
    count = mixture ? entries[0].size(0) : rows;
    check_cpu("slots", entries[0], ScalarType::Int, {count});
    if (mixture) {
      check_cpu("tokens", entries[1], ScalarType::Int, {count});
      check_cpu("weights", entries[2], ScalarType::Float, {count});
      weights = data<float>(entries[2]);
    }
    LK_CHECK(count < INT32_MAX && rows < INT32_MAX, "slots: got ", count, " entries of ", rows,
             " tokens, expected fewer than 2^31");
    const int32_t* slot = data<int32_t>(entries[0]);
    for (int64_t e = 0; e < count; ++e) check_range("slots", slot[e], "", e, -1, slots);
    tokens.resize(size_t(count));
    for (int64_t e = 0; e < count; ++e) {
      tokens[size_t(e)] = mixture ? data<int32_t>(entries[1])[e] : int32_t(e);
      if (mixture) check_range("tokens", tokens[size_t(e)], "", e, 0, rows);
    }
    sort_by_slot(slot);
    if (mixture) sort_by_turn();
  }

 private:
  void sort_by_slot(const int32_t* slot) {
    std::vector<int32_t> at(size_t(slots + 2), 0);
    for (int64_t e = 0; e < count; ++e) ++at[size_t(slot[e] + 2)];
    for (int64_t i = 0; i <= slots; ++i) {
      const int32_t begin = at[size_t(i)], size = at[size_t(i + 1)];
      if (size > 0) by_slot.runs.push_back({i - 1, begin, begin + size});
      at[size_t(i + 1)] += begin;
    }
    by_slot.entries.resize(size_t(count));
    for (int64_t e = 0; e < count; ++e)
      by_slot.entries[size_t(at[size_t(slot[e] + 1)]++)] = int32_t(e);
  }

  void sort_by_turn() {
    std::vector<int32_t> seen(size_t(rows), 0), turn(size_t(count), -1), at(2, 0);
    std::vector<char> taken(size_t(count), 0);
    for (const Run& run : by_slot.runs)
      for (int64_t i = run.begin; i < run.end; ++i)
        taken[size_t(by_slot.entries[size_t(i)])] = run.slot >= 0;
    for (int64_t e = 0; e < count; ++e) {
      if (!taken[size_t(e)]) continue;
      const size_t of = size_t(turn[size_t(e)] = seen[size_t(tokens[size_t(e)])]++);
      if (at.size() < of + 2) at.push_back(0);
      ++at[of + 1];
    }
    repeats = at.size() > 2;
    if (!repeats) return;
    for (size_t i = 1; i < at.size(); ++i) at[i] += at[i - 1];
    by_turn.entries.resize(size_t(at.back()));
    std::vector<int64_t> last(at.size(), -2);  // by turn: the slot of its last run
    std::vector<std::vector<Run>> runs(at.size() - 1);
    for (const Run& run : by_slot.runs) {
      if (run.slot < 0) continue;
      for (int64_t i = run.begin; i < run.end; ++i) {
        const int32_t e = by_slot.entries[size_t(i)];
        const size_t of = size_t(turn[size_t(e)]);
        const int64_t to = at[of]++;
        if (last[of] != run.slot) runs[of].push_back({run.slot, to, to});
        last[of] = run.slot;
        runs[of].back().end = to + 1;
        by_turn.entries[size_t(to)] = e;
      }
    }
    for (const auto& of : runs) by_turn.runs.insert(by_turn.runs.end(), of.begin(), of.end());
  }
};

// One projection: its pages, and the adapters that the groups of entries use.
struct Projection {
  const Tensor *a, *b;
  Dtype dtype;
  int64_t n, width;             // outputs; the largest rank of a slot
  int64_t column, rank_column;  // its first column in y and in s
  const int32_t *table, *ranks;
  const float* scales;
  std::vector<SlotGroup> groups, turns;  // of by_slot; of in_order
  std::vector<float> factor;             // weight · scale, by entry
  bool used = false;                     // some entry has an adapter here

  int64_t rank(int64_t slot) const { return slot >= 0 ? ranks[slot] : 0; }
};

inline std::vector<SlotGroup> groups_of(const Projection& p, const Entries::Order& order) {
  std::vector<SlotGroup> groups;
  groups.reserve(order.runs.size());
  for (const Entries::Run& run : order.runs)
    groups.push_back({order.entries.data() + run.begin, run.end - run.begin, p.rank(run.slot),
                      run.slot >= 0 ? p.table + run.slot * (p.width / kPage) : nullptr, run.slot});
  return groups;
}

// Checks what the tensors hold for a slot that is used.
inline void check_slot(const std::string& name, const Projection& p, int64_t slot) {
  check_range(name + ".ranks", p.ranks[slot], "slot ", slot, 0, p.width + 1);
  for (int64_t c = 0; c * kPage < p.ranks[slot]; ++c) {
    const int64_t page = p.table[slot * (p.width / kPage) + c];
    LK_CHECK(page >= 0 && page < p.a->size(0), name, ".table: got page ", page, " at slot ", slot,
             ", expected 0 to ", p.a->size(0) - 1);
  }
}

constexpr int64_t kPageFields = 5;  // of RankPages (lora_kernels/ops/gather/pages.py)

inline int64_t slots_of(const std::vector<Tensor>& pages) {
  LK_CHECK(!pages.empty() && pages.size() % kPageFields == 0, "pages: got ", pages.size(),
           " tensors, expected 5 of each projection");
  check_shape("pages[0].table", pages[2], {-1, -1});
  return pages[2].size(0);
}

// The projection that the five tensors at `pages` describe; a has this shape (-1: any).
inline Projection projection_of(const std::string& name, const Tensor* pages,
                                std::initializer_list<int64_t> a_shape, const Entries& entries) {
  const auto of = [&](const char* field) { return name + "." + field; };
  const Tensor &a = pages[0], &b = pages[1], &table = pages[2];
  check_shape(of("a").c_str(), a, a_shape);
  check_shape(of("b").c_str(), b, {a.size(0), kPage, -1});
  // Kernels divide by both; an adapter without inputs or outputs is no work for them.
  LK_CHECK(a.size(1) > 0 && a.size(2) > 0 && b.size(2) > 0, name,
           ": has no inputs or no outputs, expected some");
  check_cpu_contiguous(of("a").c_str(), a);
  check_cpu_contiguous(of("b").c_str(), b);
  check_dtype(of("b").c_str(), b, a.scalar_type());
  check_cpu(of("table").c_str(), table, ScalarType::Int, {entries.slots, -1});
  check_cpu(of("ranks").c_str(), pages[3], ScalarType::Int, {entries.slots});
  check_cpu(of("scales").c_str(), pages[4], ScalarType::Float, {entries.slots});
  Projection p{&a,
               &b,
               kernel_dtype(of("a").c_str(), a),
               b.size(2),
               table.size(1) * kPage,
               0,
               0,
               data<int32_t>(table),
               data<int32_t>(pages[3]),
               data<float>(pages[4]),
               {},
               {},
               {}};
  p.factor.assign(size_t(entries.count), 0.0f);
  for (const Entries::Run& run : entries.by_slot.runs) {
    if (run.slot < 0) continue;
    check_slot(name, p, run.slot);
    p.used = p.used || p.ranks[run.slot] > 0;
    for (int64_t j = run.begin; j < run.end; ++j) {
      const int64_t e = entries.by_slot.entries[size_t(j)];
      p.factor[size_t(e)] = entries.weight(e) * p.scales[run.slot];
    }
  }
  p.groups = groups_of(p, entries.by_slot);
  p.turns = groups_of(p, entries.in_order());
  return p;
}

inline std::vector<Projection> projections_of(const std::vector<Tensor>& pages, int64_t n,
                                              int64_t k, const Entries& entries) {
  std::vector<Projection> found;
  int64_t column = 0, rank_column = 0;
  for (size_t i = 0; i < pages.size(); i += kPageFields) {
    const std::string name = "pages[" + std::to_string(i / kPageFields) + "]";
    check_dtype((name + ".a").c_str(), pages[i], pages[0].scalar_type());
    Projection p = projection_of(name, &pages[i], {-1, kPage, k}, entries);
    p.column = column;
    p.rank_column = rank_column;
    column += p.n;
    rank_column += p.width;
    found.push_back(std::move(p));
  }
  LK_CHECK(column == n, "pages: give ", column, " outputs, expected ", n);
  return found;
}

// The dropout of each slot.
struct Drops {
  SlotDropout view{nullptr, nullptr, nullptr, 0};

  Drops(const std::vector<Tensor>& dropout, const Entries& entries) {
    if (dropout.empty()) return;
    LK_CHECK(dropout.size() == 3, "dropout: got ", dropout.size(), " tensors, expected 3 or none");
    check_cpu("dropout.seeds", dropout[0], ScalarType::Long, {entries.slots});
    check_cpu("dropout.thresholds", dropout[1], ScalarType::Int, {entries.slots});
    check_cpu("dropout.rows", dropout[2], ScalarType::Int, {entries.count});
    view = {data<int64_t>(dropout[0]), data<int32_t>(dropout[1]), data<int32_t>(dropout[2]), 0};
    for (const Entries::Run& run : entries.by_slot.runs)
      if (run.slot >= 0)
        check_range("dropout.thresholds", view.thresholds[run.slot], "", run.slot, 0, 65536);
  }
  SlotDropout of(size_t stream) const {
    SlotDropout d = view;
    d.stream = uint32_t(stream);
    return d;
  }
};

}  // namespace lora_kernels
