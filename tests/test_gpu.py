"""What only a CUDA device can show: training over many steps, CUDA graphs, streams, devices, memory that runs out."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from _gpu import DEVICE, every_kernel, kernels_fixture, needs_device
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import folding, functional, images
from fastres.bench.graphs import capture
from fastres.models.resnet import BasicBlock, Bottleneck, ResNet
from fastres.testing import budget, relative_error

pytestmark = needs_device
kernels = kernels_fixture()
BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
blocks = pytest.mark.parametrize("block", BLOCKS)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """The same algorithm in every run, without TF32: what differs then is ours."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = (
        True,
        False,
        False,
    )
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def network(block, dtype=torch.float32):
    model = ResNet(BLOCKS[block], [1, 1, 1, 1], num_classes=10)
    return model.to(DEVICE, dtype, memory_format=torch.channels_last)


def batches(count, dtype=torch.float32, n=16, size=64):
    """`count` batches, over and over."""
    x = images.synthetic(n * count, size).to(DEVICE, dtype, memory_format=torch.channels_last)
    labels = torch.arange(n * count, device=DEVICE) % 10
    return itertools.cycle(list(zip(x.split(n), labels.split(n), strict=True)))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def statistics(model):
    """Every running statistic of a model, as one float64 vector."""
    named = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return torch.cat([b.double().flatten() for b in named])


def train(model, steps, autocast=None):
    """Losses of all steps, and running statistics after them; both in float64."""
    model.train()
    optimizer, losses = optimizer_of(model), []
    data = batches(4, next(model.parameters()).dtype)
    for x, labels in itertools.islice(data, steps):
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double(), statistics(model)


