// Errors of the native code. std::invalid_argument becomes ValueError in Python, std::runtime_error
// becomes RuntimeError. A message says what was given, what is allowed and what to do.
// Not for the per-instruction-set sources: they include no STL and assume checked arguments.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace flame {

template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// check(n > 0, "n is ", n, "; it must be positive")
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
    if (!ok) throw std::invalid_argument(concat(parts...));
}

}  // namespace flame
