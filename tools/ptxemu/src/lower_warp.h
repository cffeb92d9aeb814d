// Lowering collectives of a warp, atomics, fences and addresses.
#pragma once
#include "lower_control.h"

inline bool Lower::instrWarp(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T,
                             bool z, int n) {
  if (op == "shfl") {
    if (!has("sync")) unsup();
    need(5);
    I.ctl = C_SYNC;
    I.aligned = false;
    I.op = has("up") ? 0 : has("down") ? 1 : has("bfly") ? 2 : has("idx") ? 3 : 9;
    if (I.op == 9) unsup();
    I.d = D(o[0], 4);
    if (!o[0].s2.empty()) I.d2 = DP2(o[0].s2);
    I.a = R(o[1], 4);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    I.e = R(o[4], 4);
    emit(ex_shfl, K_SHFL);
    return true;
  }
  if (op == "vote") {
    if (!has("sync")) unsup();
    need(3);
    I.ctl = C_SYNC;
    I.aligned = false;
    I.op = has("ballot") ? 0 : has("all") ? 1 : has("any") ? 2 : 3;
    I.d = I.op == 0 ? D(o[0], 4) : DP(o[0]);
    I.a = P_(o[1]);
    I.e = R(o[2], 4);
    emit(ex_vote, K_VOTE);
    return true;
  }
  if (op == "redux") {
    need(3);
    if (isFloat(T)) unsup();
    I.ctl = C_SYNC;
    I.aligned = false;
    I.ty = T;
    I.op = has("add")   ? A_ADD
           : has("min") ? A_MIN
           : has("max") ? A_MAX
           : has("and") ? A_AND
           : has("or")  ? A_OR
                        : A_XOR;
    I.d = D(o[0], 4);
    I.a = R(o[1], 4);
    I.e = R(o[2], 4);
    emit(ex_redux, K_SHFL);
    return true;
  }
  if (op == "match") {
    need(3);
    I.ctl = C_SYNC;
    I.aligned = false;
    I.op = has("all");
    I.d = D(o[0], 4);
    if (!o[0].s2.empty()) I.d2 = DP2(o[0].s2);
    I.a = R(o[1], tsz(T));
    I.e = R(o[2], 4);
    emit(ex_match, K_VOTE);
    return true;
  }
  if (op == "elect") {
    need(2);
    I.ctl = C_SYNC;
    I.aligned = false;
    I.d = D(o[0], 4);
    I.d2 = o[0].s2.empty() ? scratch(0) : DP2(o[0].s2);
    I.e = R(o[1], 4);
    emit(ex_elect, K_VOTE);
    return true;
  }
  if (op == "activemask") {
    I.d = D(o[0], 4);
    emit(ex_activemask, K_VOTE);
    return true;
  }
  if (op == "atom" || op == "red") {
    if (has("async")) unsup();
    static const std::map<string, int> AO = {
        {"add", A_ADD}, {"min", A_MIN}, {"max", A_MAX}, {"and", A_AND},   {"or", A_OR},
        {"xor", A_XOR}, {"inc", A_INC}, {"dec", A_DEC}, {"exch", A_EXCH}, {"cas", A_CAS}};
    bool f = false;
    for (auto& m : S->mods) {
      auto it = AO.find(m);
      if (it != AO.end()) {
        I.op = it->second;
        f = true;
      }
    }
    if (!f || t.size() != 1) unsup();
    I.ty = T;
    if (T == B128 || T == U8) unsup();
    if (isFloat(T) && I.op != A_ADD && I.op != A_MIN && I.op != A_MAX && I.op != A_EXCH) unsup();
    I.vec = vecw();
    I.sp = space();
    int k = op == "red" ? 0 : 1;
    need(k + 2);
    if (k) I.v = V(o[0], tsz(T), true);
    A(o[k], I.ab, I.aoff);
    I.va = V(o[k + 1], tsz(T), false);
    if (I.op == A_CAS) {
      need(k + 3);
      I.vb = V(o[k + 2], tsz(T), false);
    }
    if ((int)I.va.size() != I.vec) bad("vector width");
    emit(ex_atom, I.sp == SP_SHARED ? K_ATOMS : K_ATOMG);
    return true;
  }
  if (op == "membar" || op == "fence") {
    if (has("proxy") && !has("async") && !has("alias") && !has("tensormap::generic") &&
        !has("async::generic"))
      unsup();
    emit(has("proxy") && has("async") && !has("global") ? ex_fenceproxy : ex_nop, K_SYNC);
    return true;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "discard" || op == "applypriority" ||
      op == "nanosleep" || op == "pmevent") {
    emit(ex_nop, K_OTHER);
    return true;
  }
  if (op == "createpolicy") {
    need(1);
    I.d = D(o[0], 8);
    emit(ex_zero, K_OTHER);
    return true;
  }
  if (op == "griddepcontrol") {
    I.op = has("launch_dependents");
    if (!I.op && !has("wait")) unsup();
    emit(ex_griddep, K_OTHER);
    return true;
  }
  if (op == "setmaxnreg") {
    I.ctl = C_SYNC;
    emit(ex_nop, K_OTHER);
    return true;
  }
  if (op == "mapa" || op == "getctarank") {
    need(op == "mapa" ? 3 : 2);
    I.op = op != "mapa";
    int sz = tsz(T);
    I.d = D(o[0], I.op ? 4 : sz);
    I.a = R(o[1], sz, T, false);
    if (!I.op) I.b = R(o[2], 4);
    emit(ex_mapa, K_INT);
    return true;
  }
  if (op == "trap" || op == "brkpt") {
    emit(ex_trap, K_OTHER);
    return true;
  }
  if (op == "cvta") {
    need(2);
    bool to = has("to");
    u64 b = has("shared") || has("shared::cta") ? SH_BASE : has("local") ? LOC_BASE : 0;
    I.imm = to ? -(s64)b : (s64)b;
    if (tsz(T) != 8) unsup();
    I.d = D(o[0], 8);
    I.a = R(o[1], 8);
    emit(has("param") && !to ? ex_cvtaparam : ex_cvta, K_INT);
    return true;
  }
  if (op == "isspacep") {
    need(2);
    I.sp = space();
    I.d = DP(o[0]);
    I.a = R(o[1], 8);
    emit(ex_isspacep, K_SETP);
    return true;
  }
  return false;
}
