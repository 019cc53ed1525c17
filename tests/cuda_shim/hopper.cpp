// hopper: what hopper.hpp declares.
#include "hopper.hpp"
#include <algorithm>
#include <deque>
#include <map>
#include "block.hpp"
#include "halves.hpp"

namespace shim {
namespace {

struct Barrier { unsigned arrivals, pending; long bytes; unsigned phase; int maker; bool fenced; };
struct Bulk { unsigned to; const unsigned char* from; unsigned bytes, barrier; };
struct Sums { float* c[32][64]; float value[32][64]; int products; };  // of a warp, while products add to them
struct Wgmma { Sums* sums; const uint32_t* registers[32][4]; uint64_t a, b; bool add; };  // registers: a, or null
struct Products {  // of a warp
  std::map<float*, Sums> sums;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  size_t count = 0;
  bool fenced = false;
};
struct Own { int thread; bool landed; };  // a copy of a thread's own that it has not fenced yet
struct Read { int warp; uint32_t lanes; unsigned places[32]; };  // of a warp, which these lanes have not fenced yet
struct Hopper {  // what a block has under way
  unsigned char* memory = gx_smem;  // its own
  std::map<unsigned, Barrier> barriers;
  std::vector<Bulk> copies;
  Products products[32];
  std::vector<std::pair<uint64_t, uint64_t>> operands[8];  // of all products of a warpgroup
  std::map<unsigned, Own> unfenced;  // by their place, of 16 bytes
  std::vector<Read> reads;
  std::vector<unsigned> registers;   // of each thread
  unsigned spare = 0;                // and those that others have given back
};
thread_local Hopper hopper;

const float kInFlight = unbits<float>(0x7FBADBADu);  // a NaN that nothing computes
bool in_flight(float x) { return bits(x) == bits(kInFlight); }

Barrier* barrier_at(Hopper& of, unsigned address, const char* what) {
  const auto found = of.barriers.find(address);
  if (found != of.barriers.end()) return &found->second;
  tls.blk->fail(std::string(what) + ": no barrier at shared address " + std::to_string(address));
  return nullptr;
}
void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals;
}
void arrive(Hopper& of, unsigned address, long bytes, const char* what) {
  Barrier* const b = barrier_at(of, address, what);
  if (!b) return;
  if (b->pending == 0) return tls.blk->fail(std::string(what) + ": more arrivals than the barrier counts");
  b->bytes += bytes, --b->pending;
  settle(*b);
}
void land(Hopper& in, const Bulk& copy) {
  memcpy(in.memory + copy.to, copy.from, copy.bytes);
  if (Barrier* const b = barrier_at(in, copy.barrier, "copy_bulk")) b->bytes -= copy.bytes, settle(*b);
}

// Where element (row, k) of the matrix a descriptor names lies.
unsigned place_of(uint64_t descriptor, int row, int k) {
  const unsigned first = unsigned(descriptor & 0x3FFF) << 4, unit = unsigned(descriptor >> 32 & 0x3FFF) << 4;
  const unsigned plain = first + row / 8 * unit + row % 8 * 128 + 2 * k;
  return plain ^ ((plain >> 7 & 7) << 4);
}
// Whether it was brought by copies that are fenced: from the start of a product on, since it may read at once.
bool known(uint64_t descriptor, int row, int k) {
  if (!hopper.unfenced.count(place_of(descriptor, row, k) & ~15u)) return true;
  tls.blk->fail("multiply_warpgroup: operand not landed, or not fenced");
  return false;
}
// Its bits.
unsigned element(uint64_t descriptor, int row, int k) {
  const unsigned place = place_of(descriptor, row, k);
  if (place + 2 > tls.blk->dyn_size) return tls.blk->fail("multiply_warpgroup: operand outside shared memory"), 0;
  if (!known(descriptor, row, k)) return 0;
  uint16_t h;
  memcpy(&h, gx_smem + place, 2);
  return h;
}
void multiply_now(const Wgmma& p, int warp) {
  thread_local float a[16][16], b[16][128];
  const bool bfloat = p.registers[0][0];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      a[i][k] = bfloat ? bfloat_to_float(*p.registers[i % 8 * 4 + k % 8 / 2][k / 8 * 2 + i / 8] >> k % 2 * 16 & 0xFFFF)
                       : half_to_float(element(p.a, 16 * (warp % 4) + i, k));
  for (int j = 0; j < 128; ++j)
    for (int k = 0; k < 16; ++k) {
      const unsigned bits = element(p.b, j, k);
      b[k][j] = bfloat ? bfloat_to_float(bits) : half_to_float(bits);
    }
  for (int i = 0; i < 16; ++i) {
    double sums[128] = {};
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 128; ++j) sums[j] += double(a[i][k]) * b[k][j];
    for (int j = 0; j < 128; ++j) {
      float& c = p.sums->value[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2];
      c = float((p.add ? c : 0.0f) + sums[j]);
    }
  }
}

