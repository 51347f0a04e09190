#include "cpu/workspace.h"

#include <pthread.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "partition.h"

namespace flame {
namespace {

constexpr size_t kAlignment = 64;
// A recorded pass walks columns of rows that lie a kilobyte apart: in pages of 4 KB it would miss
// the translation buffer at every few rows.
constexpr size_t kHugePage = size_t{2} << 20;

struct FreeBlock {
    void operator()(void* p) const { std::free(p); }
};

struct Block {
    std::unique_ptr<char, FreeBlock> memory;
    size_t size;
};

Block new_block(size_t size) {
    void* memory = std::aligned_alloc(kHugePage, size);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);  // without huge pages it merely is slower
#endif
    return {std::unique_ptr<char, FreeBlock>(static_cast<char*>(memory)), size};
}

}  // namespace

// Blocks never move, so pointers stay valid while later requests grow the arena.
struct Arena {
    std::vector<Block> blocks;
    size_t current = 0;  // block in use
    size_t used = 0;     // bytes taken of it

    void* take(size_t size) {
        size = round_up(size, kAlignment);
        while (current < blocks.size() && used + size > blocks[current].size) {
            ++current;
            used = 0;
        }
        if (current == blocks.size()) grow(size);
        void* p = blocks[current].memory.get() + used;
        used += size;
        return p;
    }

    void grow(size_t size) {
        const size_t next = blocks.empty() ? kHugePage : 2 * blocks.back().size;
        blocks.push_back(new_block(round_up(size > next ? size : next, kHugePage)));
        used = 0;
    }
};

namespace {

thread_local Arena thread_arena;

struct ArenaPool {
    std::mutex mutex;
    std::vector<std::unique_ptr<Arena>> idle;
};

// Made when the module is loaded, before any thread computes, and never destroyed: recorded passes
// may be collected after static destructors have run.
ArenaPool* const arena_pool = [] {
    // A forked child must not inherit the lock of a thread that it does not have.
    pthread_atfork([] { arena_pool->mutex.lock(); }, [] { arena_pool->mutex.unlock(); },
                   [] { arena_pool->mutex.unlock(); });
    return new ArenaPool;
}();

}  // namespace

Workspace::Workspace() : Workspace(&thread_arena) {}

Workspace::Workspace(Arena* arena) : arena_(arena), block_(arena->current), used_(arena->used) {}

Workspace::~Workspace() {
    arena_->current = block_;
    arena_->used = used_;
}

float* Workspace::floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }

void* Workspace::bytes(size_t count) { return arena_->take(count); }

Arena* borrow_arena() {
    const std::lock_guard<std::mutex> lock(arena_pool->mutex);
    std::vector<std::unique_ptr<Arena>>& idle = arena_pool->idle;
    if (idle.empty()) return new Arena;
    Arena* arena = idle.back().release();
    idle.pop_back();
    return arena;
}

void return_arena(Arena* arena) {
    const std::lock_guard<std::mutex> lock(arena_pool->mutex);
    arena_pool->idle.emplace_back(arena);
}

}  // namespace flame
