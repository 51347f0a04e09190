// Scratch memory of the training kernels: a growing bump allocator per thread, so that a step in a
// loop allocates nothing after its first round (a fresh large malloc costs a page fault per 4 KB).
// Compiled once, outside the per-instruction-set sources.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace flame {

// Takes memory from the calling thread's arena and gives it all back when it goes out of scope.
// Scopes of one thread nest like a stack. Memory is 64-byte aligned and uninitialised.
class Workspace {
  public:
    Workspace();
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }
    void* bytes(size_t count);

  private:
    size_t block_;
    size_t used_;
};

// Gives the calling thread's arena back to the system.
void release_workspace();

}  // namespace flame
