// tensor: what tensor.hpp declares.
#include "tensor.hpp"
#include "block.hpp"
#include "halves.hpp"

namespace shim {
namespace {

bool shared_ok(unsigned address, const char* what) {
  if (address % 16 == 0 && address + 16 <= tls.blk->dyn_size) return true;
  tls.blk->fail(std::string(what) + ": shared address " + std::to_string(address) + " is misaligned or outside");
  return false;
}

void land_async(const Copy& copy) {
  memcpy(gx_smem + copy.to, copy.data, 16);
  hooks.landed(copy.to);
}

struct Matrices { uint32_t* r; unsigned address; };
void load_all(void** lanes) {
  unsigned places[32];
  for (int l = 0; l < 32; ++l) places[l] = static_cast<Matrices*>(lanes[l])->address;
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) {
      const unsigned address = places[8 * m + i];
      if (!shared_ok(address, "load_matrices")) return;
      banks |= 1u << (address >> 4 & 7);
    }
    if (banks != 0xFF) tls.blk->fail("load_matrices: rows of one matrix share banks");
    for (int l = 0; l < 32; ++l)
      memcpy(static_cast<Matrices*>(lanes[l])->r + m,
             gx_smem + places[8 * m + l / 4] + 4 * (l % 4), 4);
  }
  hooks.reading(places);
}

struct Product { float* c; const uint32_t* a; uint32_t b[2]; };
template <float (*VALUE)(unsigned)> void multiply_all(void** lanes) {
  typedef double Row __attribute__((vector_size(64)));
  double a[16][16];
  Row b[16], sums[16] = {};
  for (int l = 0; l < 32; ++l) {
    const Product& p = *static_cast<Product*>(lanes[l]);
    const int row = l / 4, k = 2 * (l % 4);
    for (int e = 0; e < 2; ++e) {
      for (int q = 0; q < 4; ++q) a[row + q % 2 * 8][k + q / 2 * 8 + e] = VALUE(p.a[q] >> 16 * e & 0xFFFF);
      for (int q = 0; q < 2; ++q) b[k + 8 * q + e][row] = VALUE(p.b[q] >> 16 * e & 0xFFFF);
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) sums[i] += a[i][k] * b[k];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      float& c = static_cast<Product*>(lanes[l])->c[e];
      c = float(c + sums[l / 4 + e / 2 * 8][2 * (l % 4) + e % 2]);
    }
}

// PTX ISA, mma.m16n8k32 of .s8: byte e of a[q] is a[row + 8 (q % 2)][k + 16 (q / 2) + e], of b[q] b[k + 16 q + e][row].
struct ByteProduct { int32_t* c; const uint32_t* a; uint32_t b[2]; };
void multiply_bytes_all(void** lanes) {
  int32_t a[16][32], b[32][8];
  for (int l = 0; l < 32; ++l) {
    const ByteProduct& p = *static_cast<ByteProduct*>(lanes[l]);
    const int row = l / 4, k = 4 * (l % 4);
    for (int e = 0; e < 4; ++e) {
      for (int q = 0; q < 4; ++q) a[row + q % 2 * 8][k + q / 2 * 16 + e] = int8_t(p.a[q] >> 8 * e);
      for (int q = 0; q < 2; ++q) b[k + 16 * q + e][row] = int8_t(p.b[q] >> 8 * e);
    }
  }
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[l / 4 + e / 2 * 8][k] * b[k][2 * (l % 4) + e % 2];
      static_cast<ByteProduct*>(lanes[l])->c[e] += sum;
    }
}

}  // namespace
}  // namespace shim

namespace gpuxbar {

void copy_async(unsigned to, const void* from, bool real) {
  if (!shim::shared_ok(to, "copy_async")) return;
  if (reinterpret_cast<uintptr_t>(from) % 16) return shim::tls.blk->fail("copy_async: global address is misaligned");
  shim::Copy copy{to, {}};
  if (real) memcpy(copy.data, from, 16);
  shim::hooks.copying(to);
  if (shim::tls.blk->eager) return shim::land_async(copy);
  memset(gx_smem + to, 0x7E, 16);
  shim::tls.lane->open.push_back(copy);
}
void copy_commit() {
  shim::tls.lane->groups.push_back(std::move(shim::tls.lane->open));
  shim::tls.lane->open.clear();
}
void copy_wait(int pending) {
  auto& groups = shim::tls.lane->groups;
  while (int(groups.size()) > pending) {
    for (const shim::Copy& copy : groups.front()) shim::land_async(copy);
    groups.erase(groups.begin());
  }
}

void load_matrices(unsigned (&r)[4], unsigned address) {
  shim::Matrices mine{r, address};
  shim::warp_call(&mine, &shim::load_all);
}
void multiply_half(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  shim::Product mine{c, a, {b0, b1}};
  shim::warp_call(&mine, &shim::multiply_all<shim::half_to_float>);
}
void multiply_bfloat(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  shim::Product mine{c, a, {b0, b1}};
  shim::warp_call(&mine, &shim::multiply_all<shim::bfloat_to_float>);
}

void multiply_bytes(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  shim::ByteProduct mine{c, a, {b0, b1}};
  shim::warp_call(&mine, &shim::multiply_bytes_all);
}

template <class F> static unsigned shim_halves(unsigned x, F f) { return f(x & 0xFFFF) | f(x >> 16) << 16; }
unsigned add_halves(unsigned x, unsigned y) {
  const unsigned low = shim::float_to_half(shim::half_to_float(x & 0xFFFF) + shim::half_to_float(y & 0xFFFF));
  return low | shim::float_to_half(shim::half_to_float(x >> 16) + shim::half_to_float(y >> 16)) << 16;
}
unsigned negative_halves(unsigned x) { return shim_halves(x, [](unsigned h) { return h >> 15 ? 0xFFFFu : 0u; }); }
unsigned square_halves(unsigned x) {
  return shim_halves(x, [](unsigned h) { const float v = shim::half_to_float(h); return shim::float_to_bfloat(v * v); });
}
unsigned square_bfloats(unsigned x) {
  return shim_halves(x, [](unsigned h) { const float v = shim::bfloat_to_float(h); return shim::float_to_bfloat(v * v); });
}

}  // namespace gpuxbar
