// block: what a block of threads and a cluster of blocks have under way. See shim.hpp.
#pragma once
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>
#include "shim.hpp"

namespace shim {
enum class St : uint8_t { Run, Bar, Warp, Poll, Done };
struct Copy { unsigned to; unsigned char data[16]; };  // an asynchronous copy under way: see tensor.cpp

struct Lane {  // one CUDA thread
  void* sp = nullptr;  // saved stack pointer of the fiber it blocked on
  St st = St::Done;
  Op op; uint32_t mask; uint64_t val, res; int src; int pred;
  size_t at = 0;  // which instruction waits, where all lanes of a warp must execute the same
  void (*call)(void**) = nullptr;  // of Op::Call
  bool late = false;               // Op::Call that ends only when nothing else can go on
  bool (*ready)(const Lane&);      // of St::Poll, of val and res
  std::vector<Copy> open; std::vector<std::vector<Copy>> groups;
};
// Of hopper.cpp, for each block: at its start, to let one event under way happen, at its end, when a thread's copy starts and lands,
// and when a warp reads its places.
struct Hooks {
  void (*begin)() = [] {};
  bool (*happen)() = [] { return false; };
  void (*end)() = [] {};
  void (*copying)(unsigned) = [](unsigned) {};
  void (*landed)(unsigned) = [](unsigned) {};
  void (*reading)(const unsigned*) = [](const unsigned*) {};
};
extern Hooks hooks;

struct Cluster {  // blocks that take turns; whoever has the turn may touch everything
  std::mutex mutex; std::condition_variable changed;
  const int size;
  std::vector<Block*> blocks; std::vector<char> ended; bool failed = false;
  std::vector<void*> state;         // of hopper.cpp, of blocks that have begun
  int turn = 0, idle = 0;           // idle: blocks passed over since anything happened
  unsigned arrived = 0, phase = 0;  // of the cluster's barrier
  explicit Cluster(int n) : size(n), blocks(n), ended(n), state(n) {}
  void take(int rank) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == rank; });
  }
  bool pass(int rank) {  // to the next block that has not ended; whether there is another
    for (int i = 1; i < size; ++i)
      if (const int next = (rank + i) % size; !ended[next]) {
        { std::lock_guard<std::mutex> lock(mutex); turn = next; }
        changed.notify_all();
        return true;
      }
    return false;
  }
  int alive() const;  // threads
};

struct Block {  // of one OS thread, reused for every block it runs in a launch
  std::vector<Lane> lane; std::vector<int> perm;
  void* main_sp = nullptr; int nt = 0, next = 0, alive = 0; std::string err;
  void (*call)(void*) = nullptr; void* call_arg = nullptr;
  size_t dyn_size = 0; bool eager = false, greedy = false;
  Cluster* cluster = nullptr; int rank = 0;

  void fail(const std::string& why) { if (err.empty()) err = why; }
  bool run();  // one block; false: err says why
  void block_here(St s);

 private:
  void enter(int t);
  static void body();  // a fiber: runs threads to completion until none is left to start
  void resume(int t);
  bool warp_try(int w, bool late = false);  // complete any warp op of warp w whose participants have all arrived
  void finish(int lo, int n, uint32_t mask, Op op);
};

void warp_call(void* arg, void (*call)(void**), bool late = false);  // the whole warp's arguments, once all have arrived
void wait_until(bool (*ready)(const Lane&), uint64_t val, uint64_t res);
}  // namespace shim
