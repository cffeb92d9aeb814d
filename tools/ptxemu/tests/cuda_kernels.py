"""CUDA C++ kernels that the tests run."""

import ctypes

import torch

from tools import ptxemu
from tools.ptxemu import compile_cuda, launch, poison_

torch.manual_seed(0)


GEMM = r"""
#include <cuda_bf16.h>
#include <stdint.h>
#define BM 64
#define BN 64
#define BK 32
#define ST 3
__device__ __forceinline__ void cp16(uint32_t d, const void* s, bool p) { int n = p ? 16 : 0; asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(d), "l"(s), "r"(n)); }
__device__ __forceinline__ uint32_t sw(int r, int c) { return r * 64 + ((c ^ ((r >> 1) & 3)) << 4); }  // 32 bf16 = 64 B a row, 16 B chunks swizzled
extern "C" __global__ void __launch_bounds__(128) gemm(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K) {  // B is N x K
  extern __shared__ __align__(128) unsigned char sm[];
  uint32_t sb = (uint32_t)__cvta_generic_to_shared(sm); int t = threadIdx.x, w = t >> 5, l = t & 31, bm = blockIdx.y * BM, bn = blockIdx.x * BN, wm = (w >> 1) * 32, wn = (w & 1) * 32;
  float acc[2][4][4] = {};
  auto load = [&](int s, int k0) {
    #pragma unroll
    for (int i = 0; i < 2; i++) { int q = t + i * 128, r = q >> 2, c = q & 3; bool pa = bm + r < M && k0 + c * 8 < K, pb = bn + r < N && k0 + c * 8 < K;
      cp16(sb + s * 8192 + sw(r, c), A + (pa ? (size_t)(bm + r) * K + k0 + c * 8 : 0), pa); cp16(sb + s * 8192 + 4096 + sw(r, c), B + (pb ? (size_t)(bn + r) * K + k0 + c * 8 : 0), pb); } };
  int nk = (K + BK - 1) / BK;
  for (int s = 0; s < ST - 1; s++) { if (s < nk) load(s, s * BK); asm volatile("cp.async.commit_group;"); }
  for (int k = 0; k < nk; k++) {
    asm volatile("cp.async.wait_group %0;" :: "n"(WAITN));
    SYNC1;
    if (k + ST - 1 < nk) load((k + ST - 1) % ST, (k + ST - 1) * BK); asm volatile("cp.async.commit_group;");
    uint32_t a0 = sb + (k % ST) * 8192, b0 = a0 + 4096;
    #pragma unroll
    for (int kk = 0; kk < 2; kk++) {
      uint32_t a[2][4], b[4][2];
      #pragma unroll
      for (int i = 0; i < 2; i++) { int r = wm + i * 16 + (l & 15), c = kk * 2 + (l >> 4); asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3]) : "r"(a0 + sw(r, c))); }
      #pragma unroll
      for (int j = 0; j < 2; j++) { int r = wn + j * 16 + (l & 7) + ((l >> 4) << 3), c = kk * 2 + ((l >> 3) & 1); asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[2*j][0]), "=r"(b[2*j][1]), "=r"(b[2*j+1][0]), "=r"(b[2*j+1][1]) : "r"(b0 + sw(r, c))); }
      #pragma unroll
      for (int i = 0; i < 2; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3]) : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
  }
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) for (int h = 0; h < 4; h++) { int r = bm + wm + i * 16 + (l >> 2) + 8 * (h >> 1), c = bn + wn + j * 8 + 2 * (l & 3) + (h & 1); if (r < M && c < N) C[(size_t)r * N + c] = acc[i][j][h]; }
}
"""


GEMV = r"""
#include <cuda_bf16.h>
#include <stdint.h>
__constant__ float lut[16];
struct P { const __nv_bfloat16* x; const uint8_t* q; float* o; int n, k; };
__noinline__ __device__ float scale(float a, const float* am, size_t i) { return a * am[i]; }
extern "C" __global__ void gemv(P p, const float* am) {
  __shared__ float sl[16][32];
  for (int i = threadIdx.x; i < 512; i += blockDim.x) sl[i >> 5][i & 31] = lut[i >> 5];
  SYNC2;
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31; float acc = 0;
  if (row < p.n) for (int k = lane * 8; k < p.k; k += 256) {
    uint32_t w = *(const uint32_t*)(p.q + ((size_t)row * p.k + k) / 2); uint4 xv = *(const uint4*)(p.x + k); const __nv_bfloat162* h = (const __nv_bfloat162*)&xv; float s = 0;
    #pragma unroll
    for (int i = 0; i < 4; i++) { float2 f = __bfloat1622float2(h[i]); s += sl[(w >> (8 * i + 4)) & 15][lane] * f.x + sl[(w >> (8 * i)) & 15][lane] * f.y; }
    acc += scale(s, am, ((size_t)row * p.k + k) / 64);
  }
  for (int o = 16; o; o >>= 1) acc += __shfl_xor_sync(~0u, acc, o);
  if (lane == 0 && row < p.n) p.o[row] = acc;
}
"""


