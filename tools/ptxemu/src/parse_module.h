// The parser's declarations, functions and modules.
#pragma once
#include <algorithm>
#include "parse_operands.h"

inline VarDecl Parser::var1(const string& space, bool param) {
  VarDecl v;
  v.space = space;
  bool ty = false;
  while (pk() == '.') {
    p++;
    string w = ident();
    if (w == "align") {
      v.align = number().i;
    } else if (w == "ptr") {
    } else if (w == "global" || w == "const" || w == "shared" || w == "local") {
    } else if (w == "v2" || w == "v4")
      v.count *= w[1] - '0';
    else if (w == "attribute") {
      exp('(');
      while (!acc(')')) p++;
    } else {
      auto it = TYN.find(w);
      if (it == TYN.end()) err("unknown type ." + w);
      if (!ty) v.ty = it->second;
      ty = true;
    }
  }
  v.name = ident();
  if (acc('<')) {
    v.range = number().i;
    exp('>');
  }
  finish(v);
  (void)param;
  return v;
}
inline void Parser::finish(VarDecl& v) {
  while (acc('[')) {
    v.isArr = true;
    if (acc(']')) {
      v.unsized = true;
      continue;
    }
    v.count *= number().i;
    exp(']');
  }
  if (!v.align) v.align = std::max(1, tsz(v.ty));
  if (acc('=')) initv(v);
}
inline void Parser::initOne(VarDecl& v, u64& off) {
  int es = tsz(v.ty);
  if (pk() == '{') {
    p++;
    if (!acc('}')) {
      do initOne(v, off);
      while (acc(','));
      exp('}');
    }
    return;
  }
  if (v.init.size() < off + es) v.init.resize(off + es, 0);
  char c = pk();
  if (isdigit((u8)c) || c == '-') {
    POp n = number();
    u64 b = 0;
    if (n.k == POp::FLT) {
      if (v.ty == F32)
        b = n.fsz == 4 ? n.fbits : f2b((float)n.f);
      else if (v.ty == F64)
        b = n.fsz == 8 ? n.fbits : d2b(n.f);
      else
        b = n.fbits;
    } else if (v.ty == F32)
      b = f2b((float)n.i);
    else if (v.ty == F64)
      b = d2b((double)n.i);
    else
      b = (u64)n.i;
    memcpy(v.init.data() + off, &b, std::min(es, 8));
  } else {
    string s = ident();
    bool g = false;
    if (s == "generic") {
      exp('(');
      s = ident();
      exp(')');
      g = true;
    }
    (void)g;
    s64 add = 0;
    if (pk() == '+' || pk() == '-') add = number().i;
    v.rel.push_back({off, s, add, es});
  }
  off += es;
}
inline void Parser::initv(VarDecl& v) {
  u64 off = 0;
  initOne(v, off);
  if (v.unsized) {
    v.count = off / tsz(v.ty);
    v.unsized = false;
  }
}
inline vector<VarDecl> Parser::declList(const string& space) {
  vector<VarDecl> r;
  VarDecl v = var1(space, false);
  r.push_back(v);
  while (acc(',')) {
    VarDecl w = v;
    w.name = ident();
    w.init.clear();
    w.range = -1;
    w.count = 1;
    if (acc('<')) {
      w.range = number().i;
      exp('>');
    }
    finish(w);
    r.push_back(w);
  }
  exp(';');
  return r;
}
inline void Parser::loc() {
  string s = restLine();
  int f = 0, l = 0;
  sscanf(s.c_str(), "%d %d", &f, &l);
  sf = f;
  sl = l;
}
inline vector<VarDecl> Parser::params() {
  vector<VarDecl> v;
  exp('(');
  if (acc(')')) return v;
  do {
    ws();
    if (t[p] != '.') err("param expected");
    p++;
    string sp = ident();
    v.push_back(var1(sp, true));
  } while (acc(','));
  exp(')');
  return v;
}
inline void Parser::module() {
  bool ext = false;
  for (;;) {
    char c = pk();
    if (!c) return;
    if (c == ';') {
      p++;
      continue;
    }
    if (c != '.') err("directive expected");
    p++;
    string d = ident();
    if (d == "version" || d == "target" || d == "address_size")
      restLine();
    else if (d == "loc")
      loc();
    else if (d == "file") {
      string s = restLine();
      int n = 0;
      sscanf(s.c_str(), "%d", &n);
      size_t q = s.rfind('"'), r = q == string::npos || q == 0 ? q : s.rfind('"', q - 1);
      if (q != string::npos && r != string::npos) M.files[n] = s.substr(r + 1, q - r - 1);
    } else if (d == "section") {
      dotword();
      if (pk() == '{') skipBraces();
    } else if (d == "extern")
      ext = true;
    else if (d == "visible" || d == "weak" || d == "common") {
    } else if (d == "pragma") {
      while (t[p] != ';') p++;
      p++;
    } else if (d == "alias")
      err(".alias is not supported");
    else if (d == "entry" || d == "func") {
      func(d == "entry");
      ext = false;
    } else if (d == "global" || d == "const" || d == "shared") {
      for (auto& v : declList(d)) {
        v.ext = ext;
        auto it = M.varIdx.find(v.name);
        if (it == M.varIdx.end()) {
          M.varIdx[v.name] = M.vars.size();
          M.vars.push_back(v);
        } else if (!ext)
          M.vars[it->second] = v;
      }
      ext = false;
    } else
      err("unsupported directive ." + d);
  }
}
inline void Parser::func(bool entry) {
  Func f;
  f.entry = entry;
  if (!entry && pk() == '(') f.rets = params();
  while (pk() == '.') {
    p++;
    ident();
  }
  f.name = ident();
  if (pk() == '(') f.params = params();
  for (;;) {
    char c = pk();
    if (c == ';') {
      p++;
      if (!M.funcs.count(f.name)) M.funcs[f.name] = f;
      return;
    }
    if (c == '{') break;
    if (c != '.') err("function attribute expected");
    p++;
    string a = ident();
    if (a == "reqntid" || a == "maxntid") {
      int* q = a == "reqntid" ? f.reqntid : f.maxntid;
      q[0] = q[1] = q[2] = 1;
      int n = 0;
      do q[n++] = number().i;
      while (acc(',') && n < 3);
    } else if (a == "reqnctapercluster") {
      f.cluster = 1;
      do f.cluster *= (int)number().i;
      while (acc(','));
    } else if (a == "minnctapersm" || a == "maxnctapersm" || a == "maxnreg" ||
               a == "maxclusterrank" || a == "explicitcluster") {
      while (isdigit((u8)pk())) {
        number();
        acc(',');
      }
    } else if (a == "noreturn" || a == "abi_preserve") {
    } else if (a == "pragma") {
      while (t[p] != ';') p++;
      p++;
    } else if (a == "blocksareclusters") {
    } else
      err("unknown function attribute ." + a);
  }
  body(f);
  f.hasBody = true;
  M.funcs[f.name] = f;
  if (entry) M.order.push_back(f.name);
}
inline void Parser::body(Func& f) {
  exp('{');
  int depth = 1;
  sf = sl = 0;
  for (;;) {
    char c = pk();
    if (!c) err("unterminated body");
    if (c == ';') {
      p++;
      continue;
    }
    Stmt s;
    s.line = line;
    s.sf = sf;
    s.sl = sl;
    if (c == '{') {
      p++;
      depth++;
      s.k = Stmt::OPEN;
      f.body.push_back(s);
      continue;
    }
    if (c == '}') {
      p++;
      depth--;
      if (!depth) return;
      s.k = Stmt::CLOSE;
      f.body.push_back(s);
      continue;
    }
    if (c == '.') {
      p++;
      string d = ident();
      if (d == "loc") {
        loc();
        continue;
      }
      if (d == "file") {
        restLine();
        continue;
      }
      if (d == "pragma") {
        while (t[p] != ';') p++;
        p++;
        continue;
      }
      if (d == "section") {
        dotword();
        if (pk() == '{') skipBraces();
        continue;
      }
      if (d == "reg" || d == "local" || d == "shared" || d == "param" || d == "global" ||
          d == "const") {
        s.k = Stmt::DECL;
        s.decls = declList(d);
        f.body.push_back(s);
        continue;
      }
      if (d == "branchtargets") {
        s.k = Stmt::TARGETS;
        do s.targets.push_back(ident());
        while (acc(','));
        exp(';');
        f.body.push_back(s);
        continue;
      }
      err("unsupported directive ." + d + " in a body");
    }
    size_t b0 = p;
    if (c != '@') {  // label?
      size_t q = p;
      while (q < t.size() && idc(t[q])) q++;
      size_t r = q;
      while (r < t.size() && (t[r] == ' ' || t[r] == '\t')) r++;
      if (q > p && r < t.size() && t[r] == ':' && t[r + 1] != ':') {
        s.k = Stmt::LABEL;
        s.label = t.substr(p, q - p);
        p = r + 1;
        f.body.push_back(s);
        continue;
      }
    }
    s.k = Stmt::INSTR;
    if (acc('@')) {
      if (acc('!')) s.pneg = true;
      s.pred = ident();
    }
    string w = dotword();
    size_t d = w.find('.');
    s.op = w.substr(0, d);
    while (d != string::npos) {
      size_t e = w.find('.', d + 1);
      s.mods.push_back(w.substr(d + 1, e == string::npos ? e : e - d - 1));
      d = e;
    }
    if (pk() != ';') {
      do s.ops.push_back(operand());
      while (acc(','));
    }
    s.text = t.substr(b0, p - b0);
    exp(';');
    for (auto& ch : s.text)
      if (ch == '\n' || ch == '\t') ch = ' ';
    f.body.push_back(s);
  }
}
