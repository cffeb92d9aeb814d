// Bulk copies (TMA), tensormap.replace, a cluster of one CTA.
#pragma once
#include "bulk_wait.h"

// loads and shared-to-shared: ab destination, ab2 tensor map / source, e (+imm) mbarrier, va
// coordinates, a size, op kind
static void ex_bulkld(Warp& w, const Instr& I, u32 m) {
  Block& B = *w.blk;
  u64 da[32], sa[32], ba[32];
  evalAddr(w, I.ab, I.aoff, m, da);
  evalAddr(w, I.ab2, I.aoff2, m, sa);
  evalAddr(w, I.e, I.imm, m, ba);
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    chkMask(w, I, i);
    Bulk e;
    memset(&e, 0, sizeof e);
    e.kind = I.op;
    e.lane = i;
    e.I = &I;
    e.id = ++B.bulkid;
    MBar& b = mbGet(w, I, i, ba[i]);
    e.mb = B.mbi[b.off];
    e.clk = b.base + b.phase;
    AccR A;
    if (I.op == 1) {
      e.t = tmapAt(w, I, i, sa[i], I.va.size());
      for (size_t d = 0; d < I.va.size(); d++) e.c[d] = (s32)rdreg(w, I.va[d], i);
      e.n = tmBytes(e.t);
      e.sh = shA(w, I, i, da[i], e.n, 128, true);
      tmRows(e.t, e.c, [&](u32, u64 a, u32, u32 n) {
        if (!n) return;
        u8* p = gptr(w, I, i, a, n, false, 1);
        if (w.L->o.check_global && w.L->bufs[a >> WIN].own) ownG(w, I, i, a, p, n, false, nullptr);
        accRow(w, A, a, n, false);
      });
      accEnd(w, I, A, e.n, false);
    } else {
      e.n = bulkSize(w, I, i);
      e.sh = shA(w, I, i, da[i], e.n, 16, true);
      if (I.op == 0) {
        e.src = gptr(w, I, i, sa[i], e.n, false, 16);
        if (w.L->o.check_global && w.L->bufs[sa[i] >> WIN].own)
          ownG(w, I, i, sa[i], e.src, e.n, false, nullptr);
        accRow(w, A, sa[i], e.n, false);
        accEnd(w, I, A, e.n, false);
      } else {
        e.sh2 = shA(w, I, i, sa[i], e.n, 16, false);
        shRead(w, I, i, e.sh2, e.n);
        if (w.L->o.race) {
          proxChk(w, I, i, e.sh2, e.n);
          B.rd.push_back({e.sh2, e.n, e.id, (u8)w.id, (u8)i, pcOf(w, I)});
        }
      }
    }
    shBulk(w, I, i, e.sh, e.n, mkent2(b.ag, e.clk + 1, pcOf(w, I), i) | F_ASYNC | F_PEND);
    B.fl.push_back(e);
    b.nfl++;
    mbTx(w, I, i, b, -(s64)e.n);
    mbCheck(B, b);
  }
}
// stores and reductions to global memory: ab2 tensor map / destination, ab shared source, va
// coordinates, a size, op kind, rnd = 1 + reduction, ty type of a linear reduction
static void ex_bulkst(Warp& w, const Instr& I, u32 m) {
  Block& B = *w.blk;
  u64 sa[32], ga[32];
  evalAddr(w, I.ab, I.aoff, m, sa);
  evalAddr(w, I.ab2, I.aoff2, m, ga);
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    Bulk e;
    memset(&e, 0, sizeof e);
    e.mb = -1;
    e.kind = I.op;
    e.lane = i;
    e.I = &I;
    e.id = ++B.bulkid;
    e.g = w.bkg[i];
    AccR A;
    if (I.op == 1) {
      e.t = tmapAt(w, I, i, ga[i], I.va.size());
      for (size_t d = 0; d < I.va.size(); d++) e.c[d] = (s32)rdreg(w, I.va[d], i);
      e.n = tmBytes(e.t);
      e.sh = shA(w, I, i, sa[i], e.n, 128, false);
      tmRows(e.t, e.c, [&](u32, u64 a, u32, u32 n) {
        if (n) {
          gptr(w, I, i, a, n, true, 1);
          accRow(w, A, a, n, true);
        }
      });
    } else {
      e.n = bulkSize(w, I, i);
      e.sh = shA(w, I, i, sa[i], e.n, 16, false);
      e.ga = ga[i];
      gptr(w, I, i, e.ga, e.n, true, 16);
      accRow(w, A, e.ga, e.n, true);
    }
    accEnd(w, I, A, e.n, true);
    shRead(w, I, i, e.sh, e.n);
    if (w.L->o.race) {
      proxChk(w, I, i, e.sh, e.n);
      B.rd.push_back({e.sh, e.n, e.id, (u8)w.id, (u8)i, pcOf(w, I)});
    }
    w.bk.push_back(e);
    B.tmo = 0;
  }
}
static void bulkFinish(Warp& w, u32 m, u64 keep, bool all) {
  Block& B = *w.blk;
  size_t k = 0;
  static const Ty TT[13] = {U8, U16, U32, S32, U64, S64, F16, F32, F32, F64, BF16, F32, F32};
  for (size_t j = 0; j < w.bk.size(); j++) {
    Bulk& e = w.bk[j];
    if (!((m >> e.lane & 1) && (all || e.g + keep < w.bkg[e.lane]))) {
      if (k != j) w.bk[k] = e;
      k++;
      continue;
    }
    const Instr& I = *e.I;
    int i = e.lane;
    auto put = [&](u64 a, const u8* s, u32 n, Ty t) {
      u8* p = gptr(w, I, i, a, n, true, 1);
      if (I.rnd) {
        std::unique_lock<std::mutex> lk(w.L->amtx, std::defer_lock);
        if (w.L->o.nthreads > 1) lk.lock();
        u32 es = tsz(t);
        for (u32 z = 0; z < n; z += es) {
          u64 o = 0, v = 0;
          memcpy(&o, p + z, es);
          memcpy(&v, s + z, es);
          o = atom1(t, I.rnd - 1, o, v, 0);
          memcpy(p + z, &o, es);
        }
      } else {
        if (w.L->o.check_global) ownG(w, I, i, a, p, n, true, s);
        memcpy(p, s, n);
      }
    };
    if (e.kind == 1) {
      u8 buf[2048];
      tmRows(e.t, e.c, [&](u32 r, u64 a, u32 o, u32 n) {
        if (n) {
          rowIO(B, e.t, e.sh, r, buf, false);
          put(a, buf + o, n, TT[e.t.elem]);
        }
      });
    } else
      put(e.ga, &B.sh[e.sh], e.n, I.ty);
    if (w.L->o.race) {
      for (size_t z = 0; z < B.rd.size(); z++)
        if (B.rd[z].id == e.id) {
          B.rd.erase(B.rd.begin() + z);
          break;
        }
      u64 me = mkent(w, pcOf(w, I), i), *r1 = &B.shr1[e.sh], *r2 = &B.shr2[e.sh];
      for (u32 z = 0; z < e.n; z++) {
        u64 a = r1[z];
        if (a && eW(a) != (u32)w.id) r2[z] = a;
        r1[z] = me;
      }
    }
  }
  w.bk.resize(k);
}
static void ex_bulkcommit(Warp& w, const Instr&, u32 m) {
  for (u32 q = m; q; q &= q - 1) w.bkg[__builtin_ctz(q)]++;
}
static void ex_bulkwait(Warp& w, const Instr& I, u32 m) {
  if (!w.bk.empty()) bulkFinish(w, m, (u64)I.imm, false);
}
static void bulkExit(Warp& w, const Instr& I, u32 m) {
  for (auto& e : w.bk)
    if (m >> e.lane & 1)
      report(w, "tma_exit", fmt("%d", e.I->line), [&] {
        return fmt(
            "thread exits with a bulk store still in flight (no cp.async.bulk.wait_group): PTX "
            "line %d: `%s`; %s",
            e.I->line, e.I->text.c_str(), where(w, I, e.lane).c_str());
      });
  bulkFinish(w, m, 0, true);
}
static void flExit(Block& B) {
  for (auto& e : B.fl)
    report(B.w[0], "tma_exit", fmt("%d", e.I->line), [&] {
      return fmt(
          "the block exits with a bulk load still in flight (nobody waited on its mbarrier); %s",
          where(B.w[0], *e.I, e.lane).c_str());
    });
}
// tensormap.replace: op = field, imm = ordinal, a = value
enum {
  TF_ADDR,
  TF_RANK,
  TF_BOX,
  TF_DIM,
  TF_STRIDE,
  TF_ESTR,
  TF_ELEM,
  TF_INTER,
  TF_SWZ,
  TF_FILL,
  TF_ATOM
};
static void ex_tmrep(Warp& w, const Instr& I, u32 m) {
  u64 ad[32];
  evalAddr(w, I.ab, I.aoff, m, ad);
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u8* p;
    bool shm = I.sp == SP_SHARED || (ad[i] >> WIN) == (u64)IDX_SH;
    if (shm) {
      u32 off = shA(w, I, i, ad[i], 128, 64, true);
      shWrite(w, I, i, off, 128, nullptr, 0);
      p = &w.blk->sh[off];
    } else
      p = gptr(w, I, i, ad[i], 128, true, 64);
    TMap t;
    memcpy(&t, p, sizeof t);
    u64 v = rdreg(w, I.a, i);
    u32 k = (u32)I.imm;
    t.magic = TMAGIC;
    if (k > (I.op == TF_STRIDE ? 3u : 4u))
      FAIL("tensormap.replace ordinal %u; %s", k, where(w, I, i).c_str());
    switch (I.op) {
      case TF_ADDR:
        t.addr = v;
        break;
      case TF_RANK:
        t.rank1 = (u8)v;
        if ((u32)v > 4) FAIL("tensormap.replace rank %u; %s", (u32)v, where(w, I, i).c_str());
        break;
      case TF_BOX:
        t.box[k] = (u16)std::min<u32>((u32)v, 65535);
        break;
      case TF_DIM:
        t.dim[k] = (u32)v;
        break;
      case TF_STRIDE:
        t.stride[k] = v;
        break;
      case TF_ESTR:
        t.estr[k] = (u8)std::min<u32>((u32)v, 255);
        break;
      case TF_ELEM:
        t.elem = (u8)v;
        break;
      case TF_INTER:
        t.inter = (u8)v;
        break;
      case TF_SWZ:
        t.swz = (u8)v;
        break;
      case TF_FILL:
        t.fill = (u8)v;
        break;
      default:
        if (v)
          FAIL("tensormap swizzle_atomicity %u is not supported; %s", (u32)v,
               where(w, I, i).c_str());
    }
    memcpy(p, &t, sizeof t);
  }
}
static void ex_tmcp(
    Warp& w, const Instr& I,
    u32 m) {  // tensormap.cp_fenceproxy: the warp copies 128 bytes from shared to global memory
  u64 da[32], sa[32];
  evalAddr(w, I.ab, I.aoff, m, da);
  evalAddr(w, I.ab2, I.aoff2, m, sa);
  int i = __builtin_ctz(m);
  u32 off = shA(w, I, i, sa[i], 128, 64, false);
  shRead(w, I, i, off, 128);
  memcpy(gptr(w, I, i, da[i], 128, true, 64), &w.blk->sh[off], 128);
}
static void ex_griddep(Warp& w, const Instr& I, u32) {
  if (I.op)
    w.wk->c.gd_launch++;
  else
    w.wk->c.gd_wait++;
}
static void ex_mapa(Warp& w, const Instr& I, u32 m) {
  LANES(m, {
    if (I.b.k && rdreg(w, I.b, i))
      FAIL("mapa to CTA %u of the cluster: only clusters of one CTA are supported; %s",
           (u32)rdreg(w, I.b, i), where(w, I, i).c_str());
    wrreg(w, I.d, i, I.op ? 0 : rdreg(w, I.a, i));
  });
}
static void ex_cvtaparam(Warp& w, const Instr& I, u32 m) {
  const u64* a = P<u64>(w, I.a);
  u64* d = P<u64>(w, I.d);
  LANES(m, d[i] = (a[i] >> WIN) == (u64)IDX_PARAM ? a[i] : a[i] + PARAM_BASE);
}
// barrier.cluster with one CTA: all threads of the block that have not exited
static void clCheck(Block& B) {
  bool any = false;
  for (auto& w : B.w) {
    if (w.alive & ~w.clarr) return;
    any |= w.clarr != 0;
  }
  if (!any) return;
  B.clphase++;
  for (auto& w : B.w) w.clarr = 0;
  B.clrel = B.clvc;
  mbWake(B);
}
static void ex_clarrive(Warp& w, const Instr& I, u32 m) {
  Block& B = *w.blk;
  if (w.clarr & m)
    FAIL("second barrier.cluster.arrive before the wait; %s",
         where(w, I, __builtin_ctz(m)).c_str());
  w.wk->c.bar++;
  w.clarr |= m;
  w.clph = B.clphase;
  if (w.L->o.race && !I.relu) {
    vjoin(B.clvc.data(), &B.vc[w.id * B.vs], B.nv);
    bump(w);
  }
  clCheck(B);
}
