// What the bindings share: addresses as Python gives them become pointers.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

namespace reasonrl {

namespace py = pybind11;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace reasonrl
