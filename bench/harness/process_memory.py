"""The most memory that one call takes on the CPU, in a process of its own.

The kernels' scratch memory is no tensor, so PyTorch's allocator does not see it: what the system gave to
the process is counted. Linux only.

    python -m bench.harness.process_memory MODULE:FUNCTION '{"argument": ...}'

The function returns two callables: one that warms up what a first call loads, on a small input, and the
one that is measured. Prints bytes: the most that was resident during the call, less what was before it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from casvit_kernels.benchmark import Unavailable

ROOT = Path(__file__).resolve().parents[2]
Calls = tuple[Callable[[], object], Callable[[], object]]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_process(make: str, **arguments: object) -> int:
    """Bytes, as measured by a new process.

    Args:
        make: ``"package.module:function"``, whose result is described above; called with `arguments`,
            which JSON can hold.

    Raises:
        Unavailable: this system does not tell, or the process failed; says why.
    """
    if not RESET.exists():
        raise Unavailable("memory of a process is read from /proc, which is not there")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "bench.harness.process_memory", make, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Unavailable(f"its process failed: {last}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """A field of the process's status, in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def measured(call: Callable[[], object]) -> int:
    """Bytes that become resident during the call, at most; in this process."""
    RESET.write_text("5", encoding="ascii")  # VmHWM begins anew
    before = _resident("VmRSS")
    out = call()
    most = _resident("VmHWM")
    del out
    return max(0, most - before)


def main(make: str, arguments: str) -> None:
    module, _, function = make.partition(":")
    warm, call = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    warm()
    print(measured(call))


if __name__ == "__main__":
    main(*sys.argv[1:])
