// The LoRA layer, and without an adapter the 4-bit linear layer: bf16 activations on tiles
// (csrc/cpu/tiles) in the tiers that have them, everything else on fp32 vectors (csrc/cpu/vector).
#include "lora_kernels/lora.h"

#include "target.h"
#include "vector/lora.h"

#if LK_BF16
#include <new>

#include "tiles/lora_backward.h"
#include "tiles/lora_direct.h"
#include "tiles/lora_direct_backward.h"
#include "tiles/lora_dot.h"
#include "tiles/lora_skinny.h"
#include "tiles/lora_wgrad.h"
#endif

namespace lora_kernels {
namespace {

float element(const MatrixView& m, int64_t i) {
  if (m.data == nullptr) return 1.0f;
  switch (m.dtype) {
    case Dtype::f16:
      return to_float(static_cast<const Half*>(m.data)[i]);
    case Dtype::bf16:
      return to_float(static_cast<const BFloat16*>(m.data)[i]);
    default:
      return static_cast<const float*>(m.data)[i];
  }
}

template <class T>
void adapter_grads_rows(const AdapterGrads& f, int64_t begin, int64_t end) {
  const LoraView& lora = f.lora;
  const int64_t r = lora.r(), n = lora.b.rows;
  const T* b = static_cast<const T*>(lora.b.data);
  for (int64_t i = begin; i < end; ++i) {
    const float g = lora.scale * element(lora.out_diag, i);
    double sum = 0.0;
    for (int64_t j = 0; j < r; ++j) {
      const float d = element(lora.rank_diag, j), s_dy = f.s_dy[j * n + i];
      if (f.db != nullptr) store(static_cast<T*>(f.db) + i * r + j, g * s_dy * d);
      if (f.dout_diag != nullptr) sum += double(d * to_float(b[i * lora.b.stride + j])) * s_dy;
    }
    if (f.dout_diag != nullptr) f.dout_diag[i] = static_cast<float>(lora.scale * sum);
  }
}

template <class T>
void rank_diag_grad(const AdapterGrads& f) {
  const LoraView& lora = f.lora;
  const int64_t n = lora.b.rows;
  const T* b = static_cast<const T*>(lora.b.data);
  for (int64_t j = 0; j < lora.r(); ++j) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i)
      sum += double(element(lora.out_diag, i) * to_float(b[i * lora.b.stride + j])) *
             f.s_dy[j * n + i];
    f.drank_diag[j] = static_cast<float>(lora.scale * sum);
  }
}

template <class T>
void adapter_grads_as(const AdapterGrads& f, const Parallel& parallel) {
  if (f.db != nullptr || f.dout_diag != nullptr)
    parallel(0, f.lora.b.rows, 256,
             [&](int64_t begin, int64_t end) { adapter_grads_rows<T>(f, begin, end); });
  if (f.drank_diag != nullptr) rank_diag_grad<T>(f);
}

void adapter_grads(const AdapterGrads& f, const Parallel& parallel) {
  switch (f.lora.b.dtype) {
    case Dtype::f16:
      return adapter_grads_as<Half>(f, parallel);
    case Dtype::bf16:
      return adapter_grads_as<BFloat16>(f, parallel);
    default:
      return adapter_grads_as<float>(f, parallel);
  }
}

template <class T>
void scale_as(const float* in, int64_t count, float factor, void* out) {
  for (int64_t i = 0; i < count; ++i) store(static_cast<T*>(out) + i, in[i] * factor);
}

void scale_into(const float* in, int64_t count, float factor, Dtype dtype, void* out) {
  switch (dtype) {
    case Dtype::f16:
      return scale_as<Half>(in, count, factor, out);
    case Dtype::bf16:
      return scale_as<BFloat16>(in, count, factor, out);
    default:
      return scale_as<float>(in, count, factor, out);
  }
}

}  // namespace

#if LK_BF16

namespace {

DenseReader<Order::natural> dense_reader(const BaseView& base) {
  return {base.dense.data, base.dense.dtype, base.dense.stride, base.k};
}

bool forward(const LoraForward& f, const Parallel& parallel) {
  if (f.x.dtype != Dtype::bf16) return vector::forward(f, parallel);
  const BaseView& base = f.base;
  if (takes_dots(f)) {
    const Dots result = forward_dots(f, parallel);
    return result == Dots::unusual ? vector::forward(f, parallel) : result == Dots::done;
  }
  if (base.quant != nullptr && !Nf4Reader::takes(*base.quant, base.k))
    return forward_blocked(AnyNf4Reader(*base.quant, base.k), f, parallel);
  if (base.quant != nullptr && f.x.rows <= (LK_AMX ? kSkinnyRows : kTile))
    return forward_skinny(Nf4Reader(*base.quant, base.k), f, parallel);
  if (takes_direct(f)) return forward_direct(f, parallel);
  if (base.quant == nullptr) return forward_blocked(dense_reader(base), f, parallel);
  const QuantView q = decoded_scales(*base.quant, kScales, parallel);
  return forward_blocked(Nf4Reader(q, base.k), f, parallel);
}

bool backward(const LoraBackward& f, const Parallel& parallel) {
  if (f.dy.dtype != Dtype::bf16) return vector::backward(f, parallel);
  const BaseView& base = f.base;
  const auto product = [&](const auto& reader) {
#if LK_AMX
    return backward_blocked(reader, f, parallel);
#else
    return backward_direct(reader, f, parallel);
#endif
  };
  if (base.quant == nullptr) return product(dense_reader(base));
  if (!Nf4Reader::takes(*base.quant, base.k)) return product(AnyNf4Reader(*base.quant, base.k));
  const QuantView q = decoded_scales(*base.quant, kScales, parallel);
  return q.absmax != nullptr && product(Nf4Reader(q, base.k));
}

bool wgrad(const Wgrad& f, const Parallel& parallel) {
  return f.right.dtype == Dtype::bf16 ? wgrad_bf16(f, parallel) : vector::wgrad(f, parallel);
}

}  // namespace

LK_TABLE(LoraKernels, lora) = {forward, backward, wgrad, adapter_grads, scale_into};

#else

LK_TABLE(LoraKernels, lora) = {vector::forward, vector::backward, vector::wgrad, adapter_grads,
                               scale_into};

#endif

}  // namespace lora_kernels
