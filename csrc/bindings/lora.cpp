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

namespace {

void check_memory(bool ok) {
  if (!ok) throw std::runtime_error("out of memory for a kernel's workspace");
}

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

bool rows_of_floats(const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  return t.dim() == 2 && t.is_cpu() && t.scalar_type() == dtype && t.size(0) == rows &&
         t.size(1) == columns && (columns == 1 || t.stride(1) == 1);
}

bool usual_bias(const std::optional<Tensor>& bias, int64_t n, ScalarType dtype) {
  return !bias.has_value() ||
         (bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == dtype &&
          bias->is_cpu() && bias->is_contiguous());
}

MatrixView view_of(const Tensor& t, int64_t rows, int64_t columns, int64_t stride) {
  return {t.const_data_ptr(), kernel_dtype("x", t), rows, columns, stride};
}

// A new tensor of x's leading sizes: [..., columns].
Tensor rows_like(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(x, sizes, x.scalar_type());
}

}  // namespace

std::optional<Tensor> lora_linear_infer(const Tensor& x, const std::vector<Tensor>& base_tensors,
                                        const std::vector<int64_t>& meta, const Tensor& a,
                                        const Tensor& b, double scale,
                                        const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type(), adapters = a.scalar_type();
  const auto known = [](ScalarType t) {
    return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
  };
  if (!known(dtype) || !known(adapters) || meta.size() < 2 || meta[0] < 1 || meta[1] < 1)
    return std::nullopt;
  const int64_t n = meta[0], k = meta[1], r = a.dim() == 2 ? a.size(0) : 0;
  if (!x.is_cpu() || x.dim() == 0 || x.size(-1) != k || !x.is_contiguous() || r == 0 ||
      !rows_of_floats(a, r, k, adapters) || !rows_of_floats(b, n, r, adapters))
    return std::nullopt;
  if (meta.size() == 2 &&
      (base_tensors.size() != 1 || !rows_of_floats(base_tensors[0], n, k, dtype)))
    return std::nullopt;
  if (!usual_bias(bias, n, dtype)) return std::nullopt;
  const Base base(base_tensors, meta);
  Tensor y = rows_like(x, n);
  const int64_t rows = x.numel() / k;
  if (rows == 0) return y;
  LoraView lora{};
  lora.a = view_of(a, r, k, a.stride(0));
  lora.b = view_of(b, n, r, b.stride(0));
  lora.scale = static_cast<float>(scale);
  constexpr int64_t kFew = 2048;
  alignas(64) char few[sizeof(float) * kFew];  // s of a token or a few
  Tensor more;
  void* s = few;
  if (rows * r > kFew) {
    more = new_tensor(x, {rows, r}, rank_dtype(dtype));
    s = more.mutable_data_ptr();
  }
  const LoraForward call{view_of(x, rows, k, k), base.view, vector_view("bias", bias, n), lora,
                         y.mutable_data_ptr(),   s};
  check_memory(lora_table().forward(call, torch_parallel()));
  return y;
}

std::optional<Tensor> linear_infer(const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias) {
  constexpr ScalarType dtype = ScalarType::BFloat16;
  if (x.scalar_type() != dtype || !x.is_cpu() || x.dim() == 0 || !x.is_contiguous() ||
      weight.dim() != 2)
    return std::nullopt;
  const int64_t n = weight.size(0), k = weight.size(1), rows = k > 0 ? x.numel() / k : 0;
  const int64_t most = current() >= Isa::avx512_bf16 ? 8 : 1;
  if (x.size(-1) != k || n == 0 || rows == 0 || rows > most || current() == Isa::scalar ||
      !rows_of_floats(weight, n, k, dtype) || !usual_bias(bias, n, dtype))
    return std::nullopt;
  Tensor y = rows_like(x, n);
  const BaseView base{view_of(weight, n, k, weight.stride(0)), nullptr, n, k};
  const LoraForward call{view_of(x, rows, k, k), base,   vector_view("bias", bias, n), LoraView{},
                         y.mutable_data_ptr(),   nullptr};
  check_memory(lora_table().forward(call, torch_parallel()));
  return y;
}

