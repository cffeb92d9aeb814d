"""Bulk copies (TMA) in CUDA C++."""

import itertools

import torch

from tools import ptxemu
from tools.ptxemu import PtxError, compile_cuda, launch, poison_, tensor_map
from tools.ptxemu.tests.tma import ALL

torch.manual_seed(0)


# ------------------------------------------------------------------ CUDA C++ sm_90a
CU = r"""
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


MISC = r"""
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


def NV(src, **d):
    return compile_cuda("".join(f"#define {k} {v}\n" for k, v in d.items()) + src, "sm_90a")


def raw(t, coords, box, fill=0.0):  # what a load puts into shared memory, before swizzling
    o = (
        torch.full(box, fill, dtype=torch.float64).to(t.dtype)
        if t.dtype.is_floating_point
        else torch.zeros(box, dtype=t.dtype)
    )
    idx = [torch.arange(b) + c for b, c in zip(box, coords, strict=False)]
    ok = [(i >= 0) & (i < n) for i, n in zip(idx, t.shape, strict=False)]
    m = ok[0]
    for z in ok[1:]:
        m = m.unsqueeze(-1) & z
    g = t[
        torch.meshgrid(
            *[i.clamp(0, n - 1) for i, n in zip(idx, t.shape, strict=False)], indexing="ij"
        )
    ]
    o[m] = g[m]
    return o


def swizzled(b, mode):  # 16-byte chunk j of 128-byte line i goes to chunk j ^ (i mod 2^mode)
    n = (b.numel() + 127) // 128 * 128
    x = torch.cat([b, torch.zeros(n - b.numel(), dtype=b.dtype)]).view(-1, 8, 16)
    o = torch.empty_like(x)
    for i in range(x.shape[0]):
        for j in range(8):
            o[i, j ^ (i % (1 << mode))] = x[i, j]
    return o.reshape(-1)[: b.numel()]


def unswizzled(b, mode):
    o = torch.empty_like(b)
    o[swizzled(torch.arange(b.numel()), mode)] = b
    return o


