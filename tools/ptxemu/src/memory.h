// Addresses: bounds, alignment, and what is counted and checked at each access.
#pragma once
#include <algorithm>
#include "machine.h"

static u8* gptr(Warp& w, const Instr& I, int lane, u64 a, u32 n, bool wr, u32 al) {
  u64 idx = a >> WIN;
  Launch* L = w.L;
  if (idx >= NIDX || !L->bufs[idx].host)
    FAIL("invalid global address 0x%llx (%u bytes, %s): no registered buffer there; %s",
         (unsigned long long)a, n, wr ? "write" : "read", where(w, I, lane).c_str());
  Buf& b = L->bufs[idx];
  s64 off = (s64)(a - b.base);
  if (off < (s64)b.lo || off + (s64)n > (s64)b.hi)
    FAIL(
        "out-of-bounds global %s of %u bytes at byte offset %lld of buffer '%s' (valid [%llu, "
        "%llu)); %s",
        wr ? "write" : "read", n, (long long)off - (long long)b.lo, b.name.c_str(), 0ull,
        (unsigned long long)(b.hi - b.lo), where(w, I, lane).c_str());
  if (a & (al - 1))
    FAIL(
        "misaligned global %s of %u bytes (needs %u-byte alignment) at address 0x%llx, byte offset "
        "%lld of buffer '%s'; %s",
        wr ? "write" : "read", n, al, (unsigned long long)a, (long long)off - (long long)b.lo,
        b.name.c_str(), where(w, I, lane).c_str());
  if (wr && b.ro)
    FAIL("write to read-only buffer '%s'; %s", b.name.c_str(), where(w, I, lane).c_str());
  return b.host + off;
}
static inline u32 shoff(Warp& w, const Instr& I, int lane, u64 a, u32 n, u32 al, bool wr) {
  if (a < SH0 || a + n > (u64)w.L->shTotal)
    FAIL("out-of-bounds shared %s of %u bytes at shared offset %lld (size %u); %s",
         wr ? "write" : "read", n, (long long)a - SH0, w.L->shTotal - SH0,
         where(w, I, lane).c_str());
  if (a & (al - 1))
    FAIL("misaligned shared %s of %u bytes at shared offset %lld; %s", wr ? "write" : "read", n,
         (long long)a - SH0, where(w, I, lane).c_str());
  return (u32)a - SH0;
}
static void evalAddr(Warp& w, const Opn& b, s64 off, u32 m, u64* ad) {
  (void)m;
  if (b.k == 0) {
    for (int i = 0; i < 32; i++) ad[i] = off;
  } else if (b.sz == 8) {
    const u64* p = P<u64>(w, b);
    for (int i = 0; i < 32; i++) ad[i] = p[i] + off;
  } else {
    const u32* p = P<u32>(w, b);
    for (int i = 0; i < 32; i++) ad[i] = (u32)(p[i] + (u32)off);
  }
}
// global accounting: distinct 32-byte sectors of one warp request
static int acctG(Warp& w, const Instr& I, const u64* ad, u32 m, u32 n, const u8* nn,
                 int kind) {  // kind 0 ld 1 st 2 cp 3 atom
  u64 s[64];
  int k = 0;
  u64 bytes = 0;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 len = nn ? nn[i] : n;
    if (!len) continue;
    bytes += len;
    for (u64 x = ad[i] >> 5; x <= (ad[i] + len - 1) >> 5; x++) {
      if (k && s[k - 1] == x) continue;
      bool f = false;
      for (int j = k - 2; j >= 0; j--)
        if (s[j] == x) {
          f = true;
          break;
        }
      if (!f && k < 64) s[k++] = x;
    }
  }
  if (!bytes) return 0;
  Worker& W = *w.wk;
  ICount& ic = W.ic[pcOf(w, I)];
  ic.req++;
  ic.sect += k;
  ic.bytes += bytes;
  Counters& c = W.c;
  if (kind == 0) {
    c.ld_req++;
    c.ld_bytes += bytes;
    c.ld_sect += k;
  } else if (kind == 1) {
    c.st_req++;
    c.st_bytes += bytes;
    c.st_sect += k;
  } else if (kind == 2) {
    c.cp_req++;
    c.cp_bytes += bytes;
    c.cp_sect += k;
  } else {
    c.atom_req++;
    c.atom_bytes += bytes;
    c.atom_sect += k;
  }
  for (int j = 0; j < k; j++) {
    u64 a = s[j] << 5;
    u64 idx = a >> WIN;
    Buf& b = w.L->bufs[idx];
    Bm& bm = W.bm[idx];
    auto& v = (kind == 1 || kind == 3) ? bm.st : bm.ld;
    if (v.empty()) v.resize(((b.size + 31 + 512) / 32 + 63) / 64 + 1, 0);
    u64 sec = (a - (b.base & ~31ull)) >> 5;
    if ((sec >> 6) < v.size()) v[sec >> 6] |= 1ull << (sec & 63);
  }
  return k;
}
// inter-block overlap check on global memory
static void ownG(Warp& w, const Instr& I, int lane, u64 a, const u8* hp, u32 n, bool wr,
                 const u8* val) {
  Launch* L = w.L;
  Buf& b = L->bufs[a >> WIN];
  u64 off = a - b.base;
  u32 me = (u32)w.blk->lin + 1;
  if (!b.own) {
    if (!wr || b.size > (256u << 20)) return;
    std::lock_guard<std::mutex> g(L->amtx);
    if (!b.own) {
      b.own = (u32*)calloc(b.size + 1, 4);
      if (!b.own) return;
    }
  }
  u32* o = b.own + off;
  for (u32 j = 0; j < n; j++) {
    if (o[j] && o[j] != me && (!wr || hp[j] != val[j])) {
      u32 other = o[j] - 1;
      report(w, wr ? "global_write_overlap" : "global_read_other_block", fmt("%d", I.line), [&] {
        u32 gx = L->grid[0], gy = L->grid[1];
        return fmt("%s byte %llu of buffer '%s' that block (%u,%u,%u) wrote; %s",
                   wr ? "non-atomic write of a different value to" : "read of",
                   (unsigned long long)(off + j - b.lo), b.name.c_str(), other % gx,
                   other / gx % gy, other / gx / gy, where(w, I, lane).c_str());
      });
      break;
    }
  }
  if (wr)
    for (u32 j = 0; j < n; j++) o[j] = me;
}
// shared accounting
static void acctS(Warp& w, const Instr& I, const u32* ad, u32 m, u32 n,
                  int kind) {  // kind 0 ld 1 st 2 ldmatrix 3 cp.async write
  int per = n <= 4 ? 32 : n == 8 ? 16 : n == 16 ? 8 : 4;
  int nwords = n <= 4 ? 1 : n / 4;
  u32 waves = 0, ph = 0;
  for (int s = 0; s < 32; s += per) {
    u32 mm = per == 32 ? m : (m >> s) & ((1u << per) - 1);
    if (!mm) continue;
    ph++;
    u32 words[32][34];
    u8 cnt[32];
    memset(cnt, 0, 32);
    u32 mx = 1;
    for (u32 q = mm; q; q &= q - 1) {
      int i = s + __builtin_ctz(q);
      u32 w0 = ad[i] >> 2;
      for (int j = 0; j < nwords; j++) {
        u32 x = w0 + j, b = x & 31;
        int c = cnt[b];
        bool f = false;
        for (int z = 0; z < c; z++)
          if (words[b][z] == x) {
            f = true;
            break;
          }
        if (!f) {
          words[b][c] = x;
          cnt[b] = c + 1;
          if ((u32)c + 1 > mx) mx = c + 1;
        }
      }
    }
    waves += mx;
  }
  Worker& W = *w.wk;
  ICount& ic = W.ic[pcOf(w, I)];
  Counters& c = W.c;
  u32 conf = waves - ph;
  u64 by = (u64)__builtin_popcount(m) * n;
  if (kind != 3) {
    ic.req++;
    ic.bytes += by;
  }
  ic.conf += conf;
  if (kind == 0) {
    c.ls_req++;
    c.ls_bytes += by;
    c.ls_wave += waves;
    c.ls_conf += conf;
  } else if (kind == 1) {
    c.ss_req++;
    c.ss_bytes += by;
    c.ss_wave += waves;
    c.ss_conf += conf;
  } else if (kind == 2) {
    c.lm_req++;
    c.lm_bytes += by;
    c.lm_wave += waves;
    c.lm_conf += conf;
  } else {
    c.cps_wave += waves;
    c.cps_conf += conf;
  }
}
// race shadow: entry = pending(1) atomic(1) async proxy(1) pc(20) clock(28) agent(8) lane(5);
// agent: warp 0..31, 32+k = bulk copies that complete on mbarrier k (clock: its phases)
static const u64 F_PEND = 1ull << 63, F_ATOM = 1ull << 62, F_ASYNC = 1ull << 61;
static inline u64 mkent2(u32 agent, u64 clk, u32 pc, int lane) {
  return ((u64)(pc & 0xfffff) << 41) | ((clk & 0xfffffff) << 13) | ((u64)agent << 5) | (u32)lane;
}
static inline u64 mkent(const Warp& w, u32 pc, int lane) {
  return mkent2(w.id, w.blk->vc[w.id * w.blk->vs + w.id], pc, lane);
}
static inline u32 eW(u64 e) { return (e >> 5) & 255; }
static inline u32 eL(u64 e) { return e & 31; }
static inline u32 eC(u64 e) { return (e >> 13) & 0xfffffff; }
static inline u32 eP(u64 e) { return (e >> 41) & 0xfffff; }
static void raceRep(Warp& w, const Instr& I, int lane, u32 off, u64 e, const char* kind,
                    const char* what) {
  const Instr& O = w.K->code[eP(e)];
  report(w, kind, fmt("%d-%d-%s", I.line, O.line, what), [&] {
    return fmt(
        "%s at shared offset %u; other access by %s %u lane %u, PTX line %d: `%s`; this access: %s",
        what, off, eW(e) < 32 ? "warp" : "bulk copy of mbarrier", eW(e) & 31, eL(e), O.line,
        O.text.c_str(), where(w, I, lane).c_str());
  });
}
static inline void chk(Warp& w, const Instr& I, int lane, u32 off, u64 e, const char* inter,
                       const char* intra) {
  u32 v = eW(e);
  const Block& B = *w.blk;
  if (v != (u32)w.id) {
    if (B.vc[w.id * B.vs + v] < eC(e)) raceRep(w, I, lane, off, e, "race", inter);
  } else if (eL(e) != (u32)lane && eC(e) == (B.vc[w.id * B.vs + w.id] & 0xfffffff))
    raceRep(w, I, lane, off, e, "warp_race", intra);
}
static void shRead(Warp& w, const Instr& I, int lane, u32 off, u32 n) {
  Block& B = *w.blk;
  const Opts& o = w.L->o;
  if (!o.race && !o.uninit) return;
  u64 me = mkent(w, pcOf(w, I), lane);
  u64* W = &B.shw[off];
  u64 prev = ~0ull;
  for (u32 j = 0; j < n; j++) {
    u64 e = W[j];
    if (e == prev) continue;
    prev = e;
    if (!e) {
      if (o.uninit)
        report(w, "uninit_shared", fmt("%d", I.line), [&] {
          return fmt("read of shared memory never written, offset %u; %s", off + j,
                     where(w, I, lane).c_str());
        });
    } else if (!o.race) {
    } else if (e & F_PEND)
      raceRep(
          w, I, lane, off + j, e, "race",
          (e & F_ASYNC)
              ? "read of shared memory with a TMA/bulk copy still in flight (missing mbarrier wait)"
              : "read of shared memory with a cp.async still in flight (missing or too weak wait)");
    else
      chk(w, I, lane, off + j, e, "read of a value written by another warp with no barrier between",
          "read of a value written by another lane of the warp with no bar.warp.sync between");
  }
  if (!o.race) return;
  u64 *r1 = &B.shr1[off], *r2 = &B.shr2[off];
  for (u32 j = 0; j < n; j++) {
    u64 a = r1[j];
    if (a && eW(a) != (u32)w.id) {
      r2[j] = a;
    }
    r1[j] = me;
  }
}
static void rdChk(Warp& w, const Instr& I, int lane, u32 off, u32 n) {
  for (auto& r : w.blk->rd)
    if (off < r.off + r.n && r.off < off + n) {
      raceRep(w, I, lane, std::max(off, r.off), mkent2(r.warp, 0, r.pc, r.lane), "race",
              "write to shared memory that a bulk store in flight still reads (missing "
              "cp.async.bulk.wait_group)");
      return;
    }
}
static void shWrite(Warp& w, const Instr& I, int lane, u32 off, u32 n, const u8* val, u64 flag) {
  Block& B = *w.blk;
  const Opts& o = w.L->o;
  if (!o.race && !o.uninit) return;
  u64 me = mkent(w, pcOf(w, I), lane);
  u64 *W = &B.shw[off], *r1 = &B.shr1[off], *r2 = &B.shr2[off];
  const u8* cur = &B.sh[off];
  if (o.race) {
    if (!B.rd.empty()) rdChk(w, I, lane, off, n);
    u64 prev = ~0ull, p1 = ~0ull, p2 = ~0ull;
    for (u32 j = 0; j < n; j++) {
      u64 e = W[j];
      if (e && e != prev) {
        if (e & F_PEND) {
          if (!(flag & F_PEND) || eW(e) != (u32)w.id)
            raceRep(w, I, lane, off + j, e, "race",
                    (e & F_ASYNC)
                        ? "write to shared memory with a TMA/bulk copy still in flight to it"
                        : "write to shared memory with a cp.async still in flight to it");
          prev = e;
        } else if ((e & F_ATOM) && (flag & F_ATOM))
          prev = e;
        else if (!val || cur[j] != val[j]) {
          chk(w, I, lane, off + j, e,
              "write of a different value over a write by another warp with no barrier between",
              "write of a different value over a write by another lane of the warp");
          prev = e;
        }
      }
      if (flag & F_ATOM) continue;
      u64 a = r1[j];
      if (a && a != p1) {
        p1 = a;
        chk(w, I, lane, off + j, a,
            "write over a value that another warp read with no barrier between",
            "write over a value that another lane of the warp read with no bar.warp.sync between");
      }
      a = r2[j];
      if (a && a != p2) {
        p2 = a;
        chk(w, I, lane, off + j, a,
            "write over a value that another warp read with no barrier between",
            "write over a value that another lane of the warp read with no bar.warp.sync between");
      }
    }
  }
  for (u32 j = 0; j < n; j++) W[j] = me | flag;
  if (!(flag & F_ATOM)) {
    memset(r1, 0, n * 8);
    memset(r2, 0, n * 8);
  }
}

// resolve lanes' addresses to host pointers. wr: 0 read, 1 write
