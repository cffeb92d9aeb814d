// lora_kernels_native::gather_lora_{fwd,add,bwd} on the CPU.
#include "lora_kernels/gather.h"

#include "bindings/linear.h"

namespace lora_kernels {
namespace {

constexpr int64_t kFields = 5;  // of RankPages (lora_kernels/ops/gather/pages.py)

int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

MatrixView columns_of(const MatrixView& m, int64_t first, int64_t count) {
  const char* data = static_cast<const char*>(m.data) + first * element_size(m.dtype);
  return {data, m.dtype, m.rows, count, m.stride};
}

void check_range(const char* name, int64_t value, int64_t at, int64_t low, int64_t end) {
  LK_CHECK(value >= low && value < end, name, ": got ", value, " at ", at, ", expected ", low,
           " to ", end - 1);
}

// The entries sorted by slot, those without one first.
struct Entries {
  int64_t count, slots;
  bool mixture;
  std::vector<int32_t> order, tokens;  // by sorted entry
  std::vector<float> weights;
  struct Run {
    int64_t slot, begin, end;
  };
  std::vector<Run> runs;

  Entries(const std::vector<Tensor>& entries, int64_t slot_count, int64_t rows)
      : slots(slot_count) {
    LK_CHECK(entries.size() == 1 || entries.size() == 3, "entries: got ", entries.size(),
             " tensors, expected 1 or 3");
    mixture = entries.size() == 3;
    count = mixture ? entries[0].size(0) : rows;
    check_cpu("slots", entries[0], ScalarType::Int, {count});
    if (mixture) {
      check_cpu("tokens", entries[1], ScalarType::Int, {count});
      check_cpu("weights", entries[2], ScalarType::Float, {count});
    }
    LK_CHECK(count < INT32_MAX && rows < INT32_MAX, "slots: got ", count, " entries of ", rows,
             " tokens, expected fewer than 2^31");
    const int32_t* slot = data<int32_t>(entries[0]);
    const int32_t* token = mixture ? data<int32_t>(entries[1]) : nullptr;
    std::vector<int64_t> at(size_t(slots + 2), 0);
    for (int64_t e = 0; e < count; ++e) {
      check_range("slots", slot[e], e, -1, slots);
      if (mixture) check_range("tokens", token[e], e, 0, rows);
      ++at[size_t(slot[e] + 2)];
    }
    for (int64_t i = 0; i <= slots; ++i) {
      if (at[size_t(i + 1)] > 0)
        runs.push_back({i - 1, at[size_t(i)], at[size_t(i)] + at[size_t(i + 1)]});
      at[size_t(i + 1)] += at[size_t(i)];
    }
    order.resize(size_t(count));
    tokens.resize(size_t(count));
    weights.assign(size_t(count), 1.0f);
    for (int64_t e = 0; e < count; ++e) {
      const size_t p = size_t(at[size_t(slot[e] + 1)]++);
      order[p] = int32_t(e);
      tokens[p] = mixture ? token[e] : int32_t(e);
      if (mixture) weights[p] = data<float>(entries[2])[e];
    }
  }
};

// The pages of one projection and its groups of entries.
struct Projection {
  const Tensor *a, *b;
  Dtype dtype;
  int64_t n, k, width;          // outputs, inputs, ranks that a slot has room for
  int64_t column, rank_column;  // where its part of y, and of s, begins
  const float* scales;
  std::vector<SlotGroup> groups;
  std::vector<float> factor;  // weight · scale, by sorted entry
};

std::vector<Projection> projections_of(const std::vector<Tensor>& pages, int64_t k,
                                       const Entries& entries) {
  std::vector<Projection> found;
  int64_t column = 0, rank_column = 0;
  for (size_t i = 0; i < pages.size(); i += kFields) {
    const Tensor &a = pages[i], &b = pages[i + 1], &table = pages[i + 2];
    check_shape("pages.a", a, {-1, kPage, k});
    check_shape("pages.b", b, {a.size(0), kPage, -1});
    check_cpu_contiguous("pages.a", a);
    check_cpu_contiguous("pages.b", b);
    check_dtype("pages.b", b, a.scalar_type());
    check_cpu("pages.table", table, ScalarType::Int, {entries.slots, -1});
    check_cpu("pages.ranks", pages[i + 3], ScalarType::Int, {entries.slots});
    check_cpu("pages.scales", pages[i + 4], ScalarType::Float, {entries.slots});
    Projection p{
        &a,     &b,          kernel_dtype("pages.a", a), b.size(2), k, table.size(1) * kPage,
        column, rank_column, data<float>(pages[i + 4]),  {},        {}};
    p.factor.resize(size_t(entries.count));
    for (const Entries::Run& run : entries.runs) {
      SlotGroup g{run.begin, run.end, 0, nullptr, run.slot};
      if (run.slot >= 0) {
        g.rank = data<int32_t>(pages[i + 3])[run.slot];
        check_range("pages.ranks", g.rank, run.slot, 0, p.width + 1);
        g.pages = data<int32_t>(table) + run.slot * table.size(1);
        for (int64_t c = 0; c * kPage < g.rank; ++c)
          check_range("pages.table", g.pages[c], run.slot, 0, a.size(0));
        for (int64_t e = run.begin; e < run.end; ++e)
          p.factor[size_t(e)] = entries.weights[size_t(e)] * p.scales[run.slot];
      }
      p.groups.push_back(g);
    }
    column += p.n;
    rank_column += p.width;
    found.push_back(std::move(p));
  }
  LK_CHECK(!found.empty() && pages.size() % kFields == 0, "pages: got ", pages.size(),
           " tensors, expected 5 of each projection");
  return found;
}

int64_t slots_of(const std::vector<Tensor>& pages) {
  LK_CHECK(pages.size() >= kFields, "pages: got ", pages.size(), " tensors, expected 5 or more");
  check_shape("pages.table", pages[2], {-1, -1});
  return pages[2].size(0);
}

// Per-slot dropout; `rows` keeps the mask's rows by sorted entry.
struct Drops {
  SlotDropout view{nullptr, nullptr, nullptr, 0};
  std::vector<int32_t> rows;

