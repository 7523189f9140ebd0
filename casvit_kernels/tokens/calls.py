"""What happens in a call of an expedited model: the hooks on its modules.

The hook before the first clustered block clusters what it is given; every clustered block then runs on
class and register tokens and centres. Whoever collects a block's output has to see a dense map, and to
rebuild one after every block would cost N K C each. So the hook after a clustered block returns a
`Deferred`: a tensor of the dense shape, of which the next block's hook takes the centres, and which
anybody else's first operation turns into the map, by the clusters it was computed on. Nobody has to say
beforehand which outputs are wanted, so timm's and transformers' ways to ask for them all work, and
those of hooks of a user's own. After the last clustered block the map itself is returned.

Under torch.compile there are no such tensors: the hook after a block rebuilds the map and remembers the
centres beside it, and the compiler drops every map that nobody reads.

Hooks are objects: they are copied and pickled with the model. What a call needs is kept for each thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .clusters import Size, cluster_tokens
from .deferred import Deferred, Rebuilding, all_dense, written
from .positions import linear, rotated


class Call(threading.local):
    """Of the call that this thread is in."""

    def __init__(self) -> None:
        self.map: Size | None = None  # of the patch embedding's output
        self.image: Size | None = None
        self.current: Clustered | None = None  # while a clustered block runs
        self.centres: tuple[Tensor, Tensor, Clustered] | None = (
            None  # compiled: map, block's output
        )
        self.positions: Tensor | None = None  # for positions.RelativeBias
        self.checked: set[tuple[str, Size]] = set()  # rotary tables known to be linear

    def clear(self) -> None:
        self.map = self.image = self.current = self.centres = self.positions = None

    def __reduce__(self) -> tuple[type[Call], tuple[()]]:
        return Call, ()


class Clustered:
    """One clustering: how maps are rebuilt, where centres are, and their rotary tables."""

    def __init__(self, rebuilding: Rebuilding, relative: bool) -> None:
        self.rebuilding = rebuilding
        self._positions: Tensor | None = rebuilding.clusters.positions() if relative else None
        self._table: tuple[Any, Any] | None = None

    def positions(self) -> Tensor:
        if self._positions is None:
            self._positions = self.rebuilding.clusters.positions()
        return self._positions

    def table(self, given: Any, where: str, call: Call) -> Any:
        """Rotary tables of the centres, of those of the tokens; most models give all blocks the same."""
        if self._table is not None and self._table[0] is given:
            return self._table[1]
        paired = isinstance(given, (tuple, list))
        # transformers: (cos, sin); timm: [sin, cos] in the last dimension
        cos, sin = given if paired else reversed(given.chunk(2, -1))
        size = self.rebuilding.clusters.size
        made = rotated(sin, cos, size, self.positions(), where)
        if not torch.compiler.is_compiling() and (where, size) not in call.checked:
            if not linear(sin, cos, size):
                raise ValueError(
                    f"{where}: expected rotary angles linear in the position, got others: the model "
                    "cannot be expedited here"
                )
            call.checked.add((where, size))
        result = (made[1], made[0]) if paired else torch.cat(made, -1)
        self._table = given, result
        return result


class Plan:
    """Settings of an expedited model, shared by its hooks."""

    def __init__(
        self,
        *,
        path: str,
        at: int,
        until: int,
        grid: Size,
        size: Size | None,
        prefix: int,
        iterations: int,
        window: int,
        temperature: float,
        neighbours: int,
        norm: str,
        reconstruction_window: int | None,
        residual: bool,
        relative: bool,
        checkpointing: tuple[nn.Module, ...],
    ) -> None:
        self.path, self.at, self.until = path, at, until
        self.grid, self.size, self.prefix = grid, size, prefix
        self.iterations, self.window, self.temperature = iterations, window, temperature
        self.neighbours, self.norm = neighbours, norm
        self.reconstruction_window, self.residual = reconstruction_window, residual
        self.relative = relative
        self.checkpointing = checkpointing  # modules with a switch for it, of timm
        self.call = Call()
        self.handles: list[Any] = []

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def cluster(self, x: Tensor) -> tuple[Tensor, Clustered]:
        """What the first clustered block runs on."""
        if x.dim() != 3:
            raise ValueError(
                f"{self.where(self.at)}: expected tokens (B, N, C), got shape {tuple(x.shape)}"
            )
        if any(getattr(module, "grad_checkpointing", False) for module in self.checkpointing):
            raise ValueError(
                f"{self.where(self.at)}: expected gradient checkpointing to be off, it is on: it runs a "
                "block again without what came before: call set_grad_checkpointing(False)"
            )
        size = self._size(x.shape[1] - self.prefix, x.shape[1])
        clusters = cluster_tokens(
            x[:, self.prefix :],
            size,
            self.grid,
            iterations=self.iterations,
            window=self.window,
            temperature=self.temperature,
        )
        # Always a copy: blocks may add to it in place, and the map is rebuilt from the centres.
        tokens = torch.cat((x[:, : self.prefix], clusters.centres), 1)
        rebuilding = Rebuilding(
            clusters,
            self.prefix,
            self.neighbours,
            self.norm,
            self.reconstruction_window,
            self.residual,
        )
        return tokens, Clustered(rebuilding, self.relative)

    def _size(self, count: int, whole: int) -> Size:
        """(H, W) of this call's map of ``count`` tokens."""
        first = self.where(self.at)
        size, source = self.size, "size ="
        if size is None and self.call.map is not None:
            size, source = self.call.map, "the patch embedding's output has"
        if size is not None:
            if size[0] * size[1] != count:
                raise ValueError(
                    f"{first}: {source} {size[0]} x {size[1]} = {size[0] * size[1]} tokens, the block "
                    f"was given {whole}, of which {self.prefix} class or register"
                )
            return size
        if self.call.image is not None:
            height, width = self.call.image
            patch = round((height * width / max(count, 1)) ** 0.5)
            if patch and height % patch == 0 and width % patch == 0:
                size = height // patch, width // patch
                if size[0] * size[1] == count:
                    return size
        raise ValueError(
            f"{first}: height and width of the map of {count} tokens are not known: no patch embedding "
            "(nn.Conv2d with stride = kernel size) ran in this call, and no image tells them: give "
            "expedite size=(H, W), or prefix= where that count is wrong (that the block is run again by "
            "gradient checkpointing is not served)"
        )

    def follow(self, x: Tensor, index: int) -> tuple[Tensor, Clustered]:
        """What a later block runs on: the output of the one before."""
        if torch.compiler.is_compiling():
            if self.call.centres is not None and self.call.centres[0] is x:
                return self.call.centres[1], self.call.centres[2]
        elif isinstance(x, Deferred) and x.block == index - 1:
            if written(x):
                raise RuntimeError(
                    f"{self.where(index)}: the output of {self.where(index - 1)} was written to in "
                    "place, which its cluster centres do not follow: clone it first"
                )
            return x.tokens, self._clustered(x)
        raise RuntimeError(
            f"{self.where(index)}: expected the very output of {self.where(index - 1)}, got another "
            "tensor: between clustered blocks nothing may change it (choose at and until so), and "
            "torch.compile has to take the model whole, with fullgraph=True"
        )

    def _clustered(self, x: Deferred) -> Clustered:
        current = self.call.current
        if current is None or current.rebuilding is not x.rebuilding:
            current = Clustered(x.rebuilding, self.relative)
        return current

    def adapt(self, name: str, value: Any, clustered: Clustered, index: int) -> Any:
        """An argument of a block beside its tokens, for centres."""
        where = f"{self.where(index)}: {name}"
        if name in ("rope", "position_embeddings") and value is not None:
            return clustered.table(value, where, self.call)
        count = clustered.rebuilding.clusters.tokens.shape[1]
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(part, Tensor):
                continue
            if {count, count + self.prefix} & set(part.shape[part.dim() > 2 :]):
                raise ValueError(
                    f"{where}: got a tensor {tuple(part.shape)} for the {count} tokens of the full map, "
                    "which says nothing of cluster centres: call the model without it, or unexpedite it"
                )
        return value


