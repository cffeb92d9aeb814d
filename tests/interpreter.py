"""Triton's interpreter, quicker.

It puts its own functions into triton.language before a kernel runs, and once more, to no effect,
before each function that the kernel calls: a third of these tests' time.
"""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """Put them there once a launch.

    Raises:
        RuntimeError: this release of Triton cannot interpret with this numpy.
    """
    from lora_kernels.ops.common.triton_version import refuse_interpreter

    reason = refuse_interpreter()
    if reason is not None:
        raise RuntimeError(f"TRITON_INTERPRET=1: {reason}")
    from triton.runtime import interpreter

    language = (interpreter.tl, interpreter.tl.core)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_new(fn: Any) -> Any:
        used = {id(m) for m in fn.__globals__.values() if any(m is known for known in language)}
        if used <= patched:
            return interpreter._LangPatchScope()
        patched.update(used)
        return patch(fn)

    def launch_alone(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_new
    interpreter.GridExecutor.__call__ = launch_alone
