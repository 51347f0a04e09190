// Memory of a recorded pass: an arena of its own, borrowed from a shared pool.
#pragma once

#include <memory>

#include "cpu/workspace.h"

namespace flame {

class RecordMemory {
  public:
    RecordMemory() : arena_(borrow_arena(), &return_arena), workspace_(arena_.get()) {}
    Workspace& operator*() { return workspace_; }

  private:
    std::unique_ptr<Arena, void (*)(Arena*)> arena_;
    Workspace workspace_;  // after arena_: it gives back first
};

}  // namespace flame