namespace {

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
  Tensor out = torch::stable::new_empty(from, from.sizes(), dtype);
  lora_table().scale_into(data<float>(from), from.numel(), factor, kind, out.mutable_data_ptr());
  return out;
}

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
  const MatrixView dy_view = matrix_view("dy", dy, -1, base.meta.n);
  const MatrixView x_view = matrix_view("x", x, -1, base.meta.k);
  const MatrixView s_view = matrix_view("s", s, -1, lora.r());
  LK_CHECK(x_view.dtype == dy_view.dtype, "dy: got ", dtype_name(dy.scalar_type()), ", x ",
           dtype_name(x.scalar_type()), "; expected one type");
  check_dtype("s", s, rank_dtype(dy.scalar_type()));
  const int64_t m = dy_view.rows;
  LK_CHECK(x_view.rows == m && s_view.rows == m, "dy: got ", m, " rows, x ", x_view.rows, ", s ",
           s_view.rows, "; expected as many");
  const auto dtype_of = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? t->scalar_type() : dy.scalar_type();
  };
  const auto none = [&](ScalarType dtype) { return new_tensor(dy, {0}, dtype); };

  Tensor dx = none(dy.scalar_type()), da = none(a.scalar_type()), db = none(b.scalar_type());
  Tensor dbias = none(dy.scalar_type()), dw = none(dy.scalar_type());
  Tensor drank = none(dtype_of(rank_diag)), dout = none(dtype_of(out_diag));
  if (needs[kX] || needs[kA]) {
    if (needs[kX]) dx = new_tensor(dy, {m, base.meta.k}, dy.scalar_type());
    Tensor ds = new_tensor(dy, {m, lora.r()}, rank_dtype(dy.scalar_type()));
    const LoraBackward call{dy_view, base.view, lora, needs[kX] ? dx.mutable_data_ptr() : nullptr,
                            ds.mutable_data_ptr()};
    if (m > 0) check_memory(lora_table().backward(call, torch_parallel()));
    if (needs[kA]) {
      const float factor =
          lora.dropout.threshold != 0 ? dropout_scale(lora.dropout.threshold) : 1.0f;
      da = scaled(wgrad(matrix_view("ds", ds, m, lora.r()), x_view, lora.dropout, dy), factor,
                  a.scalar_type());
    }
  }
  if (needs[kB] || needs[kRankDiag] || needs[kOutDiag]) {
    const Tensor s_dy = wgrad(s_view, dy_view, Dropout{}, dy);
    Tensor drank32 = new_tensor(dy, {needs[kRankDiag] ? lora.r() : 0}, ScalarType::Float);
    Tensor dout32 = new_tensor(dy, {needs[kOutDiag] ? base.meta.n : 0}, ScalarType::Float);
    if (needs[kB]) db = new_tensor(dy, {base.meta.n, lora.r()}, b.scalar_type());
    const AdapterGrads call{data<float>(s_dy), lora, needs[kB] ? db.mutable_data_ptr() : nullptr,
                            needs[kRankDiag] ? mutable_data<float>(drank32) : nullptr,
                            needs[kOutDiag] ? mutable_data<float>(dout32) : nullptr};
    lora_table().adapter_grads(call, torch_parallel());
    if (needs[kRankDiag]) drank = scaled(drank32, 1.0f, dtype_of(rank_diag));
    if (needs[kOutDiag]) dout = scaled(dout32, 1.0f, dtype_of(out_diag));
  }
  if (needs[kBias]) {
    const int64_t rows = 0;
    dbias = torch::stable::sum(dy, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
  }
  if (needs[kWeight]) dw = torch::stable::matmul(torch::stable::transpose(dy, 0, 1), x);
  return {dx, da, db, dbias, drank, dout, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
  m.impl("lora_linear_infer", TORCH_BOX(&lora_linear_infer));
  m.impl("linear_infer", TORCH_BOX(&linear_infer));
}

}  // namespace lora_kernels
