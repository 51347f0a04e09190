#include "cpu/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace flame {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestBlock = size_t{1} << 20;

struct FreeBlock {
    void operator()(void* p) const { std::free(p); }
};

struct Block {
    std::unique_ptr<char, FreeBlock> memory;
    size_t size;
};

// Blocks never move, so pointers stay valid while later requests grow the arena.
struct Arena {
    std::vector<Block> blocks;
    size_t current = 0;  // block in use
    size_t used = 0;     // bytes taken of it

    void* take(size_t size) {
        size = (size + kAlignment - 1) / kAlignment * kAlignment;
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
        const size_t last = blocks.empty() ? kSmallestBlock : 2 * blocks.back().size;
        const size_t bytes = size > last ? size : last;
        char* memory = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
        if (memory == nullptr) throw std::bad_alloc();
        blocks.push_back({std::unique_ptr<char, FreeBlock>(memory), bytes});
        used = 0;
    }
};

thread_local Arena arena;

}  // namespace

Workspace::Workspace() : block_(arena.current), used_(arena.used) {}

Workspace::~Workspace() {
    arena.current = block_;
    arena.used = used_;
}

void* Workspace::bytes(size_t count) { return arena.take(count); }

void release_workspace() { arena = Arena{}; }

}  // namespace flame
