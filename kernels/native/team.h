// Threads that compute one step together: one parallel region for the whole of it, with barriers inside.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace penstock {

// What one thread of a region sees. Every thread goes through the same phases in the same order.
class Region {
   public:
    Region(std::atomic<int64_t>* counters, std::atomic<int64_t>& arrived, int index, int size)
        : index(index), size(size), counters_(counters), arrived_(arrived) {}

    // work(i) for each i below `count`, by whichever thread comes first, `chunk` at a time; on return all are done.
    template <class Work>
    void each(int64_t count, int64_t chunk, Work work) {
        std::atomic<int64_t>& next = counters_[phase_ * PAD];
        for (;;) {
            const int64_t start = next.fetch_add(chunk, std::memory_order_relaxed);
            if (start >= count) break;
            const int64_t stop = start + chunk < count ? start + chunk : count;
            for (int64_t i = start; i < stop; ++i) work(i);
        }
        meet();
    }

    // All threads of the region are here, and see what the others wrote.
    void meet();

    static constexpr int64_t PAD = 8;  // a counter has a cache line of its own
    const int index, size;

   private:
    std::atomic<int64_t>* counters_;
    std::atomic<int64_t>& arrived_;
    int64_t phase_ = 0;
};

using Work = void (*)(Region&, void*);

// work(region, what) on `threads` threads, the caller being one; at most `phases` meetings. One region at a time.
void run_region(int threads, int64_t phases, Work work, void* what);

}  // namespace penstock
