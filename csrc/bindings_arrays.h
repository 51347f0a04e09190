// Checked views of numpy arrays for the bindings: an array is used in place or refused, never
// copied silently. Messages name the argument, what came and what is allowed.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "check.h"

namespace flame {

namespace py = pybind11;

// A row-major float32 matrix; consecutive rows are `ld` floats apart.
struct RowsView {
    const float* data;
    int64_t rows;
    int64_t ld;
};

inline std::string shape_text(const py::array& a) {
    std::string text = "(";
    for (py::ssize_t i = 0; i < a.ndim(); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(a.shape(i));
    }
    return text + (a.ndim() == 1 ? ",)" : ")");
}

inline void check_float32(const py::array& a, const char* name) {
    if (!py::isinstance<py::array_t<float>>(a)) {  // the text calls into Python, so only when wrong
        check(false, name, " has dtype ", std::string(py::str(a.dtype())), "; it must be float32");
    }
    check(reinterpret_cast<uintptr_t>(a.data()) % sizeof(float) == 0, name,
          " is not aligned to 4 bytes; pass a copy");
}

// (rows, columns); rows < 0 accepts any number of rows.
inline RowsView matrix(const py::array& a, const char* name, int64_t rows, int64_t columns) {
    check_float32(a, name);
    const std::string wanted = rows < 0 ? std::string("any") : std::to_string(rows);
    check(a.ndim() == 2 && (rows < 0 || a.shape(0) == rows) && a.shape(1) == columns, name,
          " has shape ", shape_text(a), "; it must be (", wanted, ", ", columns, ")");
    const auto item = static_cast<py::ssize_t>(sizeof(float));
    // Strides of an empty array mean nothing.
    check(a.size() == 0 || ((columns <= 1 || a.strides(1) == item) && a.strides(0) % item == 0),
          name, " has strided columns; pass numpy.ascontiguousarray of it");
    return {static_cast<const float*>(a.data()), a.shape(0), a.strides(0) / item};
}

// A dense array of the given shape.
inline const float* dense(const py::array& a, const char* name,
                          std::initializer_list<int64_t> shape) {
    check_float32(a, name);
    bool same = a.ndim() == static_cast<py::ssize_t>(shape.size());
    std::string wanted;
    py::ssize_t i = 0;
    for (const int64_t size : shape) {
        if (same) same = a.shape(i) == size;
        wanted += (i > 0 ? ", " : "") + std::to_string(size);
        ++i;
    }
    if (shape.size() == 1) wanted += ",";
    check(same, name, " has shape ", shape_text(a), "; it must be (", wanted, ")");
    check((a.flags() & py::array::c_style) != 0, name,
          " is not C-contiguous; pass numpy.ascontiguousarray of it");
    return static_cast<const float*>(a.data());
}

inline float* writable(const py::array& a, const char* name, std::initializer_list<int64_t> shape) {
    dense(a, name, shape);
    check(a.writeable(), name, " is read-only; it receives results");
    return const_cast<float*>(static_cast<const float*>(a.data()));
}

}  // namespace flame
