"""CUDA C++ for sm_90a whose bulk copies (TMA) test_tma_cuda.py runs."""

# Loads and stores of tiles by a tensor map of D dimensions.
LOAD_STORE = r"""
struct alignas(64) TM { unsigned long long x[16]; };
__device__ inline unsigned sm(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline void init(unsigned b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ inline void expect(unsigned b, int n) { asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ inline void arrive(unsigned b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
__device__ inline void wait(unsigned b, int ph) { asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra L;\nD:\n}" :: "r"(b), "r"(ph) : "memory"); }
#if D == 1
#define C "{%2}"
#define CA "r"(c0)
#elif D == 2
#define C "{%2, %3}"
#define CA "r"(c0), "r"(c1)
#elif D == 3
#define C "{%2, %3, %4}"
#define CA "r"(c0), "r"(c1), "r"(c2)
#elif D == 4
#define C "{%2, %3, %4, %5}"
#define CA "r"(c0), "r"(c1), "r"(c2), "r"(c3)
#else
#define C "{%2, %3, %4, %5, %6}"
#define CA "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
#endif
#define S_(x) #x
#define S(x) S_(x)
extern "C" __global__ void load_raw(const __grid_constant__ TM map, unsigned char* out, int c0, int c1, int c2, int c3, int c4, int bytes) {
  extern __shared__ __align__(1024) unsigned char buf[]; __shared__ __align__(8) unsigned long long bar; unsigned b = sm(&bar), d = sm(buf);
  if (threadIdx.x == 0) { init(b, 1); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  __syncthreads();
  if (threadIdx.x == 0) { expect(b, bytes); asm volatile("{ .reg .b32 t; mov.b32 t, %7; cp.async.bulk.tensor." S(D) "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " C "], [t]; }" :: "r"(d), "l"(&map),
#if D < 5
    CA,
#else
    CA,
#endif
#if D <= 1
    "r"(0),
#endif
#if D <= 2
    "r"(0),
#endif
#if D <= 3
    "r"(0),
#endif
#if D <= 4
    "r"(0),
#endif
    "r"(b) : "memory"); }
#ifndef NOWAIT
  wait(b, 0);
#endif
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = buf[i];
}
extern "C" __global__ void store_raw(const __grid_constant__ TM map, const unsigned char* in, int c0, int c1, int c2, int c3, int c4, int bytes) {
  extern __shared__ __align__(1024) unsigned char buf[]; unsigned d = sm(buf);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) buf[i] = in[i];
#ifndef NOFENCE
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile(
#ifdef RED
      "cp.reduce.async.bulk.tensor." S(D) "d.global.shared::cta.add.tile.bulk_group [%0, "
#else
      "cp.async.bulk.tensor." S(D) "d.global.shared::cta.tile.bulk_group [%0, "
#endif
      C "], [%1];" :: "l"(&map), "r"(d), CA : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#ifdef CLOBBER
    buf[5] ^= 1;
#endif
#ifndef NOWAIT
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
  }
}
"""


