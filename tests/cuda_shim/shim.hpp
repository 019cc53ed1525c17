// shim: compile an unmodified CUDA kernel file with a C++17 compiler (x86-64) and run it on the CPU, for tests.
//
// One block runs on one OS thread; its CUDA threads are fibers that switch only at __syncthreads, __syncwarp and
// warp collectives, in an order given to the launch, so that a missing barrier shows: 0 forward and 1 reverse run each
// warp as far as the next barrier before the others, a larger one seeds a random order with all warps abreast. A
// kernel that never blocks runs as a plain loop. Blocks run in parallel under OpenMP; the blocks of a cluster (macro
// CLUSTER of the kernel) run on a thread each, one at a time, until none can go on alone.
// Reported as errors: divergent barriers and warp operations (deadlock), lanes of one warp operation that disagree,
// shuffles from a lane outside the mask, launch limits. Not modelled: races between blocks, memory ordering.
#pragma once
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <algorithm>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>

#define __CUSHIM__ 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#ifndef CLUSTER
#define CLUSTER 1
#endif
#define __align__(n) __attribute__((aligned(n)))

// vector types
#define SHIM_VEC(T, N, A1, A2, A3, A4)                                   \
  struct __align__(A1) N##1 { T x; };                                      \
  struct __align__(A2) N##2 { T x, y; };                                   \
  struct __align__(A3) N##3 { T x, y, z; };                                \
  struct __align__(A4) N##4 { T x, y, z, w; };                             \
  static inline N##1 make_##N##1(T x) { return {x}; }                      \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }              \
  static inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }      \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VEC(signed char, char, 1, 2, 1, 4)
SHIM_VEC(unsigned char, uchar, 1, 2, 1, 4)
SHIM_VEC(short, short, 2, 4, 2, 8)
SHIM_VEC(unsigned short, ushort, 2, 4, 2, 8)
SHIM_VEC(int, int, 4, 8, 4, 16)
SHIM_VEC(unsigned int, uint, 4, 8, 4, 16)
SHIM_VEC(long long, longlong, 8, 16, 8, 16)
SHIM_VEC(unsigned long long, ulonglong, 8, 16, 8, 16)
SHIM_VEC(float, float, 4, 8, 4, 16)
SHIM_VEC(double, double, 8, 16, 8, 16)

struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {} };

// fibers and the block scheduler
namespace shim {
constexpr size_t kStack = 128 << 10, kMaxDynSmem = 227 << 10;
enum class St : uint8_t { Run, Bar, Warp, Poll, Done };
enum class Op : uint8_t { Sync, Shfl, Ballot, Add, Min, Max, And, Or, Match, Call };
struct Copy { unsigned to; unsigned char data[16]; };  // an asynchronous copy under way: see tensor.hpp

struct Lane {  // one CUDA thread
  void* sp = nullptr;  // saved stack pointer of the fiber it blocked on
  St st = St::Done;
  Op op; uint32_t mask; uint64_t val, res; int src; int pred;
  void (*call)(void**) = nullptr;  // of Op::Call
  bool late = false;               // Op::Call that ends only when nothing else can go on
  bool (*ready)(const Lane&);      // of St::Poll, of val and res
  std::vector<Copy> open; std::vector<std::vector<Copy>> groups;
};
struct Block;  // forward
struct Hooks {  // of hopper.hpp, for each block: at its start, to let one event under way happen, at its end, and when a thread's copy starts and lands
  void (*begin)() = [] {};
  bool (*happen)() = [] { return false; };
  void (*end)() = [] {};
  void (*copying)(unsigned) = [](unsigned) {};
  void (*landed)(unsigned) = [](unsigned) {};
};
static Hooks hooks;
struct Ctx { uint3 tid, bid, bdim, gdim; Lane* lane; int lin; Block* blk; };
static __thread Ctx tls;

extern "C" void shim_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(.text
.p2align 4
.hidden shim_switch
.globl shim_switch
.type shim_switch,@function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch,.-shim_switch
)");
static inline void* make_fiber(char* stack, void (*fn)()) {
  void** p = reinterpret_cast<void**>(stack + kStack) - 1;  // so that entry %rsp is 8 mod 16
  *p-- = nullptr;
  *p-- = reinterpret_cast<void*>(fn);
  for (int i = 0; i < 5; ++i) *p-- = nullptr;
  *p = nullptr;
  return p;
}

struct Cluster {  // blocks that take turns; whoever has the turn may touch everything
  std::mutex mutex; std::condition_variable changed;
  Block* blocks[CLUSTER] = {}; bool ended[CLUSTER] = {}; bool failed = false;
  void* state[CLUSTER] = {};        // of hopper.hpp, of blocks that have begun
  int turn = 0, idle = 0;           // idle: blocks passed over since anything happened
  unsigned arrived = 0, phase = 0;  // of the cluster's barrier
  void take(int rank) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == rank; });
  }
  bool pass(int rank) {  // to the next block that has not ended; whether there is another
    for (int i = 1; i < CLUSTER; ++i)
      if (const int next = (rank + i) % CLUSTER; !ended[next]) {
        { std::lock_guard<std::mutex> lock(mutex); turn = next; }
        changed.notify_all();
        return true;
      }
    return false;
  }
  int alive() const;  // threads
};