def test_cuda_load_store():
    n = 0
    for D, dt, mode in itertools.product(
        (1, 2, 3, 4, 5), (torch.bfloat16, torch.float32, torch.uint8), (0, 1, 2, 3)
    ):
        if not ALL and (D in (1, 4)) and mode == 1:
            continue
        es = torch.empty(0, dtype=dt).element_size()
        inner = {0: 48, 1: 32, 2: 64, 3: 128}[mode] // es
        box = [2, 3, 2, 4, inner][5 - D :]
        if D == 2:
            box = [24, inner]
        shape = [3, 4, 5, 6, 160 // es][5 - D :] if D != 2 else [50, 160 // es]
        t = (torch.randn(shape) * 50).to(dt)
        by = int(torch.tensor(box).prod()) * es
        for c in (
            [0] * D,
            [1] * (D - 1) + [16 // es],
            [-1] * (D - 1) + [-16 // es],
            [s - 1 for s in shape],
        ):
            for nan in (False, True) if dt.is_floating_point else (False,):
                mem = ptxemu.Memory()
                m = tensor_map(t, box, mem=mem, swizzle=mode, oob_nan=nan)
                out = torch.zeros(by, dtype=torch.uint8)
                cc = list(reversed(c)) + [0] * (5 - D)
                r = launch(NV(CU, D=D), "load_raw", 1, 64, [m, out, *cc, by], by, mem=mem)
                ref = raw(t, c, box, float("nan") if nan else 0.0)
                un = unswizzled(out, mode).view(dt).view(box)
                assert torch.equal(un, ref) or (
                    nan
                    and torch.equal(un.isnan(), ref.isnan())
                    and torch.equal(un.nan_to_num(), ref.nan_to_num())
                ), (D, dt, mode, c, nan)
                assert not r.reports
                n += 1
            s = torch.zeros(shape, dtype=dt)
            mem = ptxemu.Memory()
            m = tensor_map(s, box, mem=mem, swizzle=mode)
            v = (torch.randn(box) * 50).to(dt)
            r = launch(
                NV(CU, D=D),
                "store_raw",
                1,
                64,
                [m, swizzled(v.reshape(-1).view(torch.uint8), mode), *cc, by],
                by,
                mem=mem,
            )
            ref = torch.zeros(shape, dtype=dt)
            [torch.arange(b) + k for b, k in zip(box, c, strict=False)]
            for ix in itertools.product(*[range(b) for b in box[:-1]]):
                g = [i + k for i, k in zip(ix, c, strict=False)]
                if all(0 <= a < b for a, b in zip(g, shape, strict=False)):
                    lo = max(0, -c[-1])
                    hi = min(box[-1], shape[-1] - c[-1])
                    if hi > lo:
                        ref[tuple(g)][c[-1] + lo : c[-1] + hi] = v[ix][lo:hi]
            assert torch.equal(s, ref) and not r.reports, (D, dt, mode, c, r.reports)
            n += 1
    print(f"   {n} boxes")


def test_cuda_reduce():
    t = torch.ones(20, 32)
    v = torch.randn(8, 32)
    mem = ptxemu.Memory()
    m = tensor_map(t, [8, 32], mem=mem)
    launch(
        NV(CU, D=2, RED=1),
        "store_raw",
        3,
        64,
        [m, v.view(-1).view(torch.uint8), 0, 15, 0, 0, 0, 1024],
        1024,
        mem=mem,
        fatal=(),
    )
    ref = torch.ones(20, 32)
    ref[15:] += v[:5]
    ref[15:] += v[:5]
    ref[15:] += v[:5]
    assert (t - ref).abs().max() < 1e-5


def test_cuda_faults():
    t = torch.randn(50, 64)
    mem = ptxemu.Memory()
    m = tensor_map(t, [16, 32], mem=mem)

    def a(o):
        return [m, o, 0, 0, 0, 0, 0, 2048]

    k = dict(mem=mem, check=False)
    o = torch.zeros(2048, dtype=torch.uint8)
    r = launch(NV(CU, D=2, NOWAIT=1), "load_raw", 1, 64, a(o), 2048, **k)
    assert r.races and r.kinds().get("tma_exit"), r.kinds()
    assert not (o.view(torch.float32).view(16, 32) == t[:16, :32]).any()
    r = launch(NV(CU, D=2, NOFENCE=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert set(r.kinds()) == {"proxy"}, r.kinds()
    print("   ", r.reports[0]["msg"][:200])
    r = launch(NV(CU, D=2, NOWAIT=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert set(r.kinds()) == {"tma_exit"}, r.kinds()
    r = launch(NV(CU, D=2, CLOBBER=1), "store_raw", 1, 64, a(o), 2048, **k)
    assert r.races, r.kinds()
    print("   ", r.races[0]["msg"][:200])
    r = launch(NV(CU, D=2), "load_raw", 1, 64, [*a(o)[:-1], 2064], 4096, **k)
    assert "deadlock" in r.error and "transaction bytes 16" in r.error, r.error
    print("   ", r.error[:220])
    r = launch(NV(CU, D=2), "load_raw", 1, 64, [bytes(128), *a(o)[1:]], 2048, **k)
    assert "not a tensor map" in r.error
    r = launch(NV(CU, D=3), "load_raw", 1, 64, a(o), 2048, **k)
    assert "rank 2" in r.error, r.error


def test_cuda_linear_griddepcontrol():
    x = torch.randn(3, 256)
    o = poison_(torch.empty(3, 256))
    o2 = torch.ones(256)
    r = launch(NV(MISC), "linear", 3, 64, [x, o, o2, 256], 1024)
    assert (o == 2 * x).all() and (o2 - 1 - 2 * x.sum(0)).abs().max() < 1e-5 and not r.reports
    c = r.counters
    assert (
        c["griddepcontrol"] == {"wait": 6, "launch_dependents": 6}
        and c["tma_load"]["bytes"] == 3072
        and c["tma_store"]["bytes"] == 6144
    ), c
    r = launch(NV(MISC, NOSYNC=1), "linear", 1, 64, [x, o, o2, 256], 1024, check=False)
    assert (r.races and "init" in r.races[0]["msg"]) or "mbarrier" in (r.error or ""), r.kinds()


def test_cuda_ring():
    for steps in (1, 2, 3, 4, 7, 20):
        for n in (32, 64, 128):
            x = torch.randn(steps, 32)
            o = torch.zeros(n)
            for kw in ({}, dict(seed=3, slice=5)):
                r = launch(NV(MISC), "ring", 1, n, [x, o, steps], **kw)
                assert (
                    o - x.sum(0).repeat(n // 32) * (torch.arange(n) + 1)
                ).abs().max() < 1e-3 and not r.reports, r.reports
    x = torch.randn(9, 32)
    r = launch(NV(MISC, NOEMPTY=1), "ring", 1, 128, [x, torch.zeros(128), 9], check=False)
    assert r.races or r.error
    r = launch(NV(MISC, NOFULL=1), "ring", 1, 128, [x, torch.zeros(128), 9], check=False)
    assert r.races, r.kinds()
    print("   ", r.races[0]["msg"][:200])


def test_cuda_forms():
    g = torch.arange(64, dtype=torch.int32) + 1000
    o = torch.zeros(136, dtype=torch.int32)
    r = launch(NV(MISC), "forms", 1, 64, [o, g])
    assert (
        o[:64].tolist() == [3 * (63 - t) for t in range(64)]
        and o[64:69].tolist() == [2, 0, 1, 1, 1]
        and o[72:].tolist() == list(range(1063, 999, -1))
        and not r.races
    ), (o, r.reports)
    r = launch(NV(MISC, NOCPWAIT=1), "forms", 1, 64, [o, g], check=False)
    assert r.races
    try:
        launch(NV(MISC, CL2=1), "two", 2, 32, [o])
        raise SystemExit("cluster of 2 accepted")
    except PtxError as e:
        assert "clusters of 2" in str(e)


def test_cuda_libcu():
    for M, N in ((64, 128), (50, 100)):
        x = torch.randn(M, N)
        o = poison_(torch.empty(M, N))
        mem = ptxemu.Memory()
        a, b = (tensor_map(t, [32, 64], mem=mem, name=n) for t, n in ((x, "in"), (o, "out")))
        r = launch(NV(LIBCU), "scale", (2, 2), 128, [a, b], mem=mem)
        assert (o - x - torch.arange(M)[:, None] % 32).abs().max() < 1e-5 and not r.reports, (
            r.reports
        )
    assert r.counters["tma_load"]["bytes"] == M * N * 4
