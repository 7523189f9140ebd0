"""What was set, and is easily forgotten: environment variables, and modes of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Facts
from .finding import Finding
from .variables import BACKEND, EFFECTS, ISA

# Each costs speed, or takes calls away from the kernels.
_DEBUGGING = ("TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "TORCHDYNAMO_DISABLE",
              "TORCH_COMPILE_DISABLE", "ATEN_CPU_CAPABILITY")  # fmt: skip
_OFF = ("", "0")

# By the name in `Facts.modes`: what is on, and how to turn it off.
MODES: dict[str, tuple[str, str]] = {
    "anomaly": (
        "autograd's anomaly detection is on: training is slower",
        "torch.autograd.set_detect_anomaly(False)",
    ),
    "fill": (
        "deterministic algorithms fill new memory: each call is slower",
        "torch.utils.deterministic.fill_uninitialized_memory = False",
    ),
    "hooks": (
        "hooks on all modules are registered: fused mixers and networks run unfused",
        "call remove() of the handle that register_module_forward_hook, or one of its like, returned",
    ),
    "functions": (
        "a torch function mode is active, as torch.set_default_device makes one: whole networks run "
        "unfused, mixers without their fast path",
        "torch.set_default_device(None); give tensors and modules their device instead",
    ),
}


def findings(facts: Facts) -> Iterator[Finding]:
    found = [*_backend(facts), *_instruction_set(facts), *_debugging(facts), *_modes(facts)]
    yield from found or [Finding("settings", "ok", "nothing is forced, no debugging mode is on")]


def _backend(facts: Facts) -> Iterator[Finding]:
    name = facts.environ.get(BACKEND)
    if not name:
        return
    remedy = f"unset {BACKEND}"
    if facts.backend_error is not None:
        yield Finding(BACKEND, "problem", facts.backend_error, remedy)
    else:
        found = f"{name!r} is asked for; other backends are not tried, what it cannot do raises"
        yield Finding(BACKEND, "note", found, remedy)


def _instruction_set(facts: Facts) -> Iterator[Finding]:
    name = facts.environ.get(ISA)
    usable = [n for n, reason in facts.native.sets.items() if reason is None]
    if name in usable[1:]:  # one that cannot be used: the native library says so
        found = f"{name!r} is asked for, and this CPU has {usable[0]!r}"
        yield Finding(ISA, "note", found, f"unset {ISA}")


def _debugging(facts: Facts) -> Iterator[Finding]:
    for name in _DEBUGGING:
        value = facts.environ.get(name, "")
        if value not in _OFF:
            yield Finding(name, "note", f"set to {value!r}: {EFFECTS[name]}", f"unset {name}")


def _modes(facts: Facts) -> Iterator[Finding]:
    for name in facts.modes:
        found, remedy = MODES[name]
        yield Finding("mode", "note", found, remedy)
