// ptxemu: warp-lockstep emulator for the PTX that Triton 3.x and nvcc 13 write for sm_80..sm_90a.
// Written from the public PTX ISA. C++17, no dependency. See README.md. Its C interface.
#include <thread>

#include "block.h"

static thread_local string lastErr, lastOut;
static string jesc(const string& s) {
  string r = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') {
      r += '\\';
      r += c;
    } else if (c == '\n')
      r += "\\n";
    else if ((u8)c < 32)
      r += ' ';
    else
      r += c;
  }
  return r + "\"";
}
static Kernel* getKernel(Module& M, const string& n) {
  auto it = M.kernels.find(n);
  if (it != M.kernels.end()) return it->second.get();
  auto f = M.funcs.find(n);
  if (f == M.funcs.end() || !f->second.entry) {
    string l;
    for (auto& x : M.order) l += " " + x;
    FAIL("no kernel '%s' in this PTX; it has:%s", n.c_str(), l.c_str());
  }
  std::unique_ptr<Kernel> k(new Kernel);
  k->name = n;
  k->f = &f->second;
  k->M = &M;
  Lower L(M, *k);
  L.run();
  Kernel* p = k.get();
  M.kernels[n] = std::move(k);
  return p;
}
struct CBuf {
  u64 base;
  void* host;
  u64 size, lo, hi;
  int ro;
  const char* name;
};
extern "C" {
const char* pe_error() { return lastErr.c_str(); }
const char* pe_out() { return lastOut.c_str(); }
void* pe_load(const char* ptx) {
  try {
    std::unique_ptr<Module> m(new Module);
    m->text = ptx;
    Parser p(m->text, *m);
    p.module();
    return m.release();
  } catch (Err& e) {
    lastErr = e.msg;
    return nullptr;
  }
}
void pe_free(void* m) { delete (Module*)m; }
int pe_info(void* mp, const char* name) {
  try {
    Module& M = *(Module*)mp;
    if (!name || !*name) {
      string s = "[";
      for (auto& n : M.order) s += (s.size() > 1 ? "," : "") + jesc(n);
      lastOut = s + "]";
      return 0;
    }
    Kernel* k = getKernel(M, name);
    string s = "{\"params\":[";
    for (size_t i = 0; i < k->params.size(); i++) {
      auto& p = k->params[i];
      s += fmt("%s{\"name\":%s,\"offset\":%u,\"size\":%llu,\"type\":%d,\"array\":%d}", i ? "," : "",
               jesc(p.name).c_str(), k->poff[i], (unsigned long long)(p.count * tsz(p.ty)),
               (int)p.ty, (int)p.isArr);
    }
    s += fmt(
        "],\"param_bytes\":%u,\"static_shared\":%u,\"instructions\":%zu,\"reg_bytes\":%u,\"local_"
        "bytes\":%u,\"reqntid\":[%d,%d,%d],\"maxntid\":[%d,%d,%d]}",
        k->pbytes, k->staticSh, k->code.size(), k->regBytes, k->localBytes, k->f->reqntid[0],
        k->f->reqntid[1], k->f->reqntid[2], k->f->maxntid[0], k->f->maxntid[1], k->f->maxntid[2]);
    lastOut = s;
    return 0;
  } catch (Err& e) {
    lastErr = e.msg;
    return 1;
  }
}
// sym: name\0 pairs to override initial contents of module variables
int pe_launch(void* mp, const char* name, const u32* grid, const u32* block, const void* params,
              u32 pbytes, u32 dynsh, const Opts* o, const CBuf* bufs, int nb, const CBuf* syms,
              int ns) {
  try {
    Module& M = *(Module*)mp;
    Launch L;
    L.K = getKernel(M, name);
    Kernel& K = *L.K;
    for (int i = 0; i < 3; i++) {
      L.grid[i] = grid[i];
      L.block[i] = block[i];
      if (!grid[i] || !block[i]) FAIL("empty grid or block");
    }
    L.o = *o;
    L.dynSh = dynsh;
    if (pbytes != K.pbytes)
      FAIL("kernel %s takes %u parameter bytes, %u given", name, K.pbytes, pbytes);
    L.params.assign((u8*)params, (u8*)params + pbytes);
    L.params.resize(pbytes + 16);
    L.nthr = block[0] * block[1] * block[2];
    if (L.nthr > 1024) FAIL("%d threads per block", L.nthr);
    L.nwarps = (L.nthr + 31) / 32;
    L.nblocks = (u64)grid[0] * grid[1] * grid[2];
    L.shTotal = K.dynOff + dynsh;
    int* rq = K.f->reqntid;
    if (rq[0] && (u32)(rq[0] * rq[1] * rq[2]) != (u32)L.nthr)
      FAIL("kernel %s needs %d threads per block (.reqntid), %d given", name, rq[0] * rq[1] * rq[2],
           L.nthr);
    int* mx = K.f->maxntid;
    if (mx[0] && L.nthr > mx[0] * mx[1] * mx[2])
      FAIL("kernel %s allows at most %d threads per block (.maxntid), %d given", name,
           mx[0] * mx[1] * mx[2], L.nthr);
    if (K.f->cluster > 1)
      FAIL(
          "kernel %s needs clusters of %d CTAs (.reqnctapercluster): only clusters of one CTA are "
          "supported",
          name, K.f->cluster);
    if (L.shTotal - SH0 > 227 * 1024)
      FAIL("%u bytes of shared memory per block: more than any sm_80..sm_90 allows",
           L.shTotal - SH0);
    if (L.o.slice == 0) L.o.slice = 100000;
    L.bufs.resize(NIDX);
    for (int i = 0; i < nb; i++) {
      u64 ix = bufs[i].base >> WIN;
      if (ix >= (u64)IDX_MOD || ix == 0) FAIL("buffer base");
      Buf& b = L.bufs[ix];
      b.base = bufs[i].base;
      b.host = (u8*)bufs[i].host;
      b.size = bufs[i].size;
      b.lo = bufs[i].lo;
      b.hi = bufs[i].hi;
      b.ro = bufs[i].ro;
      b.name = bufs[i].name;
      if (!b.host) b.host = (u8*)1;
    }
    vector<vector<u8>> mv(M.vars.size());
    for (size_t i = 0; i < M.vars.size(); i++) {
      auto& v = M.vars[i];
      if (v.space == "shared") continue;
      if (v.ext) continue;
      u64 sz = std::max<u64>(1, v.count * tsz(v.ty));
      mv[i].assign(sz + 16, 0);
      memcpy(mv[i].data(), v.init.data(), std::min<u64>(sz, v.init.size()));
      for (int k = 0; k < ns; k++)
        if (v.name == syms[k].name) {
          if (syms[k].size > sz)
            FAIL("symbol %s has %llu bytes", v.name.c_str(), (unsigned long long)sz);
          memcpy(mv[i].data(), syms[k].host, syms[k].size);
        }
      Buf& b = L.bufs[IDX_MOD + i];
      b.base = ((u64)(IDX_MOD + i) << WIN) + HALF;
      b.host = mv[i].data();
      b.size = sz;
      b.lo = 0;
      b.hi = sz;
      b.ro = v.space == "const";
      b.name = "(module) " + v.name;
    }
    for (int k = 0; k < ns; k++)
      if (!M.varIdx.count(syms[k].name)) FAIL("no module variable %s", syms[k].name);
    for (size_t i = 0; i < M.vars.size(); i++)
      for (auto& r : M.vars[i].rel) {
        auto it = M.varIdx.find(r.sym);
        if (it == M.varIdx.end()) FAIL("initialiser refers to unknown symbol %s", r.sym.c_str());
        u64 a = ((u64)(IDX_MOD + it->second) << WIN) + HALF + r.add;
        memcpy(mv[i].data() + r.off, &a, std::min(r.sz, 8));
      }
    u32 nt = std::max<u32>(1, std::min<u32>(L.o.nthreads, 16));
    L.o.nthreads = nt;
    vector<Worker> wk(nt);
    for (auto& w : wk) {
      w.L = &L;
      w.ic.resize(K.code.size());
      w.bm.resize(NIDX);
    }
    if (nt == 1)
      worker(L, wk[0]);
    else {
      vector<std::thread> th;
      for (u32 i = 0; i < nt; i++) th.emplace_back([&, i] { worker(L, wk[i]); });
      for (auto& t : th) t.join();
    }
    for (auto& b : L.bufs)
      if (b.own) free(b.own);
    // merge
    Counters C;
    u64* cd = (u64*)&C;
    for (auto& w : wk) {
      u64* s = (u64*)&w.c;
      for (size_t i = 0; i < sizeof(Counters) / 8; i++) cd[i] += s[i];
    }
    vector<ICount> ic(K.code.size());
    for (auto& w : wk)
      for (size_t i = 0; i < ic.size(); i++) {
        u64 *a = (u64*)&ic[i], *b = (u64*)&w.ic[i];
        for (size_t k = 0; k < sizeof(ICount) / 8; k++) a[k] += b[k];
      }
    u64 cls[K_N] = {0}, clt[K_N] = {0};
    std::map<string, u64> mm;
    for (size_t i = 0; i < ic.size(); i++) {
      cls[K.code[i].cls] += ic[i].w;
      clt[K.code[i].cls] += ic[i].t;
      C.winst += ic[i].w;
      C.tinst += ic[i].t;
      if (K.code[i].cls == K_MMA) mm[K.code[i].opname] += ic[i].w;
    }
    u64 l2l = 0, l2s = 0;
    string bl;
    for (int ix = 0; ix < NIDX; ix++) {
      u64 a = 0, b = 0;
      size_t n = 0;
      for (auto& w : wk) n = std::max(n, std::max(w.bm[ix].ld.size(), w.bm[ix].st.size()));
      if (!n) continue;
      for (size_t k = 0; k < n; k++) {
        u64 x = 0, y = 0;
        for (auto& w : wk) {
          if (k < w.bm[ix].ld.size()) x |= w.bm[ix].ld[k];
          if (k < w.bm[ix].st.size()) y |= w.bm[ix].st[k];
        }
        a += __builtin_popcountll(x);
        b += __builtin_popcountll(y);
      }
      l2l += a;
      l2s += b;
      bl += fmt("%s{\"name\":%s,\"ld_unique_sectors\":%llu,\"st_unique_sectors\":%llu}",
                bl.empty() ? "" : ",", jesc(L.bufs[ix].name).c_str(), (unsigned long long)a,
                (unsigned long long)b);
    }
    string s = "{\"error\":" + jesc(L.error) + ",\"printed\":" + jesc(L.printed) + ",\"reports\":[";
    bool f = true;
    for (auto& r : L.reports) {
      s += fmt("%s{\"kind\":%s,\"count\":%llu,\"msg\":", f ? "" : ",", jesc(r.second.kind).c_str(),
               (unsigned long long)r.second.n) +
           jesc(r.second.msg) + "}";
      f = false;
    }
    auto q = [](u64 x) { return (unsigned long long)x; };
    s += "],\"counters\":{";
    s += fmt(
        "\"global_load\":{\"requests\":%llu,\"bytes\":%llu,\"sectors\":%llu},\"global_store\":{"
        "\"requests\":%llu,\"bytes\":%llu,\"sectors\":%llu},\"cp_async\":{\"requests\":%llu,"
        "\"bytes\":%llu,\"sectors\":%llu},\"global_atomic\":{\"requests\":%llu,\"bytes\":%llu,"
        "\"sectors\":%llu},",
        q(C.ld_req), q(C.ld_bytes), q(C.ld_sect), q(C.st_req), q(C.st_bytes), q(C.st_sect),
        q(C.cp_req), q(C.cp_bytes), q(C.cp_sect), q(C.atom_req), q(C.atom_bytes), q(C.atom_sect));
    s += fmt("\"unique_load_bytes\":%llu,\"unique_store_bytes\":%llu,", q(l2l * 32), q(l2s * 32));
    s +=
        fmt("\"shared_load\":{\"requests\":%llu,\"bytes\":%llu,\"wavefronts\":%llu,\"conflicts\":%"
            "llu},\"shared_store\":{\"requests\":%llu,\"bytes\":%llu,\"wavefronts\":%llu,"
            "\"conflicts\":%llu},\"ldmatrix\":{\"requests\":%llu,\"bytes\":%llu,\"wavefronts\":%"
            "llu,\"conflicts\":%llu},\"cp_async_shared\":{\"wavefronts\":%llu,\"conflicts\":%llu},",
            q(C.ls_req), q(C.ls_bytes), q(C.ls_wave), q(C.ls_conf), q(C.ss_req), q(C.ss_bytes),
            q(C.ss_wave), q(C.ss_conf), q(C.lm_req), q(C.lm_bytes), q(C.lm_wave), q(C.lm_conf),
            q(C.cps_wave), q(C.cps_conf));
    s +=
        fmt("\"tma_load\":{\"requests\":%llu,\"bytes\":%llu,\"sectors\":%llu,\"shared_bytes\":%llu}"
            ",\"tma_store\":{\"requests\":%llu,\"bytes\":%llu,\"sectors\":%llu,\"shared_bytes\":%"
            "llu},\"mbarrier\":{\"arrivals\":%llu,\"waits\":%llu},\"griddepcontrol\":{\"wait\":%"
            "llu,\"launch_dependents\":%llu},",
            q(C.tl_req), q(C.tl_bytes), q(C.tl_sect), q(C.tl_smem), q(C.ts_req), q(C.ts_bytes),
            q(C.ts_sect), q(C.ts_smem), q(C.mb_arr), q(C.mb_wait), q(C.gd_wait), q(C.gd_launch));
    s +=
        fmt("\"local\":{\"requests\":%llu,\"bytes\":%llu},\"barriers\":%llu,\"divergent_branches\":"
            "%llu,\"warp_instructions\":%llu,\"thread_instructions\":%llu,\"mma\":{",
            q(C.loc_req), q(C.loc_bytes), q(C.bar), q(C.div), q(C.winst), q(C.tinst));
    f = true;
    for (auto& x : mm) {
      s += fmt("%s%s:%llu", f ? "" : ",", jesc(x.first).c_str(), q(x.second));
      f = false;
    }
    s += "},\"warp_inst_by_class\":{";
    f = true;
    for (int i = 0; i < K_N; i++)
      if (cls[i]) {
        s += fmt("%s\"%s\":%llu", f ? "" : ",", CLSN[i], q(cls[i]));
        f = false;
      }
    s += "},\"thread_inst_by_class\":{";
    f = true;
    for (int i = 0; i < K_N; i++)
      if (clt[i]) {
        s += fmt("%s\"%s\":%llu", f ? "" : ",", CLSN[i], q(clt[i]));
        f = false;
      }
    s += "},\"buffers\":[" + bl + "]},\"blocks\":" +
         fmt("%llu,\"warps_per_block\":%d,\"shared_bytes\":%u,\"instr\":[", q(L.nblocks), L.nwarps,
             L.shTotal - SH0);
    f = true;
    for (size_t i = 0; i < ic.size(); i++)
      if (ic[i].w) {
        s += fmt("%s[%d,%d,%llu,%llu,%llu,%llu,%llu,%llu,", f ? "" : ",", K.code[i].line,
                 K.code[i].sl, q(ic[i].w), q(ic[i].t), q(ic[i].req), q(ic[i].bytes), q(ic[i].sect),
                 q(ic[i].conf)) +
             jesc(K.code[i].text) + "]";
        f = false;
      }
    s += "]}";
    lastOut = s;
    return 0;
  } catch (Err& e) {
    lastErr = e.msg;
    return 1;
  }
}
}
