// block: threads as fibers, and the order in which they run. See shim.hpp.
#include "block.hpp"
#include <sys/mman.h>
#include <algorithm>
#include <thread>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

thread_local unsigned char gx_smem[shim::kMaxDynSmem];

namespace shim {
__thread Ctx tls;
Hooks hooks;

namespace {
constexpr size_t kStack = 128 << 10;

struct Stacks {  // of the fibers of an OS thread, kept for its next blocks
  std::vector<char*> all, free;
  ~Stacks() {
    for (char* s : all) {
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(s, kStack);  // for what is mapped here next
#endif
      munmap(s - 4096, kStack + 4096);
    }
  }
  char* take() {
    if (!free.empty()) { char* s = free.back(); free.pop_back(); return s; }
    char* m = static_cast<char*>(mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0));
    mprotect(m, 4096, PROT_NONE);  // guard page below the stack
    all.push_back(m + 4096); return m + 4096;
  }
};
thread_local Stacks stacks;
}  // namespace

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
static void* make_fiber(char* stack, void (*fn)()) {
  void** p = reinterpret_cast<void**>(stack + kStack) - 1;  // so that entry %rsp is 8 mod 16
  *p-- = nullptr;
  *p-- = reinterpret_cast<void*>(fn);
  for (int i = 0; i < 5; ++i) *p-- = nullptr;
  *p = nullptr;
  return p;
}

int Cluster::alive() const {
  int threads = 0;
  for (int r = 0; r < size; ++r) threads += ended[r] ? 0 : blocks[r]->alive;
  return threads;
}

void Block::enter(int t) {
  tls.lin = t; tls.lane = &lane[t];
  const unsigned bx = tls.bdim.x, by = tls.bdim.y;
  tls.tid = {t % bx, t / bx % by, t / (bx * by)};
}
void Block::body() {
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
void Block::block_here(St s) {
  Lane& l = *tls.lane; l.st = s;
  shim_switch(&l.sp, main_sp);
}
bool Block::warp_try(int w, bool late) {
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
        else if (o.mask != a.mask || o.op != a.op || o.call != a.call || o.at != a.at) { err = "warp op divergence: lanes of one mask wait in different warp ops or with different masks"; return false; }
      }
    if (!all) continue;
    finish(lo, n, a.mask, a.op); any = true;
  }
  return any;
}
void Block::finish(int lo, int n, uint32_t mask, Op op) {
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
void Block::resume(int t) { enter(t); shim_switch(&main_sp, lane[t].sp); }

bool Block::run() {
  err.clear(); lane.assign(nt, Lane()); next = 0; alive = nt; hooks.begin();
  stacks.free = stacks.all;
  while (next < nt) {  // start every thread (each fiber carries on with further ones until it blocks)
    void* f = make_fiber(stacks.take(), &Block::body);
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
      if (cluster && cluster->idle < 2 * cluster->size) {  // the others first, then what happens late
        const bool late = ++cluster->idle > cluster->size;
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
    const Lane* first = nullptr;  // of a warp
    for (int t = 0; t < nt; ++t) {
      if (t % 32 == 0) first = nullptr;
      if (lane[t].st != St::Bar) continue;
      if (!first) first = &lane[t];
      if (lane[t].at != first->at) { err = "lanes of a warp are at different barriers"; return false; }
    }
    for (auto& l : lane) if (l.st == St::Bar) { l.res = sum; l.pred = allp; l.st = St::Run; }
    for (auto& l : lane) l.pred = l.st == St::Run ? l.pred : 0;
  }
  hooks.end();
  return err.empty();
}

void bar(int v, uint64_t* count, int* all) {
  Lane& l = *tls.lane; l.val = v;
  tls.blk->block_here(St::Bar);
  Lane& m = *tls.lane; if (count) *count = m.res; if (all) *all = m.pred;
  m.pred = 0;
}
uint64_t warp_op(Op op, uint32_t mask, uint64_t v, int src) {
  Lane& l = *tls.lane; l.op = op; l.mask = mask; l.val = v; l.src = src; l.pred = 0; l.call = nullptr; l.late = false;
  tls.blk->block_here(St::Warp);
  return tls.lane->res;
}
void warp_call(void* arg, void (*call)(void**), bool late) {
  Lane& l = *tls.lane; l.op = Op::Call; l.mask = ~0u; l.val = reinterpret_cast<uint64_t>(arg); l.pred = 0; l.call = call; l.late = late;
  tls.blk->block_here(St::Warp);
}
void wait_until(bool (*ready)(const Lane&), uint64_t val, uint64_t res) {
  Lane& l = *tls.lane; l.val = val; l.res = res; l.ready = ready;
  if (!ready(l)) tls.blk->block_here(St::Poll);
}

int launch(void (*call)(void*), int cluster_size, const unsigned* g, const unsigned* b, size_t smem, void** args, uint64_t order, int eager, char* err, size_t nerr) {
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
  if (cluster_size > 1) {
    if (g[0] % cluster_size) return fail("bad grid: no whole clusters");
    for (long long first = 0; first < nb && !failed; first += cluster_size) {
      Cluster cluster(cluster_size);
      std::vector<Block> blocks(cluster_size);
      for (int r = 0; r < cluster_size; ++r) { cluster.blocks[r] = &blocks[r]; blocks[r].alive = nt; blocks[r].cluster = &cluster; blocks[r].rank = r; }
      cluster.turn = order == 1 ? cluster_size - 1 : int(order % cluster_size);
      std::vector<std::thread> threads;
      for (int r = 0; r < cluster_size; ++r)
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
    return failed;
  }
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
  return failed;
}
}  // namespace shim
