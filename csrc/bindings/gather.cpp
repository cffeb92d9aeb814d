// lora_kernels_native::gather_lora_{fwd,add,bwd} on the CPU.
#include "bindings/gather.h"

#include <array>

namespace lora_kernels {
namespace {

int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

MatrixView columns_of(const MatrixView& m, int64_t first, int64_t count) {
  const char* data = static_cast<const char*>(m.data) + first * element_size(m.dtype);
  return {data, m.dtype, m.rows, count, m.stride};
}

void check_memory(bool ok) {
  if (!ok) throw std::runtime_error("out of memory for a kernel's workspace");
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = new_tensor(like, shape, dtype);
  return torch::stable::zero_(t);
}

Tensor zeros_like(const Tensor& pages) {
  return zeros(pages, {pages.size(0), pages.size(1), pages.size(2)}, pages.scalar_type());
}

// What a call has in common.
struct Call {
  Tensor x;
  MatrixView view;
  Entries entries;
  std::vector<Projection> projections;
  Drops drops;
  Parallel parallel = torch_parallel();

  Call(const Tensor& any_x, int64_t n, int64_t k, const std::vector<Tensor>& pages,
       const std::vector<Tensor>& entry_tensors, const std::vector<Tensor>& dropout)
      : x(rows_of("x", any_x, k)),
        view(matrix_view("x", x, -1, k)),
        entries(entry_tensors, slots_of(pages), view.rows),
        projections(projections_of(pages, n, k, entries)),
        drops(dropout, entries) {}

  int64_t ranks() const { return projections.back().rank_column + projections.back().width; }

  Tensor new_sums(const Projection& p) const {
    return new_tensor(x, {entries.count, p.width}, ScalarType::Float);
  }

  GatherPass pass(const Projection& p, const Tensor& pages, const std::vector<SlotGroup>& groups,
                  const Tensor& sums, const SlotDropout& dropout) const {
    return {pages.const_data_ptr(),
            p.dtype,
            view.dtype,
            pages.size(2),
            groups.data(),
            int64_t(groups.size()),
            entries.repeats,
            entries.tokens.data(),
            static_cast<float*>(const_cast<void*>(sums.const_data_ptr())),
            p.width,
            dropout};
  }

  // Sums of m with the pages' rows; also to s where not null, rounded, rows `stride` apart.
  void shrink(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
              const MatrixView& m, const Tensor& sums, void* s = nullptr,
              int64_t stride = 0) const {
    check_memory(
        gather_kernels().shrink(pass(p, pages, p.groups, sums, dropout), m, s, stride, parallel));
  }

  void expand(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
              const Tensor& sums, const float* factor, bool overwrite,
              const MatrixView& out) const {
    check_memory(gather_kernels().expand(pass(p, pages, p.turns, sums, dropout), factor, overwrite,
                                         out, parallel));
  }

  void outer(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
             const MatrixView& m, const Tensor& sums) const {
    check_memory(gather_kernels().outer(pass(p, pages, p.groups, sums, dropout), m, parallel));
  }

  // out += what the `parts` calls of add(i, view, overwrite) give, or = it: rounded once, though a
  // token may be added to more than once.
  template <class Add>
  void add_once(const MatrixView& out, size_t first, size_t parts, bool overwrite,
                const Add& add) const {
    const bool in_place = !entries.repeats && parts == 1 && !(overwrite && entries.mixture);
    if (in_place) return add(first, out, overwrite);
    const Tensor sums = zeros(x, {out.rows, out.columns}, ScalarType::Float);
    std::vector<uint8_t> touched(size_t(out.rows), 0);
    for (size_t i = first; i < first + parts; ++i) {
      add(i, MatrixView{sums.const_data_ptr(), Dtype::f32, out.rows, out.columns, out.columns},
          false);
      for (const SlotGroup& g : projections[i].groups)
        for (int64_t j = 0; g.rank > 0 && j < g.count; ++j)
          touched[size_t(entries.tokens[size_t(g.entries[j])])] = 1;
    }
    gather_kernels().add(data<float>(sums), touched.data(), overwrite, out, parallel);
  }

