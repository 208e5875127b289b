#include "hopper_block.h"

#include <algorithm>
#include <ostream>
#include <stdexcept>
#include <utility>

#include "operands.h"

namespace voco::host {

Hopper& hopper = *new Hopper;

Warpgroup& warpgroup(const char* what, Site site) {
  const size_t group = machine.thread->number / kWarpgroupThreads;
  if ((group + 1) * kWarpgroupThreads > machine.threads.size()) {
    fail_in_thread(std::string(what) + " by less than a warpgroup", site);
  }
  return hopper.warpgroups[group];
}

void check_inside(const char* what, uint32_t begin, size_t bytes, Site site) {
  const bool inside = std::any_of(machine.arrays.begin(), machine.arrays.end(), [&](const SharedArray& array) {
    return array.begin <= begin && begin + bytes <= array.end;
  });
  if (!inside) fail_in_thread(std::string(what) + " at shared address " + number(begin) + ", outside every array", site);
}

void check_fenced(const char* what, uint32_t address, Site site) {
  const Written& written = machine.written[address / 16];
  if (written.block != machine.block) return;
  const Thread& writer = machine.threads[written.thread];
  const bool fenced = written.group < 0 ? writer.told_fences > written.fences : written.group < writer.told_groups;
  if (!fenced) {
    fail_in_thread(std::string(what) + " at shared address " + number(address) + ", written at " + text(written.site) +
                       " by thread " + number(written.thread) + ", which has not called fence_async since",
                   site);
  }
}

void* make_agent(void*& agent, Site site) {
  if (!kDetectsRaces || agent) return agent;
  if (machine.all_fibers.size() + machine.agents.size() >= kMaxThreads) {
    fail_in_thread("more threads and copies than ThreadSanitizer can tell apart", site);
  }
  machine.agents.push_back(agent = make_identity());
  return agent;
}

namespace {

void tell_fences() {
  machine.thread->told_fences = machine.thread->fences;
  machine.thread->told_groups = machine.thread->fenced_groups;
}

// A phase of a barrier can wait for fewer bytes than this.
constexpr int64_t kMaxBytes = 1 << 20;

// ---- Barriers ----

void touch_barrier(uint32_t address, bool writes, void* caller) {
  watch();
  if (writes) {
    note_write(machine.shared + address, 8, caller);
  } else {
    note_read(machine.shared + address, 8, caller);
  }
  stop_watching();
}

Mbarrier& mbarrier_at(uint32_t address, void* caller, Site site) {
  const auto found = hopper.mbarriers.find(address);
  if (found == hopper.mbarriers.end()) fail_in_thread("no mbarrier at shared address " + number(address), site);
  touch_barrier(address, false, caller);
  return found->second;
}

void wake(std::vector<Thread*>& waiting) {
  machine.ready.insert(machine.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.complete[barrier.phase++ % 2] = barrier.order;
  barrier.order = new_order();
  barrier.missing = barrier.arrivals;
  wake(barrier.waiting);
}

// ---- TMA ----

// Of row `row` of the box: which of the kBoxColumns are in the tensor, and where the first column would be.
struct BoxRow {
  int begin = 0, end = 0;
  const char* columns = nullptr;
};

BoxRow box_row(const Load& load, int row) {
  const TensorLayout& layout = load.map.layout;
  const int64_t token = int64_t{load.token} + row, head = load.head, column = load.column;
  if (token < 0 || token >= layout.tokens || head < 0 || head >= layout.heads) return {};
  const auto clip = [&](int64_t edge) { return static_cast<int>(std::clamp<int64_t>(edge - column, 0, kBoxColumns)); };
  const int64_t element = token * layout.token_stride + head * layout.head_stride + column;
  return {clip(0), clip(layout.columns), static_cast<const char*>(layout.data) + 2 * element};
}

void copy_box(const Load& load) {
  for (int r = 0; r < load.map.box_rows; ++r) {
    uint16_t values[kBoxColumns] = {};
    const BoxRow row = box_row(load, r);
    if (row.end > row.begin) {
      const size_t bytes = 2 * size_t(row.end - row.begin);
      note_read(row.columns + 2 * row.begin, bytes, load.caller);
      std::memcpy(values + row.begin, row.columns + 2 * row.begin, bytes);
    }
    for (int chunk = 0; chunk < kBoxColumns / 8; ++chunk) {
      const uint32_t address = swizzled(load.to + 2 * kBoxColumns * r + 16 * chunk);
      note_write(machine.shared + address, 16, load.caller);
      std::memcpy(machine.shared + address, values + 8 * chunk, 16);
      machine.written[address / 16] = {};
    }
  }
}

void perform(const Load& load, Mbarrier& barrier) {
  work_as(load.agent, load.issued, [&] {
    copy_box(load);
    release(barrier.order);
  });
  barrier.bytes -= 2 * kBoxColumns * load.map.box_rows;
  end_phase_if_complete(barrier);
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals, Site site) {
  const Unwatched unwatched;
  if (address % 8) fail_in_thread("an mbarrier at shared address " + number(address) + ", not a multiple of 8", site);
  check_inside("an mbarrier", address, 8, site);
  if (arrivals < 1 || arrivals >= kMaxBytes) fail_in_thread("an mbarrier of " + number(arrivals) + " arrivals", site);
  touch_barrier(address, true, VOCO_CALLER);
  Mbarrier barrier;
  barrier.arrivals = barrier.missing = arrivals;
  barrier.maker = machine.thread->number;
  barrier.order = new_order();
  for (char*& order : barrier.complete) order = new_order();
  if (!hopper.mbarriers.emplace(address, std::move(barrier)).second) fail_in_thread("a second mbarrier_init", site);
}

void fence_mbarriers() {
  const Unwatched unwatched;
  for (auto& [address, barrier] : hopper.mbarriers) barrier.fenced |= barrier.maker == machine.thread->number;
}

void mbarrier_arrive(uint32_t address, uint32_t bytes, Site site) {
  const Unwatched unwatched;
  Mbarrier& barrier = mbarrier_at(address, VOCO_CALLER, site);
  if (barrier.missing == 0) {
    fail_in_thread("too many arrivals in a phase of the mbarrier, " + number(barrier.arrivals) + " expected", site);
  }
  barrier.bytes += bytes;
  if (barrier.bytes >= kMaxBytes) fail_in_thread("an mbarrier cannot wait for " + number(barrier.bytes) + " bytes", site);
  tell_fences();
  release(barrier.order);
  --barrier.missing;
  end_phase_if_complete(barrier);
}

void mbarrier_wait(uint32_t address, int parity, Site site) {
  const Unwatched unwatched;
  Mbarrier& barrier = mbarrier_at(address, VOCO_CALLER, site);
  if (parity != 0 && parity != 1) fail_in_thread("a parity of " + number(parity), site);
  if (static_cast<int>(barrier.phase % 2) == parity) {
    if (barrier.waiting.empty()) barrier.site = site;
    barrier.waiting.push_back(machine.thread);
    wait_to_be_ready(site);
  }
  acquire(barrier.complete[parity]);
}

void tma_load(uint32_t to, const TensorMap* map, int column, int head, int token, uint32_t address, Site site) {
  const Unwatched unwatched;
  if (reinterpret_cast<uintptr_t>(map) % alignof(TensorMap)) fail_in_thread("misaligned address of a tensor map", site);
  if (to % kSwizzledTile) fail_in_thread("tma_load to shared address " + number(to) + ", not a multiple of 1024", site);
  check_inside("tma_load", to, 2 * kBoxColumns * map->box_rows, site);
  for (int chunk = 0; chunk < 8 * map->box_rows; ++chunk) check_fenced("tma_load", to + 16 * chunk, site);
  Mbarrier& barrier = mbarrier_at(address, VOCO_CALLER, site);
  if (!barrier.fenced) fail_in_thread("tma_load with an mbarrier without fence_mbarriers", site);
  HopperThread& thread = this_thread();
  void*& as = thread.agents[thread.copies++ % kCopyAgents];
  const Load load = {*map, to, column, head, token, VOCO_CALLER, make_agent(as, site), new_order()};
  for (int r = 0; r < map->box_rows; ++r) {
    const BoxRow row = box_row(load, r);
    if (!is_open(row.columns + 2 * row.begin, 2 * (row.end - row.begin))) {
      fail_in_thread("tma_load of global memory that is not there, for token " + number(int64_t{token} + r), site);
    }
  }
  release(load.issued);
  if (lazy_copies()) {
    barrier.loads.push_back(load);
  } else {
    perform(load, barrier);
  }
}

void fence_async() {
  ++machine.thread->fences;
  machine.thread->fenced_groups = machine.thread->waited_groups;
}

void named_barrier(int id, int threads, bool waits, Site site) {
  const Unwatched unwatched;
  if (id < 1 || id >= kNamedBarriers) fail_in_thread("no named barrier has the number " + number(id), site);
  if (threads < kWarpSize || threads % kWarpSize || size_t(threads) > machine.threads.size()) {
    fail_in_thread("a named barrier of " + number(threads) + " threads", site);
  }
  NamedBarrier& barrier = hopper.named[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.order = new_order();
  } else if (threads != barrier.expected) {
    fail_in_thread("named barrier " + number(id) + " for " + number(threads) + " threads, and elsewhere for " +
                       number(barrier.expected),
                   site);
  }
  char* const order = barrier.order;
  tell_fences();
  release(order);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    wake(barrier.waiting);
  } else if (waits) {
    if (barrier.waiting.empty()) barrier.site = site;
    barrier.waiting.push_back(machine.thread);
    wait_to_be_ready(site);
  }
  if (waits) acquire(order);
}

void set_registers(int registers, Site site) {
  const Unwatched unwatched;
  Warpgroup& group = warpgroup("setmaxnreg", site);
  group.registers = registers;
  int sum = 0;
  bool all_known = true;
  for (const Warpgroup& each : hopper.warpgroups) {
    sum += each.registers;
    all_known &= each.registers != 0;
  }
  // What the launch gave to all of them, a multiple of 8 for each thread.
  const int warpgroups = static_cast<int>(hopper.warpgroups.size());
  const int most = 65536 / (warpgroups * kWarpgroupThreads) / 8 * 8 * warpgroups;
  if (all_known && sum > most) {
    fail_in_thread("more than 64 K registers: " + number(sum * kWarpgroupThreads), site);
  }
  meet(group.meeting, "setmaxnreg", site, false);
}

// ---- For the scheduler ----

void begin_block_on_hopper() {
  hopper.mbarriers.clear();
  hopper.named = {};
  hopper.threads.assign(machine.threads.size(), {});
  hopper.warpgroups.assign((machine.threads.size() + kWarpgroupThreads - 1) / kWarpgroupThreads, {});
  for (Warpgroup& group : hopper.warpgroups) group.meeting.expected = kWarpgroupThreads;
}

void end_thread_on_hopper() {
  const Unwatched unwatched;
  const HopperThread& thread = this_thread();
  if (thread.products.empty()) return;
  fail_in_thread("a wgmma that the thread has not waited for at its end", thread.products.front().product->site);
}

void end_block_on_hopper() {
  for (const auto& [address, barrier] : hopper.mbarriers) {
    if (barrier.loads.empty()) continue;
    machine.failure = std::make_exception_ptr(std::runtime_error(
        "the block ends with a tma_load that no one has waited for, mbarrier at shared address " + number(address)));
  }
}

bool advance_on_hopper() {
  for (auto& [address, barrier] : hopper.mbarriers) {
    if (barrier.waiting.empty() || barrier.loads.empty()) continue;
    const Load load = barrier.loads.front();
    barrier.loads.pop_front();
    perform(load, barrier);
    return true;
  }
  return false;
}

void describe_hopper(std::ostream& out) {
  for (const Warpgroup& group : hopper.warpgroups) describe(out, group.meeting);
  for (const auto& [address, barrier] : hopper.mbarriers) {
    if (barrier.waiting.empty()) continue;
    out << "; " << barrier.waiting.size() << " wait for phase " << barrier.phase << " of the mbarrier at shared address "
        << address << " at " << text(barrier.site) << ", where " << barrier.missing << " of " << barrier.arrivals
        << " arrivals and " << barrier.bytes << " bytes are missing";
  }
  for (int id = 0; id < kNamedBarriers; ++id) {
    const NamedBarrier& barrier = hopper.named[id];
    if (barrier.waiting.empty()) continue;
    out << "; " << barrier.arrived << " of " << barrier.expected << " threads have come to named barrier " << id << ", at "
        << text(barrier.site);
  }
}

}  // namespace voco::host
