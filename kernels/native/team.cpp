// Waiting: within a region by spinning, because a sleeping thread wakes later than most phases take; after some turns the
// core is offered to others, so that a machine with more threads than cores goes on. Between regions a thread spins for
// a few milliseconds, which is longer than from one decode step to the next, and then sleeps.
#include "team.h"

#include <immintrin.h>
#include <sched.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "export.h"

namespace penstock {
namespace {

constexpr int64_t SPINS = 20000;         // turns of a barrier before each offer of the core
constexpr int64_t IDLE_SPINS = 100000;   // turns, a few milliseconds, before a thread sleeps

struct Job {
    Work work = nullptr;
    void* what = nullptr;
    int size = 0;
    std::atomic<int64_t>* counters = nullptr;
};

class Team {
   public:
    void run(int threads, int64_t phases, Work work, void* what) {
        std::lock_guard<std::mutex> one_at_a_time(busy_);
        grow(threads - 1);
        if (static_cast<int64_t>(counters_.size()) < phases * Region::PAD)
            counters_ = std::vector<std::atomic<int64_t>>(phases * Region::PAD);
        for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
        arrived_.store(0, std::memory_order_relaxed);
        inside_.store(threads - 1, std::memory_order_relaxed);
        if (threads > 1) {
            {
                std::lock_guard<std::mutex> lock(sleep_);
                job_ = {work, what, threads, counters_.data()};
                number_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        Region region(counters_.data(), arrived_, 0, threads);
        work(region, what);
        for (int64_t turn = 0; inside_.load(std::memory_order_acquire) > 0; ++turn) pause(turn);
    }

    static void pause(int64_t turn) {
        _mm_pause();
        if (turn % SPINS == SPINS - 1) sched_yield();
    }

   private:
    void grow(int workers) {
        while (static_cast<int>(workers_.size()) < workers) {
            const int index = static_cast<int>(workers_.size()) + 1;
            const uint64_t seen = number_.load(std::memory_order_relaxed);
            workers_.emplace_back([this, index, seen] { serve(index, seen); });
            workers_.back().detach();
        }
    }

    void serve(int index, uint64_t seen) {
        for (;;) {
            for (int64_t turn = 0; number_.load(std::memory_order_acquire) == seen; ++turn) {
                if (turn < IDLE_SPINS) {
                    pause(turn);
                    continue;
                }
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
            }
            Job job;
            {
                std::lock_guard<std::mutex> lock(sleep_);
                seen = number_.load(std::memory_order_relaxed);
                job = job_;
            }
            if (index >= job.size) continue;
            Region region(job.counters, arrived_, index, job.size);
            job.work(region, job.what);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::vector<std::atomic<int64_t>> counters_;
    std::atomic<uint64_t> number_{0};
    std::atomic<int64_t> arrived_{0};
    std::atomic<int> inside_{0};
    Job job_;
};

// Never destroyed: its threads may outlive the main one.
Team& team() {
    static Team* const one = new Team;
    return *one;
}

}  // namespace

void Region::meet() {
    ++phase_;
    if (size == 1) return;
    const int64_t wanted = phase_ * size;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == wanted) return;
    for (int64_t turn = 0; arrived_.load(std::memory_order_acquire) < wanted; ++turn) Team::pause(turn);
}

void run_region(int threads, int64_t phases, Work work, void* what) { team().run(threads, phases, work, what); }

}  // namespace penstock
