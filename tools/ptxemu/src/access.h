// Loads, stores, atomics and cp.async.
#pragma once
#include "memory.h"

struct Res {
  u8* hp[32];
};
static inline u8* lptr(Warp& w, const Instr& I, int i, u64 a, u32 n) {
  u32 L = w.K->localBytes;
  if (a + n > L)
    FAIL("out-of-bounds local access of %u bytes at %llu (local size %u); %s", n,
         (unsigned long long)a, L, where(w, I, i).c_str());
  return &w.blk->local[(u64)(w.id * 32 + i) * L + a];
}
static void resolve(Warp& w, const Instr& I, u64* ad, u32 m, u32 n, bool wr, u8** hp, u32* smask,
                    u32* gmask, u32* soff) {
  *smask = *gmask = 0;
  Space sp = I.sp;
  u32 al = n;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    Space s = sp;
    u64 a = ad[i];
    if (s == SP_GEN) {
      u64 ix = a >> WIN;
      if (ix == (u64)IDX_SH) {
        s = SP_SHARED;
        a -= SH_BASE;
      } else if (ix == (u64)IDX_LOC) {
        s = SP_LOCAL;
        a -= LOC_BASE;
      } else if (ix == (u64)IDX_PARAM)
        s = SP_PARAM;
      else
        s = SP_GLOBAL;
    }
    switch (s) {
      case SP_GLOBAL:
      case SP_CONST:
        hp[i] = gptr(w, I, i, a, n, wr, al);
        if (s == SP_GLOBAL) *gmask |= 1u << i;
        break;
      case SP_SHARED:
        soff[i] = shoff(w, I, i, a, n, al, wr);
        hp[i] = &w.blk->sh[soff[i]];
        *smask |= 1u << i;
        break;
      case SP_LOCAL:
        hp[i] = lptr(w, I, i, a, n);
        break;
      case SP_PARAM: {
        u64 o = a >= PARAM_BASE ? a - PARAM_BASE : a;
        if (o + n > w.L->params.size() || wr)
          FAIL("bad kernel parameter access; %s", where(w, I, i).c_str());
        hp[i] = &w.L->params[o];
        break;
      }
      default:
        break;
    }
  }
}
template <class T, class D>
static void ldl(u8** hp, u32 o, D* d, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    T v;
    memcpy(&v, hp[i] + o, sizeof(T));
    d[i] = (D)v;
  }
}
template <class D>
static void ldT(Ty t, u8** hp, u32 o, D* d, u32 m) {
  switch (t) {
    case U8:
    case B8:
      ldl<u8>(hp, o, d, m);
      break;
    case S8:
      ldl<s8>(hp, o, d, m);
      break;
    case U16:
    case B16:
    case F16:
    case BF16:
      ldl<u16>(hp, o, d, m);
      break;
    case S16:
      ldl<s16>(hp, o, d, m);
      break;
    case S32:
      ldl<s32>(hp, o, d, m);
      break;
    case U64:
    case S64:
    case B64:
    case F64:
      ldl<u64>(hp, o, d, m);
      break;
    default:
      ldl<u32>(hp, o, d, m);
  }
}
static void ex_ld(Warp& w, const Instr& I, u32 m) {
  u64 ad[32];
  u8* hp[32];
  u32 so[32], sm, gm;
  evalAddr(w, I.ab, I.aoff, m, ad);
  u32 ts = tsz(I.ty), n = ts * I.vec;
  resolve(w, I, ad, m, n, false, hp, &sm, &gm, so);
  if (gm) {
    acctG(w, I, ad, gm, n, nullptr, 0);
    if (w.L->o.check_global)
      for (u32 q = gm; q; q &= q - 1) {
        int i = __builtin_ctz(q);
        if (w.L->bufs[ad[i] >> WIN].own) ownG(w, I, i, ad[i], hp[i], n, false, nullptr);
      }
  }
  if (sm) {
    acctS(w, I, so, sm, n, 0);
    for (u32 q = sm; q; q &= q - 1) {
      int i = __builtin_ctz(q);
      shRead(w, I, i, so[i], n);
    }
  }
  if (I.cls == K_LDLOC) {
    w.wk->c.loc_req++;
    w.wk->c.loc_bytes += (u64)__builtin_popcount(m) * n;
  }
  for (u32 k = 0; k < I.vec; k++) {
    const Opn& d = I.v[k];
    switch (d.sz) {
      case 2:
        ldT(I.ty, hp, k * ts, P<u16>(w, d), m);
        break;
      case 4:
        ldT(I.ty, hp, k * ts, P<u32>(w, d), m);
        break;
      default:
        ldT(I.ty, hp, k * ts, P<u64>(w, d), m);
    }
  }
}
static void ex_st(Warp& w, const Instr& I, u32 m) {
  u64 ad[32];
  u8* hp[32];
  u32 so[32], sm, gm;
  evalAddr(w, I.ab, I.aoff, m, ad);
  u32 ts = tsz(I.ty), n = ts * I.vec;
  resolve(w, I, ad, m, n, true, hp, &sm, &gm, so);
  u8 val[32][64];
  for (u32 k = 0; k < I.vec; k++) {
    const u8* s = P<u8>(w, I.v[k]);
    u32 rs = I.v[k].sz;
    for (u32 q = m; q; q &= q - 1) {
      int i = __builtin_ctz(q);
      memcpy(val[i] + k * ts, s + i * rs, ts);
    }
  }
  if (gm) {
    acctG(w, I, ad, gm, n, nullptr, 1);
    if (w.L->o.check_global)
      for (u32 q = gm; q; q &= q - 1) {
        int i = __builtin_ctz(q);
        ownG(w, I, i, ad[i], hp[i], n, true, val[i]);
      }
  }
  if (sm) acctS(w, I, so, sm, n, 1);
  if (I.cls == K_STLOC) {
    w.wk->c.loc_req++;
    w.wk->c.loc_bytes += (u64)__builtin_popcount(m) * n;
  }
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    if (sm >> i & 1) shWrite(w, I, i, so[i], n, val[i], 0);
    memcpy(hp[i], val[i], n);
  }
}
// uniform kernel parameter load
static void ex_ldparam(Warp& w, const Instr& I, u32 m) {
  u32 ts = tsz(I.ty);
  for (u32 k = 0; k < I.vec; k++) {
    u8* hp[32];
    for (int i = 0; i < 32; i++) hp[i] = &w.L->params[I.aoff + k * ts];
    const Opn& d = I.v[k];
    switch (d.sz) {
      case 2:
        ldT(I.ty, hp, 0, P<u16>(w, d), m);
        break;
      case 4:
        ldT(I.ty, hp, 0, P<u32>(w, d), m);
        break;
      default:
        ldT(I.ty, hp, 0, P<u64>(w, d), m);
    }
  }
}
// ---------------------------------------------------------------- atomics
enum AOp { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_INC, A_DEC, A_EXCH, A_CAS };
template <class T>
static T aint(int op, T o, T b, T c) {
  switch (op) {
    case A_ADD:
      return o + b;
    case A_MIN:
      return std::min(o, b);
    case A_MAX:
      return std::max(o, b);
    case A_AND:
      return o & b;
    case A_OR:
      return o | b;
    case A_XOR:
      return o ^ b;
    case A_INC:
      return o >= b ? 0 : o + 1;
    case A_DEC:
      return (o == 0 || o > b) ? b : o - 1;
    case A_EXCH:
      return b;
    case A_CAS:
      return o == b ? c : o;
  }
  return o;
}
static u64 atom1(Ty t, int op, u64 o, u64 b, u64 c) {
  auto hf = [&](u16 x, u16 y, bool bf) -> u16 {
    float a = bf ? bf2f(x) : h2f(x), d = bf ? bf2f(y) : h2f(y);
    float r = op == A_ADD ? a + d : op == A_MIN ? std::fmin(a, d) : std::fmax(a, d);
    return bf ? f2bf(r) : f2h(r);
  };
  switch (t) {
    case U32:
    case B32:
      return aint<u32>(op, (u32)o, (u32)b, (u32)c);
    case S32:
      return (u32)aint<s32>(op, (s32)o, (s32)b, (s32)c);
    case U64:
    case B64:
      return aint<u64>(op, o, b, c);
    case S64:
      return (u64)aint<s64>(op, (s64)o, (s64)b, (s64)c);
    case B16:
    case U16:
      return aint<u16>(op, (u16)o, (u16)b, (u16)c);
    case F32: {
      float a = b2f((u32)o), d = b2f((u32)b);
      return f2b(op == A_ADD   ? a + d
                 : op == A_MIN ? std::fmin(a, d)
                 : op == A_MAX ? std::fmax(a, d)
                               : d);
    }
    case F64: {
      double a = b2d(o), d = b2d(b);
      return d2b(op == A_ADD   ? a + d
                 : op == A_MIN ? std::fmin(a, d)
                 : op == A_MAX ? std::fmax(a, d)
                               : d);
    }
    case F16:
      return hf((u16)o, (u16)b, false);
    case BF16:
      return hf((u16)o, (u16)b, true);
    case F16X2:
    case BF16X2:
      return hf((u16)o, (u16)b, t == BF16X2) |
             ((u32)hf((u16)(o >> 16), (u16)(b >> 16), t == BF16X2) << 16);
    default:
      return 0;
  }
}
static u64 rdreg(const Warp& w, const Opn& o, int i) {
  switch (o.sz) {
    case 2:
      return P<u16>(w, o)[i];
    case 4:
      return P<u32>(w, o)[i];
    default:
      return P<u64>(w, o)[i];
  }
}
static void wrreg(Warp& w, const Opn& o, int i, u64 v) {
  switch (o.sz) {
    case 2:
      P<u16>(w, o)[i] = (u16)v;
      break;
    case 4:
      P<u32>(w, o)[i] = (u32)v;
      break;
    default:
      P<u64>(w, o)[i] = v;
  }
}
static void ex_atom(Warp& w, const Instr& I, u32 m) {
  u64 ad[32];
  u8* hp[32];
  u32 so[32], sm, gm;
  evalAddr(w, I.ab, I.aoff, m, ad);
  u32 ts = tsz(I.ty), n = ts * I.vec;
  resolve(w, I, ad, m, n, true, hp, &sm, &gm, so);
  if (gm) acctG(w, I, ad, gm, n, nullptr, 3);
  if (sm) acctS(w, I, so, sm, n, 1);
  std::unique_lock<std::mutex> lk(w.L->amtx, std::defer_lock);
  if (gm && w.L->o.nthreads > 1) lk.lock();
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    if (sm >> i & 1) shWrite(w, I, i, so[i], n, nullptr, F_ATOM);
    for (u32 k = 0; k < I.vec; k++) {
      u64 o = 0;
      memcpy(&o, hp[i] + k * ts, ts);
      u64 b = rdreg(w, I.va[k], i), c = I.op == A_CAS ? rdreg(w, I.vb[k], i) : 0;
      u64 r = atom1(I.ty, I.op, o, b, c);
      memcpy(hp[i] + k * ts, &r, ts);
      if (!I.v.empty()) wrreg(w, I.v[k], i, o);
    }
  }
}
// ---------------------------------------------------------------- cp.async
static void ex_cpasync(Warp& w, const Instr& I, u32 m) {
  u64 da[32], sa[32];
  evalAddr(w, I.ab, I.aoff, m, da);
  evalAddr(w, I.ab2, I.aoff2, m, sa);
  u32 n = (u32)I.imm;
  u8 sn[32];
  u32 so[32];
  u32 gm = 0;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 s = n;
    if (I.a.k) {
      if (I.f1) {
        u32 pm = *P<u32>(w, I.a);
        if (I.a.neg) pm = ~pm;
        if (pm >> i & 1) s = 0;
      } else {
        s = (u32)rdreg(w, I.a, i);
        if (s > n) FAIL("cp.async src-size %u > cp-size %u; %s", s, n, where(w, I, i).c_str());
      }
    }
    sn[i] = s;
    so[i] = shoff(w, I, i, da[i], n, n, true);
    u8* src = nullptr;
    if (s) {
      src = gptr(w, I, i, sa[i], s, false, 1);
      if (sa[i] & (n - 1))
        FAIL("misaligned cp.async source 0x%llx for %u bytes; %s", (unsigned long long)sa[i], n,
             where(w, I, i).c_str());
      gm |= 1u << i;
      if (w.L->o.check_global && w.L->bufs[sa[i] >> WIN].own)
        ownG(w, I, i, sa[i], src, s, false, nullptr);
    }
    shWrite(w, I, i, so[i], n, nullptr, F_PEND);
    w.cp.push_back({w.cpg[i], so[i], src, (u8)i, (u8)n, (u8)s, pcOf(w, I), -1, 0});
  }
  if (gm) acctG(w, I, sa, gm, n, sn, 2);
  acctS(w, I, so, m, n, 3);
}
static void ex_cpcommit(Warp& w, const Instr&, u32 m) {
  for (u32 q = m; q; q &= q - 1) w.cpg[__builtin_ctz(q)]++;
}
static void cpfinish(Warp& w, u32 m, u64 keep, bool all) {
  size_t k = 0;
  Block& B = *w.blk;
  bool sh = w.L->o.race || w.L->o.uninit;
  for (size_t j = 0; j < w.cp.size(); j++) {
    CpEnt& e = w.cp[j];
    bool fin = (m >> e.lane & 1) && (all || e.g + keep < w.cpg[e.lane]);
    if (fin) {
      u8* d = &B.sh[e.dst];
      if (e.sn) memcpy(d, e.src, e.sn);
      if (e.sn < e.n) memset(d + e.sn, 0, e.n - e.sn);
      if (sh) {
        u64 me = mkent(w, e.pc, e.lane);
        for (int z = 0; z < e.n; z++) B.shw[e.dst + z] = me;
      }
    } else {
      if (k != j) w.cp[k] = e;
      k++;
    }
  }
  w.cp.resize(k);
}
static void ex_cpwait(Warp& w, const Instr& I, u32 m) { cpfinish(w, m, (u64)I.imm, I.f1); }
