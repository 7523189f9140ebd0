"""What `expedite` did to a model, and what that is worth in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one image, as functions of the map; see `Report`."""

    patch: int  # a token's
    linear: tuple[int, ...]  # a token's in each block
    width: tuple[int, ...]  # of each block's attention
    channels: int

    def block(self, index: int, tokens: int) -> int:
        return self.linear[index] * tokens + 2 * tokens**2 * self.width[index]


@dataclass(frozen=True)
class Report:
    """What `expedite` did. Printed, it says so.

    The MACs are those of matrix products, for one image: the patch embedding, all blocks, and where the
    model is expedited clustering and reconstruction; no head, no softmax, no norm. With T tokens (class
    and register tokens among them), a block has

        T * (entries of its linear layers' weights) + 2 * T**2 * C

    of which the second is the attention's two products. Clustering has 2 * iterations * N * J * C, with
    J = window**2; reconstruction N * (K or its window**2) * 2 * C, once, and again for each
    intermediate output that somebody reads.

    Attributes:
        blocks: path of the list of blocks.
        depth: how many they are.
        at, until: blocks [at] to [until - 1] run on centres.
        grid: of the centres.
        prefix: class and register tokens, which pass by.
        size: (H, W) of the map that the figures are for; None: not known before a call, see `for_size`.
    """

    blocks: str
    depth: int
    at: int
    until: int
    grid: Size
    prefix: int
    iterations: int
    window: int
    reconstruction_window: int | None
    size: Size | None
    cost: Cost

    def for_size(self, size: Size) -> Report:
        """The same for a map of another size, in tokens."""
        return replace(self, size=size)

    @property
    def tokens_before(self) -> int | None:
        """Of each block, prefix tokens included; None where ``size`` is."""
        return None if self.size is None else self.prefix + self.size[0] * self.size[1]

    @property
    def tokens_after(self) -> int:
        """Of blocks [at] to [until - 1], prefix tokens included."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def macs_before(self) -> int | None:
        """Of one image in the model as it was."""
        if self.size is None or self.tokens_before is None:
            return None
        count = self.tokens_before
        blocks = sum(self.cost.block(i, count) for i in range(self.depth))
        return self.cost.patch * self.size[0] * self.size[1] + blocks

    @property
    def macs_after(self) -> int | None:
        """Of one image now; the last map alone is rebuilt."""
        before = self.macs_before
        if before is None or self.size is None or self.tokens_before is None:
            return None
        saved = sum(
            self.cost.block(i, self.tokens_before) - self.cost.block(i, self.tokens_after)
            for i in range(self.at, self.until)
        )
        own, channels = self.size[0] * self.size[1], self.cost.channels
        cluster = 2 * self.iterations * own * self.window**2 * channels
        near = self.grid[0] * self.grid[1]
        if self.reconstruction_window is not None:
            near = min(near, self.reconstruction_window**2)
        return before - saved + cluster + 2 * own * near * channels

    def __str__(self) -> str:
        last = f"{self.blocks}[{self.until - 1}]"
        tokens = "as many as the map has" if self.tokens_before is None else str(self.tokens_before)
        lines = [
            f"{self.blocks}[{self.at}] to {last} of {self.depth} blocks run on "
            f"{self.grid[0]} x {self.grid[1]} centres; the map is rebuilt after {last}",
            f"  tokens: {tokens} before, {self.tokens_after} after, "
            f"of which {self.prefix} class or register",
        ]
        before, after = self.macs_before, self.macs_after
        if self.size is None or before is None or after is None:
            lines.append("  MACs: ask for_size((H, W)), the map's size is known in a call")
        else:
            lines.append(
                f"  MACs of an image on {self.size[0]} x {self.size[1]} tokens, heads not counted: "
                f"{before / 1e9:.2f} G before, {after / 1e9:.2f} G after ({before / after:.2f}x fewer)"
            )
        return "\n".join(lines)


def cost(blocks: Sequence[nn.Module], patch: nn.Conv2d | None) -> Cost:
    """Counts weights: matrices named ``weight`` or ``..._weight``, so of nn.MultiheadAttention, too."""
    linear = []
    width = []
    for block in blocks:
        found = [
            p
            for name, p in block.named_parameters()
            if p.dim() == 2 and name.rpartition(".")[2].endswith("weight")
        ]
        linear.append(sum(p.numel() for p in found))
        width.append(found[0].shape[1] if found else 0)
    return Cost(
        0 if patch is None else patch.weight.numel(),
        tuple(linear),
        tuple(width),
        max(width, default=0),
    )