class Start:
    """Before the model: forget the last call, and note the image's size."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.plan.call.clear()
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4:
                self.plan.call.image = value.shape[2], value.shape[3]
                return


class Patches:
    """After the patch embedding: note the map's size."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.plan.call.map = output.shape[-2], output.shape[-1]


class Before:
    """Before a clustered block: centres for tokens, and positions of centres."""

    def __init__(self, plan: Plan, index: int, names: tuple[str, ...]) -> None:
        self.plan, self.index, self.names = plan, index, names  # names of the block's arguments

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan, call = self.plan, self.plan.call
        given = dict(zip(self.names, args, strict=False))
        more = args[len(self.names) :]
        given.update(kwargs)
        first = self.names[0]
        x = given.pop(first, None)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{plan.where(self.index)}: expected a tensor of tokens as {first}, "
                f"got {type(x).__name__}"
            )
        if self.index == plan.at:
            tokens, clustered = plan.cluster(x)
            call.map = call.image = None
        else:
            tokens, clustered = plan.follow(x, self.index)
        rest = {k: plan.adapt(k, v, clustered, self.index) for k, v in given.items()}
        more = tuple(plan.adapt("an argument", v, clustered, self.index) for v in more)
        call.current = clustered
        if plan.relative:
            call.positions = clustered.positions()
        # In the order they came in: hooks of others may look at either.
        if not args:
            return (), {first: tokens, **rest}
        placed = tuple(rest.pop(name) for name in self.names[1 : len(args)])
        return (tokens, *placed, *more), rest


class After:
    """After a clustered block: a dense map for everybody else."""

    def __init__(self, plan: Plan, index: int) -> None:
        self.plan, self.index = plan, index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        plan, call = self.plan, self.plan.call
        clustered, call.current, call.positions = call.current, None, None
        tokens = output[0] if isinstance(output, (tuple, list)) and output else output
        count = plan.prefix + plan.grid[0] * plan.grid[1]
        if clustered is None:
            raise RuntimeError(
                f"{plan.where(self.index)}: the hook that clusters did not run, or was compiled apart "
                "from this one: torch.compile has to take the model whole, with fullgraph=True"
            )
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            raise TypeError(
                f"{plan.where(self.index)}: expected the block to return tokens (B, N, C), or a tuple "
                f"that begins with them, got {type(tokens).__name__}"
            )
        if tokens.shape[1] != count:
            raise ValueError(
                f"{plan.where(self.index)}: expected the block to return {count} tokens as it was "
                f"given, got shape {tuple(tokens.shape)}"
            )
        if self.index == plan.until - 1:
            call.centres = None
            made: Tensor = clustered.rebuilding.dense(tokens)
        elif torch.compiler.is_compiling():
            made = clustered.rebuilding.dense(tokens)
            call.centres = made, tokens, clustered
        else:
            made = Deferred(tokens, clustered.rebuilding, self.index)
            call.current = clustered  # the next block's tables are the same
        if isinstance(output, (tuple, list)):
            return type(output)((made, *output[1:]))
        return made


class Finish:
    """After the model: rebuild the maps it returns, and keep nothing of the call."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.plan.call.clear()
        return output if torch.compiler.is_compiling() else all_dense(output)


HOOKS = (Start, Patches, Before, After, Finish)
