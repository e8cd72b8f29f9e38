"""fuse_(memory="low"): the same bits with fewer bytes, as many as expected, and statistics updated once."""

import copy
import pickle

import pytest
import torch
from _compare import LIBRARIES, biased, block, check_numbers, image, network, randomise, some_kernels, step, watched
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import switches
from fastres.models.blocks import PlainBasicBlock, PlainBottleneck, PreActBasicBlock, PreActBottleneck
from fastres.saved import SavedTensors
from fastres.testing import LAYOUTS, relative_error


def chain(cls, blocks=4, width=16, **options):
    """Blocks without a projection, one after the other: behind an op that has made their input, as in a network."""
    planes = width // cls.expansion
    return randomise(nn.Sequential(nn.Conv2d(width, width, 1), *(cls(width, planes, **options) for _ in range(blocks))))


def resnet(name, **options):
    return randomise(getattr(fastres.models, name)(fused=False, **options))


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    """All kernels for CPUs, not only our own: those do not serve every convolution."""
    with fastres.use_kernels("reference") if request.param == "reference" else some_kernels():
        yield request.param


CHAINS = {
    "basic": lambda: chain(fastres.models.resnet.BasicBlock),
    "bottleneck": lambda: chain(fastres.models.resnet.Bottleneck),
    "biased": lambda: biased(chain(fastres.models.resnet.Bottleneck)),
    "grouped": lambda: chain(fastres.models.resnet.Bottleneck, blocks=3, width=32, groups=2, base_width=64),
    "plain basic": lambda: chain(PlainBasicBlock, blocks=2),
    "plain bottleneck": lambda: chain(PlainBottleneck, blocks=2),
    "v2 basic": lambda: chain(PreActBasicBlock),
    "v2 bottleneck": lambda: chain(PreActBottleneck),
    "projections": lambda: nn.Sequential(*(block(kind=k, stride=2) for k in ("BasicBlock", "Bottleneck"))),
}


def fast_and_low(model, x):
    fast, low = copy.deepcopy(model), copy.deepcopy(model)
    fastres.fuse_(fast)
    return fast, low, fastres.fuse_(low, memory="low", example=x).memory


def saved_bytes(model, x):
    with SavedTensors(model) as saved:
        model(x)
    return saved.bytes


def assert_same_bits(got, want, kernel="cpu"):
    """The reference convolves in float64 and rounds what it saves, so what it makes again is nearer to forward."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert (t is None) == (got[name] is None), name
        if t is not None and kernel == "cpu":
            assert torch.equal(got[name], t), name
        elif t is not None:
            assert relative_error(got[name], t) < 1e-5, name


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_with_the_bytes_expected(kernels, make, layout):
    """Outputs, gradients and statistics in training and in evaluation with gradients."""
    model, x = make(), image(next(make().parameters()).shape[1], n=4, order=LAYOUTS[layout])
    fast, low, report = fast_and_low(model, x)
    for mode in ("train", "eval"):
        with watched() as seen:
            got = step(low, x, mode)
        assert seen and all(reason is None for _, reason in seen)
        assert_same_bits(got, step(fast, x, mode), kernels)
    assert report.measured_bytes == report.expected_bytes == saved_bytes(low.train(), x)
    assert report.fast_bytes == saved_bytes(fast.train(), x)
    for one in report.blocks:
        assert (one.form == "recompute") == (one.expected_bytes < one.fast_bytes)
    assert report.expected_bytes < report.fast_bytes


@pytest.mark.parametrize(
    ("name", "shape", "share"),
    [("resnet50", (2, 3, 64, 64), 0.4), ("resnet20", (2, 3, 32, 32), 0.3)],
)
def test_networks_keep_less(name, shape, share):
    model, x = resnet(name).to(memory_format=torch.channels_last), torch.randn(shape)
    with some_kernels():
        report = fastres.fuse_(model, memory="low", example=x).memory
        meta = fastres.fuse_(copy.deepcopy(model), memory="low", example=x.to("meta")).memory
        assert saved_bytes(model.train(), x) == report.measured_bytes
    assert report.measured_bytes == report.expected_bytes <= share * report.fast_bytes
    assert (meta.blocks, meta.expected_bytes, meta.measured_bytes) == (report.blocks, report.expected_bytes, None)
    assert "memory for backward" in str(fastres.FuseReport([], report)) and "layer1.0: recompute" in str(report)


def test_bytes_of_a_block_by_hand():
    """A block keeps its input and a bit a value of its output; every second one's input is made again as well."""
    model, x = chain(fastres.models.resnet.BasicBlock), image(n=4)
    with some_kernels():
        report = fastres.fuse_(model, memory="low", example=x).memory
    values = 4 * 7 * 7
    vectors = 2 * 2 * 16 * 8  # mean and variance of two batch norms in float64
    kept, again = 4 * 16 * values + 2 * values + vectors, 2 * values + vectors
    assert [b.expected_bytes for b in report.blocks] == [kept, again] * 2
    raw = 2 * 4 * 16 * values
    assert [b.fast_bytes for b in report.blocks] == [kept + raw] * 4


