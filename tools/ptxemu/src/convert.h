// mov, cvt, cvta.
#pragma once
#include <chrono>
#include "floats.h"

template <class T>
static void ex_mov(Warp& w, const Instr& I, u32 m) {
  const T* a = P<T>(w, I.a);
  T* d = P<T>(w, I.d);
  LANES(m, d[i] = a[i]);
}
static void ex_movx(Warp& w, const Instr& I, u32 m) {
  LANES(m, wrreg(w, I.d, i, rdreg(w, I.a, i)));
}
static void ex_pack(Warp& w, const Instr& I, u32 m) {
  int s = I.va[0].sz * 8;
  u64 t[32];
  LANES(m, {
    u64 r = 0;
    for (size_t k = 0; k < I.va.size(); k++) r |= rdreg(w, I.va[k], i) << (s * k);
    t[i] = r;
  });
  LANES(m, wrreg(w, I.d, i, t[i]));
}
static void ex_pack16(Warp& w, const Instr& I, u32 m) {
  const u16 *a = P<u16>(w, I.va[0]), *b = P<u16>(w, I.va[1]);
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = a[i] | (u32)b[i] << 16);
}
static void ex_unpack(Warp& w, const Instr& I, u32 m) {
  int s = I.v[0].sz * 8;
  u64 t[32];
  LANES(m, t[i] = rdreg(w, I.a, i));
  for (size_t k = 0; k < I.v.size(); k++) LANES(m, wrreg(w, I.v[k], i, t[i] >> (s * k)));
}
static void ex_unpack16(Warp& w, const Instr& I, u32 m) {
  const u32* s = P<u32>(w, I.a);
  u16 *a = P<u16>(w, I.v[0]), *b = P<u16>(w, I.v[1]);
  LANES(m, {
    u32 v = s[i];
    a[i] = (u16)v;
    b[i] = (u16)(v >> 16);
  });
}
static void ex_clock(Warp& w, const Instr& I, u32 m) {
  u64 c = I.op == 2 ? (u64)std::chrono::duration_cast<std::chrono::nanoseconds>(
                          std::chrono::steady_clock::now().time_since_epoch())
                          .count()
                    : ++w.wk->clock;
  if (I.f1) c >>= 32;
  LANES(m, wrreg(w, I.d, i, c));
}
static void ex_activemask(Warp& w, const Instr& I, u32 m) {
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = m);
}
enum Rnd {
  R_N = 0,
  R_Z = 1,
  R_M = 2,
  R_P = 3,
  R_NA = 4,
  R_NI = 8,
  R_ZI = 9,
  R_MI = 10,
  R_PI = 11,
  R_NONE = 15
};
static u64 narrow(double x, Ty d, int rnd) {  // float narrowing with rounding
  switch (d) {
    case F64:
      return d2b(x);
    case F32: {
      float f = (float)x;
      if (rnd == R_Z || rnd == R_M || rnd == R_P) {
        double b = f;
        if (b != x && x == x) {
          bool up = rnd == R_P ? true : rnd == R_M ? false : x < 0;
          if (up && b < x)
            f = std::nextafterf(f, INFINITY);
          else if (!up && b > x)
            f = std::nextafterf(f, -INFINITY);
        }
      }
      return f2b(f);
    }
    case F16: {
      u16 h = d2h(x);
      if (rnd == R_Z && x == x && !std::isinf(x)) {
        if (std::fabs((double)h2f(h)) > std::fabs(x)) h--;
      } else if (rnd == R_M || rnd == R_P) {
        double b = h2f(h);
        bool up = rnd == R_P;
        if (x == x && b != x) {
          if (up && b < x) {
            h = (h & 0x8000) ? h - 1 : h + 1;
          } else if (!up && b > x) {
            h = (h & 0x8000) ? h + 1 : (h == 0 ? 0x8001 : h - 1);
          }
        }
      }
      return h;
    }
    case BF16: {
      if (x != x) return 0x7fff;
      if (rnd == R_Z) {
        float f = d2f_odd(x);
        return (u16)(f2b(f) >> 16);
      }
      if (rnd == R_M || rnd == R_P) {
        u16 h = d2bf(x);
        double b = bf2f(h);
        if (b != x) {
          if (rnd == R_P && b < x)
            h = (h & 0x8000) ? h - 1 : h + 1;
          else if (rnd == R_M && b > x)
            h = (h & 0x8000) ? h + 1 : h - 1;
        }
        return h;
      }
      return d2bf(x);
    }
    case TF32: {
      u32 b = f2b((float)x);
      if ((b & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
      if ((b & 0x7f800000) == 0x7f800000) return b;
      if (rnd == R_NA)
        b += 0x1000;
      else if (rnd == R_Z) {
      } else
        b += 0xfff + ((b >> 13) & 1);
      return b & 0xffffe000u;
    }
    default:
      return 0;
  }
}
static void ex_cvt(Warp& w, const Instr& I, u32 m) {
  Ty D = I.ty, S = I.ty2;
  int ss = tsz(S);
  bool sf = isFloat(S), df = isFloat(D);
  s64 ti[32];
  double td[32];
  if (!sf) {
    u64 raw[32];
    switch (I.a.sz) {
      case 2: {
        const u16* p = P<u16>(w, I.a);
        for (int i = 0; i < 32; i++) raw[i] = p[i];
        break;
      }
      case 4: {
        const u32* p = P<u32>(w, I.a);
        for (int i = 0; i < 32; i++) raw[i] = p[i];
        break;
      }
      default: {
        const u64* p = P<u64>(w, I.a);
        for (int i = 0; i < 32; i++) raw[i] = p[i];
      }
    }
    int sh = 64 - 8 * ss;
    if (isSigned(S))
      for (int i = 0; i < 32; i++) ti[i] = (s64)(raw[i] << sh) >> sh;
    else
      for (int i = 0; i < 32; i++) ti[i] = (s64)((raw[i] << sh) >> sh);
  } else if (S == F32) {
    const float* p = P<float>(w, I.a);
    for (int i = 0; i < 32; i++) td[i] = I.ftz ? fz(p[i]) : p[i];
  } else if (S == F64) {
    const double* p = P<double>(w, I.a);
    for (int i = 0; i < 32; i++) td[i] = p[i];
  } else {
    u64 r;
    for (int i = 0; i < 32; i++) {
      r = rdreg(w, I.a, i);
      td[i] = S == F16 ? (double)h2f((u16)r) : (double)bf2f((u16)r);
    }
  }
  u64 out[32];
  if (!df) {
    int bits = 8 * tsz(D);
    bool sg = isSigned(D);
    if (sf) {
      for (u32 q = m; q; q &= q - 1) {
        int i = __builtin_ctz(q);
        double x = td[i];
        if (x != x) {
          out[i] = bits == 64 ? 0x8000000000000000ull : 0;
          continue;
        }
        switch (I.rnd) {
          case R_NI:
            x = std::nearbyint(x);
            break;
          case R_MI:
            x = std::floor(x);
            break;
          case R_PI:
            x = std::ceil(x);
            break;
          default:
            x = std::trunc(x);
        }
        double lo = sg ? -std::ldexp(1.0, bits - 1) : 0, hi = std::ldexp(1.0, sg ? bits - 1 : bits);
        if (x < lo) x = lo;
        if (x >= hi)
          out[i] = sg ? (1ull << (bits - 1)) - 1 : (bits == 64 ? ~0ull : (1ull << bits) - 1);
        else
          out[i] = sg ? (u64)(s64)x : (u64)x;
      }
    } else if (I.sat) {
      for (u32 q = m; q; q &= q - 1) {
        int i = __builtin_ctz(q);
        __int128 x = isSigned(S) ? (__int128)ti[i] : (__int128)(u64)ti[i];
        __int128 lo = sg ? -((__int128)1 << (bits - 1)) : 0,
                 hi = sg ? ((__int128)1 << (bits - 1)) - 1 : ((__int128)1 << bits) - 1;
        if (x < lo) x = lo;
        if (x > hi) x = hi;
        out[i] = (u64)x;
      }
    } else {
      int sh = 64 - bits;
      if (sg)
        for (int i = 0; i < 32; i++) out[i] = (u64)((s64)((u64)ti[i] << sh) >> sh);
      else
        for (int i = 0; i < 32; i++) out[i] = ((u64)ti[i] << sh) >> sh;
    }
  } else {
    if (!sf) {
      bool us = !isSigned(S);
      if (D == F32 && I.rnd == R_N) {
        if (us)
          for (int i = 0; i < 32; i++) out[i] = f2b((float)(u64)ti[i]);
        else
          for (int i = 0; i < 32; i++) out[i] = f2b((float)ti[i]);
      } else
        for (u32 q = m; q; q &= q - 1) {
          int i = __builtin_ctz(q);
          double x = us ? (double)(u64)ti[i] : (double)ti[i];
          if (D == F64 && I.rnd != R_N && I.rnd != R_NONE &&
              (us ? (u64)ti[i] >> 53 : (u64)std::llabs(ti[i]) >> 53))
            FAIL("cvt of a large 64-bit integer with directed rounding is not supported: %s",
                 I.text.c_str());
          out[i] = narrow(x, D, I.rnd);
        }
    } else if (D == F32 && (I.rnd == R_N || I.rnd == R_NONE) && !I.sat) {
      for (int i = 0; i < 32; i++) {
        float f = (float)td[i];
        out[i] = f2b(I.ftz ? fz(f) : f);
      }
    } else
      for (u32 q = m; q; q &= q - 1) {
        int i = __builtin_ctz(q);
        double x = td[i];
        switch (I.rnd) {
          case R_NI:
            x = std::nearbyint(x);
            break;
          case R_ZI:
            x = std::trunc(x);
            break;
          case R_MI:
            x = std::floor(x);
            break;
          case R_PI:
            x = std::ceil(x);
            break;
          default:
            break;
        }
        if (I.sat) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
        if (I.relu && x < 0) x = 0;
        out[i] = narrow(x, D, I.rnd & 7);
      }
  }
  switch (I.d.sz) {
    case 2: {
      u16* d = P<u16>(w, I.d);
      LANES(m, d[i] = (u16)out[i]);
      break;
    }
    case 4: {
      u32* d = P<u32>(w, I.d);
      LANES(m, d[i] = (u32)out[i]);
      break;
    }
    default: {
      u64* d = P<u64>(w, I.d);
      LANES(m, d[i] = out[i]);
    }
  }
}
static void ex_cvtp2(Warp& w, const Instr& I,
                     u32 m) {  // f16x2/bf16x2 <- f32,f32  (a upper, b lower)
  const float *a = P<float>(w, I.a), *b = P<float>(w, I.b);
  u32* d = P<u32>(w, I.d);
  Ty h = I.ty == F16X2 ? F16 : BF16;
  LANES(m, {
    float x = a[i], y = b[i];
    if (I.relu) {
      if (x < 0) x = 0;
      if (y < 0) y = 0;
    }
    d[i] = I.rnd == R_N ? (h == BF16 ? f2bf(y) | (u32)f2bf(x) << 16 : f2h(y) | (u32)f2h(x) << 16)
                        : (u32)narrow(y, h, I.rnd) | (u32)narrow(x, h, I.rnd) << 16;
  });
}
static void ex_cvt8(Warp& w, const Instr& I, u32 m) {  // e4m3x2/e5m2x2 <-> f32,f32 / f16x2
  if (I.ty == E4M3X2 || I.ty == E5M2X2) {
    bool e = I.ty == E4M3X2;
    LANES(m, {
      float hi, lo;
      if (I.ty2 == F32) {
        hi = P<float>(w, I.a)[i];
        lo = P<float>(w, I.b)[i];
      } else {
        u32 v = P<u32>(w, I.a)[i];
        lo = h2f((u16)v);
        hi = h2f((u16)(v >> 16));
      }
      if (I.relu) {
        hi = std::fmax(hi, 0.f);
        lo = std::fmax(lo, 0.f);
      }
      P<u16>(w, I.d)[i] = f2fp8(lo, e) | (u16)f2fp8(hi, e) << 8;
    });
  } else {
    bool e = I.ty2 == E4M3X2;
    LANES(m, {
      u16 v = P<u16>(w, I.a)[i];
      P<u32>(w, I.d)[i] = f2h(fp8f((u8)v, e)) | (u32)f2h(fp8f((u8)(v >> 8), e)) << 16;
    });
  }
}
static void ex_cvtpack(Warp& w, const Instr& I,
                       u32 m) {  // cvt.pack.sat.{u8,s8,u4..,u16,s16}.s32[.b32] d,a,b[,c]
  int bits = tsz(I.ty) * 8;
  bool sg = isSigned(I.ty);
  LANES(m, {
    s64 lo = sg ? -(1ll << (bits - 1)) : 0, hi = sg ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1;
    s64 a = std::max(lo, std::min(hi, (s64)P<s32>(w, I.a)[i])),
        b = std::max(lo, std::min(hi, (s64)P<s32>(w, I.b)[i]));
    u32 mk = (u32)((1ull << bits) - 1);
    u32 r = ((u32)b & mk) | ((u32)a & mk) << bits;
    if (I.c.k) r |= P<u32>(w, I.c)[i] << (2 * bits);
    P<u32>(w, I.d)[i] = r;
  });
}
static void ex_cvta(Warp& w, const Instr& I, u32 m) {
  const u64* a = P<u64>(w, I.a);
  u64* d = P<u64>(w, I.d);
  u64 k = (u64)I.imm;
  LANES(m, d[i] = a[i] + k);
}
static void ex_isspacep(Warp& w, const Instr& I, u32 m) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) {
    u64 ix = P<u64>(w, I.a)[i] >> WIN;
    bool v = I.sp == SP_SHARED  ? ix == (u64)IDX_SH
             : I.sp == SP_LOCAL ? ix == (u64)IDX_LOC
             : I.sp == SP_PARAM ? ix == (u64)IDX_PARAM
                                : ix != (u64)IDX_SH && ix != (u64)IDX_LOC;
    r |= (u32)v << i;
  }
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (r & m);
}
static void ex_nop(Warp&, const Instr&, u32) {}
static void ex_zero(Warp& w, const Instr& I, u32 m) { LANES(m, wrreg(w, I.d, i, 0)); }
static void ex_trap(Warp& w, const Instr& I, u32 m) {
  FAIL("trap executed; %s", where(w, I, __builtin_ctz(m)).c_str());
}
