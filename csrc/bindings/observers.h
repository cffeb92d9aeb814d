// Whether a `use_backend` or `explain` block is open in any thread. Ops that a compiled graph calls
// without Python then leave the choice of a backend to Python.
#pragma once

namespace lora_kernels {

void set_observers(int count);
bool observed();

}  // namespace lora_kernels