struct Block {  // of one OS thread, reused for every block it runs in a launch
  std::vector<Lane> lane; std::vector<int> perm; std::vector<char*> stacks; std::vector<char*> free_stacks;
  void* main_sp = nullptr; int nt = 0, next = 0, alive = 0; std::string err;
  void (*call)(void*) = nullptr; void* call_arg = nullptr;
  size_t dyn_size = 0; bool eager = false, greedy = false;
  Cluster* cluster = nullptr; int rank = 0;

  void fail(const std::string& why) { if (err.empty()) err = why; }

  ~Block() {
    for (char* s : stacks) {
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(s, kStack);  // for what is mapped here next
#endif
      munmap(s - 4096, kStack + 4096);
    }
  }
  char* stack() {
    if (!free_stacks.empty()) { char* s = free_stacks.back(); free_stacks.pop_back(); return s; }
    char* m = static_cast<char*>(mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0));
    mprotect(m, 4096, PROT_NONE);  // guard page below the stack
    stacks.push_back(m + 4096); return m + 4096;
  }
  void enter(int t) {
    tls.lin = t; tls.lane = &lane[t];
    const unsigned bx = tls.bdim.x, by = tls.bdim.y;
    tls.tid = {t % bx, t / bx % by, t / (bx * by)};
  }
  static void body() {  // a fiber: runs threads to completion until none is left to start
    Block& b = *tls.blk;
    for (;;) {
      if (b.next >= b.nt) { void* dummy; shim_switch(&dummy, b.main_sp); }
      const int t = b.perm[b.next++];
      b.enter(t);
      b.lane[t].st = St::Run;
      b.call(b.call_arg);
      b.lane[t].st = St::Done; --b.alive;
      // if this thread had blocked earlier, control belongs to the scheduler again
      if (b.next >= b.nt) { void* dummy; shim_switch(&dummy, b.main_sp); }
    }
  }
  void block_here(St s) {
    Lane& l = *tls.lane; l.st = s;
    shim_switch(&l.sp, main_sp);
  }
  bool warp_try(int w, bool late = false) {  // complete any warp op of warp w whose participants have all arrived
    const int lo = w * 32, n = std::min(32, nt - lo); bool any = false;
    for (int i = 0; i < n; ++i) {
      Lane& a = lane[lo + i];
      if (a.st != St::Warp || (a.late && !late)) continue;
      bool all = true;
      for (int j = 0; j < n && all; ++j)
        if (a.mask >> j & 1) {
          Lane& o = lane[lo + j];
          if (o.st == St::Done) continue;
          if (o.st != St::Warp) all = false;
          else if (o.mask != a.mask || o.op != a.op || o.call != a.call) { err = "warp op divergence: lanes of one mask wait in different warp ops or with different masks"; return false; }
        }
      if (!all) continue;
      finish(lo, n, a.mask, a.op); any = true;
    }
    return any;
  }
  void finish(int lo, int n, uint32_t mask, Op op) {
    uint64_t acc = op == Op::Min ? ~0ull : op == Op::And ? ~0ull : 0;
    auto part = [&](int j) { return j < n && (mask >> j & 1) && lane[lo + j].st == St::Warp; };
    if (op == Op::Call) {
      void* args[32];
      for (int j = 0; j < 32; ++j) {
        if (!part(j)) return fail("warp instruction without all 32 lanes");
        args[j] = reinterpret_cast<void*>(lane[lo + j].val);
      }
      lane[lo].call(args);
    }
    for (int j = 0; j < n; ++j) {
      if (!part(j)) continue;
      const uint64_t v = lane[lo + j].val;
      switch (op) {
        case Op::Ballot: acc |= uint64_t(v != 0) << j; break;
        case Op::Add: acc += v; break;
        case Op::Min: acc = std::min(acc, v); break;
        case Op::Max: acc = std::max(acc, v); break;
        case Op::And: acc &= v; break;
        case Op::Or: acc |= v; break;
        default: break;
      }
    }
    for (int j = 0; j < n; ++j) {
      if (!part(j)) continue;
      Lane& l = lane[lo + j];
      if (op == Op::Shfl) {
        if (!part(l.src)) { err = "shuffle reads lane " + std::to_string(l.src) + ", which takes no part in it"; return; }
        l.res = lane[lo + l.src].val;
      } else if (op == Op::Match) {
        l.res = 0;
        for (int k = 0; k < n; ++k) if (part(k) && lane[lo + k].val == l.val) l.res |= 1ull << k;
      } else l.res = acc;
    }
    for (int j = 0; j < n; ++j) if (part(j)) lane[lo + j].pred = 1;
    for (int j = 0; j < n; ++j) if ((mask >> j & 1) && lane[lo + j].st == St::Warp && lane[lo + j].pred) { lane[lo + j].pred = 0; lane[lo + j].st = St::Run; }
  }
  void resume(int t) { enter(t); shim_switch(&main_sp, lane[t].sp); }

  bool run() {  // one block; false: err says why
    err.clear(); lane.assign(nt, Lane()); next = 0; alive = nt; hooks.begin();
    free_stacks = stacks;
    while (next < nt) {  // start every thread (each fiber carries on with further ones until it blocks)
      void* f = make_fiber(stack(), &Block::body);
      shim_switch(&main_sp, f);
    }
    const int nw = (nt + 31) / 32;
    while (alive > 0) {
      bool progress = false;
      if (greedy) {
        for (int k = 0; k < nw; ++k)
          for (bool moved = true; moved;) {
            const int w = perm[0] == 0 ? k : nw - 1 - k;
            moved = false;
            for (int i = 0; i < 32; ++i) {
              const int t = 32 * w + (perm[0] == 0 ? i : 31 - i);
              if (t >= nt) continue;
              if (lane[t].st == St::Poll && lane[t].ready(lane[t])) lane[t].st = St::Run;
              if (lane[t].st == St::Run) { resume(t); moved = true; }
            }
            moved |= warp_try(w);
            if (!err.empty()) return false;
            progress |= moved;
          }
      } else {
        for (int i = 0; i < nt; ++i) {
          const int t = perm[i];
          if (lane[t].st == St::Poll && lane[t].ready(lane[t])) lane[t].st = St::Run;
          if (lane[t].st == St::Run) { resume(t); progress = true; }
        }
        for (int w = 0; w < nw; ++w) { progress |= warp_try(w); if (!err.empty()) return false; }
      }
      if (progress || alive == 0) { if (cluster) cluster->idle = 0; continue; }
      int bar = 0, cnt = 0; uint64_t sum = 0; bool allp = true;
      for (auto& l : lane) if (l.st == St::Bar) { ++bar; sum += l.val != 0; allp &= l.val != 0; (void)cnt; }
      if (bar != alive) {
        if (cluster && cluster->idle < 2 * CLUSTER) {  // the others first, then what happens late
          const bool late = ++cluster->idle > CLUSTER;
          for (int w = 0; late && w < nw; ++w) progress |= warp_try(w, true);
          if (!err.empty()) return false;
          if (progress || (late && hooks.happen())) { cluster->idle = 0; continue; }
          if (cluster->pass(rank)) cluster->take(rank);
          if (cluster->failed) return false;
          continue;
        }
        for (int w = 0; w < nw; ++w) progress |= warp_try(w, true);
        if (!err.empty()) return false;
        if (progress || hooks.happen()) continue;
      }
      if (bar != alive) { err = "deadlock: " + std::to_string(bar) + " of " + std::to_string(alive) + " live threads are at a block barrier and the others wait for what cannot happen"; return false; }
      for (auto& l : lane) if (l.st == St::Bar) { l.res = sum; l.pred = allp; l.st = St::Run; }
      for (auto& l : lane) l.pred = l.st == St::Run ? l.pred : 0;
    }
    hooks.end();
    return err.empty();
  }
};

