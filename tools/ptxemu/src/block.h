// A block and a thread of the host that runs blocks.
#pragma once
#include <chrono>
#include "warp.h"

struct BlockRun {
  std::unique_ptr<Block> b;
  static void start(Block& B, Launch& L, Worker& wk, u64 lin) {
    Kernel& K = *L.K;
    B.L = &L;
    B.wk = &wk;
    B.lin = lin;
    B.ct[0] = lin % L.grid[0];
    B.ct[1] = lin / L.grid[0] % L.grid[1];
    B.ct[2] = lin / L.grid[0] / L.grid[1];
    B.nw = L.nwarps;
    B.executed = 0;
    B.rng = L.o.seed * 0x9E3779B97F4A7C15ull + lin + 1;
    u32 shs = L.shTotal - SH0;
    B.sh.resize(shs + 64);
    if (L.o.poison_shared)
      memset(B.sh.data(), 0xFF, B.sh.size());
    else
      memset(B.sh.data(), 0, B.sh.size());
    if (L.o.race || L.o.uninit) {
      B.shw.assign(shs + 64, 0);
      B.shr1.assign(shs + 64, 0);
      B.shr2.assign(shs + 64, 0);
    }
    B.vs = K.usesMb ? 256 : B.nw;
    B.nv = K.usesMb ? 32 : B.nw;
    B.vc.assign(B.nw * B.vs, 0);
    for (u32 w = 0; w < B.nw; w++) B.vc[w * B.vs + w] = 1;
    if (K.usesPx && L.o.race)
      B.px.assign(B.nw * B.vs, 0);
    else
      B.px.clear();
    B.mb.clear();
    B.mbi.clear();
    B.fl.clear();
    B.rd.clear();
    B.bulkid = B.tmo = 0;
    B.clphase = 0;
    B.clvc.assign(B.vs, 0);
    B.clrel.assign(B.vs, 0);
    B.regs.resize((u64)K.regBytes * B.nw + 64);
    u8* r0 = (u8*)roundup((u64)B.regs.data(), 64);
    u64 rstride = roundup(K.regBytes, 64);
    B.regs.resize(rstride * B.nw + 128);
    r0 = (u8*)roundup((u64)B.regs.data(), 64);
    memset(r0, 0xFB, rstride * B.nw);
    B.local.assign((u64)K.localBytes * B.nw * 32, 0xFF);
    B.w.resize(B.nw);
    for (auto& x : B.bars) x = Bar();
    for (u32 w = 0; w < B.nw; w++) {
      Warp& W = B.w[w];
      W.regs = r0 + rstride * w;
      W.cpool = K.cpool.data();
      W.blk = &B;
      W.wk = &wk;
      W.L = &L;
      W.K = &K;
      W.id = w;
      u32 rem = L.nthr - w * 32;
      W.initMask = W.alive = rem >= 32 ? ~0u : (1u << rem) - 1;
      W.ng = 1;
      W.g[0] = {0, W.alive, false, 0};
      W.st = Warp::RUN;
      W.cp.clear();
      memset(W.cpg, 0, sizeof W.cpg);
      W.cc = 0;
      W.wg.clear();
      W.wgg = 0;
      W.bk.clear();
      memset(W.bkg, 0, sizeof W.bkg);
      W.clarr = 0;
      W.clph = 0;
      auto sp = [&](int s) { return (u32*)(W.regs + K.specOff + s * 128); };
      for (int i = 0; i < 32; i++) {
        u32 t = w * 32 + i;
        sp(SR_TIDX)[i] = t % L.block[0];
        sp(SR_TIDY)[i] = t / L.block[0] % L.block[1];
        sp(SR_TIDZ)[i] = t / L.block[0] / L.block[1];
        for (int k = 0; k < 3; k++) {
          sp(SR_NTIDX + k)[i] = L.block[k];
          sp(SR_CTAX + k)[i] = B.ct[k];
          sp(SR_NCTAX + k)[i] = L.grid[k];
        }
        sp(SR_LANE)[i] = i;
        sp(SR_WARP)[i] = w;
        sp(SR_NWARP)[i] = B.nw;
        sp(SR_SMID)[i] = lin % L.o.sm_count;
        sp(SR_NSMID)[i] = L.o.sm_count;
        sp(SR_GRID)[i] = 1;
        sp(SR_LMEQ)[i] = 1u << i;
        sp(SR_LMLE)[i] = i == 31 ? ~0u : (2u << i) - 1;
        sp(SR_LMLT)[i] = (1u << i) - 1;
        sp(SR_LMGE)[i] = ~((1u << i) - 1);
        sp(SR_LMGT)[i] = i == 31 ? 0 : ~((2u << i) - 1);
        sp(SR_DSM)[i] = L.dynSh;
        sp(SR_TSM)[i] = shs;
        sp(SR_ZERO)[i] = 0;
        sp(SR_ONE)[i] = 1;
      }
    }
  }
  // one scheduling round; true when the block is finished
  static bool round(Block& B) {
    Launch& L = *B.L;
    u32 ord[64];
    for (u32 i = 0; i < B.nw; i++) ord[i] = i;
    if (L.o.seed)
      for (u32 i = B.nw; i > 1; i--) {
        B.rng = B.rng * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(ord[i - 1], ord[(B.rng >> 33) % i]);
      }
    bool ran = false, done = true;
    for (u32 i = 0; i < B.nw; i++) {
      Warp& w = B.w[ord[i]];
      if (w.st == Warp::RUN) {
        ran = true;
        runWarp(w, L.o.slice);
      }
      if (w.st != Warp::DONE) done = false;
    }
    if (done) {
      if (!B.fl.empty()) flExit(B);
      return true;
    }
    if (B.executed > (u64)L.o.max_instr) {
      Warp* x = nullptr;
      for (auto& w : B.w)
        if (w.st == Warp::RUN) x = &w;
      FAIL("instruction limit (%lld warp instructions per block) reached: endless loop?%s",
           (long long)L.o.max_instr,
           x ? (grpState(*x) + "; " + where(*x, L.K->code[x->g[0].pc], __builtin_ctz(x->g[0].mask)))
                   .c_str()
             : "");
    }
    if (!ran) {
      for (auto& w : B.w)
        if (w.st == Warp::RUN) return false;
      bool mw = false;
      for (auto& w : B.w)
        if (w.st == Warp::WAIT && w.barid < 0) mw = true;
      if (mw && B.tmo++ < 8) {
        for (auto& w : B.w)
          if (w.st == Warp::WAIT && w.barid < 0) {
            for (int k = 0; k < w.ng; k++)
              if (w.g[k].blk == 1) w.g[k].blk = 3;
            w.st = Warp::RUN;
          }
        return false;
      }  // try_wait may time out
      string s;
      for (auto& w : B.w)
        s += w.st == Warp::DONE ? fmt(" warp %d: exited;", w.id)
             : w.barid < 0
                 ? mbDesc(w)
                 : fmt(" warp %d: barrier %d at PTX line %d;", w.id, w.barid, w.barI->line);
      FAIL("barrier deadlock in block (%u,%u,%u):%s", B.ct[0], B.ct[1], B.ct[2], s.c_str());
    }
    return false;
  }
};
static void worker(Launch& L, Worker& wk) {
  try {
    u32 co = std::max<u32>(1, L.o.coresident);
    vector<std::unique_ptr<Block>> live;
    vector<std::unique_ptr<Block>> pool;
    for (;;) {
      while (live.size() < co) {
        u64 i = L.next++;
        if (i >= L.nblocks) break;
        std::unique_ptr<Block> b;
        if (!pool.empty()) {
          b = std::move(pool.back());
          pool.pop_back();
        } else
          b.reset(new Block);
        BlockRun::start(*b, L, wk, i);
        live.push_back(std::move(b));
      }
      if (live.empty() || L.stop) return;
      for (size_t k = 0; k < live.size();) {
        if (BlockRun::round(*live[k])) {
          for (auto& w : live[k]->w) (void)w;
          pool.push_back(std::move(live[k]));
          live[k] = std::move(live.back());
          live.pop_back();
        } else
          k++;
      }
    }
  } catch (Err& e) {
    std::lock_guard<std::mutex> g(L.rmtx);
    if (L.error.empty()) L.error = e.msg;
    L.stop = true;
  }
}
