"""Runs a network between pages that nobody may touch: a script, as a bad access ends the process."""

import ctypes
import mmap
import sys

import torch
from network_plans import PLANS, outputs, random_weights

from casvit_kernels.ops.network import cpu

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_kept = []


def guarded(t, at_end):
    """A copy whose last byte (first byte) is the last (first) before a page without access."""
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + pages):
        if libc.mprotect(page, PAGE, mmap.PROT_READ * 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages - size if at_end else 0)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
    copy = raw.view(t.dtype).as_strided(t.shape, t.stride())
    return copy.copy_(t)


def main():
    kernels = cpu.kernels()
    for name, plan in PLANS.items():
        weights = random_weights(plan)
        for size in ((1, 32, 32), (2, 37, 51), (3, 64, 47)):
            for precision in (0, 1) if cpu.has_precision("bf16") else (0,):
                packed = kernels.pack(weights, plan.to_ints(), precision)
                x = torch.rand(size[0], plan.in_chans, *size[1:])
                if plan.normalized:
                    x = (x * 255).to(torch.uint8)
                for threads in (1, 2):
                    for at_end in (False, True):
                        # Kernels want whole cache lines of scratch and of weights.
                        bytes_ = kernels.scratch(plan.to_ints(), size, precision, threads)
                        scratch = torch.full((bytes_,), 255, dtype=torch.uint8)
                        outs = [guarded(t, at_end) for t in outputs(plan, x)]
                        kernels.infer(
                            guarded(x, at_end),
                            guarded(packed, at_end),
                            plan.to_ints(),
                            precision,
                            threads,
                            guarded(scratch, at_end),
                            outs,
                        )
                        assert all(bool(t.isfinite().all()) for t in outs), (name, size, threads)
    print("ok")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
    sys.stdout.flush()
    import os

    os._exit(0)  # the guarded pages outlive every tensor
