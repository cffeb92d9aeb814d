// The table of CPU kernels of gated linear units: h = act(g) * u and its gradients.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

// The ops' integers (lora_kernels/ops/glu/schema.py).
enum class Activation : int { silu = 0, gelu, gelu_tanh };
constexpr int kActivations = 3;

struct Glu {
  Activation activation;
  Dtype dtype;            // of every tensor
  int64_t rows, columns;  // M, I
  // [M, I] with the distance between rows, in elements
  const void *g, *u, *dh;
  int64_t g_stride, u_stride, dh_stride;
  // [M, I] contiguous
  void *h, *dg, *du;
};

struct GluKernels {
  // h = act(g) * u
  void (*forward)(const Glu&, const Parallel&);
  // dg = dh * u * act'(g), du = dh * act(g), and h again where it is not null
  void (*backward)(const Glu&, const Parallel&);
};

LK_DECLARE_FAMILY(GluKernels, glu)

}  // namespace lora_kernels
