// ptx: reads the PTX of a kernel and runs it under the shim.
//
// Every instruction is one line of the table in `instructions`; one that is not there is an error. So is whatever PTX
// leaves open or a GPU would fault on: products and sums without a rounding, which ptxas may contract; division by zero;
// accesses that are misaligned, outside the shared or local memory of the launch, or outside the arrays it was given;
// stores to arrays that it only reads; loads through the cache that is not coherent (ld.global.nc) of arrays that it
// writes; touches of shared memory by two threads, one of them a store, that no barrier of theirs orders (not where
// barriers in shared memory do, as on Hopper); touches of global memory by two blocks, one of them a store (not of arrays
// that atomic instructions have reached); lanes of a warp apart at what a warp executes as one (.aligned, bar.sync).
// Registers start as ones, NaN to a float. Dynamic shared memory follows the static arrays at a multiple of 16, all that
// may be counted on. Approximate instructions are as far off as PTX ISA is taken to allow. What is asynchronous, and what warps,
// blocks and clusters do together, is tensor.cpp's and hopper.cpp's; counts.hpp counts what is asked of memory. Not modelled:
// ptxas, ordering of memory, time.
#include <atomic>
#include <cfenv>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include "block.hpp"
#include "counts.hpp"
#include "halves.hpp"
#include "hopper.hpp"

namespace shim {
namespace {

using Text = std::string_view;
[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error(why); }

// ---- a program

struct Thread;
struct Ins {
  void (*run)(Thread&, const Ins&) = nullptr;
  const uint32_t* x = nullptr;  // operands: places in the register file, constants too
  int64_t offset = 0;           // of the address
  uint32_t guard = 0;           // a predicate
  bool wanted = true;           // what it must be
  size_t at = 0;                // of an instruction that the lanes of a warp execute as one, else 0
  Text text;
};
struct Param {
  size_t offset, size;
};
struct Program {
  std::string source;
  std::vector<Ins> code;
  std::vector<uint32_t> operands;
  std::vector<uint64_t> image;                             // of a thread's registers at its start
  std::vector<std::pair<uint32_t, std::string>> specials;  // registers that differ between threads
  std::vector<Param> params;
  std::vector<std::string> inlined;  // inline assembly
  std::vector<char> ran;             // which of it
  std::unique_ptr<Counts> counts;    // null: not asked for
  size_t param_bytes = 0, static_bytes = 0, local_bytes = 0;
  unsigned most_threads = 1024, cluster = 1;
  bool by_arrivals = false;  // whether it has barriers in shared memory, of which `touch_shared` knows nothing
};

struct Array {
  const char *begin, *end;
  uint64_t item;  // bytes
  uint64_t written;
};
// What blocks did to the items of an array that is written: one more than the number of the last that stored, and above
// that of the one that loaded, or ONES.
struct Touched {
  std::unique_ptr<std::atomic<uint64_t>[]> items;
  std::atomic<bool> counted{false};  // by atomic instructions, which order blocks
};
struct Launch {
  Program* program;
  std::vector<char> params;
  std::vector<Array> arrays;
  std::vector<Touched> touched;
};

// ---- shared memory: who touched it

constexpr uint64_t ONES = 0xFFFFFFFF;
constexpr int NOBODY = -1, SEVERAL = -2;
struct Touch {
  int thread = NOBODY, warp = NOBODY;
  unsigned barriers = 0, warp_barriers = 0;  // that its thread had met
};
// Whether nothing orders another thread's touch before one of `now`.
bool races(const Touch& other, const Touch& now) {
  if (other.thread == NOBODY || other.thread == now.thread || other.barriers != now.barriers) return false;
  return other.warp != now.warp || other.warp_barriers == now.warp_barriers;
}
struct Place {          // two bytes
  Touch written, read;  // the last ones
};
thread_local std::vector<Place> places;  // of a block

// ---- a thread

thread_local std::vector<Trace> traces;  // of a block, where they are counted

struct Thread {
  Launch& launch;
  uint64_t* r;
  std::vector<char> local;
  Lane& lane;
  Touch now;  // of what it does next
  Trace* trace;
  size_t pc = 0;

