"""Import it where TRITON_INTERPRET is set: the interpreter as it is, twice as fast.

Triton's interpreter patches its language anew whenever a kernel calls a helper, which is half of all
its work. The launch of a kernel has done so for the kernels' modules; for Triton's own, once lasts.
"""

from triton.runtime import interpreter

_patched = set()


def _call(self, *args, **kwargs):
    module = self.fn.__module__
    if module.startswith("triton.") and module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
