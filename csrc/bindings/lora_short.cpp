// The ops of the short way (lora_kernels/ops/lora/short.py): a usual call of a layer on the CPU
// from its arguments to the kernel, and nothing for any other call, which the checks of every call
// and lora_linear_{fwd,bwd} then take. x, dy and y are [..., K] and [..., N].
#include "bindings/lora.h"

namespace lora_kernels {
namespace {

using MaybeTensor = std::optional<Tensor>;

bool known(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

bool rows_of_floats(const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  return t.dim() == 2 && t.is_cpu() && t.scalar_type() == dtype && t.size(0) == rows &&
         t.size(1) == columns && (columns == 1 || t.stride(1) == 1);
}

bool usual_vector(const MaybeTensor& t, int64_t n, ScalarType dtype) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == n && t->scalar_type() == dtype &&
                            t->is_cpu() && t->is_contiguous());
}

MatrixView view_of(const Tensor& t, int64_t rows, int64_t columns, int64_t stride) {
  return {t.const_data_ptr(), kernel_dtype("x", t), rows, columns, stride};
}

// Whether the kernels take x over this base, and A and B as they are.
bool usual(const Tensor& x, const std::vector<Tensor>& base, const std::vector<int64_t>& meta,
           const Tensor& a, const Tensor& b, const MaybeTensor& bias) {
  if (meta.size() < 2 || base.empty() || (meta.size() == 2 && base.size() != 1)) return false;
  const ScalarType dtype = x.scalar_type(), adapters = a.scalar_type();
  const int64_t n = meta[0], k = meta[1], r = a.dim() == 2 ? a.size(0) : 0;
  return known(dtype) && known(adapters) && n > 0 && k > 0 && r > 0 && x.is_cpu() && x.dim() > 0 &&
         x.size(-1) == k && x.is_contiguous() && rows_of_floats(a, r, k, adapters) &&
         rows_of_floats(b, n, r, adapters) &&
         (meta.size() > 2 || rows_of_floats(base[0], n, k, dtype)) && usual_vector(bias, n, dtype);
}

LoraView adapter_of(const Tensor& a, const Tensor& b, double scale) {
  LoraView lora{};
  const int64_t r = a.size(0);
  lora.a = view_of(a, r, a.size(1), a.stride(0));
  lora.b = view_of(b, b.size(0), r, b.stride(0));
  lora.scale = static_cast<float>(scale);
  return lora;
}

}  // namespace

std::optional<Tensor> lora_linear_infer(const Tensor& x, const std::vector<Tensor>& base_tensors,
                                        const std::vector<int64_t>& meta, const Tensor& a,
                                        const Tensor& b, double scale,
                                        const std::optional<Tensor>& bias) {
  if (!usual(x, base_tensors, meta, a, b, bias)) return std::nullopt;
  const Base base(base_tensors, meta);
  Tensor y = rows_like(x, meta[0]);
  const int64_t rows = x.numel() / meta[1], r = a.size(0);
  if (rows == 0) return y;
  constexpr int64_t kFew = 2048;
  alignas(64) char few[sizeof(float) * kFew];  // s of a token or a few
  MaybeTensor more;
  void* s = few;
  if (rows * r > kFew) {
    more = new_tensor(x, {rows, r}, rank_dtype(x.scalar_type()));
    s = more->mutable_data_ptr();
  }
  const LoraForward call{view_of(x, rows, meta[1], meta[1]),
                         base.view,
                         vector_view("bias", bias, meta[0]),
                         adapter_of(a, b, scale),
                         y.mutable_data_ptr(),
                         s};
  check_memory(lora_table().forward(call, torch_parallel()));
  return y;
}

