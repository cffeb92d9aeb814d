// The parser's words, numbers and operands.
#pragma once
#include <cctype>
#include <cstdlib>
#include "ptx.h"

inline void Parser::err(const string& m) {
  FAIL("PTX parse error at line %d: %s (near '%s')", line, m.c_str(), t.substr(p, 40).c_str());
}
inline void Parser::ws() {
  for (;;) {
    if (p >= t.size()) return;
    char c = t[p];
    if (c == '\n') {
      line++;
      p++;
    } else if (isspace((u8)c))
      p++;
    else if (c == '/' && p + 1 < t.size() && t[p + 1] == '/') {
      while (p < t.size() && t[p] != '\n') p++;
    } else if (c == '/' && p + 1 < t.size() && t[p + 1] == '*') {
      p += 2;
      while (p + 1 < t.size() && !(t[p] == '*' && t[p + 1] == '/')) {
        if (t[p] == '\n') line++;
        p++;
      }
      p += 2;
    } else
      return;
  }
}
inline char Parser::pk() {
  ws();
  return p < t.size() ? t[p] : 0;
}
inline bool Parser::acc(char c) {
  if (pk() == c) {
    p++;
    return true;
  }
  return false;
}
inline void Parser::exp(char c) {
  if (!acc(c)) err(fmt("expected '%c'", c));
}
inline bool Parser::idc(char c) { return isalnum((u8)c) || c == '_' || c == '$' || c == '%'; }
inline string Parser::ident() {
  ws();
  size_t b = p;
  while (p < t.size() && idc(t[p])) p++;
  if (b == p) err("identifier expected");
  return t.substr(b, p - b);
}
inline string Parser::dotword() {
  ws();
  size_t b = p;
  while (p < t.size() && (idc(t[p]) || t[p] == '.' || (t[p] == ':' && t[p + 1] == ':') ||
                          (t[p] == ':' && t[p - 1] == ':')))
    p++;
  if (b == p) err("word expected");
  return t.substr(b, p - b);
}
inline string Parser::restLine() {
  size_t b = p;
  while (p < t.size() && t[p] != '\n') p++;
  return t.substr(b, p - b);
}
inline POp Parser::number() {
  ws();
  POp o;
  bool neg = false;
  if (t[p] == '-') {
    neg = true;
    p++;
    ws();
  } else if (t[p] == '+')
    p++;
  size_t b = p;
  if (t[p] == '0' && (t[p + 1] == 'f' || t[p + 1] == 'F') && isxdigit((u8)t[p + 2])) {
    o.k = POp::FLT;
    o.fsz = 4;
    o.fbits = strtoul(t.substr(p + 2, 8).c_str(), 0, 16);
    p += 10;
    o.f = b2f((u32)o.fbits);
    if (neg) {
      o.f = -o.f;
      o.neg2 = true;
    }
    return o;
  }
  if (t[p] == '0' && (t[p + 1] == 'd' || t[p + 1] == 'D') && isxdigit((u8)t[p + 2])) {
    o.k = POp::FLT;
    o.fsz = 8;
    o.fbits = strtoull(t.substr(p + 2, 16).c_str(), 0, 16);
    p += 18;
    o.f = b2d(o.fbits);
    if (neg) {
      o.f = -o.f;
      o.neg2 = true;
    }
    return o;
  }
  bool hex = t[p] == '0' && (t[p + 1] == 'x' || t[p + 1] == 'X');
  bool bin = t[p] == '0' && (t[p + 1] == 'b' || t[p + 1] == 'B');
  if (hex || bin) p += 2;
  while (p < t.size() && (hex ? isxdigit((u8)t[p]) : isdigit((u8)t[p]))) p++;
  bool fl = false;
  if (!hex && !bin && (t[p] == '.' || t[p] == 'e' || t[p] == 'E')) {
    fl = true;
    if (t[p] == '.') {
      p++;
      while (isdigit((u8)t[p])) p++;
    }
    if (t[p] == 'e' || t[p] == 'E') {
      p++;
      if (t[p] == '-' || t[p] == '+') p++;
      while (isdigit((u8)t[p])) p++;
    }
  }
  string s = t.substr(b, p - b);
  if (s.empty()) err("number expected");
  if (fl) {
    o.k = POp::FLT;
    o.f = strtod(s.c_str(), 0);
    if (neg) o.f = -o.f;
    return o;
  }
  if (t[p] == 'U') p++;
  u64 v = bin                             ? strtoull(s.c_str() + 2, 0, 2)
          : hex                           ? strtoull(s.c_str() + 2, 0, 16)
          : (s.size() > 1 && s[0] == '0') ? strtoull(s.c_str(), 0, 8)
                                          : strtoull(s.c_str(), 0, 10);
  o.k = POp::INT;
  o.i = neg ? -(s64)v : (s64)v;
  return o;
}
inline POp Parser::operand() {
  char c = pk();
  POp o;
  if (c == '[') {
    p++;
    o.k = POp::ADDR;
    char d = pk();
    if (isdigit((u8)d) || d == '-') {
      POp n = number();
      o.i = n.i;
    } else {
      o.s = ident();
      for (;;) {
        char e = pk();
        if (e == '+') {
          p++;
          POp n = number();
          o.i += n.i;
        } else if (e == '-') {
          POp n = number();
          o.i += n.i;
        } else
          break;
      }
    }
    while (acc(',')) o.sub.push_back(operand());  // [tensorMap, {coordinates}]
    exp(']');
    return o;
  }
  if (c == '{') {
    p++;
    o.k = POp::VEC;
    if (!acc('}')) {
      do o.sub.push_back(operand());
      while (acc(','));
      exp('}');
    }
    return o;
  }
  if (c == '(') {
    p++;
    o.k = POp::LIST;
    if (!acc(')')) {
      do o.sub.push_back(operand());
      while (acc(','));
      exp(')');
    }
    return o;
  }
  if (c == '!') {
    p++;
    o = operand();
    o.neg = true;
    return o;
  }
  if (isdigit((u8)c) || c == '-') return number();
  string s = ident();
  if (s == "_") {
    o.k = POp::SINK;
    if (acc('|')) {
      o.s2 = ident();
    }
    return o;
  }
  o.k = POp::ID;
  o.s = s;
  if (t[p] == '.' && s[0] == '%') {
    p++;
    o.s += "." + ident();
  }
  if (s == "generic" && pk() == '(') {
    p++;
    o.s = ident();
    exp(')');
  }
  if (pk() == '|') {
    p++;
    o.s2 = ident();
  } else if (pk() == '+') {
    p++;
    POp n = number();
    o.i = n.i;
  }
  return o;
}
inline void Parser::skipBraces() {
  exp('{');
  int d = 1;
  while (d) {
    char c = pk();
    if (!c) err("unterminated block");
    p++;
    if (c == '{')
      d++;
    else if (c == '}')
      d--;
    else if (c == '"') {
      while (t[p] != '"') p++;
      p++;
    }
  }
}
