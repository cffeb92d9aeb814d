// Barriers, and a warp that runs until it waits.
#pragma once
#include "lower_math.h"

static void barRelease(Block& B, int id) {
  Bar& b = B.bars[id];
  u32 nw = B.nw, vs = B.vs, nv = B.nv;
  B.tmo = 0;
  if (B.L->o.race) {
    u32 j[256];
    auto join = [&](u32* X) {
      memset(j, 0, nv * 4);
      for (u32 w = 0; w < nw; w++)
        if (b.arrWarps >> w & 1) {
          const u32* x = X + w * vs;
          for (u32 v = 0; v < nv; v++) j[v] = std::max(j[v], x[v]);
        }
      for (u32 w = 0; w < nw; w++)
        if (b.arrWarps & b.waiters & (1u << w)) {
          u32* x = X + w * vs;
          for (u32 v = 0; v < nv; v++) x[v] = std::max(x[v], j[v]);
        }
    };
    join(B.vc.data());
    if (!B.px.empty()) join(B.px.data());
    for (u32 w = 0; w < nw; w++)
      if (b.arrWarps >> w & 1) B.vc[w * vs + w]++;
  }
  for (u32 w = 0; w < nw; w++)
    if (b.waiters >> w & 1) {
      Warp& W = B.w[w];
      W.st = Warp::RUN;
      if (W.barI->op == 2) {
        if (W.barI->rnd == 2) {
          u32* d = P<u32>(W, W.barI->d);
          LANES(W.barMask, d[i] = b.redPop);
        } else {
          u32* d = P<u32>(W, W.barI->d);
          u32 v = (W.barI->rnd == 0 ? b.redAnd != 0 : b.redOr != 0) ? ~0u : 0;
          *d = (*d & ~W.barMask) | (v & W.barMask);
        }
      }
    }
  b = Bar();
}
static void barCheck(Block& B, int id) {
  Bar& b = B.bars[id];
  if (!b.arrWarps) return;
  u32 exp = b.expected;
  if (!b.explicitCnt) {
    exp = 0;
    for (auto& w : B.w)
      if (w.st != Warp::DONE) exp += 32;
  }
  if (b.arrived >= exp) barRelease(B, id);
}
static void warpExit(Warp& w) {
  w.st = Warp::DONE;
  w.wg.clear();
  if (!w.cp.empty()) w.cp.clear();
  for (int i = 0; i < 16; i++)
    if (w.blk->bars[i].arrWarps && !w.blk->bars[i].explicitCnt) barCheck(*w.blk, i);
}
// returns true if the warp must stop now
static bool barArrive(Warp& w, const Instr& I, u32 m) {
  Block& B = *w.blk;
  int l = __builtin_ctz(m);
  u32 id = P<u32>(w, I.a)[l];
  if (id > 15) FAIL("barrier id %u; %s", id, where(w, I, l).c_str());
  Bar& b = B.bars[id];
  w.wk->c.bar++;
  u32 cnt = I.b.k ? P<u32>(w, I.b)[l] : 0;
  if (I.b.k && (cnt % 32 || !cnt))
    FAIL("barrier thread count %u is not a multiple of 32; %s", cnt, where(w, I, l).c_str());
  if (b.arrWarps && (b.explicitCnt != (cnt != 0) || (cnt && b.expected != cnt)))
    FAIL("barrier %u used with different thread counts; %s", id, where(w, I, l).c_str());
  b.explicitCnt = cnt != 0;
  b.expected = cnt;
  if (b.arrWarps >> w.id & 1)
    FAIL("warp arrives twice at barrier %u; %s", id, where(w, I, l).c_str());
  b.arrived += 32;
  b.arrWarps |= 1u << w.id;
  if (I.op == 2) {
    u32 c = *P<u32>(w, I.c);
    if (I.c.neg) c = ~c;
    if ((c & m) != m) b.redAnd = 0;
    b.redOr |= c & m;
    b.redPop += __builtin_popcount(c & m);
  }
  if (I.op != 1) {
    b.waiters |= 1u << w.id;
    w.st = Warp::WAIT;
    w.barid = id;
    w.barI = &I;
    w.barMask = m;
  }
  barCheck(B, id);
  return w.st == Warp::WAIT;
}
static void addGrp(Warp& w, u32 pc, u32 m) {
  for (int k = 0; k < w.ng; k++)
    if (w.g[k].pc == pc) {
      w.g[k].mask |= m;
      w.g[k].parked = false;
      w.g[k].blk = 0;
      return;
    }
  w.g[w.ng++] = {pc, m, false, 0};
}
static string grpState(Warp& w) {
  string s;
  for (int k = 0; k < w.ng; k++) {
    const Instr& J = w.K->code[w.g[k].pc];
    s += fmt(" [lanes 0x%08x at PTX line %d: `%s`]", w.g[k].mask, J.line, J.text.c_str());
  }
  return s;
}
static void runWarp(Warp& w, s64 budget) {
  const Instr* code = w.K->code.data();
  Worker& W = *w.wk;
  ICount* ic = W.ic.data();
  while (budget-- > 0) {
    int gi = 0;
    if (w.ng > 1) {
      for (int a = 0; a < w.ng; a++)
        for (int b = a + 1; b < w.ng;)
          if (w.g[a].pc == w.g[b].pc) {
            w.g[a].mask |= w.g[b].mask;
            w.g[a].parked = false;
            w.g[a].blk = 0;
            w.g[b] = w.g[--w.ng];
          } else
            b++;
      gi = -1;
      bool wt = false;
      for (int k = 0; k < w.ng; k++) {
        if (w.g[k].blk == 1)
          wt = true;
        else if (!w.g[k].parked && w.g[k].blk != 2 && (gi < 0 || w.g[k].pc < w.g[gi].pc))
          gi = k;
      }
      if (gi < 0)
        for (int k = 0; k < w.ng; k++)
          if (w.g[k].blk == 2) {
            gi = k;
            break;
          }
      if (gi < 0 && wt) {
        w.st = Warp::WAIT;
        w.barid = -1;
        for (int k = 0; k < w.ng; k++)
          if (w.g[k].blk == 1) w.barI = &code[w.g[k].pc];
        return;
      }
      if (gi < 0) {
        const Instr& J = code[w.g[0].pc];
        FAIL("warp-level deadlock: lanes wait at different synchronising instructions:%s; %s",
             grpState(w).c_str(), where(w, J, __builtin_ctz(w.g[0].mask)).c_str());
      }
    }
    Grp& g = w.g[gi];
    const Instr& I = code[g.pc];
    u32 em = g.mask;
    w.blk->executed++;
    if (I.pred >= 0) {
      u32 pm = *(u32*)(w.regs + I.pred);
      em &= I.pneg ? ~pm : pm;
    }
    ICount& c = ic[g.pc];
    switch (I.ctl) {
      case C_NORM:
        c.w++;
        c.t += __builtin_popcount(em);
        g.pc++;
        if (em) I.fn(w, I, em);
        break;
      case C_BRA:
        c.w++;
        c.t += __builtin_popcount(em);
        if (!em)
          g.pc++;
        else if (em == g.mask)
          g.pc = I.target;
        else {
          W.c.div++;
          g.mask &= ~em;
          g.pc++;
          if (g.pc == I.target)
            g.mask |= em;
          else
            w.g[w.ng++] = {I.target, em, false, 0};
        }
        break;
      case C_BRX: {
        c.w++;
        c.t += __builtin_popcount(em);
        const u32* x = P<u32>(w, I.a);
        u32 m = em, rest = g.mask & ~em, pc0 = g.pc;
        w.g[gi] = w.g[--w.ng];
        if (rest) addGrp(w, pc0 + 1, rest);
        for (; m; m &= m - 1) {
          int l = __builtin_ctz(m);
          if (x[l] >= I.targets.size())
            FAIL("brx.idx index %u out of range; %s", x[l], where(w, I, l).c_str());
          addGrp(w, I.targets[x[l]], 1u << l);
        }
        break;
      }
      case C_MBW: {
        if (!em) {
          c.w++;
          g.pc++;
          break;
        }
        int r = mbWait(w, I, em, g.blk == 3 || I.f1);
        if (r) {
          c.w++;
          c.t += __builtin_popcount(em);
          g.pc++;
          g.blk = 0;
          if (r == 2) {
            g.blk = 2;
            return;
          }
          break;
        }
        g.blk = 1;
        if (w.ng > 1) break;
        w.st = Warp::WAIT;
        w.barid = -1;
        w.barI = &I;
        return;
      }
      case C_EXIT:
        if (!w.bk.empty()) bulkExit(w, I, em);
        c.w++;
        c.t += __builtin_popcount(em);
        w.alive &= ~em;
        if (w.clarr || w.blk->clphase) clCheck(*w.blk);
        g.mask &= ~em;
        if (!g.mask) {
          w.g[gi] = w.g[--w.ng];
        } else
          g.pc++;
        for (int k = 0; k < w.ng; k++) w.g[k].parked = false;
        if (!w.ng) {
          warpExit(w);
          return;
        }
        break;
      case C_SYNC:
      case C_BAR: {
        if (em != g.mask) {
          u32 skip = g.mask & ~em;
          if (!em) {
            c.w++;
            g.pc++;
            break;
          }
          g.mask = em;
          addGrp(w, g.pc + 1, skip);
          break;
        }
        u32 need = w.alive;
        if (I.ctl == C_SYNC && !I.aligned) {
          const u32* mm = P<u32>(w, I.e);
          need = 0;
          for (u32 q = em; q; q &= q - 1) {
            int l = __builtin_ctz(q);
            need |= mm[l];
            if (!(mm[l] >> l & 1))
              FAIL("lane not in its own membermask 0x%x; %s", mm[l], where(w, I, l).c_str());
          }
          need &= w.alive;
        }
        if ((em & need) != need) {
          if (w.ng == 1)
            FAIL("needed lanes 0x%x are missing; %s", need & ~em,
                 where(w, I, __builtin_ctz(em)).c_str());
          g.parked = true;
          break;
        }
        if (I.cls == K_MMA || I.cls == K_LDSM)
          if (em != ~0u)
            FAIL("executed with lanes missing (mask 0x%08x); %s", em,
                 where(w, I, __builtin_ctz(em)).c_str());
        c.w++;
        c.t += __builtin_popcount(em);
        g.pc++;
        if (I.ctl == C_BAR) {
          if (barArrive(w, I, em)) return;
        } else
          I.fn(w, I, em);
        break;
      }
    }
  }
}
