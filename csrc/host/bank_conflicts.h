// Counts the cycles that accesses of 16 bytes to shared memory cost beyond the least. Part of scheduler.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "scheduler.h"

namespace voco::host {

inline bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
inline bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

// The accesses of one warp in one block. Lanes are taken to go through a line of the source together: the n-th visit of one
// lane is one access with the n-th visit of the others.
class SharedAccesses {
 public:
  void note(const char* what, Site site, int lane, uint32_t address) {
    auto line = std::find_if(lines_.begin(), lines_.end(), [&](const Line& line) {
      return same(line.site, site) && same(line.what, what);
    });
    if (line == lines_.end()) line = lines_.insert(lines_.end(), {what, site, {}, {}});
    const size_t visit = line->visits[lane]++;
    if (visit == line->addresses.size()) line->addresses.emplace_back().fill(kNoAddress);
    line->addresses[visit][lane] = address;
  }

  uint64_t conflicts() const {
    uint64_t sum = 0;
    for (const Line& line : lines_) {
      for (const Addresses& addresses : line.addresses) sum += conflicts_of(addresses);
    }
    return sum;
  }

 private:
  using Addresses = std::array<uint32_t, kWarpSize>;
  static constexpr uint32_t kNoAddress = ~0u;

  struct Line {
    const char* what;
    Site site;
    std::array<size_t, kWarpSize> visits;
    std::vector<Addresses> addresses;
  };

  // Eight lanes at a time are served; a cycle serves one address in each of the eight groups of four banks.
  static uint64_t conflicts_of(const Addresses& addresses) {
    uint64_t conflicts = 0;
    for (auto first = addresses.begin(); first != addresses.end(); first += 8) {
      int cycles[8] = {}, most = 1;
      for (auto address = first; address != first + 8; ++address) {
        if (*address == kNoAddress || std::find(first, address, *address) != address) continue;
        most = std::max(most, ++cycles[*address / 16 % 8]);
      }
      conflicts += most - 1;
    }
    return conflicts;
  }

  std::vector<Line> lines_;
};

}  // namespace voco::host
