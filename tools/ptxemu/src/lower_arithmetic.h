// Lowering comparisons, conversions, bit operations and arithmetic.
#pragma once
#include "lower_warp.h"

inline bool Lower::instrSelect(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T,
                               bool z, int n) {
  if (op == "setp" || op == "set") {
    need(3);
    string cmp = S->mods[0];
    I.op = 0;
    if (has("and")) I.op = 1;
    if (has("or")) I.op = 2;
    if (has("xor")) I.op = 3;
    int sz = tsz(T);
    ExecFn f = setpFn(cmp, T, z && T == F32);
    if (!f) unsup();
    I.ty = T;
    if (op == "setp") {
      I.d = DP(o[0]);
      if (!o[0].s2.empty()) I.d2 = DP2(o[0].s2);
      I.a = R(o[1], sz, T);
      I.b = R(o[2], sz, T);
      if (I.op) {
        need(4);
        I.c = P_(o[3]);
      }
      emit(f, K_SETP);
      return true;
    }
    if (t.size() != 2 || T == F16X2 || T == BF16X2) unsup();
    Opn sp = scratch(0);
    I.d = sp;
    I.a = R(o[1], sz, T);
    I.b = R(o[2], sz, T);
    if (I.op) {
      need(4);
      I.c = P_(o[3]);
    }
    Opn dd = D(o[0], tsz(t[0]));
    emit(f, K_SETP);
    I = Instr();
    I.d = dd;
    I.a = sp;
    I.ty = t[0];
    emit(ex_setexp, K_SETP);
    return true;
  }
  if (op == "selp") {
    need(4);
    int sz = tsz(T);
    I.d = D(o[0], sz);
    I.a = R(o[1], sz, T);
    I.b = R(o[2], sz, T);
    I.c = P_(o[3]);
    emit(sz == 2 ? ex_selp<u16> : sz == 4 ? ex_selp<u32> : ex_selp<u64>, K_SETP);
    return true;
  }
  if (op == "slct") {
    need(4);
    int sz = tsz(t[0]);
    I.ty2 = t[1];
    I.d = D(o[0], sz);
    I.a = R(o[1], sz, t[0]);
    I.b = R(o[2], sz, t[0]);
    I.c = R(o[3], 4);
    emit(sz == 2 ? ex_slct<u16> : sz == 4 ? ex_slct<u32> : ex_slct<u64>, K_SETP);
    return true;
  }
  if (op == "testp") {
    static const std::map<string, int> TP = {{"finite", 0},     {"infinite", 1}, {"number", 2},
                                             {"notanumber", 3}, {"normal", 4},   {"subnormal", 5}};
    auto it = TP.find(S->mods[0]);
    if (it == TP.end()) unsup();
    I.op = it->second;
    I.ty = T;
    I.d = DP(o[0]);
    I.a = R(o[1], tsz(T), T);
    emit(ex_testp, K_SETP);
    return true;
  }
  if (T == PRED) {
    I.d = DP(o[0]);
    I.a = P_(o[1]);
    if (op == "not")
      I.op = 3;
    else {
      I.op = op == "and" ? 0 : op == "or" ? 1 : op == "xor" ? 2 : 9;
      if (I.op == 9) unsup();
      need(3);
      I.b = P_(o[2]);
    }
    emit(ex_plog, K_SETP);
    return true;
  }
  if (op == "cvt") {
    need(2);
    I.rnd = rnd();
    if (has("pack")) {
      I.ty = t[0];
      if (t[1] != S32 || !has("sat")) unsup();
      if (tsz(I.ty) == 0) unsup();
      I.d = D(o[0], 4);
      I.a = R(o[1], 4);
      I.b = R(o[2], 4);
      if (n > 3) I.c = R(o[3], 4);
      emit(ex_cvtpack, K_CVT);
      return true;
    }
    if (t.size() != 2) unsup();
    I.ty = t[0];
    I.ty2 = t[1];
    if (has("scaled::n2::ue8m0")) unsup();
    if (I.ty == E4M3X2 || I.ty == E5M2X2 || I.ty2 == E4M3X2 || I.ty2 == E5M2X2) {
      bool dn = I.ty == E4M3X2 || I.ty == E5M2X2;
      if (dn) {
        I.d = D(o[0], 2);
        I.a = R(o[1], 4, I.ty2);
        if (I.ty2 == F32) {
          need(3);
          I.b = R(o[2], 4, F32);
        } else if (I.ty2 != F16X2)
          unsup();
      } else {
        if (I.ty != F16X2) unsup();
        I.d = D(o[0], 4);
        I.a = R(o[1], 2);
      }
      emit(ex_cvt8, K_CVT);
      return true;
    }
    if (I.ty == F16X2 || I.ty == BF16X2) {
      if (I.ty2 != F32 || n != 3 || (I.rnd != R_N && I.rnd != R_Z)) unsup();
      I.d = D(o[0], 4);
      I.a = R(o[1], 4, F32);
      I.b = R(o[2], 4, F32);
      emit(ex_cvtp2, K_CVT);
      return true;
    }
    if (I.ty2 == F16X2 || I.ty2 == BF16X2 || !tsz(I.ty) || !tsz(I.ty2) || I.ty2 == TF32 || n != 2)
      unsup();
    bool sf = isFloat(I.ty2), df = isFloat(I.ty);
    I.d = D(o[0], tsz(I.ty), df);
    I.a = R(o[1], tsz(I.ty2), I.ty2, sf);
    if (I.d.sz < tsz(I.ty) || !I.d.sz) bad("cvt destination");
    if (I.a.sz < tsz(I.ty2)) bad("cvt source");
    if (df && !sf && I.rnd == R_NONE) I.rnd = R_N;
    emit(ex_cvt, K_CVT);
    return true;
  }
  return false;
}

