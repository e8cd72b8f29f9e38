"""How many kernels a training step of ResNet-50 under bf16 autocast launches: eager, and fused with the CUDA kernels;
and what is done once for all layers (sites.together).

Counted without a GPU, from what reaches the dispatcher: ours count themselves; an operator of ATen that computes is one
launch, a multi-tensor one as many as ATen cuts it into. A convolution's backward is one for each gradient. Batch norm
in bf16, for which ATen does not use cuDNN, is three (statistics, running statistics, apply) and two (reduce, apply).
On a device the `split` units of benchmarks/gpu.py count launches by the profiler.
"""

import copy
from collections import Counter

import _cuda
import pytest
import torch
import torch.nn.functional as F
from _compare import image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.kernels import convolution, table
from fastres.models import resnet18, resnet50
from fastres.ops import cast_weights, update_running_stats

NOTHING = ("_record_function", "_is_mkldnn", "empty", "new_empty", "detach", "lift_fresh", "_unsafe_view")
NOTHING += ("_reshape_alias", "sym_", "is_same_size")
BATCH_NORM = {"native_batch_norm": 3, "_native_batch_norm_legit": 3, "native_batch_norm_backward": 2}
CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36}  # of ATen's multi_tensor_apply


def multi_tensor(lists):
    """Launches of a multi-tensor operator on these lists of tensors."""
    launches, tensors, blocks = 1, 0, 0
    for t in lists[0]:
        if tensors == TENSORS[len(lists)]:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors += 1
        for _ in range(-(-t.numel() // CHUNK)):
            if blocks == BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
            blocks += 1
    return launches


class Launches(TorchDispatchMode):
    """Counts by the names of operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace == "fastres":
            with self:
                return table.select(name, args).run(*args)
        if func.namespace == "fastres_cuda":
            before = torch.ops.fastres_cuda.launches()
            result = func(*args, **(kwargs or {}))
            self.counts[name] += torch.ops.fastres_cuda.launches() - before
            return result
        if name == "convolution_backward":
            count = sum(args[-1])
        elif name.startswith("_foreach"):
            count = multi_tensor([a for a in args if isinstance(a, list) and isinstance(a[0], torch.Tensor)])
        else:
            count = 0 if func.is_view or name.startswith(NOTHING) else BATCH_NORM.get(name, 1)
        if count:
            self.counts[name] += count
        return func(*args, **(kwargs or {}))


def launched(model):
    """By a step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with Launches() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
        loss.backward()
        optimizer.step()
    return seen.counts


@pytest.fixture
def kernels():
    with _cuda.cuda_kernels():
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on the CPU")
def test_a_training_step_launches_a_third_less_than_eager(kernels, capsys, monkeypatch):
    monkeypatch.setattr(convolution, "_aten_dtype", lambda x: x.dtype)  # CPUs without bf16 convert
    model = resnet50(fused=False).train().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    eager, ours = launched(model), launched(fused)
    with capsys.disabled():
        for name, counts in (("eager", eager), ("fused", ours)):
            print(f"\n{name}: {counts.total()} launches: {dict(counts.most_common(12))}", end="")
    assert eager["native_batch_norm"] == 3 * 53 and eager["native_batch_norm_backward"] == 2 * 53
    again = 2 * 16  # activations that are computed again in backward
    assert ours["bn_act"] + ours["bn_add_bn_act"] + ours["bn_act_maxpool"] == 2 * 53 - 4 + again
    assert ours["update_all_running_stats_"] == 2 and ours["_foreach_copy_"] == 2
    assert ours.total() <= 0.7 * eager.total()


def one_block(fused=True):
    torch.manual_seed(0)
    model = resnet18(num_classes=4, fused=False).train().to(memory_format=torch.channels_last)
    if fused:
        fastres.fuse_(model)
    return model


@pytest.fixture
def at_once(monkeypatch):
    """Everything that waited was written so often."""
    written = []
    right = update_running_stats._Waiting.write
    monkeypatch.setattr(
        update_running_stats._Waiting, "write", lambda self: written.append(len(self.updates)) or right(self)
    )
    return written


def state(model, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x).float().square().mean().backward()
    return {**dict(model.named_buffers()), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_as_layer_by_layer(kernels, at_once, monkeypatch, autocast):
    x = image(3, size=32)
    got = state(one_block(), x, autocast)
    assert at_once == [20]
    with monkeypatch.context() as patched:
        patched.setattr(table, "fused_kernel_serves", lambda op, args: op != "update_all_running_stats_")
        want = state(one_block(), x, autocast)
    assert at_once == [20]
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_an_exception_leaves_what_eager_leaves(kernels, at_once):
    """The layers that ran have counted the batch and moved their statistics; the others have not."""

    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    buffers = []
    x = image(3, size=32)
    for fused in (False, True):
        model = one_block(fused)
        model.layer3 = Broken()
        with pytest.raises(ValueError, match="broken"):
            model(x)
        buffers.append(dict(model.named_buffers()))
    assert at_once == [10]  # layer2's end has two
    for name, want in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_hook_sees_what_eager_shows(kernels, at_once):
    model = one_block()
    seen = []
    model.layer1.register_forward_hook(lambda m, *_: seen.append(int(m[0].bn1.num_batches_tracked)))
    model(image(3, size=32))
    assert seen == [1] and not at_once


def test_a_layer_that_runs_twice_is_updated_twice(at_once):
    running, counter = [torch.zeros(4), torch.ones(4)], torch.tensor(0)
    want = [t.clone() for t in running]
    batches = [(torch.randn(4).double(), torch.rand(4).double()) for _ in range(2)]
    with update_running_stats.together():
        for mean, var in batches:
            update_running_stats.count_batch(counter)
            update_running_stats.call(*running, mean, var, None, 0.1, 9)
        assert counter < 2
    for mean, var in batches:
        update_running_stats.op(*want, mean, var, None, 0.1, 9)
    assert counter == 2 and len(at_once) > 1
    assert all(torch.equal(a, b) for a, b in zip(running, want, strict=True))


def test_copies_of_weights():
    """They have a gradient, live as long as the forward, and are made again of a weight that has changed."""
    x, weight = torch.randn(2, 3, 4, 4), nn.Parameter(torch.randn(5, 3, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        with cast_weights.together([weight], x):
            copy = cast_weights.cast(weight, torch.bfloat16)
            assert torch.equal(copy, weight.bfloat16()) and copy.requires_grad
            assert copy.data_ptr() == cast_weights.cast(weight, torch.bfloat16).data_ptr()
            assert cast_weights.cast(weight, torch.float16).dtype is torch.float16
            (grad,) = torch.autograd.grad(copy.sum(), weight)
            assert grad.dtype is torch.float32 and torch.equal(grad, torch.ones_like(weight))
            with torch.no_grad():
                weight.mul_(2)
            assert torch.equal(cast_weights.cast(weight, torch.bfloat16), weight.bfloat16())
        assert cast_weights.cast(weight, torch.bfloat16).data_ptr() != copy.data_ptr()
    with cast_weights.together([weight], x):  # without autocast
        assert cast_weights.cast(weight, torch.float32) is weight