void multiply_start(void** lanes) {
  const Multiply& first = *static_cast<Multiply*>(lanes[0]);
  const int warp = first.thread / 32;
  Products& mine = hopper.products[warp];
  for (int l = 1; l < 32; ++l) {
    const Multiply& other = *static_cast<Multiply*>(lanes[l]);
    if (other.a != first.a || other.b != first.b || other.add != first.add)
      return tls.blk->fail("multiply_warpgroup: lanes differ");
  }
  const bool registers = first.registers[0];
  if ((!registers && first.a >> 62 != 1) || first.b >> 62 != 1)
    return tls.blk->fail("multiply_warpgroup: not a swizzle of 128 bytes");
  auto& operands = hopper.operands[warp / 4];
  if (mine.count == operands.size()) operands.emplace_back(first.a, first.b);
  if (operands[mine.count++] != std::make_pair(first.a, first.b))
    return tls.blk->fail("multiply_warpgroup: warps of a warpgroup differ");
  for (int row = 0; row < 16 && !registers && !hopper.unfenced.empty(); ++row)
    if (!known(first.a, 16 * (warp % 4) + row, 0) || !known(first.a, 16 * (warp % 4) + row, 8)) return;
  const bool fresh = !mine.sums.count(first.c[0]);
  Sums& sums = mine.sums[first.c[0]];
  if ((fresh || registers) && !mine.fenced)
    return tls.blk->fail("multiply_warpgroup: no products_fence since the registers were in use");
  if (fresh) {
    sums.products = 0;
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 64; ++e) {
        sums.c[l][e] = static_cast<Multiply*>(lanes[l])->c[e];
        sums.value[l][e] = std::exchange(*sums.c[l][e], kInFlight);
      }
  }
  ++sums.products;
  mine.open.push_back({&sums, {}, first.a, first.b, first.add});
  for (int l = 0; l < 32; ++l)
    std::copy_n(static_cast<Multiply*>(lanes[l])->registers, 4, mine.open.back().registers[l]);
}
void products_close(void** lanes) {
  Products& mine = hopper.products[*static_cast<int*>(lanes[0]) / 32];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
void products_settle(void** lanes) {
  const int* const waits = static_cast<int*>(lanes[0]);  // thread, groups that may be left
  Products& mine = hopper.products[waits[0] / 32];
  mine.fenced = false;
  for (; int(mine.groups.size()) > waits[1]; mine.groups.pop_front())
    for (const Wgmma& p : mine.groups.front()) {
      multiply_now(p, waits[0] / 32);
      if (--p.sums->products) continue;
      Sums& sums = *p.sums;
      for (int l = 0; l < 32; ++l)
        for (int e = 0; e < 64; ++e) {
          if (!in_flight(*sums.c[l][e])) return tls.blk->fail("multiply_warpgroup: sums written while under way");
          *sums.c[l][e] = sums.value[l][e];
        }
      mine.sums.erase(mine.sums.find(sums.c[0][0]));
    }
}

const bool installed = [] {
  hooks.begin = [] {
    hopper = Hopper();
    hopper.registers.assign(tls.blk->nt, 65536u / tls.blk->nt / 8 * 8);  // as __launch_bounds__ lets a launch have
    if (tls.blk->cluster) tls.blk->cluster->state[tls.blk->rank] = &hopper;
  };
  hooks.happen = [] {
    if (hopper.copies.empty()) return false;
    const Bulk last = hopper.copies.back();
    hopper.copies.pop_back();
    land(hopper, last);
    return true;
  };
  hooks.copying = [](unsigned place) { hopper.unfenced[place] = {tls.lin, false}; };
  hooks.landed = [](unsigned place) { hopper.unfenced[place].landed = true; };
  hooks.reading = [](const unsigned* places) {
    hopper.reads.push_back({tls.lin / 32, ~0u, {}});
    memcpy(hopper.reads.back().places, places, sizeof hopper.reads.back().places);
  };
  hooks.end = [] {
    if (!hopper.copies.empty()) tls.blk->fail("the block ended with bulk copies under way");
    for (int t = 0; t < tls.blk->nt; ++t)
      if (hopper.registers[t] != hopper.registers[t / 128 * 128])
        tls.blk->fail("registers_claim: warps of a warpgroup differ");
    for (int w = 0; w < 32; ++w) {
      const Products& mine = hopper.products[w];
      if (!mine.sums.empty()) tls.blk->fail("the block ended with products under way");
      if (mine.count != hopper.products[w / 4 * 4].count) tls.blk->fail("multiply_warpgroup: warps of a warpgroup differ");
    }
  };
  return true;
}();

}  // namespace

