// What the block that runs has of a Hopper GPU. Part of hopper.cpp and of wgmma.cpp.
#pragma once

#include "voco/hopper.cuh"

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

// In the kernel, where the function was called that has this in it.
#define VOCO_CALLER __builtin_return_address(0)

namespace voco::host {

constexpr int kWarps = kWarpgroupThreads / kWarpSize, kNamedBarriers = 16;
// Copies of one thread are not ordered; so many are told from each other.
constexpr int kCopyAgents = 4;

// A copy by TMA.
struct Load {
  TensorMap map;
  uint32_t to;
  int column, head, token;
  void* caller;
  void* agent;
  char* issued;
};

struct Mbarrier {
  int arrivals, missing;
  int64_t bytes = 0;   // that are expected and have not come
  unsigned phase = 0;  // the phases that are complete
  int maker;           // a thread
  bool fenced = false;
  std::vector<Thread*> waiting;
  Site site = {};          // of the first that waits
  std::deque<Load> loads;  // put off
  char* order;             // of the phase
  char* complete[2];       // of the last complete phase of each parity
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Site site = {};
  char* order = nullptr;
};

// A warp's part of a wgmma: its 16 rows.
struct Product {
  Wgmma operation;
  uint32_t a[kWarpSize][4];
  int warp, lanes = 0;
  Site site;
  void* caller;
  void* agent;
  char *issued, *read;
  std::vector<float> sums;  // [16, columns], once they are made
};

struct ThreadProduct {
  std::shared_ptr<Product> product;
  float* sums;
  int group;
  bool added;
};

struct HopperThread {
  bool fenced = false;
  int closed_groups = 0;
  std::vector<ThreadProduct> products;  // that it has not waited for, the oldest first
  int copies = 0;
  std::array<void*, kCopyAgents> agents = {};
};

struct Warpgroup {
  Meeting meeting;
  Wgmma operation;
  std::shared_ptr<Product> products[kWarps];  // that the lanes of the warps join
  void* agents[kWarps] = {};
  int registers = 0;  // 0: those of the launch
};

struct Hopper {
  std::map<uint32_t, Mbarrier> mbarriers;
  std::array<NamedBarrier, kNamedBarriers> named;
  std::vector<HopperThread> threads;
  std::vector<Warpgroup> warpgroups;
};

extern Hopper& hopper;

inline HopperThread& this_thread() { return hopper.threads[machine.thread->number]; }

inline std::string number(int64_t value) { return std::to_string(value); }

// The caller's warpgroup; throws where it is not whole.
Warpgroup& warpgroup(const char* what, Site site);

void check_inside(const char* what, uint32_t begin, size_t bytes, Site site);
// TMA and wgmma may not come to what a thread wrote and has not fenced.
void check_fenced(const char* what, uint32_t address, Site site);

// An identity of its own for what goes on beside the threads, made where there is none yet.
void* make_agent(void*& agent, Site site);

// Does something beside the threads, after what came before `issued` was released.
template <class Work>
void work_as(void* agent, char* issued, const Work& work) {
  void* const self = identity();
  if (kDetectsRaces) take_identity(agent);
  acquire(issued);
  work();
  if (kDetectsRaces) take_identity(self);
}

}  // namespace voco::host
