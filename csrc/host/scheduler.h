// Runs the threads of a CUDA kernel as fibers of one CPU thread, blocks in turn. Tests only.
//
// emulation.h builds the wrappers of voco/ops.cuh on these functions, hopper.h adds those of voco/hopper.cuh. A kernel's file
// may be compiled with a sanitizer; scheduler.cpp and what adds to it (machine.h) never are, since they change stacks and act
// for others, and VOCO_ASAN or VOCO_TSAN make them tell the sanitizer.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace voco::host {

// Where in a kernel a wrapper was called.
struct Site {
  const char* file;
  int line;
};

// A copy of 16 bytes into shared memory; without a source it writes zeros.
struct Copy {
  void* to;
  const void* from;
};

constexpr int kWarpSize = 32;
constexpr int kExchangeWords = 12;

// What the running fiber sees as threadIdx, blockIdx, blockDim and gridDim.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Runs body(arguments) as every thread of the grid, until all have ended. Throws what a thread throws, and
// std::runtime_error, with the place and the coordinates of the thread, for what a GPU would not survive.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* arguments);

// Throws std::runtime_error: message, place, block and thread.
[[noreturn]] void fail(const char* message, Site site);

int lane();
void sync_block(Site site);
void sync_warp(Site site);
// Gives this lane's words to its warp, waits for all lanes, and returns theirs. Orders no memory, as on a GPU.
const uint32_t (*exchange(const char* what, const uint32_t (&words)[kExchangeWords], Site site))[kExchangeWords];
// c += a b of mma.m16n8k16, each argument in the lane's registers, operands widened to float.
void multiply(float (&c)[4], const float (&a)[8], const float (&b)[4], Site site);

void* dynamic_shared();
// The block's memory for one declaration of a static array, which `tag` stands for.
void* static_shared(const void* tag, size_t bytes, size_t alignment);
bool is_shared(const void* pointer);
uint32_t shared_address(const void* pointer, Site site);
// Memory of 16 bytes at a shared address: checked, and noted for the count of bank conflicts.
void* shared_16_bytes(const char* what, uint32_t address, Site site);

// Asynchronous copies of the running thread: queued, closed into groups, and taken out when they are due.
bool lazy_copies();
void queue_copy(Copy copy);
void commit_copies();
// The next copy of all groups but the newest `in_flight`; false when there is none left.
bool take_copy(int in_flight, Copy* copy);
// The next copy of all, of the group that is still open too.
bool take_any_copy(Copy* copy);

// For tests.
// Copies and products of wgmma happen at their wait (lazy, the default) or at once (eager); the environment variable
// VOCO_COPIES sets the first.
void set_lazy_copies(bool lazy);
// Extra cycles of ldmatrix and of 16-byte accesses to shared memory through the wrappers, over all launches since reset.
uint64_t bank_conflicts();
void reset_bank_conflicts();

}  // namespace voco::host
