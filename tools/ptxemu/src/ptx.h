// PTX as it is written: statements, operands, declarations, and the parser's words.
#pragma once
#include <memory>
#include "types.h"

struct POp {
  enum K { NONE, ID, INT, FLT, ADDR, VEC, LIST, SINK } k = NONE;
  string s, s2;
  s64 i = 0;
  u64 fbits = 0;
  int fsz = 0;
  double f = 0;
  bool neg = false, neg2 = false;
  vector<POp> sub;
};
struct VarDecl {
  string space;
  int align = 0;
  Ty ty = B8;
  string name;
  u64 count = 1;
  bool isArr = false, unsized = false, ext = false;
  vector<u8> init;
  struct Rel {
    u64 off;
    string sym;
    s64 add;
    int sz;
  };
  vector<Rel> rel;
  int range = -1;
};
struct Stmt {
  enum K { INSTR, LABEL, OPEN, CLOSE, DECL, TARGETS } k;
  int line = 0, sf = 0, sl = 0;
  string text, op;
  vector<string> mods;
  vector<POp> ops;
  string pred;
  bool pneg = false;
  string label;
  vector<string> targets;
  vector<VarDecl> decls;
};
struct Func {
  string name;
  bool entry = false;
  vector<VarDecl> params, rets;
  vector<Stmt> body;
  bool hasBody = false;
  int reqntid[3] = {0, 0, 0}, maxntid[3] = {0, 0, 0}, cluster = 0;
};
struct Kernel;
struct Module {
  string text;
  std::map<string, Func> funcs;
  vector<VarDecl> vars;
  std::map<string, int> varIdx;
  std::map<int, string> files;
  vector<string> order;
  std::map<string, std::unique_ptr<Kernel>> kernels;
};

struct Parser {
  const string& t;
  size_t p = 0;
  int line = 1;
  Module& M;
  int sf = 0, sl = 0;
  Parser(const string& s, Module& m) : t(s), M(m) {}
  [[noreturn]] void err(const string& m);
  void ws();
  char pk();
  bool acc(char c);
  void exp(char c);
  static bool idc(char c);
  string ident();
  string dotword();
  string restLine();
  POp number();
  POp operand();
  void skipBraces();
  VarDecl var1(const string& space, bool param);
  void finish(VarDecl& v);
  void initOne(VarDecl& v, u64& off);
  void initv(VarDecl& v);
  vector<VarDecl> declList(const string& space);
  void loc();
  vector<VarDecl> params();
  void module();
  void func(bool entry);
  void body(Func& f);
};
