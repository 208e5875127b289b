#include "scheduler.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bank_conflicts.h"
#include "fiber.h"
#include "sanitizers.h"

namespace voco::host {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t kMaxShared = 227 * 1024;
// Between arrays in shared memory, so that AddressSanitizer sees where each ends.
constexpr size_t kSharedGap = 64;
// Addresses that stand for barriers lie behind the shared memory.
constexpr size_t kSharedMapping = 256 * 1024, kBarriers = 4096;

// ---- The block that runs ----

struct Thread;

// A barrier, or a function that a whole warp takes part in.
struct Meeting {
  size_t expected = 0;
  unsigned count = 0;  // of those that are over
  const char* what = nullptr;
  Site site = {};
  std::vector<Thread*> waiting;
  char* order = nullptr;  // two addresses, used in turn: who is late for one meeting must not learn of the next
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
  int lane = 0;
  Warp* warp = nullptr;
  Fiber* fiber = nullptr;
  int closed_groups = 0;
  size_t copies_done = 0;
  std::vector<QueuedCopy> copies;
};

struct SharedArray {
  const void* tag;  // of the declaration; null for the dynamic shared memory, which comes first
  size_t begin, end;
};

struct Machine {
  std::mutex in_use;

  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::exception_ptr failure;

  Fiber launcher;
  Fiber* fiber = nullptr;  // that runs
  std::vector<Fiber*> free_fibers;
  // Of the launch, where races are looked for: one between blocks is seen while both are known.
  std::vector<Fiber*> all_fibers;

  Thread* thread = nullptr;  // that runs
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  size_t ended = 0;
  Meeting barrier;
  std::vector<Warp> warps;

  char* shared = nullptr;
  size_t dynamic_shared = 0;
  std::vector<SharedArray> arrays;