inline int Cluster::alive() const {
  int threads = 0;
  for (int r = 0; r < CLUSTER; ++r) threads += ended[r] ? 0 : blocks[r]->alive;
  return threads;
}

static inline void bar(int v, uint64_t* count, int* all) {
  Lane& l = *tls.lane; l.val = v;
  tls.blk->block_here(St::Bar);
  Lane& m = *tls.lane; if (count) *count = m.res; if (all) *all = m.pred;
  m.pred = 0;
}
static inline uint64_t warp_op(Op op, uint32_t mask, uint64_t v, int src = 0) {
  Lane& l = *tls.lane; l.op = op; l.mask = mask; l.val = v; l.src = src; l.pred = 0; l.call = nullptr; l.late = false;
  tls.blk->block_here(St::Warp);
  return tls.lane->res;
}
static inline void warp_call(void* arg, void (*call)(void**), bool late = false) {  // the whole warp's arguments, once all have arrived
  Lane& l = *tls.lane; l.op = Op::Call; l.mask = ~0u; l.val = reinterpret_cast<uint64_t>(arg); l.pred = 0; l.call = call; l.late = late;
  tls.blk->block_here(St::Warp);
}
static inline void wait_until(bool (*ready)(const Lane&), uint64_t val, uint64_t res) {
  Lane& l = *tls.lane; l.val = val; l.res = res; l.ready = ready;
  if (!ready(l)) tls.blk->block_here(St::Poll);
}
template <class T> inline uint64_t bits(T v) { static_assert(sizeof(T) <= 8, "shuffle of more than 8 bytes"); uint64_t r = 0; memcpy(&r, &v, sizeof v); return r; }
template <class T> inline T unbits(uint64_t b) { T v; memcpy(static_cast<void*>(&v), &b, sizeof v); return v; }
}  // namespace shim