void multiply(Multiply& mine) {
  mine.thread = tls.lin;
  warp_call(&mine, &multiply_start);
}
}  // namespace shim

namespace gpuxbar {

void barrier_init(unsigned barrier, unsigned arrivals) {
  if (barrier % 8 || barrier + 8 > shim::tls.blk->dyn_size)
    return shim::tls.blk->fail("barrier_init: shared address is misaligned or outside");
  shim::hopper.barriers[barrier] = {arrivals, arrivals, 0, 0, shim::tls.lin, false};
}
void barrier_fence() {
  for (auto& [place, barrier] : shim::hopper.barriers) barrier.fenced |= barrier.maker == shim::tls.lin;
}
void barrier_arrive(unsigned barrier) { shim::arrive(shim::hopper, barrier, 0, "barrier_arrive"); }
void barrier_expect(unsigned barrier, unsigned bytes) {
  shim::arrive(shim::hopper, barrier, bytes, "barrier_expect");
}
void barrier_wait(unsigned barrier, unsigned parity) {
  if (!shim::barrier_at(shim::hopper, barrier, "barrier_wait")) return;
  shim::wait_until([](const shim::Lane& l) { return shim::hopper.barriers[l.val].phase != l.res; }, barrier, parity);
}
static void shim_copy(shim::Hopper& in, unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16 || to + bytes > shim::tls.blk->dyn_size)
    return shim::tls.blk->fail("copy_bulk: misaligned or outside shared memory");
  if (const auto found = in.barriers.find(barrier); found != in.barriers.end() && !found->second.fenced)
    return shim::tls.blk->fail("copy_bulk: barrier not fenced");
  for (const shim::Read& read : in.reads)
    for (const unsigned place : read.places)
      if (place >= to && place < to + bytes) return shim::tls.blk->fail("copy_bulk: reads of its place not fenced");
  const shim::Bulk copy{to, static_cast<const unsigned char*>(from), bytes, barrier};
  if (shim::tls.blk->eager) return shim::land(in, copy);
  memset(in.memory + to, 0x7E, bytes);
  in.copies.push_back(copy);
}
void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  shim_copy(shim::hopper, to, from, bytes, barrier);
}