  void fail(const Ins& i, const std::string& why) {
    tls.blk->fail(std::string(i.text) + ": " + why);
    pc = launch.program->code.size();
  }
};
template <class T>
T get(const Thread& t, const Ins& i, int k) {
  T v;
  memcpy(&v, &t.r[i.x[k]], sizeof v);
  return v;
}
template <>
bool get<bool>(const Thread& t, const Ins& i, int k) {
  return t.r[i.x[k]] & 1;
}
template <class T>
void set(Thread& t, const Ins& i, int k, T v) {
  uint64_t& to = t.r[i.x[k]];
  if constexpr (std::is_integral_v<T>)
    to = uint64_t(v);  // extended by its sign, as ld and cvt do
  else
    to = 0, memcpy(&to, &v, sizeof v);
}

// Marks shared memory as touched; an error if that races with another thread of the block.
bool touch_shared(Thread& t, const Ins& i, size_t address, size_t bytes, bool write) {
  if (t.launch.program->by_arrivals) return true;
  for (size_t k = address / 2; k < (address + bytes + 1) / 2; ++k) {
    Place& place = places[k];
    if (races(place.written, t.now) || (write && races(place.read, t.now)))
      return t.fail(i, "race for shared address " + std::to_string(address)), false;
    Touch& last = write ? place.written : place.read;
    if (!write && last.barriers == t.now.barriers && last.thread != NOBODY && last.thread != t.now.thread) {
      if (last.warp != t.now.warp)
        last.thread = last.warp = SEVERAL;
      else if (last.warp_barriers == t.now.warp_barriers)
        last.thread = SEVERAL;
      else
        last = t.now;
    } else {
      last = t.now;
    }
  }
  return true;
}

enum Access { LOADS, LOADS_CACHED, STORES, COUNTS };  // by the cache that is not coherent; by atomic instructions

// Marks items as touched by this block; an error if another touched one and either stored, with nothing to order them.
bool touch_global(Thread& t, const Ins& i, size_t number, const char* at, size_t bytes, Access access) {
  const Array& array = t.launch.arrays[number];
  Touched& touched = t.launch.touched[number];
  if (access == COUNTS) touched.counted = true;
  const uint64_t block = 1 + tls.bid.x + uint64_t(tls.gdim.x) * (tls.bid.y + uint64_t(tls.gdim.y) * tls.bid.z);
  const size_t first = (at - array.begin) / array.item, end = (at + bytes - array.begin + array.item - 1) / array.item;
  for (size_t k = first; k < end && !touched.counted; ++k) {
    uint64_t old = touched.items[k], now;
    do {
      const uint64_t stored = old & ONES, loaded = old >> 32;
      if ((stored && stored != block) || (access == STORES && loaded && loaded != block)) {
        if (touched.counted) break;
        return t.fail(i, "race of blocks for item " + std::to_string(k) + " of an array"), false;
      }
      now = access == STORES ? loaded << 32 | block : (loaded && loaded != block ? ONES : block) << 32 | stored;
    } while (!touched.items[k].compare_exchange_weak(old, now));
  }
  return true;
}

enum Space { PARAM, GLOBAL, SHARED, LOCAL };
// Where the bytes of an address are; null, and an error, if they may not be accessed.
template <Space SPACE>
char* memory(Thread& t, const Ins& i, uint64_t address, size_t bytes, Access access) {
  if (SPACE == GLOBAL) {
    char* const p = reinterpret_cast<char*>(address);
    size_t found = t.launch.arrays.size();
    bool written = false;
    for (size_t k = 0; k < t.launch.arrays.size(); ++k) {
      const Array& a = t.launch.arrays[k];
      if (p >= a.begin && p + bytes <= a.end && !written) found = k, written = a.written;
    }
    if (found == t.launch.arrays.size()) return t.fail(i, "global address outside every array"), nullptr;
    if (access >= STORES && !written) return t.fail(i, "array that is declared as only read"), nullptr;
    if (access == LOADS_CACHED && written) return t.fail(i, "array that the launch writes"), nullptr;
    if (written && !touch_global(t, i, found, p, bytes, access)) return nullptr;
    if (t.trace) t.trace->pieces.push_back({uint32_t(found), uint32_t(bytes), uint64_t(p - t.launch.arrays[found].begin)});
    return p;
  }
  const size_t size = SPACE == SHARED ? tls.blk->dyn_size : SPACE == LOCAL ? t.local.size() : t.launch.params.size();
  if (SPACE == SHARED) address &= 0xFFFFFFFF;
  if (address + bytes > size || address > size)
    return t.fail(i,
                  "address " + std::to_string(address) + " outside the " + std::to_string(size) + " bytes there are"),
           nullptr;
  if (SPACE == SHARED && !touch_shared(t, i, address, bytes, access == STORES)) return nullptr;
  if (SPACE == SHARED && t.trace) t.trace->pieces.push_back({ON_CHIP, uint32_t(bytes), address});
  char* const first = SPACE == SHARED  ? reinterpret_cast<char*>(gx_smem)
                      : SPACE == LOCAL ? t.local.data()
                                       : t.launch.params.data();
  return first + address;
}
template <Space SPACE>
char* aligned(Thread& t, const Ins& i, int k, size_t bytes, Access access) {
  const uint64_t address = get<uint64_t>(t, i, k) + i.offset;
  if (address % bytes) return t.fail(i, "misaligned address " + std::to_string(address)), nullptr;
  return memory<SPACE>(t, i, address, bytes, access);
}
template <Space SPACE, class T, int N, Access ACCESS>
void load(Thread& t, const Ins& i) {
  const char* const from = aligned<SPACE>(t, i, N, N * sizeof(T), ACCESS);
  for (int k = 0; from && k < N; ++k) {
    T v;
    memcpy(&v, from + k * sizeof v, sizeof v);
    set(t, i, k, v);
  }
}
template <Space SPACE, class T, int N>
void store(Thread& t, const Ins& i) {
  char* const to = aligned<SPACE>(t, i, 0, N * sizeof(T), STORES);
  for (int k = 0; to && k < N; ++k) {
    const T v = get<T>(t, i, k + 1);
    memcpy(to + k * sizeof v, &v, sizeof v);
  }
}

// ---- arithmetic

template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return b < a ? b : a;
}
template <class T>
T most(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a < b ? b : a;
}
float down(float a, float b, float c) {  // rounded towards minus infinity
  volatile float x = a, y = b, z = c;
  fesetround(FE_DOWNWARD);
  volatile float sum = fmaf(x, y, z);
  fesetround(FE_TONEAREST);
  return sum;
}
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
// As far off as PTX ISA is taken to let a result be, one way or the other as the operand says.
float approximate(float x, double (*f)(double), double relative, double absolute) {
  const double exact = f(double(flushed(x)));
  if (std::isinf(exact)) return float(exact);
  const double off = std::max(std::fabs(exact) * relative, absolute);
  return flushed(float(uint32_t(bits(x)) * 0x9E3779B9u >> 31 ? exact + off : exact - off));
}
template <class T>
T saturated(float x) {
  constexpr double lowest = double(std::is_signed_v<T> ? INT_MIN : 0),
                   highest = double(std::is_signed_v<T> ? INT_MAX : UINT_MAX);
  return x != x ? T(0) : double(x) <= lowest ? T(lowest) : double(x) >= highest ? T(highest) : T(x);
}
uint32_t permute(uint64_t bytes, uint32_t selectors) {
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = selectors >> 4 * k & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (selector & 7)) & 0xFF;
    if (selector & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * k;
  }
  return result;
}
template <class T>
T inserted(T a, T b, uint32_t place, uint32_t count) {  // a's lowest bits into b
  constexpr uint32_t width = 8 * sizeof(T);
  T mask = 0;
  for (uint32_t k = place & 0xFF; k < width && k < (place & 0xFF) + (count & 0xFF); ++k) mask |= T(1) << k;
  return mask ? (a << (place & 0xFF) & mask) | (b & ~mask) : b;
}

// ---- the instructions

