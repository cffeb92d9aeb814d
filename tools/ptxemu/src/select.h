// Which function runs an operation on a type; names in scope.
#pragma once
#include "bulk.h"
#include "collectives.h"
#include "convert.h"
#include "integers.h"

struct Sym {
  Space sp;
  u64 addr;
  bool parm;
};
struct Scope {
  int parent;
  std::unordered_map<string, Opn> regs;
  std::unordered_map<string, u32> labels;
  std::unordered_map<string, Sym> syms;
  std::unordered_map<string, vector<string>> tg;
};
static u64 roundup(u64 x, u64 a) { return (x + a - 1) / a * a; }

template <class F>
static ExecFn selU(Ty t) {
  switch (t) {
    case U16:
    case B16:
      return ex_u<u16, F>;
    case S16:
      return ex_u<s16, F>;
    case U32:
    case B32:
      return ex_u<u32, F>;
    case S32:
      return ex_u<s32, F>;
    case U64:
    case B64:
      return ex_u<u64, F>;
    case S64:
      return ex_u<s64, F>;
    default:
      return nullptr;
  }
}
template <class F>
static ExecFn selB(Ty t) {
  switch (t) {
    case U16:
    case B16:
      return ex_b<u16, F>;
    case S16:
      return ex_b<s16, F>;
    case U32:
    case B32:
      return ex_b<u32, F>;
    case S32:
      return ex_b<s32, F>;
    case U64:
    case B64:
      return ex_b<u64, F>;
    case S64:
      return ex_b<s64, F>;
    default:
      return nullptr;
  }
}
template <class F>
static ExecFn selT(Ty t) {
  switch (t) {
    case U16:
      return ex_t<u16, F>;
    case S16:
      return ex_t<s16, F>;
    case U32:
      return ex_t<u32, F>;
    case S32:
      return ex_t<s32, F>;
    case U64:
      return ex_t<u64, F>;
    case S64:
      return ex_t<s64, F>;
    default:
      return nullptr;
  }
}
template <class F>
static ExecFn selFu(Ty t, bool z) {
  switch (t) {
    case F32:
      return z ? ex_fu<float, F, true> : ex_fu<float, F, false>;
    case F64:
      return ex_fu<double, F, false>;
    case F16:
      return ex_hu<F, false, 1>;
    case BF16:
      return ex_hu<F, true, 1>;
    case F16X2:
      return ex_hu<F, false, 2>;
    case BF16X2:
      return ex_hu<F, true, 2>;
    default:
      return nullptr;
  }
}
template <class F>
static ExecFn selFb(Ty t, bool z) {
  switch (t) {
    case F32:
      return z ? ex_fb<float, F, true> : ex_fb<float, F, false>;
    case F64:
      return ex_fb<double, F, false>;
    case F16:
      return ex_hb<F, false, 1>;
    case BF16:
      return ex_hb<F, true, 1>;
    case F16X2:
      return ex_hb<F, false, 2>;
    case BF16X2:
      return ex_hb<F, true, 2>;
    default:
      return nullptr;
  }
}
template <class F>
static ExecFn selFt(Ty t, bool z) {
  switch (t) {
    case F32:
      return z ? ex_ft<float, F, true> : ex_ft<float, F, false>;
    case F64:
      return ex_ft<double, F, false>;
    case F16:
      return ex_ht<F, false, 1>;
    case BF16:
      return ex_ht<F, true, 1>;
    case F16X2:
      return ex_ht<F, false, 2>;
    case BF16X2:
      return ex_ht<F, true, 2>;
    default:
      return nullptr;
  }
}
template <int Q>
static ExecFn selSetp(Ty t, bool z) {
  switch (t) {
    case U16:
    case B16:
      return ex_setp<u16, Q>;
    case S16:
      return ex_setp<s16, Q>;
    case U32:
    case B32:
      return ex_setp<u32, Q>;
    case S32:
      return ex_setp<s32, Q>;
    case U64:
    case B64:
      return ex_setp<u64, Q>;
    case S64:
      return ex_setp<s64, Q>;
    case F32:
      return z ? ex_setpf<Q> : ex_setp<float, Q>;
    case F64:
      return ex_setp<double, Q>;
    case F16:
      return ex_setph<false, Q>;
    case BF16:
      return ex_setph<true, Q>;
    case F16X2:
      return ex_setph2<false, Q>;
    case BF16X2:
      return ex_setph2<true, Q>;
    default:
      return nullptr;
  }
}
static ExecFn setpFn(const string& c0, Ty t, bool z) {
  string c = c0;
  if (c == "lo")
    c = "lt";
  else if (c == "ls")
    c = "le";
  else if (c == "hi")
    c = "gt";
  else if (c == "hs")
    c = "ge";
  if (c == "eq") return selSetp<Q_EQ>(t, z);
  if (c == "ne") return selSetp<Q_NE>(t, z);
  if (c == "lt") return selSetp<Q_LT>(t, z);
  if (c == "le") return selSetp<Q_LE>(t, z);
  if (c == "gt") return selSetp<Q_GT>(t, z);
  if (c == "ge") return selSetp<Q_GE>(t, z);
  if (c == "equ") return selSetp<Q_EQU>(t, z);
  if (c == "neu") return selSetp<Q_NEU>(t, z);
  if (c == "ltu") return selSetp<Q_LTU>(t, z);
  if (c == "leu") return selSetp<Q_LEU>(t, z);
  if (c == "gtu") return selSetp<Q_GTU>(t, z);
  if (c == "geu") return selSetp<Q_GEU>(t, z);
  if (c == "num") return selSetp<Q_NUM>(t, z);
  if (c == "nan") return selSetp<Q_NAN>(t, z);
  return nullptr;
}
