// Lowered code, and what runs it: registers, warps, blocks, a launch and its counters.
#pragma once
#include <atomic>
#include <functional>
#include <mutex>
#include <unordered_map>
#include "ptx.h"

struct Warp;
struct Instr;
struct Block;
struct Worker;
typedef void (*ExecFn)(Warp&, const Instr&, u32);
struct Opn {
  u8 k = 0, sz = 0;
  bool neg = false;
  u32 off = 0;
};  // k: 0 none, 1 reg, 2 const
enum Ctl : u8 { C_NORM, C_BRA, C_BRX, C_EXIT, C_SYNC, C_BAR, C_MBW };
enum Space : u8 { SP_GEN, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST };
enum Cls : u8 {
  K_INT,
  K_FP32,
  K_FP64,
  K_FP16,
  K_CVT,
  K_MOV,
  K_SETP,
  K_MMA,
  K_LDG,
  K_STG,
  K_LDS,
  K_STS,
  K_LDSM,
  K_CPASYNC,
  K_LDLOC,
  K_STLOC,
  K_PARAM,
  K_ATOMG,
  K_ATOMS,
  K_SHFL,
  K_VOTE,
  K_BAR,
  K_BRANCH,
  K_SFU,
  K_SYNC,
  K_MBAR,
  K_TMA,
  K_OTHER,
  K_N
};
static const char* CLSN[K_N] = {
    "int",      "fp32",      "fp64",      "fp16",        "cvt",         "mov",      "setp_sel",
    "mma",      "ld_global", "st_global", "ld_shared",   "st_shared",   "ldmatrix", "cp_async",
    "ld_local", "st_local",  "ld_param",  "atom_global", "atom_shared", "shfl",     "vote",
    "barrier",  "branch",    "sfu",       "warp_sync",   "mbarrier",    "tma",      "other"};
struct Instr {
  ExecFn fn = nullptr;
  Ctl ctl = C_NORM;
  Cls cls = K_OTHER;
  Ty ty = T_NONE, ty2 = T_NONE;
  Space sp = SP_GEN;
  u8 vec = 1;
  u8 op = 0, rnd = 0;
  bool ftz = false, sat = false, relu = false, nanp = false, f1 = false, f2 = false, aligned = true;
  Opn d, d2, a, b, c, e;
  vector<Opn> v, va, vb, vc;
  int pred = -1;
  bool pneg = false;
  Opn ab;
  s64 aoff = 0;
  Opn ab2;
  s64 aoff2 = 0;
  u32 target = 0;
  s64 imm = 0;
  vector<u32> targets;
  int line = 0, sf = 0, sl = 0;
  string text, opname;
};
struct Buf {
  u64 base = 0;
  u8* host = nullptr;
  u64 size = 0, lo = 0, hi = 0;
  bool ro = false;
  string name;
  u32* own = nullptr;
};
static const int WIN = 36;
static const u64 HALF = 1ull << 35;
static const int IDX_MOD = 3000, IDX_SH = 4000, IDX_LOC = 4001, IDX_PARAM = 4002, NIDX = 4096;
static const u64 SH_BASE = ((u64)IDX_SH << WIN), LOC_BASE = ((u64)IDX_LOC << WIN),
                 PARAM_BASE = ((u64)IDX_PARAM << WIN);
static const u32 SH0 =
    1024;  // first shared address: 1 KB is reserved on sm_80+, and 0 is never valid
