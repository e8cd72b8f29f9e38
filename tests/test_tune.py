"""tune_: what it decides and leaves alone, the file, and what a decision does to a call."""

import copy
import json
import pickle

import pytest
import torch
from _compare import assert_same, block, image, network, some_kernels, step, watched
from torch import nn

import fastres
from fastres import cli, decisions, replay, switches, tune
from fastres.bench.stats import Timing
from fastres.kernels import extension
from fastres.recipes.residual import FusedModule


@pytest.fixture(autouse=True)
def kernels():
    with some_kernels():
        yield


def fused_network():
    model = network().to(memory_format=torch.channels_last)
    fastres.fuse_(model)
    return model


def images(n=2, size=32):
    return image(3, n=n, size=size)


def timed(monkeypatch, times):
    """Lets a race between original and fused forward end with these seconds, in its order: those of the sites with
    a stem and two blocks, then those of the whole model."""
    found = iter(times)

    def race(steps, *args):
        for run in steps:
            run()
        return [Timing(t, t, t) for t in next(found)]

    monkeypatch.setattr(tune, "_race", race)


def reasons(model, x):
    with watched() as seen, torch.no_grad():
        model(x)
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: reason for module, reason in seen}


FIRST_LOSES = [(2, 1), (1, 2), (2, 1), (5, 4, 3)]  # layer1.0 is slower fused


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_loser_runs_eager(monkeypatch, mode):
    model, x = fused_network().train(mode == "train"), images()
    want = step(copy.deepcopy(model), x, "inference" if mode == "eval" else mode)
    timed(monkeypatch, FIRST_LOSES)
    report = fastres.tune_(model, x)
    assert [(s.name, s.choice) for s in report.sites] == [("", "fused"), ("layer1.0", "eager"), ("layer2.0", "fused")]
    assert report.kept == "tuned" and report.network == {"eager": 5000, "fused": 4000, "tuned": 3000}
    for _ in range(4):  # also where calls were recorded
        with watched() as seen:
            got = step(model, x, "inference" if mode == "eval" else mode)
        assert {m: r for m, r in seen if r} == {model.layer1[0]: switches.TUNED}
        if mode == "eval":
            assert_same(got, want)
    row = next(row for row in fastres.explain(model.train(mode == "train"), x).rows if row.name == "layer1.0.conv1")
    assert row.fused is (mode == "train") or row.reason == switches.TUNED  # explain takes no gradients


@pytest.mark.parametrize(
    ("whole", "kept", "choices"),
    [
        ((5, 4, 3), "tuned", ["fused", "eager", "fused"]),
        ((5, 2, 3), "fused", ["fused"] * 3),
        ((1, 2, 3), "eager", ["eager"] * 3),
    ],
)
def test_the_whole_model_has_the_last_word(monkeypatch, whole, kept, choices):
    model = fused_network().eval()
    timed(monkeypatch, [*FIRST_LOSES[:3], whole])
    report = fastres.tune_(model, images())
    assert report.kept == kept and [s.choice for s in report.sites] == choices
    assert [r is None for r in reasons(model, images()).values()][0] is (choices[0] == "fused")


def test_within_the_spread_nothing_changes(monkeypatch):
    model = fused_network().eval()
    close = [Timing(1.0, 0.9, 1.1), Timing(1.05, 0.95, 1.2)]
    monkeypatch.setattr(tune, "_race", lambda steps, *args: close)
    assert not fastres.tune_(model, images()).eager


