// Gated linear units (glu.h): one pass, in fp32, each result rounded once.
//
// Bytes it cannot avoid: every operand once, every result once. An activation costs 20 to 40
// instructions a vector, so a few cores use all of the memory's bandwidth.
#include "lora_kernels/glu.h"

#include "vector/functions.h"

namespace lora_kernels {
namespace {

using vector::Chance;
using vector::kLanes;
using vector::load;
using vector::load_some;
using vector::min64;
using vector::multiply_add;
using vector::put;
using vector::splat;
using vector::Vec;

// act(g) and act'(g).
struct Act {
  Vec value, slope;
};

// g * sigma(g); the slope is sigma + g * sigma * (1 - sigma).
struct Silu {
  static LK_INLINE Act at(Vec g) {
    const Chance s = vector::logistic(g);
    return {g * s.below, s.below * multiply_add(g, s.above, splat(1.0f))};
  }
};

// g * Phi(g); the slope is Phi + g * phi.
struct Gelu {
  static LK_INLINE Act at(Vec g) {
    Vec density;
    const Chance s = vector::normal(g, &density);
    return {g * s.below, multiply_add(g, density, s.below)};
  }
};

// g / 2 * (1 + tanh(z / 2)) = g * sigma(z), z = 2 sqrt(2 / pi) (g + 0.044715 g^3).
struct GeluTanh {
  static LK_INLINE Act at(Vec g) {
    constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;
    const Vec square = g * g;
    const Vec z = g * multiply_add(square, splat(kCubic), splat(kLinear));
    const Vec dz = multiply_add(square, splat(3 * kCubic), splat(kLinear));
    const Chance s = vector::logistic(z);
    return {g * s.below, s.below * multiply_add(g * dz, s.above, splat(1.0f))};
  }
};

template <class T>
LK_INLINE void put_some(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return put(p, v);
  float lanes[kLanes];
  put(lanes, v);
  for (int64_t i = 0; i < count; ++i) store(p + i, lanes[i]);
}

// Calls fn(row, column, count) for pieces of the rows, on all threads.
template <class Fn>
void pieces(const Glu& f, const Parallel& parallel, const Fn& fn) {
  constexpr int64_t kPiece = 1024;     // elements
  constexpr int64_t kGrain = 1 << 14;  // elements that a thread takes at least
  if (f.columns == 0) return;
  const int64_t of_row = vector::ceil_div(f.columns, kPiece);
  const int64_t grain = vector::ceil_div(kGrain, min64(f.columns, kPiece));
  parallel(0, f.rows * of_row, grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin / of_row, column = begin % of_row * kPiece;
    for (int64_t i = begin; i < end; ++i) {
      fn(row, column, min64(kPiece, f.columns - column));
      column += kPiece;
      if (column >= f.columns) {
        column = 0;
        ++row;
      }
    }
  });
}

template <class A, class T>
void forward_as(const Glu& f, const Parallel& parallel) {
  pieces(f, parallel, [&](int64_t row, int64_t column, int64_t count) {
    const T* g = static_cast<const T*>(f.g) + row * f.g_stride + column;
    const T* u = static_cast<const T*>(f.u) + row * f.u_stride + column;
    T* h = static_cast<T*>(f.h) + row * f.columns + column;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t rest = count - i;
      put_some(h + i, A::at(load_some(g + i, rest)).value * load_some(u + i, rest), rest);
    }
  });
}

template <class A, class T>
void backward_as(const Glu& f, const Parallel& parallel) {
  pieces(f, parallel, [&](int64_t row, int64_t column, int64_t count) {
    const T* g = static_cast<const T*>(f.g) + row * f.g_stride + column;
    const T* u = static_cast<const T*>(f.u) + row * f.u_stride + column;
    const T* dh = static_cast<const T*>(f.dh) + row * f.dh_stride + column;
    const int64_t at = row * f.columns + column;
    T *dg = static_cast<T*>(f.dg) + at, *du = static_cast<T*>(f.du) + at;
    T* h = f.h != nullptr ? static_cast<T*>(f.h) + at : nullptr;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t rest = count - i;
      const Act act = A::at(load_some(g + i, rest));
      const Vec up = load_some(u + i, rest), d = load_some(dh + i, rest);
      put_some(dg + i, d * up * act.slope, rest);
      put_some(du + i, d * act.value, rest);
      if (h != nullptr) put_some(h + i, act.value * up, rest);
    }
  });
}

template <class A, bool back>
void visit_dtype(const Glu& f, const Parallel& parallel) {
  switch (f.dtype) {
    case Dtype::f16:
      return back ? backward_as<A, Half>(f, parallel) : forward_as<A, Half>(f, parallel);
    case Dtype::bf16:
      return back ? backward_as<A, BFloat16>(f, parallel) : forward_as<A, BFloat16>(f, parallel);
    default:
      return back ? backward_as<A, float>(f, parallel) : forward_as<A, float>(f, parallel);
  }
}

template <bool back>
void visit(const Glu& f, const Parallel& parallel) {
  switch (f.activation) {
    case Activation::gelu:
      return visit_dtype<Gelu, back>(f, parallel);
    case Activation::gelu_tanh:
      return visit_dtype<GeluTanh, back>(f, parallel);
    default:
      return visit_dtype<Silu, back>(f, parallel);
  }
}

}  // namespace

LK_TABLE(GluKernels, glu) = {visit<false>, visit<true>};

}  // namespace lora_kernels