struct Form {
  void (*run)(Thread&, const Ins&);
  size_t operands;
  bool aligned;
};
using Table = std::unordered_map<std::string, Form>;

#define A(T, K) get<T>(t, i, K)
#define OP(NAME, OPERANDS, ...)              \
  ops[NAME] = {[](Thread& t, const Ins& i) { \
                 (void)t, (void)i;           \
                 __VA_ARGS__;                \
               },                            \
               OPERANDS, false}
#define ONE(NAME, T, ...) OP(NAME, 2, const T a = A(T, 1); set(t, i, 0, __VA_ARGS__))
#define TWO(NAME, T, ...) OP(NAME, 3, const T a = A(T, 1), b = A(T, 2); set(t, i, 0, __VA_ARGS__))
#define THREE(NAME, T, ...) OP(NAME, 4, const T a = A(T, 1), b = A(T, 2), c = A(T, 3); set(t, i, 0, __VA_ARGS__))

template <class T>
void of_any(Table& ops, const std::string& type) {
  ONE("mov." + type, T, a);
  OP("selp." + type, 4, set(t, i, 0, A(bool, 3) ? A(T, 1) : A(T, 2)));
}
template <class T>
void of_numbers(Table& ops, const std::string& type) {
  TWO("setp.eq." + type, T, a == b);
  TWO("setp.ne." + type, T, a < b || a > b);
  TWO("setp.lt." + type, T, a < b);
  TWO("setp.le." + type, T, a <= b);
  TWO("setp.gt." + type, T, a > b);
  TWO("setp.ge." + type, T, a >= b);
  TWO("min." + type, T, least(a, b));
  TWO("max." + type, T, most(a, b));
}
template <class T>
void of_integers(Table& ops, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  constexpr int width = 8 * sizeof(T);
  of_numbers<T>(ops, type);
  TWO("add." + type, T, T(uint64_t(a) + uint64_t(b)));
  TWO("sub." + type, T, T(uint64_t(a) - uint64_t(b)));
  TWO("mul.lo." + type, T, T(uint64_t(a) * uint64_t(b)));
  TWO("mul.hi." + type, T, T(Wide(a) * Wide(b) >> width));
  THREE("mad.lo." + type, T, T(uint64_t(a) * uint64_t(b) + uint64_t(c)));
  OP("div." + type, 3, const Wide b = A(T, 2); if (!b) return t.fail(i, "division by zero");
     set(t, i, 0, T(Wide(A(T, 1)) / b)));
  OP("rem." + type, 3, const Wide b = A(T, 2); if (!b) return t.fail(i, "division by zero");
     set(t, i, 0, T(Wide(A(T, 1)) % b)));
  OP("shr." + type, 3, const uint32_t n = A(uint32_t, 2); set(t, i, 0, T(Wide(A(T, 1)) >> (n < width ? n : width))));
  if constexpr (std::is_signed_v<T>) {
    ONE("neg." + type, T, T(-U(a)));
    ONE("abs." + type, T, a < 0 ? T(-U(a)) : a);
  }
  if constexpr (width < 64) {
    using Twice = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    using To = std::conditional_t<width == 32, Twice, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
    TWO("mul.wide." + type, T, To(Twice(a) * Twice(b)));
  }
  ONE("cvt.u16." + type, T, uint16_t(a));
  ONE("cvt.s16." + type, T, int16_t(a));
  ONE("cvt.u32." + type, T, uint32_t(a));
  ONE("cvt.s32." + type, T, int32_t(a));
  ONE("cvt.u64." + type, T, uint64_t(a));
  ONE("cvt.s64." + type, T, int64_t(a));
  ONE("cvt.rn.f32." + type, T, float(a));
  ONE("cvt.rn.f64." + type, T, double(a));
}
template <class T>
void of_bits(Table& ops, const std::string& type) {
  of_any<T>(ops, type);
  TWO("and." + type, T, T(a & b));
  TWO("or." + type, T, T(a | b));
  TWO("xor." + type, T, T(a ^ b));
  TWO("setp.eq." + type, T, a == b);
  TWO("setp.ne." + type, T, a != b);
  if constexpr (std::is_same_v<T, bool>) {
    ONE("not." + type, T, !a);
  } else {
    ONE("not." + type, T, T(~a));
    OP("shl." + type, 3, const uint32_t n = A(uint32_t, 2); set(t, i, 0, n < 8 * sizeof(T) ? T(A(T, 1) << n) : T(0)));
  }
}
template <class T>
void of_floats(Table& ops, const std::string& type) {
  of_any<T>(ops, type);
  of_numbers<T>(ops, type);
  TWO("setp.neu." + type, T, a != b);
  TWO("setp.equ." + type, T, !(a < b || a > b));
  TWO("setp.ltu." + type, T, !(a >= b));
  TWO("setp.leu." + type, T, !(a > b));
  TWO("setp.gtu." + type, T, !(a <= b));
  TWO("setp.geu." + type, T, !(a < b));
  TWO("add.rn." + type, T, a + b);
  TWO("sub.rn." + type, T, a - b);
  TWO("mul.rn." + type, T, a * b);
  TWO("div.rn." + type, T, a / b);
  THREE("fma.rn." + type, T, std::fma(a, b, c));
  ONE("rcp.rn." + type, T, T(1) / a);
  ONE("neg." + type, T, -a);
  ONE("abs." + type, T, std::fabs(a));
  TWO("copysign." + type, T, std::copysign(b, a));
}