#define threadIdx (::shim::tls.tid)
#define blockIdx (::shim::tls.bid)
#define blockDim (::shim::tls.bdim)
#define gridDim (::shim::tls.gdim)
#define warpSize 32
// Convention for kernels: dynamic shared memory is declared as
//   extern __shared__ unsigned char gx_smem[];      (at namespace scope)
thread_local unsigned char gx_smem[shim::kMaxDynSmem] __attribute__((aligned(1024)));

// synchronisation and warp collectives
static inline void __syncthreads() { shim::bar(1, nullptr, nullptr); }
static inline int __syncthreads_count(int p) { uint64_t c; shim::bar(p, &c, nullptr); return int(c); }
static inline int __syncthreads_or(int p) { return __syncthreads_count(p) > 0; }
static inline int __syncthreads_and(int p) { int a; shim::bar(p, nullptr, &a); return a; }
static inline void __syncwarp(unsigned m = 0xffffffffu) { shim::warp_op(shim::Op::Sync, m, 0); }
static inline int shim_lane() { return shim::tls.lin & 31; }
template <class T> inline T shim_shfl(unsigned m, T v, int src) { return shim::unbits<T>(shim::warp_op(shim::Op::Shfl, m, shim::bits(v), src)); }
template <class T> inline T __shfl_sync(unsigned m, T v, int src, int w = 32) { const int l = shim_lane(); return shim_shfl(m, v, (l & ~(w - 1)) | (src & (w - 1))); }
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) { const int l = shim_lane(), s = l ^ x; return shim_shfl(m, v, s >= (l & ~(w - 1)) + w ? l : s); }
template <class T> inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) { const int l = shim_lane(), s = l + int(d); return shim_shfl(m, v, (l & (w - 1)) + int(d) >= w ? l : s); }
template <class T> inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) { const int l = shim_lane(); return shim_shfl(m, v, (l & (w - 1)) < int(d) ? l : l - int(d)); }
static inline unsigned __ballot_sync(unsigned m, int p) { return unsigned(shim::warp_op(shim::Op::Ballot, m, p != 0)); }
static inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
static inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, !p) == 0; }
static inline unsigned __reduce_add_sync(unsigned m, unsigned v) { return unsigned(shim::warp_op(shim::Op::Add, m, v)); }
static inline unsigned __reduce_max_sync(unsigned m, unsigned v) { return unsigned(shim::warp_op(shim::Op::Max, m, v)); }
static inline unsigned __reduce_min_sync(unsigned m, unsigned v) { return unsigned(shim::warp_op(shim::Op::Min, m, v)); }
static inline unsigned __reduce_or_sync(unsigned m, unsigned v) { return unsigned(shim::warp_op(shim::Op::Or, m, v)); }
static inline unsigned __reduce_and_sync(unsigned m, unsigned v) { return unsigned(shim::warp_op(shim::Op::And, m, v)); }
template <class T> inline unsigned __match_any_sync(unsigned m, T v) { return unsigned(shim::warp_op(shim::Op::Match, m, shim::bits(v))); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() {}

// atomics (blocks run on several OS threads)
template <class T, class F> inline T shim_rmw(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  U* q = reinterpret_cast<U*>(p); U o = __atomic_load_n(q, __ATOMIC_RELAXED);
  for (;;) {
    const T ov = shim::unbits<T>(o), nv = f(ov);
    if (__atomic_compare_exchange_n(q, &o, U(shim::bits(nv)), true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) return ov;
  }
}
template <class T> using shim_same = std::common_type_t<T>;
template <class T> inline T atomicAdd(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return T(o + v); }); }
template <class T> inline T atomicSub(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return T(o - v); }); }
template <class T> inline T atomicMax(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return o > v ? o : v; }); }
template <class T> inline T atomicMin(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return o < v ? o : v; }); }
template <class T> inline T atomicOr(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return T(o | v); }); }
template <class T> inline T atomicAnd(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return T(o & v); }); }
template <class T> inline T atomicXor(T* p, shim_same<T> v) { return shim_rmw(p, [=](T o) { return T(o ^ v); }); }
template <class T> inline T atomicExch(T* p, shim_same<T> v) { return shim_rmw(p, [=](T) { return v; }); }
template <class T> inline T atomicCAS(T* p, shim_same<T> c, shim_same<T> v) { return shim_rmw(p, [=](T o) { return shim::bits(o) == shim::bits(c) ? v : o; }); }
static inline unsigned atomicInc(unsigned* p, unsigned v) { return shim_rmw(p, [=](unsigned o) { return o >= v ? 0u : o + 1; }); }

