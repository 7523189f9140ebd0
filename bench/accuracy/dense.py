"""Detection and segmentation of digits by the example scripts, with fused and with plain mixers.

    python bench/accuracy/dense.py    about 40 minutes on two cores; into bench/results/dense_digits.json
    python bench/accuracy/dense.py --kind segmentation    one of the two; the file keeps the other
    python bench/accuracy/dense.py --kind detection --mixer fused

Each run is `torchrun --nproc-per-node 2 examples/train_{detection,segmentation}.py --data digits` with
its defaults. Written: the last row of the run's val.csv in percent, its seconds, versions and the CPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from casvit_kernels.benchmark import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "dense_digits.json"
KINDS, MIXERS = ("segmentation", "detection"), ("fused", "reference")


def train(kind: str, mixer: str, folder: Path) -> dict[str, Any]:
    """What the run ended with."""
    script = ROOT / "examples" / f"train_{kind}.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    options = ["--data", "digits", "--mixer", mixer, "--workers", "0", "--device", "cpu"]
    output = folder / f"{kind}-{mixer}"
    begin = time.monotonic()
    subprocess.run([*command, str(script), *options, "--output", str(output)], check=True)
    seconds = time.monotonic() - begin
    with (output / "val.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {"seconds": round(seconds), **{name: float(value) for name, value in last.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, help="one of the two scripts (default: both)")
    parser.add_argument("--mixer", choices=MIXERS, help="one of the two mixers (default: both)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in [arguments.kind] if arguments.kind else KINDS:
            for mixer in [arguments.mixer] if arguments.mixer else MIXERS:
                run = {**train(kind, mixer, Path(folder)), "environment": environment()}
                found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                found.setdefault(kind, {})[mixer] = run
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")  # each run as it ends


if __name__ == "__main__":
    main()