@pytest.mark.parametrize("mode", ["eval", "train", None])
def test_nothing_of_the_model_is_touched(mode):
    """With real times: every kind of state is what it was, bit for bit."""
    model, x = fused_network(), images()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    model.layer2[0].bn1.eval()
    model.layer1[0].conv2.weight.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *args: calls.append("model"))
    model(x).sum().backward()
    before = {n: (t, t.clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    grads = {n: None if p.grad is None else (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    flags = {n: (m.training, type(m), dict(m.__dict__)) for n, m in model.named_modules()}
    needs = [p.requires_grad for p in model.parameters()]
    random, image_before = torch.get_rng_state(), x.clone()
    report = fastres.tune_(model, x, mode=mode, seconds=0.01)
    assert len(report.sites) == 3 and all(s.eager_ms > 0 < s.fused_ms for s in report.sites)
    assert {s.mode for s in report.sites} == {mode or "train"}
    after = model.state_dict(keep_vars=True)
    for name, (tensor, values, version) in before.items():
        assert after[name] is tensor and torch.equal(tensor, values) and tensor._version == version, name
    for name, p in model.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or (p.grad is grads[name][0] and torch.equal(p.grad, grads[name][1]))
    assert [p.requires_grad for p in model.parameters()] == needs
    for name, module in model.named_modules():
        assert (module.training, type(module)) == flags[name][:2], name
        assert module.__dict__ == flags[name][2], name
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, image_before)
    assert x.grad is None and not x.requires_grad and calls.count("model") <= 3


def test_decisions_hold_for_their_kind_of_call(monkeypatch):
    model = fused_network().eval()
    timed(monkeypatch, FIRST_LOSES)
    fastres.tune_(model, images())
    assert reasons(model, images())["layer1.0"] == switches.TUNED
    assert reasons(model, images(n=7))["layer1.0"] == switches.TUNED  # the nearest shape that was measured
    with torch.no_grad():
        assert switches.reason(model.layer1[0], image(64, n=2, size=8)) == switches.TUNED
        assert switches.reason(model.layer1[0], image(64, n=2, size=8, order=torch.contiguous_format)) is None
    assert reasons(model.double(), images().double())["layer1.0"] is None
    model.float()
    with watched() as seen:  # gradients are recorded: another kind of call
        model(images())
    assert all(reason is None for _, reason in seen)
    timed(monkeypatch, [(2, 1), (2, 1), (2, 1), (5, 4)])
    fastres.tune_(model, images(n=7))
    assert reasons(model, images(n=6))["layer1.0"] is None  # now 7 images are nearest
    assert reasons(model, images(n=3))["layer1.0"] == switches.TUNED


def test_replays_are_of_one_decision():
    """A decision for a part of a network reaches a network whose calls were recorded."""
    model, x = fused_network().eval(), images()
    with torch.no_grad():
        for _ in range(3):
            want = model(x)
    if extension.available() and fastres.kernels.table.setting() is None:
        assert isinstance(replay._replays[model], replay._Replay)
    kind = switches.Kind("eval", (2, 64, 8, 8), "float32", "channels_last")
    switches.decide(model.layer1[0], kind, switches.Decision(1.0, 2.0, "eager"))
    for _ in range(4):
        calls = []
        hook = model.layer1[0].conv1.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        hook.remove()
        assert calls and not isinstance(replay._replays.get(model), replay._Replay)
    with torch.no_grad():
        for _ in range(4):  # and without the hook
            model(x)
    assert not isinstance(replay._replays.get(model), replay._Replay)


def test_copies_and_unfused_models_are_not_tuned(monkeypatch):
    model = fused_network().eval()
    timed(monkeypatch, FIRST_LOSES)
    fastres.tune_(model, images())
    state = model.state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(reason is None for reason in reasons(other, images()).values())
        assert other.state_dict().keys() == state.keys()
    with fastres.disabled(model):
        assert not reasons(model, images())
    assert reasons(model, images())["layer1.0"] == switches.TUNED  # disabled only pauses
    fastres.fuse_(fastres.unfuse_(model))
    assert all(reason is None for reason in reasons(model, images()).values())


def test_the_file_goes_with_the_model(monkeypatch, tmp_path):
    model, file = fused_network().eval(), tmp_path / "new" / "model.tune.json"
    timed(monkeypatch, FIRST_LOSES)
    fastres.tune_(model, images(), save=file)
    timed(monkeypatch, [(2, 1), (2, 1), (1, 2), (5, 4, 3)])
    fastres.tune_(model, images(), mode="train", save=file)
    found = json.loads(file.read_text())
    assert set(found) == {"format", "versions", "machine", "sites"} and len(found["sites"]) == 6
    assert len(file.read_text().splitlines()) == 6 + 6 + 1  # readable: a line a site
    other = fused_network().eval()
    report = fastres.load_tuning_(other, file)
    assert report.applied and len(report.sites) == 6 and "layer1.0" in str(report)
    assert reasons(other, images()) == reasons(model, images())
    with watched() as seen:
        other.train()(images())
    assert [m for m, reason in seen if reason == switches.TUNED] == [other.layer2[0]]


def saved(tmp_path, change=lambda found: None):
    report = tune.TuneReport(tune._machine("cpu"), decisions.versions())
    report.sites = [decisions.Site("layer1.0", "eval", (2, 64, 8, 8), "float32", "channels_last", 1.0, 2.0, "eager")]
    found = {name: value for name, value in report.to_json().items() if name not in ("network", "kept")}
    change(found)
    (tmp_path / "x.json").write_text(json.dumps(found))
    return tmp_path / "x.json"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("machine", "name"), "another processor"),
        (("machine", "isa"), "sm_90"),
        (("machine", "device"), "cuda"),
        (("versions", "torch"), "2.1.0"),
        (("versions", "fastres"), "0.0.1"),
    ],
)
def test_a_file_of_another_machine_is_not_applied(tmp_path, part, value):
    path = saved(tmp_path, lambda found: found[part[0]].update({part[1]: value}))
    model = fused_network().eval()
    with pytest.warns(UserWarning, match="was not applied"):
        assert not fastres.load_tuning_(model, path).applied
    assert all(reason is None for reason in reasons(model, images()).values())