@pytest.mark.parametrize("library", LIBRARIES)
def test_numbers_against_float64(library, monkeypatch):
    """Eager as witness; the whole network, batch norms' statistics included."""
    fuse = fastres.fuse_
    x = image(3, n=4, size=32)
    monkeypatch.setattr(fastres, "fuse_", lambda model: fuse(model, memory="low", example=x))
    with some_kernels():
        check_numbers(network(library), x, "train")


def test_a_training_in_float64_is_that_of_eager():
    """Five steps of SGD: parameters, running statistics and counters."""
    models = [network().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = image(3, n=4, size=32).double()
    with fastres.use_kernels("reference"):
        fastres.fuse_(models[1], memory="low", example=x)
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            torch.manual_seed(3)
            for _ in range(5):
                optimizer.zero_grad()
                model(x + 0.1 * torch.randn_like(x)).square().mean().backward()
                optimizer.step()
    for name, want in models[0].state_dict().items():
        assert relative_error(models[1].state_dict()[name], want) < 1e-10, name


def test_backward_updates_nothing_and_can_be_repeated(kernels):
    model, x = chain(fastres.models.resnet.BasicBlock), image()
    fastres.fuse_(model, memory="low", example=x)
    loss = model(x).square().sum()
    before = {name: b.clone() for name, b in model.named_buffers()}
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(int(b) == 1 for name, b in before.items() if name.endswith("tracked"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    x = image(3, n=4, size=32)
    with some_kernels():
        fast, low, report = fast_and_low(network().to(dtype), x.to(dtype))
        assert report.measured_bytes == report.expected_bytes < 0.6 * report.fast_bytes
        assert_same_bits(step(low, x.to(dtype), "train"), step(fast, x.to(dtype), "train"))
        fast, low, _ = fast_and_low(network(), x)
        with torch.autocast("cpu", dtype):
            assert_same_bits(step(low, x, "train"), step(fast, x, "train"))
            assert saved_bytes(low, x) < saved_bytes(fast, x)


def test_only_some_gradients(kernels):
    x = image(3, n=4, size=32)
    fast, low, _ = fast_and_low(network(), x)
    for model in (fast, low):
        for name, p in model.named_parameters():
            p.requires_grad_("conv1" not in name and "bn2" not in name)
    assert_same_bits(step(low, x, "train"), step(fast, x, "train"), kernels)
    for wanted in ("layer1.0.conv2.weight", "layer1.0.bn1.bias", "conv1.weight", "layer2.0.downsample.0.weight"):
        grads = []
        for model in (fast, low):
            p = model.get_parameter(wanted).requires_grad_()
            grads.append(torch.autograd.grad(model(x).square().sum(), p)[0])
        assert_same_bits({wanted: grads[1]}, {wanted: grads[0]}, kernels)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "v2 basic", "projections"])
def test_gradients_of_gradients(kind):
    model, x = CHAINS[kind]().double(), image(n=2, size=4).double()
    with fastres.use_kernels("reference"):
        fast, low, _ = fast_and_low(model, x)
        found = []
        for one in (copy.deepcopy(model), fast, low):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(one(leaf).sin().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), [leaf, *one.parameters()], allow_unused=True))
    for eager, *others in zip(*found, strict=True):
        for got in others:
            assert (got is None) == (eager is None)
            assert got is None or torch.allclose(got, eager, rtol=1e-9, atol=1e-9 * float(eager.abs().max() + 1))


