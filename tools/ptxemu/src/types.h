// Errors, the types of PTX, and the small formats of floats.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
using std::string;
using std::vector;

// ---------------------------------------------------------------- errors
struct Err {
  string msg;
};
static string fmt(const char* f, ...) {
  char b[4096];
  va_list a;
  va_start(a, f);
  vsnprintf(b, sizeof b, f, a);
  va_end(a);
  return b;
}
#define FAIL(...) \
  throw Err { fmt(__VA_ARGS__) }

// ---------------------------------------------------------------- types
enum Ty : u8 {
  T_NONE,
  U8,
  S8,
  B8,
  U16,
  S16,
  B16,
  U32,
  S32,
  B32,
  U64,
  S64,
  B64,
  B128,
  F16,
  BF16,
  F16X2,
  BF16X2,
  F32,
  F64,
  PRED,
  TF32,
  E4M3,
  E5M2,
  E4M3X2,
  E5M2X2,
  U4,
  S4,
  U16X2,
  S16X2
};
static const std::map<string, Ty> TYN = {
    {"u8", U8},       {"s8", S8},         {"b8", B8},       {"u16", U16},       {"s16", S16},
    {"b16", B16},     {"u32", U32},       {"s32", S32},     {"b32", B32},       {"u64", U64},
    {"s64", S64},     {"b64", B64},       {"b128", B128},   {"f16", F16},       {"bf16", BF16},
    {"f16x2", F16X2}, {"bf16x2", BF16X2}, {"f32", F32},     {"f64", F64},       {"pred", PRED},
    {"tf32", TF32},   {"e4m3", E4M3},     {"e5m2", E5M2},   {"e4m3x2", E4M3X2}, {"e5m2x2", E5M2X2},
    {"u4", U4},       {"s4", S4},         {"u16x2", U16X2}, {"s16x2", S16X2}};
static int tsz(Ty t) {
  switch (t) {
    case U8:
    case S8:
    case B8:
    case E4M3:
    case E5M2:
      return 1;
    case U16:
    case S16:
    case B16:
    case F16:
    case BF16:
    case E4M3X2:
    case E5M2X2:
      return 2;
    case U32:
    case S32:
    case B32:
    case F32:
    case F16X2:
    case BF16X2:
    case TF32:
    case PRED:
    case U16X2:
    case S16X2:
      return 4;
    case U64:
    case S64:
    case B64:
    case F64:
      return 8;
    case B128:
      return 16;
    default:
      return 0;
  }
}
static bool isSigned(Ty t) { return t == S8 || t == S16 || t == S32 || t == S64; }
static bool isFloat(Ty t) {
  return t == F16 || t == BF16 || t == F32 || t == F64 || t == F16X2 || t == BF16X2 || t == TF32;
}

// ---------------------------------------------------------------- small float formats
static inline float b2f(u32 b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static inline u32 f2b(float f) {
  u32 b;
  memcpy(&b, &f, 4);
  return b;
}
static inline double b2d(u64 b) {
  double f;
  memcpy(&f, &b, 8);
  return f;
}
static inline u64 d2b(double f) {
  u64 b;
  memcpy(&b, &f, 8);
  return b;
}
static inline float h2f(u16 h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
static inline u16 f2h(float f) {
  if (f != f) return 0x7fff;
  _Float16 x = (_Float16)f;
  u16 h;
  memcpy(&h, &x, 2);
  return h;
}
static inline u16 d2h(double f) {
  if (f != f) return 0x7fff;
  _Float16 x = (_Float16)f;
  u16 h;
  memcpy(&h, &x, 2);
  return h;
}
static inline float bf2f(u16 h) { return b2f((u32)h << 16); }
static inline u16 f2bf(float f) {
  u32 b = f2b(f);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline float d2f_odd(double d) {  // round to odd, so that a second rounding is correct
  float f = (float)d;
  if ((double)f == d || d != d || std::isinf(d)) return f;
  u32 b = f2b(f);
  if (std::isinf(f)) return f;
  if (std::fabs((double)f) > std::fabs(d)) b -= 1;
  b |= 1;
  return b2f(b);
}
static inline u16 d2bf(double d) { return f2bf(d2f_odd(d)); }
static float fp8f(u8 v, bool e4) {
  if (e4) {
    int e = (v >> 3) & 15, m = v & 7;
    float r;
    if (e == 15 && m == 7)
      r = NAN;
    else if (e == 0)
      r = std::ldexp((float)m, -9);
    else
      r = std::ldexp((float)(8 + m), e - 10);
    return (v & 128) ? -r : r;
  }
  return h2f((u16)(v << 8));
}
static u8 f2fp8(float f, bool e4) {  // rn, satfinite
  if (f != f) return 0x7f;
  u8 best = 0;
  u8 s = std::signbit(f) ? 128 : 0;
  double a = std::fabs((double)f);
  int mx = e4 ? 0x7e : 0x7b;
  if (a >= fp8f(mx, e4)) return s | mx;
  int lo = 0, hi = mx;
  while (hi - lo > 1) {
    int md = (lo + hi) / 2;
    if (fp8f(md, e4) <= a)
      lo = md;
    else
      hi = md;
  }
  double dl = a - fp8f(lo, e4), dh = fp8f(hi, e4) - a;
  best = dl < dh ? lo : dh < dl ? hi : (lo & 1) ? hi : lo;
  return s | best;
}
