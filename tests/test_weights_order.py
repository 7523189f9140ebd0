"""The order of the 22 weights: written once in Python, and in C++ held to it."""

from conftest import require_native

from casvit_kernels import AdditiveTokenMixer, FusedCATM
from casvit_kernels.backends import native
from casvit_kernels.module import mixer_weights
from casvit_kernels.ops.mixer.weights import COUNT, NAMES, PATHS, flatten, unflatten


def test_the_native_library_has_the_same_order():
    require_native()
    library, _ = native.load()
    assert library.casvit_mixer_weights().decode().split(",") == [
        n.replace(".", "_") for n in NAMES
    ]


def test_paths_are_those_of_a_mixer():
    mixer = FusedCATM(3, attn_bias=True)
    tensors = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
    for name, path, tensor in zip(NAMES, PATHS, flatten(mixer_weights(mixer)), strict=True):
        assert tensors[path] is tensor, name
    # In the order of a state dict, but for the counters of batches.
    keys = [k for k in AdditiveTokenMixer(3, True).state_dict() if "num_batches" not in k]
    assert keys == list(PATHS)


def test_flat_and_back():
    assert flatten(unflatten(NAMES)) == NAMES
    assert len(NAMES) == COUNT == 22
