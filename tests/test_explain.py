"""fastres.explain: what happened to every operation, bytes as counted by hand, times of blocks, and a model that is as
it was."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from _compare import block, image, network, some_kernels
from torch import Tensor, nn

import fastres
from fastres import guard, reasons
from fastres.explain import ExplainReport
from fastres.kernels import extension
from fastres.report import Row
from fastres.saved import SavedTensors

compiled = pytest.mark.skipif(not extension.available(), reason="no compiled kernels")


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    with some_kernels():
        yield


def explain(model: nn.Module, mode: str = "eval", x: Any = None, **options: Any) -> ExplainReport:
    fastres.fuse_(model.train(mode == "train"))
    return fastres.explain(model, image(3, size=32) if x is None else x, **options)


def row_of(report: ExplainReport, name: str, kind: str) -> Row:
    (row,) = (row for row in report.rows if (row.name, row.kind) == (name, kind))
    return row


@compiled
def test_the_kernels_that_ran() -> None:
    report = explain(network())
    assert report.fused == report.total  # the stem's convolution too: one pass with its pooling
    stem = row_of(report, "conv1", "conv")
    assert (stem.op, stem.kernel, stem.method) == ("conv_maxpool", "cpu", "Winograd in rows")
    assert row_of(report, "layer1.0.conv1", "conv").method.startswith("Winograd")
    assert row_of(report, "layer2.0.downsample.0", "conv").method == "matrix product"
    assert row_of(report, "layer2.0", "add").op == "conv_bias_act"
    contiguous = explain(network(), x=torch.randn(2, 3, 32, 32))
    assert row_of(contiguous, "layer1.0.conv1", "conv").kernel == "onednn"
    with fastres.use_kernels("reference"):
        assert {row.kernel for row in explain(network()).rows} == {"reference"}


@compiled
def test_the_kernels_of_a_training_step() -> None:
    report = explain(network(), "train")
    assert [row.name for row in report.lost] == ["conv1"] and report.lost[0].code == "outside-block"
    assert row_of(report, "bn1", "bn").op == "bn_act_maxpool"
    for name in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"):
        row = row_of(report, f"layer2.0.{name}", "conv" if "conv" in name or name.endswith("0") else "bn")
        assert (row.op, row.kernel, row.backward) == ("conv_bn_act", "cpu", "cpu"), name
    wide = block("fastres", "Bottleneck", 64)
    assert row_of(explain(wide, "train", image(64, n=4, size=16)), "conv3", "conv").op == "conv1x1_bn_act"


def mega(row: Row) -> tuple[int, int]:
    assert row.eager_bytes is not None and row.fused_bytes is not None
    return row.eager_bytes, row.fused_bytes


@compiled
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bytes_are_those_counted_by_hand(mode: str) -> None:
    """A block of one shape: N activations are 4 N bytes, and the table counts how often each is read or written."""
    n = 4 * 16 * 8 * 8 * 4
    x = image(16, n=4, size=8).requires_grad_(mode == "train")
    report = explain(block("fastres", "BasicBlock", 16), mode, x)
    conv, bn, add, act = (
        mega(row_of(report, *of)) for of in (("conv2", "conv"), ("bn2", "bn"), ("", "add"), ("relu", "act"))
    )
    if mode == "eval":
        assert conv == (2 * n, 2 * n)  # read x, write y
        assert bn == (2 * n, 0)  # read, write; folded
        assert act == (2 * 2 * n, 0)  # two calls, each reads and writes
        assert add == (3 * n, n)  # the residual is read
        return
    assert conv == (6 * n, 6 * n)  # two gradients, each reads the gradient of y and reads or writes what is like x
    assert bn == ((3 + 5) * n, (2 + 5) * n)  # statistics come with the convolution
    assert mega(row_of(report, "bn1", "bn")) == ((3 + 5) * n, (2 + 5 + 2) * n)  # relu(bn1(...)) is computed again
    assert act == (2 * (2 + 3) * n, 0)
    assert add == ((3 + 3) * n, (1 + 1 + 1) * n)  # residual read, its gradient written, the other one read by conv1


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_memory_is_what_autograd_keeps(kind: str) -> None:
    """The sums over blocks are those of an independent count of whole forwards."""
    model = network()
    report = explain(model, "train")
    x = image(3, size=32)
    counts = []
    for now in (copy.deepcopy(model), fastres.unfuse_(copy.deepcopy(model))):
        with SavedTensors(now) as saved:
            y = now(x)
        counts.append(saved.bytes)
        del y
    of_blocks = [sum(getattr(b, name) for b in report.blocks) for name in ("fused_saved", "eager_saved")]
    for found, whole in zip(of_blocks, counts, strict=True):
        assert whole - 4 * 3 * 128 * 16 - 10_000 <= found <= whole  # without pooling and classifier, after the blocks
    if extension.available():
        assert of_blocks[0] < of_blocks[1]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_times_of_blocks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastres.explain import timing

    monkeypatch.setattr(timing, "SECONDS", 0.1)
    report = explain(network(), mode, time=True)
    assert report.step is not None and report.step.rounds >= 3
    assert [b.name for b in report.blocks] == ["", "layer1.0", "layer2.0"]
    shares = []
    for found in report.blocks:
        assert found.eager_ms is not None and found.fused_ms is not None and found.share is not None
        assert found.eager_ms > 0 and found.fused_ms > 0
        shares.append(found.share)
    assert 0 < sum(shares) <= 1.0001
    assert "share" in str(report) and f"{report.step.fused:.2f} ms now" in str(report)


def test_time_goes_to_the_block_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is counted, not read: every sleep of a layer is one tick, forward and backward."""
    from fastres.explain import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    class Tick(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            now[0] += 1.0
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            now[0] += 10.0
            return grad

    class Ticking(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.detach().sum()) != float("inf"):  # so that it is not traced
                x = Tick.apply(x)
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 16, 1), block("fastres", "BasicBlock"), block("fastres", "BasicBlock"))
    model[1].relu = Ticking()  # twice in a forward
    report = explain(model, "train", time=True)
    ms = {found.name: (found.eager_ms, found.fused_ms, found.share) for found in report.blocks}
    assert ms["1"] == (22_000.0, 22_000.0, 1.0)
    assert ms["2"] == ms["0"] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (lambda m: m.layer1[0].bn1.register_forward_hook(lambda *_: None), "hook"),
        (lambda m: setattr(m.layer1[0], "relu", nn.ReLU6()), "unknown-module"),
        (lambda m: setattr(m.layer1[0].conv2, "forward", m.layer1[0].conv2.forward), "own-forward"),
        (lambda m: setattr(m.layer1[0].conv2, "padding", "same"), "geometry"),
        (lambda m: setattr(m.layer1[0].bn1, "weight", Strange(m.layer1[0].bn1.weight.data)), "tensor"),
        (lambda m: setattr(m.layer1[0], "downsample", nn.Sequential(m.layer1[0].bn2)), "shared-module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_block_says_why(what: Callable[[nn.Module], Any], code: str) -> None:
    model = network()
    fastres.fuse_(model)
    what(model)
    report = fastres.explain(model.eval(), image(3, size=32))
    assert {row.code for row in report.rows if row.block == "layer1.0"} == {code}
    assert not [row for row in report.lost if row.block != "layer1.0"] or not extension.available()
    assert f"not fused, {code}: " in str(report)


class Untraceable(nn.Module):
    """A forward that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y if float(y.sum()) > 0 else -y


class Strange(nn.Parameter):
    """A parameter of a class of its own."""


def test_other_reasons() -> None:
    x = image(3, size=32)
    model = network().eval()
    assert {row.code for row in fastres.explain(model, x).rows if row.block == "layer1.0"} == {"not-swapped"}
    own = network()
    own.layer1[0].forward = own.layer1[0].forward
    assert {row.code for row in explain(own).rows if row.block == "layer1.0"} == {"own-forward"}
    assert [row.code for row in explain(nn.Conv2d(3, 4, 1)).rows] == ["unknown-block"]
    assert {row.code for row in explain(Untraceable()).rows} == {"not-traceable"}
    fastres.fuse_(model)
    unused = nn.ModuleDict({"used": model, "unused": block()})
    unused.forward = lambda x: model(x)  # type: ignore[method-assign]
    assert {row.code for row in explain(unused).rows if row.block == "unused"} == {"not-run"}
    double = explain(network().double(), x=x.double())
    assert double.total and double.to_json()["dtype"] == "float64"
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert {row.code for row in fastres.explain(model, x).lost} == {"hook"}
    finally:
        hook.remove()


def test_codes_are_stable_texts() -> None:
    reason = reasons.because("hook", "hooks on bn1")
    assert reason == "hooks on bn1" and reasons.code_of(reason) == "hook"
    assert reasons.code_of("some text") == "other" and reasons.code_of("") == ""
    for again in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert again == reason and reasons.code_of(again) == "hook"
    assert Row("a", "conv", False, reason).code == "hook" and Row("a", "conv", True).code == ""


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda x: x[0], "shape"),
        (lambda x: x.int(), "dtype"),
        (lambda x: x.half(), "dtype"),
        (lambda x: x.to_sparse(), "tensor"),
        (lambda x: x.to("meta"), "no-kernel"),
        (lambda x: [x], "tensor"),
        (lambda x: x, "batch-norm"),
    ],
)
def test_reasons_of_inputs_that_eager_refuses(change: Callable[[Tensor], Any], code: str) -> None:
    one = block()
    if code == "batch-norm":
        one.bn1.running_var = None
    with nullcontext() if code == "no-kernel" else fastres.use_kernels("reference"):
        reason = guard.blocked(one, change(image()), conv1=one.conv1, bn1=one.bn1)
    assert reason is not None and reasons.code_of(reason) == code


def test_reasons_inside_transforms() -> None:
    one, found = block(), []

    def note(x: Tensor) -> Tensor:
        found.append(reasons.code_of(guard.blocked(one, x) or ""))
        return x

    torch.func.vmap(note)(image()[None])
    with torch.autograd.forward_ad.dual_level():
        note(image())
    torch.jit.trace(note, image())
    assert found[:3] == ["functorch", "forward-ad", "tracing"]


def test_every_code_that_is_used_has_a_meaning() -> None:
    package = Path(fastres.__file__).parent
    sources = (path.read_text() for path in package.rglob("*.py"))
    used = {code for source in sources for code in re.findall(r'because\(\s*"([a-z-]+)"', source)}
    assert used <= set(reasons.CODES) and len(used) > 12
    documented = (package.parent / "docs" / "explain.md").read_text()
    assert not [code for code in reasons.CODES if f"`{code}`" not in documented]


def test_reasons_do_not_break_compiled_graphs() -> None:
    model = block()
    fastres.fuse_(model)
    model.bn1.register_forward_hook(lambda *_: None)
    x = image()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class Two(nn.Module):
    """Modules of fastres.nn, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastres.nn.ConvBnAct2d(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.bn = fastres.nn.BnAct2d(nn.BatchNorm2d(16))
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor, scale: Tensor, times: int = 1) -> Tensor:
        y: Tensor = self.last(self.bn(self.first(x.mul_(scale)))) * times
        return y


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modules_of_ones_own_and_several_inputs(mode: str) -> None:
    x = image(3, size=8)
    before = x.clone()
    report = explain(Two(), mode, (x, torch.tensor(2.0), 3))
    assert torch.equal(x, before)
    assert {row.name for row in report.rows if row.fused} == {"first.conv", "first.bn", "bn.bn"}
    assert [(row.name, row.code) for row in report.lost] == [("last", "no-pattern")]
    assert [b.name for b in report.blocks] == ["first", "bn", "last"]
    assert report.input_shapes == [(3, 3, 8, 8), ()]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_touched(mode: str) -> None:
    model = network()
    fastres.fuse_(model.train(mode == "train"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = image(3, size=32)
    model(x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    versions = {name: t._version for name, t in model.named_buffers()}
    random, hooks = torch.random.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    with pytest.MonkeyPatch.context() as patch:
        from fastres.explain import timing

        patch.setattr(timing, "SECONDS", 0.05)
        fastres.explain(model, x, time=True)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.random.get_rng_state(), random)
    if mode == "eval":  # no write: folded weights stay
        assert {name: t._version for name, t in model.named_buffers()} == versions


class Page(HTMLParser):
    """Counts tags, and checks that all are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe") and not any(n in ("src", "href") for n, _ in attributes)
        self.classes.append(f"{tag}.{dict(attributes).get('class') or ''}")
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_json_and_html(tmp_path: Path) -> None:
    model = network()
    fastres.fuse_(model)
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    report = fastres.explain(model.train(), image(3, size=32))
    found = report.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["operations"], found["fused"]) == (report.total, report.fused)
    assert len(found["rows"]) == report.total and found["rows"][0]["code"] == report.rows[0].code
    assert "hook" in {row["code"] for row in found["rows"]}
    report.to_html(tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.classes.count("tr.op yes") + page.classes.count("tr.op no") == report.total
    assert page.classes.count("tr.op no") == len(report.lost)
    assert "hooks on bn1" in text and reasons.CODES["hook"] in text and "layer1.0 (BasicBlock)" in text
