// counts: what a launch asks of memory, warp by warp: sectors of global memory, wavefronts of shared memory.
//
// Every thread of a block leaves a trace of the instructions that it comes to and of the bytes that they touch. When the block
// has ended, the lanes of a warp go through their traces together; those that a branch parts meet again where all its ways
// lead, as on a GPU. Arrays begin at multiples of 256 bytes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

namespace shim {

constexpr uint32_t ON_CHIP = ~0u;
struct Piece {  // of memory: an array's number and an offset, or ON_CHIP and an address in shared memory
  uint32_t array, bytes;
  uint64_t at;
};
struct Trace {  // of a thread
  struct Step {
    uint32_t instruction, pieces;
  };
  std::vector<Step> steps;
  std::vector<Piece> pieces;
};
struct Count {  // of an instruction: how often warps execute it; what they touch, and the fewest units for as many bytes
  uint64_t warps = 0, lanes = 0, array = 0, sectors = 0, fewest_sectors = 0, waves = 0, fewest_waves = 0;
};

// Where all ways from each instruction lead (its immediate post-dominator), given those that may follow it; the end is one more
// (Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm, 2001).
inline std::vector<uint32_t> meetings(const std::vector<std::vector<uint32_t>>& followers) {
  const uint32_t end = uint32_t(followers.size());
  std::vector<std::vector<uint32_t>> before(end + 1);
  for (uint32_t k = 0; k < end; ++k)
    for (const uint32_t f : followers[k]) before[f].push_back(k);
  std::vector<uint32_t> order, rank(end + 1, end + 1), meeting(end + 1, end + 1);  // backwards from the end, depth first
  std::vector<std::pair<uint32_t, size_t>> path{{end, 0}};
  for (rank[end] = end; !path.empty();) {
    auto& [at, next] = path.back();
    if (next == before[at].size()) {
      rank[at] = uint32_t(order.size()), order.push_back(at), path.pop_back();
    } else if (const uint32_t to = before[at][next++]; rank[to] > end) {
      rank[to] = end, path.emplace_back(to, 0);
    }
  }
  meeting[end] = end;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = order.size() - 1; k-- > 0;) {
      uint32_t found = end + 1;
      for (uint32_t f : followers[order[k]]) {
        if (meeting[f] > end) continue;
        for (; found <= end && f != found; rank[f] < rank[found] ? f = meeting[f] : found = meeting[found]) {}
        found = f;
      }
      changed |= meeting[order[k]] != found;
      meeting[order[k]] = found;
    }
  }
  return meeting;
}

// All different units of so many bytes that some pieces lie in.
inline std::vector<uint64_t> units(const std::vector<Piece>& of, uint64_t bytes) {
  std::vector<uint64_t> found;
  for (const Piece& p : of)
    for (uint64_t u = p.at / bytes; u <= (p.at + p.bytes - 1) / bytes; ++u) found.push_back(u);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

class Counts {
 public:
  std::vector<Count> of;  // each instruction
  explicit Counts(const std::vector<std::vector<uint32_t>>& followers)
      : of(followers.size()), meeting(meetings(followers)) {}

  void add(const std::vector<Trace>& threads) {  // of a block
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t first = 0; first < threads.size(); first += 32) {
      std::vector<Lane> lanes;
      for (size_t l = first; l < std::min(first + 32, threads.size()); ++l) lanes.push_back({&threads[l], l % 32});
      std::vector<Lane*> all;
      for (Lane& lane : lanes) all.push_back(&lane);
      together(all, uint32_t(of.size()));
    }
  }

 private:
  struct Lane {
    const Trace* trace;
    size_t number, step = 0, piece = 0;
  };
  std::vector<uint32_t> meeting;
  std::mutex mutex;

  uint32_t at(const Lane& l) const {
    return l.step < l.trace->steps.size() ? l.trace->steps[l.step].instruction : uint32_t(of.size());
  }
  // Lanes at the same instruction, as far as `until`.
  void together(const std::vector<Lane*>& lanes, uint32_t until) {
    while (at(*lanes[0]) != until) {
      const uint32_t now = at(*lanes[0]), meet = meeting[now];
      execute(lanes, of[now]);
      const auto apart = [&](Lane* l) { return at(*l) != at(*lanes[0]); };
      while (std::any_of(lanes.begin(), lanes.end(), apart)) {  // one way after the other
        const auto first = std::find_if(lanes.begin(), lanes.end(), [&](Lane* l) { return at(*l) != meet; });
        const uint32_t way = at(**first);
        std::vector<Lane*> same;
        std::copy_if(first, lanes.end(), std::back_inserter(same), [&](Lane* l) { return at(*l) == way; });
        together(same, meet);
      }
    }
  }
  static void execute(const std::vector<Lane*>& lanes, Count& c) {
    ++c.warps, c.lanes += lanes.size();
    std::vector<Piece> global, shared[4];  // by quarters of the warp
    for (Lane* l : lanes)
      for (uint32_t k = l->trace->steps[l->step++].pieces; k; --k) {
        const Piece& p = l->trace->pieces[l->piece++];
        (p.array == ON_CHIP ? shared[l->number / 8] : global).push_back(p);
      }
    if (!global.empty()) add_sectors(c, global);
    add_waves(c, shared);
  }
  static void add_sectors(Count& c, const std::vector<Piece>& pieces) {  // of one array
    const uint64_t grain = std::min(pieces[0].bytes, 16u);  // as aligned as they are large
    c.array = pieces[0].array;
    c.sectors += units(pieces, 32).size();
    c.fewest_sectors += (units(pieces, grain).size() * grain + 31) / 32;
  }
  // Accesses of 16 bytes go by quarters of a warp, of 8 bytes by halves; each takes as many wavefronts as words are wanted of
  // one of the 32 banks.
  static void add_waves(Count& c, std::vector<Piece> (&quarters)[4]) {
    uint32_t bytes = 0;
    for (const auto& quarter : quarters)
      for (const Piece& p : quarter) bytes = std::max(bytes, p.bytes);
    const size_t parts = bytes > 8 ? 1 : bytes > 4 ? 2 : 4;
    for (size_t first = 0; bytes && first < 4; first += parts) {
      std::vector<Piece> pieces;
      for (size_t q = first; q < first + parts; ++q)
        pieces.insert(pieces.end(), quarters[q].begin(), quarters[q].end());
      if (pieces.empty()) continue;
      uint64_t banks[32] = {};
      for (const uint64_t word : units(pieces, 4)) ++banks[word % 32];
      c.waves += *std::max_element(banks, banks + 32), ++c.fewest_waves;
    }
  }
};

}  // namespace shim
