// shim: compile an unmodified CUDA kernel file with a C++17 compiler (x86-64) and run it on the CPU, for tests.
//
// One block runs on one OS thread; its CUDA threads are fibers that switch only at __syncthreads, __syncwarp and
// warp collectives, in an order given to the launch, so that a missing barrier shows: 0 forward and 1 reverse run each
// warp as far as the next barrier before the others, a larger one seeds a random order with all warps abreast. A
// kernel that never blocks runs as a plain loop. Blocks run in parallel under OpenMP; the blocks of a cluster (macro
// CLUSTER of the kernel) run on a thread each, one at a time, until none can go on alone.
// Reported as errors: divergent barriers and warp operations (deadlock), lanes of one warp operation that disagree,
// shuffles from a lane outside the mask, launch limits. Not modelled: races between blocks, memory ordering.
// This is what a kernel sees; what runs it (block.cpp, tensor.cpp, hopper.cpp) is built once and linked with each.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

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

// the block scheduler
namespace shim {
constexpr size_t kMaxDynSmem = 227 << 10;
enum class Op : uint8_t { Sync, Shfl, Ballot, Add, Min, Max, And, Or, Match, Call };
struct Lane;
struct Block;
struct Ctx { uint3 tid, bid, bdim, gdim; Lane* lane; int lin; Block* blk; };

#pragma GCC visibility push(default)
extern __thread Ctx tls;
void bar(int v, uint64_t* count, int* all);
uint64_t warp_op(Op op, uint32_t mask, uint64_t v, int src = 0);
int launch(void (*call)(void*), int cluster_size, const unsigned* g, const unsigned* b, size_t smem, void** args, uint64_t order, int eager, char* err, size_t nerr);
#pragma GCC visibility pop

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
extern thread_local unsigned char gx_smem[shim::kMaxDynSmem] __attribute__((aligned(1024), visibility("default")));

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
template <class T> int type_code(char* to) {  // characters
  if constexpr (std::is_pointer_v<T>) return *to = '*', 1 + type_code<std::remove_cv_t<std::remove_pointer_t<T>>>(to + 1);
  constexpr char kind = std::is_floating_point_v<T> ? 'f' : std::is_unsigned_v<T> ? 'u' : std::is_integral_v<T> ? 'i' : 's';
  return sprintf(to, "%c%zu", kind, sizeof(T));
}
template <class... A> const char* signature(void (*)(A...)) {
  static char text[16 * sizeof...(A) + 1];
  char* end = text;
  ((end += type_code<std::remove_cv_t<A>>(end), *end++ = ','), ...);
  return text;
}

template <auto K, class... A, size_t... I>
void call_unpacked(void* p, std::index_sequence<I...>) { void** a = static_cast<void**>(p); K(*static_cast<std::remove_cv_t<A>*>(a[I])...); }
template <auto K, class... A> void trampoline(void* p) { call_unpacked<K, A...>(p, std::index_sequence_for<A...>{}); }
template <auto K, class... A> auto trampoline_of(void (*)(A...)) { return &trampoline<K, A...>; }
}  // namespace shim

// SHIM_EXPORT(symbol, expr): expr is the kernel or a template instantiation of it.
#define SHIM_EXPORT(sym, ...)                                                                                        \
  extern "C" __attribute__((visibility("default")))                                                                    \
  int shim_launch_##sym(const unsigned* g, const unsigned* b, size_t s, void** a, uint64_t o, int w, char* e, size_t n) {  \
    return shim::launch(shim::trampoline_of<&__VA_ARGS__>(&__VA_ARGS__), CLUSTER, g, b, s, a, o, w, e, n); }               \
  extern "C" __attribute__((visibility("default"))) const char* shim_sig_##sym() { return shim::signature(&__VA_ARGS__); }
