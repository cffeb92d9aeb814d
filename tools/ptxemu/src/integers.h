// Integer and bit operations.
#pragma once
#include "access.h"

template <class T, class F>
static void ex_u(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  T* d = P<T>(w, I.d);
  LANES(m, d[i] = F::f(a[i]));
}
template <class T, class F>
static void ex_b(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  T* d = P<T>(w, I.d);
  LANES(m, d[i] = F::f(a[i], b[i]));
}
template <class T, class F>
static void ex_t(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b), *c = P<T>(w, I.c);
  T* d = P<T>(w, I.d);
  LANES(m, d[i] = F::f(a[i], b[i], c[i]));
}
#define B2(N, E)                  \
  struct N {                      \
    template <class T>            \
    static inline T f(T a, T b) { \
      return (T)(E);              \
    }                             \
  }
#define U1(N, E)             \
  struct N {                 \
    template <class T>       \
    static inline T f(T a) { \
      return (T)(E);         \
    }                        \
  }
B2(Add, (typename std::make_unsigned<T>::type)a + (typename std::make_unsigned<T>::type)b);
B2(Sub, (typename std::make_unsigned<T>::type)a - (typename std::make_unsigned<T>::type)b);
B2(Mul, (u64)a*(u64)b);
B2(Min, a < b ? a : b);
B2(Max, a > b ? a : b);
B2(And, a& b);
B2(Or, a | b);
B2(Xor, a ^ b);
template <class T>
static inline T sdiv(T a, T b) {
  if (b == 0) return (T)-1;
  if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T>
static inline T srem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed<T>::value && b == (T)-1) return 0;
  return a % b;
}
B2(Div, sdiv<T>(a, b));
B2(Rem, srem<T>(a, b));
U1(Not, ~a);
U1(Cnot, a == 0 ? 1 : 0);
U1(Neg, (typename std::make_unsigned<T>::type)0 - (typename std::make_unsigned<T>::type)a);
U1(Abs, a < 0 ? (T)(0 - (u64)a) : a);
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    typedef
        typename std::conditional<std::is_signed<T>::value, __int128, unsigned __int128>::type W;
    return (T)(((W)a * (W)b) >> (8 * sizeof(T)));
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return (T)((u64)a * (u64)b + (u64)c);
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return (T)((u64)MulHi::f<T>(a, b) + (u64)c);
  }
};
struct Sad {
  template <class T>
  static T f(T a, T b, T c) {
    return (T)((u64)c + (u64)(a < b ? b - a : a - b));
  }
};
template <class T, class D>
static void ex_mulw(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  D* d = P<D>(w, I.d);
  D t[32];
  LANES(m, t[i] = (D)a[i] * (D)b[i]);
  LANES(m, d[i] = t[i]);
}
template <class T, class D>
static void ex_madw(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  const D* c = P<D>(w, I.c);
  D* d = P<D>(w, I.d);
  typedef typename std::make_unsigned<D>::type U;
  D t[32];
  LANES(m, t[i] = (D)((U)((D)a[i] * (D)b[i]) + (U)c[i]));
  LANES(m, d[i] = t[i]);
}
template <class T>
static void ex_shl(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  const u32* b = P<u32>(w, I.b);
  T* d = P<T>(w, I.d);
  LANES(m, d[i] = b[i] >= 8 * sizeof(T) ? 0 : (T)(a[i] << b[i]));
}
template <class T>
static void ex_shr(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  const u32* b = P<u32>(w, I.b);
  T* d = P<T>(w, I.d);
  LANES(m, {
    u32 s = b[i] >= 8 * sizeof(T) ? 8 * sizeof(T) - 1 : b[i];
    T v = a[i] >> s;
    if (b[i] >= 8 * sizeof(T) && !std::is_signed<T>::value) v = 0;
    d[i] = v;
  });
}
template <class T>
static void ex_bfe(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  const u32 *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  T* d = P<T>(w, I.d);
  const int W = 8 * sizeof(T);
  typedef typename std::make_unsigned<T>::type U;
  LANES(m, {
    u32 pos = b[i] & 255;
    u32 len = c[i] & 255;
    U v = pos >= (u32)W ? 0 : (U)a[i] >> pos;
    U r;
    if (!len)
      r = 0;
    else {
      u32 avail = pos >= (u32)W ? 0 : W - pos;
      u32 use = std::min(len, avail);
      r = use >= (u32)W ? v : v & (((U)1 << use) - 1);
      if (std::is_signed<T>::value) {
        u32 sp = std::min(pos + len - 1, (u32)W - 1);
        if (((U)a[i] >> sp) & 1) r |= use >= (u32)W ? 0 : ~(((U)1 << use) - 1);
      }
    }
    d[i] = (T)r;
  });
}
template <class T>
static void ex_bfi(Warp& w, const Instr& I, u32 m) {
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  const u32 *c = P<u32>(w, I.c), *e = P<u32>(w, I.e);
  T* d = P<T>(w, I.d);
  const u32 W = 8 * sizeof(T);
  LANES(m, {
    u32 pos = c[i] & 255;
    u32 len = e[i] & 255;
    if (pos >= W || !len)
      d[i] = b[i];
    else {
      u32 use = std::min(len, W - pos);
      T mk = (use >= W ? ~(T)0 : (((T)1 << use) - 1)) << pos;
      d[i] = (b[i] & ~mk) | ((a[i] << pos) & mk);
    }
  });
}
static void ex_popc(Warp& w, const Instr& I, u32 m) {
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = __builtin_popcountll(rdreg(w, I.a, i)));
}
static void ex_clz(Warp& w, const Instr& I, u32 m) {
  u32* d = P<u32>(w, I.d);
  int W = I.a.sz * 8;
  LANES(m, {
    u64 v = rdreg(w, I.a, i);
    d[i] = v ? __builtin_clzll(v) - (64 - W) : W;
  });
}
static void ex_brev(Warp& w, const Instr& I, u32 m) {
  int W = I.a.sz * 8;
  LANES(m, {
    u64 v = rdreg(w, I.a, i), r = 0;
    for (int z = 0; z < W; z++)
      if (v >> z & 1) r |= 1ull << (W - 1 - z);
    wrreg(w, I.d, i, r);
  });
}
static void ex_bfind(Warp& w, const Instr& I, u32 m) {
  u32* d = P<u32>(w, I.d);
  int W = I.a.sz * 8;
  LANES(m, {
    u64 v = rdreg(w, I.a, i);
    if (isSigned(I.ty) && (v >> (W - 1) & 1)) v = ~v & (W == 64 ? ~0ull : (1ull << W) - 1);
    u32 r = v ? 63 - __builtin_clzll(v) : ~0u;
    if (I.f1 && r != ~0u) r = W - 1 - r;
    d[i] = r;
  });
}
static void ex_lop3(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32* d = P<u32>(w, I.d);
  int L = (int)I.imm;
  LANES(m, {
    u32 A = a[i], B = b[i], C = c[i], r = 0;
    if (L & 1) r |= ~A & ~B & ~C;
    if (L & 2) r |= ~A & ~B & C;
    if (L & 4) r |= ~A & B & ~C;
    if (L & 8) r |= ~A & B & C;
    if (L & 16) r |= A & ~B & ~C;
    if (L & 32) r |= A & ~B & C;
    if (L & 64) r |= A & B & ~C;
    if (L & 128) r |= A & B & C;
    d[i] = r;
  });
}
static void ex_prmt(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32* d = P<u32>(w, I.d);
  LANES(m, {
    u64 x = a[i] | (u64)b[i] << 32;
    u32 s = c[i];
    u32 sel[4];
    int q = s & 3;
    switch (I.op) {
      case 0:
        for (int z = 0; z < 4; z++) sel[z] = (s >> (4 * z)) & 15;
        break;
      case 1:
        for (int z = 0; z < 4; z++) sel[z] = q + z;
        break;
      case 2:
        for (int z = 0; z < 4; z++) sel[z] = (q - z) & 7;
        break;
      case 3:
        for (int z = 0; z < 4; z++) sel[z] = q;
        break;
      case 4:
        for (int z = 0; z < 4; z++) sel[z] = std::max(z, q);
        break;
      case 5:
        for (int z = 0; z < 4; z++) sel[z] = std::min(z, q);
        break;
      default:
        for (int z = 0; z < 4; z++) sel[z] = (q & 1) * 2 + (z & 1);
    }
    u32 r = 0;
    for (int z = 0; z < 4; z++) {
      u8 by = (u8)(x >> (8 * (sel[z] & 7)));
      if (sel[z] & 8) by = (by & 128) ? 255 : 0;
      r |= (u32)by << (8 * z);
    }
    d[i] = r;
  });
}
static void ex_shf(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32* d = P<u32>(w, I.d);
  LANES(m, {
    u32 n = I.f2 ? (c[i] & 31) : std::min(c[i], 32u);
    u64 x = a[i] | (u64)b[i] << 32;
    d[i] = I.f1 ? (u32)(n ? (x << n) >> 32 : b[i]) : (u32)(x >> n);
    if (I.f1 && n == 32) d[i] = a[i];
  });
}
static void ex_dp4a(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32* d = P<u32>(w, I.d);
  LANES(m, {
    s64 r = 0;
    for (int z = 0; z < 4; z++) {
      s32 x = isSigned(I.ty) ? (s8)(a[i] >> 8 * z) : (u8)(a[i] >> 8 * z),
          y = isSigned(I.ty2) ? (s8)(b[i] >> 8 * z) : (u8)(b[i] >> 8 * z);
      r += x * y;
    }
    d[i] = c[i] + (u32)r;
  });
}
static void ex_dp2a(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32* d = P<u32>(w, I.d);
  LANES(m, {
    s64 r = 0;
    for (int z = 0; z < 2; z++) {
      s32 x = isSigned(I.ty) ? (s16)(a[i] >> 16 * z) : (u16)(a[i] >> 16 * z);
      int q = 8 * (z + (I.f1 ? 2 : 0));
      s32 y = isSigned(I.ty2) ? (s8)(b[i] >> q) : (u8)(b[i] >> q);
      r += (s64)x * y;
    }
    d[i] = c[i] + (u32)r;
  });
}
template <class T>
static void ex_addcc(Warp& w, const Instr& I,
                     u32 m) {  // op 0 add 1 sub ; f1: use carry in ; f2: write carry out
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b);
  T* d = P<T>(w, I.d);
  LANES(m, {
    u32 ci = I.f1 ? (w.cc >> i & 1) : (I.op ? 0 : 0);
    unsigned __int128 r;
    T av = a[i], bv = b[i];
    u32 co;
    if (!I.op) {
      r = (unsigned __int128)av + bv + ci;
      co = (u32)(r >> (8 * sizeof(T))) & 1;
    } else {
      r = (unsigned __int128)av - bv - ci;
      co = (unsigned __int128)av < (unsigned __int128)bv + ci;
    }
    d[i] = (T)r;
    if (I.f2) w.cc = (w.cc & ~(1u << i)) | co << i;
  });
}
template <class T>
static void ex_madcc(Warp& w, const Instr& I, u32 m) {  // op 0 lo 1 hi
  const T *a = P<T>(w, I.a), *b = P<T>(w, I.b), *c = P<T>(w, I.c);
  T* d = P<T>(w, I.d);
  LANES(m, {
    T p = I.op ? MulHi::f<T>(a[i], b[i]) : (T)((u64)a[i] * (u64)b[i]);
    unsigned __int128 r = (unsigned __int128)p + c[i] + (I.f1 ? (w.cc >> i & 1) : 0);
    d[i] = (T)r;
    if (I.f2) w.cc = (w.cc & ~(1u << i)) | ((u32)(r >> (8 * sizeof(T))) & 1) << i;
  });
}
// packed 16-bit integer min/max/add
template <class T, class F>
static void ex_b16x2(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b);
  u32* d = P<u32>(w, I.d);
  LANES(m, {
    u32 r = (u16)F::f((T)a[i], (T)b[i]) | (u32)(u16)F::f((T)(a[i] >> 16), (T)(b[i] >> 16)) << 16;
    d[i] = r;
  });
}
