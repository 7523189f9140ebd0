"""The ways to compute a mixer or a model that are timed against each other."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendUnavailable, Problem, select
from ..module import FusedCATM, mixer_weights
from ..ops.mixer import kernels
from ..ops.network import dispatch
from ..surgery import fuse, fuse_network
from .gpu import graphed
from .timer import BF16, Call, Unavailable, is_bf16

Forward = Callable[[Tensor], Any]
Context = Callable[[], AbstractContextManager[object]]

BASELINES = ("eager", "eager channels_last", "compile", "compile channels_last", "onnxruntime")
MIXER_NAMES = (*BASELINES, "fused", "fused channels_last")
MODEL_NAMES = (*MIXER_NAMES, "fused compile", "fused compile channels_last")
NETWORK = "fused network"  # the whole model by `fuse_network`; with `BF16` in that precision
TRAINING_NAMES = tuple(name for name in MIXER_NAMES if name != "onnxruntime")

# On a GPU, all under autocast (append `BF16`). Compiled ones take minutes there, so in one layout only,
# the one that favours them; "max-autotune" is torch.compile in that mode, CUDA graphs included; "fused
# mix" is the mixer after its qkv product, which a library computes for every candidate; "fused graph" is
# recorded once as a CUDA graph and replayed.
GPU_BASELINES = (
    "eager",
    "eager channels_last",
    "compile channels_last",
    "max-autotune channels_last",
)
GPU_MIXER_NAMES = (
    *GPU_BASELINES,
    "fused",
    "fused channels_last",
    "fused mix",
    "fused mix channels_last",
    "fused graph channels_last",
)
GPU_TRAINING_NAMES = (*GPU_BASELINES, "fused", "fused channels_last")
GPU_MODEL_NAMES = (
    *GPU_BASELINES,
    "fused channels_last",
    "fused graph channels_last",
    "fused compile channels_last",
    "fused max-autotune channels_last",
)
GPU_MODEL_TRAINING_NAMES = (*GPU_BASELINES, "fused channels_last", "fused compile channels_last")
_COMPILED = {"compile": "default", "max-autotune": "max-autotune"}  # a name's word and its mode


def mixer_candidates(
    mixer: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = MIXER_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to compute one mixer, for `interleave`; each call returns the output.

    Args:
        mixer: a plain mixer, float32; it is copied, and the copy put in eval mode.
        x: ``(B, C, H, W)``, float32, on the device of `mixer`; each candidate gets it in its own
            layout. Those under autocast get it in bfloat16, as they do inside a model.
        include: names out of `MIXER_NAMES` or `GPU_MIXER_NAMES`; with the suffix `BF16` under
            bfloat16 autocast (all but ``"onnxruntime"``). Each is built by its first call.
        backend: of the fused ones, None for the automatic choice.

    Raises:
        ValueError: a name is not known, `mixer` is fused, or `x` is not float32.
    """

    def fused(plain: nn.Module) -> nn.Module:
        return FusedCATM.from_mixer(plain, backend=backend)

    known = (*MIXER_NAMES, *GPU_MIXER_NAMES)
    return _candidates("mixer", mixer, fused, x, x.to(torch.bfloat16), include, known)


