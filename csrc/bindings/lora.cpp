// lora_kernels_native::lora_linear_{fwd,bwd} on the CPU.
#include "bindings/lora.h"

namespace lora_kernels {

MatrixView matrix_view(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_shape(name, t, {rows, columns});
  LK_CHECK(t.is_cpu(), name, ": is not on the CPU");
  // A tensor without elements may have any strides, and contiguous() leaves it as it is.
  LK_CHECK(t.size(0) == 0 || t.size(1) <= 1 || t.stride(1) == 1, name, ": has stride ", t.stride(1),
           " along its rows, expected 1");
  return {t.const_data_ptr(), kernel_dtype(name, t), t.size(0), t.size(1), t.stride(0)};
}

MatrixView vector_view(const char* name, const std::optional<Tensor>& t, int64_t size) {
  if (!t.has_value()) return {nullptr, Dtype::f32, 0, 0, 0};
  check_shape(name, *t, {size});
  check_cpu_contiguous(name, *t);
  return {t->const_data_ptr(), kernel_dtype(name, *t), 1, size, size};
}

Base::Base(const std::vector<Tensor>& base, const std::vector<int64_t>& meta_list)
    : meta(parse_meta(meta_list)), quant{}, view{{nullptr, Dtype::f32, 0, 0, 0}, nullptr, 0, 0} {
  // Kernels divide by both; a layer without inputs or outputs is no work for them.
  LK_CHECK(meta.n > 0 && meta.k > 0, "base: got a weight [", meta.n, ", ", meta.k,
           "], expected one element or more");
  view.n = meta.n;
  view.k = meta.k;
  if (meta.dense()) {
    LK_CHECK(base.size() == 1, "base: got ", base.size(), " tensors, expected 1");
    view.dense = matrix_view("weight", base[0], meta.n, meta.k);
  } else {
    quant = quant_view(base, meta);
    view.quant = &quant;
  }
}

LoraView lora_view(const Base& base, const Tensor& a, const Tensor& b, double scale,
                   double dropout_p, const std::optional<Tensor>& seed,
                   const std::optional<Tensor>& rank_diag, const std::optional<Tensor>& out_diag,
                   int64_t stream) {
  LoraView lora{};
  lora.a = matrix_view("lora_a", a, -1, base.meta.k);
  const int64_t r = lora.a.rows;
  lora.b = matrix_view("lora_b", b, base.meta.n, r);
  lora.rank_diag = vector_view("rank_diag", rank_diag, r);
  lora.out_diag = vector_view("out_diag", out_diag, base.meta.n);
  lora.scale = static_cast<float>(scale);
  LK_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: got ", dropout_p,
           ", expected 0 <= dropout_p < 1");
  LK_CHECK(stream >= 0 && stream <= INT64_C(0xffffffff), "stream: got ", stream,
           ", expected 0 to 2^32 - 1");
  if (seed.has_value() && dropout_threshold(dropout_p) > 0) {
    check_cpu("seed", *seed, ScalarType::Long, {1});
    lora.dropout = {static_cast<uint64_t>(*data<int64_t>(*seed)), static_cast<uint32_t>(stream),
                    dropout_threshold(dropout_p)};
  }
  return lora;
}

Tensor rows_of(const char* name, const Tensor& t, int64_t columns) {
  check_shape(name, t, {-1, columns});
  return columns > 1 && t.stride(1) != 1 ? torch::stable::contiguous(t) : t;
}

void check_memory(bool ok) {
  if (!ok) throw std::runtime_error("out of memory for a kernel's workspace");
}

Tensor rows_like(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return new_tensor(x, Sizes(sizes), x.scalar_type());
}

namespace {

Tensor forward(const Tensor& any_x, const Base& base, const std::optional<Tensor>& bias,
               const LoraView& lora, Tensor* s) {
  const Tensor x = rows_of("x", any_x, base.meta.k);
  const MatrixView view = matrix_view("x", x, -1, base.meta.k);
  Tensor y = new_tensor(x, {view.rows, base.meta.n}, x.scalar_type());
  const LoraForward call{view,
                         base.view,
                         vector_view("bias", bias, base.meta.n),
                         lora,
                         y.mutable_data_ptr(),
                         s != nullptr ? s->mutable_data_ptr() : nullptr};
  if (y.numel() > 0) check_memory(lora_table().forward(call, torch_parallel()));
  return y;
}

}  // namespace

