// One function per bindings_*.cpp; each adds its part to the module. And what all of them need.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace flame {

// Releases the GIL for its scope. Before Python 3.14 a daemon thread that wants it back while the
// interpreter ends is unwound from here, through destructors: pybind11's guard terminates the
// process then, this one lets the thread wait for the end.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) pause();
        }
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

void bind_policy(pybind11::module_& m);
void bind_training(pybind11::module_& m);
void bind_flow(pybind11::module_& m);
void bind_policy_loss(pybind11::module_& m);
void bind_critic_updates(pybind11::module_& m);
void bind_embeddings(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // nothing in a build without CUDA
void bind_on_host(pybind11::module_& m);

}  // namespace flame