// intrinsics
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
#define SHIM_F static inline __attribute__((always_inline))
SHIM_F unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
SHIM_F int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
SHIM_F unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
SHIM_F int __popc(unsigned v) { return __builtin_popcount(v); }
SHIM_F int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
SHIM_F int __ffs(int v) { return __builtin_ffs(v); }
SHIM_F unsigned __brev(unsigned v) { unsigned r = 0; for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i); return r; }
SHIM_F unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { s &= 31; return s ? (hi << s) | (lo >> (32 - s)) : hi; }
SHIM_F int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
SHIM_F unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
SHIM_F float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
SHIM_F float __uint_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; }
// PTX cvt saturates and sends NaN to 0; x86 does not.
SHIM_F int shim_f2i(float r) { return r >= 2147483648.0f ? INT_MAX : r < -2147483648.0f ? INT_MIN : r != r ? 0 : int(r); }
SHIM_F int __float2int_rn(float x) { return shim_f2i(__builtin_rintf(x)); }
SHIM_F int __float2int_rz(float x) { return shim_f2i(__builtin_truncf(x)); }
SHIM_F int __float2int_rd(float x) { return shim_f2i(__builtin_floorf(x)); }
SHIM_F int __float2int_ru(float x) { return shim_f2i(__builtin_ceilf(x)); }
SHIM_F unsigned __float2uint_rn(float x) { x = __builtin_rintf(x); return x >= 4294967296.0f ? UINT_MAX : x > 0 ? unsigned(x) : 0u; }
SHIM_F float __int2float_rn(int x) { return float(x); }
SHIM_F float __uint2float_rn(unsigned x) { return float(x); }
SHIM_F float __fadd_rn(float a, float b) { return a + b; }
SHIM_F float __fsub_rn(float a, float b) { return a - b; }
SHIM_F float __fmul_rn(float a, float b) { return a * b; }
SHIM_F float __fdiv_rn(float a, float b) { return a / b; }
SHIM_F float __fdividef(float a, float b) { return a / b; }
SHIM_F float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SHIM_F float __frcp_rn(float a) { return 1.0f / a; }
SHIM_F float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
SHIM_F float __frsqrt_rn(float a) { return 1.0f / __builtin_sqrtf(a); }
SHIM_F float rsqrtf(float a) { return 1.0f / __builtin_sqrtf(a); }
SHIM_F float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf powf
#define __tanhf tanhf
#define __sincosf shim_sincosf  // glibc owns the __ names
SHIM_F void shim_sincosf(float a, float* s, float* c) { *s = sinf(a); *c = cosf(a); }
SHIM_F void sincospif(float a, float* s, float* c) { const double t = a * 3.14159265358979323846; *s = float(sin(t)); *c = float(cos(t)); }
SHIM_F float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
template <class A, class B> SHIM_F std::common_type_t<A, B> min(A a, B b) { using T = std::common_type_t<A, B>; return T(b) < T(a) ? T(b) : T(a); }
template <class A, class B> SHIM_F std::common_type_t<A, B> max(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(b) : T(a); }

