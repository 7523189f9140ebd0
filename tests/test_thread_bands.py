"""Large maps, whose rows threads share in bands: the same bits as from one thread."""

import copy

import pytest
import torch
from conftest import using_instruction_set

from casvit_kernels import AdditiveTokenMixer, FusedCATM

# Images, channels, height, width, threads: fewer images than threads, bands cut within and between them.
CASES = [
    (1, 20, 131, 120, 2),
    (2, 17, 140, 61, 3),
    (4, 8, 150, 113, 5),
    (1, 8, 301, 5, 3),
    (3, 8, 260, 30, 2),  # two images for the threads alone, the third for both
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bands_have_the_bits_of_one_thread(case, channels_last, threads):
    *shape, count = case
    torch.manual_seed(0)
    plain, x = AdditiveTokenMixer(shape[1]).eval(), torch.randn(shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        truth = copy.deepcopy(plain).double()(x.double())
    for name in ("avx2", "avx512"):
        with using_instruction_set(name), torch.inference_mode():
            mixer = FusedCATM.from_mixer(plain).eval()
            threads(1)
            alone = mixer(x)
            threads(count)
            assert torch.equal(mixer(x), alone), name
        torch.testing.assert_close(alone.double(), truth, rtol=0, atol=2e-6)
