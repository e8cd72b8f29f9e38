"""A canary finds seeded faults, never sings without one, and leaves no trace."""

import copy
import pickle
import warnings

import pytest
import torch
from _compare import LIBRARIES, assert_same, biased, block, image, network, some_kernels, watched
from torch import nn

import fastres
from fastres import hooks, replay
from fastres.canary import Check
from fastres.kernels import extension
from fastres.testing import DTYPES, LAYOUTS


@pytest.fixture(autouse=True)
def kernels():
    with some_kernels():
        yield


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastres.CanaryWarning)
        yield


def fused_network(library="fastres"):
    model = network(library).to(memory_format=torch.channels_last)
    fastres.fuse_(model)
    return model


def images(n=2, size=32):
    return image(3, n=n, size=size)


def faulty(monkeypatch, width, by=1e-2):
    """A seeded fault: fused convolutions of this many output channels add something to each result."""
    right = fastres.sites.conv_bn_act

    def wrong(conv, bn, x, **options):
        y = right(conv, bn, x, **options)
        return y + by * y.detach().std() if conv.out_channels == width else y

    monkeypatch.setattr(fastres.sites, "conv_bn_act", wrong)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_a_fault_is_found_and_named(monkeypatch, mode):
    model = fused_network().train(mode == "train")
    faulty(monkeypatch, 128)
    handle = fastres.canary(model, every=1, action="raise", seed=1)
    found = pytest.raises(fastres.CanaryError, match=r"layer2\.0, forward \d+, .*: .* off, budget")
    with handle, torch.set_grad_enabled(mode != "inference"), found as info:
        for _ in range(40):
            model(images())
    check = info.value.check
    assert check is handle.last and handle.drifts == [check] and not check.ok
    assert check.name == "layer2.0" and check.tensor == "output" and check.training is (mode == "train")
    assert 1e-3 < check.error < 1e-1 and check.budget < 1e-4
    assert handle.checks >= 1 and check.forward == handle.checks


def test_every_kth_forward_one_block():
    model = fused_network()
    seen = []
    handle = fastres.canary(model, every=3, seed=0)
    for forward in range(1, 25):
        before = handle.checks
        model(images())
        assert handle.checks - before == (forward % 3 == 0)
        if forward % 3 == 0:
            assert handle.last.forward == forward and handle.last.ok
            seen.append(handle.last.name)
    assert handle.checks == 8 and set(seen) == {"", "layer1.0", "layer2.0"}
    handle.remove()
    for _ in range(6):
        model(images())
    assert handle.checks == 8 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_seed_chooses():
    def names(seed):
        model = fused_network()
        found = []
        with fastres.canary(model, every=1, seed=seed) as handle:
            for _ in range(6):
                model(images(size=16))
                found.append(handle.last.name)
        return found

    assert names(3) == names(3) != names(4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silent_without_a_fault(library, dtype):
    """Over shapes, layouts, kinds of blocks and modes."""
    for kind in ("BasicBlock", "Bottleneck"):
        for options in ({}, {"stride": 2}):
            for layout in LAYOUTS.values():
                model = nn.Sequential(biased(block(library, kind, **options))).to(dtype)
                fastres.fuse_(model)
                with fastres.canary(model, every=1, action="raise") as handle:
                    for mode, n, size in (("train", 2, 6), ("train", 1, 9), ("eval", 3, 5)):
                        model.train(mode == "train")(image(n=n, size=size, order=layout).to(dtype))
                    with torch.no_grad():
                        model(image(n=2, size=7, order=layout).to(dtype))
                assert handle.checks == 4 and handle.last.ok


def test_silent_under_autocast_and_with_large_means():
    model, x = fused_network(), images(n=4) * 10 + 100
    with fastres.canary(model, every=1, action="raise") as handle:
        for _ in range(6):
            model(x)
            with torch.autocast("cpu", torch.bfloat16):
                model(x)
    assert handle.checks == 12


@pytest.mark.parametrize("mode", ["train", "eval", "inference", "inference_mode"])
def test_no_trace(mode):
    """Bit for bit what it is without a canary: outputs, gradients, statistics, counters, random state."""
    model = fused_network().train(mode == "train")
    model.layer1[0].relu.register_forward_hook(lambda *args: None)  # one that runs eager
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    outcomes = []
    for every in (None, 1):
        one = copy.deepcopy(model)
        handle = None if every is None else fastres.canary(one, every, seed=0)
        torch.manual_seed(5)
        with torch.set_grad_enabled(mode in ("train", "eval")), torch.inference_mode(mode == "inference_mode"):
            ys = [one(x) for x in torch.randn(5, 2, 3, 32, 32)]
        outcome = {f"y{i}": y for i, y in enumerate(ys)} | {f"b.{n}": b for n, b in one.named_buffers()}
        if mode in ("train", "eval"):
            sum(y.square().sum() for y in ys).backward()
            outcome |= {n: p.grad for n, p in one.named_parameters()}
        outcome["random"] = torch.get_rng_state()
        outcomes.append({n: t.clone() for n, t in outcome.items()})
        assert handle is None or (handle.checks >= 3 and not handle.drifts and handle.last.name != "layer1.0")
    assert outcomes[0].keys() == outcomes[1].keys()
    assert all(torch.equal(t, outcomes[1][n]) for n, t in outcomes[0].items())


def test_wrong_statistics_are_found(monkeypatch):
    model = nn.Sequential(block(kind="BasicBlock"))
    fastres.fuse_(model)
    update = fastres.ops.update_running_stats.call

    def twice(mean, *args):
        update(mean, *args)
        update(mean, *args)

    monkeypatch.setattr(fastres.ops.update_running_stats, "call", twice)
    with fastres.canary(model, every=1), pytest.warns(fastres.CanaryWarning, match=r"running_(mean|var) is"):
        model(image())
    with fastres.canary(model.eval(), every=1, action="raise"):
        model(image())


def test_a_counter_that_is_off_by_one_is_found(monkeypatch):
    model = nn.Sequential(block(kind="BasicBlock"))
    fastres.fuse_(model)
    monkeypatch.setattr(fastres.ops.update_running_stats, "count_batch", lambda counter: counter.add_(2))
    with fastres.canary(model, every=1), pytest.warns(fastres.CanaryWarning, match="num_batches_tracked is 1"):
        model(image())


def test_disable_switches_the_block_off(monkeypatch):
    model = fused_network().eval()
    with torch.no_grad():
        want = fastres.unfuse_(copy.deepcopy(model))(images().fill_(0.5))
    faulty(monkeypatch, 128)
    handle = fastres.canary(model, every=1, action="disable")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            model(images())
    assert len(caught) == len(handle.drifts) == 1 and "runs its original forward from now on" in str(caught[0].message)
    handle.remove()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), watched() as seen:
            got = other(images().fill_(0.5))
        reasons = {m: reason for m, reason in seen}
        assert reasons[other.layer2[0]].startswith("switched off by a canary: output was")
        assert reasons[other.layer1[0]] is None
        assert_same({"y": got}, {"y": want})
    rows = {row.name: row for row in fastres.explain(model, images()).rows}
    assert rows["layer2.0.conv1"].reason.startswith("switched off by a canary")
    fastres.fuse_(fastres.unfuse_(model))
    assert "fastres_off" not in model.layer2[0].__dict__


