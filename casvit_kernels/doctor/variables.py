"""The environment variables that change what is computed, by what, or how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..backends import ENVIRONMENT
from ..backends.native import ISA_ENVIRONMENT

BACKEND, ISA = ENVIRONMENT, ISA_ENVIRONMENT


class Variable(NamedTuple):
    name: str
    value: str
    effect: str


EFFECTS: dict[str, str] = {
    BACKEND: "this backend serves every call, or the call raises",
    ISA: "the instruction set of the CPU kernels",
    "OMP_NUM_THREADS": "threads of PyTorch and of the kernels",
    "MKL_NUM_THREADS": "threads of a PyTorch that is built with MKL",
    "OMP_THREAD_LIMIT": "the most threads that OpenMP starts",
    "OMP_PROC_BIND": "pins OpenMP's threads to CPUs",
    "GOMP_CPU_AFFINITY": "pins GNU OpenMP's threads to CPUs",
    "KMP_AFFINITY": "pins Intel's and LLVM's OpenMP threads to CPUs",
    "OMP_WAIT_POLICY": "whether threads spin or sleep between calls",
    "GOMP_SPINCOUNT": "how long GNU OpenMP's threads spin between calls",
    "KMP_BLOCKTIME": "how long Intel's and LLVM's OpenMP threads spin between calls",
    "KMP_DUPLICATE_LIB_OK": "silences the error that two OpenMP runtimes are loaded",
    "ATEN_CPU_CAPABILITY": "the instruction set of PyTorch's own CPU kernels",
    "TRITON_INTERPRET": "Triton's kernels run in its interpreter, on the CPU, very slowly",
    "CUDA_VISIBLE_DEVICES": "the GPUs that this process sees",
    "CUDA_LAUNCH_BLOCKING": "each launch on a GPU is waited for",
    "TORCHDYNAMO_DISABLE": "torch.compile compiles nothing",
    "TORCH_COMPILE_DISABLE": "torch.compile compiles nothing",
}


def present(environ: Mapping[str, str]) -> list[Variable]:
    """Those that are set, in the order of `EFFECTS`."""
    return [
        Variable(name, environ[name], effect) for name, effect in EFFECTS.items() if name in environ
    ]
