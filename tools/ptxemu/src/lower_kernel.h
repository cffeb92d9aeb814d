// Lowering a kernel: declarations, shared memory, its statements, inlined calls, loads and stores.
#pragma once
#include "lower.h"

inline void Lower::declare(const VarDecl& d, const string& fname) {
  Scope& s = sc[cur];
  if (d.space == "reg") {
    int sz = d.ty == PRED ? 0 : tsz(d.ty);
    if (sz == 1) sz = 2;
    if (sz > 8) bad(".b128 registers are not supported");
    if (d.count != 1) bad("vector registers");
    if (d.range >= 0)
      for (int i = 0; i < d.range; i++) s.regs[d.name + std::to_string(i)] = allocReg(sz);
    else
      s.regs[d.name] = allocReg(sz);
  } else if (d.space == "local" || d.space == "param") {
    K.localBytes = roundup(K.localBytes, std::max(d.align, 8));
    s.syms[d.name] = {SP_LOCAL, K.localBytes, d.space == "param"};
    K.localBytes += std::max<u64>(8, roundup(d.count * tsz(d.ty), 8));
  } else if (d.space == "shared") {
    s.syms[d.name] = shsym[fname + "::" + d.name];
  } else
    bad("declaration of ." + d.space + " inside a function");
}
inline void Lower::addShared(const VarDecl& d, const string& key) {
  if (d.unsized || d.ext) return;
  u32& off = K.dynOff;
  off = roundup(off, d.align);
  shsym[key] = {SP_SHARED, off, false};
  off += d.count * tsz(d.ty);
}
inline void Lower::layoutShared() {
  std::set<string> used;
  std::set<string> fs;
  vector<string> todo{K.f->name};
  while (!todo.empty()) {
    string n = todo.back();
    todo.pop_back();
    if (!fs.insert(n).second) continue;
    auto it = M.funcs.find(n);
    if (it == M.funcs.end()) continue;
    std::function<void(const POp&)> walk = [&](const POp& o) {
      if (!o.s.empty()) {
        used.insert(o.s);
        if (M.funcs.count(o.s) && !M.funcs[o.s].entry) todo.push_back(o.s);
      }
      for (auto& x : o.sub) walk(x);
    };
    for (auto& s : it->second.body)
      if (s.k == Stmt::INSTR)
        for (auto& o : s.ops) walk(o);
  }
  K.dynOff = SH0;
  for (auto& v : M.vars)
    if (v.space == "shared" && used.count(v.name)) {
      if (!v.init.empty()) FAIL("initialised .shared variable %s", v.name.c_str());
      addShared(v, v.name);
    }
  for (auto& n : fs) {
    auto it = M.funcs.find(n);
    if (it == M.funcs.end()) continue;
    for (auto& s : it->second.body)
      if (s.k == Stmt::DECL)
        for (auto& d : s.decls)
          if (d.space == "shared") addShared(d, n + "::" + d.name);
  }
  K.staticSh = K.dynOff - SH0;
  u32 al = 16;
  for (auto& v : M.vars)
    if (v.space == "shared" && (v.unsized || v.ext) && used.count(v.name))
      al = std::max<u32>(al, v.align);
  K.dynOff = roundup(K.dynOff, al);
  for (auto& v : M.vars)
    if (v.space == "shared" && (v.unsized || v.ext)) shsym[v.name] = {SP_SHARED, K.dynOff, false};
}
inline void Lower::run() {
  K.specOff = 0;
  K.regBytes = SR_N * 128;
  K.params = K.f->params;
  layoutShared();
  sc.push_back(Scope{-1, {}, {}, {}, {}});
  cur = 0;
  u32 off = 0;
  for (auto& p : K.f->params) {
    int al = std::max<int>(p.isArr ? p.align : tsz(p.ty), 1);
    off = roundup(off, al);
    K.poff.push_back(off);
    sc[0].syms[p.name] = {SP_PARAM, off, true};
    off += p.count * tsz(p.ty);
  }
  K.pbytes = off;
  fnames.push_back(K.f->name);
  rets.push_back({});
  stmts(*K.f);
  S = nullptr;
  I = Instr();
  I.ctl = C_EXIT;
  I.text = "(end of kernel)";
  I.opname = "exit";
  I.cls = K_BRANCH;
  K.code.push_back(I);
  for (auto& f : fix) {
    int s = f.scope;
    bool ok = false;
    while (s >= 0) {
      auto it = sc[s].labels.find(f.label);
      if (it != sc[s].labels.end()) {
        if (f.slot < 0)
          K.code[f.ins].target = it->second;
        else
          K.code[f.ins].targets[f.slot] = it->second;
        ok = true;
        break;
      }
      s = sc[s].parent;
    }
    if (!ok)
      FAIL("kernel %s, PTX line %d: unknown label %s", K.name.c_str(), f.line, f.label.c_str());
  }
  K.localBytes = roundup(K.localBytes, 16);
}
inline void Lower::stmts(const Func& f) {
  // .branchtargets labels are needed before use
  int base = cur;
  {
    string last;
    for (auto& s : f.body) {
      if (s.k == Stmt::LABEL)
        last = s.label;
      else if (s.k == Stmt::TARGETS)
        sc[base].tg[last] = s.targets;
    }
  }
  for (auto& s : f.body) {
    S = &s;
    switch (s.k) {
      case Stmt::OPEN:
        sc.push_back(Scope{cur, {}, {}, {}, {}});
        cur = sc.size() - 1;
        break;
      case Stmt::CLOSE:
        cur = sc[cur].parent;
        break;
      case Stmt::DECL:
        for (auto& d : s.decls) declare(d, f.name);
        break;
      case Stmt::LABEL:
        sc[cur].labels[s.label] = K.code.size();
        break;
      case Stmt::TARGETS:
        break;
      case Stmt::INSTR:
        I = Instr();
        instr();
        break;
    }
  }
}
inline void Lower::call() {
  size_t k = 0;
  vector<string> rv, av;
  auto& o = S->ops;
  auto names = [&](const POp& l) {
    vector<string> r;
    for (auto& x : l.sub) {
      if (x.k != POp::ID) bad("call argument");
      r.push_back(x.s);
    }
    return r;
  };
  if (k < o.size() && o[k].k == POp::LIST) rv = names(o[k++]);
  if (k >= o.size() || o[k].k != POp::ID) bad("call target");
  string fn = o[k++].s;
  if (k < o.size() && o[k].k == POp::LIST) av = names(o[k++]);
  if (fn == "vprintf" || fn == "__assertfail") {
    for (auto& a : av) {
      Sym y;
      if (!findSym(a, y)) bad("call argument");
      Opn q;
      q.off = y.addr;
      I.va.push_back(q);
    }
    if (fn == "vprintf") {
      emit(ex_vprintf, K_OTHER);
    } else
      emit(ex_assertfail, K_OTHER);
    return;
  }
  auto it = M.funcs.find(fn);
  if (it == M.funcs.end() || !it->second.hasBody)
    bad("call of unknown or external function '" + fn + "'");
  for (auto& n : fnames)
    if (n == fn) bad("recursive call of '" + fn + "' is not supported");
  Func& f = it->second;
  if (f.params.size() != av.size() || f.rets.size() != rv.size()) bad("call argument count");
  vector<u32> skip;
  if (!S->pred.empty()) {
    Instr J;
    J.ctl = C_BRA;
    J.cls = K_BRANCH;
    J.line = S->line;
    J.text = S->text;
    J.opname = "call";
    const Opn* r = findReg(S->pred);
    if (!r) bad("predicate");
    J.pred = r->off;
    J.pneg = !S->pneg;
    skip.push_back(K.code.size());
    K.code.push_back(J);
  }
  Scope ns{-1, {}, {}, {}, {}};
  for (size_t i = 0; i < av.size(); i++) {
    Sym y;
    if (!findSym(av[i], y) || y.sp != SP_LOCAL) bad("call argument " + av[i]);
    ns.syms[f.params[i].name] = y;
  }
  for (size_t i = 0; i < rv.size(); i++) {
    Sym y;
    if (!findSym(rv[i], y) || y.sp != SP_LOCAL) bad("call result " + rv[i]);
    ns.syms[f.rets[i].name] = y;
  }
  int save = cur;
  const Stmt* ss = S;
  sc.push_back(ns);
  cur = sc.size() - 1;
  fnames.push_back(fn);
  rets.push_back({});
  stmts(f);
  for (u32 i : rets.back()) K.code[i].target = K.code.size();
  for (u32 i : skip) K.code[i].target = K.code.size();
  rets.pop_back();
  fnames.pop_back();
  cur = save;
  S = ss;
  I = Instr();
  I.fn = ex_nop;
  I.cls = K_BRANCH;
  I.line = S->line;
  I.text = S->text;
  I.opname = "call-end";
  K.code.push_back(I);  // keeps a distinct pc after the inlined body
}
inline Space Lower::space() {
  if (has("global")) return SP_GLOBAL;
  if (has("shared") || has("shared::cta")) return SP_SHARED;
  if (has("shared::cluster")) return SP_SHARED;
  if (has("local")) return SP_LOCAL;
  if (has("param") || has("param::entry") || has("param::func")) return SP_PARAM;
  if (has("const")) return SP_CONST;
  return SP_GEN;
}
inline int Lower::vecw() {
  if (has("v2")) return 2;
  if (has("v4")) return 4;
  if (has("v8")) return 8;
  return 1;
}
inline void Lower::ldst(bool st) {
  if (has("async")) unsup();
  auto t = types();
  if (t.size() != 1) unsup();
  I.ty = t[0];
  if (I.ty == B128 || tsz(I.ty) == 0 || I.ty == PRED) unsup();
  I.vec = vecw();
  I.sp = space();
  auto& o = S->ops;
  if (o.size() < 2) bad("operands");
  const POp& da = st ? o[1] : o[0];
  const POp& ad = st ? o[0] : o[1];
  I.v = V(da, tsz(I.ty), !st, false);
  if ((int)I.v.size() != I.vec) bad("vector width");
  for (auto& v : I.v) {
    if (v.k == 2 && v.sz < tsz(I.ty)) bad("immediate");
    if (v.sz < tsz(I.ty) || v.sz == 0) bad("register narrower than the access");
  }
  Space ssp = SP_GEN;
  bool parm = false;
  A(ad, I.ab, I.aoff, &ssp, &parm);
  if (I.sp == SP_PARAM) {
    if (!I.ab.k && ssp == SP_PARAM) {
      if (st) bad("store to kernel parameter");
      if (I.aoff + (s64)tsz(I.ty) * I.vec > K.pbytes) bad("parameter offset");
      emit(ex_ldparam, K_PARAM);
      return;
    }
    if (!I.ab.k && ssp == SP_LOCAL) {
      I.sp = SP_LOCAL;
      emit(st ? ex_st : ex_ld, K_PARAM);
      return;
    }
    I.sp = SP_GEN;
    emit(st ? ex_st : ex_ld, K_PARAM);
    return;
  }
  if (!I.ab.k && ssp != SP_GEN && ssp != I.sp && !(I.sp == SP_GEN && ssp == SP_GLOBAL)) {
    if (I.sp == SP_GEN) {
      if (ssp == SP_SHARED || ssp == SP_LOCAL || ssp == SP_CONST) I.sp = ssp;
    } else
      bad("address space of symbol");
  }
  Cls c = I.sp == SP_SHARED  ? (st ? K_STS : K_LDS)
          : I.sp == SP_LOCAL ? (st ? K_STLOC : K_LDLOC)
          : I.sp == SP_CONST ? K_PARAM
                             : (st ? K_STG : K_LDG);
  emit(st ? ex_st : ex_ld, c);
}
inline void Lower::arith3(ExecFn f, Cls c, Ty t, int n) {
  int z = tsz(t);
  auto& o = S->ops;
  if ((int)o.size() != n + 1) bad("operand count");
  I.ty = t;
  I.d = D(o[0], z);
  I.a = R(o[1], z, t);
  if (n > 1) I.b = R(o[2], z, t);
  if (n > 2) I.c = R(o[3], z, t);
  emit(f, c);
}
inline Cls Lower::fcls(Ty t) { return t == F32 ? K_FP32 : t == F64 ? K_FP64 : K_FP16; }
