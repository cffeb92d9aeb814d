// Where a bulk load (TMA) lands, and how it is waited for.
#pragma once
#include "mbarrier.h"

static void ex_fenceproxy(Warp& w, const Instr&, u32 m) {
  Block& B = *w.blk;
  if (B.px.empty() || !m) return;
  vjoin(&B.px[w.id * B.vs], &B.vc[w.id * B.vs], B.nv);
  bump(w);
}
// the destination of a bulk load: like a write by the issuing warp, then pending until the wait
static void shBulk(Warp& w, const Instr& I, int lane, u32 off, u32 n, u64 ent) {
  Block& B = *w.blk;
  const Opts& o = w.L->o;
  if (!o.race && !o.uninit) return;
  u64 *W = &B.shw[off], *r1 = &B.shr1[off], *r2 = &B.shr2[off];
  if (o.race) {
    if (!B.rd.empty()) rdChk(w, I, lane, off, n);
    u64 pe = 0, p1 = 0, p2 = 0;
    for (u32 j = 0; j < n; j++) {
      u64 e = W[j];
      if (e != pe) {
        pe = e;
        if (e & F_PEND)
          raceRep(w, I, lane, off + j, e, "race",
                  "bulk copy into shared memory that has another copy in flight to it");
        else if (e)
          chk(w, I, lane, off + j, e,
              "bulk copy over a write by another warp with no barrier between",
              "bulk copy over a write by another lane of the warp with no bar.warp.sync between");
      }
      e = r1[j];
      if (e != p1) {
        p1 = e;
        if (e)
          chk(w, I, lane, off + j, e,
              "bulk copy over a value that another warp read with no barrier between",
              "bulk copy over a value that another lane of the warp read with no bar.warp.sync "
              "between");
      }
      e = r2[j];
      if (e != p2) {
        p2 = e;
        if (e)
          chk(w, I, lane, off + j, e,
              "bulk copy over a value that another warp read with no barrier between",
              "bulk copy over a value that another lane of the warp read with no bar.warp.sync "
              "between");
      }
    }
  }
  for (u32 j = 0; j < n; j++) W[j] = ent;
  memset(r1, 0, n * 8ull);
  memset(r2, 0, n * 8ull);
}
static void landShadow(Block& B, u32 off, u32 n, u64 ent) {
  const Opts& o = B.L->o;
  if (o.race || o.uninit)
    for (u32 j = 0; j < n; j++) B.shw[off + j] = ent;
}
static void mbLand(Block& B, MBar& b) {
  u64 done = b.base + b.phase;
  int mi = (int)(&b - B.mb.data());
  if (b.nfl) {
    size_t k = 0;
    for (size_t j = 0; j < B.fl.size(); j++) {
      Bulk& e = B.fl[j];
      if (e.mb == mi && e.clk < done) {
        if (e.kind == 1) {
          const TMap& t = e.t;
          u32 es = TES[t.elem], n = t.box[0] * es;
          u8 buf[2048];
          bool fp = t.elem >= 6;
          tmRows(t, e.c, [&](u32 r, u64 a, u32 o, u32 len) {
            if (len < n) {
              if (t.fill == 1 && fp) {
                if (es == 2)
                  for (u32 z = 0; z < n; z += 2) {
                    u16 v = 0x7fff;
                    memcpy(buf + z, &v, 2);
                  }
                else
                  for (u32 z = 0; z < n; z += 4) {
                    u32 v = 0x7fffffff;
                    memcpy(buf + z, &v, 4);
                  }
              } else
                memset(buf, 0, n);
            }
            if (len) {
              Buf& gb = B.L->bufs[a >> WIN];
              memcpy(buf + o, gb.host + (a - gb.base), len);
            }
            if (t.elem == 11 || t.elem == 12 || t.elem == 8)
              for (u32 z = o; z < o + len; z += 4) {
                u32 v;
                memcpy(&v, buf + z, 4);
                if (t.elem != 11 && !(v & 0x7f800000)) v &= 0x80000000;
                if (t.elem != 8 && (v & 0x7f800000) != 0x7f800000)
                  v = (v + 0xfff + ((v >> 13) & 1)) & 0xffffe000u;
                memcpy(buf + z, &v, 4);
              }
            rowIO(B, t, e.sh, r, buf, true);
          });
        } else
          memmove(&B.sh[e.sh], e.kind == 2 ? &B.sh[e.sh2] : e.src, e.n);
        landShadow(B, e.sh, e.n,
                   mkent2(b.ag, e.clk + 1, (u32)(e.I - B.L->K->code.data()), e.lane) | F_ASYNC);
        b.nfl--;
        for (size_t z = 0; e.kind == 2 && z < B.rd.size(); z++)
          if (B.rd[z].id == e.id) {
            B.rd.erase(B.rd.begin() + z);
            break;
          }
      } else {
        if (k != j) B.fl[k] = e;
        k++;
      }
    }
    B.fl.resize(k);
  }
  if (b.cpa)
    for (auto& w : B.w) {
      size_t k = 0;
      for (size_t j = 0; j < w.cp.size(); j++) {
        CpEnt& e = w.cp[j];
        if (e.mb == mi && e.clk < done) {
          u8* d = &B.sh[e.dst];
          if (e.sn) memcpy(d, e.src, e.sn);
          if (e.sn < e.n) memset(d + e.sn, 0, e.n - e.sn);
          landShadow(B, e.dst, e.n, mkent2(b.ag, e.clk + 1, e.pc, e.lane));
        } else {
          if (k != j) w.cp[k] = e;
          k++;
        }
      }
      w.cp.resize(k);
    }
}
// 0: must block, 1: result written, 2: test_wait that failed (yield). op 0 parity, 1 state token, 9
// barrier.cluster.wait
static int mbWait(Warp& w, const Instr& I, u32 m, bool nb) {
  Block& B = *w.blk;
  if (I.op == 9) {
    if (!(B.clphase > w.clph)) {
      if (w.clarr) return 0;
      FAIL("barrier.cluster.wait with no arrive before; %s", where(w, I, __builtin_ctz(m)).c_str());
    }
    w.clph = B.clphase;
    if (w.L->o.race) vjoin(&B.vc[w.id * B.vs], B.clrel.data(), B.nv);
    bump(w);
    return 1;
  }
  u64 ad[32];
  evalAddr(w, I.ab, I.aoff, m, ad);
  u32 res = 0;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    MBar& b = mbGet(w, I, i, ad[i]);
    bool d = I.op ? b.phase > (rdreg(w, I.b, i) >> 20) : (b.phase & 1) != (rdreg(w, I.b, i) & 1);
    if (d) res |= 1u << i;
  }
  if (res != m && !nb) return 0;
  u32 last = ~0u;
  for (u32 q = res; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 off = shA(w, I, i, ad[i], 8, 8, true);
    if (off == last) continue;
    last = off;
    MBar& b = *mbFind(B, off);
    mbLand(B, b);
    if (w.L->o.race && !I.relu) {
      u32* v = &B.vc[w.id * B.vs];
      if (!b.rel.empty()) vjoin(v, b.rel.data(), B.nv);
      v[b.ag] = std::max(v[b.ag], (u32)((b.base + b.phase) & 0xfffffff));
      if (!b.pxr.empty() && !B.px.empty()) vjoin(&B.px[w.id * B.vs], b.pxr.data(), B.nv);
    }
  }
  w.wk->c.mb_wait++;
  u32* d = P<u32>(w, I.d);
  *d = (*d & ~m) | (res & m);
  return I.f1 && res != m ? 2 : 1;
}
static string mbDesc(Warp& w) {
  string s;
  for (int k = 0; k < w.ng; k++)
    if (w.g[k].blk) {
      const Instr& I = w.K->code[w.g[k].pc];
      if (I.op == 9) {
        s += fmt(" warp %d: barrier.cluster at PTX line %d;", w.id, I.line);
        continue;
      }
      u64 ad[32];
      evalAddr(w, I.ab, I.aoff, ~0u, ad);
      int l = __builtin_ctz(w.g[k].mask);
      u64 a = ad[l];
      if ((a >> WIN) == (u64)IDX_SH) a -= SH_BASE;
      MBar* b = mbFind(*w.blk, (u32)a - SH0);
      s += fmt(" warp %d: PTX line %d waits for %s %llu of %s;", w.id, I.line,
               I.op ? "state" : "parity",
               (unsigned long long)(I.op ? rdreg(w, I.b, l) >> 20 : rdreg(w, I.b, l) & 1),
               b ? mbState(*b).c_str() : "?");
    }
  return s;
}
static u32 bulkSize(Warp& w, const Instr& I, int i) {
  u32 n = (u32)rdreg(w, I.a, i);
  if (!n || (n & 15))
    FAIL("bulk copy size %u is not a multiple of 16; %s", n, where(w, I, i).c_str());
  return n;
}
static void chkMask(Warp& w, const Instr& I, int i) {
  if (I.d2.k && (rdreg(w, I.d2, i) & 0xffff) != 1)
    FAIL("multicast to other CTAs of a cluster: only clusters of one CTA are supported; %s",
         where(w, I, i).c_str());
}
