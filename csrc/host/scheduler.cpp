#include "scheduler.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "fiber.h"
#include "machine.h"

namespace voco::host {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

// Never destroyed: a Python process may end in any order.
Machine& machine = *new Machine;

namespace {

// Between arrays in shared memory, so that AddressSanitizer sees where each ends.
constexpr size_t kSharedGap = 64;

// Runs the blocks, and waits while threads run.
Fiber& launcher = *new Fiber;

// Two addresses for ThreadSanitizer: the memory of all threads of a launch before its beginning, and after its end.
char launch_begins, launch_ends;

template <class Index>
std::string text(const Index& index) {
  std::ostringstream out;
  out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return out.str();
}

}  // namespace

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void fail_in_thread(const std::string& message, Site site) {
  throw std::runtime_error(text(site) + ": " + message + " (block " + text(block_index) + ", thread " +
                           text(thread_index) + ")");
}

void describe(std::ostream& out, const Meeting& meeting) {
  if (meeting.waiting.empty()) return;
  out << "; " << meeting.waiting.size() << " of " << meeting.expected << " wait in " << meeting.what << " at "
      << text(meeting.site) << ", the first is thread " << text(meeting.waiting.front()->index);
}

namespace {

// Where everyone waits when no thread of the block can run.
std::string deadlock() {
  std::ostringstream out;
  out << "deadlock in block " << text(block_index) << ": " << machine.ended << " of " << machine.threads.size()
      << " threads have ended";
  describe(out, machine.barrier);
  for (const Warp& warp : machine.warps) describe(out, warp.meeting);
  describe_hopper(out);
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

bool some_thread_is_ready() {
  while (machine.ready.empty() && advance_on_hopper()) {
  }
  return !machine.ready.empty();
}

// Leaves the running fiber for the next ready thread, or for the launcher when there is none.
void run_next() {
  if (machine.failure || !some_thread_is_ready()) return switch_to(&launcher);
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
    end_thread_on_hopper();
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

}  // namespace

void wait_to_be_ready(Site site) {
  if (!some_thread_is_ready()) fail_in_thread(deadlock(), site);
  run_next();
}

char* new_order() {
  if (machine.next_order == kOrders) machine.next_order = machine.kept_orders;
  return machine.shared + kSharedMapping + std::exchange(machine.next_order, machine.next_order + 8);
}

void meet(Meeting& meeting, const char* what, Site site, bool orders_memory) {
  if (meeting.waiting.empty()) {
    meeting.what = what;
    meeting.site = site;
  } else if (!same(what, meeting.what) || !same(site, meeting.site)) {
    fail_in_thread(std::string(what) + " in divergent code: thread " + text(meeting.waiting.front()->index) +
                       " waits in " + meeting.what + " at " + text(meeting.site),
                   site);
  }
  char* const order = meeting.order[meeting.count % 2];
  if (orders_memory) release(order);
  if (meeting.waiting.size() + 1 < meeting.expected) {
    meeting.waiting.push_back(machine.thread);
    wait_to_be_ready(site);
  } else {
    ++meeting.count;
    machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  if (orders_memory) acquire(order);
}

namespace {

// ---- Shared memory ----

// Opens a part of the shared memory, filled with what is NaN in every floating-point type.
void make_array(const void* tag, size_t begin, size_t bytes) {
  open_memory(machine.shared + begin, bytes);
  std::memset(machine.shared + begin, 0xff, bytes);
  machine.arrays.push_back({tag, begin, begin + bytes});
}

void renew_shared() {
  // ThreadSanitizer forgets what it knows of memory that is given back.
  if (kDetectsRaces && machine.shared) munmap(std::exchange(machine.shared, nullptr), kSharedMapping + kOrders);
  if (!machine.shared) machine.shared = map_memory(kSharedMapping + kOrders);
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

Meeting new_meeting(size_t threads) {
  Meeting meeting;
  meeting.expected = threads;
  for (char*& order : meeting.order) order = new_order();
  return meeting;
}

void prepare_block() {
  renew_shared();
  ++machine.block;
  machine.kept_orders = machine.next_order = 0;
  machine.barrier = new_meeting(machine.threads.size());
  for (Warp& warp : machine.warps) {
    warp.meeting = new_meeting(kWarpSize);
    warp.accesses = {};
  }
  machine.kept_orders = machine.next_order;
  begin_block_on_hopper();
  machine.ended = 0;
  for (Thread& thread : machine.threads) {
    thread.fiber = kDetectsRaces ? own_fiber() : nullptr;
    thread.closed_groups = 0;
    thread.copies_done = 0;
    thread.copies.clear();
    thread.waited_groups = thread.fenced_groups = thread.fences = thread.told_groups = thread.told_fences = 0;
    machine.ready.push_back(&thread);
  }
  release(&launch_begins);
}

// What was done under the identity comes before what the launcher does after the launch.
void release_to_launcher(void* identity) {
  take_identity(identity);
  release(&launch_ends);
  take_identity(launcher.identity);
}

// Of each thread, also of one that never ended.
void end_own_fibers() {
  for (const Thread& thread : machine.threads) {
    release_to_launcher(thread.fiber->identity);
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
  if (!machine.failure) end_block_on_hopper();
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
    machine.threads[i].number = static_cast<int>(i);
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
  machine.fiber = &launcher;
  launcher.identity = identity();
  prepare_threads();
  run_grid();
  for (void* agent : machine.agents) release_to_launcher(agent);
  acquire(&launch_ends);
  for (Fiber* fiber : machine.all_fibers) {
    end_identity(fiber->identity);
    delete fiber;
  }
  machine.all_fibers.clear();
  for (void* agent : machine.agents) end_identity(agent);
  machine.agents.clear();
  if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
}

void fail(const char* message, Site site) {
  const Unwatched unwatched;
  fail_in_thread(message, site);
}

int lane() { return machine.thread->lane; }

void sync_block(Site site) {
  const Unwatched unwatched;
  machine.thread->told_fences = machine.thread->fences;
  machine.thread->told_groups = machine.thread->fenced_groups;
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
  Thread& thread = *machine.thread;
  thread.warp->accesses.note(what, site, thread.lane, address);
  const bool copied = same(what, "cp.async");
  if (copied || same(what, "store16")) {
    machine.written[address / 16] = {machine.block, thread.number, copied ? thread.closed_groups : -1, thread.fences, site};
  }
  return machine.shared + address;
}

bool lazy_copies() { return lazy_setting(); }

void queue_copy(Copy copy) {
  const Unwatched unwatched;
  Thread& thread = *machine.thread;
  for (size_t i = thread.copies_done; i < thread.copies.size(); ++i) {
    if (thread.copies[i].copy.to == copy.to) throw std::runtime_error("two cp.async to one place are under way");
  }
  thread.copies.push_back({copy, thread.closed_groups});
}

void commit_copies() { ++machine.thread->closed_groups; }

bool take_copy(int in_flight, Copy* copy) {
  Thread& thread = *machine.thread;
  thread.waited_groups = std::max(thread.waited_groups, thread.closed_groups - std::max(in_flight, 0));
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