def test_threads_and_patch_versions_may_differ(tmp_path):
    def change(found):
        found["machine"]["threads"] = 64
        found["versions"]["torch"] = found["versions"]["torch"].split("+")[0] + "+other"

    model = fused_network().eval()
    assert fastres.load_tuning_(model, saved(tmp_path, change)).applied
    assert reasons(model, images())["layer1.0"] == switches.TUNED


BAD = {
    "format": lambda f: f.update(format=2),
    "format is true": lambda f: f.update(format=True),
    "no versions": lambda f: f.pop("versions"),
    "more": lambda f: f.update(code="import os"),
    "sites is an object": lambda f: f.update(sites={}),
    "site is a list": lambda f: f.update(sites=[[]]),
    "name is a number": lambda f: f["sites"][0].update(name=1),
    "long name": lambda f: f["sites"][0].update(name="x" * 1001),
    "mode": lambda f: f["sites"][0].update(mode="infer"),
    "shape of 3": lambda f: f["sites"][0].update(shape=[1, 2, 3]),
    "shape of bool": lambda f: f["sites"][0].update(shape=[True, 2, 3, 4]),
    "shape of 0": lambda f: f["sites"][0].update(shape=[0, 2, 3, 4]),
    "shape of floats": lambda f: f["sites"][0].update(shape=[1.0, 2, 3, 4]),
    "dtype": lambda f: f["sites"][0].update(dtype="int8"),
    "layout": lambda f: f["sites"][0].update(layout=["contiguous"]),
    "time is text": lambda f: f["sites"][0].update(eager_ms="1"),
    "time below 0": lambda f: f["sites"][0].update(fused_ms=-1.0),
    "choice": lambda f: f["sites"][0].update(choice="fastest"),
    "twice": lambda f: f["sites"].append(f["sites"][0]),
    "many": lambda f: f.update(sites=[0] * 10_001),
    "threads": lambda f: f["machine"].update(threads="2"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_files_are_refused(tmp_path, change):
    model, path = fused_network().eval(), saved(tmp_path, change)
    with pytest.raises(ValueError, match=r"x\.json: not a tuning file") as info:
        fastres.load_tuning_(model, path)
    assert len(str(info.value).splitlines()) == 1
    assert not any(switches.decisions(m) for m in model.modules())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"format": NaN}', "[" * 100_000, '{"a": 1, "a": 2}', "\udcff", "9" * 5000],
    ids=["empty", "list", "cut", "null", "nan", "deep", "twice", "bytes", "digits"],
)
def test_what_is_no_such_file_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="not a tuning file"):
        decisions.read(path)


