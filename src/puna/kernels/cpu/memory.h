// Memory for panels and activations, and what the C library does with what is freed.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

// Panels live in memory of their own: aligned to huge pages, of which whole ones are asked for (a product walks
// through gigabytes, small pages cost it 10 %), the rest in small ones, so no more is taken than is used.
inline void* panel_memory(size_t bytes) {
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64, size = (bytes + 63) / 64 * 64;
#ifdef _WIN32
    void* data = _aligned_malloc(size, alignment);
#else
    void* data = nullptr;
    if (posix_memalign(&data, alignment, size ? size : 64)) data = nullptr;
#endif
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == HUGE_PAGE) (void)madvise(data, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return data;
}

inline void free_panel_memory(void* data) noexcept {
#ifdef _WIN32
    _aligned_free(data);
#else
    std::free(data);
#endif
}

// Has the C library keep freed memory for the next allocation. By default glibc gives large blocks back at once, and
// the zeroing of fresh pages for the activations costs a prefill of 512 tokens on a 1B model 6 % (0.3 of 2.6 s).
inline bool keep_freed_memory() {
#ifdef __GLIBC__
    // Blocks up to 32 MiB (all that older versions accept) come from the heap, which shrinks above 1 GiB of slack.
    return mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, 1 << 30);
#else
    return false;
#endif
}
