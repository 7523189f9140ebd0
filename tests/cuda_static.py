"""The modules of bench/static that count the CUDA kernels, for tests: a script's neighbours."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "static"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Each imports those before it by its plain name, as a script's neighbours do.
sass, work, forward, backward, single_pass, counts, tables, bench = map(
    _load,
    (
        "sass",
        "cuda_work",
        "cuda_forward",
        "cuda_backward",
        "cuda_single_pass",
        "cuda_counts",
        "cuda_table",
        "cuda_kernels",
    ),
)
