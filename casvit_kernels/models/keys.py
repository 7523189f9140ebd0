"""What the keys of a checkpoint say: which tensors are the model's, and of which size it is.

Nothing is guessed. Of two sets of weights that would both serve one is taken only if the other is an
average that was not asked for, belongs to another size of the model or holds the same values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .rcvit import CONFIGS, Config
from .reading import CheckpointError

HEADS = ("head.weight", "head.bias", "dist_head.weight", "dist_head.bias")

# Put around modules by DistributedDataParallel and AveragedModel, torch.compile, FSDP and
# activation checkpointing; at any depth.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Names under which detectors, segmenters and training modules keep the network.
_CONTAINERS = frozenset({"_backbone", "backbone", "body", "encoder", "model", "net"})
# And a moving average of it: model_ema, ema_model, swa_model; mm's hook writes ema_backbone_patch_….
_AVERAGED = re.compile(r"(?:\w+_)?(?:ema|swa|avg|averaged)(?:_\w+)?")
# What averages count beside the weights (torch.optim.swa_utils, mmengine).
_COUNTERS = ("n_averaged", "steps")
# Parts of detectors, segmenters and training modules that stand beside a backbone.
_BESIDE = re.compile(
    r"(?:\w+_)?(?:necks?|heads?|fpn|rpn|decoder|classifier|criterion|loss)|loss_\w+|data_preprocessor"
)
_BIRDER = re.compile(r"(?:^|\.)op_[qk]\.")

Stages = tuple[tuple[int, int], ...]


class Selection(NamedTuple):
    """The tensors of a checkpoint, sorted.

    weights: those under the prefix of the model, by key without it; not all need be the model's.
    outside: keys of others, there for no known reason.
    skipped: keys left out on purpose, and why.
    """

    weights: dict[str, Tensor]
    outside: tuple[str, ...]
    skipped: dict[str, str]


def select(content: Any, own: Mapping[str, Tensor], use_ema: bool, source: str) -> Selection:
    """The weights of the model in what a checkpoint holds.

    Args:
        content: what the file holds.
        own: the tensors of the model by key, without wrappers.
        use_ema: take the averaged weights.
        source: the name of the checkpoint in messages.

    Raises:
        CheckpointError: there are no weights, or several that would serve.
    """
    state, averaged = state_dict_of(content, use_ema, source)
    tensors = cleaned(state, source)
    counters = {key for key in tensors if _is_counter(key, tensors[key], own)}
    candidates = _candidates(tensors, own)
    wanted = use_ema and not averaged
    counted = {key.rpartition(".")[0] for key in counters}
    serving = [
        prefix
        for prefix in candidates
        if averaged or _is_averaged(prefix) == wanted or (wanted and prefix in counted)
    ]
    if wanted and not serving:
        raise CheckpointError(
            f"{source}: use_ema expected averaged weights under 'model_ema', "
            f"got the entries {names(content)}"
        )
    if candidates and not serving:
        raise CheckpointError(
            f"{source}: expected weights of the model, got averaged ones only, under "
            f"{names(candidates)}; use_ema=True reads them"
        )
    prefix, passed_over = _choose({p: candidates[p] for p in serving}, own, source)

    weights: dict[str, Tensor] = {}
    outside: list[str] = []
    skipped: dict[str, str] = {}
    tops = {key.split(".")[0] for key in own}

    def leads(key: str, prefix: str) -> bool:
        """Whether a key under the prefix belongs to a network like the model."""
        inside = _below(key, prefix)
        return inside is not None and inside.split(".")[0] in tops

    for key, tensor in tensors.items():
        inside = _below(key, prefix)
        part = part_of(key if inside is None else inside)
        other = next((why for p, why in passed_over.items() if leads(key, p)), None)
        if key in counters:
            skipped[key] = "it counts averaged weights"
        elif inside is not None and inside in own:
            weights[inside] = tensor
        elif other is not None:
            skipped[key] = other
        elif not averaged and _is_averaged(key) and not _is_averaged(prefix):
            skipped[key] = "averaged weights (use_ema=True reads them)"
        elif wanted and _is_averaged(prefix) and any(leads(key, p) for p in candidates):
            skipped[key] = "weights that are not averaged (use_ema=False reads them)"
        elif (
            _BESIDE.fullmatch(part) and inside not in HEADS and (inside is None or part not in tops)
        ):
            dense = "head.weight" not in own
            skipped[key] = "the model is a backbone" if dense else "the model has no such part"
        elif inside is not None:
            weights[inside] = tensor
        else:
            outside.append(key)
    return Selection(weights, tuple(outside), skipped)


def state_dict_of(content: Any, use_ema: bool, source: str) -> tuple[Mapping[Any, Any], bool]:
    """The state dict inside a checkpoint, and whether it stands where averaged ones do."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: expected a checkpoint (a mapping), got {type(content).__name__}"
        )
    for averaged in (True, False) if use_ema else (False,):
        entries = (
            ("model_ema", "state_dict_ema", "ema_state_dict")
            if averaged
            else ("model", "state_dict")
        )
        found = {name: content[name] for name in entries if content.get(name) is not None}
        # The name of an architecture may stand there, too.
        states = {name: entry for name, entry in found.items() if isinstance(entry, Mapping)}
        if not states and found:
            name, entry = next(iter(found.items()))
            raise CheckpointError(
                f"{source}: expected a state dict under {name!r}, got {type(entry).__name__}"
            )
        if len(states) > 1 and not _all_equal(list(states.values())):
            raise CheckpointError(
                f"{source}: expected one state dict, got different ones under {names(states)}; "
                f"pass the one that is meant, as in checkpoint[{next(iter(states))!r}]"
            )
        if states:
            return next(iter(states.values())), averaged
    return content, False


