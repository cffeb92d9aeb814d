// wgmma (sm_90): every warp computes its own 16 of the 64 rows, at the wait.
#pragma once
#include "mma.h"

// computes its own 16 of the 64 rows. The work is done at the wait, so that a missing wait shows.
struct WDesc {
  u32 base, lbo, sbo;
  int sw;
};
static WDesc wdesc(Warp& w, const Instr& I, u64 d) {
  WDesc r;
  r.base = (u32)(d & 0x3fff) << 4;
  r.lbo = (u32)((d >> 16) & 0x3fff) << 4;
  r.sbo = (u32)((d >> 32) & 0x3fff) << 4;
  int m = (int)(d >> 62);
  r.sw = m == 1 ? 128 : m == 2 ? 64 : m == 3 ? 32 : 0;
  if ((d >> 49) & 7)
    FAIL("wgmma descriptor with a base offset is not supported; %s", where(w, I, 0).c_str());
  return r;
}
static inline u32 waddr(const WDesc& d, u32 mn, u32 kb, bool trans, u32 k,
                        u32 es) {  // kb: byte offset along K (K-major); trans: MN-major
  u32 a;
  const u32 S = d.sw;
  if (!trans)
    a = S ? d.base + (mn & 7) * S + (mn >> 3) * d.sbo + kb
          : d.base + (mn & 7) * 16 + (mn >> 3) * d.sbo + (kb & 15) + (kb >> 4) * d.lbo;
  else {
    u32 x = mn * es;
    a = S ? d.base + x % S + x / S * d.lbo + (k & 7) * S + (k >> 3) * d.sbo
          : d.base + (x & 15) + (x >> 4) * d.sbo + (k & 7) * 16 + (k >> 3) * d.lbo;
  }
  if (S == 128)
    a ^= ((a >> 7) & 7) << 4;
  else if (S == 64)
    a ^= ((a >> 7) & 3) << 4;
  else if (S == 32)
    a ^= ((a >> 7) & 1) << 4;
  return a;
}
static inline double wval(const u8* p, Ty t) {
  switch (t) {
    case F16: {
      u16 v;
      memcpy(&v, p, 2);
      return h2f(v);
    }
    case BF16: {
      u16 v;
      memcpy(&v, p, 2);
      return bf2f(v);
    }
    case TF32: {
      u32 v;
      memcpy(&v, p, 4);
      return b2f(v & 0xffffe000u);
    }
    case E4M3:
      return fp8f(*p, true);
    case E5M2:
      return fp8f(*p, false);
    case S8:
      return (s8)*p;
    case U8:
      return *p;
    default:
      return 0;
  }
}
static u32 wes(Ty t) { return t == TF32 ? 4 : (t == F16 || t == BF16) ? 2 : 1; }
// touch (bounds and race check) or fetch an operand: rows [r0, r0+n) x K
static void proxChk(Warp& w, const Instr& I, int lane, u32 off, u32 n);
static void wfetch(Warp& w, const Instr& I, u64 desc, u32 r0, u32 n, u32 K, Ty t, bool trans,
                   double* out, bool touch, bool px = false) {
  WDesc d = wdesc(w, I, desc);
  u32 es = wes(t);
  if (touch) {  // 16-byte chunks
    if (!trans)
      for (u32 r = 0; r < n; r++)
        for (u32 c = 0; c < K * es; c += 16) {
          u32 o = shoff(w, I, 0, waddr(d, r0 + r, c, false, 0, es) & ~15u, 16, 16, false);
          shRead(w, I, 0, o, 16);
          if (px) proxChk(w, I, 0, o, 16);
        }
    else
      for (u32 k = 0; k < K; k++)
        for (u32 x = 0; x < n; x += 16 / es) {
          u32 o = shoff(w, I, 0, waddr(d, r0 + x, 0, true, k, es) & ~15u, 16, 16, false);
          shRead(w, I, 0, o, 16);
          if (px) proxChk(w, I, 0, o, 16);
        }
    return;
  }
  for (u32 r = 0; r < n; r++)
    for (u32 k = 0; k < K; k++) {
      u32 a = waddr(d, r0 + r, k * es, trans, k, es);
      out[r * K + k] = wval(&w.blk->sh[shoff(w, I, 0, a, es, es, false)], t);
    }
}
static void wgexec(Warp& w, const Warp::Wg& e) {
  const Instr& I = *e.I;
  u32 N = I.op * 8, K = (u32)I.imm;
  Ty at = I.ty, bt = I.ty2;
  u32 wr = (w.id & 3) * 16;
  static thread_local vector<double> B, BT;
  static thread_local double A[16 * 32], C[16 * 256];
  B.resize(N * K);
  BT.resize(N * K);
  wfetch(w, I, e.db, 0, N, K, bt, I.f2, B.data(), false);
  for (u32 n = 0; n < N; n++)
    for (u32 k = 0; k < K; k++) BT[k * N + n] = B[n * K + k] * (I.relu ? -1 : 1);
  if (I.va.empty())
    wfetch(w, I, e.da, wr, 16, K, at, I.f1, A, false);
  else {
    u32 es = wes(at), per = 4 / es;
    for (int r = 0; r < 4; r++) {
      const u32* s = P<u32>(w, I.va[r]);
      for (int l = 0; l < 32; l++)
        for (u32 z = 0; z < per; z++) {
          u32 v = s[l] >> (8 * es * z);
          A[((l >> 2) + 8 * (r & 1)) * K + per * (l & 3) + z + 4 * per * (r >> 1)] =
              wval((u8*)&v, at);
        }
    }
  }
  if (I.nanp)
    for (u32 i = 0; i < 16 * K; i++) A[i] = -A[i];
  bool ii = at == S8 || at == U8, hc = I.rnd == 1;
  for (u32 j = 0; j < N / 8; j++)
    for (int h = 0; h < 4; h++)
      for (int l = 0; l < 32; l++) {
        double v = 0;
        if (e.sd) {
          if (ii)
            v = P<s32>(w, I.v[4 * j + h])[l];
          else if (hc)
            v = h2f((u16)(P<u32>(w, I.v[2 * j + (h >> 1)])[l] >> (16 * (h & 1))));
          else
            v = P<float>(w, I.v[4 * j + h])[l];
        }
        C[((l >> 2) + 8 * (h >> 1)) * N + 8 * j + 2 * (l & 3) + (h & 1)] = v;
      }
  for (u32 i = 0; i < 16; i++)
    for (u32 k = 0; k < K; k++) {
      double a = A[i * K + k];
      const double* b = &BT[k * N];
      double* c = &C[i * N];
      for (u32 n = 0; n < N; n++) c[n] += a * b[n];
    }
  for (u32 j = 0; j < N / 8; j++)
    for (int h = 0; h < 4; h++)
      for (int l = 0; l < 32; l++) {
        double v = C[((l >> 2) + 8 * (h >> 1)) * N + 8 * j + 2 * (l & 3) + (h & 1)];
        if (ii)
          P<s32>(w, I.v[4 * j + h])[l] =
              I.sat ? (s32)std::max(-2147483648.0, std::min(2147483647.0, v)) : (s32)(s64)v;
        else if (hc) {
          u32& x = P<u32>(w, I.v[2 * j + (h >> 1)])[l];
          x = (h & 1) ? (x & 0xffff) | (u32)d2h(v) << 16 : (x & 0xffff0000u) | d2h(v);
        } else
          P<float>(w, I.v[4 * j + h])[l] = (float)v;
      }
}
static void ex_wgmma(Warp& w, const Instr& I, u32) {
  u64 da = I.va.empty() ? P<u64>(w, I.a)[0] : 0, db = P<u64>(w, I.b)[0];
  u32 p = I.c.k ? *P<u32>(w, I.c) : ~0u;
  if (I.c.neg) p = ~p;
  if (p != 0 && p != ~0u) FAIL("wgmma scale-d differs between lanes; %s", where(w, I, 0).c_str());
  if (w.L->o.race || w.L->o.uninit) {
    bool px = w.L->o.race;
    if (I.va.empty()) wfetch(w, I, da, (w.id & 3) * 16, 16, I.imm, I.ty, I.f1, nullptr, true, px);
    wfetch(w, I, db, 0, I.op * 8, I.imm, I.ty2, I.f2, nullptr, true, px);
  }
  w.wg.push_back({&I, w.wgg, da, db, p != 0});
}
static void ex_wgcommit(Warp& w, const Instr&, u32) { w.wgg++; }
static void ex_wgwait(Warp& w, const Instr& I, u32) {
  size_t k = 0;
  while (k < w.wg.size() && w.wg[k].g + (u64)I.imm < w.wgg) {
    const auto& e = w.wg[k];
    wgexec(w, e);
    if (w.L->o.race) {
      const Instr& J = *e.I;
      if (J.va.empty()) wfetch(w, J, e.da, (w.id & 3) * 16, 16, J.imm, J.ty, J.f1, nullptr, true);
      wfetch(w, J, e.db, 0, J.op * 8, J.imm, J.ty2, J.f2, nullptr, true);
    }
    k++;
  }
  w.wg.erase(w.wg.begin(), w.wg.begin() + k);
}