MISC = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <stdint.h>
#include <stdio.h>
#include <assert.h>
__device__ int gtab[5] = {3, 1, 4, 1, 5};
__device__ const int* gp = gtab + 2;
extern "C" __global__ void half2k(const __half2* a, const __nv_bfloat162* b, __half2* oa, __nv_bfloat162* ob, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { oa[i] = __hmax2(__hfma2(a[i], a[i], __float2half2_rn(0.5f)), __hmul2(a[i], __float2half2_rn(3.f))); ob[i] = __hfma2(b[i], b[i], __float2bfloat162_rn(-1.f)); } }
extern "C" __global__ void fmath(const float* x, float* o, double* d, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { float v = x[i]; o[i] = sinf(v); o[n + i] = expf(v); o[2*n+i] = logf(fabsf(v) + 0.1f); o[3*n+i] = v / 3.7f; o[4*n+i] = powf(fabsf(v), 1.3f); o[5*n+i] = tanhf(v); o[6*n+i] = rintf(v * 10.f) + floorf(v) + truncf(v * 3.f); o[7*n+i] = fmodf(v, 0.7f); o[8*n+i] = __fadd_rz(v, 1e-8f); o[9*n+i] = erff(v); d[i] = sqrt(fabs((double)v)) / 3.0 + exp((double)v) + sin((double)v); } }
extern "C" __global__ void ints(const int* a, const int* b, long long* o, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return; unsigned x = a[i], y = b[i];
  o[i] = __popc(x); o[n+i] = __clz(x); o[2*n+i] = __ffs(x); o[3*n+i] = __brev(x); o[4*n+i] = __byte_perm(x, y, 0x4371); o[5*n+i] = __funnelshift_l(x, y, y & 63); o[6*n+i] = (long long)a[i] * 1000003ll / (b[i] ? b[i] : 1); o[7*n+i] = ((unsigned long long)x << 20 | y) % (y | 1); o[8*n+i] = __mulhi((int)x, (int)y); o[9*n+i] = __dp4a((int)x, (int)y, 7); o[10*n+i] = __vadd4(x, y); o[11*n+i] = __mul64hi((long long)a[i] << 20, (long long)b[i] << 20);
  int s = 0; switch (x % 9) { case 0: s = y; break; case 1: s = 5; break; case 2: s = x * 3; break; case 3: s = y - x; break; case 4: s = 77; break; case 5: s = y / 7; break; case 6: s = x ^ y; break; case 7: s = gp[x & 1]; break; } o[12*n+i] = s; }
