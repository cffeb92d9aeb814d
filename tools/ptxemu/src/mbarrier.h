// mbarrier, and tensor maps.
#pragma once
#include "wgmma.h"

// tensormap, cluster of one CTA Accounting (transaction bytes) is done when the copy is issued,
// data moves only when a wait succeeds: a load lands when some warp's wait on its mbarrier phase
// succeeds, a store reads shared memory at the bulk wait_group. So a missing or too early use gives
// stale data, and the race shadow reports it.
static u32 shA(Warp& w, const Instr& I, int lane, u64 a, u32 n, u32 al, bool wr) {
  if ((a >> WIN) == (u64)IDX_SH) a -= SH_BASE;
  return shoff(w, I, lane, a, n, al, wr);
}
static string mbState(const MBar& b) {
  return fmt(
      "mbarrier at shared offset %u: phase %llu, pending arrivals %u of %u, transaction bytes %lld",
      b.off, (unsigned long long)b.phase, b.pend, b.cnt, (long long)b.tx);
}
static MBar* mbFind(Block& B, u32 off) {
  auto it = B.mbi.find(off);
  return it == B.mbi.end() ? nullptr : &B.mb[it->second];
}
static void mbTouch(Warp& w, const Instr& I, int lane, u32 off) {
  if (!w.L->o.race) return;
  Block& B = *w.blk;
  u64 e = B.shw[off], me = mkent(w, pcOf(w, I), lane);
  if (e)
    chk(w, I, lane, off, e, "mbarrier used by a warp that no barrier orders after its init",
        "mbarrier used by another lane than the one that initialised it with no bar.warp.sync "
        "between");
  u64 a = B.shr1[off];
  if (a && eW(a) != (u32)w.id) B.shr2[off] = a;
  B.shr1[off] = me;
}
static MBar& mbGet(Warp& w, const Instr& I, int lane, u64 a) {
  u32 off = shA(w, I, lane, a, 8, 8, true);
  MBar* b = mbFind(*w.blk, off);
  if (!b || !b->live)
    FAIL("no mbarrier at shared offset %u (%s); %s", off, b ? "invalidated" : "never initialised",
         where(w, I, lane).c_str());
  mbTouch(w, I, lane, off);
  return *b;
}
static void vjoin(u32* d, const u32* s, u32 n) {
  for (u32 i = 0; i < n; i++) d[i] = std::max(d[i], s[i]);
}
static void mbWake(Block& B) {
  B.tmo = 0;
  for (auto& w : B.w) {
    bool any = false;
    for (int k = 0; k < w.ng; k++)
      if (w.g[k].blk == 1) {
        w.g[k].blk = 0;
        any = true;
      }
    if (any && w.st == Warp::WAIT && w.barid < 0) w.st = Warp::RUN;
  }
}
static void mbCheck(Block& B, MBar& b) {
  if (b.pend || b.tx) return;
  b.phase++;
  b.pend = b.cnt;
  b.rel = b.vc;
  b.pxr = b.px;
  mbWake(B);
}
static void mbTx(Warp& w, const Instr& I, int lane, MBar& b, s64 d) {
  b.tx += d;
  if (b.tx > 1048575 || b.tx < -1048575)
    FAIL("mbarrier transaction count out of range (%s); %s", mbState(b).c_str(),
         where(w, I, lane).c_str());
  w.blk->tmo = 0;
}
static void mbRelease(Warp& w, MBar& b) {  // the arriving warp's clock goes into the phase
  Block& B = *w.blk;
  if (!w.L->o.race) return;
  if (b.vc.empty()) {
    b.vc.assign(B.vs, 0);
    b.px.assign(B.px.empty() ? 0 : B.vs, 0);
  }
  vjoin(b.vc.data(), &B.vc[w.id * B.vs], B.nv);
  if (!B.px.empty()) vjoin(b.px.data(), &B.px[w.id * B.vs], B.nv);
}
static void bump(Warp& w) {
  if (w.L->o.race) w.blk->vc[w.id * w.blk->vs + w.id]++;
}
static void mbArrive(Warp& w, const Instr& I, int lane, MBar& b, u32 n) {
  if (n > b.pend)
    FAIL("more arrivals than the mbarrier expects in this phase (%u more; %s); %s", n,
         mbState(b).c_str(), where(w, I, lane).c_str());
  b.pend -= n;
  w.blk->tmo = 0;
}
enum { MB_INIT, MB_INVAL, MB_ARRIVE, MB_DROP, MB_EXPECT, MB_COMPLETE, MB_PENDCNT, MB_CPASYNC };
static void ex_mbar(Warp& w, const Instr& I, u32 m) {
  Block& B = *w.blk;
  if (I.op == MB_PENDCNT) {
    const u64* a = P<u64>(w, I.a);
    u32* d = P<u32>(w, I.d);
    LANES(m, d[i] = (u32)a[i] & 0xfffff);
    return;
  }
  u64 ad[32];
  evalAddr(w, I.ab, I.aoff, m, ad);
  bool rel = false;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 cnt = I.b.k ? (u32)rdreg(w, I.b, i) : 1;
    if (I.op == MB_INIT || I.op == MB_INVAL) {
      u32 off = shA(w, I, i, ad[i], 8, 8, true);
      auto it = B.mbi.find(off);
      if (I.op == MB_INVAL && (it == B.mbi.end() || !B.mb[it->second].live))
        FAIL("mbarrier.inval where there is no mbarrier (shared offset %u); %s", off,
             where(w, I, i).c_str());
      shWrite(w, I, i, off, 8, nullptr, 0);
      if (I.op == MB_INVAL) {
        B.mb[it->second].live = false;
        continue;
      }
      if (!cnt || cnt > 0xfffff)
        FAIL("mbarrier.init with count %u; %s", cnt, where(w, I, i).c_str());
      if (it == B.mbi.end()) {
        if (B.mb.size() >= 224) FAIL("more than 224 mbarriers in a block");
        B.mbi[off] = (int)B.mb.size();
        B.mb.emplace_back();
        MBar& b = B.mb.back();
        b.off = off;
        b.ag = 32 + (u32)B.mb.size() - 1;
        if (w.K->usesMb) B.nv = std::max(B.nv, b.ag + 1);
        it = B.mbi.find(off);
      } else if (B.mb[it->second].live)
        report(w, "mbarrier", fmt("%d", I.line), [&] {
          return fmt("mbarrier.init over a live mbarrier with no mbarrier.inval between; %s",
                     where(w, I, i).c_str());
        });
      MBar& b = B.mb[it->second];
      b.base += b.phase + 1;
      b.phase = 0;
      b.live = true;
      b.cpa = false;
      b.cnt = b.pend = cnt;
      b.tx = 0;
      b.vc.clear();
      b.px.clear();
      b.rel.clear();
      b.pxr.clear();
      continue;
    }
    MBar& b = mbGet(w, I, i, ad[i]);
    switch (I.op) {
      case MB_EXPECT:
        mbTx(w, I, i, b, (s64)cnt);
        break;
      case MB_COMPLETE:
        mbTx(w, I, i, b, -(s64)cnt);
        mbCheck(B, b);
        break;
      case MB_CPASYNC: {  // cp.async.mbarrier.arrive: f1 = noinc
        for (auto& e : w.cp)
          if (e.lane == i && e.mb < 0) {
            e.mb = B.mbi[b.off];
            e.clk = b.base + b.phase;
            b.cpa = true;
          }
        w.wk->c.mb_arr++;
        if (I.f1) {
          mbArrive(w, I, i, b, 1);
          mbCheck(B, b);
        }
        break;
      }
      default: {
        w.wk->c.mb_arr++;
        if (I.f1) {
          mbTx(w, I, i, b, (s64)cnt);
          cnt = 1;
        }
        if (!I.relu) {
          mbRelease(w, b);
          rel = true;
        }
        if (I.d.k) P<u64>(w, I.d)[i] = (b.phase << 20) | b.pend;
        mbArrive(w, I, i, b, cnt);
        if (I.op == MB_DROP) b.cnt -= std::min(b.cnt, cnt);
        if (I.f2 && !b.pend && !b.tx)
          FAIL("mbarrier.arrive.noComplete completes the phase (%s); %s", mbState(b).c_str(),
               where(w, I, i).c_str());
        mbCheck(B, b);
      }
    }
  }
  if (rel) bump(w);
}
// tensor map
static const u8 TES[16] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4, 0, 0, 0};
static const u8 TSW[4] = {0, 32, 64, 128};
static TMap tmapAt(Warp& w, const Instr& I, int lane, u64 a, u32 dims) {
  const u8* p;
  u64 ix = a >> WIN;
  if (a & 63)
    FAIL("tensormap address 0x%llx is not 64-byte aligned; %s", (unsigned long long)a,
         where(w, I, lane).c_str());
  if (ix == (u64)IDX_PARAM) {
    u64 o = a - PARAM_BASE;
    if (o + 128 > w.K->pbytes)
      FAIL("tensormap outside the kernel parameters; %s", where(w, I, lane).c_str());
    p = &w.L->params[o];
  } else if (ix == (u64)IDX_SH)
    p = &w.blk->sh[shA(w, I, lane, a, 128, 64, false)];
  else
    p = gptr(w, I, lane, a, 128, false, 64);
  TMap t;
  memcpy(&t, p, sizeof t);
  auto bad = [&](const string& s) {
    FAIL("bad tensor map: %s; %s", s.c_str(), where(w, I, lane).c_str());
  };
  if (t.magic != TMAGIC)
    bad("these 128 bytes are not a tensor map of the emulator (never made, overwritten, or made by "
        "a real driver)");
  if (t.rank1 + 1u != dims) bad(fmt("rank %u used by a %ud instruction", t.rank1 + 1u, dims));
  u32 es = TES[t.elem & 15];
  if (!es) bad(fmt("element type %u is not supported", t.elem));
  if (t.inter) bad("interleaved layouts are not supported");
  if (t.swz > 3) bad(fmt("swizzle mode %u is not supported", t.swz));
  if (!t.addr || t.addr & 15)
    bad(fmt("global address 0x%llx is not 16-byte aligned", (unsigned long long)t.addr));
  if (t.fill > 1) bad("fill mode");
  for (u32 d = 0; d < dims; d++) {
    if (!t.dim[d]) bad(fmt("global_dim[%u] is 0", d));
    if (!t.box[d] || t.box[d] > 256) bad(fmt("box_dim[%u] is %u", d, t.box[d]));
    if (t.estr[d] != 1) bad(fmt("element_stride[%u] is %u (only 1 is supported)", d, t.estr[d]));
    if (d && (t.stride[d - 1] & 15))
      bad(fmt("global_stride[%u] = %llu bytes is not a multiple of 16", d - 1,
              (unsigned long long)t.stride[d - 1]));
  }
  u32 row = t.box[0] * es;
  if (row & 15) bad(fmt("inner box dimension of %u bytes is not a multiple of 16", row));
  if (t.swz && row > TSW[t.swz])
    bad(fmt("inner box dimension of %u bytes is more than the %u-byte swizzle span", row,
            TSW[t.swz]));
  if (t.swz && row < TSW[t.swz])
    bad(fmt("inner box dimension of %u bytes is less than the %u-byte swizzle span (not supported)",
            row, TSW[t.swz]));
  return t;
}
static u32 tmBytes(const TMap& t) {
  u32 n = TES[t.elem];
  for (int d = 0; d <= t.rank1; d++) n *= t.box[d];
  return n;
}
// f(row, global address of the first element inside, byte offset in the row, bytes inside); rows
// wholly outside get 0 bytes
template <class F>
static void tmRows(const TMap& t, const s32* c, F f) {
  u32 es = TES[t.elem], rows = 1;
  for (int d = 1; d <= t.rank1; d++) rows *= t.box[d];
  s64 lo = std::max<s64>(0, -(s64)c[0]), hi = std::min<s64>(t.box[0], (s64)t.dim[0] - c[0]);
  for (u32 r = 0; r < rows; r++) {
    u32 x = r;
    u64 a = t.addr;
    bool in = hi > lo;
    for (int d = 1; d <= t.rank1; d++) {
      s64 k = (s64)c[d] + x % t.box[d];
      x /= t.box[d];
      if (k < 0 || k >= (s64)t.dim[d])
        in = false;
      else
        a += (u64)k * t.stride[d - 1];
    }
    if (in)
      f(r, a + (c[0] + lo) * (s64)es, (u32)lo * es, (u32)(hi - lo) * es);
    else
      f(r, 0, 0, 0);
  }
}
static inline u32 swz(u32 a, u8 m) {
  return m == 3   ? a ^ ((a >> 3) & 0x70)
         : m == 2 ? a ^ ((a >> 3) & 0x30)
         : m == 1 ? a ^ ((a >> 3) & 0x10)
                  : a;
}
static void rowIO(Block& B, const TMap& t, u32 sh, u32 r, u8* buf, bool toSh) {
  u32 n = t.box[0] * TES[t.elem];
  for (u32 k = 0; k < n; k += 16) {
    u8* s = &B.sh[swz(SH0 + sh + r * n + k, t.swz) - SH0];
    if (toSh)
      memcpy(s, buf + k, 16);
    else
      memcpy(buf + k, s, 16);
  }
}
struct AccR {
  u64 bytes = 0, sect = 0, last = ~0ull;
};
static void accRow(Warp& w, AccR& A, u64 a, u32 n, bool st) {
  if (!n) return;
  A.bytes += n;
  u64 idx = a >> WIN;
  Buf& b = w.L->bufs[idx];
  Bm& bm = w.wk->bm[idx];
  auto& v = st ? bm.st : bm.ld;
  if (v.empty()) v.resize(((b.size + 31 + 512) / 32 + 63) / 64 + 1, 0);
  for (u64 x = a >> 5; x <= (a + n - 1) >> 5; x++)
    if (x != A.last) {
      A.sect++;
      A.last = x;
      u64 s = x - (b.base >> 5);
      if ((s >> 6) < v.size()) v[s >> 6] |= 1ull << (s & 63);
    }
}
static void accEnd(Warp& w, const Instr& I, const AccR& A, u64 smem, bool st) {
  Counters& c = w.wk->c;
  ICount& ic = w.wk->ic[pcOf(w, I)];
  ic.req++;
  ic.bytes += A.bytes;
  ic.sect += A.sect;
  if (st) {
    c.ts_req++;
    c.ts_bytes += A.bytes;
    c.ts_sect += A.sect;
    c.ts_smem += smem;
  } else {
    c.tl_req++;
    c.tl_bytes += A.bytes;
    c.tl_sect += A.sect;
    c.tl_smem += smem;
  }
}
static void proxChk(Warp& w, const Instr& I, int lane, u32 off,
                    u32 n) {  // bytes that the async proxy reads: was there a fence.proxy.async
                              // after the generic write?
  Block& B = *w.blk;
  if (B.px.empty()) return;
  const u32* px = &B.px[w.id * B.vs];
  u64 prev = 0;
  for (u32 j = 0; j < n; j += 4) {
    u64 e = B.shw[off + j];
    if (e == prev || (e & (F_PEND | F_ASYNC)) || !e) continue;
    prev = e;
    if (px[eW(e)] < eC(e)) {
      const Instr& O = w.K->code[eP(e)];
      report(w, "proxy", fmt("%d-%d", I.line, O.line), [&] {
        return fmt(
            "the async proxy reads shared offset %u, written by a generic store with no "
            "fence.proxy.async between (PTX line %d: `%s`); %s",
            off + j, O.line, O.text.c_str(), where(w, I, lane).c_str());
      });
    }
  }
}