namespace {

// A list among an op's arguments takes 0.5 us on its way through torch, as long as half the kernel
// of a token: for a dense weight there is none.
MaybeTensor lora_dense_infer(const Tensor& x, const Tensor& weight, const Tensor& a,
                             const Tensor& b, double scale, const MaybeTensor& bias) {
  return lora_linear_infer(x, {weight}, {weight.size(0), weight.size(1)}, a, b, scale, bias);
}

// What torch.randint gives for these arguments (`draw_seed` in lora_kernels/ops/lora/api.py).
Tensor draw_seed(const Tensor& like) {
  Tensor seed = new_tensor(like, {1}, ScalarType::Long);
  StableIValue stack[] = {torch::stable::detail::from(seed),
                          torch::stable::detail::from(int64_t{0}),
                          torch::stable::detail::from(std::optional<int64_t>(INT64_MAX)),
                          torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "from", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y, s [M, R], and the seed where one was drawn. dropout_p is 0 or such that some are dropped.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> lora_linear_train(
    const Tensor& x, const std::vector<Tensor>& base_tensors, const std::vector<int64_t>& meta,
    const Tensor& a, const Tensor& b, double scale, const MaybeTensor& bias, double dropout_p,
    const MaybeTensor& seed, const MaybeTensor& rank_diag) {
  if (!usual(x, base_tensors, meta, a, b, bias)) return {};
  const int64_t rows = x.numel() / meta[1], r = a.size(0);
  if (seed.has_value() && !usual_vector(seed, 1, ScalarType::Long)) return {};
  if (rank_diag.has_value() &&
      !(known(rank_diag->scalar_type()) && usual_vector(rank_diag, r, rank_diag->scalar_type())))
    return {};
  const Base base(base_tensors, meta);
  LoraView lora = adapter_of(a, b, scale);
  lora.rank_diag = vector_view("rank_diag", rank_diag, r);
  MaybeTensor drawn;
  if (dropout_p > 0) {
    if (!seed.has_value()) drawn = draw_seed(x);
    const Tensor& key = seed.has_value() ? *seed : *drawn;
    lora.dropout = {static_cast<uint64_t>(*data<int64_t>(key)), 0, dropout_threshold(dropout_p)};
  }
  Tensor y = rows_like(x, meta[0]);
  Tensor s = new_tensor(x, {rows, r}, rank_dtype(x.scalar_type()));
  const LoraForward call{view_of(x, rows, meta[1], meta[1]),
                         base.view,
                         vector_view("bias", bias, meta[0]),
                         lora,
                         y.mutable_data_ptr(),
                         s.mutable_data_ptr()};
  if (rows > 0) check_memory(lora_table().forward(call, torch_parallel()));
  return {y, s, drawn};
}

// The gradients that are needed of x, A, B, the bias and the rank diagonal, from what
// lora_linear_train took and gave, x as rows. Nothing where dy is not contiguous, nor rows of two
// dimensions, or where what was kept has come back as something else.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> lora_linear_train_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& s, const std::vector<Tensor>& base_tensors,
    const std::vector<int64_t>& meta, const Tensor& a, const Tensor& b, double scale,
    double dropout_p, const MaybeTensor& seed, const MaybeTensor& rank_diag,
    const std::vector<bool>& needs) {
  LK_CHECK(needs.size() == 5 && meta.size() >= 2, "needs: got ", needs.size(),
           " flags, expected 5 (x, lora_a, lora_b, bias, rank_diag)");
  const ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), columns = meta[0], r = s.size(-1);
  if (!usual(x, base_tensors, meta, a, b, std::nullopt) || a.size(0) != r || !dy.is_cpu() ||
      dy.scalar_type() != dtype || dy.dim() == 0 || dy.size(-1) != columns ||
      dy.numel() != rows * columns ||
      !(dy.is_contiguous() || (dy.dim() == 2 && dy.stride(1) == 1)) ||
      !rows_of_floats(s, rows, r, rank_dtype(dtype)))
    return {};
  const Base base(base_tensors, meta);
  const LoraView lora = lora_view(base, a, b, scale, dropout_p, seed, rank_diag, std::nullopt, 0);
  const LoraSaved saved{dy, view_of(dy, rows, columns, dy.is_contiguous() ? columns : dy.stride(0)),
                        view_of(x, rows, meta[1], meta[1]), view_of(s, rows, r, s.stride(0))};
  LoraGrads grads = lora_grads(saved, base, lora, a, b, rank_diag, std::nullopt,
                               {needs[0], needs[1], needs[2], needs[4], false});
  MaybeTensor dbias;
  if (needs[3]) dbias = bias_grad(dy.dim() == 2 ? dy : torch::stable::view(dy, {rows, columns}));
  return {grads.dx, grads.da, grads.db, dbias, grads.drank_diag};
}

}  // namespace

MaybeTensor linear_infer(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  constexpr ScalarType dtype = ScalarType::BFloat16;
  if (x.scalar_type() != dtype || !x.is_cpu() || x.dim() == 0 || !x.is_contiguous() ||
      weight.dim() != 2)
    return std::nullopt;
  const int64_t n = weight.size(0), k = weight.size(1), rows = k > 0 ? x.numel() / k : 0;
  const int64_t most = current() >= Isa::avx512_bf16 ? 8 : 1;
  if (x.size(-1) != k || n == 0 || rows == 0 || rows > most || current() == Isa::scalar ||
      !rows_of_floats(weight, n, k, dtype) || !usual_vector(bias, n, dtype))
    return std::nullopt;
  Tensor y = rows_like(x, n);
  const BaseView base{view_of(weight, n, k, weight.stride(0)), nullptr, n, k};
  const LoraForward call{view_of(x, rows, k, k), base,   vector_view("bias", bias, n), LoraView{},
                         y.mutable_data_ptr(),   nullptr};
  check_memory(lora_table().forward(call, torch_parallel()));
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_linear_infer", TORCH_BOX(&lora_linear_infer));
  m.impl("lora_dense_infer", TORCH_BOX(&lora_dense_infer));
  m.impl("lora_linear_train", TORCH_BOX(&lora_linear_train));
  m.impl("lora_linear_train_bwd", TORCH_BOX(&lora_linear_train_bwd));
  m.impl("linear_infer", TORCH_BOX(&linear_infer));
}

}  // namespace lora_kernels