def shaken(model, scale):
    """With every weight changed by `scale` of its size: runs from such weights drift apart as rounding makes them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + scale * torch.randn_like(p)
    return model


@functools.cache
def exact(block, steps):
    """The same training in float64; every test starts from the same seed."""
    return train(network(block).double(), steps)


@pytest.mark.parametrize(
    ("steps", "autocast"),
    [(20, None), (20, torch.bfloat16), (20, torch.float16), (200, None), (200, torch.bfloat16)],
    ids=str,
)
@blocks
def test_training_against_eager(block, steps, autocast):
    """Training amplifies rounding. So eager runs are witnesses, from the same and from weights changed by a rounding:
    the fused run is not further from float64 than three times the furthest of them."""
    truth = exact(block, steps)
    torch.manual_seed(0)
    model = network(block)
    rounding = torch.finfo(autocast or torch.float32).eps / 2
    witnesses = [train(shaken(model, scale), steps, autocast) for scale in (0.0, rounding)]
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    got = train(fused, steps, autocast)
    for what, mine, want, *others in zip(("losses", "running statistics"), got, truth, *witnesses, strict=True):
        assert torch.isfinite(mine).all()
        furthest = max(relative_error(other, want) for other in others)
        error = relative_error(mine, want)
        assert error <= 3 * furthest + 4 * rounding, f"{what}: {error:.2e}, eager {furthest:.2e}"
    assert got[0][-4:].mean() < got[0][:4].mean() or steps < 200  # it learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@blocks
def test_inference_in_a_cuda_graph(block, dtype):
    model = network(block, dtype).eval()
    images.calibrate_(model, images.synthetic(16, 64))
    fastres.fuse_(model)
    data = batches(3, dtype)
    x = next(data)[0].clone()
    with torch.no_grad():
        replay, y = capture(lambda: model(x), DEVICE)
        for other, _ in itertools.islice(data, 3):
            want = model(other)
            x.copy_(other)
            y.fill_(float("nan"))
            replay()
            assert torch.equal(y, want)


@every_kernel
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@blocks
def test_training_step_in_a_cuda_graph(kernels, block, autocast):
    """Replayed steps are the steps of an uncaptured run, bit for bit; the warm-up counts each of its batches once."""
    model = network(block).train()
    fastres.fuse_(model)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    data = [(x.clone(), labels.clone()) for x, labels in itertools.islice(batches(4), 4)]
    x, labels = (t.clone() for t in data[0])

    def step(model, optimizer, x, labels):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    optimizer = optimizer_of(model)
    replay, loss = capture(lambda: step(model, optimizer, x, labels), DEVICE)
    assert model.bn1.num_batches_tracked == 3  # a capture runs nothing
    model.load_state_dict(before)
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    other = optimizer_of(twin)
    for other_x, other_labels in data:
        x.copy_(other_x)
        labels.copy_(other_labels)
        replay()
        assert torch.equal(loss, step(twin, other, other_x, other_labels))
    for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert model.bn1.num_batches_tracked == len(data)


@pytest.mark.parametrize("reentrant", [False, True])
@blocks
def test_running_statistics_under_checkpointing(block, reentrant):
    """A block that is computed again in backward is counted as often as in eager, and changes its statistics as
    often."""

    def step(model):
        x = next(batches(1))[0]
        y = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        y = checkpoint(model.layer1, y, use_reentrant=reentrant)
        y.square().mean().backward()
        return model.layer1[0].bn1

    model = network(block).train()
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    want, got = step(model), step(fused)
    assert got.num_batches_tracked == want.num_batches_tracked
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)


def bn_act_of(x, seed=0):
    """Every op that normalises and adds, forward and backward: all that they give."""
    generator = torch.Generator(x.device).manual_seed(seed)
    c = x.shape[1]
    weight, bias = (torch.rand(c, device=x.device, generator=generator).requires_grad_() for _ in range(2))
    running = [torch.zeros(c, device=x.device), torch.ones(c, device=x.device)]
    x = x.detach().requires_grad_()
    y = functional.bn_act(x, *running, weight, bias, x.detach(), training=True)
    norm = functional.BatchNorm(*running, weight, bias, training=True)
    y = functional.bn_add_bn_act(y, norm, x.detach() * 2, norm)
    z = functional.bn_act_maxpool(functional.add_act(y, x), *running, weight, bias, training=True)
    return [y, z, *torch.autograd.grad(z, [x, weight, bias], torch.ones_like(z)), *running]


@every_kernel
def test_two_streams(kernels):
    """Launches go to the current stream: work of two streams at once gives what it gives alone."""
    inputs = [
        torch.randn(16, 64, 56, 56, device=DEVICE).contiguous(memory_format=torch.channels_last) for _ in range(2)
    ]
    want = [bn_act_of(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # so that both run at once, and neither before its turn
                got.append(bn_act_of(x * 1))
        torch.cuda.synchronize()
        for mine, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_second_device(kernels):
    """Launches go to the device of the tensors, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    x = torch.randn(8, 64, 14, 14, device="cuda:0").contiguous(memory_format=torch.channels_last)
    want = bn_act_of(x)
    got = bn_act_of(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    # Other hardware may sum in another order.
    for mine, theirs in zip(got, want, strict=True):
        assert mine.device.index == 1
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_cudnn_epilogues(dtype, with_residual):
    """Right where the numbers are, and NaN where eager has NaN."""
    x = torch.randn(4, 32, 14, 14, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    weight, bias = (
        torch.randn(48, 32, 3, 3, device=DEVICE, dtype=dtype) * 0.1,
        torch.randn(48, device=DEVICE, dtype=dtype),
    )
    residual = torch.randn(4, 48, 14, 14, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    residual = residual if with_residual else None

    def eager(x, weight, bias, residual):
        y = F.conv2d(x, weight, bias, padding=1)
        return F.relu(y if residual is None else y + residual)

    with fastres.use_kernels("cudnn"):
        got = functional.conv_bias_act(x, weight, bias, residual, padding=1)
        truth = eager(*(t if t is None else t.double() for t in (x, weight, bias, residual)))
        error = relative_error(eager(x, weight, bias, residual), truth)
        assert relative_error(got, truth) <= budget(error, dtype)
        x[0, 0, 3, 3] = float("nan")
        got = functional.conv_bias_act(x, weight, bias, residual, padding=1)
    assert torch.equal(got.isnan(), eager(x, weight, bias, residual).isnan())


@blocks
def test_graphed_inference(block):
    """A graph a shape; weights that move, and weights written in place."""
    model = network(block).eval()
    fastres.fuse_(model)
    data = [x.clone() for x, _ in itertools.islice(batches(3), 3)]
    run = fastres.graphed(model, data[0])
    with torch.no_grad():
        for x in (*data, data[0][:3]):
            assert torch.equal(run(x), model(x))
        model.fc.bias.add_(1.0)
        assert torch.equal(run(data[0]), model(data[0]))
        model.conv1.weight.data = model.conv1.weight.data * 2
        assert torch.equal(run(data[0]), model(data[0]))
        assert folding.kept(model)
        eager = fastres.unfuse_(copy.deepcopy(model)).double()
        for write in (lambda p: p.mul_(1.01), lambda p: p.copy_(p * 0.9)):  # folded weights and graphs follow
            for p in model.layer1.parameters():
                write(p)
            eager.load_state_dict(model.state_dict())
            assert torch.equal(run(data[0]), model(data[0]))
            assert relative_error(run(data[0]), eager(data[0].double())) < 1e-2  # tf32
        fastres.refresh_(model)
        assert torch.equal(run(data[0]), model(data[0]))  # what a graph reads is not given back


@pytest.fixture
def little_memory():
    """little_memory(bytes): from then on the process may allocate so many more."""

    def limit(more):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("op", ["bn_act", "bn_add_bn_act", "bn_act_maxpool", "conv_bn_act"])
def test_out_of_memory_leaves_statistics_untouched(kernels, little_memory, op):
    """There is room for the statistics of the batch, but not for the result."""
    x = torch.randn(64, 64, 112, 112, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    mean, var, count = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE), torch.tensor(3, device=DEVICE)
    norm = functional.BatchNorm(mean, var, training=True, num_batches_tracked=count)
    weight = torch.randn(64, 64, 1, 1, device=DEVICE, dtype=torch.bfloat16)
    options = {"training": True, "num_batches_tracked": count}
    calls = {
        "bn_act": lambda x: functional.bn_act(x, mean, var, **options),
        "bn_add_bn_act": lambda x: functional.bn_add_bn_act(x, norm, x, norm),
        "bn_act_maxpool": lambda x: functional.bn_act_maxpool(x, mean, var, **options),
        "conv_bn_act": lambda x: functional.conv_bn_act(x, weight, mean, var, **options),
    }
    calls[op](x[:1])  # compiled, algorithms chosen
    before = mean.clone(), var.clone()
    assert not torch.equal(mean, torch.zeros_like(mean))
    little_memory(8 << 20)  # x has 98 MB
    with pytest.raises(RuntimeError, match="memory"):
        calls[op](x)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1]) and count == 3
    torch.cuda.set_per_process_memory_fraction(1.0)
    calls[op](x)
    assert not torch.equal(mean, before[0])


@every_kernel
def test_ten_runs_give_the_same_bits(kernels):
    x = torch.randn(16, 64, 56, 56, device=DEVICE).contiguous(memory_format=torch.channels_last)
    want = bn_act_of(x)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(bn_act_of(x), want, strict=True))
