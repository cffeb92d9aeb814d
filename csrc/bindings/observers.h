// Whether anybody looks on: a `use_backend` or `explain` block of any thread is open. Ops that a
// compiled graph calls without Python then go through the choice of a backend in Python.
#pragma once

namespace lora_kernels {

void set_observers(int count);
bool observed();

}  // namespace lora_kernels
