// Lowering arithmetic; the choice of an instruction's lowering.
#pragma once
#include "lower_arithmetic.h"

inline bool Lower::instrMath(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T,
                             bool z, int n) {
  bool fl = isFloat(T);
  int rd = rnd();
  I.rnd = rd;
  bool slow = fl && ((T == F32 || T == F64) && (rd == R_Z || rd == R_M || rd == R_P || I.sat));
  if (T == F32 && I.relu) unsup();
  if (T == F64 && z) I.ftz = false;
  auto setslow = [&](int k, int na) {
    I.op = k;
    if (I.rnd == R_NONE) I.rnd = 0;
    arith3(T == F32 ? ex_fslow<float> : ex_fslow<double>, fcls(T), T, na);
  };
  if (op == "add" || op == "sub" || op == "addc" || op == "subc") {
    bool cc = has("cc"), ci = op.size() == 4;
    if (cc || ci) {
      I.op = op[0] == 's';
      I.f1 = ci;
      I.f2 = cc;
      arith3(tsz(T) == 4 ? ex_addcc<u32> : ex_addcc<u64>, K_INT, T, 2);
      return true;
    }
    bool sb = op == "sub";
    if (slow) return setslow(sb, 2), true;
    if (fl) {
      arith3(sb ? selFb<FSub>(T, z) : selFb<FAdd>(T, z), fcls(T), T, 2);
      return true;
    }
    if (T == U16X2) {
      arith3(ex_b16x2<u16, Add>, K_INT, T, 2);
      return true;
    }
    if (T == S16X2) {
      arith3(ex_b16x2<s16, Add>, K_INT, T, 2);
      return true;
    }
    if (I.sat && T == S32) unsup();
    arith3(sb ? selB<Sub>(T) : selB<Add>(T), K_INT, T, 2);
    return true;
  }
  if (op == "mul" || op == "mad" || op == "fma" || op == "madc" || op == "mul24" || op == "mad24") {
    if (op == "mul24" || op == "mad24") unsup();
    if (fl) {
      if (op == "mul") {
        if (slow) return setslow(2, 2), true;
        arith3(selFb<FMul>(T, z), fcls(T), T, 2);
      } else {
        if (slow) return setslow(3, 3), true;
        arith3(selFt<FFma>(T, z), fcls(T), T, 3);
      }
      return true;
    }
    bool w = has("wide"), h = has("hi");
    int sz = tsz(T);
    if (I.sat) unsup();
    if (w) {
      need(op == "mul" ? 3 : 4);
      I.d = D(o[0], 2 * sz);
      I.a = R(o[1], sz);
      I.b = R(o[2], sz);
      if (op == "mul") {
        emit(T == U16   ? ex_mulw<u16, u32>
             : T == S16 ? ex_mulw<s16, s32>
             : T == U32 ? ex_mulw<u32, u64>
             : T == S32 ? ex_mulw<s32, s64>
                        : nullptr,
             K_INT);
        return true;
      }
      if (has("cc") || op == "madc") unsup();
      I.c = R(o[3], 2 * sz);
      emit(T == U16   ? ex_madw<u16, u32>
           : T == S16 ? ex_madw<s16, s32>
           : T == U32 ? ex_madw<u32, u64>
           : T == S32 ? ex_madw<s32, s64>
                      : nullptr,
           K_INT);
      return true;
    }
    if (op == "mul") {
      arith3(h ? selB<MulHi>(T) : selB<Mul>(T), K_INT, T, 2);
      return true;
    }
    if (has("cc") || op == "madc") {
      I.op = h;
      I.f1 = op == "madc";
      I.f2 = has("cc");
      arith3(T == U32   ? ex_madcc<u32>
             : T == S32 ? ex_madcc<s32>
             : T == U64 ? ex_madcc<u64>
                        : ex_madcc<s64>,
             K_INT, T, 3);
      return true;
    }
    arith3(h ? selT<MadHi>(T) : selT<MadLo>(T), K_INT, T, 3);
    return true;
  }
  if (op == "sad") {
    arith3(selT<Sad>(T), K_INT, T, 3);
    return true;
  }
  if (op == "div") {
    if (fl) {
      if (slow) return setslow(4, 2), true;
      arith3(selFb<FDiv>(T, z), fcls(T), T, 2);
    } else
      arith3(selB<Div>(T), K_INT, T, 2);
    return true;
  }
  if (op == "rem") {
    arith3(selB<Rem>(T), K_INT, T, 2);
    return true;
  }
  if (op == "min" || op == "max") {
    bool mn = op == "min";
    if (has("xorsign") || n != 3) unsup();
    if (T == U16X2) {
      arith3(mn ? ex_b16x2<u16, Min> : ex_b16x2<u16, Max>, K_INT, T, 2);
      return true;
    }
    if (T == S16X2) {
      if (I.relu) unsup();
      arith3(mn ? ex_b16x2<s16, Min> : ex_b16x2<s16, Max>, K_INT, T, 2);
      return true;
    }
    if (fl) {
      bool nn = has("NaN");
      I.sat = false;
      arith3(mn ? (nn ? selFb<FMinN>(T, z) : selFb<FMin>(T, z))
                : (nn ? selFb<FMaxN>(T, z) : selFb<FMax>(T, z)),
             fcls(T), T, 2);
    } else {
      if (I.relu) unsup();
      arith3(mn ? selB<Min>(T) : selB<Max>(T), K_INT, T, 2);
    }
    return true;
  }
  if (op == "neg" || op == "abs") {
    if (T == F16 || T == BF16 || T == F16X2 || T == BF16X2) {
      I.op = op == "abs";
      arith3(ex_hsign, K_FP16, T, 1);
      return true;
    }
    if (fl)
      arith3(op == "neg" ? selFu<FNeg>(T, z) : selFu<FAbs>(T, z), fcls(T), T, 1);
    else
      arith3(op == "neg" ? selU<Neg>(T) : selU<Abs>(T), K_INT, T, 1);
    return true;
  }
  if (op == "and") {
    arith3(selB<And>(T), K_INT, T, 2);
    return true;
  }
  if (op == "or") {
    arith3(selB<Or>(T), K_INT, T, 2);
    return true;
  }
  if (op == "xor") {
    arith3(selB<Xor>(T), K_INT, T, 2);
    return true;
  }
  if (op == "not") {
    arith3(selU<Not>(T), K_INT, T, 1);
    return true;
  }
  if (op == "cnot") {
    arith3(selU<Cnot>(T), K_INT, T, 1);
    return true;
  }
  if (op == "copysign") {
    arith3(selFb<FCps>(T, false), fcls(T), T, 2);
    return true;
  }
  if (op == "sqrt") {
    if (slow) return setslow(5, 1), true;
    arith3(selFu<FSqrt>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "rcp") {
    if (slow) return setslow(6, 1), true;
    arith3(selFu<FRcp>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "rsqrt") {
    arith3(selFu<FRsqrt>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "ex2") {
    arith3(selFu<FEx2>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "lg2") {
    arith3(selFu<FLg2>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "sin") {
    arith3(selFu<FSin>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "cos") {
    arith3(selFu<FCos>(T, z), K_SFU, T, 1);
    return true;
  }
  if (op == "tanh") {
    arith3(selFu<FTanh>(T, z), K_SFU, T, 1);
    return true;
  }
  return false;
}

inline void Lower::instr() {
  const string& op = S->op;
  const vector<POp>& o = S->ops;
  const vector<Ty> t = types();
  const Ty T = t.empty() ? T_NONE : t.back();
  const bool z = has("ftz");
  const int n = o.size();
  I.ftz = z;
  I.sat = has("sat") || has("satfinite");
  I.relu = has("relu");
  if (instrMove(op, o, t, T, z, n) || instrWarp(op, o, t, T, z, n)) return;
  if (instrSelect(op, o, t, T, z, n) || instrBits(op, o, t, T, z, n)) return;
  if (!instrMath(op, o, t, T, z, n)) unsup();
}
