// ldmatrix, stmatrix and mma.
#pragma once
#include "access.h"

static void ex_ldmatrix(Warp& w, const Instr& I, u32 m) {
  u64 ad[32];
  evalAddr(w, I.ab, I.aoff, m, ad);
  int nm = I.vec;
  u32 so[32];
  u32 am = nm == 4 ? ~0u : (1u << (8 * nm)) - 1;
  u16 mat[4][8][8];
  if (I.sp == SP_GEN)
    for (int i = 0; i < 32; i++) ad[i] -= SH_BASE;
  for (int i = 0; i < 8 * nm; i++) {
    so[i] = shoff(w, I, i, ad[i], 16, 16, I.f2);
    if (!I.f2) {
      shRead(w, I, i, so[i], 16);
      memcpy(mat[i >> 3][i & 7], &w.blk->sh[so[i]], 16);
    }
  }
  acctS(w, I, so, am, 16, I.f2 ? 1 : 2);
  if (I.f2) {  // stmatrix
    for (int k = 0; k < nm; k++) {
      const u32* s = P<u32>(w, I.v[k]);
      for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) {
          u16 v = (u16)(s[l] >> (16 * h));
          int r = l >> 2, c = 2 * (l & 3) + h;
          if (I.f1)
            mat[k][c][r] = v;
          else
            mat[k][r][c] = v;
        }
    }
    for (int i = 0; i < 8 * nm; i++) {
      shWrite(w, I, i, so[i], 16, (u8*)mat[i >> 3][i & 7], 0);
      memcpy(&w.blk->sh[so[i]], mat[i >> 3][i & 7], 16);
    }
    return;
  }
  for (int k = 0; k < nm; k++) {
    u32* d = P<u32>(w, I.v[k]);
    for (int l = 0; l < 32; l++) {
      int r = l >> 2, c = 2 * (l & 3);
      d[l] = I.f1 ? (mat[k][c][r] | (u32)mat[k][c + 1][r] << 16)
                  : (mat[k][r][c] | (u32)mat[k][r][c + 1] << 16);
    }
  }
}
// ---------------------------------------------------------------- mma
static inline double cvtA(u32 v, Ty t) {
  return t == F16 ? (double)h2f((u16)v) : (double)bf2f((u16)v);
}
template <int K>
static void mmacore(const double A[16][K], const double B[K][8], double C[16][8]) {
  for (int i = 0; i < 16; i++) {
    double acc[8];
    for (int j = 0; j < 8; j++) acc[j] = C[i][j];
    for (int k = 0; k < K; k++) {
      double a = A[i][k];
      for (int j = 0; j < 8; j++) acc[j] += a * B[k][j];
    }
    for (int j = 0; j < 8; j++) C[i][j] = acc[j];
  }
}
static void getC(Warp& w, const Instr& I, double C[16][8], const vector<Opn>& vc, bool half) {
  if (half) {
    for (int r = 0; r < 2; r++) {
      const u32* s = P<u32>(w, vc[r]);
      for (int l = 0; l < 32; l++) {
        C[(l >> 2) + 8 * r][2 * (l & 3)] = h2f((u16)s[l]);
        C[(l >> 2) + 8 * r][2 * (l & 3) + 1] = h2f((u16)(s[l] >> 16));
      }
    }
  } else
    for (int r = 0; r < 4; r++) {
      const float* s = P<float>(w, vc[r]);
      for (int l = 0; l < 32; l++) C[(l >> 2) + 8 * (r >> 1)][2 * (l & 3) + (r & 1)] = s[l];
    }
  (void)I;
}
static void putC(Warp& w, const Instr& I, double C[16][8], bool half) {
  if (half) {
    for (int r = 0; r < 2; r++) {
      u32* s = P<u32>(w, I.v[r]);
      for (int l = 0; l < 32; l++)
        s[l] = d2h(C[(l >> 2) + 8 * r][2 * (l & 3)]) |
               (u32)d2h(C[(l >> 2) + 8 * r][2 * (l & 3) + 1]) << 16;
    }
  } else
    for (int r = 0; r < 4; r++) {
      float* s = P<float>(w, I.v[r]);
      for (int l = 0; l < 32; l++) s[l] = (float)C[(l >> 2) + 8 * (r >> 1)][2 * (l & 3) + (r & 1)];
    }
}
template <int K>
static void ex_mma16(Warp& w, const Instr& I, u32) {  // f16/bf16, K 8 or 16
  double A[16][K], B[K][8], C[16][8];
  for (int r = 0; r < K / 4; r++) {
    const u32* s = P<u32>(w, I.va[r]);
    for (int l = 0; l < 32; l++) {
      int row = (l >> 2) + 8 * (r & 1), col = 2 * (l & 3) + 8 * (r >> 1);
      A[row][col] = cvtA(s[l] & 0xffff, I.ty);
      A[row][col + 1] = cvtA(s[l] >> 16, I.ty);
    }
  }
  for (int r = 0; r < K / 8; r++) {
    const u32* s = P<u32>(w, I.vb[r]);
    for (int l = 0; l < 32; l++) {
      int k = 2 * (l & 3) + 8 * r, n = l >> 2;
      B[k][n] = cvtA(s[l] & 0xffff, I.ty);
      B[k + 1][n] = cvtA(s[l] >> 16, I.ty);
    }
  }
  getC(w, I, C, I.vc, I.f1);
  mmacore<K>(A, B, C);
  putC(w, I, C, I.f2);
}
template <int K>
static void ex_mmatf32(Warp& w, const Instr& I, u32) {  // K 4 or 8
  double A[16][K], B[K][8], C[16][8];
  for (int r = 0; r < K / 2; r++) {
    const u32* s = P<u32>(w, I.va[r]);
    for (int l = 0; l < 32; l++)
      A[(l >> 2) + 8 * (r & 1)][(l & 3) + 4 * (r >> 1)] = b2f(s[l] & 0xffffe000u);
  }
  for (int r = 0; r < K / 4; r++) {
    const u32* s = P<u32>(w, I.vb[r]);
    for (int l = 0; l < 32; l++) B[(l & 3) + 4 * r][l >> 2] = b2f(s[l] & 0xffffe000u);
  }
  getC(w, I, C, I.vc, false);
  mmacore<K>(A, B, C);
  putC(w, I, C, false);
}
template <int K>
static void ex_mmaf8(Warp& w, const Instr& I, u32) {  // fp8 m16n8k32
  double A[16][K], B[K][8], C[16][8];
  for (int r = 0; r < K / 8; r++) {
    const u32* s = P<u32>(w, I.va[r]);
    for (int l = 0; l < 32; l++)
      for (int z = 0; z < 4; z++)
        A[(l >> 2) + 8 * (r & 1)][4 * (l & 3) + z + 16 * (r >> 1)] =
            fp8f((u8)(s[l] >> (8 * z)), I.ty == E4M3);
  }
  for (int r = 0; r < K / 16; r++) {
    const u32* s = P<u32>(w, I.vb[r]);
    for (int l = 0; l < 32; l++)
      for (int z = 0; z < 4; z++)
        B[4 * (l & 3) + z + 16 * r][l >> 2] = fp8f((u8)(s[l] >> (8 * z)), I.ty2 == E4M3);
  }
  getC(w, I, C, I.vc, I.f1);
  mmacore<K>(A, B, C);
  putC(w, I, C, I.f2);
}
template <int K, int BITS>
static void ex_mmaint(Warp& w, const Instr& I, u32) {
  const int EP = 32 / BITS;
  static thread_local s32 A[16][K], B[K][8];
  s64 C[16][8];
  auto get = [](u32 v, int z, bool sg) -> s32 {
    if (BITS == 8) return sg ? (s8)(v >> (8 * z)) : (u8)(v >> (8 * z));
    s32 x = (v >> (4 * z)) & 15;
    return sg && x > 7 ? x - 16 : x;
  };
  bool sa = I.ty == S8 || I.ty == S4, sb = I.ty2 == S8 || I.ty2 == S4;
  const int HK = 4 * EP;
  for (int r = 0; r < (int)I.va.size(); r++) {
    const u32* s = P<u32>(w, I.va[r]);
    for (int l = 0; l < 32; l++)
      for (int z = 0; z < EP; z++)
        A[(l >> 2) + 8 * (r & 1)][EP * (l & 3) + z + HK * (r >> 1)] = get(s[l], z, sa);
  }
  for (int r = 0; r < (int)I.vb.size(); r++) {
    const u32* s = P<u32>(w, I.vb[r]);
    for (int l = 0; l < 32; l++)
      for (int z = 0; z < EP; z++) B[EP * (l & 3) + z + HK * r][l >> 2] = get(s[l], z, sb);
  }
  for (int r = 0; r < 4; r++) {
    const s32* s = P<s32>(w, I.vc[r]);
    for (int l = 0; l < 32; l++) C[(l >> 2) + 8 * (r >> 1)][2 * (l & 3) + (r & 1)] = s[l];
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      s64 a = C[i][j];
      for (int k = 0; k < K; k++) a += (s64)A[i][k] * B[k][j];
      if (I.sat) a = std::max<s64>(INT32_MIN, std::min<s64>(INT32_MAX, a));
      C[i][j] = (s32)a;
    }
  for (int r = 0; r < 4; r++) {
    s32* s = P<s32>(w, I.v[r]);
    for (int l = 0; l < 32; l++) s[l] = (s32)C[(l >> 2) + 8 * (r >> 1)][2 * (l & 3) + (r & 1)];
  }
}
static void ex_mmaf64(Warp& w, const Instr& I, u32) {  // m8n8k4
  double A[8][4], B[4][8], C[8][8];
  const double *a = P<double>(w, I.va[0]), *b = P<double>(w, I.vb[0]);
  for (int l = 0; l < 32; l++) {
    A[l >> 2][l & 3] = a[l];
    B[l & 3][l >> 2] = b[l];
    for (int r = 0; r < 2; r++) C[l >> 2][2 * (l & 3) + r] = P<double>(w, I.vc[r])[l];
  }
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < 4; k++) C[i][j] = std::fma(A[i][k], B[k][j], C[i][j]);
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 2; r++) P<double>(w, I.v[r])[l] = C[l >> 2][2 * (l & 3) + r];
}
