// lora_kernels_native::gather_lora_{fwd,add,bwd} on the CPU.
#include <array>
#include <cstring>

#include "bindings/gather_call.h"

namespace lora_kernels {
namespace {

MatrixView columns_of(const MatrixView& m, int64_t first, int64_t count) {
  const char* data = static_cast<const char*>(m.data) + first * element_size(m.dtype);
  return {data, m.dtype, m.rows, count, m.stride};
}

// The checked arguments of a call over linear layers.
struct Call : GatherCall {
  Tensor x;
  MatrixView view;  // of x
  std::vector<Projection> projections;
  Drops drops;

  Call(const Tensor& any_x, int64_t n, int64_t k, const std::vector<Tensor>& pages,
       const std::vector<Tensor>& entry_tensors, const std::vector<Tensor>& dropout)
      : Call(rows_of("x", any_x, k), pages, entry_tensors, dropout, n, k) {}

  int64_t ranks() const { return projections.back().rank_column + projections.back().width; }

  // out (+)= the results of add(i, view, overwrite) for `parts` projections from `first` on. They
  // are rounded once, even where several are added to one token.
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
    gather_table().add(data<float>(sums), touched.data(), overwrite, out, parallel);
  }

  // Adds the LoRA branches to `out`, or writes them there. Also gives s [E, Σ width] of rank_dtype,
  // if it is not null.
  void branch(bool overwrite, const MatrixView& out, Tensor* s) const {
    for (size_t i = 0; i < projections.size(); ++i) {
      const Projection& p = projections[i];
      if (!p.used && !overwrite) continue;
      const Tensor sums = new_sums(p);
      char* rounded = s == nullptr ? nullptr
                                   : static_cast<char*>(s->mutable_data_ptr()) +
                                         p.rank_column * element_size(rank_dtype(activations));
      shrink(p, *p.a, drops.of(i), view, sums, rounded, ranks());
      add_once(columns_of(out, p.column, p.n), i, 1, overwrite,
               [&](size_t, const MatrixView& to, bool over) {
                 expand(p, *p.b, SlotDropout{}, sums, p.factor.data(), over, to);
               });
    }
  }

 private:
  Call(const Tensor& rows, const std::vector<Tensor>& pages,
       const std::vector<Tensor>& entry_tensors, const std::vector<Tensor>& dropout, int64_t n,
       int64_t k)
      : GatherCall("x", rows, rows.size(0), entry_tensors, slots_of(pages)),
        x(rows),
        view(matrix_view("x", rows, -1, k)),
        projections(projections_of(pages, n, k, entries)),
        drops(dropout, entries) {}
};

// y where there is no base: the bias, or zeros.
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

// y of the base. A dense one is computed by torch: it gives the bits and takes the time of
// nn.Linear.
Tensor base_forward(const Tensor& x, const Base& base, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  if (!base.meta.dense()) return linear_forward(x, base, bias);
  if (bias.has_value()) {
    vector_view("bias", bias, base.meta.n);
    check_dtype("bias", *bias, x.scalar_type());
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(
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
  Tensor s = zeros(call.x, {call.entries.count, call.ranks()}, rank_dtype(call.x.scalar_type()));
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

// s of one projection, times the weight of the entry and the scale of its adapter.
Tensor scaled_sums(const Tensor& s, const Call& call, const Projection& p) {
  const Tensor out = call.new_sums(p);
  float* to = mutable_data<float>(out);
  with_type(rank_dtype(call.activations), [&](auto of) {
    const auto* from = data<decltype(of)>(s) + p.rank_column;
    for (const SlotGroup& g : p.groups)
      for (int64_t i = 0; i < g.count; ++i)
        for (int64_t e = g.entries[i], j = 0; j < g.rank; ++j)
          to[e * p.width + j] = to_float(from[e * s.stride(0) + j]);
  });
  scale_rows(p, to);
  return out;
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
  check_dtype("s", s, rank_dtype(x.scalar_type()));
  const bool want_x = needs[0], want_bias = needs[1], want_weights = needs[2];
  const MatrixView dy_view = matrix_view("dy", dy, -1, meta[0]);

  Tensor dweights = want_weights ? zeros(x, {call.entries.count}, ScalarType::Float)
                                 : call.none(ScalarType::Float);
  std::vector<Tensor> da, db, dscales;
  std::vector<Tensor> gradients;  // of s, times weight and scale
  for (size_t i = 0; i < count; ++i) {
    const Projection& p = call.projections[i];
    const bool want_a = needs[3 + i], want_b = needs[3 + count + i];
    const bool want_scales = needs[3 + 2 * count + i];
    da.push_back(want_a ? zeros_like(*p.a) : call.none(p.a->scalar_type()));
    db.push_back(want_b ? zeros_like(*p.b) : call.none(p.b->scalar_type()));
    dscales.push_back(want_scales ? zeros(x, {call.entries.slots}, ScalarType::Float)
                                  : call.none(ScalarType::Float));
    if (want_a || want_b) check_unshared(p);
    const MatrixView dz = columns_of(dy_view, p.column, p.n);
    const Tensor u = call.new_sums(p);
    gradients.push_back(u);
    const bool want_products = want_scales || want_weights;
    if (want_x || want_a || want_products) call.shrink(p, *p.b, SlotDropout{}, dz, u);
    if (want_products) {
      // From s before it was rounded, as that rounding would be most of the error of these sums.
      const Tensor exact = call.new_sums(p);
      call.shrink(p, *p.a, call.drops.of(i), call.view, exact);
      product_grads(call, p, data<float>(u), data<float>(exact),
                    want_scales ? mutable_data<float>(dscales[i]) : nullptr,
                    want_weights ? mutable_data<float>(dweights) : nullptr);
    }
    if (want_x || want_a) scale_rows(p, mutable_data<float>(u));
    if (want_a) call.wgrad(p, da[i], call.drops.of(i), call.view, u);
    if (want_b)
      gather_table().wgrad(call.pass(p, db[i], p.groups, scaled_sums(s, call, p), SlotDropout{}),
                           dz, call.parallel);
  }
  Tensor dx = call.none(x.scalar_type()), dbias = call.none(x.scalar_type());
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
