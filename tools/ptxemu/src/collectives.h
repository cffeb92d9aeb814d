// What a warp's lanes do together, assert and printf.
#pragma once
#include "access.h"

static void ex_shfl(Warp& w, const Instr& I, u32 m) {
  const u32 *a = P<u32>(w, I.a), *b = P<u32>(w, I.b), *c = P<u32>(w, I.c);
  u32 t[32], pr = 0;
  u32* d = P<u32>(w, I.d);
  for (u32 q = m; q; q &= q - 1) {
    int lane = __builtin_ctz(q);
    u32 bv = b[lane] & 31, cv = c[lane] & 31, sg = (c[lane] >> 8) & 31;
    int mx = (lane & sg) | (cv & ~sg), mn = lane & sg;
    int j;
    bool p;
    switch (I.op) {
      case 0:
        j = lane - (int)bv;
        p = j >= mx;
        break;
      case 1:
        j = lane + bv;
        p = j <= mx;
        break;
      case 2:
        j = lane ^ bv;
        p = j <= mx;
        break;
      default:
        j = mn | (bv & ~sg);
        p = j <= mx;
    }
    if (!p) j = lane;
    if (!(m >> j & 1)) {
      report(w, "shfl_inactive", fmt("%d", I.line), [&] {
        return fmt("shfl.sync reads lane %d, which does not take part; %s", j,
                   where(w, I, lane).c_str());
      });
      t[lane] = 0x7fc0dead;
    } else
      t[lane] = a[j];
    pr |= (u32)p << lane;
  }
  LANES(m, d[i] = t[i]);
  if (I.d2.k) {
    u32* e = P<u32>(w, I.d2);
    *e = (*e & ~m) | (pr & m);
  }
}
static u32 mmask(Warp& w, const Opn& o, int l) { return o.k ? P<u32>(w, o)[l] : ~0u; }
static void ex_vote(Warp& w, const Instr& I, u32 m) {
  u32 p = *P<u32>(w, I.a);
  if (I.a.neg) p = ~p;
  u32 r = 0, t[32];
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 mm = mmask(w, I.e, i) & m, v = p & mm;
    bool b;
    switch (I.op) {
      case 0:
        t[i] = v;
        b = 0;
        break;
      case 1:
        b = v == mm;
        break;
      case 2:
        b = v != 0;
        break;
      default:
        b = v == 0 || v == mm;
    }
    r |= (u32)b << i;
  }
  if (I.op == 0) {
    u32* d = P<u32>(w, I.d);
    LANES(m, d[i] = t[i]);
  } else {
    u32* d = P<u32>(w, I.d);
    *d = (*d & ~m) | (r & m);
  }
}
static void ex_redux(Warp& w, const Instr& I, u32 m) {
  const u32* a = P<u32>(w, I.a);
  u32 t[32];
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 mm = mmask(w, I.e, i) & m;
    u32 r = 0;
    bool f = true;
    for (u32 z = mm; z; z &= z - 1) {
      u32 v = a[__builtin_ctz(z)];
      if (f) {
        r = v;
        f = false;
        continue;
      }
      switch (I.op) {
        case A_ADD:
          r += v;
          break;
        case A_MIN:
          r = I.ty == S32 ? (u32)std::min((s32)r, (s32)v) : std::min(r, v);
          break;
        case A_MAX:
          r = I.ty == S32 ? (u32)std::max((s32)r, (s32)v) : std::max(r, v);
          break;
        case A_AND:
          r &= v;
          break;
        case A_OR:
          r |= v;
          break;
        case A_XOR:
          r ^= v;
          break;
      }
    }
    t[i] = r;
  }
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = t[i]);
}
static void ex_match(Warp& w, const Instr& I, u32 m) {
  u32 t[32], pr = 0;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u32 mm = mmask(w, I.e, i) & m, r = 0;
    u64 v = rdreg(w, I.a, i);
    for (u32 z = mm; z; z &= z - 1) {
      int j = __builtin_ctz(z);
      if (rdreg(w, I.a, j) == v) r |= 1u << j;
    }
    if (I.op) {
      bool all = r == mm;
      t[i] = all ? mm : 0;
      pr |= (u32)all << i;
    } else
      t[i] = r;
  }
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = t[i]);
  if (I.d2.k) {
    u32* e = P<u32>(w, I.d2);
    *e = (*e & ~m) | (pr & m);
  }
}
static void ex_elect(Warp& w, const Instr& I, u32 m) {
  int l = __builtin_ctz(m);
  u32* d = P<u32>(w, I.d);
  LANES(m, d[i] = l);
  u32* e = P<u32>(w, I.d2);
  *e = (*e & ~m) | (1u << l);
}
static void ex_warpsync(Warp& w, const Instr&, u32 m) {
  if ((m & w.alive) == w.alive) w.blk->vc[w.id * w.blk->vs + w.id]++;
}
static void ex_assertfail(Warp& w, const Instr& I, u32 m) {
  int l = __builtin_ctz(m);
  string s[3];
  for (int k = 0; k < 3 && k < (int)I.va.size(); k++) {
    s64 off = I.va[k].off;
    if (k == 2) {
      u32 v;
      memcpy(&v, lptr(w, I, l, off, 4), 4);
      s[k] = std::to_string(v);
    } else {
      u64 a;
      memcpy(&a, lptr(w, I, l, off, 8), 8);
      Buf& b = w.L->bufs[(a >> WIN) & 4095];
      if (b.host) s[k] = (char*)b.host + (a - b.base);
    }
  }
  FAIL("device assertion failed: %s (%s:%s); %s", s[0].c_str(), s[1].c_str(), s[2].c_str(),
       where(w, I, l).c_str());
}
static void ex_vprintf(Warp& w, const Instr& I, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    int l = __builtin_ctz(q);
    u64 fa, aa;
    memcpy(&fa, lptr(w, I, l, I.va[0].off, 8), 8);
    memcpy(&aa, lptr(w, I, l, I.va[1].off, 8), 8);
    Buf& b = w.L->bufs[(fa >> WIN) & 4095];
    if (!b.host) continue;
    string f = (char*)b.host + (fa - b.base), out;
    u32 off = 0;
    auto arg = [&](u32 n) -> u64 {
      off = (off + n - 1) & ~(n - 1);
      u64 v = 0;
      u64 a = aa - LOC_BASE + off;
      memcpy(&v, lptr(w, I, l, a, n), n);
      off += n;
      return v;
    };
    for (size_t p = 0; p < f.size(); p++) {
      if (f[p] != '%') {
        out += f[p];
        continue;
      }
      if (f[p + 1] == '%') {
        out += '%';
        p++;
        continue;
      }
      string sp = "%";
      bool ll = false;
      p++;
      while (p < f.size() && !isalpha((u8)f[p])) sp += f[p++];
      while (p < f.size() && (f[p] == 'l' || f[p] == 'h' || f[p] == 'z')) {
        if (f[p] != 'h') ll = true;
        p++;
      }
      char cv = f[p];
      if (strchr("fFeEgG", cv))
        out += fmt((sp + cv).c_str(), b2d(arg(8)));
      else if (cv == 's') {
        u64 a = arg(8);
        Buf& sb = w.L->bufs[(a >> WIN) & 4095];
        out += sb.host ? (char*)sb.host + (a - sb.base) : "?";
      } else if (cv == 'p' || ll) {
        u64 v = arg(8);
        out += cv == 'p' ? fmt("0x%llx", (unsigned long long)v)
                         : fmt((sp + "ll" + cv).c_str(), (long long)v);
      } else
        out += fmt((sp + cv).c_str(), (int)arg(4));
    }
    std::lock_guard<std::mutex> g(w.L->rmtx);
    if (w.L->printed.size() < 1000000) w.L->printed += out;
  }
}