def test_gradients_of_gradients_through_a_stem():
    x = image(3, n=2, size=16).double()
    with fastres.use_kernels("reference"):
        found = []
        fast, low, _ = fast_and_low(network().double(), x)
        for one in (fast, low):
            grads = torch.autograd.grad(one(x).sin().sum(), [one.conv1.weight], create_graph=True)
            found.append(torch.autograd.grad(grads[0].square().sum(), [one.conv1.weight, one.bn1.weight]))
    for want, got in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-9


def test_with_checkpoints_and_offloaded_tensors():
    """Each saved tensor is unpacked once in a backward pass, as checkpoints demand."""
    x = image(n=4)
    fast, low, _ = fast_and_low(chain(fastres.models.resnet.BasicBlock), x)
    low.train(), fast.train()
    grads = []
    with some_kernels():
        for model in (fast, low):
            for use in (lambda m, x: checkpoint(m, x, use_reentrant=False), lambda m, x: m(x)):
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                    loss = use(model, x).square().sum()
                grads.append(torch.autograd.grad(loss, [*model.parameters()]))
    for want, *others in zip(*grads, strict=True):
        assert all(torch.equal(got, want) for got in others)


def test_a_write_to_what_is_needed_is_an_error():
    model, x = chain(fastres.models.resnet.BasicBlock), image()
    with some_kernels():
        fastres.fuse_(model, memory="low", example=x)
        first = model[0](x)
        y = model[1](first)
        with torch.no_grad():
            first.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        inner = model[1](model[0](x))
        inner.add_(1)  # a block's output, before the next one takes it: that one saves it then
        want = torch.autograd.grad(model[2](inner).sum(), model[2].conv1.weight)[0]
        plain = torch.autograd.grad(model[2](inner.detach()).sum(), model[2].conv1.weight)[0]
        assert torch.equal(want, plain)


def test_the_choice_stays_with_the_model():
    x = image()
    with some_kernels():
        _, low, report = fast_and_low(chain(fastres.models.resnet.BasicBlock), x)
        low.train()
        few = saved_bytes(low, x)
        assert few == report.expected_bytes
        for other in (copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
            assert saved_bytes(other, x) == few and other.state_dict().keys() == low.state_dict().keys()
        with fastres.disabled(low):
            low(x)
        assert fastres.fuse_(low).memory is None
        assert saved_bytes(low, x) == few
        fastres.fuse_(low, memory="fast")
        assert saved_bytes(low, x) == report.fast_bytes
        fastres.fuse_(low, memory="low", example=x)
        fastres.unfuse_(low)
        assert not any(switches.recomputes(m) for m in low.modules())
        fastres.fuse_(low)
        assert saved_bytes(low, x) == report.fast_bytes


def test_blocks_that_do_not_run_fused_are_left_alone():
    model, x = chain(fastres.models.resnet.BasicBlock), image()
    fastres.fuse_(model)
    switches.turn_off(model[2], "as a canary does")
    with some_kernels():
        report = fastres.fuse_(model, memory="low", example=x).memory
    assert [b.name for b in report.blocks] == ["1", "3", "4"]
    assert report.measured_bytes == report.expected_bytes
    assert not switches.recomputes(model[2].conv1) and switches.recomputes(model[3].conv1)


def test_nothing_else_changes():
    model, x = network().eval(), image(3, n=4, size=32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with some_kernels():
        fastres.fuse_(model, memory="low", example=x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not model.training
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())


def test_under_compile_the_compiler_decides():
    model, x = nn.Sequential(block(kind="BasicBlock")), image()
    with some_kernels():
        fast, low, _ = fast_and_low(model, x)
        want = step(fast, x, "train")
        got = step(low, x, "train", call=torch.compile(low, backend="aot_eager", fullgraph=True))
    for name, t in want.items():
        assert t is None or relative_error(got[name], t) < 1e-5, name


def test_bad_arguments_leave_the_model_alone():
    model, x = network(), image(3, n=2, size=32)
    kinds = [type(m) for m in model.modules()]
    for options, error in (
        ({"memory": "tiny"}, ValueError),
        ({"memory": "low"}, TypeError),
        ({"memory": "low", "example": "x"}, TypeError),
        ({"memory": "low", "example": x[:, :2]}, RuntimeError),
    ):
        with pytest.raises(error):
            fastres.fuse_(model, **options)
        assert [type(m) for m in model.modules()] == kinds
        assert not any(switches.recomputes(m) for m in model.modules())
