// The block that runs: its threads, where they meet, and its shared memory. Part of scheduler.cpp and of what adds to it.
#pragma once

#include <deque>
#include <exception>
#include <iosfwd>
#include <mutex>
#include <string>
#include <vector>

#include "bank_conflicts.h"
#include "sanitizers.h"
#include "scheduler.h"

namespace voco::host {

constexpr size_t kMaxShared = 227 * 1024;
// Addresses that stand for barriers lie behind the shared memory.
constexpr size_t kSharedMapping = 256 * 1024, kOrders = 128 * 1024;

class Fiber;
struct Thread;

// A barrier, or a function that a whole warp or warpgroup takes part in.
struct Meeting {
  size_t expected = 0;
  unsigned count = 0;  // of those that are over
  const char* what = nullptr;
  Site site = {};
  std::vector<Thread*> waiting;
  char* order[2] = {};  // used in turn: who is late for one meeting must not learn of the next
};

struct Warp {
  Meeting meeting;
  uint32_t words[2][kWarpSize][kExchangeWords];  // of two meetings in turn
  SharedAccesses accesses;
};

struct QueuedCopy {
  Copy copy;
  int group;
};

struct Thread {
  uint3 index = {};
  int number = 0, lane = 0;
  Warp* warp = nullptr;
  Fiber* fiber = nullptr;
  int closed_groups = 0;
  size_t copies_done = 0;
  std::vector<QueuedCopy> copies;
  // For what TMA and wgmma may see: groups of copies that were waited for, those of them before the last fence, and fences.
  int waited_groups = 0, fenced_groups = 0, fences = 0, told_groups = 0, told_fences = 0;
};

struct SharedArray {
  const void* tag;  // of the declaration; null for the dynamic shared memory, which comes first
  size_t begin, end;
};

// The last write to 16 bytes of shared memory by store16 or cp.async.
struct Written {
  uint64_t block = 0;  // 0: none
  int thread, group, fences;  // group: of a copy, else -1
  Site site;
};

struct Machine {
  std::mutex in_use;

  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::exception_ptr failure;

  Fiber* fiber = nullptr;  // that runs
  std::vector<Fiber*> free_fibers;
  // Of the launch, where races are looked for: one between blocks is seen while both are known.
  std::vector<Fiber*> all_fibers;
  // What copies and multiplies while threads go on, for ThreadSanitizer.
  std::vector<void*> agents;

  Thread* thread = nullptr;  // that runs
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  size_t ended = 0;
  Meeting barrier;
  std::vector<Warp> warps;

  uint64_t block = 0;  // that runs, of all so far
  char* shared = nullptr;
  size_t dynamic_shared = 0;
  std::vector<SharedArray> arrays;
  std::vector<Written> written = std::vector<Written>(kMaxShared / 16);
  size_t kept_orders = 0, next_order = 0;

  uint64_t conflicts = 0;
};

extern Machine& machine;

std::string text(Site site);
[[noreturn]] void fail_in_thread(const std::string& message, Site site);

// Waits until all have come to the meeting.
void meet(Meeting& meeting, const char* what, Site site, bool orders_memory);
// Leaves the running thread until another one puts it into machine.ready.
void wait_to_be_ready(Site site);
// An address for release() and acquire() that nothing else has used lately in this block.
char* new_order();
// What is wrong where no thread can go on, of one meeting.
void describe(std::ostream& out, const Meeting& meeting);

// Of hopper.cpp: what the scheduler calls.
void begin_block_on_hopper();
void end_thread_on_hopper();  // throws where the thread left something unfinished
void end_block_on_hopper();   // and where the block did
// Does something that a thread waits for and that was put off; false when there is nothing.
bool advance_on_hopper();
void describe_hopper(std::ostream& out);

}  // namespace voco::host