def cleaned(state: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The state dict without wrappers' prefixes; every value a tensor."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        if any(_is_birders(value) for value in state.values() if isinstance(value, Mapping)):
            raise CheckpointError(f"{source}: {_BIRDERS}")
        averaged = [name for name in state if isinstance(name, str) and _AVERAGED.fullmatch(name)]
        raise CheckpointError(
            f"{source}: expected a state dict of tensors, got one without any; "
            f"its entries: {names(state)}{'; use_ema=True reads averaged weights' if averaged else ''}"
        )
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: expected a state dict of named tensors, "
                f"got {type(value).__name__} under {shortened(key)}"
            )
        if strip(key) in clean:
            raise CheckpointError(
                f"{source}: expected one tensor for {printable(strip(key))}, got several "
                f"(one as {printable(key)})"
            )
        clean[strip(key)] = value
    return clean


def strip(key: str) -> str:
    """A key without the prefixes of wrappers."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _candidates(
    tensors: Mapping[str, Tensor], own: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """By prefix, the tensors under it; of prefixes that lead to a key of the model."""
    prefixes: dict[str, None] = {}
    for key in tensors:
        parts = key.split(".")
        for length in range(_containers(parts) + 1):
            if ".".join(parts[length:]) in own:
                prefixes[".".join(parts[:length])] = None
    return {
        prefix: {
            inside: tensor
            for key, tensor in tensors.items()
            if (inside := _below(key, prefix)) is not None
        }
        for prefix in prefixes
    }


def _choose(
    candidates: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Tensor], source: str
) -> tuple[str, dict[str, str]]:
    """The prefix of the model's weights; those of others that would serve, and why not they."""
    whole = [prefix for prefix, weights in candidates.items() if stages_of(weights)]
    serving = whole or list(candidates)  # a whole network before single tensors
    passed_over: dict[str, str] = {}
    ours = stages_of(own)
    fitting = [p for p in serving if same_size(stages_of(candidates[p]), ours)]
    if fitting:
        for prefix in serving:
            theirs = stages_of(candidates[prefix])
            if prefix not in fitting:
                passed_over[prefix] = (
                    f"these are of {describe(theirs)}, the model is {describe(ours)}"
                )
        serving = fitting
    if len(serving) > 1:
        weights = [
            {key: tensor for key, tensor in candidates[prefix].items() if key in own}
            for prefix in serving
        ]
        if not _all_equal(weights):
            raise CheckpointError(
                f"{source}: expected one set of weights for the model, got several, under the prefixes "
                f"{names(f'{prefix}.' if prefix else '' for prefix in serving)}; pass the tensors that "
                "are meant, with keys without prefix"
            )
        passed_over |= dict.fromkeys(serving[1:], f"the same values as under {serving[0]!r}")
    return (serving[0] if serving else ""), passed_over


def _all_equal(states: Sequence[Mapping[Any, Any]]) -> bool:
    first = states[0]
    return all(
        state is first
        or (state.keys() == first.keys() and all(_equal(state[key], first[key]) for key in first))
        for state in states[1:]
    )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and not unusable(a) and not unusable(b) and torch.equal(a.cpu(), b.cpu())