// launch
namespace shim {
template <class T> std::string type_code() {
  if constexpr (std::is_pointer_v<T>) return "*" + type_code<std::remove_cv_t<std::remove_pointer_t<T>>>();
  else if constexpr (std::is_floating_point_v<T>) return "f" + std::to_string(sizeof(T));
  else if constexpr (std::is_unsigned_v<T>) return "u" + std::to_string(sizeof(T));
  else if constexpr (std::is_integral_v<T>) return "i" + std::to_string(sizeof(T));
  else return "s" + std::to_string(sizeof(T));
}
template <class... A> std::string signature(void (*)(A...)) { std::string s; ((s += type_code<std::remove_cv_t<A>>() + ","), ...); return s; }

template <auto K, class... A, size_t... I>
void call_unpacked(void* p, std::index_sequence<I...>) { void** a = static_cast<void**>(p); K(*static_cast<std::remove_cv_t<A>*>(a[I])...); }
template <auto K, class... A> void trampoline(void* p) { call_unpacked<K, A...>(p, std::index_sequence_for<A...>{}); }

inline int launch(void (*call)(void*), const unsigned* g, const unsigned* b, size_t smem, void** args, uint64_t order, int eager, char* err, size_t nerr) {
  auto fail = [&](const std::string& m) { snprintf(err, nerr, "%s", m.c_str()); return 1; };
  const long long nb = (long long)g[0] * g[1] * g[2]; const int nt = int(b[0] * b[1] * b[2]);
  if (nb <= 0 || g[0] > 2147483647u || g[1] > 65535u || g[2] > 65535u) return fail("bad grid");
  if (nt <= 0 || nt > 1024 || b[2] > 64) return fail("bad block");
  if (smem > kMaxDynSmem) return fail("too much dynamic shared memory");
  int failed = 0;
  auto prepare = [&](Block& blk) {
    blk.nt = nt; blk.dyn_size = smem; blk.eager = eager; blk.greedy = order <= 1;
    blk.call = call; blk.call_arg = args; blk.perm.resize(nt);
    tls.blk = &blk; tls.gdim = {g[0], g[1], g[2]}; tls.bdim = {b[0], b[1], b[2]};
    for (int i = 0; i < nt; ++i) blk.perm[i] = order == 1 ? nt - 1 - i : i;
  };
  auto place = [&](Block& blk, long long i) {
    if (order > 1) {
      uint64_t s = order * 0x9E3779B97F4A7C15ull + uint64_t(i);
      for (int k = nt - 1; k > 0; --k) { s = s * 6364136223846793005ull + 1442695040888963407ull; std::swap(blk.perm[k], blk.perm[(s >> 33) % (k + 1)]); }
    }
    tls.bid = {unsigned(i % g[0]), unsigned(i / g[0] % g[1]), unsigned(i / ((long long)g[0] * g[1]))};
    if (smem) memset(gx_smem, 0xFF, smem);  // poison: NaN / -1
  };
  auto report = [&](const Block& blk) {
#pragma omp critical
    { if (!failed) snprintf(err, nerr, "block (%u,%u,%u): %s", tls.bid.x, tls.bid.y, tls.bid.z, blk.err.c_str()); }
#pragma omp atomic write
    failed = 1;
  };
#if CLUSTER > 1
  if (g[0] % CLUSTER) return fail("bad grid: no whole clusters");
  for (long long first = 0; first < nb && !failed; first += CLUSTER) {
    Cluster cluster;
    Block blocks[CLUSTER];
    for (int r = 0; r < CLUSTER; ++r) { cluster.blocks[r] = &blocks[r]; blocks[r].alive = nt; blocks[r].cluster = &cluster; blocks[r].rank = r; }
    cluster.turn = order == 1 ? CLUSTER - 1 : int(order % CLUSTER);
    std::vector<std::thread> threads;
    for (int r = 0; r < CLUSTER; ++r)
      threads.emplace_back([&, r] {
        Block& blk = blocks[r];
        cluster.take(r);
        prepare(blk);
        place(blk, first + r);
        if (!cluster.failed && !blk.run() && !cluster.failed) { report(blk); cluster.failed = true; }
        cluster.ended[r] = true; cluster.idle = 0;
        cluster.pass(r);
      });
    for (auto& thread : threads) thread.join();
  }
#else
#pragma omp parallel if (nb > 1)
  {
    Block blk;
    prepare(blk);
#pragma omp for schedule(dynamic, 1)
    for (long long i = 0; i < nb; ++i) {
      int f;
#pragma omp atomic read
      f = failed;
      if (f) continue;
      place(blk, i);
      if (!blk.run()) report(blk);
    }
  }
#endif
  return failed;
}
template <auto K, class... A> int launch_typed(void (*)(A...), const unsigned* g, const unsigned* b, size_t s, void** a, uint64_t o, int w, char* e, size_t n) { return launch(&trampoline<K, A...>, g, b, s, a, o, w, e, n); }
}  // namespace shim

// SHIM_EXPORT(symbol, expr): expr is the kernel or a template instantiation of it.
#define SHIM_EXPORT(sym, ...)                                                                                        \
  extern "C" __attribute__((visibility("default")))                                                                    \
  int shim_launch_##sym(const unsigned* g, const unsigned* b, size_t s, void** a, uint64_t o, int w, char* e, size_t n) {  \
    return shim::launch_typed<&__VA_ARGS__>(&__VA_ARGS__, g, b, s, a, o, w, e, n); }                                       \
  extern "C" __attribute__((visibility("default"))) const char* shim_sig_##sym() { static const std::string s = shim::signature(&__VA_ARGS__); return s.c_str(); }
