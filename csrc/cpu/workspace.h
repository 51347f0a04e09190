// Scratch memory of the training kernels: growing bump allocators that are kept for reuse, so that
// a step in a loop allocates nothing after its first round (a fresh large malloc costs a page fault
// per 4 KB). Compiled once, outside the per-instruction-set sources.
#pragma once

#include <stddef.h>

namespace flame {

struct Arena;

// Takes memory from an arena and gives it all back when it goes out of scope. Scopes on one arena
// nest like a stack. Memory is 64-byte aligned and uninitialised.
class Workspace {
  public:
    Workspace();  // on the calling thread's arena
    explicit Workspace(Arena* arena);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* floats(size_t count);
    void* bytes(size_t count);

  private:
    Arena* arena_;
    size_t block_;
    size_t used_;
};

// An arena of its own for memory that outlives a call (a recorded forward pass); comes from and
// goes back to a pool shared by all threads.
Arena* borrow_arena();
void return_arena(Arena* arena);

}  // namespace flame
