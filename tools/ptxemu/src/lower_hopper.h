// Lowering mma, wgmma, mbarrier, tensormap and bulk copies.
#pragma once
#include "lower_kernel.h"

inline void Lower::mma() {
  auto t = types();
  string shp;
  for (auto& m : S->mods) {
    if (m[0] == 'm' && isdigit((u8)m[1])) shp = m;
    if (m.find("::") != string::npos || m == "sp") unsup();
  }
  if (!has("sync") || !has("row") || !has("col") || t.size() != 4) unsup();
  if (has("xor") || has("and") || has("popc")) unsup();
  I.ctl = C_SYNC;
  I.f1 = I.f2 = false;
  Ty dt = t[0], at = t[1], bt = t[2], ct = t[3];
  auto& o = S->ops;
  if (o.size() != 4) bad("mma operands");
  I.ty = at;
  I.ty2 = bt;
  I.sat = has("satfinite");
  int na, nb, nc = 4;
  ExecFn f = nullptr;
  int rs = 4;
  if (at == F16 || at == BF16) {
    if (bt != at) unsup();
    I.f1 = ct == F16;
    I.f2 = dt == F16;
    if ((dt != F32 && dt != F16) || (ct != F32 && ct != F16) || (at == BF16 && (I.f1 || I.f2)))
      unsup();
    if (shp == "m16n8k16") {
      na = 4;
      nb = 2;
      f = ex_mma16<16>;
    } else if (shp == "m16n8k8") {
      na = 2;
      nb = 1;
      f = ex_mma16<8>;
    } else
      unsup();
  } else if (at == TF32) {
    if (bt != at || dt != F32 || ct != F32) unsup();
    if (shp == "m16n8k8") {
      na = 4;
      nb = 2;
      f = ex_mmatf32<8>;
    } else if (shp == "m16n8k4") {
      na = 2;
      nb = 1;
      f = ex_mmatf32<4>;
    } else
      unsup();
  } else if (at == S8 || at == U8) {
    if (dt != S32) unsup();
    if (shp == "m16n8k32") {
      na = 4;
      nb = 2;
      f = ex_mmaint<32, 8>;
    } else if (shp == "m16n8k16") {
      na = 2;
      nb = 1;
      f = ex_mmaint<16, 8>;
    } else
      unsup();
  } else if (at == S4 || at == U4) {
    if (dt != S32) unsup();
    if (shp == "m16n8k64") {
      na = 4;
      nb = 2;
      f = ex_mmaint<64, 4>;
    } else if (shp == "m16n8k32") {
      na = 2;
      nb = 1;
      f = ex_mmaint<32, 4>;
    } else
      unsup();
  } else if (at == E4M3 || at == E5M2) {
    I.f1 = ct == F16;
    I.f2 = dt == F16;
    if (shp == "m16n8k32") {
      na = 4;
      nb = 2;
      f = ex_mmaf8<32>;
    } else
      unsup();
  } else if (at == F64 && shp == "m8n8k4") {
    na = nb = 1;
    nc = 2;
    rs = 8;
    f = ex_mmaf64;
  } else
    unsup();
  I.v = V(o[0], rs, true);
  I.va = V(o[1], rs, false);
  I.vb = V(o[2], rs, false);
  I.vc = V(o[3], rs, false);
  if ((int)I.va.size() != na || (int)I.vb.size() != nb || (int)I.v.size() != (I.f2 ? 2 : nc) ||
      (int)I.vc.size() != (I.f1 ? 2 : nc))
    bad("mma fragment sizes");
  emit(f, K_MMA);
}
inline void Lower::wgmma() {
  auto& o = S->ops;
  int n = o.size();
  if (S->mods.empty()) unsup();
  const string& k = S->mods[0];
  I.ctl = C_SYNC;
  K.usesPx = true;
  if (k == "fence") {
    emit(ex_nop, K_SYNC);
    return;
  }
  if (k == "commit_group") {
    emit(ex_wgcommit, K_SYNC);
    return;
  }
  if (k == "wait_group") {
    if (n != 1) bad("operands");
    I.imm = o[0].i;
    emit(ex_wgwait, K_SYNC);
    return;
  }
  if (k != "mma_async" || has("sp")) unsup();
  auto t = types();
  int M = 0, N = 0, K = 0;
  for (auto& m : S->mods)
    if (m[0] == 'm' && isdigit((u8)m[1])) sscanf(m.c_str(), "m%dn%dk%d", &M, &N, &K);
  if (t.size() != 3 || M != 64 || N % 8 || N < 8 || N > 256) unsup();
  I.op = N / 8;
  I.imm = K;
  I.ty = t[1];
  I.ty2 = t[2];
  I.rnd = t[0] == F16 ? 1 : 0;
  bool i8 = I.ty == S8 || I.ty == U8;
  if ((u32)K * wes(I.ty) != 32) unsup();
  if (i8 ? t[0] != S32 : t[0] != F32 && t[0] != F16) unsup();
  if (n < 4) bad("operands");
  I.v = V(o[0], 4, true);
  if ((int)I.v.size() != (t[0] == F16 ? N / 4 : N / 2)) bad("accumulator count");
  bool ra = o[1].k == POp::VEC;
  if (ra) {
    I.va = V(o[1], 4, false);
    if (I.va.size() != 4) bad("A fragment");
  } else
    I.a = R(o[1], 8);
  I.b = R(o[2], 8);
  if (o[3].k == POp::INT)
    I.c = cst(0, o[3].i != 0);
  else
    I.c = P_(o[3]);
  if (!i8) {
    if (n < 6) bad("operands");
    I.nanp = o[4].i == -1;
    I.relu = o[5].i == -1;
  } else {
    I.nanp = I.relu = false;
  }
  if (I.ty == F16 || I.ty == BF16) {
    if (n != (ra ? 7 : 8)) bad("operands");
    if (ra)
      I.f2 = o[6].i;
    else {
      I.f1 = o[6].i;
      I.f2 = o[7].i;
    }
  }
  I.sat = has("satfinite");
  emit(ex_wgmma, K_MMA);
}
inline void Lower::mbarrier() {
  auto& o = S->ops;
  int n = o.size(), k = 0;
  if (S->mods.empty()) unsup();
  const string& f = S->mods[0];
  K.usesMb = true;
  if (f != "pending_count") I.sp = space();
  I.relu = has("relaxed");
  auto need = [&](int x) {
    if (n < x) bad("too few operands");
  };
  if (f == "pending_count") {
    need(2);
    I.d = D(o[0], 4);
    I.a = R(o[1], 8);
    I.op = MB_PENDCNT;
    emit(ex_mbar, K_MBAR);
    return;
  }
  if (f == "init") {
    need(2);
    A(o[0], I.ab, I.aoff);
    I.b = R(o[1], 4);
    I.op = MB_INIT;
    emit(ex_mbar, K_MBAR);
    return;
  }
  if (f == "inval") {
    need(1);
    A(o[0], I.ab, I.aoff);
    I.op = MB_INVAL;
    emit(ex_mbar, K_MBAR);
    return;
  }
  if (f == "expect_tx" || f == "complete_tx") {
    need(2);
    A(o[0], I.ab, I.aoff);
    I.b = R(o[1], 4);
    I.op = f[0] == 'e' ? MB_EXPECT : MB_COMPLETE;
    emit(ex_mbar, K_MBAR);
    return;
  }
  if (f == "arrive" || f == "arrive_drop") {
    I.op = f == "arrive" ? MB_ARRIVE : MB_DROP;
    I.f1 = has("expect_tx");
    I.f2 = has("noComplete");
    need(1);
    if (o[0].k != POp::ADDR) {
      if (o[0].k != POp::SINK) I.d = D(o[0], 8);
      k = 1;
    }
    need(k + 1);
    A(o[k++], I.ab, I.aoff);
    if (k < n)
      I.b = R(o[k], 4);
    else if (I.f1 || I.f2)
      bad("operand missing");
    emit(ex_mbar, K_MBAR);
    return;
  }
  if (f == "test_wait" || f == "try_wait") {
    need(3);
    I.ctl = C_MBW;
    I.f1 = f == "test_wait";
    I.op = has("parity") ? 0 : 1;
    I.d = DP(o[0]);
    A(o[1], I.ab, I.aoff);
    I.b = R(o[2], I.op ? 8 : 4);
    I.cls = K_MBAR;
    push();
    return;
  }
  unsup();
}
inline void Lower::tensormap() {
  auto& o = S->ops;
  int n = o.size();
  if (S->mods.empty()) unsup();
  K.usesMb = true;
  if (S->mods[0] == "cp_fenceproxy") {
    if (n != 3 || !has("global") || o[2].k != POp::INT || o[2].i != 128) unsup();
    I.ctl = C_SYNC;
    A(o[0], I.ab, I.aoff);
    A(o[1], I.ab2, I.aoff2);
    emit(ex_tmcp, K_TMA);
    return;
  }
  if (S->mods[0] != "replace" || !has("tile") || !has("b1024")) unsup();
  static const std::map<string, int> F = {
      {"global_address", TF_ADDR},   {"rank", TF_RANK},
      {"box_dim", TF_BOX},           {"global_dim", TF_DIM},
      {"global_stride", TF_STRIDE},  {"element_stride", TF_ESTR},
      {"elemtype", TF_ELEM},         {"interleave_layout", TF_INTER},
      {"swizzle_mode", TF_SWZ},      {"fill_mode", TF_FILL},
      {"swizzle_atomicity", TF_ATOM}};
  int f = -1;
  for (auto& m : S->mods) {
    auto it = F.find(m);
    if (it != F.end()) f = it->second;
  }
  if (f < 0) unsup();
  I.op = f;
  I.sp = space();
  bool ord = f == TF_BOX || f == TF_DIM || f == TF_STRIDE || f == TF_ESTR;
  if (n != (ord ? 3 : 2)) bad("operands");
  A(o[0], I.ab, I.aoff);
  if (ord) {
    if (o[1].k != POp::INT) bad("ordinal");
    I.imm = o[1].i;
  }
  I.a = R(o[n - 1], f == TF_ADDR || f == TF_STRIDE ? 8 : 4);
  emit(ex_tmrep, K_TMA);
}
inline void Lower::bulk() {
  auto& o = S->ops;
  int n = o.size();
  K.usesMb = K.usesPx = true;
  auto need = [&](int x) {
    if (n < x) bad("too few operands");
  };
  if (has("commit_group")) {
    emit(ex_bulkcommit, K_TMA);
    return;
  }
  if (has("wait_group")) {
    need(1);
    I.imm = o[0].i;
    emit(ex_bulkwait, K_TMA);
    return;
  }
  if (has("prefetch")) {
    emit(ex_nop, K_TMA);
    return;
  }
  bool red = has("reduce"), ten = has("tensor"), sh = false;
  int dst = -1;
  for (size_t i = 0; i < S->mods.size(); i++) {
    auto& m = S->mods[i];
    if (m == "global" || m == "shared::cta" || m == "shared::cluster") {
      if (dst < 0) {
        dst = m != "global";
      } else
        sh = m != "global";
    }
    if (m.compare(0, 6, "im2col") == 0 || m.find("gather4") != string::npos ||
        m.find("scatter4") != string::npos || m.compare(0, 9, "cta_group") == 0 || m == "cp_mask" ||
        m == "ignore_oob")
      unsup();
  }
  if (dst < 0) unsup();
  bool bg = has("bulk_group"), mb = has("mbarrier::complete_tx::bytes");
  if (bg == mb) unsup();
  int nd = 0;
  for (auto& m : S->mods)
    if (m.size() == 2 && m[1] == 'd' && m[0] >= '1' && m[0] <= '5') nd = m[0] - '0';
  I.op = ten ? 1 : 0;
  if (red) {
    static const std::map<string, int> AO = {{"add", A_ADD}, {"min", A_MIN}, {"max", A_MAX},
                                             {"and", A_AND}, {"or", A_OR},   {"xor", A_XOR},
                                             {"inc", A_INC}, {"dec", A_DEC}};
    int k = -1;
    for (auto& m : S->mods) {
      auto it = AO.find(m);
      if (it != AO.end()) k = it->second;
    }
    if (k < 0 || dst) unsup();
    I.rnd = 1 + k;
    if (!ten) {
      auto t = types();
      if (t.size() != 1) unsup();
      I.ty = t[0];
    }
  }
  auto coords = [&](const POp& p) {
    if (p.sub.size() != 1) bad("[tensorMap, {coordinates}] expected");
    I.va = V(p.sub[0], 4, false);
    if (!nd || (int)I.va.size() != nd) bad("number of coordinates");
  };
  if (dst) {  // into shared memory
    if (!mb) unsup();
    int k = ten ? 2 : 3;
    need(k + 1);
    A(o[0], I.ab, I.aoff);
    A(o[1], I.ab2, I.aoff2);
    if (ten) {
      if (sh) unsup();
      coords(o[1]);
    } else {
      I.a = R(o[2], 4);
      if (sh) I.op = 2;
    }
    A(o[k], I.e, I.imm);
    if (has("multicast::cluster")) {
      need(k + 2);
      I.d2 = R(o[k + 1], 2, T_NONE, false);
    }
    emit(ex_bulkld, K_TMA);
    return;
  }
  if (!bg) unsup();
  need(2);
  A(o[0], I.ab2, I.aoff2);
  A(o[1], I.ab, I.aoff);
  if (ten)
    coords(o[0]);
  else {
    need(3);
    I.a = R(o[2], 4);
  }
  emit(ex_bulkst, K_TMA);
}
