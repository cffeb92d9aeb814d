// Lowering moves, control flow and barriers.
#pragma once
#include "lower_hopper.h"

inline bool Lower::instrMove(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T,
                             bool z, int n) {
  if (op == "ld" || op == "ldu") return ldst(false), true;
  if (op == "st") return ldst(true), true;
  if (op == "mov") {
    need(2);
    if (T == PRED) {
      I.op = 4;
      I.d = DP(o[0]);
      if (o[1].k == POp::ID && o[1].s == "%is_explicit_cluster")
        I.a = cst(0, 0);
      else
        I.a = P_(o[1]);
      emit(ex_plog, K_MOV);
      return true;
    }
    int sz = tsz(T);
    if (sz > 8) unsup();
    if (o[0].k == POp::VEC) {
      int k = o[0].sub.size();
      I.v = V(o[0], sz / k, true);
      I.a = R(o[1], sz);
      emit(k == 2 && sz == 4 ? ex_unpack16 : ex_unpack, K_MOV);
      return true;
    }
    if (o[1].k == POp::VEC) {
      int k = o[1].sub.size();
      I.va = V(o[1], sz / k, false);
      I.d = D(o[0], sz);
      emit(k == 2 && sz == 4 ? ex_pack16 : ex_pack, K_MOV);
      return true;
    }
    if (o[1].k == POp::ID &&
        (o[1].s == "%clock" || o[1].s == "%clock64" || o[1].s == "%clock_hi" ||
         o[1].s == "%globaltimer" || o[1].s == "%globaltimer_lo" || o[1].s == "%globaltimer_hi")) {
      I.d = D(o[0], sz);
      I.op = o[1].s[1] == 'g' ? 2 : 1;
      I.f1 = o[1].s.find("_hi") != string::npos;
      emit(ex_clock, K_MOV);
      return true;
    }
    I.d = D(o[0], sz, false);
    I.a = R(o[1], sz, T, false);
    if (I.a.sz != I.d.sz) {
      if (o[1].k == POp::ID && SPECN.count(o[1].s)) {
        emit(ex_movx, K_MOV);
        return true;
      }
      bad("mov operand sizes");
    }
    if (I.d.sz != sz && !(sz == 1 && I.d.sz == 2)) bad("mov register size");
    emit(I.d.sz == 2 ? ex_mov<u16> : I.d.sz == 4 ? ex_mov<u32> : ex_mov<u64>, K_MOV);
    return true;
  }
  if (op == "mma") return mma(), true;
  if (op == "mbarrier") return mbarrier(), true;
  if (op == "tensormap") return tensormap(), true;
  if (op == "cp" && has("bulk")) return bulk(), true;
  if (op == "wgmma") return wgmma(), true;
  if (op == "ldmatrix" || op == "stmatrix") {
    if (!has("m8n8") || !has("b16")) unsup();
    I.vec = has("x4") ? 4 : has("x2") ? 2 : 1;
    I.f1 = has("trans");
    I.f2 = op[0] == 's';
    I.ctl = C_SYNC;
    I.sp = space();
    if (I.sp != SP_SHARED && I.sp != SP_GEN) unsup();
    need(2);
    A(I.f2 ? o[0] : o[1], I.ab, I.aoff);
    I.v = V(I.f2 ? o[1] : o[0], 4, !I.f2);
    if ((int)I.v.size() != I.vec) bad("matrix count");
    emit(ex_ldmatrix, K_LDSM);
    return true;
  }
  if (op == "cp") {
    if (S->mods.empty() || S->mods[0] != "async" || has("bulk")) unsup();
    if (has("mbarrier")) {
      need(1);
      K.usesMb = true;
      I.sp = space();
      A(o[0], I.ab, I.aoff);
      I.f1 = has("noinc");
      I.op = MB_CPASYNC;
      emit(ex_mbar, K_MBAR);
      return true;
    }
    if (S->mods.size() == 2 && S->mods[1] == "commit_group") {
      emit(ex_cpcommit, K_CPASYNC);
      return true;
    }
    if (has("wait_group")) {
      need(1);
      I.imm = o[0].i;
      emit(ex_cpwait, K_CPASYNC);
      return true;
    }
    if (has("wait_all")) {
      I.f1 = true;
      emit(ex_cpwait, K_CPASYNC);
      return true;
    }
    if (!(has("ca") || has("cg")) || !(has("shared") || has("shared::cta")) || !has("global"))
      unsup();
    need(3);
    A(o[0], I.ab, I.aoff);
    A(o[1], I.ab2, I.aoff2);
    if (o[2].k != POp::INT) bad("cp-size");
    I.imm = o[2].i;
    if (I.imm != 4 && I.imm != 8 && I.imm != 16) bad("cp-size");
    if (has("cg") && I.imm != 16) bad("cp.async.cg needs 16 bytes");
    if (n > 3) {
      bool hint = has("L2::cache_hint");
      if (!(hint && n == 4)) {
        const Opn* r = o[3].k == POp::ID ? findReg(o[3].s) : nullptr;
        if (r && r->sz == 0) {
          I.f1 = true;
          I.a = P_(o[3]);
        } else
          I.a = R(o[3], 4, T_NONE, true);
      }
    }
    I.sp = SP_GLOBAL;
    emit(ex_cpasync, K_CPASYNC);
    return true;
  }
  if (op == "bra") {
    need(1);
    I.ctl = C_BRA;
    fix.push_back({(u32)K.code.size(), cur, o[0].s, -1, S->line});
    I.cls = K_BRANCH;
    push();
    return true;
  }
  if (op == "brx") {
    need(2);
    I.ctl = C_BRX;
    I.a = R(o[0], 4);
    vector<string> tg;
    if (o[1].k == POp::ID) {
      bool f = false;
      for (int s = cur; s >= 0; s = sc[s].parent)
        if (sc[s].tg.count(o[1].s)) {
          tg = sc[s].tg[o[1].s];
          f = true;
          break;
        }
      if (!f) bad("unknown branch targets");
    } else
      bad("brx targets");
    I.targets.resize(tg.size());
    for (size_t i = 0; i < tg.size(); i++)
      fix.push_back({(u32)K.code.size(), cur, tg[i], (int)i, S->line});
    I.cls = K_BRANCH;
    push();
    return true;
  }
  if (op == "ret" && fnames.size() > 1) {
    I.ctl = C_BRA;
    I.cls = K_BRANCH;
    rets.back().push_back(K.code.size());
    push();
    return true;
  }
  if (op == "ret" || op == "exit") {
    I.ctl = C_EXIT;
    I.cls = K_BRANCH;
    push();
    return true;
  }
  if (op == "call") return call(), true;
  if (op == "bar" || op == "barrier") {
    if (has("warp")) {
      I.ctl = C_SYNC;
      need(1);
      I.e = R(o[0], 4);
      I.aligned = false;
      emit(ex_warpsync, K_SYNC);
      return true;
    }
    if (has("cluster")) {
      bool ar = has("arrive");
      I.ctl = has("aligned") ? C_SYNC : C_NORM;
      I.relu = has("relaxed");
      if (ar) {
        emit(ex_clarrive, K_BAR);
        return true;
      }
      if (!has("wait")) unsup();
      I.ctl = C_MBW;
      I.op = 9;
      I.cls = K_BAR;
      push();
      return true;
    }
    I.ctl = C_BAR;
    I.cls = K_BAR;
    int k = 0;
    if (has("sync"))
      I.op = 0;
    else if (has("arrive"))
      I.op = 1;
    else if (has("red")) {
      I.op = 2;
      if (has("popc")) {
        I.rnd = 2;
        I.d = D(o[0], 4);
      } else {
        I.rnd = has("and") ? 0 : 1;
        I.d = DP(o[0]);
      }
      k = 1;
    } else
      unsup();
    need(k + 1);
    I.a = R(o[k++], 4);
    if (I.op == 2) {
      I.c = P_(o[n - 1]);
      if (n - 1 > k) I.b = R(o[k], 4);
    } else if (k < n)
      I.b = R(o[k], 4);
    push();
    return true;
  }
  return false;
}