template <Space SPACE, class T>
void of_memory(Table& ops, const std::string& space, const std::string& type) {
  const std::string to = space + type, two = space + "v2." + type, four = space + "v4." + type;
  ops["ld." + to] = {&load<SPACE, T, 1, LOADS>, 2, false};
  ops["ld." + two] = {&load<SPACE, T, 2, LOADS>, 3, false};
  if constexpr (sizeof(T) < 8) ops["ld." + four] = {&load<SPACE, T, 4, LOADS>, 5, false};
  if constexpr (SPACE == GLOBAL) {
    ops["ld.global.nc." + type] = {&load<SPACE, T, 1, LOADS_CACHED>, 2, false};
    ops["ld.global.nc.v2." + type] = {&load<SPACE, T, 2, LOADS_CACHED>, 3, false};
    if constexpr (sizeof(T) < 8) ops["ld.global.nc.v4." + type] = {&load<SPACE, T, 4, LOADS_CACHED>, 5, false};
  }
  if constexpr (SPACE == SHARED) {
    ops["ld.volatile." + to] = {&load<SPACE, T, 1, LOADS>, 2, false};
    ops["st.volatile." + to] = {&store<SPACE, T, 1>, 2, false};
  }
  if constexpr (SPACE != PARAM) {
    ops["st." + to] = {&store<SPACE, T, 1>, 2, false};
    ops["st." + two] = {&store<SPACE, T, 2>, 3, false};
    if constexpr (sizeof(T) < 8) ops["st." + four] = {&store<SPACE, T, 4>, 5, false};
  }
}
template <class T>
void of_memories(Table& ops, const std::string& type) {
  of_memory<PARAM, T>(ops, "param.", type);
  of_memory<GLOBAL, T>(ops, "global.", type);
  of_memory<SHARED, T>(ops, "shared.", type);
  of_memory<LOCAL, T>(ops, "local.", type);
}
template <class T>
void of_atomics(Table& ops, const std::string& type) {
#define ATOM(NAME, ...)                                           \
  OP("atom.global." NAME "." + type, 3, const T b = A(T, 2);      \
     char* const p = aligned<GLOBAL>(t, i, 1, sizeof(T), COUNTS); \
     if (p) set(t, i, 0, shim_rmw(reinterpret_cast<T*>(p), [=](T a) { return T(__VA_ARGS__); })))
  ATOM("add", a + b);
  ATOM("max", most(a, b));
#undef ATOM
}

// An address in the shared memory of a block of the cluster, as mapa gives it.
uint32_t in_cluster(uint32_t address, uint32_t rank) { return (rank + 1) << 24 | address; }

// The value of lane `from`, or the thread's own where that lies past the end of its segment.
void shuffled(Thread& t, const Ins& i, uint32_t from) {
  const uint32_t lane = tls.lin & 31, last = A(uint32_t, 4) & 31, segment = A(uint32_t, 4) >> 8 & 31;
  const bool inside = from <= ((lane & segment) | (last & ~segment));
  const auto value = warp_op(Op::Shfl, A(uint32_t, 5), A(uint32_t, 2), inside ? from : lane);
  set(t, i, 0, uint32_t(value));
  set(t, i, 1, inside);
}

template <class T>
void multiplied(Thread& t, const Ins& i, void (*product)(T (&)[4], const unsigned (&)[4], unsigned, unsigned)) {
  T c[4];
  unsigned a[4];
  for (int k = 0; k < 4; ++k) a[k] = A(uint32_t, 4 + k), c[k] = A(T, 10 + k);
  product(c, a, A(uint32_t, 8), A(uint32_t, 9));
  for (int k = 0; k < 4; ++k) set(t, i, k, c[k]);
}
// `registers` of the left operand, or 0; then the right operand's descriptor, whether to add, and constants.
template <int REGISTERS, int CONSTANTS>
void multiplied_by_warpgroup(Thread& t, const Ins& i) {
  Multiply mine{};
  for (int k = 0; k < 64; ++k) mine.c[k] = reinterpret_cast<float*>(&t.r[i.x[k]]);
  for (int k = 0; k < REGISTERS; ++k) mine.registers[k] = reinterpret_cast<uint32_t*>(&t.r[i.x[64 + k]]);
  int next = 64 + REGISTERS;
  if (!REGISTERS) mine.a = A(uint64_t, next++);
  mine.b = A(uint64_t, next), mine.add = A(bool, next + 1);
  for (int k = 0; k < CONSTANTS; ++k)  // not negated, not transposed
    if (A(uint32_t, next + 2 + k) != (k < 2)) return t.fail(i, "signs and transpositions are not modelled");
  multiply(mine);
}

