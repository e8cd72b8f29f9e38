"""Folded and packed weights are kept between inference calls, and never stale: all ways to change a model."""

import copy
import threading

import pytest
import torch
from _changes import CHANGES, conv2
from _compare import assert_path, block, image, kept, network, randomise, set_mode, step, watched
from torch import nn

import fastres
from fastres import folding, sites
from fastres.kernels import extension
from fastres.nn import ConvBnAct2d

pytestmark = pytest.mark.skipif(
    not extension.available(), reason=f"folded weights are kept for the compiled kernels only: {extension.load_error()}"
)


def infer(model, x):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, order):
    eager, x = network(), image(3, size=32, order=order)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    before = infer(fused, x)
    assert kept(conv2(fused)) is not None
    for model in (eager, fused):
        CHANGES[change](model)
    want = infer(eager, x)
    assert not torch.allclose(before, want, rtol=1e-3), "the change is too small to be seen"
    for _ in range(2):
        with watched() as seen:
            got = infer(fused, x)
        assert_path(seen, "fast")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("winograd", [True, False])
def test_packed_for_another_method(winograd, monkeypatch):
    """config.winograd, the size of the image and the layout change how weights are packed, at any time."""
    eager = network()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for size, order in ((32, torch.channels_last), (8, torch.channels_last), (32, torch.contiguous_format)) * 2:
        x = image(3, size=size, order=order)
        for value in (winograd, not winograd, winograd):
            monkeypatch.setattr(fastres.config, "winograd", value)
            torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_change_of_the_stems_convolution():
    """Its weights are packed without a batch norm."""
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    before = infer(fused, x)
    assert kept(fused.conv1) is not None
    for model in (eager, fused):
        model.conv1.weight.data[5].neg_()
    want = infer(eager, x)
    assert not torch.allclose(before, want, rtol=1e-3)
    torch.testing.assert_close(infer(fused, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["sgd_foreach", "ema_lerp", "data_one_output_channel", "eps"])
def test_change_in_inference_mode(change):
    """Parameters made and changed in inference mode have no version counter at all."""
    with torch.inference_mode():
        eager, x = network(), image(3, size=32)
        fused = copy.deepcopy(eager)
        fastres.fuse_(fused)
        before = fused.eval()(x)
        assert conv2(fused).weight.is_inference() and kept(conv2(fused)) is not None
        for model in (eager, fused):
            CHANGES[change](model)
        want, got = eager.eval()(x), fused(x)
    assert not torch.allclose(before, want, rtol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32]


def test_to_dtype():
    """One model through several dtypes and back, with an input of each."""
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for dtype in DTYPES:
        want, got = infer(eager.to(dtype), x.to(dtype)), infer(fused.to(dtype), x.to(dtype))
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 5e-2)
        assert got.dtype is dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_to_memory_format():
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for order in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            want, got = infer(eager.to(memory_format=order), given), infer(fused.to(memory_format=order), given)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            taps = [infer(model.layer1, infer(model.conv1, given)) for model in (eager, fused)]
            assert taps[0].stride() == taps[1].stride()


def test_another_input():
    """Weights are packed for one shape of input and right for all; autocast and a return to fp32 lie between."""
    eager = network()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for n, size in ((1, 32), (5, 32), (2, 48), (1, 17), (3, 32)):
        x = image(3, n=n, size=size)
        torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=5e-2, atol=5e-2)