  Drops(const std::vector<Tensor>& dropout, const Entries& entries) {
    if (dropout.empty()) return;
    LK_CHECK(dropout.size() == 3, "dropout: got ", dropout.size(), " tensors, expected 3 or none");
    check_cpu("dropout.seeds", dropout[0], ScalarType::Long, {entries.slots});
    check_cpu("dropout.thresholds", dropout[1], ScalarType::Int, {entries.slots});
    check_cpu("dropout.rows", dropout[2], ScalarType::Int, {entries.count});
    for (int64_t i = 0; i < entries.slots; ++i)
      check_range("dropout.thresholds", data<int32_t>(dropout[1])[i], i, 0, 65536);
    for (const int32_t e : entries.order) rows.push_back(data<int32_t>(dropout[2])[e]);
    view = {data<int64_t>(dropout[0]), data<int32_t>(dropout[1]), rows.data(), 0};
  }
  SlotDropout of(size_t stream) const {
    SlotDropout d = view;
    d.stream = uint32_t(stream);
    return d;
  }
};

GatherPass pass(const Projection& p, const Tensor& pages, const Entries& entries, float* sums,
                const SlotDropout& dropout) {
  return {pages.const_data_ptr(), p.dtype, pages.size(2), p.groups.data(), int64_t(p.groups.size()),
          entries.tokens.data(),  sums,    p.width,       dropout};
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = new_tensor(like, shape, dtype);
  return torch::stable::zero_(t);
}

Tensor zeros_like(const Tensor& pages) {
  return zeros(pages, {pages.size(0), pages.size(1), pages.size(2)}, pages.scalar_type());
}

float element(const void* from, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f16:
      return to_float(static_cast<const Half*>(from)[i]);
    case Dtype::bf16:
      return to_float(static_cast<const BFloat16*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}

void set_element(void* to, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::f16:
      return store(static_cast<Half*>(to) + i, value);
    case Dtype::bf16:
      return store(static_cast<BFloat16*>(to) + i, value);
    default:
      return store(static_cast<float*>(to) + i, value);
  }
}

// out += what `expand` gives for each call(view, overwrite): rounded once, though a token may be
// added to more than once.
template <class Call>
void add_once(const Tensor& like, const MatrixView& out, bool once, bool overwrite,
              const Call& call) {
  if (once) return call(out, overwrite);
  const Tensor sums = zeros(like, {out.rows, out.columns}, ScalarType::Float);
  call(MatrixView{sums.const_data_ptr(), Dtype::f32, out.rows, out.columns, out.columns}, false);
  gather_kernels().add(data<float>(sums), overwrite, out, torch_parallel());
}

// The adapters' part of y into `out`; s [E, Σ width] of x's type where not null.
void branch(const Tensor& x, const std::vector<Projection>& projections, const Entries& entries,
            const Drops& drops, bool overwrite, const MatrixView& out, Tensor* s) {
  const MatrixView m = matrix_view("x", x, -1, x.size(1));
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& p = projections[i];
    const Tensor sums = new_tensor(x, {entries.count, p.width}, ScalarType::Float);
    gather_kernels().shrink(pass(p, *p.a, entries, mutable_data<float>(sums), drops.of(i)), m,
                            torch_parallel());
    add_once(x, columns_of(out, p.column, p.n), !entries.mixture, overwrite,
             [&](const MatrixView& to, bool over) {
               gather_kernels().expand(
                   pass(p, *p.b, entries, mutable_data<float>(sums), SlotDropout{}),
                   p.factor.data(), over, to, torch_parallel());
             });
    if (s == nullptr) continue;
    for (const SlotGroup& g : p.groups)
      for (int64_t e = g.begin; e < g.end; ++e)
        for (int64_t j = 0; j < g.rank; ++j)
          set_element(s->mutable_data_ptr(), m.dtype,
                      entries.order[size_t(e)] * s->size(1) + p.rank_column + j,
                      data<float>(sums)[e * p.width + j]);
  }
}

std::tuple<Tensor, Tensor> gather_lora_fwd(
    const Tensor& any_x, const std::vector<Tensor>& base_tensors, const std::vector<int64_t>& meta,
    const std::optional<Tensor>& bias, const std::vector<Tensor>& pages,
    const std::vector<Tensor>& entry_tensors, const std::vector<Tensor>& dropout) {
  LK_CHECK(meta.size() >= 2, "meta: got ", meta.size(), " numbers, expected 2 or more");
  const Tensor x = rows_of("x", any_x, meta[1]);
  const Entries entries(entry_tensors, slots_of(pages), x.size(0));
  const std::vector<Projection> projections = projections_of(pages, meta[1], entries);
  const Projection& last = projections.back();
  LK_CHECK(last.column + last.n == meta[0], "pages: give ", last.column + last.n,
           " outputs, expected ", meta[0]);
  const Drops drops(dropout, entries);
  Tensor s = zeros(x, {entries.count, last.rank_column + last.width}, x.scalar_type());
  Tensor y = base_tensors.empty() ? zeros(x, {x.size(0), meta[0]}, x.scalar_type())
                                  : linear_forward(x, Base(base_tensors, meta), bias);
  if (base_tensors.empty() && bias.has_value()) {
    const MatrixView row = vector_view("bias", bias, meta[0]);
    LK_CHECK(row.dtype == kernel_dtype("x", x), "bias: got dtype ", dtype_name(bias->scalar_type()),
             ", expected that of x");
    const size_t bytes = size_t(meta[0] * element_size(row.dtype));
    for (int64_t i = 0; i < x.size(0); ++i)
      std::memcpy(static_cast<char*>(y.mutable_data_ptr()) + size_t(i) * bytes, row.data, bytes);
  }
  branch(x, projections, entries, drops, false, matrix_view("y", y, -1, meta[0]), &s);
  return {y, s};
}

void gather_lora_add(const Tensor& out, const Tensor& any_x, const std::vector<Tensor>& pages,
                     const std::vector<Tensor>& entry_tensors, bool overwrite) {
  check_shape("x", any_x, {-1, -1});
  const Tensor x = rows_of("x", any_x, any_x.size(1));
  const Entries entries(entry_tensors, slots_of(pages), x.size(0));
  const std::vector<Projection> projections = projections_of(pages, x.size(1), entries);
  const Projection& last = projections.back();
  check_shape("out", out, {x.size(0), last.column + last.n});
  check_dtype("out", out, x.scalar_type());
  const Drops none({}, entries);
  branch(x, projections, entries, none, overwrite, matrix_view("out", out, -1, -1), nullptr);
}

// s of one projection by sorted entry, fp32.
Tensor sorted_sums(const Tensor& s, const Projection& p, const Entries& entries) {
  Tensor out = new_tensor(s, {entries.count, p.width}, ScalarType::Float);
  const Dtype dtype = kernel_dtype("s", s);
  for (const SlotGroup& g : p.groups)
    for (int64_t e = g.begin; e < g.end; ++e)
      for (int64_t j = 0; j < g.rank; ++j)
        mutable_data<float>(out)[e * p.width + j] = element(
            s.const_data_ptr(), dtype, entries.order[size_t(e)] * s.stride(0) + p.rank_column + j);
  return out;
}

// A page's gradient is written by the one slot that names it.
void check_unshared(const Projection& p) {
  std::vector<char> seen(size_t(p.a->size(0)), 0);
  for (const SlotGroup& g : p.groups)
    for (int64_t c = 0; c * kPage < g.rank; ++c) {
      char& mark = seen[size_t(g.pages[c])];
      LK_CHECK(mark == 0, "pages.table: got page ", g.pages[c], " at slot ", g.slot,
               " and at another, expected pages of one slot each where a gradient is asked for");
      mark = 1;
    }
}

using Grads = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>,
                         std::vector<Tensor>>;

Grads gather_lora_bwd(const Tensor& any_dy, const Tensor& any_x, const Tensor& any_s,
                      const std::vector<Tensor>& base_tensors, const std::vector<int64_t>& meta,
                      const std::vector<Tensor>& pages, const std::vector<Tensor>& entry_tensors,
                      const std::vector<Tensor>& dropout, const std::vector<bool>& needs) {
  LK_CHECK(meta.size() >= 2, "meta: got ", meta.size(), " numbers, expected 2 or more");
  const Tensor dy = rows_of("dy", any_dy, meta[0]), x = rows_of("x", any_x, meta[1]);
  check_shape("dy", dy, {x.size(0), meta[0]});
  check_dtype("dy", dy, x.scalar_type());
  const Entries entries(entry_tensors, slots_of(pages), x.size(0));
  const std::vector<Projection> projections = projections_of(pages, meta[1], entries);
  const Projection& last = projections.back();
  const size_t count = projections.size();
  LK_CHECK(last.column + last.n == meta[0], "pages: give ", last.column + last.n,
           " outputs, expected ", meta[0]);
  LK_CHECK(needs.size() == 3 + 3 * count, "needs: got ", needs.size(), " flags, expected ",
           3 + 3 * count);
  const Tensor s = rows_of("s", any_s, last.rank_column + last.width);
  check_shape("s", s, {entries.count, -1});
  check_dtype("s", s, x.scalar_type());
  const Drops drops(dropout, entries);
  const bool want_x = needs[0], want_bias = needs[1], want_weights = needs[2];
  const Parallel parallel = torch_parallel();
  const MatrixView dy_view = matrix_view("dy", dy, -1, meta[0]);
  const MatrixView x_view = matrix_view("x", x, -1, meta[1]);
  const auto none = [&](ScalarType dtype) { return new_tensor(x, {0}, dtype); };

  Tensor dweights =
      want_weights ? zeros(x, {entries.count}, ScalarType::Float) : none(ScalarType::Float);
  std::vector<Tensor> da, db, dscales, gradients;  // the last: of s, times weight and scale
  for (size_t i = 0; i < count; ++i) {
    const Projection& p = projections[i];
    const bool want_a = needs[3 + i], want_b = needs[3 + count + i];
    const bool want_scales = needs[3 + 2 * count + i];
    da.push_back(want_a ? zeros_like(*p.a) : none(p.a->scalar_type()));
    db.push_back(want_b ? zeros_like(*p.b) : none(p.b->scalar_type()));
    dscales.push_back(want_scales ? zeros(x, {entries.slots}, ScalarType::Float)
                                  : none(ScalarType::Float));
    if (want_a || want_b) check_unshared(p);
    const MatrixView dz = columns_of(dy_view, p.column, p.n);
    const Tensor own = sorted_sums(s, p, entries);
    // s before it was rounded: its rounding would be most of the error of these few sums.
    const bool want_products = want_scales || want_weights;
    const Tensor exact =
        want_products ? new_tensor(x, {entries.count, p.width}, ScalarType::Float) : own;
    if (want_products)
      gather_kernels().shrink(pass(p, *p.a, entries, mutable_data<float>(exact), drops.of(i)),
                              x_view, parallel);
    Tensor u = new_tensor(x, {entries.count, p.width}, ScalarType::Float);
    const bool want_u = want_x || want_a || want_products;
    if (want_u)
      gather_kernels().shrink(pass(p, *p.b, entries, mutable_data<float>(u), SlotDropout{}), dz,
                              parallel);
    for (const SlotGroup& g : p.groups) {
      double of_slot = 0.0;
      for (int64_t e = g.begin; e < g.end; ++e) {
        float *from = mutable_data<float>(u) + e * p.width,
              *mine = mutable_data<float>(own) + e * p.width;
        double product = 0.0;
        if (want_products)
          for (int64_t j = 0; j < g.rank; ++j)
            product += double(from[j]) * data<float>(exact)[e * p.width + j];
        of_slot += entries.weights[size_t(e)] * product;
        if (want_weights && g.rank > 0)
          mutable_data<float>(dweights)[entries.order[size_t(e)]] +=
              float(p.scales[g.slot] * product);
        for (int64_t j = 0; j < g.rank; ++j) {
          if (want_u) from[j] *= p.factor[size_t(e)];
          mine[j] *= p.factor[size_t(e)];
        }
      }
      if (want_scales && g.slot >= 0) mutable_data<float>(dscales[i])[g.slot] = float(of_slot);
    }
    if (want_a)
      gather_kernels().outer(pass(p, da[i], entries, mutable_data<float>(u), drops.of(i)), x_view,
                             parallel);
    if (want_b)
      gather_kernels().outer(pass(p, db[i], entries, mutable_data<float>(own), SlotDropout{}), dz,
                             parallel);
    gradients.push_back(u);
  }
  Tensor dx = none(x.scalar_type()), dbias = none(x.scalar_type());
  if (want_x) {
    dx = base_tensors.empty() ? zeros(x, {x.size(0), meta[1]}, x.scalar_type())
                              : linear_backward(dy, Base(base_tensors, meta));
    const std::vector<float> ones(size_t(entries.count), 1.0f);
    add_once(x, matrix_view("dx", dx, -1, meta[1]), !entries.mixture && count == 1, false,
             [&](const MatrixView& to, bool over) {
               for (size_t i = 0; i < count; ++i)
                 gather_kernels().expand(pass(projections[i], *projections[i].a, entries,
                                              mutable_data<float>(gradients[i]), drops.of(i)),
                                         ones.data(), over, to, parallel);
             });
  }
  if (want_bias) {
    const int64_t rows = 0;
    dbias = torch::stable::sum(dy, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
  }
  return {dx, dbias, dweights, da, db, dscales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("gather_lora_fwd", TORCH_BOX(&gather_lora_fwd));
  m.impl("gather_lora_add", TORCH_BOX(&gather_lora_add));
  m.impl("gather_lora_bwd", TORCH_BOX(&gather_lora_bwd));
}

}  // namespace lora_kernels
