#include <algorithm>

#include "hopper_block.h"
#include "operands.h"

namespace voco::host {
namespace {

constexpr int kWarpRows = 16;

void check_operand(const char* what, uint64_t descriptor, bool mn_major, int extent, Site site) {
  const Operand operand = decode(descriptor, mn_major);
  if (!operand.valid) {
    fail_in_thread(std::string(what) + " of wgmma: not the descriptor of a tile swizzled by 128 bytes", site);
  }
  for_each_chunk(operand, 0, extent, [&](int, int, uint32_t address) {
    check_inside(what, address, 16, site);
    check_fenced(what, address, site);
  });
}

void perform(Product& product) {
  if (!product.sums.empty()) return;
  const Wgmma& operation = product.operation;
  work_as(product.agent, product.issued, [&] {
    const int first_row = kWarpRows * product.warp;
    float a[kWarpRows * kDepth];
    std::vector<float> b(kDepth * operation.columns);
    const auto load = [&](const Operand& operand, int first, int extent, float* values, int row_stride, int depth_stride) {
      for_each_chunk(operand, first, extent, [&](int row, int depth, uint32_t address) {
        note_read(machine.shared + address, 16, product.caller);
        float chunk[8];
        widen(machine.shared + address, operation.bf16, chunk);
        for (int i = 0; i < 8; ++i) {
          const int r = row - first + (operand.mn_major ? i : 0), k = depth + (operand.mn_major ? 0 : i);
          values[r * row_stride + k * depth_stride] = chunk[i];
        }
      });
    };
    if (operation.a_in_registers) {
      widen_registers(product.a, operation.bf16, a);
    } else {
      load(decode(operation.a, operation.a_mn_major), first_row, kWarpRows, a, kDepth, 1);
    }
    load(decode(operation.b, operation.b_mn_major), 0, operation.columns, b.data(), 1, operation.columns);
    product.sums = multiply(a, b.data(), operation.columns);
    release(product.read);
  });
}

// Adds the thread's part of the product to its registers.
void add(ThreadProduct& mine, int lane) {
  if (mine.added) return;
  mine.added = true;
  perform(*mine.product);
  const Wgmma& operation = mine.product->operation;
  for (int i = 0; i < operation.columns / 2; ++i) {
    const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
    const float value = mine.product->sums[row * operation.columns + column];
    mine.sums[i] = operation.accumulate ? mine.sums[i] + value : value;
  }
}

bool equal(const Wgmma& a, const Wgmma& b) {
  return a.bf16 == b.bf16 && a.accumulate == b.accumulate && a.a_in_registers == b.a_in_registers &&
         a.a_mn_major == b.a_mn_major && a.b_mn_major == b.b_mn_major && a.columns == b.columns && a.a == b.a && a.b == b.b;
}

void meet_warp(const char* what, Site site) { meet(machine.thread->warp->meeting, what, site, false); }

}  // namespace

void wgmma_fence(Site site) {
  const Unwatched unwatched;
  meet_warp("wgmma_fence", site);
  this_thread().fenced = true;
}

void wgmma(const Wgmma& operation, const uint32_t* a, float* sums, Site site) {
  const Unwatched unwatched;
  const Thread& thread = *machine.thread;
  HopperThread& mine = this_thread();
  Warpgroup& group = warpgroup("wgmma", site);
  if (!mine.fenced) fail_in_thread("wgmma without wgmma_fence since the last wgmma_commit or wgmma_wait", site);
  if (group.meeting.waiting.empty()) {
    group.operation = operation;
    if (!operation.a_in_registers) check_operand("operand a", operation.a, operation.a_mn_major, 4 * kWarpRows, site);
    check_operand("operand b", operation.b, operation.b_mn_major, operation.columns, site);
  } else if (!equal(operation, group.operation)) {
    fail_in_thread("wgmma with other operands than the rest of the warpgroup", site);
  }
  const int warp = thread.number % kWarpgroupThreads / kWarpSize;
  std::shared_ptr<Product>& product = group.products[warp];
  if (!product) {
    product = std::make_shared<Product>();
    product->operation = operation;
    product->warp = warp;
    product->site = site;
    product->caller = VOCO_CALLER;
    product->agent = make_agent(group.agents[warp], site);
    product->issued = new_order();
    product->read = new_order();
  }
  if (a) std::copy_n(a, 4, product->a[thread.lane]);
  release(product->issued);
  mine.products.push_back({product, sums, mine.closed_groups, false});
  if (++product->lanes == kWarpSize) product.reset();
  meet(group.meeting, "wgmma", site, false);
  if (!lazy_copies()) add(mine.products.back(), thread.lane);
}

void wgmma_commit(Site site) {
  const Unwatched unwatched;
  meet_warp("wgmma_commit", site);
  HopperThread& mine = this_thread();
  ++mine.closed_groups;
  mine.fenced = false;
}

void wgmma_wait(int in_flight, const float* sums, int count, Site site) {
  const Unwatched unwatched;
  meet_warp("wgmma_wait", site);
  HopperThread& mine = this_thread();
  mine.fenced = false;
  auto oldest_left = mine.products.begin();
  for (; oldest_left != mine.products.end() && oldest_left->group < mine.closed_groups - in_flight; ++oldest_left) {
    add(*oldest_left, machine.thread->lane);
    acquire(oldest_left->product->read);
  }
  mine.products.erase(mine.products.begin(), oldest_left);
  for (const ThreadProduct& product : mine.products) {
    const bool named = product.sums >= sums && product.sums < sums + count;
    if (named) fail_in_thread("wgmma_wait for sums that are still under way", site);
  }
}

}  // namespace voco::host
