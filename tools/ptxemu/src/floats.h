// Float operations; setp, selp, set.
#pragma once
#include <cfenv>
#include "integers.h"

static inline float fz(float x) {
  u32 b = f2b(x);
  return (b & 0x7f800000) ? x : b2f(b & 0x80000000);
}
template <class T>
static inline T pmin(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
static inline T pmax(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
B2(FAdd, a + b);
B2(FSub, a - b);
B2(FMul, a* b);
B2(FDiv, a / b);
B2(FMin, pmin<T>(a, b));
B2(FMax, pmax<T>(a, b));
B2(FMinN, (a != a || b != b) ? (T)NAN : pmin<T>(a, b));
B2(FMaxN, (a != a || b != b) ? (T)NAN : pmax<T>(a, b));
B2(FCps, std::copysign(b, a));
struct FFma {
  template <class T>
  static inline T f(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
U1(FNeg, -a);
U1(FAbs, std::fabs(a));
U1(FEx2, std::exp2(a));
U1(FLg2, std::log2(a));
U1(FRcp, (T)1 / a);
U1(FSqrt, std::sqrt(a));
U1(FRsqrt, (T)1 / std::sqrt(a));
U1(FSin, std::sin(a));
U1(FCos, std::cos(a));
U1(FTanh, std::tanh(a));
template <class T, class F, bool Z>
static void ex_fu(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  T* d = P<T>(w, I.d);
  LANES(m, {
    T x = a[i];
    if (Z) x = (T)fz((float)x);
    x = F::f(x);
    if (Z) x = (T)fz((float)x);
    d[i] = x;
  });
}
template <class T, class F, bool Z>
static void ex_fb(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  T* d = P<T>(w, I.d);
  LANES(m, {
    T x = a[i], y = b[i];
    if (Z) {
      x = (T)fz((float)x);
      y = (T)fz((float)y);
    }
    x = F::f(x, y);
    if (Z) x = (T)fz((float)x);
    d[i] = x;
  });
}
template <class T, class F, bool Z>
static void ex_ft(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b), *c = P<T>(w, I.c);
  T* d = P<T>(w, I.d);
  LANES(m, {
    T x = a[i], y = b[i], z = c[i];
    if (Z) {
      x = (T)fz((float)x);
      y = (T)fz((float)y);
      z = (T)fz((float)z);
    }
    x = F::f(x, y, z);
    if (Z) x = (T)fz((float)x);
    d[i] = x;
  });
}
// f16/bf16 scalar (N=1) or packed (N=2), evaluated in double then rounded once
template <bool BF>
static inline double hg(u16 v) {
  return BF ? (double)bf2f(v) : (double)h2f(v);
}
template <bool BF>
static inline u16 hp_(double v) {
  return BF ? d2bf(v) : d2h(v);
}
static inline double hpost(double r, const Instr& I) {
  if (I.sat) {
    if (r != r)
      r = 0;
    else
      r = r < 0 ? 0 : r > 1 ? 1 : r;
  }
  if (I.relu && !(r > 0) && r == r) r = 0;
  return r;
}
template <class F, bool BF, int N>
static void ex_hu(Warp& w, const Instr& I, u32 m) {
  const u16* a = P<u16>(w, I.a);
  u16* d = P<u16>(w, I.d);
  LANES(m,
        for (int z = 0; z < N; z++) d[N * i + z] = hp_<BF>(hpost(F::f(hg<BF>(a[N * i + z])), I)));
}
template <class F, bool BF, int N>
static void ex_hb(Warp& w, const Instr& I, u32 m) {
  const u16 *a = P<u16>(w, I.a), *b = P<u16>(w, I.b);
  u16* d = P<u16>(w, I.d);
  LANES(m, for (int z = 0; z < N; z++) d[N * i + z] =
               hp_<BF>(hpost(F::f(hg<BF>(a[N * i + z]), hg<BF>(b[N * i + z])), I)));
}
template <class F, bool BF, int N>
static void ex_ht(Warp& w, const Instr& I, u32 m) {
  const u16 *a = P<u16>(w, I.a), *b = P<u16>(w, I.b), *c = P<u16>(w, I.c);
  u16* d = P<u16>(w, I.d);
  LANES(m, for (int z = 0; z < N; z++) d[N * i + z] = hp_<BF>(
               hpost(F::f(hg<BF>(a[N * i + z]), hg<BF>(b[N * i + z]), hg<BF>(c[N * i + z])), I)));
}
static void ex_hsign(Warp& w, const Instr& I, u32 m) {  // neg/abs on raw bits; op 0 neg 1 abs
  if (I.a.sz == 2) {
    const u16* a = P<u16>(w, I.a);
    u16* d = P<u16>(w, I.d);
    LANES(m, d[i] = I.op ? a[i] & 0x7fff : a[i] ^ 0x8000);
  } else {
    const u32* a = P<u32>(w, I.a);
    u32* d = P<u32>(w, I.d);
    LANES(m, d[i] = I.op ? a[i] & 0x7fff7fff : a[i] ^ 0x80008000);
  }
}
// slow path with directed rounding / saturation. op: 0 add 1 sub 2 mul 3 fma 4 div 5 sqrt 6 rcp
template <class T>
static __attribute__((noinline)) T slowf(int op, int rnd, T a, T b, T c) {
  static const int M[4] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  int old = fegetround();
  if (rnd) fesetround(M[rnd]);
  volatile T x = a, y = b, z = c;
  volatile T r;
  switch (op) {
    case 0:
      r = x + y;
      break;
    case 1:
      r = x - y;
      break;
    case 2:
      r = x * y;
      break;
    case 3:
      r = std::fma((T)x, (T)y, (T)z);
      break;
    case 4:
      r = x / y;
      break;
    case 5:
      r = std::sqrt((T)x);
      break;
    default:
      r = (T)1 / x;
  }
  T q = r;
  if (rnd) fesetround(old);
  return q;
}
template <class T>
static void ex_fslow(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = I.b.k ? P<T>(w, I.b) : a, *c = I.c.k ? P<T>(w, I.c) : a;
  T* d = P<T>(w, I.d);
  bool Z = I.ftz;
  LANES(m, {
    T x = a[i], y = b[i], z = c[i];
    if (Z) {
      x = fz(x);
      y = fz(y);
      z = fz(z);
    }
    T r = slowf<T>(I.op, I.rnd, x, y, z);
    if (Z) r = fz(r);
    if (I.sat) r = r != r ? 0 : r < 0 ? 0 : r > 1 ? 1 : r;
    d[i] = r;
  });
}
// ---------------------------------------------------------------- setp / selp / set
enum Cmp {
  Q_EQ,
  Q_NE,
  Q_LT,
  Q_LE,
  Q_GT,
  Q_GE,
  Q_EQU,
  Q_NEU,
  Q_LTU,
  Q_LEU,
  Q_GTU,
  Q_GEU,
  Q_NUM,
  Q_NAN
};
template <class T, int Q>
static inline bool cmp1(T a, T b) {
  bool un = (a != a) || (b != b);
  switch (Q) {
    case Q_EQ:
      return a == b;
    case Q_NE:
      return !un && a != b;
    case Q_LT:
      return a < b;
    case Q_LE:
      return a <= b;
    case Q_GT:
      return a > b;
    case Q_GE:
      return a >= b;
    case Q_EQU:
      return un || a == b;
    case Q_NEU:
      return a != b || un;
    case Q_LTU:
      return un || a < b;
    case Q_LEU:
      return un || a <= b;
    case Q_GTU:
      return un || a > b;
    case Q_GEU:
      return un || a >= b;
    case Q_NUM:
      return !un;
    default:
      return un;
  }
}
static inline void setpfin(Warp& w, const Instr& I, u32 m, u32 r) {
  u32 q = ~r;
  if (I.c.k) {
    u32 c = *P<u32>(w, I.c);
    if (I.c.neg) c = ~c;
    switch (I.op) {
      case 1:
        r &= c;
        q &= c;
        break;
      case 2:
        r |= c;
        q |= c;
        break;
      case 3:
        r ^= c;
        q ^= c;
        break;
    }
  }
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (r & m);
  if (I.d2.k) {
    u32* e = P<u32>(w, I.d2);
    *e = (*e & ~m) | (q & m);
  }
}
template <class T, int Q>
static void ex_setp(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)cmp1<T, Q>(a[i], b[i]) << i;
  setpfin(w, I, m, r);
}
template <int Q>
static void ex_setpf(Warp& w, const Instr& I, u32 m) {
  const float *a = P<float>(w, I.a), *b = P<float>(w, I.b);
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)cmp1<float, Q>(fz(a[i]), fz(b[i])) << i;
  setpfin(w, I, m, r);
}
template <bool BF, int Q>
static void ex_setph(Warp& w, const Instr& I, u32 m) {
  const u16 *a = P<u16>(w, I.a), *b = P<u16>(w, I.b);
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)cmp1<double, Q>(hg<BF>(a[i]), hg<BF>(b[i])) << i;
  setpfin(w, I, m, r);
}
template <bool BF, int Q>
static void ex_setph2(Warp& w, const Instr& I, u32 m) {
  const u16 *a = P<u16>(w, I.a), *b = P<u16>(w, I.b);
  u32 r = 0, s = 0;
  for (int i = 0; i < 32; i++) {
    r |= (u32)cmp1<double, Q>(hg<BF>(a[2 * i]), hg<BF>(b[2 * i])) << i;
    s |= (u32)cmp1<double, Q>(hg<BF>(a[2 * i + 1]), hg<BF>(b[2 * i + 1])) << i;
  }
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (r & m);
  if (I.d2.k) {
    u32* e = P<u32>(w, I.d2);
    *e = (*e & ~m) | (s & m);
  }
}
// set.cmp.dtype.stype: uses the setp function into a scratch predicate, then expands
static void ex_setexp(Warp& w, const Instr& I, u32 m) {
  u32 r = *P<u32>(w, I.a);
  if (I.d.sz == 4) {
    u32* d = P<u32>(w, I.d);
    u32 one = I.ty == F32 ? 0x3f800000 : ~0u;
    LANES(m, d[i] = (r >> i & 1) ? one : 0);
  } else {
    u16* d = P<u16>(w, I.d);
    u16 one = I.ty == F16 ? 0x3c00 : I.ty == BF16 ? 0x3f80 : 0xffff;
    LANES(m, d[i] = (r >> i & 1) ? one : 0);
  }
}
template <class T>
static void ex_selp(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  T* d = P<T>(w, I.d);
  u32 c = *P<u32>(w, I.c);
  if (I.c.neg) c = ~c;
  LANES(m, d[i] = (c >> i & 1) ? a[i] : b[i]);
}
template <class T>
static void ex_slct(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  T* d = P<T>(w, I.d);
  if (I.ty2 == S32) {
    const s32* c = P<s32>(w, I.c);
    LANES(m, d[i] = c[i] >= 0 ? a[i] : b[i]);
  } else {
    const float* c = P<float>(w, I.c);
    LANES(m, d[i] = c[i] >= 0 ? a[i] : b[i]);
  }
}
static void ex_plog(Warp& w, const Instr& I, u32 m) {
  u32 a = *P<u32>(w, I.a);
  if (I.a.neg) a = ~a;
  u32 b = 0;
  if (I.b.k) {
    b = *P<u32>(w, I.b);
    if (I.b.neg) b = ~b;
  }
  u32 r;
  switch (I.op) {
    case 0:
      r = a & b;
      break;
    case 1:
      r = a | b;
      break;
    case 2:
      r = a ^ b;
      break;
    case 3:
      r = ~a;
      break;
    default:
      r = a;
  }
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (r & m);
}
static void ex_testp(Warp& w, const Instr& I, u32 m) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) {
    double x = I.ty == F32 ? (double)P<float>(w, I.a)[i] : P<double>(w, I.a)[i];
    int c = I.ty == F32 ? std::fpclassify(P<float>(w, I.a)[i]) : std::fpclassify(x);
    bool v = false;
    switch (I.op) {
      case 0:
        v = std::isfinite(x);
        break;
      case 1:
        v = std::isinf(x);
        break;
      case 2:
        v = c != FP_NAN;
        break;
      case 3:
        v = c == FP_NAN;
        break;
      case 4:
        v = c == FP_NORMAL || c == FP_ZERO;
        break;
      case 5:
        v = c == FP_SUBNORMAL;
        break;
    }
    r |= (u32)v << i;
  }
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (r & m);
}
