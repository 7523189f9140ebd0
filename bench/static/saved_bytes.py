"""What the mixer keeps for the backward, in bytes: plain PyTorch against the fused CPU backend.

    python bench/static/saved_bytes.py    every stage of xs and t, into bench/results/saved_bytes.json

Counted by saved-tensor hooks: every storage once, the input with it, parameters and buffers without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casvit_kernels import AdditiveTokenMixer, FusedCATM
from casvit_kernels.models.rcvit import CONFIGS

RESULTS = Path(__file__).parents[1] / "results" / "saved_bytes.json"
MODELS, SIZES, BATCH = ("xs", "t"), (56, 28, 14, 7), 2


def kept(module: nn.Module, x: Tensor) -> dict[int, int]:
    """Bytes of each storage that autograd keeps in one call, by address."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    return kept_by(lambda: module(x), own)


def kept_by(
    call: Callable[[], object], own: frozenset[int] | set[int] = frozenset()
) -> dict[int, int]:
    """As `kept`, of a call that may run the backward too; storages at addresses `own` are left out."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()  # what it keeps is alive until all is counted: no address comes twice
    return found


def measure(model: str, stage: int) -> dict[str, Any]:
    """One row of the table, float32, 224x224 input, training mode."""
    dim, size = CONFIGS[f"rcvit_{model}"].dims[stage - 1], SIZES[stage - 1]
    x = torch.randn(BATCH, dim, size, size, requires_grad=True)
    eager, fused = (
        sum(kept(mixer.train(), x).values())
        for mixer in (AdditiveTokenMixer(dim), FusedCATM(dim, backend="cpu"))
    )
    row = {"model": model, "stage": stage, "shape": list(x.shape)}
    return row | {"eager_bytes": eager, "fused_bytes": fused, "ratio": round(eager / fused, 2)}


def main() -> None:
    rows = [measure(model, stage) for model in MODELS for stage in (1, 2, 3, 4)]
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    main()