unsigned cluster_rank() { return shim::tls.blk->rank; }
static shim::Hopper* shim_peer(unsigned rank, unsigned barrier, const char* what) {
  const shim::Cluster& cluster = *shim::tls.blk->cluster;
  auto* const peer = static_cast<shim::Hopper*>(int(rank) < cluster.size && !cluster.ended[rank] ? cluster.state[rank] : nullptr);
  if (peer && peer->barriers.count(barrier) && peer->barriers[barrier].fenced) return peer;
  return shim::tls.blk->fail(std::string(what) + ": the block has no such barrier yet, or has ended"), nullptr;
}
void barrier_arrive_at(unsigned barrier, unsigned rank) {
  if (shim::Hopper* const at = shim_peer(rank, barrier, "barrier_arrive_at")) shim::arrive(*at, barrier, 0, "barrier_arrive_at");
}
void copy_bulk_to(unsigned blocks, unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  for (unsigned rank = 0; blocks >> rank; ++rank)
    if (blocks >> rank & 1)
      if (shim::Hopper* const in = shim_peer(rank, barrier, "copy_bulk_to")) shim_copy(*in, to, from, bytes, barrier);
}
void cluster_barrier() {
  shim::Cluster& cluster = *shim::tls.blk->cluster;
  ++cluster.arrived;
  shim::wait_until([](const shim::Lane& l) {
    shim::Cluster& all = *shim::tls.blk->cluster;
    if (int(all.arrived) == all.alive()) all.arrived = 0, all.phase ^= 1;
    return all.phase != l.res;
  }, 0, cluster.phase);
}

void async_fence() {
  auto& unfenced = shim::hopper.unfenced;
  for (auto at = unfenced.begin(); at != unfenced.end();)
    at = at->second.thread == shim::tls.lin && at->second.landed ? unfenced.erase(at) : std::next(at);
  auto& reads = shim::hopper.reads;
  for (shim::Read& read : reads)
    if (read.warp == shim::tls.lin / 32) read.lanes &= ~(1u << shim::tls.lin % 32);
  reads.erase(std::remove_if(reads.begin(), reads.end(), [](const shim::Read& read) { return !read.lanes; }), reads.end());
}

void registers_change(unsigned count, bool more) {
  const unsigned own = shim::hopper.registers[shim::tls.lin];
  if (count % 8 || count < 24 || count > 256 || (more ? count < own : count > own))
    return shim::tls.blk->fail("registers_claim: not 24 to 256 by eights, or no change this way");
  if (more) shim::wait_until([](const shim::Lane& l) { return shim::hopper.spare >= l.val; }, count - own, 0);
  shim::hopper.spare += own - count;
  shim::hopper.registers[shim::tls.lin] = count;
  shim::warp_op(shim::Op::Sync, ~0u, 0);
}

void products_fence() {
  shim::warp_op(shim::Op::Sync, ~0u, 0);
  shim::hopper.products[shim::tls.lin / 32].fenced = true;
}
void products_commit() {
  int thread = shim::tls.lin;
  shim::warp_call(&thread, &shim::products_close);
}
void products_wait(int pending) {
  int waits[2] = {shim::tls.lin, pending};
  shim::warp_call(waits, &shim::products_settle, true);
}
void multiply_warpgroup(float (&c)[64], unsigned long long a, unsigned long long b, bool add) {
  shim::Multiply mine{{}, {}, a, b, add};
  for (int e = 0; e < 64; ++e) mine.c[e] = c + e;
  shim::multiply(mine);
}
void multiply_warpgroup_bfloat(float (&c)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
  shim::Multiply mine{{}, {}, 0, b, add};
  for (int e = 0; e < 64; ++e) mine.c[e] = c + e;
  for (int e = 0; e < 4; ++e) mine.registers[e] = a + e;
  shim::multiply(mine);
}

}  // namespace gpuxbar