Table instructions() {
  Table ops;
  of_bits<bool>(ops, "pred");
  of_bits<uint16_t>(ops, "b16"), of_bits<uint32_t>(ops, "b32"), of_bits<uint64_t>(ops, "b64");
  of_any<uint16_t>(ops, "u16"), of_any<uint32_t>(ops, "u32"), of_any<uint64_t>(ops, "u64");
  of_any<int16_t>(ops, "s16"), of_any<int32_t>(ops, "s32"), of_any<int64_t>(ops, "s64");
  of_integers<uint16_t>(ops, "u16"), of_integers<uint32_t>(ops, "u32"), of_integers<uint64_t>(ops, "u64");
  of_integers<int16_t>(ops, "s16"), of_integers<int32_t>(ops, "s32"), of_integers<int64_t>(ops, "s64");
  of_floats<float>(ops, "f32"), of_floats<double>(ops, "f64");
  of_memories<uint8_t>(ops, "u8"), of_memories<uint16_t>(ops, "u16"), of_memories<uint32_t>(ops, "u32"),
      of_memories<uint64_t>(ops, "u64");
  of_memories<int8_t>(ops, "s8"), of_memories<int16_t>(ops, "s16"), of_memories<int32_t>(ops, "s32"),
      of_memories<int64_t>(ops, "s64");
  of_memories<float>(ops, "f32"), of_memories<double>(ops, "f64");
  of_atomics<uint32_t>(ops, "u32"), of_atomics<uint64_t>(ops, "u64");

  ONE("cvta.to.global.u64", uint64_t, a);
  ONE("popc.b32", uint32_t, uint32_t(__builtin_popcount(a)));
  OP("mov.b32.pack", 3, set(t, i, 0, A(uint16_t, 1) | uint32_t(A(uint16_t, 2)) << 16));
  OP("mov.b32.unpack", 3, const uint32_t a = A(uint32_t, 2); set(t, i, 0, uint16_t(a));
     set(t, i, 1, uint16_t(a >> 16)));
  OP("mov.b64.pack", 3, set(t, i, 0, A(uint32_t, 1) | uint64_t(A(uint32_t, 2)) << 32));
  OP("mov.b64.unpack", 3, const uint64_t a = A(uint64_t, 2); set(t, i, 0, uint32_t(a));
     set(t, i, 1, uint32_t(a >> 32)));
  OP("bfi.b32", 5, set(t, i, 0, inserted(A(uint32_t, 1), A(uint32_t, 2), A(uint32_t, 3), A(uint32_t, 4))));
  OP("bfi.b64", 5, set(t, i, 0, inserted(A(uint64_t, 1), A(uint64_t, 2), A(uint32_t, 3), A(uint32_t, 4))));
  OP("prmt.b32", 4, set(t, i, 0, permute(A(uint32_t, 1) | uint64_t(A(uint32_t, 2)) << 32, A(uint32_t, 3))));

  ONE("cvt.s8.s32", int32_t, int8_t(a));
  ONE("cvt.s16.s8", int8_t, int16_t(a));
  ONE("cvt.s32.s8", int8_t, int32_t(a));
  ONE("cvt.s64.s8", int8_t, int64_t(a));
  ONE("cvt.rni.f32.f32", float, rintf(a));
  ONE("cvt.rmi.f32.f32", float, floorf(a));
  ONE("cvt.rzi.s32.f32", float, saturated<int32_t>(truncf(a)));
  ONE("cvt.sat.f32.f32", float, a > 0 ? a < 1 ? a : 1.0f : 0.0f);
  TWO("add.rn.sat.f32", float, a + b > 0 ? a + b < 1 ? a + b : 1.0f : 0.0f);
  TWO("min.relu.s32", int32_t, most(least(a, b), 0));
  ONE("cvt.f64.f32", float, double(a));
  ONE("cvt.rn.f32.f64", double, float(a));
  ONE("cvt.f32.f16", uint16_t, half_to_float(a));
  ONE("cvt.rn.f16.f32", float, uint16_t(float_to_half(a)));
  TWO("cvt.rn.bf16x2.f32", float, uint32_t(float_to_bfloat(a) << 16 | float_to_bfloat(b)));
  TWO("add.rn.f16x2", uint32_t, uint32_t(gpuxbar::add_halves(a, b)));
  THREE("fma.rm.f32", float, down(a, b, c));
  ONE("sqrt.approx.ftz.f32", float, approximate(a, sqrt, 0x1p-23, 0));
  ONE("rcp.approx.ftz.f32", float, approximate(a, [](double x) { return 1 / x; }, 0x1p-23, 0));
  ONE("ex2.approx.ftz.f32", float, approximate(a, exp2, 0x1p-22, 0));
  ONE("lg2.approx.ftz.f32", float,
      approximate(a, log2, a > 0.5f && a < 2 ? 0 : 0x1p-22, a > 0.5f && a < 2 ? 0x1p-22 : 0));
  ONE("sin.approx.ftz.f32", float, approximate(a, sin, 0, 0x1.6a09e6p-21));  // 2^-20.5, of less than a turn
  ONE("cos.approx.ftz.f32", float, approximate(a, cos, 0, 0x1.6a09e6p-21));

  OP("bra", 1, t.pc = A(uint64_t, 0));
  ops["bra.uni"] = ops["bra"];
  OP("ret", 0, t.pc = t.launch.program->code.size());
  OP(".asm", 1, t.launch.program->ran[A(uint64_t, 0)] = 1);

  OP("bar.sync", 1, if (A(uint32_t, 0)) return t.fail(i, "a barrier of its own is not modelled");
     bar(1, nullptr, nullptr); ++t.now.barriers);
  ops["bar.sync"].aligned = true;
  OP("bar.warp.sync", 1, warp_op(Op::Sync, A(uint32_t, 0), 0); ++t.now.warp_barriers);
  OP("shfl.sync.bfly.b32", 6, shuffled(t, i, (tls.lin & 31) ^ (A(uint32_t, 3) & 31)));
  OP("shfl.sync.idx.b32", 6, const uint32_t segment = A(uint32_t, 4) >> 8 & 31;
     shuffled(t, i, (tls.lin & segment) | (A(uint32_t, 3) & 31 & ~segment)));

  OP("cp.async.cg.shared.global.L2::128B", 4, const uint32_t bytes = A(uint32_t, 3);
     if (A(uint32_t, 2) != 16 || (bytes != 0 && bytes != 16)) return t.fail(i, "not of 16 bytes or none");
     if (!memory<SHARED>(t, i, A(uint32_t, 0), 16, STORES)) return;
     if (!bytes || memory<GLOBAL>(t, i, A(uint64_t, 1), 16, LOADS))
         gpuxbar::copy_async(A(uint32_t, 0), A(const void*, 1), bytes));
  OP("cp.async.commit_group", 0, gpuxbar::copy_commit());
  OP("cp.async.wait_group", 1, gpuxbar::copy_wait(A(int, 0)));
  OP("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 5, const uint32_t from = A(uint32_t, 4);
     if (!memory<SHARED>(t, i, from, 16, LOADS)) return; unsigned r[4]; gpuxbar::load_matrices(r, from);
     for (int k = 0; k < 4; ++k) set(t, i, k, r[k]));
  OP("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 14, multiplied<float>(t, i, gpuxbar::multiply_half));
  OP("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 14, multiplied<float>(t, i, gpuxbar::multiply_bfloat));
  OP("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", 14, multiplied<int>(t, i, gpuxbar::multiply_bytes));

  OP("mbarrier.init.shared::cta.b64", 2, gpuxbar::barrier_init(A(uint32_t, 0), A(uint32_t, 1)));
  OP("mbarrier.arrive.shared::cta.b64", 2, gpuxbar::barrier_arrive(A(uint32_t, 1)));
  OP("mbarrier.arrive.expect_tx.shared::cta.b64", 3, gpuxbar::barrier_expect(A(uint32_t, 1), A(uint32_t, 2)));
  OP("mbarrier.try_wait.parity.shared::cta.b64", 3, gpuxbar::barrier_wait(A(uint32_t, 1), A(uint32_t, 2));
     set(t, i, 0, true));
  OP("mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64", 3,
     gpuxbar::barrier_wait_cluster(A(uint32_t, 1), A(uint32_t, 2));
     set(t, i, 0, true));
  OP("mapa.shared::cluster.u32", 3, set(t, i, 0, in_cluster(A(uint32_t, 1), A(uint32_t, 2))));
  OP("mbarrier.arrive.relaxed.cluster.shared::cluster.b64", 2, const uint32_t there = A(uint32_t, 1);
     if (!(there >> 24)) return t.fail(i, "not an address that mapa gives");
     gpuxbar::barrier_arrive_at(there & 0xFFFFFF, (there >> 24) - 1));
  OP("fence.mbarrier_init.release.cluster", 0, gpuxbar::barrier_fence());
  OP("fence.proxy.async.shared::cta", 0, gpuxbar::async_fence());
  OP("fence.release.sync_restrict::shared::cta.cluster", 0, (void)0);
  OP("fence.acquire.sync_restrict::shared::cluster.cluster", 0, (void)0);
  OP("barrier.cluster.arrive.release", 0, (void)0);  // the wait does both
  OP("barrier.cluster.wait.acquire", 0, gpuxbar::cluster_barrier());
  OP("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", 4, const uint32_t bytes = A(uint32_t, 2);
     if (memory<GLOBAL>(t, i, A(uint64_t, 1), bytes, LOADS))
         gpuxbar::copy_bulk(A(uint32_t, 0), A(const void*, 1), bytes, A(uint32_t, 3)));
  OP("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster", 5,
     const uint32_t bytes = A(uint32_t, 2);
     if (memory<GLOBAL>(t, i, A(uint64_t, 1), bytes, LOADS))
         gpuxbar::copy_bulk_to(A(uint16_t, 4), A(uint32_t, 0), A(const void*, 1), bytes, A(uint32_t, 3)));
  OP("setmaxnreg.dec.sync.aligned.u32", 1, gpuxbar::registers_change(A(uint32_t, 0), false));
  OP("setmaxnreg.inc.sync.aligned.u32", 1, gpuxbar::registers_change(A(uint32_t, 0), true));
  OP("wgmma.fence.sync.aligned", 0, gpuxbar::products_fence());
  OP("wgmma.commit_group.sync.aligned", 0, gpuxbar::products_commit());
  OP("wgmma.wait_group.sync.aligned", 1, gpuxbar::products_wait(A(int, 0)));
  ops["wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"] = {&multiplied_by_warpgroup<0, 4>, 71, false};
  ops["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"] = {&multiplied_by_warpgroup<4, 3>, 73, false};
  for (auto& [name, form] : ops) form.aligned |= name.find(".sync.aligned") != name.npos;
  return ops;
}

uint64_t special(Text name) {
  const Ctx& c = tls;
  const std::pair<Text, const uint3*> triples[] = {
      {"%tid", &c.tid}, {"%ntid", &c.bdim}, {"%ctaid", &c.bid}, {"%nctaid", &c.gdim}};
  for (const auto& [triple, at] : triples)
    if (name.size() == triple.size() + 2 && name.substr(0, triple.size()) == triple) switch (name.back()) {
        case 'x':
          return at->x;
        case 'y':
          return at->y;
        case 'z':
          return at->z;
      }
  if (name == "%cluster_ctarank") return gpuxbar::cluster_rank();
  refuse("no special register " + std::string(name));
}

void run(void* of) {
  Launch& launch = *static_cast<Launch*>(of);
  const Program& program = *launch.program;
  const auto registers = std::make_unique<uint64_t[]>(program.image.size());
  memcpy(registers.get(), program.image.data(), 8 * program.image.size());
  for (const auto& [place, name] : program.specials) registers[place] = special(name);
  if (program.counts && tls.blk->next == 1) traces.assign(tls.blk->lane.size(), {});
  Trace* const trace = program.counts ? &traces[tls.lin] : nullptr;
  Thread t{launch,    registers.get(),       std::vector<char>(program.local_bytes, char(0xFF)),
           *tls.lane, {tls.lin, tls.lin / 32}, trace};
  if (tls.blk->next == 1) places.assign(tls.blk->dyn_size / 2 + 1, {});  // the first thread of its block
  const size_t end = program.code.size();
  while (t.pc < end) {
    const Ins& i = program.code[t.pc++];
    if (trace) trace->steps.push_back({uint32_t(&i - program.code.data()), 0});
    if ((t.r[i.guard] & 1) == i.wanted) {
      const size_t step = trace ? trace->steps.size() - 1 : 0, before = trace ? trace->pieces.size() : 0;
      t.lane.at = i.at;
      i.run(t, i);
      if (trace) trace->steps[step].pieces = uint32_t(trace->pieces.size() - before);
    }
  }
  if (trace && tls.blk->alive == 1 && tls.blk->err.empty()) program.counts->add(traces);  // the last one of its block
}

// ---- reading a program

Text trimmed(Text text) {
  const size_t first = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
  return first == text.npos ? Text() : text.substr(first, last - first + 1);
}
std::vector<Text> words(Text text, const char* between) {
  std::vector<Text> found;
  for (size_t at = 0, end; (at = text.find_first_not_of(between, at)) != text.npos; at = end) {
    end = std::min(text.find_first_of(between, at), text.size());
    found.push_back(text.substr(at, end - at));
  }
  return found;
}
uint64_t number(Text text) {  // an integer, or the bits of a float
  const std::string digits(text);
  const bool real = digits.size() > 2 && digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'd');
  char* end;
  const uint64_t value = real ? strtoull(digits.c_str() + 2, &end, 16) : strtoull(digits.c_str(), &end, 0);
  if (digits.empty() || *end) refuse("unknown operand " + digits);
  return value;
}
size_t bytes_of(Text type) { return number(type.substr(2)) / 8; }  // .u32 and the like

class Reader {
 public:
  Reader(Program& into, const Table& table) : p(into), ops(table) { p.image = {1}; }  // 0: the guard that always holds

  void read(const std::string& entry) {
    const Text text = p.source;
    const size_t start = text.find(".visible .entry " + entry + "(");
    if (start == text.npos) refuse("no entry " + entry);
    scopes.emplace_back();
    for (const Text line : words(text.substr(0, text.find(".visible .entry")), "\n"))
      if (const Text it = trimmed(line); !it.empty() && it.substr(0, 2) != "//") declare(it.substr(0, it.find(';')));
    const size_t open = text.find('(', start), close = text.find("\n)", open), body = text.find("\n{", close);
    for (const Text each : words(text.substr(open + 1, close - open - 1), ",")) parameter(words(each, " \t\n[]"));
    for (const Text line : words(text.substr(close + 2, body - close - 2), "\n")) declare(line);
    statements(text, body + 2);
    for (const auto& [name, place] : targets) {
      const auto label = labels.find(name);
      if (label == labels.end()) refuse("no label " + std::string(name));
      p.image[place] = label->second;
    }
    p.static_bytes = (p.static_bytes + 15) / 16 * 16;
    if (dynamic) p.image[dynamic] = p.static_bytes;
    for (size_t k = 0; k < p.code.size(); ++k) p.code[k].x = p.operands.data() + firsts[k];
    p.ran.assign(p.inlined.size(), 0);
  }

 private:
  Program& p;
  const Table& ops;
  std::vector<std::unordered_map<Text, uint32_t>> scopes;            // names, to registers and constants
  std::unordered_map<Text, std::pair<uint32_t, uint64_t>> families;  // %r<5>: its first register, and how many
  std::unordered_map<uint64_t, uint32_t> constants;
  std::unordered_map<Text, uint32_t> targets;
  std::unordered_map<Text, uint64_t> labels;
  std::vector<size_t> firsts;  // of the operands of each instruction
  uint32_t dynamic = 0;

  uint32_t place(uint64_t value) { return p.image.push_back(value), uint32_t(p.image.size() - 1); }
  uint32_t constant(uint64_t value) {
    const auto [at, fresh] = constants.try_emplace(value);
    if (fresh) at->second = place(value);
    return at->second;
  }

  void parameter(const std::vector<Text>& of) {  // .param .u64 (.ptr .align 1) name, or .param .align 8 .b8 name[24]
    const bool array = of[1] == ".align";
    const size_t size = bytes_of(of[array ? 3 : 1]) * (array ? number(of.back()) : 1),
                 unit = array ? number(of[2]) : size;
    p.param_bytes = (p.param_bytes + unit - 1) / unit * unit;
    scopes[0][array ? of[4] : of.back()] = constant(p.param_bytes);
    p.params.push_back({p.param_bytes, size});
    p.param_bytes += size;
  }

  void declare(Text line) {
    const std::vector<Text> of = words(line, " \t,[]<>");
    for (const Text plain : {".version", ".target", ".address_size", ".minnctapersm", ".explicitcluster", ".pragma",
                             ".global"})  // constants that are folded: not known by name, so that a use is an error
      if (of[0] == plain) return;
    if (of[0] == ".maxntid" || of[0] == ".reqnctapercluster") {
      unsigned& product = of[0] == ".maxntid" ? p.most_threads : p.cluster;
      product = 1;  // of as many numbers as are given
      for (size_t k = 1; k < of.size(); ++k) product *= unsigned(number(of[k]));
    } else if (of[0] == ".reg" && line.back() == '>') {  // .reg .b32 %r<5>
      families[of[2]] = {uint32_t(p.image.size()), number(of[3])};
      p.image.resize(p.image.size() + number(of[3]), ~0ull);
    } else if (of[0] == ".reg") {
      for (size_t k = 2; k < of.size(); ++k) scopes.back()[of[k]] = place(~0ull);
    } else if (of[0] == ".extern" && of[1] == ".shared") {
      scopes[0][of[5]] = dynamic = place(0);
    } else if (of[0] == ".shared" || of[0] == ".local") {  // .shared .align 4 .b8 name[16]
      size_t& total = of[0] == ".shared" ? p.static_bytes : p.local_bytes;
      const size_t unit = number(of[2]);
      total = (total + unit - 1) / unit * unit;
      scopes.back()[of[4]] = constant(total);
      total += bytes_of(of[3]) * number(of[5]);
    } else {
      refuse("unknown declaration " + std::string(line));
    }
  }

  void statements(Text text, size_t at) {  // of a body that has been opened
    size_t inline_from = 0;
    scopes.emplace_back();
    for (size_t end; scopes.size() > 1; at = end) {
      at = text.find_first_not_of(" \t\n", at);
      const Text rest = text.substr(at);
      if (rest.substr(0, 2) == "//") {
        end = text.find('\n', at);
        if (rest.substr(0, 19) == "// begin inline asm") {
          inline_from = end;
          add({}, ".asm", {constant(p.inlined.size())});
        } else if (rest.substr(0, 17) == "// end inline asm") {
          p.inlined.emplace_back(trimmed(text.substr(inline_from, at - inline_from)));
        }
      } else if (rest[0] == '{') {
        scopes.emplace_back(), end = at + 1;
      } else if (rest[0] == '}') {
        scopes.pop_back(), end = at + 1;
      } else if (rest[0] == '$') {
        end = text.find(':', at) + 1;
        labels[text.substr(at, end - 1 - at)] = p.code.size();
      } else {
        end = text.find(';', at) + 1;
        const Text statement = text.substr(at, end - 1 - at);
        if (rest[0] == '.')
          declare(statement);
        else
          instruction(statement);
      }
    }
  }

  void instruction(const Text text) {
    Ins ins;
    ins.text = text;
    Text rest = text;
    if (rest[0] == '@') {
      ins.wanted = rest[1] != '!';
      const size_t name = ins.wanted ? 1 : 2, end = rest.find_first_of(" \t");
      ins.guard = operand(rest.substr(name, end - name));
      rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
    std::string name(rest.substr(0, end));
    rest = trimmed(rest.substr(end));
    if ((name == "mov.b32" || name == "mov.b64") && rest.find('{') != rest.npos)
      name += rest[0] == '{' ? ".unpack" : ".pack";
    std::vector<uint32_t> x;
    for (Text each : words(rest, " \t\n,{}[]|")) {
      if (const size_t plus = each.find('+'); plus != each.npos) {
        ins.offset = int64_t(number(each.substr(plus + 1)));
        each = each.substr(0, plus);
      }
      x.push_back(operand(each));
    }
    if (ins.offset && name.substr(0, 2) != "ld" && name.substr(0, 2) != "st" && name.substr(0, 4) != "atom")
      refuse("offset of an address: " + std::string(text));
    add(ins, name, x);
  }
  void add(Ins ins, const std::string& name, const std::vector<uint32_t>& x) {
    const auto form = ops.find(name);
    if (form == ops.end()) refuse("unknown instruction: " + std::string(ins.text));
    if (x.size() != form->second.operands) refuse("not the operands that it takes: " + std::string(ins.text));
    p.by_arrivals |= name.substr(0, 9) == "mbarrier.";
    ins.run = form->second.run;
    ins.at = form->second.aligned ? p.code.size() + 1 : 0;
    firsts.push_back(p.operands.size());
    p.operands.insert(p.operands.end(), x.begin(), x.end());
    p.code.push_back(ins);
  }

  uint32_t operand(Text name) {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    if (name == "_") return scopes[0][name] = place(0);
    if (name[0] == '$') {
      const auto [at, fresh] = targets.try_emplace(name);
      if (fresh) at->second = place(0);
      return at->second;
    }
    if (name[0] != '%') return constant(number(name));
    if (name.find('.') != name.npos || name == "%cluster_ctarank") {
      p.specials.emplace_back(place(0), name);
      return scopes[0][name] = p.specials.back().first;
    }
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    const auto family = families.find(name.substr(0, digits));
    if (family == families.end()) refuse("no register " + std::string(name));
    const uint64_t index = number(name.substr(digits));
    if (index >= family->second.second) refuse("no register " + std::string(name));
    return family->second.first + uint32_t(index);
  }
};

// What may follow each instruction of a program.
std::vector<std::vector<uint32_t>> followers(const Program& program) {
  std::vector<std::vector<uint32_t>> of;
  for (const Ins& i : program.code) {
    const auto at = uint32_t(of.size());
    const Text name = i.guard ? trimmed(i.text.substr(i.text.find_first_of(" \t"))) : i.text;
    const bool branches = name.substr(0, 3) == "bra", ends = name.substr(0, 3) == "ret";
    of.emplace_back();
    if (branches) of.back().push_back(uint32_t(program.image[i.x[0]]));
    if (ends) of.back().push_back(uint32_t(program.code.size()));
    if (i.guard || !(branches || ends)) of.back().push_back(at + 1);
  }
  return of;
}

int report(const std::string& why, char* error, size_t room) { return snprintf(error, room, "%s", why.c_str()), 1; }
}  // namespace
}  // namespace shim