Tensor linear_forward(const Tensor& x, const Base& base, const std::optional<Tensor>& bias) {
  return forward(x, base, bias, LoraView{}, nullptr);
}

Tensor linear_backward(const Tensor& any_dy, const Base& base) {
  const Tensor dy = rows_of("dy", any_dy, base.meta.n);
  const MatrixView view = matrix_view("dy", dy, -1, base.meta.n);
  Tensor dx = new_tensor(dy, {view.rows, base.meta.k}, dy.scalar_type());
  const LoraBackward call{view, base.view, LoraView{}, dx.mutable_data_ptr(), nullptr};
  if (dx.numel() > 0) check_memory(lora_table().backward(call, torch_parallel()));
  return dx;
}

namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const std::vector<Tensor>& base_tensors,
                                           const std::vector<int64_t>& meta, const Tensor& a,
                                           const Tensor& b, double scale,
                                           const std::optional<Tensor>& bias, double dropout_p,
                                           const std::optional<Tensor>& seed,
                                           const std::optional<Tensor>& rank_diag,
                                           const std::optional<Tensor>& out_diag, int64_t stream) {
  const Base base(base_tensors, meta);
  const LoraView lora = lora_view(base, a, b, scale, dropout_p, seed, rank_diag, out_diag, stream);
  Tensor s = new_tensor(x, {x.size(0), lora.r()}, rank_dtype(x.scalar_type()));
  Tensor y = forward(x, base, bias, lora, &s);
  return {y, s};
}

// leftᵀ · (keep ∘ right), fp32 [R, C].
Tensor wgrad(const MatrixView& left, const MatrixView& right, const Dropout& dropout,
             const Tensor& like) {
  Tensor out = new_tensor(like, {left.columns, right.columns}, ScalarType::Float);
  if (right.rows == 0) return torch::stable::zero_(out);
  const Wgrad call{left, right, dropout, mutable_data<float>(out)};
  check_memory(lora_table().wgrad(call, torch_parallel()));
  return out;
}

Tensor scaled(const Tensor& from, float factor, ScalarType dtype) {
  const Dtype kind = kernel_dtype("gradient", dtype);
  Tensor out = new_tensor(from, from.sizes(), dtype);
  lora_table().scale_into(data<float>(from), from.numel(), factor, kind, out.mutable_data_ptr());
  return out;
}

ScalarType dtype_of(const std::optional<Tensor>& t, ScalarType otherwise) {
  return t.has_value() ? t->scalar_type() : otherwise;
}

}  // namespace

LoraGrads lora_grads(const LoraSaved& saved, const Base& base, const LoraView& lora,
                     const Tensor& a, const Tensor& b, const std::optional<Tensor>& rank_diag,
                     const std::optional<Tensor>& out_diag, const LoraNeeds& needs) {
  const Tensor& dy = saved.dy;
  const ScalarType dtype = dy.scalar_type();
  const int64_t m = saved.dy_rows.rows, r = lora.r();
  LoraGrads grads;
  if (needs.x || needs.a) {
    if (needs.x) grads.dx = rows_like(dy, base.meta.k);
    Tensor ds = new_tensor(dy, {m, r}, rank_dtype(dtype));
    const LoraBackward call{saved.dy_rows, base.view, lora,
                            needs.x ? grads.dx->mutable_data_ptr() : nullptr,
                            ds.mutable_data_ptr()};
    if (m > 0) check_memory(lora_table().backward(call, torch_parallel()));
    if (needs.a) {
      const float factor =
          lora.dropout.threshold != 0 ? dropout_scale(lora.dropout.threshold) : 1.0f;
      grads.da = scaled(wgrad(matrix_view("ds", ds, m, r), saved.x_rows, lora.dropout, dy), factor,
                        a.scalar_type());
    }
  }
  if (needs.b || needs.rank_diag || needs.out_diag) {
    const Tensor s_dy = wgrad(saved.s_rows, saved.dy_rows, Dropout{}, dy);
    Tensor drank32 = new_tensor(dy, {needs.rank_diag ? r : 0}, ScalarType::Float);
    Tensor dout32 = new_tensor(dy, {needs.out_diag ? base.meta.n : 0}, ScalarType::Float);
    if (needs.b) grads.db = new_tensor(dy, {base.meta.n, r}, b.scalar_type());
    const AdapterGrads call{data<float>(s_dy), lora,
                            needs.b ? grads.db->mutable_data_ptr() : nullptr,
                            needs.rank_diag ? mutable_data<float>(drank32) : nullptr,
                            needs.out_diag ? mutable_data<float>(dout32) : nullptr};
    lora_table().adapter_grads(call, torch_parallel());
    if (needs.rank_diag) grads.drank_diag = scaled(drank32, 1.0f, dtype_of(rank_diag, dtype));
    if (needs.out_diag) grads.dout_diag = scaled(dout32, 1.0f, dtype_of(out_diag, dtype));
  }
  return grads;
}