def test_functional_call():
    """Other weights for one call, through the same modules; the module's own before and after."""
    eager, x = network().eval(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for scale in (1.0, 1.5, 1.0, 0.5):
        state = {k: v * scale if v.is_floating_point() else v for k, v in eager.state_dict().items()}
        with torch.no_grad():
            want, got = (torch.func.functional_call(model, state, (x,)) for model in (eager, fused))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_deepcopies_have_weights_of_their_own():
    first, x = network(), image(3, size=32)
    fastres.fuse_(first)
    want = infer(first, x)
    second = copy.deepcopy(first)
    third = copy.deepcopy(second)
    torch.testing.assert_close(infer(second, x), want, rtol=0, atol=0)
    conv2(second).weight.data.mul_(-1.0)
    assert not torch.allclose(infer(second, x), want)
    for model in (first, third):
        torch.testing.assert_close(infer(model, x), want, rtol=0, atol=0)
    eager = fastres.unfuse_(copy.deepcopy(second))
    torch.testing.assert_close(infer(second, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_one_convolution_in_two_blocks():
    """Weights shared between modules with batch norms of their own, and one module in two blocks."""
    eager = nn.Sequential(block(kind="BasicBlock"), block(kind="BasicBlock"), block(kind="BasicBlock"))
    eager[1].conv1.weight = eager[0].conv1.weight
    eager[2].conv1 = eager[0].conv1
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    for _ in range(2):
        torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-5)
        for model in (eager, fused):
            model[0].conv1.weight.data.mul_(1.2)


def test_refresh_for_single_values_of_a_large_weight():
    """The one thing that may go unnoticed: a few values written behind autograd's back. refresh_ is for that."""
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    infer(fused, x)
    for model in (eager, fused):
        conv2(model).weight.data[3, 5, 0, 0] += 5.0
    assert fastres.refresh_(fused) is fused
    torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_a_single_value_written_in_the_open_is_noticed():
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    infer(fused, x)
    for model in (eager, fused):
        with torch.no_grad():
            conv2(model).weight[3, 5, 0, 0] += 5.0
    torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_new_parameter_at_an_old_address():
    """Python and the allocator hand out the same id and memory again: neither says that a tensor is the same one."""
    fused, x = network(), image(3, size=32)
    fastres.fuse_(fused)
    conv = conv2(fused)
    memory = conv.weight.detach().numpy().copy()
    conv.weight = nn.Parameter(torch.from_numpy(memory))
    infer(fused, x)
    old = id(conv.weight)
    conv.weight = None
    memory[3, 5, 0, 0] += 5.0
    for _ in range(1000):
        conv.weight = nn.Parameter(torch.from_numpy(memory))
        if id(conv.weight) == old:
            break
    eager = fastres.unfuse_(copy.deepcopy(fused))
    torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


def test_modules_of_your_own():
    module, x = randomise(ConvBnAct2d(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32))), image()
    for _ in range(2):
        want = infer(nn.Sequential(module.conv, module.bn, nn.ReLU()), x)
        torch.testing.assert_close(infer(module, x), want, rtol=1e-4, atol=1e-5)
        module.conv.weight.data[3] *= 2.0
        module.bn.running_mean[5] = 3.0


def test_threads():
    """Several threads use and change one model: what each gets is eager's result for weights that the model had."""
    model, x = network().eval(), image(3, size=32)
    want = infer(model, x)
    fastres.fuse_(model)
    wrong = []

    def work():
        for i in range(6):
            if i % 3 == 2:
                fastres.refresh_(model)
            with torch.no_grad():
                y = model(x)
            if not torch.allclose(y, want, rtol=1e-3, atol=1e-3):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_kept_for_a_model_that_is_gone():
    model = block()
    fastres.fuse_(model)
    infer(model, image())
    before = len(fastres.folding._entries)
    assert before >= 3
    del model
    assert len(fastres.folding._entries) <= before - 3


def test_training_keeps_nothing():
    model = block()
    fastres.fuse_(model)
    step(set_mode(model, "train"), image())
    step(set_mode(model, "eval"), image())
    assert kept(model.conv1) is None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Weights are kept folded but not packed, and without a fingerprint."""
    monkeypatch.setattr(folding, "packs", lambda x: False)
    monkeypatch.setattr(folding, "serves", lambda x: True)
    monkeypatch.setattr(sites, "chain_of_blocks", lambda owner, parts, forwards, x, forward: forward(x))  # no replay


def scaled(block):
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.2)


def moved_statistics(block):
    with torch.no_grad():
        block.bn1.running_mean.add_(0.5)
        block.bn2.running_var.mul_(2.0)


def replaced_parameter(block):
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach() * 1.5)


def other_memory(block):
    for p in block.parameters():
        p.data = p.data * 1.3


def loaded(block):
    block.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in block.state_dict().items()})


def another_eps(block):
    block.bn2.eps = 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [scaled, moved_statistics, replaced_parameter, other_memory, loaded, another_eps])
def test_weights_that_are_kept_plain(as_on_a_gpu, change, dtype):
    eager = block(kind="BasicBlock", stride=2).to(dtype)
    fused, x = copy.deepcopy(eager), image().to(dtype)
    fastres.fuse_(fused)
    infer(fused, x)
    first = folding.kept(fused)
    assert len(first) == 3 and all(type(run) is folding.Plain and run.weight.dtype is dtype for run in first)
    infer(fused, x[:2])  # another size: the same weights
    assert all(a is b for a, b in zip(folding.kept(fused), first, strict=True))
    for model in (eager, fused):
        change(model)
    got, want = infer(fused, x), infer(eager.double(), x.double())
    assert folding.kept(fused) != first
    bound = 1e-4 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    conv = fused.conv2
    conv.weight.data.mul_(3.0)  # goes unnoticed without a fingerprint
    assert torch.equal(infer(fused, x), got)
    fastres.refresh_(fused)
    assert not torch.allclose(infer(fused, x), got)


def test_weights_that_are_not_finite_are_not_kept_plain(as_on_a_gpu):
    """Batch norm runs by itself there."""
    fused = block(kind="BasicBlock")
    fused.conv1.weight.data[0, 0, 0, 0] = float("inf")
    fastres.fuse_(fused)
    infer(fused, image())
    assert kept(fused.conv1).run is None and kept(fused.conv2).run is not None


def test_every_weight_is_folded_once_and_kept_plain(as_on_a_gpu, monkeypatch):
    """Of the stem too, whose convolution and batch norm are apart there."""
    folded = []
    pack = folding._pack
    monkeypatch.setattr(folding, "_pack", lambda conv, *rest: folded.append(conv) or pack(conv, *rest))
    eager, x = network(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for _ in range(3):
        torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)
    assert len(folded) == len(set(folded)) == sum(type(m) is nn.Conv2d for m in fused.modules())
