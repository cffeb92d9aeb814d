// From statements to lowered code: registers, constants, operands, scopes.
#pragma once
#include <set>
#include "parse_module.h"
#include "select.h"

struct Lower {
  Module& M;
  Kernel& K;
  vector<Scope> sc;
  struct Fix {
    u32 ins;
    int scope;
    string label;
    int slot;
    int line;
  };
  vector<Fix> fix;
  std::map<std::pair<int, u64>, u32> cmap;
  const Stmt* S = nullptr;
  Instr I;
  int cur = 0, depth = 0;
  vector<string> fnames;
  std::map<string, Sym> shsym;
  vector<vector<u32>> rets;
  Lower(Module& m, Kernel& k) : M(m), K(k) {}
  [[noreturn]] void bad(const string& m);
  [[noreturn]] void unsup();
  string opn();
  bool has(const char* m);
  Opn allocReg(int sz);
  Opn cst(int sz, u64 v);
  const Opn* findReg(const string& n);
  bool findSym(const string& n, Sym& r);
  Opn scratch(int sz);
  Opn P_(const POp& o);
  Opn R(const POp& o, int sz, Ty t = T_NONE, bool strict = true);
  Opn D(const POp& o, int sz, bool strict = true);
  Opn DP(const POp& o);
  Opn DP2(const string& n);
  vector<Opn> V(const POp& o, int sz, bool dst, bool strict = true);
  void A(const POp& o, Opn& base, s64& off, Space* psp = nullptr, bool* parm = nullptr);
  void push();
  void emit(ExecFn f, Cls c);
  vector<Ty> types();
  int rnd();

