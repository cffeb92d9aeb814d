#pragma once

// For functions in headers that kernels include: the linker keeps one copy of an ordinary inline
// function, and that copy may use instructions which the running machine does not have.
#define LK_INLINE inline __attribute__((always_inline))