#pragma GCC visibility push(default)
extern "C" {

// The program of an entry of a text, never to be freed; null, and why, if it cannot be run.
void* ptx_load(const char* text, const char* entry, char* error, size_t room) {
  static const shim::Table table = shim::instructions();
  auto program = std::make_unique<shim::Program>();
  program->source = text;
  try {
    shim::Reader(*program, table).read(entry);
  } catch (const std::exception& why) {
    return shim::report(why.what(), error, room), nullptr;
  }
  return program.release();
}

// `values`, of `sizes` bytes, are the parameters; `array`s what may be touched; `most_dynamic` what the launcher has asked for.
int ptx_launch(void* of, const unsigned* grid, const unsigned* block, size_t dynamic_bytes, size_t most_dynamic,
               size_t count, const void* const* values, const size_t* sizes, size_t arrays, const shim::Array* array,
               uint64_t order, int eager, char* error, size_t room) {
  auto& program = *static_cast<shim::Program*>(of);
  const size_t shared = program.static_bytes + dynamic_bytes;
  if (block[0] * block[1] * block[2] > program.most_threads)
    return shim::report("more threads than .maxntid", error, room);
  if (shared > 48 << 10 && dynamic_bytes > most_dynamic)
    return shim::report("more shared memory than a kernel gets unasked", error, room);
  if (count != program.params.size())
    return shim::report("takes " + std::to_string(program.params.size()) + " parameters", error, room);
  shim::Launch launch{
      &program, std::vector<char>(program.param_bytes), {array, array + arrays}, std::vector<shim::Touched>(arrays)};
  for (size_t k = 0; k < arrays; ++k)
    if (array[k].written)
      launch.touched[k].items =
          std::make_unique<std::atomic<uint64_t>[]>((array[k].end - array[k].begin) / array[k].item);
  for (size_t k = 0; k < count; ++k) {
    const shim::Param param = program.params[k];
    if (param.size != sizes[k])
      return shim::report("parameter " + std::to_string(k) + " takes " + std::to_string(param.size) + " bytes", error,
                          room);
    memcpy(launch.params.data() + param.offset, values[k], param.size);
  }
  return shim::launch(&shim::run, int(program.cluster), grid, block, shared, reinterpret_cast<void**>(&launch), order,
                      eager, error, room);
}

// The k-th piece of inline assembly, and whether it has been run; null after the last.
const char* ptx_inlined(void* of, size_t k, int* ran) {
  const auto& program = *static_cast<shim::Program*>(of);
  if (k >= program.inlined.size()) return nullptr;
  *ran = program.ran[k];
  return program.inlined[k].c_str();
}

// Whether launches of a program are counted from now on.
void ptx_count(void* of, int whether) {
  auto& program = *static_cast<shim::Program*>(of);
  program.counts = whether ? std::make_unique<shim::Counts>(shim::followers(program)) : nullptr;
}

// The text of the k-th instruction and the numbers of its `Count`; null after the last.
const char* ptx_counted(void* of, size_t k, uint64_t* numbers) {
  static thread_local std::string text;
  const auto& program = *static_cast<shim::Program*>(of);
  if (k >= program.code.size()) return nullptr;
  memcpy(numbers, &program.counts->of[k], sizeof(shim::Count));
  text = program.code[k].text;
  return text.c_str();
}

}  // extern "C"
#pragma GCC visibility pop