enum Spec {
  SR_TIDX,
  SR_TIDY,
  SR_TIDZ,
  SR_NTIDX,
  SR_NTIDY,
  SR_NTIDZ,
  SR_CTAX,
  SR_CTAY,
  SR_CTAZ,
  SR_NCTAX,
  SR_NCTAY,
  SR_NCTAZ,
  SR_LANE,
  SR_WARP,
  SR_NWARP,
  SR_SMID,
  SR_NSMID,
  SR_GRID,
  SR_LMEQ,
  SR_LMLE,
  SR_LMLT,
  SR_LMGE,
  SR_LMGT,
  SR_DSM,
  SR_TSM,
  SR_ZERO,
  SR_ONE,
  SR_N
};
static const std::map<string, int> SPECN = {
    {"%tid.x", SR_TIDX},           {"%tid.y", SR_TIDY},
    {"%tid.z", SR_TIDZ},           {"%ntid.x", SR_NTIDX},
    {"%ntid.y", SR_NTIDY},         {"%ntid.z", SR_NTIDZ},
    {"%ctaid.x", SR_CTAX},         {"%ctaid.y", SR_CTAY},
    {"%ctaid.z", SR_CTAZ},         {"%nctaid.x", SR_NCTAX},
    {"%nctaid.y", SR_NCTAY},       {"%nctaid.z", SR_NCTAZ},
    {"%laneid", SR_LANE},          {"%warpid", SR_WARP},
    {"%nwarpid", SR_NWARP},        {"%smid", SR_SMID},
    {"%nsmid", SR_NSMID},          {"%gridid", SR_GRID},
    {"%lanemask_eq", SR_LMEQ},     {"%lanemask_le", SR_LMLE},
    {"%lanemask_lt", SR_LMLT},     {"%lanemask_ge", SR_LMGE},
    {"%lanemask_gt", SR_LMGT},     {"%dynamic_smem_size", SR_DSM},
    {"%total_smem_size", SR_TSM},  {"%clusterid.x", SR_CTAX},
    {"%clusterid.y", SR_CTAY},     {"%clusterid.z", SR_CTAZ},
    {"%cluster_ctarank", SR_ZERO}, {"%cluster_ctaid.x", SR_ZERO},
    {"%cluster_ctaid.y", SR_ZERO}, {"%cluster_ctaid.z", SR_ZERO},
    {"%cluster_nctarank", SR_ONE}, {"%cluster_nctaid.x", SR_ONE},
    {"%cluster_nctaid.y", SR_ONE}, {"%cluster_nctaid.z", SR_ONE},
    {"%nclusterid.x", SR_NCTAX},   {"%nclusterid.y", SR_NCTAY},
    {"%nclusterid.z", SR_NCTAZ}};

struct Kernel {
  string name;
  Func* f;
  Module* M;
  vector<Instr> code;
  u32 regBytes = 0;
  vector<u8> cpool;
  u32 specOff = 0;
  u32 staticSh = 0, dynOff = SH0;
  u32 localBytes = 0;
  vector<u8> shInit;
  vector<VarDecl> params;
  vector<u32> poff;
  u32 pbytes = 0;
  bool usesMb = false, usesPx = false;
};

struct Opts {
  s64 max_instr;
  u32 slice, seed, nthreads, coresident;
  s32 race, uninit, poison_shared, check_global, max_reports, sm_count;
};
struct ICount {
  u64 w = 0, t = 0, req = 0, sect = 0, conf = 0, bytes = 0;
};
struct Counters {
  u64 ld_req = 0, ld_bytes = 0, ld_sect = 0, st_req = 0, st_bytes = 0, st_sect = 0, cp_req = 0,
      cp_bytes = 0, cp_sect = 0, atom_req = 0, atom_bytes = 0, atom_sect = 0, ls_req = 0,
      ls_bytes = 0, ls_wave = 0, ls_conf = 0, ss_req = 0, ss_bytes = 0, ss_wave = 0, ss_conf = 0,
      lm_req = 0, lm_bytes = 0, lm_wave = 0, lm_conf = 0, cps_wave = 0, cps_conf = 0, loc_req = 0,
      loc_bytes = 0, bar = 0, div = 0, winst = 0, tinst = 0, tl_req = 0, tl_bytes = 0, tl_sect = 0,
      ts_req = 0, ts_bytes = 0, ts_sect = 0, tl_smem = 0, ts_smem = 0, mb_arr = 0, mb_wait = 0,
      gd_wait = 0, gd_launch = 0;
};
struct Report {
  string kind, msg;
  u64 n = 0;
};
struct Launch {
  Kernel* K;
  u32 grid[3], block[3];
  u32 dynSh;
  vector<u8> params;
  vector<Buf> bufs;
  Opts o;
  std::mutex amtx, rmtx;
  std::map<string, Report> reports;
  std::map<string, int> perKind;
  std::map<string, u64> mma;
  std::atomic<u64> next{0};
  std::atomic<bool> stop{false};
  string error;
  u64 nblocks;
  int nwarps, nthr;
  u32 shTotal;
  u64 raceCnt = 0;
  u64 smseed = 0;
  string printed;
};
struct Bm {
  vector<u64> ld, st;
};
struct Worker {
  Launch* L;
  vector<ICount> ic;
  Counters c;
  vector<Bm> bm;
  u64 clock = 0;
};
struct Grp {
  u32 pc, mask;
  bool parked;
  u8 blk;
};  // blk: 1 waits at an mbarrier, 2 yields after a failed test_wait, 3 its try_wait times out
struct CpEnt {
  u64 g;
  u32 dst;
  u8* src;
  u8 lane, n, sn;
  u32 pc;
  int mb;
  u64 clk;
};
struct TMap {
  u64 addr;
  u32 magic;
  u8 rank1, elem, inter, swz, fill, l2, x[2];
  u32 dim[5];
  u16 box[5];
  u8 estr[5], y;
  u64 stride[4];
};  // our own encoding of the opaque 128 bytes
static_assert(sizeof(TMap) <= 128, "tensormap");
static const u32 TMAGIC = 0x50614d54;
struct Bulk {
  int mb;
  u64 clk, g;
  const Instr* I;
  u8 kind, lane;
  u32 sh, n, sh2;
  u64 ga;
  u8* src;
  TMap t;
  s32 c[5];
  u32 id;
};  // kind 0 linear, 1 tensor, 2 shared to shared
struct MBar {
  u32 off = 0;
  bool live = false, cpa = false;
  u32 cnt = 0, pend = 0, nfl = 0, ag = 0;
  s64 tx = 0;
  u64 phase = 0, base = 0;
  vector<u32> vc, rel, px, pxr;
};
struct RdPend {
  u32 off, n, id;
  u8 warp, lane;
  u32 pc;
};
struct Bar {
  u32 arrived = 0, expected = 0;
  bool explicitCnt = false;
  u32 waiters = 0, arrWarps = 0;
  u32 redAnd = ~0u, redOr = 0, redPop = 0;
};
struct Warp {
  u8* regs;
  const u8* cpool;
  Block* blk;
  Worker* wk;
  Launch* L;
  Kernel* K;
  int id;
  u32 alive, initMask;
  Grp g[32];
  int ng;
  enum { RUN, WAIT, DONE } st;
  int barid;
  const Instr* barI;
  u32 barMask;
  vector<CpEnt> cp;
  u64 cpg[32];
  u32 cc;
  struct Wg {
    const Instr* I;
    u64 g, da, db;
    bool sd;
  };
  vector<Wg> wg;
  u64 wgg;
  vector<Bulk> bk;
  u64 bkg[32];
  u32 clarr;
  u64 clph;
};
struct Block {
  Launch* L;
  Worker* wk;
  u32 ct[3];
  u64 lin;
  vector<u8> sh;
  vector<u8> regs;
  vector<u8> local;
  vector<Warp> w;
  Bar bars[16];
  vector<u64> shw, shr1, shr2;
  vector<u32> vc, px;
  u64 executed = 0;
  u64 rng;
  u32 nw, vs, nv;
  vector<MBar> mb;
  std::unordered_map<u32, int> mbi;
  vector<Bulk> fl;
  vector<RdPend> rd;
  u32 bulkid, tmo;
  u64 clphase;
  vector<u32> clvc, clrel;
};

