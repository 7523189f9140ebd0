"""Ctrl-C in the middle of a command, as a terminal sends it."""

import os
import signal
import subprocess
import sys


def interrupted(*arguments, after, **variables):
    """Status, stdout and stderr of `casvit-kernels`, interrupted once it has said `after` on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "casvit_kernels", *map(str, arguments)],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A parent that runs in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = ""
    while after not in seen:
        letter = process.stderr.read(1)
        assert letter, seen
        seen += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    return process.returncode, out, err
