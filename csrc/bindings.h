// One function per bindings_*.cpp; each adds its part to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace flame {

void bind_policy(pybind11::module_& m);
void bind_training(pybind11::module_& m);
void bind_flow(pybind11::module_& m);
void bind_policy_loss(pybind11::module_& m);
void bind_critic_updates(pybind11::module_& m);
void bind_embeddings(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // nothing in a build without CUDA
void bind_on_host(pybind11::module_& m);

}  // namespace flame
