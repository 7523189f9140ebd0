"""`fuse` swaps the mixers of a model for `FusedCATM` in place, `unfuse` brings the originals back.

Which modules are mixers is decided in `ops/mixer/matching.py`: by what they compute, not by their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, overload

from torch import nn

from ..backends import BackendUnavailable, backends, check_name
from ..module import ORIGINAL, FusedCATM, has_own_forward, refusal, share, unfused
from ..ops.mixer.matching import LOOKED_FOR, Match, match, resembles
from .stand_in import StandIn

__all__ = ["FuseReport", "Refusal", "UnfuseReport", "fuse", "refusal", "share", "unfuse"]


class Refusal(NamedTuple):
    """A module that looks like a mixer and was left as it is."""

    name: str  #: path in the model, "" for the model itself
    reason: str


class FuseReport(NamedTuple):
    """What `fuse` did; names are paths in the model, as in ``model.named_modules()``."""

    swapped: tuple[str, ...]
    refused: tuple[Refusal, ...]
    already: tuple[str, ...]  #: were a FusedCATM before the call

    def __str__(self) -> str:
        if not any(self):
            return f"no mixer found: looked for {LOOKED_FOR}"
        lines = [f"{len(self.swapped)} swapped", *_indented(self.swapped)]
        if self.already:
            lines += [f"{len(self.already)} already fused", *_indented(self.already)]
        if self.refused:
            lines += [f"{len(self.refused)} refused"]
            lines += _indented(f"{_shown(name)}: {reason}" for name, reason in self.refused)
        return "\n".join(lines)


class UnfuseReport(NamedTuple):
    """What `unfuse` did; names are paths in the model."""

    restored: tuple[str, ...]
    kept: tuple[Refusal, ...] = ()  #: left as they are, with the reason

    def __str__(self) -> str:
        lines = [f"{len(self.restored)} restored", *_indented(self.restored)]
        if self.kept:
            lines += [f"{len(self.kept)} kept"]
            lines += _indented(f"{_shown(name)}: {reason}" for name, reason in self.kept)
        return "\n".join(lines)


def fuse(model: nn.Module, backend: str | None = None) -> FuseReport:
    """Replace, in place, every mixer of ``model`` that computes the published CATM.

    Neither the class of a mixer nor the names of its children matter: these must be of the published
    kinds, and its own forward is compared with the reference formulas, on random float64 weights. The
    `FusedCATM` put in its place shares its submodules, parameters and hooks, so state-dict keys stay,
    and optimizers, EMA copies and DDP made before or after keep working. The original object is kept
    outside the module tree for `unfuse`; plain attributes of its own stay on it.

    Calling it again swaps what is new and sets ``backend`` on all that it swapped earlier; mixers
    built as `FusedCATM` keep the backend they have.

    Args:
        model: any module. If it is a mixer itself it cannot be replaced in place and is reported as
            refused: use `FusedCATM.from_mixer`.
        backend: as for `FusedCATM`.

    Returns:
        `FuseReport`: what was swapped, what was fused already, and what was refused with the reason.
        Every module with children ``qkv, oper_q, oper_k, dwc, proj``, or of their kinds, appears. All
        empty when there is none; printed, it then says what was looked for.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``backend`` is not known.
        BackendUnavailable: ``backend`` is known and cannot be used on this machine, with the
            reason. Nothing is changed when an error is raised.
    """
    _check_module(model, "model")
    check_name(backend, "backend")
    for status in backends():
        if status.name == backend and not status.usable:
            raise BackendUnavailable(
                f"backend={backend!r} cannot be used on this machine: {status.reason}"
            )

    already: list[str] = []
    refused: list[Refusal] = []
    found: list[_Site] = []
    earlier: list[FusedCATM] = []
    verdicts: dict[int, Match | str] = {}  # by identity of the mixer: one may sit at several places
    fused: dict[int, FusedCATM] = {}
    for site in _sites(model):
        child = site.child
        if isinstance(child, FusedCATM):
            already.append(site.name)
            original = vars(child).get(ORIGINAL)
            if original is not None:
                earlier.append(child)
                fused[id(original)] = child
        elif resembles(child):
            verdict = verdicts.get(id(child)) or match(child)
            verdicts[id(child)] = verdict
            if isinstance(verdict, str):
                refused.append(Refusal(site.name, verdict))
            elif site.parent is None:
                reason = "it is the model itself: use FusedCATM.from_mixer(model) in its place"
                refused.append(Refusal(site.name, reason))
            else:
                found.append(site)

    for mixer in earlier:
        mixer.backend = backend
    for site in found:
        if id(site.child) not in fused:
            verdict = verdicts[id(site.child)]
            assert not isinstance(verdict, str)
            fused[id(site.child)] = share(FusedCATM, site.child, backend, verdict)
        site.put(fused[id(site.child)])
    return FuseReport(tuple(site.name for site in found), tuple(refused), tuple(already))


@overload
def unfuse(model: StandIn) -> nn.Module: ...  # type: ignore[overload-overlap]
@overload
def unfuse(model: nn.Module) -> UnfuseReport: ...
def unfuse(model: nn.Module) -> UnfuseReport | nn.Module:
    """Undo `fuse` and `fuse_network`: put the very objects back that they replaced.

    Parameters, submodules, hooks and the training mode are those of now, not of the time of `fuse`.
    A `FusedCATM` that replaced nothing becomes an `AdditiveTokenMixer` that shares its submodules. One
    of a subclass with a forward of its own computes something else, which only it knows: it is kept.

    Of a network made by `fuse_network` the result is its model, untouched: mixers that were fused
    before stay fused. Inside a larger model it is exchanged for its model in place, as mixers are,
    unless it normalises its input: then it is kept.

    Args:
        model: any module; its mixers are exchanged in place.

    Returns:
        What was restored and what was kept; of a network made by `fuse_network` its model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is a `FusedCATM` itself, which cannot be replaced in place.
    """
    _check_module(model, "model")
    if isinstance(model, StandIn):
        return model.original()
    if isinstance(model, FusedCATM):
        raise ValueError(
            "model: expected a module that contains mixers, got a FusedCATM itself, "
            "which cannot be replaced in place"
        )
    fused = [site for site in _sites(model) if isinstance(site.child, FusedCATM | StandIn)]
    kept = [Refusal(site.name, reason) for site in fused if (reason := _why_kept(site.child))]
    sites = [site for site in fused if not _why_kept(site.child)]
    plain: dict[int, nn.Module] = {}
    for site in sites:
        child = site.child
        if id(child) not in plain:
            plain[id(child)] = child.original() if isinstance(child, StandIn) else unfused(child)
        site.put(plain[id(child)])
    return UnfuseReport(tuple(site.name for site in sites), tuple(kept))


def _why_kept(fused: nn.Module) -> str | None:
    if isinstance(fused, StandIn):
        return fused.why_original()
    if has_own_forward(fused):
        return f"{type(fused).__name__} has a forward of its own"
    return None


class _Site(NamedTuple):
    """One place in a model: ``parent._modules[key]`` is ``child``. The root has no parent."""

    name: str
    parent: nn.Module | None
    key: str
    child: nn.Module

    def put(self, module: nn.Module) -> None:
        assert self.parent is not None
        self.parent._modules[self.key] = module


def _sites(model: nn.Module) -> list[_Site]:
    """Every place in the model, in the order of named_modules; a shared module is entered once."""
    sites = [_Site("", None, "", model)]
    entered: set[int] = set()

    def enter(path: str, parent: nn.Module) -> None:
        if id(parent) in entered:
            return
        entered.add(id(parent))
        for key, child in parent._modules.items():
            if child is not None:
                sites.append(_Site(path + key, parent, key, child))
                enter(f"{path}{key}.", child)

    enter("", model)
    return sites


def _check_module(value: object, argument: str) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(value).__name__}")


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {_shown(line)}" for line in lines]