Tensor bias_grad(const Tensor& dy) {
  const int64_t rows = 0;
  return torch::stable::sum(dy, Sizes(&rows, 1));
}

namespace {

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads lora_linear_bwd(const Tensor& any_dy, const Tensor& any_x, const Tensor& any_s,
                      const std::vector<Tensor>& base_tensors, const std::vector<int64_t>& meta,
                      const Tensor& a, const Tensor& b, double scale, double dropout_p,
                      const std::optional<Tensor>& seed, const std::optional<Tensor>& rank_diag,
                      const std::optional<Tensor>& out_diag, const std::vector<bool>& needs,
                      int64_t stream) {
  enum { kX, kA, kB, kBias, kRankDiag, kOutDiag, kWeight };
  LK_CHECK(needs.size() == 7, "needs: got ", needs.size(), " flags, expected 7");
  const Base base(base_tensors, meta);
  const LoraView lora = lora_view(base, a, b, scale, dropout_p, seed, rank_diag, out_diag, stream);
  const Tensor dy = rows_of("dy", any_dy, base.meta.n), x = rows_of("x", any_x, base.meta.k);
  const Tensor s = rows_of("s", any_s, lora.r());
  const LoraSaved saved{dy, matrix_view("dy", dy, -1, base.meta.n),
                        matrix_view("x", x, -1, base.meta.k), matrix_view("s", s, -1, lora.r())};
  LK_CHECK(saved.x_rows.dtype == saved.dy_rows.dtype, "dy: got ", dtype_name(dy.scalar_type()),
           ", x ", dtype_name(x.scalar_type()), "; expected one type");
  check_dtype("s", s, rank_dtype(dy.scalar_type()));
  const int64_t m = saved.dy_rows.rows;
  LK_CHECK(saved.x_rows.rows == m && saved.s_rows.rows == m, "dy: got ", m, " rows, x ",
           saved.x_rows.rows, ", s ", saved.s_rows.rows, "; expected as many");
  const LoraNeeds wanted{needs[kX], needs[kA], needs[kB], needs[kRankDiag], needs[kOutDiag]};
  const LoraGrads made = lora_grads(saved, base, lora, a, b, rank_diag, out_diag, wanted);
  const auto or_none = [&](const std::optional<Tensor>& t, ScalarType dtype) {
    return t.has_value() ? *t : new_tensor(dy, {0}, dtype);
  };
  const ScalarType dtype = dy.scalar_type();
  std::optional<Tensor> dbias, dw;
  if (needs[kBias]) dbias = bias_grad(dy);
  if (needs[kWeight]) dw = torch::stable::matmul(torch::stable::transpose(dy, 0, 1), x);
  return {or_none(made.dx, dtype),
          or_none(made.da, a.scalar_type()),
          or_none(made.db, b.scalar_type()),
          or_none(dbias, dtype),
          or_none(made.drank_diag, dtype_of(rank_diag, dtype)),
          or_none(made.dout_diag, dtype_of(out_diag, dtype)),
          or_none(dw, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace lora_kernels