def test_large_missing_and_foreign_files(tmp_path):
    (tmp_path / "large.json").write_bytes(b" " * (decisions.MOST_BYTES + 1))
    with pytest.raises(ValueError, match="more than 4194304 bytes"):
        decisions.read(tmp_path / "large.json")
    with pytest.raises(FileNotFoundError):
        fastres.load_tuning_(fused_network(), tmp_path / "missing.json")
    path = saved(tmp_path, lambda found: found["sites"][0].update(name="layer9.0"))
    for model in (fused_network(), fastres.unfuse_(fused_network())):
        with pytest.raises(ValueError, match=r"'layer9\.0'"):
            fastres.load_tuning_(model, path)


def test_bad_arguments(monkeypatch):
    model, x = fused_network(), images()
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastres.tune_(x, x)
    with pytest.raises(TypeError, match="example"):
        fastres.tune_(model, "x")
    with pytest.raises(ValueError, match="mode"):
        fastres.tune_(model, x, mode="infer")
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            fastres.tune_(model, x, seconds=seconds)
    with pytest.raises(ValueError, match="fuse_ first"):
        fastres.tune_(fastres.unfuse_(fused_network()), x)
    with pytest.raises(ValueError, match="nothing of the model runs fused on this example: hooks on"):
        hooked = fused_network()
        for module in hooked.modules():
            if not isinstance(module, FusedModule):
                module.register_forward_hook(lambda *args: None)
        fastres.tune_(hooked, x, seconds=0.01)
    model.layer1[0].forward = model.layer1[0].forward
    with pytest.raises(ValueError, match="forward of its own"):
        fastres.tune_(model, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        fastres.tune_(fused_network(), x)


def test_not_in_the_capture_of_a_graph(monkeypatch):
    for name in ("is_available", "is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="capture"):
        fastres.tune_(fused_network(), images())


def test_under_compile_the_fused_path_is_traced(monkeypatch):
    one, x = block(kind="BasicBlock").eval(), image()
    fastres.fuse_(one)
    kind = switches.Kind("eval", tuple(x.shape), "float32", "channels_last")
    switches.decide(one, kind, switches.Decision(1.0, 2.0, "eager"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert reasons(one, x)[""] == switches.TUNED
        torch.compile(one, backend=backend, fullgraph=True)(x)
        assert "fastres" in str(graphs[0].graph)
        switches.turn_off(one, "wrong")  # by a canary: under torch.compile too
        torch.compiler.reset()
        torch.compile(one, backend=backend, fullgraph=True)(x)
        assert "fastres" not in str(graphs[1].graph)


def test_command(capsys, tmp_path):
    file, out = tmp_path / "r.json", tmp_path / "out.json"
    command = ("tune", "resnet20", "--batch", "2", "--size", "16", "--seconds", "0.01", "--mode", "eval")
    assert cli.main([*command, "--save", str(file), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("resnet20, eval: 10 sites") and "layer3.2" in printed and "whole model" in printed
    assert len(decisions.read(file).sites) == 10 and json.loads(out.read_text())["eval"]["kept"]
    for bad in (("--batch", "0"), ("--seconds", "0"), ("--dtype", "int8")):
        assert cli.main([*command, *bad]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