  void declare(const VarDecl& d, const string& fname);
  void addShared(const VarDecl& d, const string& key);
  void layoutShared();
  void run();
  void stmts(const Func& f);
  void call();
  Space space();
  int vecw();
  void ldst(bool st);
  void arith3(ExecFn f, Cls c, Ty t, int n);
  static Cls fcls(Ty t);
  void mma();
  void wgmma();
  // mbarrier.*: ab address, b count / tx / parity / token, d state or predicate
  void mbarrier();
  void tensormap();
  // cp.async.bulk.*, cp.reduce.async.bulk.*
  void bulk();
  void instr();
  void need(int k) {
    if ((int)S->ops.size() < k) bad("too few operands");
  }
  bool instrMove(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T, bool z, int n);
  bool instrWarp(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T, bool z, int n);
  bool instrSelect(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T, bool z,
                   int n);
  bool instrBits(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T, bool z, int n);
  bool instrMath(const string& op, const vector<POp>& o, const vector<Ty>& t, Ty T, bool z, int n);
};
inline void Lower::bad(const string& m) {
  FAIL("kernel %s, PTX line %d: %s: `%s`", K.name.c_str(), S ? S->line : 0, m.c_str(),
       S ? S->text.c_str() : "");
}
inline void Lower::unsup() { bad("unsupported instruction '" + opn() + "'"); }
inline string Lower::opn() {
  string r = S->op;
  for (auto& m : S->mods) r += "." + m;
  return r;
}
inline bool Lower::has(const char* m) {
  for (auto& x : S->mods)
    if (x == m) return true;
  return false;
}
inline Opn Lower::allocReg(int sz) {
  Opn o;
  o.k = 1;
  o.sz = sz;
  if (!sz) {
    K.regBytes = roundup(K.regBytes, 4);
    o.off = K.regBytes;
    K.regBytes += 4;
  } else {
    K.regBytes = roundup(K.regBytes, 64);
    o.off = K.regBytes;
    K.regBytes += 32 * sz;
  }
  return o;
}
inline Opn Lower::cst(int sz, u64 v) {
  if (sz == 1) sz = 2;
  if (sz < 8 && sz) v &= sz == 2 ? 0xffff : 0xffffffffu;
  auto key = std::make_pair(sz, v);
  auto it = cmap.find(key);
  Opn o;
  o.k = 2;
  o.sz = sz;
  if (it != cmap.end()) {
    o.off = it->second;
    return o;
  }
  K.cpool.resize(roundup(K.cpool.size(), 64));
  o.off = K.cpool.size();
  cmap[key] = o.off;
  if (!sz) {
    u32 m = v ? ~0u : 0;
    K.cpool.resize(o.off + 4);
    memcpy(&K.cpool[o.off], &m, 4);
  } else {
    K.cpool.resize(o.off + 32 * sz);
    for (int i = 0; i < 32; i++) memcpy(&K.cpool[o.off + i * sz], &v, sz);
  }
  return o;
}
inline const Opn* Lower::findReg(const string& n) {
  for (int s = cur; s >= 0; s = sc[s].parent) {
    auto it = sc[s].regs.find(n);
    if (it != sc[s].regs.end()) return &it->second;
  }
  return nullptr;
}
inline bool Lower::findSym(const string& n, Sym& r) {
  for (int s = cur; s >= 0; s = sc[s].parent) {
    auto it = sc[s].syms.find(n);
    if (it != sc[s].syms.end()) {
      r = it->second;
      return true;
    }
  }
  auto it = shsym.find(n);
  if (it != shsym.end()) {
    r = it->second;
    return true;
  }
  auto v = M.varIdx.find(n);
  if (v != M.varIdx.end()) {
    const VarDecl& d = M.vars[v->second];
    r = {d.space == "const" ? SP_CONST : SP_GLOBAL, ((u64)(IDX_MOD + v->second) << WIN) + HALF,
         false};
    return true;
  }
  return false;
}
inline Opn Lower::scratch(int sz) { return allocReg(sz); }
inline Opn Lower::P_(const POp& o) {  // predicate source
  if (o.k == POp::ID) {
    const Opn* r = findReg(o.s);
    if (!r || r->sz) bad("predicate expected: " + o.s);
    Opn q = *r;
    q.neg = o.neg;
    return q;
  }
  if (o.k == POp::INT) {
    Opn q = cst(0, o.i != 0);
    q.neg = o.neg;
    return q;
  }
  bad("predicate operand expected");
}
inline Opn Lower::R(const POp& o, int sz, Ty t, bool strict) {
  if (o.k == POp::ID) {
    if (const Opn* r = findReg(o.s)) {
      if (strict && r->sz != sz)
        bad(fmt("operand %s has %d bytes, %d needed", o.s.c_str(), r->sz, sz));
      if (!r->sz) bad("unexpected predicate operand");
      return *r;
    }
    auto sp = SPECN.find(o.s);
    if (sp != SPECN.end()) {
      Opn q;
      q.k = 1;
      q.sz = 4;
      q.off = K.specOff + sp->second * 128;
      if (strict && sz != 4) bad("special register size");
      return q;
    }
    if (o.s == "WARP_SZ") return cst(sz, 32);
    Sym y;
    if (findSym(o.s, y)) {
      u64 a = y.addr + o.i;
      if (y.parm) a += y.sp == SP_LOCAL ? LOC_BASE : PARAM_BASE;
      return cst(sz, a);
    }
    bad("unknown register or symbol '" + o.s + "'");
  }
  if (o.k == POp::INT) {
    if (t == F32) return cst(4, f2b((float)o.i));
    if (t == F64) return cst(8, d2b((double)o.i));
    return cst(sz, (u64)o.i);
  }
  if (o.k == POp::FLT) {
    if (sz == 4) return cst(4, o.fsz == 4 ? o.fbits ^ (o.neg2 ? 0x80000000u : 0) : f2b((float)o.f));
    if (sz == 8) return cst(8, o.fsz == 8 ? o.fbits ^ (o.neg2 ? 1ull << 63 : 0) : d2b(o.f));
    bad("float immediate of this size");
  }
  if (o.k == POp::SINK) return scratch(sz);
  bad("bad operand");
}
inline Opn Lower::D(const POp& o, int sz, bool strict) {
  if (o.k == POp::SINK) return scratch(sz);
  if (o.k != POp::ID) bad("destination register expected");
  const Opn* r = findReg(o.s);
  if (!r) bad("unknown destination register " + o.s);
  if (strict && r->sz != sz)
    bad(fmt("destination %s has %d bytes, %d needed", o.s.c_str(), r->sz, sz));
  return *r;
}
inline Opn Lower::DP(const POp& o) {
  if (o.k == POp::SINK) return scratch(0);
  return D(o, 0);
}
inline Opn Lower::DP2(const string& n) {
  if (n == "_") return scratch(0);
  const Opn* r = findReg(n);
  if (!r || r->sz) bad("predicate destination expected");
  return *r;
}
inline vector<Opn> Lower::V(const POp& o, int sz, bool dst, bool strict) {
  vector<Opn> v;
  if (o.k == POp::VEC) {
    for (auto& x : o.sub) v.push_back(dst ? D(x, sz, strict) : R(x, sz, T_NONE, strict));
  } else
    v.push_back(dst ? D(o, sz, strict) : R(o, sz, T_NONE, strict));
  return v;
}
inline void Lower::A(const POp& o, Opn& base, s64& off, Space* psp, bool* parm) {
  if (o.k != POp::ADDR) bad("address expected");
  base = Opn();
  off = o.i;
  if (o.s.empty()) return;
  if (const Opn* r = findReg(o.s)) {
    if (r->sz != 4 && r->sz != 8) bad("address register size");
    base = *r;
    return;
  }
  Sym y;
  if (!findSym(o.s, y)) bad("unknown symbol " + o.s);
  off += y.addr;
  if (psp) *psp = y.sp;
  if (parm) *parm = y.parm;
}
inline void Lower::push() {
  I.line = S->line;
  I.sf = S->sf;
  I.sl = S->sl;
  I.text = S->text;
  I.opname = opn();
  if (!S->pred.empty()) {
    const Opn* r = findReg(S->pred);
    if (!r || r->sz) bad("unknown predicate " + S->pred);
    I.pred = r->off;
    I.pneg = S->pneg;
  }
  K.code.push_back(I);
}
inline void Lower::emit(ExecFn f, Cls c) {
  if (!f) unsup();
  I.fn = f;
  I.cls = c;
  push();
}
inline vector<Ty> Lower::types() {
  vector<Ty> t;
  for (auto& m : S->mods) {
    auto it = TYN.find(m);
    if (it != TYN.end()) t.push_back(it->second);
  }
  return t;
}
inline int Lower::rnd() {
  if (has("rn")) return R_N;
  if (has("rz")) return R_Z;
  if (has("rm")) return R_M;
  if (has("rp")) return R_P;
  if (has("rna")) return R_NA;
  if (has("rni")) return R_NI;
  if (has("rzi")) return R_ZI;
  if (has("rmi")) return R_MI;
  if (has("rpi")) return R_PI;
  return R_NONE;
}