  uint64_t conflicts = 0;
};

// Never destroyed: a Python process may end in any order.
Machine& machine = *new Machine;

// Two addresses for ThreadSanitizer: the memory of all threads of a launch before its beginning, and after its end.
char launch_begins, launch_ends;

template <class Index>
std::string text(const Index& index) {
  std::ostringstream out;
  out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return out.str();
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

[[noreturn]] void fail_in_thread(const std::string& message, Site site) {
  throw std::runtime_error(text(site) + ": " + message + " (block " + text(block_index) + ", thread " +
                           text(thread_index) + ")");
}

// Where everyone waits when no thread of the block can run.
std::string deadlock() {
  std::ostringstream out;
  out << "deadlock in block " << text(block_index) << ": " << machine.ended << " of " << machine.threads.size()
      << " threads have ended";
  const auto add = [&](const Meeting& meeting) {
    if (meeting.waiting.empty()) return;
    out << "; " << meeting.waiting.size() << " of " << meeting.expected << " wait in " << meeting.what << " at "
        << text(meeting.site) << ", the first is thread " << text(meeting.waiting.front()->index);
  };
  add(machine.barrier);
  for (const Warp& warp : machine.warps) add(warp.meeting);
  return out.str();
}

void switch_to(Fiber* next) {
  Fiber* const self = std::exchange(machine.fiber, next);
  self->switch_to(*next);
}

void fiber_main();

Fiber* free_fiber() {
  if (machine.free_fibers.empty()) return new Fiber(fiber_main);
  Fiber* fiber = machine.free_fibers.back();
  machine.free_fibers.pop_back();
  return fiber;
}

// Leaves the running fiber for the next ready thread, or for the launcher when there is none.
void run_next() {
  if (machine.failure || machine.ready.empty()) return switch_to(&machine.launcher);
  Thread* const next = machine.ready.front();
  machine.ready.pop_front();
  if (!next->fiber) next->fiber = free_fiber();
  machine.thread = next;
  thread_index = next->index;
  if (next->fiber != machine.fiber) switch_to(next->fiber);
}

void run_thread() {
  acquire(&launch_begins);
  try {
    machine.body(machine.arguments);
  } catch (...) {
    machine.failure = std::current_exception();
  }
}

void fiber_main() {
  machine.fiber->arrive();
  for (;;) {
    run_thread();
    const Unwatched unwatched;
    ++machine.ended;
    // A thread that has not begun needs no switch: the free fiber on top is this one. Races are found between fibers.
    if (!kDetectsRaces) machine.free_fibers.push_back(machine.fiber);
    run_next();
  }
}

// Waits until all have come to the meeting.
void meet(Meeting& meeting, const char* what, Site site, bool orders_memory) {
  if (meeting.waiting.empty()) {
    meeting.what = what;
    meeting.site = site;
  } else if (!same(what, meeting.what) || !same(site, meeting.site)) {
    fail_in_thread(std::string(what) + " in divergent code: thread " + text(meeting.waiting.front()->index) +
                       " waits in " + meeting.what + " at " + text(meeting.site),
                   site);
  }
  char* const order = meeting.order + 8 * (meeting.count % 2);
  if (orders_memory) release(order);
  if (meeting.waiting.size() + 1 < meeting.expected) {
    meeting.waiting.push_back(machine.thread);
    if (machine.ready.empty()) fail_in_thread(deadlock(), site);
    run_next();
  } else {
    ++meeting.count;
    machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  if (orders_memory) acquire(order);
}

// ---- Shared memory ----

// Opens a part of the shared memory, filled with what is NaN in every floating-point type.
void make_array(const void* tag, size_t begin, size_t bytes) {
  open_memory(machine.shared + begin, bytes);
  std::memset(machine.shared + begin, 0xff, bytes);
  machine.arrays.push_back({tag, begin, begin + bytes});
}

void renew_shared() {
  // ThreadSanitizer forgets what it knows of memory that is given back.
  if (kDetectsRaces && machine.shared) munmap(std::exchange(machine.shared, nullptr), kSharedMapping + kBarriers);
  if (!machine.shared) machine.shared = map_memory(kSharedMapping + kBarriers);
  machine.arrays.clear();
  close_memory(machine.shared, kSharedMapping);
  make_array(nullptr, 0, machine.dynamic_shared);
}

// ---- Launch ----

// A fiber for a thread alone, so that its accesses are told from all others'. The launcher makes them all, since what the
// maker has done comes before all that its fiber does.
Fiber* own_fiber() {
  Fiber* fiber = new Fiber(fiber_main);
  fiber->identity = make_identity();
  machine.all_fibers.push_back(fiber);
  return fiber;
}

void prepare_block() {
  renew_shared();
  char* order = machine.shared + kSharedMapping;
  machine.barrier = {};
  machine.barrier.expected = machine.threads.size();
  machine.barrier.order = order;
  for (Warp& warp : machine.warps) {
    warp.meeting = {};
    warp.meeting.expected = kWarpSize;
    warp.meeting.order = order += 16;
    warp.accesses = {};
  }
  machine.ended = 0;
  for (Thread& thread : machine.threads) {
    thread.fiber = kDetectsRaces ? own_fiber() : nullptr;
    thread.closed_groups = 0;
    thread.copies_done = 0;
    thread.copies.clear();
    machine.ready.push_back(&thread);
  }
  release(&launch_begins);
}

// Of each thread, also of one that never ended: what it did comes before what the launcher does after the launch.
void end_own_fibers() {
  for (const Thread& thread : machine.threads) {
    take_identity(thread.fiber->identity);
    release(&launch_ends);
    take_identity(machine.launcher.identity);
    thread.fiber->unmap();
  }
}

// Takes the fibers back from threads that will never end.
void rewind_fibers() {
  for (const Thread& thread : machine.threads) {
    std::vector<Fiber*>& free = machine.free_fibers;
    if (!thread.fiber || std::find(free.begin(), free.end(), thread.fiber) != free.end()) continue;
    thread.fiber->rewind();
    free.push_back(thread.fiber);
  }
}

void run_block() {
  prepare_block();
  run_next();
  if (!machine.failure && machine.ended < machine.threads.size()) {
    machine.failure = std::make_exception_ptr(std::runtime_error(deadlock()));
  }
  machine.ready.clear();
  if (kDetectsRaces) {
    end_own_fibers();
  } else if (machine.failure) {
    rewind_fibers();
  }
  for (const Warp& warp : machine.warps) machine.conflicts += warp.accesses.conflicts();
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto reject = [](const std::string& message) { throw std::runtime_error("launch: " + message); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) reject("a block of " + text(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    reject("a grid of " + text(grid) + " blocks");
  }
  if (shared_bytes > kMaxShared) reject(std::to_string(shared_bytes) + " bytes of shared memory");
  if (uint64_t{grid.x} * grid.y * grid.z * threads > kMaxThreads) {
    reject("more threads than ThreadSanitizer can tell apart, " + std::to_string(kMaxThreads));
  }
}

void prepare_threads() {
  machine.threads.assign(size_t{block_size.x} * block_size.y * block_size.z, Thread());
  machine.warps.resize((machine.threads.size() + kWarpSize - 1) / kWarpSize);
  for (size_t i = 0; i < machine.threads.size(); ++i) {
    const auto x = static_cast<unsigned>(i % block_size.x), rest = static_cast<unsigned>(i / block_size.x);
    machine.threads[i].index = {x, rest % block_size.y, rest / block_size.y};
    machine.threads[i].lane = static_cast<int>(i % kWarpSize);
    machine.threads[i].warp = &machine.warps[i / kWarpSize];
  }
}

void run_grid() {
  for (unsigned z = 0; z < grid_size.z; ++z) {
    for (unsigned y = 0; y < grid_size.y; ++y) {
      for (unsigned x = 0; x < grid_size.x && !machine.failure; ++x) {
        block_index = {x, y, z};
        run_block();
      }
    }
  }
}

bool lazy_from_environment() {
  const char* value = std::getenv("VOCO_COPIES");
  if (!value || std::strcmp(value, "lazy") == 0) return true;
  if (std::strcmp(value, "eager") == 0) return false;
  throw std::runtime_error(std::string("VOCO_COPIES must be lazy or eager, but was ") + value);
}

bool& lazy_setting() {
  static bool lazy = lazy_from_environment();
  return lazy;
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* arguments) {
  const Unwatched unwatched;
  check_launch(grid, block, shared_bytes);
  const std::lock_guard<std::mutex> lock(machine.in_use);
  grid_size = grid;
  block_size = block;
  machine.body = body;
  machine.arguments = arguments;
  machine.dynamic_shared = shared_bytes;
  machine.arrays.clear();
  machine.failure = nullptr;
  machine.fiber = &machine.launcher;
  machine.launcher.identity = identity();
  prepare_threads();
  run_grid();
  acquire(&launch_ends);
  for (Fiber* fiber : machine.all_fibers) {
    end_identity(fiber->identity);
    delete fiber;
  }
  machine.all_fibers.clear();
  if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
}

void fail(const char* message, Site site) {
  const Unwatched unwatched;
  fail_in_thread(message, site);
}

int lane() { return machine.thread->lane; }

void sync_block(Site site) {
  const Unwatched unwatched;
  meet(machine.barrier, "sync_block", site, true);
}

void sync_warp(Site site) {
  const Unwatched unwatched;
  meet(machine.thread->warp->meeting, "sync_warp", site, true);
}

const uint32_t (*exchange(const char* what, const uint32_t (&words)[kExchangeWords], Site site))[kExchangeWords] {
  const Unwatched unwatched;
  Thread& thread = *machine.thread;
  auto& all = thread.warp->words[thread.warp->meeting.count % 2];
  std::copy(std::begin(words), std::end(words), all[thread.lane]);
  meet(thread.warp->meeting, what, site, false);
  return all;
}

void multiply(float (&c)[4], const float (&a)[8], const float (&b)[4], Site site) {
  uint32_t words[kExchangeWords];
  std::memcpy(words, a, sizeof(a));
  std::memcpy(words + 8, b, sizeof(b));
  const auto all = exchange("mma", words, site);
  // Element (row, k) of a is in lane 4 (row % 8) + k % 8 / 2, (k, column) of b in lane 4 column + k % 8 / 2.
  const auto value = [&](int lane, int index) {
    float value;
    std::memcpy(&value, &all[lane][index], 4);
    return value;
  };
  const int group = lane() / 4, pair = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * pair + i % 2, lower = i / 2;
    for (int k = 0; k < 16; ++k) {
      const int member = k % 8 / 2, odd = k % 2, right = k / 8;
      c[i] += value(4 * group + member, 4 * right + 2 * lower + odd) * value(4 * column + member, 8 + 2 * right + odd);
    }
  }
}

void* dynamic_shared() { return machine.shared; }

void* static_shared(const void* tag, size_t bytes, size_t alignment) {
  const Unwatched unwatched;
  for (const SharedArray& array : machine.arrays) {
    if (array.tag == tag) return machine.shared + array.begin;
  }
  const size_t begin = (machine.arrays.back().end + kSharedGap + alignment - 1) / alignment * alignment;
  if (begin + bytes > kMaxShared) throw std::runtime_error("more than 227 KiB of shared memory");
  make_array(tag, begin, bytes);
  return machine.shared + begin;
}

bool is_shared(const void* pointer) {
  const char* const shared = machine.shared;
  return pointer >= shared && pointer < shared + kSharedMapping;
}

uint32_t shared_address(const void* pointer, Site site) {
  if (!is_shared(pointer)) fail_in_thread("not an address in shared memory", site);
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - machine.shared);
}

void* shared_16_bytes(const char* what, uint32_t address, Site site) {
  const Unwatched unwatched;
  const auto reject = [&](const char* reason) {
    fail_in_thread(std::string(what) + " at shared address " + std::to_string(address) + ", " + reason, site);
  };
  if (address % 16) reject("not a multiple of 16");
  const bool inside = std::any_of(machine.arrays.begin(), machine.arrays.end(), [&](const SharedArray& array) {
    return array.begin <= address && address + size_t{16} <= array.end;
  });
  if (!inside) reject("outside every array");
  machine.thread->warp->accesses.note(what, site, machine.thread->lane, address);
  return machine.shared + address;
}

bool lazy_copies() { return lazy_setting(); }

void queue_copy(Copy copy) {
  const Unwatched unwatched;
  Thread& thread = *machine.thread;
  thread.copies.push_back({copy, thread.closed_groups});
}

void commit_copies() { ++machine.thread->closed_groups; }

bool take_copy(int in_flight, Copy* copy) {
  Thread& thread = *machine.thread;
  if (thread.copies_done == thread.copies.size()) return false;
  const QueuedCopy& next = thread.copies[thread.copies_done];
  if (next.group >= thread.closed_groups - in_flight) return false;
  *copy = next.copy;
  ++thread.copies_done;
  return true;
}

bool take_any_copy(Copy* copy) {
  // A group that no one closed has the number closed_groups.
  return take_copy(-1, copy);
}

void set_lazy_copies(bool lazy) { lazy_setting() = lazy; }

uint64_t bank_conflicts() { return machine.conflicts; }

void reset_bank_conflicts() { machine.conflicts = 0; }

}  // namespace voco::host