def _containers(parts: list[str]) -> int:
    """How many of the first parts of a key are names of what contains a network."""
    for index, part in enumerate(parts[:-1]):
        if part not in _CONTAINERS and not _AVERAGED.fullmatch(part):
            return index
    return len(parts) - 1


def _below(key: str, prefix: str) -> str | None:
    """The key without the prefix, None if it has another."""
    if not prefix:
        return key
    return key[len(prefix) + 1 :] if key.startswith(f"{prefix}.") else None


def part_of(key: str) -> str:
    """The first part of a key that is not the name of a container."""
    parts = key.split(".")
    return parts[_containers(parts)]


def _is_averaged(key: str) -> bool:
    parts = key.split(".")
    first = parts[: _containers([*parts, ""])]
    return any(_AVERAGED.fullmatch(part) for part in first)


def _is_counter(key: str, value: Tensor, own: Collection[str]) -> bool:
    return key.split(".")[-1] in _COUNTERS and key not in own and shape_of(value) in ((), (1,))


def _is_birders(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and _BIRDER.search(key) for key in state)


_BIRDERS = (
    "expected the keys of the published networks (gates named oper_q and oper_k), got those of birder's "
    "cas_vit (gates named op_q and op_k, stages named otherwise); they are not converted"
)


def check_not_birders(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> None:
    """Raise when the weights carry the names of another implementation."""
    if _is_birders(weights) and not _is_birders(own):
        raise CheckpointError(f"{source}: {_BIRDERS}")


def stages_of(state: Mapping[str, Tensor]) -> Stages:
    """Blocks and channels of the stages of the RCViT that a state dict belongs to.

    Fewer than four for a backbone cut short, none when it is no RCViT.
    """
    stages: list[tuple[int, int]] = []
    while len(stages) < 4 and "patch_embed.0.weight" in state:
        stage = f"network.{2 * len(stages)}"
        norm = state.get(f"{stage}.0.norm1.weight")
        if norm is None or f"{stage}.0.attn.oper_q.0.block.0.weight" not in state:
            break
        shape = shape_of(norm)
        if len(shape) != 1:
            return ()
        depth = 1
        while f"{stage}.{depth}.norm1.weight" in state:
            depth += 1
        stages.append((depth, shape[0]))
    return tuple(stages)


def config_of(state: Mapping[str, Tensor]) -> Config | None:
    """The size of the RCViT that a state dict belongs to, None when it is no whole RCViT."""
    stages = stages_of(state)
    if len(stages) < 4:
        return None
    (a, i), (b, j), (c, k), (d, m) = stages
    return Config((a, b, c, d), (i, j, k, m))


def same_size(a: Stages, b: Stages) -> bool:
    """Whether two networks agree in the stages that both have, at least one."""
    both = min(len(a), len(b))
    return both > 0 and a[:both] == b[:both]


def describe(stages: Stages) -> str:
    """A size in words."""
    for name, known in CONFIGS.items():
        if same_size(stages, tuple(zip(*known, strict=True))):
            cut = "" if len(stages) == 4 else f" of {len(stages)} stages"
            return f"an {name}{cut}"
    layers, dims = zip(*stages, strict=True)
    return f"an RCViT with layers {layers} and dims {dims}"


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape, () where there is none."""
    return () if tensor.is_nested else tuple(tensor.shape)


def unusable(tensor: Tensor) -> str | None:
    """What keeps the values of a tensor from being copied into a plain one, None if nothing does."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return f"{tensor.dtype} with {tensor.layout} on device {tensor.device}"
    if tensor.numel() > 0:
        # A storage may have been freed, and reading it would end the process.
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            return "one whose storage was freed"
    return None


def names(entries: Iterable[Any]) -> str:
    """The first few of many, quoted."""
    return first(shortened(entry) for entry in entries) or "none"


def first(items: Iterable[str], separator: str = ", ") -> str:
    """The first few of many, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return separator.join(printable(item) for item in items[:4]) + more


def shortened(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 120 else f"{text[:117]}..."


def printable(key: str) -> str:
    """A key that a terminal can show: short and without characters that cannot be encoded."""
    key = key.encode("utf-8", "backslashreplace").decode()
    return key if len(key) <= 200 else f"{key[:197]}..."
