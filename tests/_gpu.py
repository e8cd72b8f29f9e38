"""What tests that need a CUDA device share."""

import pytest
import torch

import fastres
from fastres.kernels import cuda

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
#: What serves first: what the table prefers, CUDA C++, what keeps an activation on the chip where it fits.
KERNELS = {"default": (), "cuda": ("cuda", "reference"), "persistent": ("cuda_persistent", "cuda", "reference")}
every_kernel = pytest.mark.parametrize("kernels", KERNELS, indirect=True)


def kernels_fixture():
    """A fixture that runs a test with "default", then with "cuda", or with those that the test's mark names."""

    @pytest.fixture(params=["default", "cuda"])
    def kernels(request):
        if request.param == "default":
            yield
            return
        if reason := cuda.unavailable():
            pytest.skip(reason)
        with fastres.use_kernels(*KERNELS[request.param]):
            yield

    return kernels