extern "C" __global__ void diverge(const int* a, int* o, int n) { int i = threadIdx.x; int v = a[i], c = 0; while (v != 1 && c < 1000) { v = (v & 1) ? 3 * v + 1 : v >> 1; c++; } int s = __reduce_add_sync(~0u, c); o[i] = c; unsigned m = __ballot_sync(~0u, c & 1); if (c & 1) { int q = __shfl_sync(m, c, __ffs(m) - 1); o[64 + i] = q; } else o[64 + i] = -1; o[128 + i] = s; o[192 + i] = __match_any_sync(~0u, c & 3); int k = __syncthreads_count(c > 10); o[256 + i] = k; }
extern "C" __global__ void atomics(int* c, float* f, __half2* h, __nv_bfloat162* b, double* d, unsigned long long* u) { __shared__ int sc; __shared__ float sf; if (threadIdx.x == 0) { sc = 0; sf = 0; } __syncthreads(); atomicAdd(&sc, 1); atomicAdd(&sf, 0.5f); __syncthreads(); if (threadIdx.x == 0) { atomicAdd(c, sc); atomicAdd(f, sf); } atomicMax(c + 1, (int)threadIdx.x); atomicAdd(h, __floats2half2_rn(1.f, 2.f)); atomicAdd(b, __floats2bfloat162_rn(1.f, 2.f)); atomicAdd(d, 0.25); atomicCAS(u, 0ull, 1234ull); atomicInc((unsigned*)c + 2, 5); }
extern "C" __global__ void prints(int v) { if (threadIdx.x < 2) printf("t=%d v=%d f=%.2f s=%s\n", threadIdx.x, v, v * 0.5, "ok"); }
extern "C" __global__ void asserts(int v) { assert(v < 3); }
extern "C" __global__ void divbar(int* o) { __shared__ int s; if (threadIdx.x < 16) { s = 1; __syncthreads(); } else { __syncthreads(); o[threadIdx.x] = s; } }
extern "C" __global__ void badbar(int* o) { if (threadIdx.x < 32) __syncthreads(); else asm volatile("bar.sync 1, 64;"); o[threadIdx.x] = 1; }
extern "C" __global__ void warpnosync(int* o) { __shared__ int s[32]; s[threadIdx.x] = threadIdx.x; WSYNC; o[threadIdx.x] = s[31 - threadIdx.x]; }
extern "C" __global__ void misal(const char* p, int* o) { o[0] = *(const int*)(p + 2); }
extern "C" __global__ void shoob(int* o, int i) { __shared__ int s[8]; s[threadIdx.x & 7] = 1; __syncthreads(); o[0] = s[i]; }
extern "C" __global__ void lcl(const int* a, int* o, int k) { int t[16]; for (int i = 0; i < 16; i++) t[i] = a[i] * (threadIdx.x + 1); o[threadIdx.x] = t[k & 15] + t[(k + threadIdx.x) & 15]; }
extern "C" __global__ void gridsync(int* c, int* o, int nb) { if (threadIdx.x == 0) { atomicAdd(c, 1); while (atomicAdd(c, 0) < nb) ; } __syncthreads(); o[blockIdx.x * blockDim.x + threadIdx.x] = *(volatile int*)c; }
extern "C" __global__ void overlap(float* o) { o[blockIdx.x * 16 + threadIdx.x] = blockIdx.x + threadIdx.x * 0.5f; }
"""


S8 = r"""
#include <stdint.h>
extern "C" __global__ void s8(const int8_t* A, const int8_t* B, int* C) { int l = threadIdx.x, g = l >> 2, t = l & 3; uint32_t a[4], b[2]; int c[4] = {0, 0, 0, 0};
  for (int r = 0; r < 4; r++) a[r] = *(const uint32_t*)(A + (g + 8 * (r & 1)) * 32 + 4 * t + 16 * (r >> 1)); for (int r = 0; r < 2; r++) b[r] = *(const uint32_t*)(B + g * 32 + 4 * t + 16 * r);
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int h = 0; h < 4; h++) C[(g + 8 * (h >> 1)) * 8 + 2 * t + (h & 1)] = c[h]; }
"""


def cu(src, **d):
    return compile_cuda(src, flags=("-O3", "-std=c++17", *[f"-D{k}={v}" for k, v in d.items()]))


def misc():
    return cu(MISC, WSYNC="__syncwarp()")


def rungemm(M, N, K, **d):
    d = {"WAITN": 1, "SYNC1": "__syncthreads()", **d}
    kw = {k: d.pop(k) for k in ("check", "seed", "threads") if k in d}
    A = torch.randn(M, K).bfloat16()
    B = torch.randn(N, K).bfloat16()
    C = poison_(torch.empty(M, N))
    r = launch(
        cu(GEMM, **d), "gemm", (-(-N // 64), -(-M // 64)), 128, [A, B, C, M, N, K], 3 * 8192, **kw
    )
    return r, (C.double() - A.double() @ B.double().T).abs().max().item()


def nf4(n, k):
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    lut = torch.randn(16)
    am = torch.rand(n * k // 64) + 0.5
    x = torch.randn(k).bfloat16()
    w = lut[torch.stack([q >> 4, q & 15], -1).reshape(n, k).long()].double() * am.double().view(
        n, k // 64
    ).repeat_interleave(64, 1)
    return q, lut, am, x, w @ x.double()


class PS(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("q", ctypes.c_uint64),
        ("o", ctypes.c_uint64),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    ]


def rungemv(n, k, sync, **kw):
    q, lut, am, x, ref = nf4(n, k)
    o = poison_(torch.empty(n))
    mem = ptxemu.Memory()
    p = PS(mem.ptr(x, "x"), mem.ptr(q, "q"), mem.ptr(o, "o"), n, k)
    r = launch(
        cu(GEMV, SYNC2=sync), "gemv", -(-n // 4), 128, [p, am], symbols={"lut": lut}, mem=mem, **kw
    )
    return r, ((o.double() - ref).abs().max() / ref.abs().max()).item()
