"""Small networks run as one compiled program: the same bits as block by block, and never a stale weight."""

import copy
import gc

import pytest
import torch
from _compare import assert_same_in_threads, image, randomise
from torch import nn

import fastres
from fastres import models, replay
from fastres.kernels import extension

pytestmark = pytest.mark.skipif(
    not extension.available(), reason=f"programs are compiled kernels: {extension.load_error()}"
)


def network(block=models.BasicBlock, **options):
    return randomise(models.CifarResNet(block, (2, 1, 1), **options)).eval()


def infer(model, x):
    with torch.no_grad():
        return model(x)


def runs_as_program(model):
    found = replay._replays.get(model)
    return isinstance(found, replay._Replay) and found.program is not None


def fused(model):
    model = copy.deepcopy(model)
    fastres.fuse_(model)
    return model


@pytest.fixture
def pair():
    """An eager model, and the same fused, running as a program; an image."""
    eager, x = network(), image(3, n=2, size=32)
    model = fused(eager)
    for _ in range(3):
        infer(model, x)
    assert runs_as_program(model)
    return eager, model, x


def assert_same(eager, model, x):
    torch.testing.assert_close(infer(model, x), infer(eager, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
@pytest.mark.parametrize("shortcut", "AB")
@pytest.mark.parametrize(("n", "size"), [(1, 32), (1, 9), (3, 17), (1, 64), (7, 8)])
@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
@torch.no_grad()
def test_same_bits_and_close_to_float64(block, shortcut, n, size, winograd, monkeypatch):
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    eager = network(block, shortcut=shortcut)
    model, x = fused(eager), image(3, n=n, size=size)
    results = [infer(model, x) for _ in range(4)]
    assert runs_as_program(model)
    assert all(torch.equal(y, results[0]) and y.stride() == results[0].stride() for y in results)
    truth = copy.deepcopy(eager).double()(x.double())
    assert float((results[3] - truth).norm() / truth.norm()) < (5e-6 if winograd else 1e-6)
    other = torch.randn_like(x)
    replayed = infer(model, other)
    fastres.refresh_(model)
    assert torch.equal(replayed, infer(model, other))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(pair, threads):
    """Also one that is not the number that the steps were cut for."""
    _, model, x = pair
    want = infer(model, x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(infer(model, x), want)
        fastres.refresh_(model)
        assert all(torch.equal(infer(model, x), want) for _ in range(4))
        assert runs_as_program(model)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(pair, value):
    eager, model, x = pair
    x = x.clone()
    x[0, 1, 5, 30] = value
    for _ in range(4):
        got, want = infer(model, x), infer(eager, x)
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def tensors():
    model = network()
    return [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()]


@pytest.mark.parametrize("name", tensors())
def test_one_value_written_behind_autograds_back(pair, name):
    """Every value of a small tensor is looked at; of the large ones, those of one channel are changed."""
    eager, model, x = pair
    for m in (eager, model):
        t = m.get_parameter(name) if name in dict(m.named_parameters()) else m.get_buffer(name)
        large = t.nbytes > 1 << 16
        (t.data[3] if large else t.data.view(-1)[-1]).add_(2.0)
    assert_same(eager, model, x)
    for _ in range(3):
        assert_same(eager, model, x)
    assert runs_as_program(model)


def transposed(t):
    t.data = t.data.transpose(0, 1)


def other_memory(t):
    t.data = torch.randn_like(t)


CHANGES = {
    "transposed": lambda m: transposed(m.layer1[0].conv1.weight),
    "large, transposed": lambda m: transposed(m.layer3[0].conv2.weight),
    "other memory": lambda m: other_memory(m.layer1[0].conv1.weight),
    "optimizer": lambda m: [p.sub_(torch.full_like(p, 0.01)) for p in m.parameters()],
    "one value of a large weight, seen by its counter": lambda m: m.layer3[0].conv2.weight[5, 5, 1, 1].add_(30.0),
    "shortcut's stride and padding": lambda m: setattr(m.layer2[0], "downsample", models.ZeroPadShortcut(32, 2)),
    "another shortcut": lambda m: setattr(
        m.layer2[0], "downsample", nn.Sequential(models.ZeroPadShortcut(32, 2), nn.Hardtanh(0, 0.5))
    ),
    "shortcut's class": lambda m: setattr(m.layer2[0].downsample, "__class__", Doubled),
    "training": lambda m: m.layer3.train(),
    "classifier": lambda m: m.fc.weight.data.mul_(2),
    "classifier's bias": lambda m: setattr(m.fc, "bias", None),
    "pooling": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "hook on the pooling": lambda m: m.avgpool.register_forward_hook(lambda module, args, y: 3 * y),
    "hook on the classifier": lambda m: m.fc.register_forward_hook(lambda module, args, y: 3 * y),
    "hook on a shortcut": lambda m: m.layer2[0].downsample.register_forward_hook(lambda module, args, y: 3 * y),
    "forward of the classifier": lambda m: setattr(m.fc, "forward", lambda x, f=m.fc.forward: 2 * f(x)),
}


class Doubled(models.ZeroPadShortcut):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", CHANGES)
def test_changes(pair, change):
    eager, model, x = pair
    before = infer(model, x)
    for m in (eager, model):
        torch.manual_seed(3)
        with torch.no_grad():
            CHANGES[change](m)
    for _ in range(4):
        eager_before = copy.deepcopy(eager.state_dict())
        assert_same(eager, model, x)
        eager.load_state_dict(eager_before), model.load_state_dict(eager_before)  # of "training"
    if change != "shortcut's stride and padding":
        assert not torch.allclose(before, infer(eager, x), rtol=1e-3), "the change is too small to be seen"


def test_attributes_of_a_shortcut(pair):
    _, model, x = pair
    model.layer2[0].downsample.stride = 3
    with pytest.raises(RuntimeError):  # as in eager: it does not fit the branch any more
        infer(model, x)


def test_moved_between_dictionaries(pair):
    """The same objects in another place are another model."""
    eager, model, x = pair
    for m in (eager, model):
        first, second = m.layer1[0].bn1, m.layer1[0].bn2
        m.layer1[0].bn1, m.layer1[0].bn2 = second, first
    for _ in range(3):
        assert_same(eager, model, x)


def test_threads_of_python(pair):
    eager, model, x = pair
    assert_same_in_threads(eager, model, x)


def test_program_goes_with_its_model(pair):
    _, model, x = pair
    number = replay._replays[model].program.number
    fastres.refresh_(model)
    gc.collect()
    with pytest.raises(RuntimeError, match="no program"):
        torch.ops.fastres_cpu.program_run(number, x)


def test_bad_arguments(pair):
    _, model, x = pair
    number, ops = replay._replays[model].program.number, torch.ops.fastres_cpu
    for wrong in (x[:1], x.double(), x.contiguous()):
        with pytest.raises(RuntimeError):
            ops.program_run(number, wrong)
    with pytest.raises(RuntimeError, match="ends once"):
        ops.program_finish(number, [x])
    new = ops.program_new([1, 16, 8, 8])
    with pytest.raises(RuntimeError, match="not finished"):
        ops.program_run(new, torch.zeros(1, 16, 8, 8))
    weight = torch.zeros(10)
    for number_of_x, shape in ((1, [16, 16, 3, 3]), (0, [16, 16, 3, 3]), (0, [16, 8, 3, 3])):
        with pytest.raises(RuntimeError):
            ops.program_conv(new, number_of_x, -1, weight, shape, None, [1, 1], [1, 1], [1, 1], True, 1)
    with pytest.raises(RuntimeError, match="unsupported shortcut"):
        ops.program_zero_pad(new, 0, 8, 1)
    ops.program_delete(new)


def test_other_heads():
    """The stages are a program whatever comes behind them."""
    for head in (nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(64, 3))):
        eager = network()
        eager.fc = head.eval()
        model = fused(eager)
        for size, program in ((9, True), (4, False)):  # the last maps of the other are of one pixel: no channels_last
            x = image(3, n=2, size=size)
            for _ in range(4):
                assert_same(eager, model, x)
            assert runs_as_program(model) == program


def test_compile(pair):
    eager, model, x = pair
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(infer(compiled, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_autocast_and_forced_kernels(pair):
    eager, model, x = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert infer(model, x).dtype is infer(eager, x).dtype
    with fastres.use_kernels("reference"):
        assert_same(eager, model, x)
    assert_same(eager, model, x)


def test_empty_batch_and_half_precision_run_block_by_block():
    eager = network()
    model = fused(eager)
    for _ in range(3):
        assert infer(model, image(3, n=1, size=32)[:0]).shape == (0, 10)
    for m in (eager, model):
        m.to(torch.bfloat16)
    x = image(3, n=1, size=32).to(torch.bfloat16)
    for _ in range(3):
        torch.testing.assert_close(infer(model, x), infer(eager, x), rtol=0.05, atol=0.05)
    assert not runs_as_program(model)
