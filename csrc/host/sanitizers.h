// What the sanitizers must be told about fibers and shared memory; nothing in a plain build. Part of scheduler.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef VOCO_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef VOCO_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
extern "C" void __tsan_read_range_pc(void* memory, unsigned long bytes, void* caller);
extern "C" void __tsan_write_range_pc(void* memory, unsigned long bytes, void* caller);
#endif

namespace voco::host {

#ifdef VOCO_ASAN
inline void open_memory(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
inline void close_memory(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline bool is_open(const void* memory, size_t bytes) {
  return !__asan_region_is_poisoned(const_cast<void*>(memory), bytes);
}
// Around a change of stacks: `frames` keeps what belongs to the old one.
inline void leave_stack(void** frames, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(frames, bottom, bytes);
}
inline void enter_stack(void* frames, const void** old_bottom, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(frames, old_bottom, old_bytes);
}
#else
inline void open_memory(const void*, size_t) {}
inline void close_memory(const void*, size_t) {}
inline bool is_open(const void*, size_t) { return true; }
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

#ifdef VOCO_TSAN
constexpr bool kDetectsRaces = true;
// ThreadSanitizer has room for 8128.
constexpr size_t kMaxThreads = 8000;

// What a thread did before its release() comes before what others do after their acquire() of the same address.
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }

inline void* identity() { return __tsan_get_current_fiber(); }
inline void* make_identity() { return __tsan_create_fiber(0); }
inline void take_identity(void* of) { __tsan_switch_to_fiber(of, __tsan_switch_to_fiber_no_sync); }
inline void end_identity(void* of) { __tsan_destroy_fiber(of); }

inline void stop_watching() { __tsan_ignore_thread_begin(); }
inline void watch() { __tsan_ignore_thread_end(); }

// Accesses that the kernel has asked for, where `caller` is.
inline void note_read(const void* memory, size_t bytes, void* caller) {
  __tsan_read_range_pc(const_cast<void*>(memory), bytes, caller);
}
inline void note_write(void* memory, size_t bytes, void* caller) { __tsan_write_range_pc(memory, bytes, caller); }
#else
constexpr bool kDetectsRaces = false;
constexpr size_t kMaxThreads = SIZE_MAX;
inline void release(void*) {}
inline void acquire(void*) {}
inline void* identity() { return nullptr; }
inline void* make_identity() { return nullptr; }
inline void take_identity(void*) {}
inline void end_identity(void*) {}
inline void stop_watching() {}
inline void watch() {}
inline void note_read(const void*, size_t, void*) {}
inline void note_write(void*, size_t, void*) {}
#endif

// While one lives, what this thread does is the scheduler's work and not the kernel's: ThreadSanitizer also sees calls of
// memcpy, malloc and free.
struct Unwatched {
  Unwatched() { stop_watching(); }
  ~Unwatched() { watch(); }
  Unwatched(const Unwatched&) = delete;
};

}  // namespace voco::host
