"""The launch recorder: what it keeps of a launch, and that each of its checks can fail."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastres.kernels.triton import batch_norm, statistics
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.record import problems, recording


@triton.jit
def copy_kernel(x, y, rows, size: tl.int32, CHANNELS_LAST: tl.constexpr):
    pass


@triton.jit
def strided_kernel(x, y, stride_x_row):
    pass


def activation(*shape: int, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def good():
    x = activation(2, 32, 4, 4)
    with recording() as launches:
        launch(copy_kernel, (2,), num_warps=8, x=x, y=x, rows=32, size=5, CHANNELS_LAST=True)
    return launches[0]


def test_a_launch_is_kept(good):
    assert good.name == "copy_kernel" and good.kernel is copy_kernel
    assert good.grid == (2,) and good.options == {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    x = good.arguments["x"]
    assert (x.dtype, x.shape, x.stride) == (torch.bfloat16, (2, 32, 4, 4), (512, 1, 128, 32))
    assert x.pointer == 0 and x.device.type == "meta"
    assert good.arguments["rows"] == 32 and set(good.tensors()) == {"x", "y"}
    assert problems(good) == []


def test_alignment_of_a_view_is_seen():
    x = torch.empty(65, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        launch(copy_kernel, (1,), x=x[1:], y=x[8:], rows=1, size=1, CHANNELS_LAST=False)
    assert (launches[0].arguments["x"].pointer, launches[0].arguments["y"].pointer) == (2, 0)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ((2**31,), "2147483648 programs along axis 0"),
        ((1, 65536), "65536 programs along axis 1"),
        ((1, 1, 65536), "65536 programs along axis 2"),
        ((0,), "0 programs along axis 0"),
        ((1, 1, 1, 1), "a grid of 4 axes"),
        ((), "a grid of 0 axes"),
    ],
)
def test_a_grid_that_no_device_takes_is_found(good, grid, said):
    assert said in " ".join(problems(dataclasses.replace(good, grid=grid)))


def test_the_largest_grid_passes(good):
    assert problems(dataclasses.replace(good, grid=(2**31 - 1, 65535, 65535))) == []


X = activation(2, 32, 4, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": activation(2, 64, 4, 4)[:, ::2]}, "not dense in channels_last"),
        ({"y": torch.empty(2, 32, 4, 4, device="meta")}, "y: shape .* not dense in channels_last"),
        ({"x": torch.empty(4, device="meta")[::2]}, "x: .* not contiguous"),
        ({"x": X.contiguous(), "y": X, "CHANNELS_LAST": False}, "y: .* not contiguous"),
        ({"y": activation(2, 32, 4, 4, device="cpu")}, "tensors on 2 devices"),
        ({"rows": 2**63}, "rows: 9223372036854775808 does not fit into 64 bits"),
        ({"size": 2**31}, "size: 2147483648 does not fit into 32 bits"),
        ({"more": 1}, "more: not an argument of the kernel"),
    ],
)
def test_a_wrong_argument_stops_the_launch(changed, said):
    arguments = {"x": X, "y": X, "rows": 32, "size": 5, "CHANNELS_LAST": True, **changed}
    with recording() as launches, pytest.raises(ValueError, match=f"launch of copy_kernel: .*{said}"):
        launch(copy_kernel, (1,), **arguments)
    assert launches == []


def test_a_missing_argument_stops_the_launch():
    with recording(), pytest.raises(ValueError, match="no rows, y"):
        launch(copy_kernel, (1,), x=X, size=5, CHANNELS_LAST=True)


def test_strides_that_a_kernel_takes_may_be_any():
    x = X[:, ::2]
    with recording():
        launch(strided_kernel, (1,), x=x, y=X, stride_x_row=x.stride(0))
        with pytest.raises(ValueError, match="y: .* not dense"):
            launch(strided_kernel, (1,), x=X, y=x, stride_x_row=1)


@pytest.mark.parametrize("shape", [(256, 2048, 7, 7), (65536, 256, 56, 56), (1, 1, 1, 1), (3, 17, 5, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_batch_norm_launches_at_any_size(shape, channels_last):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    weight = torch.empty(2 * shape[1], device="meta")[::2]
    other = torch.empty((*shape[:2], shape[2], 2 * shape[3]), dtype=torch.bfloat16, device="meta")[..., ::2]
    with recording() as launches:
        _, mean, var, mask = batch_norm.bn_act(x, weight, weight, None, None, other, True, 1e-5, True, True)
        batch_norm.bn_act_backward(other, x, weight, weight, mean, var, mask, True, 1e-5, True, True, True, True)
        statistics.update_running_stats_(weight, weight, mean, var, None, 0.1, 8)
    assert [one.name for one in launches] == [
        "statistics_kernel",
        "combine_statistics_kernel",
        "apply_kernel",
        "reduce_gradient_kernel",
        "combine_gradient_kernel",
        "apply_gradient_kernel",
        "update_running_stats_kernel",
    ]