# Copies without a tensor map, a ring of buffers, and the forms of mbarrier instructions.
COPIES = r"""
__device__ inline unsigned sm(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
#define A(x, ...) asm volatile(x :: __VA_ARGS__ : "memory")
__device__ inline void wait(unsigned b, int ph) { asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra L;\nD:\n}" :: "r"(b), "r"(ph) : "memory"); }
// bulk copies: x -> shared -> o (copy) and o2 (+=), sizes in bytes
extern "C" __global__ void linear(const float* x, float* o, float* o2, int n) {
  extern __shared__ __align__(128) float s[]; __shared__ unsigned long long bar; unsigned b = sm(&bar); int by = n * 4;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) { A("mbarrier.init.shared.b64 [%0], 1;", "r"(b)); A("fence.proxy.async;", "n"(0)); }
#ifndef NOSYNC
  __syncthreads();
#endif
  x += blockIdx.x * n; o += blockIdx.x * n;
  if (threadIdx.x == 0) { A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];", "r"(sm(s)), "l"(x), "r"(by), "r"(b)); A("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;", "r"(b), "r"(by)); }
  wait(b, 0); asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] *= 2.f;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); __syncthreads();
  if (threadIdx.x < 2) {
    if (threadIdx.x == 0) A("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;", "l"(o), "r"(sm(s)), "r"(by));
    else A("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;", "l"(o2), "r"(sm(s)), "r"(by));
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
// lane 0 of warp 0 is the producer, every thread (that lane too) a consumer; full / empty barriers, 3 slots of 32 floats
extern "C" __global__ void ring(const float* x, float* o, int steps) {
  __shared__ __align__(128) float s[3][32]; __shared__ unsigned long long full[3], empty[3]; int t = threadIdx.x; float acc = 0;
  if (t == 0) for (int i = 0; i < 3; i++) { A("mbarrier.init.shared.b64 [%0], 1;", "r"(sm(full + i))); A("mbarrier.init.shared.b64 [%0], %1;", "r"(sm(empty + i)), "r"(blockDim.x)); }
  __syncthreads();
  if (t == 0) for (int k = 0; k < 3 && k < steps; k++) { A("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 128;", "r"(sm(full + k))); A("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];", "r"(sm(s[k])), "l"(x + 32 * k), "r"(sm(full + k))); }
  for (int k = 0; k < steps; k++) {
    int q = k % 3, ph = k / 3 & 1;
#ifndef NOFULL
    wait(sm(full + q), ph);
#else
    if (t < 32) wait(sm(full + q), ph);
#endif
    acc += s[q][t % 32] * (t + 1);
    A("mbarrier.arrive.shared.b64 _, [%0];", "r"(sm(empty + q)));
    if (t == 0 && k + 3 < steps) {
#ifndef NOEMPTY
      wait(sm(empty + q), ph);
#endif
      A("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 128;", "r"(sm(full + q))); A("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];", "r"(sm(s[q])), "l"(x + 32 * (k + 3)), "r"(sm(full + q)));
    }
  }
  o[t] = acc;
}
// tokens, counts, drop, noComplete, pending_count, expect_tx / complete_tx, test_wait, cluster of one CTA
extern "C" __global__ void forms(int* o, const int* g) {
  __shared__ unsigned long long bar[3]; __shared__ __align__(16) int v[128]; int t = threadIdx.x; unsigned b = sm(bar), c = sm(bar + 1), d = sm(bar + 2); unsigned long long st; unsigned p, r;
  if (t == 0) { A("mbarrier.init.shared.b64 [%0], 64;", "r"(b)); A("mbarrier.init.shared.b64 [%0], 5;", "r"(c)); A("mbarrier.init.shared.b64 [%0], 64;", "r"(d)); }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  v[t] = t * 3;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(st) : "r"(b) : "memory");
  do asm volatile("{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(p) : "r"(b), "l"(st) : "memory"); while (!p);
  o[t] = v[63 - t];
  if (t == 0) {
    asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 3;" : "=l"(st) : "r"(c) : "memory"); asm volatile("mbarrier.arrive_drop.shared.b64 %0, [%1];" : "=l"(st) : "r"(c) : "memory"); asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(r) : "l"(st)); o[64] = r;
    A("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 48;", "r"(c)); A("mbarrier.arrive.shared.b64 _, [%0];", "r"(c));
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(p) : "r"(c) : "memory"); o[65] = p;
    A("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 48;", "r"(c));
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(p) : "r"(c) : "memory"); o[66] = p;
    A("mbarrier.arrive.shared.b64 _, [%0], 4;", "r"(c)); asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 1; selp.u32 %0, 1, 0, p; }" : "=r"(p) : "r"(c) : "memory"); o[67] = p;
    unsigned ra, rk; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(ra) : "r"(c), "r"(0)); asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(rk)); o[68] = ra == c && rk == 1; A("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];", "r"(ra));
    A("mbarrier.inval.shared.b64 [%0];", "r"(c));
  }
  // cp.async tracked by an mbarrier
  int* dst = v + 64 + t; if (t < 64) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(sm(dst)), "l"(g + t) : "memory"); A("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];", "r"(d));
#ifndef NOCPWAIT
  wait(d, 0);
#endif
  o[72 + t] = v[127 - t];
}
#ifdef CL2
extern "C" __global__ void __cluster_dims__(2, 1, 1) two(int* o) { o[0] = 1; }
#endif
"""


# The same through libcu++.
LIBCU = r"""
#include <cuda/barrier>
#include <cuda/ptx>
struct alignas(64) TM { unsigned long long x[16]; };
namespace ptx = cuda::ptx; using bar_t = cuda::barrier<cuda::thread_scope_block>;
extern "C" __global__ void scale(const __grid_constant__ TM in, const __grid_constant__ TM out) {  // 32x64 floats a tile
  __shared__ __align__(128) float s[32][64];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ bar_t bar; int x = blockIdx.x * 64, y = blockIdx.y * 32;
  if (threadIdx.x == 0) { init(&bar, blockDim.x); ptx::fence_proxy_async(ptx::space_shared); }
  __syncthreads(); bar_t::arrival_token tok; int co[2] = {x, y};
  if (threadIdx.x == 0) { ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, &s, &in, co, cuda::device::barrier_native_handle(bar)); tok = cuda::device::barrier_arrive_tx(bar, 1, sizeof s); } else tok = bar.arrive();
  bar.wait(std::move(tok));
  for (int i = threadIdx.x; i < 32 * 64; i += blockDim.x) s[i / 64][i % 64] += i / 64;
  ptx::fence_proxy_async(ptx::space_shared); __syncthreads();
  if (threadIdx.x == 0) { ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &out, co, &s); ptx::cp_async_bulk_commit_group(); ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>()); (&bar)->~bar_t(); }
}
"""