  // The adapters' part of y into `out`; s [E, Σ width] of x's type where not null.
  void branch(bool overwrite, const MatrixView& out, Tensor* s) const {
    for (size_t i = 0; i < projections.size(); ++i) {
      const Projection& p = projections[i];
      if (!p.used && !overwrite) continue;
      const Tensor sums = new_sums(p);
      char* rounded = s == nullptr ? nullptr
                                   : static_cast<char*>(s->mutable_data_ptr()) +
                                         p.rank_column * element_size(view.dtype);
      shrink(p, *p.a, drops.of(i), view, sums, rounded, ranks());
      add_once(columns_of(out, p.column, p.n), i, 1, overwrite,
               [&](size_t, const MatrixView& to, bool over) {
                 expand(p, *p.b, SlotDropout{}, sums, p.factor.data(), over, to);
               });
    }
  }
};

// y = bias, without a base.
Tensor bias_rows(const Tensor& x, const std::optional<Tensor>& bias, int64_t n) {
  Tensor y = zeros(x, {x.size(0), n}, x.scalar_type());
  if (!bias.has_value()) return y;
  const MatrixView row = vector_view("bias", bias, n);
  check_dtype("bias", *bias, x.scalar_type());
  const size_t bytes = size_t(n * element_size(row.dtype));
  for (int64_t i = 0; i < x.size(0); ++i)
    std::memcpy(static_cast<char*>(y.mutable_data_ptr()) + size_t(i) * bytes, row.data, bytes);
  return y;
}

// The base's part. A dense one is torch's own, the bits that nn.Linear gives: its time is that of a
// batch without adapters.
Tensor base_forward(const Tensor& x, const Base& base, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  if (!base.meta.dense()) return linear_forward(x, base, bias);
  if (bias.has_value()) {
    vector_view("bias", bias, base.meta.n);
    check_dtype("bias", *bias, x.scalar_type());
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor base_backward(const Tensor& dy, const Base& base, const Tensor& weight) {
  return base.meta.dense() ? torch::stable::matmul(dy, weight) : linear_backward(dy, base);
}

std::tuple<Tensor, Tensor> gather_lora_fwd(
    const Tensor& any_x, const std::vector<Tensor>& base_tensors, const std::vector<int64_t>& meta,
    const std::optional<Tensor>& bias, const std::vector<Tensor>& pages,
    const std::vector<Tensor>& entry_tensors, const std::vector<Tensor>& dropout) {
  LK_CHECK(meta.size() >= 2, "meta: got ", meta.size(), " numbers, expected 2 or more");
  const Call call(any_x, meta[0], meta[1], pages, entry_tensors, dropout);
  Tensor s = zeros(call.x, {call.entries.count, call.ranks()}, call.x.scalar_type());
  Tensor y = base_tensors.empty()
                 ? bias_rows(call.x, bias, meta[0])
                 : base_forward(call.x, Base(base_tensors, meta), base_tensors[0], bias);
  call.branch(false, matrix_view("y", y, -1, meta[0]), &s);
  return {y, s};
}

void gather_lora_add(const Tensor& out, const Tensor& x, const std::vector<Tensor>& pages,
                     const std::vector<Tensor>& entry_tensors, bool overwrite) {
  check_shape("x", x, {-1, -1});
  check_shape("out", out, {x.size(0), -1});
  check_dtype("out", out, x.scalar_type());
  const Call call(x, out.size(1), x.size(1), pages, entry_tensors, {});
  call.branch(overwrite, matrix_view("out", out, -1, -1), nullptr);
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

// s of one projection times weight and scale.
Tensor scaled_sums(const Tensor& s, const Call& call, const Projection& p) {
  const Tensor out = call.new_sums(p);
  float* to = mutable_data<float>(out);
  for (const SlotGroup& g : p.groups)
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t e = g.entries[i];
      for (int64_t j = 0; j < g.rank; ++j)
        to[e * p.width + j] = p.factor[size_t(e)] * element(s.const_data_ptr(), call.view.dtype,
                                                            e * s.stride(0) + p.rank_column + j);
    }
  return out;
}

// dscales[slot] = Σ weight · u · s and dweights[e] += scale · u · s, each where not null.
void product_grads(const Call& call, const Projection& p, const float* u, const float* s,
                   float* dscales, float* dweights) {
  for (const SlotGroup& g : p.groups) {
    if (g.rank == 0) continue;
    double of_slot = 0.0;
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t e = g.entries[i];
      double product = 0.0;
      for (int64_t j = 0; j < g.rank; ++j)
        product += double(u[e * p.width + j]) * s[e * p.width + j];
      of_slot += call.entries.weight(e) * product;
      if (dweights != nullptr) dweights[e] += float(p.scales[g.slot] * product);
    }
    if (dscales != nullptr) dscales[g.slot] = float(of_slot);
  }
}

void scale_rows(const Projection& p, float* u) {
  for (const SlotGroup& g : p.groups)
    for (int64_t i = 0; i < g.count; ++i)
      for (int64_t j = 0; j < g.rank; ++j)
        u[g.entries[i] * p.width + j] *= p.factor[size_t(g.entries[i])];
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
  const Call call(any_x, meta[0], meta[1], pages, entry_tensors, dropout);
  const Tensor& x = call.x;
  const size_t count = call.projections.size();
  LK_CHECK(needs.size() == 3 + 3 * count, "needs: got ", needs.size(), " flags, expected ",
           3 + 3 * count);
  const Tensor dy = rows_of("dy", any_dy, meta[0]);
  check_shape("dy", dy, {x.size(0), meta[0]});
  check_dtype("dy", dy, x.scalar_type());
  const Tensor s = rows_of("s", any_s, call.ranks());
  check_shape("s", s, {call.entries.count, -1});
  check_dtype("s", s, x.scalar_type());
  const bool want_x = needs[0], want_bias = needs[1], want_weights = needs[2];
  const MatrixView dy_view = matrix_view("dy", dy, -1, meta[0]);
  const auto none = [&](ScalarType dtype) { return new_tensor(x, {0}, dtype); };

  Tensor dweights =
      want_weights ? zeros(x, {call.entries.count}, ScalarType::Float) : none(ScalarType::Float);
  std::vector<Tensor> da, db, dscales, gradients;  // the last: of s, times weight and scale
  for (size_t i = 0; i < count; ++i) {
    const Projection& p = call.projections[i];
    const bool want_a = needs[3 + i], want_b = needs[3 + count + i];
    const bool want_scales = needs[3 + 2 * count + i];
    da.push_back(want_a ? zeros_like(*p.a) : none(p.a->scalar_type()));
    db.push_back(want_b ? zeros_like(*p.b) : none(p.b->scalar_type()));
    dscales.push_back(want_scales ? zeros(x, {call.entries.slots}, ScalarType::Float)
                                  : none(ScalarType::Float));
    if (want_a || want_b) check_unshared(p);
    const MatrixView dz = columns_of(dy_view, p.column, p.n);
    const Tensor u = call.new_sums(p);
    gradients.push_back(u);
    const bool want_products = want_scales || want_weights;
    if (want_x || want_a || want_products) call.shrink(p, *p.b, SlotDropout{}, dz, u);
    if (want_products) {
      // s before it was rounded: its rounding would be most of the error of these few sums.
      const Tensor exact = call.new_sums(p);
      call.shrink(p, *p.a, call.drops.of(i), call.view, exact);
      product_grads(call, p, data<float>(u), data<float>(exact),
                    want_scales ? mutable_data<float>(dscales[i]) : nullptr,
                    want_weights ? mutable_data<float>(dweights) : nullptr);
    }
    if (want_x || want_a) scale_rows(p, mutable_data<float>(u));
    if (want_a) call.outer(p, da[i], call.drops.of(i), call.view, u);
    if (want_b)
      gather_kernels().outer(call.pass(p, db[i], p.groups, scaled_sums(s, call, p), SlotDropout{}),
                             dz, call.parallel);
  }
  Tensor dx = none(x.scalar_type()), dbias = none(x.scalar_type());
  if (want_x) {
    dx = base_tensors.empty() ? zeros(x, {x.size(0), meta[1]}, x.scalar_type())
                              : base_backward(dy, Base(base_tensors, meta), base_tensors[0]);
    const std::vector<float> ones(size_t(call.entries.count), 1.0f);
    call.add_once(matrix_view("dx", dx, -1, meta[1]), 0, count, false,
                  [&](size_t i, const MatrixView& to, bool over) {
                    const Projection& p = call.projections[i];
                    call.expand(p, *p.a, call.drops.of(i), gradients[i], ones.data(), over, to);
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