inline bool Lower::instrBits(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T,
                             bool z, int n) {
  if (op == "lop3") {
    need(5);
    I.d = o[0].k == POp::SINK ? scratch(4) : D(o[0], 4);
    if (!o[0].s2.empty() || n > 5) unsup();
    I.a = R(o[1], 4);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    I.imm = o[4].i;
    emit(ex_lop3, K_INT);
    return true;
  }
  if (op == "prmt") {
    need(4);
    I.op = has("f4e")    ? 1
           : has("b4e")  ? 2
           : has("rc8")  ? 3
           : has("ecl")  ? 4
           : has("ecr")  ? 5
           : has("rc16") ? 6
                         : 0;
    I.d = D(o[0], 4);
    I.a = R(o[1], 4);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    emit(ex_prmt, K_INT);
    return true;
  }
  if (op == "shf") {
    need(4);
    I.f1 = has("l");
    I.f2 = has("wrap");
    I.d = D(o[0], 4);
    I.a = R(o[1], 4);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    emit(ex_shf, K_INT);
    return true;
  }
  if (op == "bfe") {
    need(4);
    int sz = tsz(T);
    I.d = D(o[0], sz);
    I.a = R(o[1], sz);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    emit(T == U32   ? ex_bfe<u32>
         : T == S32 ? ex_bfe<s32>
         : T == U64 ? ex_bfe<u64>
         : T == S64 ? ex_bfe<s64>
                    : nullptr,
         K_INT);
    return true;
  }
  if (op == "bfi") {
    need(5);
    int sz = tsz(T);
    I.d = D(o[0], sz);
    I.a = R(o[1], sz);
    I.b = R(o[2], sz);
    I.c = R(o[3], 4);
    I.e = R(o[4], 4);
    emit(sz == 4 ? ex_bfi<u32> : ex_bfi<u64>, K_INT);
    return true;
  }
  if (op == "popc" || op == "clz" || op == "bfind") {
    need(2);
    I.ty = T;
    I.f1 = has("shiftamt");
    I.d = D(o[0], 4);
    I.a = R(o[1], tsz(T));
    emit(op == "popc" ? ex_popc : op == "clz" ? ex_clz : ex_bfind, K_INT);
    return true;
  }
  if (op == "brev") {
    need(2);
    I.d = D(o[0], tsz(T));
    I.a = R(o[1], tsz(T));
    emit(ex_brev, K_INT);
    return true;
  }
  if (op == "dp4a" || op == "dp2a") {
    need(4);
    I.ty = t[0];
    I.ty2 = t[1];
    I.f1 = has("hi");
    I.d = D(o[0], 4);
    I.a = R(o[1], 4);
    I.b = R(o[2], 4);
    I.c = R(o[3], 4);
    emit(op == "dp4a" ? ex_dp4a : ex_dp2a, K_INT);
    return true;
  }
  if (op == "shl" || op == "shr") {
    need(3);
    int sz = tsz(T);
    I.d = D(o[0], sz);
    I.a = R(o[1], sz);
    I.b = R(o[2], 4);
    bool l = op == "shl";
    ExecFn f = nullptr;
    switch (T) {
      case U16:
      case B16:
        f = l ? ex_shl<u16> : ex_shr<u16>;
        break;
      case S16:
        f = l ? ex_shl<u16> : ex_shr<s16>;
        break;
      case U32:
      case B32:
        f = l ? ex_shl<u32> : ex_shr<u32>;
        break;
      case S32:
        f = l ? ex_shl<u32> : ex_shr<s32>;
        break;
      case U64:
      case B64:
        f = l ? ex_shl<u64> : ex_shr<u64>;
        break;
      case S64:
        f = l ? ex_shl<u64> : ex_shr<s64>;
        break;
      default:
        break;
    }
    emit(f, K_INT);
    return true;
  }
  return false;
}
