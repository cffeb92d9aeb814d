// What the multi-adapter ops share: the passes over the pages of a projection, and the gradients
// that are sums over its entries.
#pragma once

#include <stdexcept>

#include "bindings/gather.h"

namespace lora_kernels {

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline void check_memory(bool ok) {
  if (!ok) throw std::runtime_error("out of memory for a kernel's workspace");
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = new_tensor(like, shape, dtype);
  return torch::stable::zero_(t);
}

inline Tensor zeros_like(const Tensor& pages) {
  return zeros(pages, {pages.size(0), pages.size(1), pages.size(2)}, pages.scalar_type());
}

struct GatherCall {
  Tensor like;        // has the activations' type; results are made on its device
  Dtype activations;  // of x, y and dy
  Entries entries;
  Parallel parallel = torch_parallel();

  GatherCall(const char* name, const Tensor& of, int64_t tokens,
             const std::vector<Tensor>& entry_tensors, int64_t slots)
      : like(of), activations(kernel_dtype(name, of)), entries(entry_tensors, slots, tokens) {}

  Tensor none(ScalarType dtype) const { return new_tensor(like, {0}, dtype); }

  Tensor new_sums(const Projection& p) const {
    return new_tensor(like, {entries.count, p.width}, ScalarType::Float);
  }

  GatherPass pass(const Projection& p, const Tensor& pages, const std::vector<SlotGroup>& groups,
                  const Tensor& sums, const SlotDropout& dropout) const {
    return {pages.const_data_ptr(),
            p.dtype,
            activations,
            pages.size(2),
            groups.data(),
            int64_t(groups.size()),
            entries.repeats,
            entries.tokens.data(),
            static_cast<float*>(const_cast<void*>(sums.const_data_ptr())),
            p.width,
            dropout};
  }

  // sums = the products of m with the pages' rows. Rounded they also go to s, rows `stride` apart,
  // if it is not null.
  void shrink(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
              const MatrixView& m, const Tensor& sums, void* s = nullptr,
              int64_t stride = 0) const {
    check_memory(
        gather_table().shrink(pass(p, pages, p.groups, sums, dropout), m, s, stride, parallel));
  }

  void expand(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
              const Tensor& sums, const float* factor, bool overwrite,
              const MatrixView& out) const {
    check_memory(gather_table().expand(pass(p, pages, p.turns, sums, dropout), factor, overwrite,
                                       out, parallel));
  }

  void wgrad(const Projection& p, const Tensor& pages, const SlotDropout& dropout,
             const MatrixView& m, const Tensor& sums) const {
    check_memory(gather_table().wgrad(pass(p, pages, p.groups, sums, dropout), m, parallel));
  }
};

// dscales[slot] = Σ weight · u · s and dweights[e] += scale · u · s, each where not null.
inline void product_grads(const GatherCall& call, const Projection& p, const float* u,
                          const float* s, float* dscales, float* dweights) {
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

// Multiplies the sums with the weight of the entry and the scale of its adapter.
inline void scale_rows(const Projection& p, float* sums) {
  for (const SlotGroup& g : p.groups)
    for (int64_t i = 0; i < g.count; ++i)
      for (int64_t j = 0; j < g.rank; ++j)
        sums[g.entries[i] * p.width + j] *= p.factor[size_t(g.entries[i])];
}

// A page gets the gradient of one slot, so two slots must not share it.
inline void check_unshared(const Projection& p) {
  std::vector<char> seen(size_t(p.a->size(0)), 0);
  for (const SlotGroup& g : p.groups)
    for (int64_t c = 0; c * kPage < g.rank; ++c) {
      char& mark = seen[size_t(g.pages[c])];
      LK_CHECK(mark == 0, "pages.table: got page ", g.pages[c], " at slot ", g.slot,
               " and at another, expected pages of one slot each where a gradient is asked for");
      mark = 1;
    }
}

}  // namespace lora_kernels