template <class T>
static inline T* P(const Warp& w, const Opn& o) {
  return (T*)((o.k == 2 ? (u8*)w.cpool : w.regs) + o.off);
}
#define LANES(m, ...)                                                    \
  do {                                                                   \
    if ((m) == 0xffffffffu) {                                            \
      _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) { __VA_ARGS__; } \
    } else {                                                             \
      for (u32 _m = (m); _m; _m &= _m - 1) {                             \
        int i = __builtin_ctz(_m);                                       \
        __VA_ARGS__;                                                     \
      }                                                                  \
    }                                                                    \
  } while (0)

static string where(const Warp& w, const Instr& I, int lane) {
  Launch* L = w.L;
  u32 t = w.id * 32 + lane;
  u32 bx = L->block[0], by = L->block[1];
  string src;
  if (I.sl) {
    auto it = L->K->M->files.find(I.sf);
    src = fmt(" [%s:%d]", it == L->K->M->files.end() ? "?" : it->second.c_str(), I.sl);
  }
  return fmt(
      "kernel %s, block (%u,%u,%u), thread (%u,%u,%u) [warp %d lane %d], PTX line %d: `%s`%s",
      L->K->name.c_str(), w.blk->ct[0], w.blk->ct[1], w.blk->ct[2], t % bx, (t / bx) % by,
      t / bx / by, w.id, lane, I.line, I.text.c_str(), src.c_str());
}
static void report(Warp& w, const string& kind, const string& key,
                   const std::function<string()>& msg) {
  Launch* L = w.L;
  std::lock_guard<std::mutex> g(L->rmtx);
  string k = kind + "|" + key;
  auto it = L->reports.find(k);
  if (it == L->reports.end()) {
    int& n = L->perKind[kind];
    if (n >= L->o.max_reports)
      k = kind + "|~";
    else
      n++;
    it = L->reports.emplace(k, Report()).first;
    if (!it->second.n) {
      it->second.kind = kind;
      it->second.msg =
          k.back() == '~' ? string("(further distinct reports of this kind, not listed)") : msg();
    }
  }
  it->second.n++;
}
static inline u32 pcOf(const Warp& w, const Instr& I) { return (u32)(&I - w.K->code.data()); }