def test_a_tolerance_of_ones_own():
    model = fused_network()
    with fastres.canary(model, every=1, tolerance=0.0, seed=0) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            model(images())
    assert handle.drifts and all(check.budget == 0 for check in handle.drifts)
    with fastres.canary(model, every=1, tolerance=1.0, action="raise"):
        model(images())


def test_the_original_may_be_wrong_itself(monkeypatch):
    """Differences that are eager's own errors are not held against the fused block."""
    model = nn.Sequential(block(kind="BasicBlock"))
    fastres.fuse_(model)
    bn = nn.BatchNorm2d.forward

    def inexact(self, x):
        y = bn(self, x)
        return y if x.dtype is torch.float64 else y * (1 + 1e-4 * torch.sign(y))

    x = image()
    with monkeypatch.context() as patch:
        original = type(model[0]).unfused_class().forward

        def forward(self, x):
            patch.setattr(nn.BatchNorm2d, "forward", inexact)
            try:
                return original(self, x)
            finally:
                patch.setattr(nn.BatchNorm2d, "forward", bn)

        patch.setattr(type(model[0]).unfused_class(), "forward", forward)
        with fastres.canary(model, every=1, action="raise") as handle:
            model(x)
        assert handle.checks == 1 and handle.last.ok
        with fastres.canary(model, every=1, tolerance=2e-5), pytest.warns(fastres.CanaryWarning):
            model(x)  # to the original alone they differ


def test_where_nothing_runs_fused():
    model = fused_network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *args: None)
    with fastres.canary(model, every=1, action="raise") as handle:
        for _ in range(8):
            model(images())
    assert handle.checks == 0 and handle.last is None


def test_copies_are_not_watched_and_the_model_can_go():
    model = fused_network()
    handle = fastres.canary(model, every=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(images())
    assert handle.checks == 0
    model(images())
    assert handle.checks == 1
    assert not any(hooks.hooked(m) for m in model.modules())  # does not keep updates from going together


def test_recorded_calls_go_on_between_checks():
    model = fused_network().eval()
    with fastres.canary(model, every=8, action="raise") as handle, torch.no_grad():
        for _ in range(17):
            model(images())
            if handle.last is not None and handle.last.forward == 16 and handle.checks == 3:
                break
        for _ in range(3):
            model(images())
    if extension.available() and fastres.kernels.table.setting() is None:
        assert isinstance(replay._replays[model], replay._Replay)
    assert handle.checks == 2


def test_errors_of_the_model_end_a_check():
    model = fused_network()
    with fastres.canary(model, every=1) as handle:
        for _ in range(4):
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 5, 32, 32))
        assert fastres.observe.listener is None
        for _ in range(3):
            model(images())
        assert handle.checks >= 2


def test_inside_compile_nothing_is_checked():
    model = nn.Sequential(block(kind="BasicBlock")).eval()
    fastres.fuse_(model)
    with fastres.canary(model, every=1) as handle, torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(image())
        assert handle.checks == 0
        torch.func.vmap(model)(image()[None])
        assert handle.checks == 0
        model(image())
    assert handle.checks == 1


def test_explain_sees_past_a_canary():
    model = fused_network()
    with fastres.canary(model, every=1):
        reports = [fastres.explain(model, images()) for _ in range(6)]
    assert all(report.fused == reports[0].fused for report in reports) and reports[0].fused > 10


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, ValueError),
        ({"every": 2.0}, ValueError),
        ({"every": True}, ValueError),
        ({"action": "shout"}, ValueError),
        ({"tolerance": -1.0}, ValueError),
        ({"tolerance": float("nan")}, ValueError),
    ],
    ids=str,
)
def test_bad_arguments(options, error):
    with pytest.raises(error, match=next(iter(options))):
        fastres.canary(fused_network(), **options)
    with pytest.raises(TypeError, match="Module"):
        fastres.canary(torch.ones(2))


def test_a_check_says_where():
    text = str(Check("layer1.0", 200, True, "output", 1e-2, 5e-6))
    assert text == "layer1.0, forward 200, train: output is 1.00e-02 off, budget 5.00e-06"