def model_candidates(
    model: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = MODEL_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to compute one model, for `interleave`; as `mixer_candidates`, but for:

    Args:
        model: with at least one plain mixer that `casvit_kernels.fuse` can swap.
        x: the model's input, float32; those under autocast get it in float32 too.
        include: names out of `MODEL_NAMES` or `GPU_MODEL_NAMES`, or `NETWORK`; ``fused compile`` and
            ``fused compile channels_last`` are compiled with the fused mixers in place.
    """
    known = (*MODEL_NAMES, NETWORK, *GPU_MODEL_NAMES)
    return _candidates("model", model, partial(fused_model, backend), x, x, include, known)


def model_training_candidates(
    model: nn.Module,
    x: Tensor,
    *,
    include: Iterable[str] = GPU_MODEL_TRAINING_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Forward and backward of one model in training mode, for `interleave`.

    As `model_candidates`, but names are out of `GPU_MODEL_TRAINING_NAMES`, `model` returns one tensor,
    and each call returns what `training_step` does, without a gradient of the images.
    """
    return _candidates(
        "model",
        model,
        partial(fused_model, backend),
        x,
        x,
        include,
        GPU_MODEL_TRAINING_NAMES,
        partial(_training_call, True),
    )


def network_of(plain: nn.Module, bf16: bool = False) -> nn.Module:
    """`plain` by `fuse_network`; call it where gradients are not yet forbidden for good.

    Raises:
        Unavailable: this CPU or this build has no such kernels.
    """
    try:
        found = fuse_network(plain, precision="bf16" if bf16 else "fp32")
        if dispatch.chosen() is None:
            raise Unavailable("there are no kernels for whole networks here")
        return found
    except BackendUnavailable as error:
        raise Unavailable(str(error)) from error


def fused_model(backend: str | None, plain: nn.Module) -> nn.Module:
    """`plain` with every mixer fused.

    Raises:
        ValueError: there is none, or one is refused.
    """
    report = fuse(plain, backend=backend)
    if not report.swapped or report.refused:
        raise ValueError(f"model: expected mixers that can all be fused; {report}")
    return plain


def training_candidates(
    mixer: nn.Module,
    x: Tensor,
    *,
    backward: bool = True,
    include: Iterable[str] = TRAINING_NAMES,
    backend: str | None = None,
) -> dict[str, Call]:
    """Ways to train one mixer, for `interleave`; as `mixer_candidates`, but for:

    Args:
        mixer: its copies are put in training mode: every call uses and updates batch statistics.
        backward: whether a call computes all gradients too. It then returns what `training_step`
            does, else the output alone.
        include: names out of `TRAINING_NAMES` or `GPU_TRAINING_NAMES`.
    """

    def fused(plain: nn.Module) -> nn.Module:
        return FusedCATM.from_mixer(plain, backend=backend)

    def call(own: nn.Module, run: Forward, own_x: Tensor, autocast: Context) -> Call:
        return _training_call(backward, own, run, own_x.detach().requires_grad_(), autocast)

    known = (*TRAINING_NAMES, *GPU_TRAINING_NAMES)
    return _candidates("mixer", mixer, fused, x, x.to(torch.bfloat16), include, known, call)


def _training_call(
    backward: bool, own: nn.Module, run: Forward, x: Tensor, autocast: Context
) -> Call:
    own.train()
    grads: list[Tensor] = []  # of the output, whose shape the first call tells

    def step() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            with autocast():
                out = run(x)
            if not backward:
                return out
            if not grads:
                grads.append(output_gradient(out))
            return training_step(own, x, out, grads[0])

    with torch._dynamo.config.patch(recompile_limit=256):  # see compiled
        step()
    return step


def output_gradient(x: Tensor) -> Tensor:
    """The gradient that every training candidate gets for an output like `x`."""
    generator = torch.Generator(x.device).manual_seed(1)
    values = torch.randn(x.shape, generator=generator, device=x.device)
    return torch.empty_like(x, requires_grad=False).copy_(values)


def training_step(module: nn.Module, x: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, then the gradients of `x`, if it wants one, and of the parameters, in order."""
    wanted = [*([x] if x.requires_grad else []), *module.parameters()]
    return (out, *torch.autograd.grad(out, wanted, grad))


class _Lazy:
    """Built by its first call."""

    def __init__(self, build: Callable[[], Call]) -> None:
        self._build = build
        self._call: Call | None = None

    def __call__(self) -> object:
        if self._call is None:
            self._call = self._build()
        return self._call()


def _candidates(
    argument: str,
    module: nn.Module,
    fused: Callable[[nn.Module], nn.Module],
    x: Tensor,
    x_bf16: Tensor,
    include: Iterable[str],
    known: tuple[str, ...],
    training: Callable[[nn.Module, Forward, Tensor, Context], Call] | None = None,
) -> dict[str, Call]:
    known = tuple(dict.fromkeys(known))
    known += tuple(name + BF16 for name in known if name != "onnxruntime")
    names = list(include)
    for name in names:
        if name not in known:
            raise ValueError(f"include: expected names out of {', '.join(known)}, got {name!r}")
    if x.dtype is not torch.float32:
        raise ValueError(f"x: expected a float32 tensor, got {x.dtype}")
    if any(p.device != x.device for p in module.parameters()):
        raise ValueError(f"x: expected the device of the {argument}, got {x.device}")
    if any(isinstance(m, FusedCATM) for m in module.modules()):
        raise ValueError(f"{argument}: expected a plain one (see unfuse), got one that is fused")

    def build(name: str) -> Call:
        words = name.split()
        if name.removesuffix(BF16) == NETWORK:
            with torch.inference_mode(False):  # inference tensors have no version to follow
                whole = network_of(copy.deepcopy(module).eval(), is_bf16(name))
            return partial(whole, x)
        layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
        own = copy.deepcopy(module)
        own.train(training is not None)  # not chained: overridden, it may return None
        if words[0] == "fused":
            own = fused(own)
        own = own.to(memory_format=layout)
        own_x = (x_bf16 if is_bf16(name) else x).to(memory_format=layout)
        if words[0] == "onnxruntime":
            return _onnxruntime(own, own_x)

        def autocast() -> AbstractContextManager[object]:
            device = x.device.type
            return torch.autocast(device, torch.bfloat16) if is_bf16(name) else nullcontext()

        if "mix" in words:
            return _after_product(own, own_x)
        mode = next((mode for word, mode in _COMPILED.items() if word in words), None)
        with autocast():
            run = compiled(own, own_x, mode) if mode else own
        if training is not None:
            return training(own, run, own_x, autocast)

        def call() -> object:
            with autocast():
                return run(own_x)

        if not is_bf16(name):
            call = partial(run, own_x)
        return graphed(call, x.device) if "graph" in words else call

    def build_outside(name: str) -> Call:
        with torch.inference_mode(False), torch.enable_grad():  # inference tensors cannot train
            return build(name)

    chosen = build if training is None else build_outside
    return {name: _Lazy(partial(chosen, name)) for name in names}


def _after_product(mixer: nn.Module, x: Tensor) -> Call:
    """The backend's gates and combination, on a qkv that is there already."""
    assert isinstance(mixer, FusedCATM)
    name = select(mixer.backend, Problem(x.device.type, x.dtype)).name
    phases = kernels.get(name).phases
    if phases is None:
        raise Unavailable(f"the backend {name!r} has no mixing apart from the product")
    w = mixer_weights(mixer)
    running = [torch.stack([g.norm_mean, g.norm_var]) for g in (w.q, w.k)]  # type: ignore[list-item]
    statistics = torch.stack(running).float()
    eps_q, eps_k = (m.eps for m in mixer.modules() if isinstance(m, nn.BatchNorm2d))
    mix = phases.mix
    qkv = phases.project(x, w, x.dtype)
    return lambda: mix(x, qkv, w, statistics, (eps_q, eps_k), x.dtype).out


def compiled(
    module: nn.Module, x: Tensor, mode: str, freezing: bool = False
) -> Callable[[Tensor], object]:
    """`torch.compile` of a module, compiled for `x`; `freezing` makes constants of the weights.

    Raises:
        Unavailable: it cannot be compiled.
    """
    module(x)  # what fails without a compiler is no matter of the compiler
    found: Callable[[Tensor], object] = torch.compile(
        module, fullgraph=True, dynamic=False, mode=mode
    )
    try:
        # The limit counts what other candidates compiled of the same forward; past it lies eager.
        with (
            torch._dynamo.config.patch(recompile_limit=256),
            torch._inductor.config.patch(freezing=freezing),
        ):
            found(x)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {text[0]}") from error
    if mode != "max-autotune":
        return found

    def call(x: Tensor) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return found(x)

    return call


def _onnxruntime(module: nn.Module, x: Tensor) -> Call:
    """A session of as many threads as PyTorch has; exported from the plain module."""
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(p)]
    if missing:
        raise Unavailable(
            f"not installed: {', '.join(missing)} (pip install 'casvit-kernels[export]')"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads keep spinning between calls, as by default: measured 1.2 to 1.6 times faster at
    # batch 1 than without. The pause of `interleave` keeps that from the other candidates.
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        path = Path(folder, "plain.onnx")
        torch.onnx.export(
            module, (x,), path, dynamo=True, opset_version=18, external_data=False, verbose=False
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    if len(session.get_outputs()) > 1:  # a dense backbone's maps
        return lambda: session.run(None, feed)
    return lambda: session.run(None, feed)[0]
