// What the address sanitizer has to be told: which stack a thread is on, and which memory nobody may touch. Nothing in
// builds without it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool SANITIZED = true;
// Before a switch to another stack; `fake` keeps the place on this one, null when it is not returned to.
inline void leave_stack(void** fake, const void* bottom, size_t bytes) { __sanitizer_start_switch_fiber(fake, bottom, bytes); }
// After it, on the new one; gives the bounds of the stack that was left.
inline void enter_stack(void* fake, const void** bottom, size_t* bytes) { __sanitizer_finish_switch_fiber(fake, bottom, bytes); }
inline void forbid(const void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
inline void permit(const void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
constexpr bool SANITIZED = false;
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
#endif

} // namespace emu
