// Memory for one step, kept for the next: fresh pages would cost more than many a step computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace penstock {

class Arena {
   public:
    // Everything taken before is free.
    void reset() {
        used_.assign(blocks_.size(), false);
    }

    // Room for `count`, aligned for vectors, with whatever was in it.
    template <class T>
    T* take(int64_t count) {
        const size_t size = (static_cast<size_t>(count) * sizeof(T) / 4096 + 1) * 4096;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            if (used_[i] || sizes_[i] < size || sizes_[i] > 4 * size) continue;
            used_[i] = true;
            return reinterpret_cast<T*>(blocks_[i].get());
        }
        blocks_.emplace_back(static_cast<std::byte*>(operator new(size, std::align_val_t(64))));
        sizes_.push_back(size);
        used_.push_back(true);
        return reinterpret_cast<T*>(blocks_.back().get());
    }

   private:
    struct Free {
        void operator()(std::byte* at) const { operator delete(at, std::align_val_t(64)); }
    };
    std::vector<std::unique_ptr<std::byte, Free>> blocks_;
    std::vector<size_t> sizes_;
    std::vector<bool> used_;
};

}  // namespace penstock
