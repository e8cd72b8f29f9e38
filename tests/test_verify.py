"""fastres.verify: right models pass in every mode and dtype, seeded faults are found, nothing is touched."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _compare import network, randomise, some_kernels
from torch import Tensor, nn

import fastres
from fastres import batch_norm, functional, sites
from fastres.errors import UserError
from fastres.fuse import FusedModule
from fastres.kernels import extension
from fastres.testing import WINOGRAD
from fastres.verify import kinks, verify
from fastres.verify.certificate import MODEL, Certificate, Row
from fastres.verify.run import Call

#: Float32 budget of a site at least: where Winograd convolutions may serve, and a few roundings where not.
SITE_FLOOR = WINOGRAD if extension.available() else 2**-20
SITES = ["stem", "layer1.0", "layer2.0", "layer2.0.downsample"]


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    with some_kernels():
        yield


def images(n: int = 4, size: int = 32) -> Tensor:
    """Smooth random images: noise averaged over 5x5 pixels."""
    return nn.functional.avg_pool2d(torch.randn(n, 3, size + 4, size + 4), 5, 1) * 5


def failing_sites(certificate: Certificate) -> set[str]:
    return {row.site for row in certificate.failures}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_right_model_passes(mode: str, dtype: torch.dtype) -> None:
    certificate = verify(network(), images(), mode=mode, dtype=dtype)
    assert certificate.ok, str(certificate)
    assert [site.name for site in certificate.sites] == SITES
    assert certificate.fused_sites == len(SITES)
    assert {row.site for row in certificate.rows} == {MODEL, *SITES}
    of_block = {(row.kind, row.tensor) for row in certificate.rows if row.site == "layer2.0"}
    assert of_block >= {
        ("output", "output"),
        ("input gradient", "input"),
        *(("gradient", f"{name}.weight") for name in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")),
        *(("buffer", f"bn1.{name}") for name in ("running_mean", "running_var")),
        ("counter", "bn1.num_batches_tracked"),
    }
    of_model = {row.kind for row in certificate.rows if row.site == MODEL}
    gradients = {"gradient", "input gradient"} if mode == "train" else {"top-1"}
    assert of_model == {"output", "buffer", "counter"} | gradients


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fp32_gradients_are_compared_to_rounding_error(mode: str) -> None:
    rows = verify(network(), images(), mode=mode).rows
    gradients = [row for row in rows if row.site != MODEL and "gradient" in row.kind]
    assert max(row.eager_error for row in gradients) < 1e-5


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_budgets(mode: str) -> None:
    rows = verify(network(), images(), mode=mode).rows
    for row in rows:
        if row.kind in ("counter", "top-1") or (row.kind == "buffer" and mode == "eval"):
            assert row.budget == 0
        elif row.site != MODEL:
            floor = 2**-22 if row.kind == "buffer" else SITE_FLOOR
            assert row.budget == max(2 * row.eager_error, floor)
    (output,) = (row for row in rows if (row.site, row.kind) == (MODEL, "output"))
    assert output.budget == (1e-5 if mode == "eval" else max(2 * output.eager_error, SITE_FLOOR))


def test_a_fused_channels_last_model_passes() -> None:
    model = network()
    fastres.fuse_(model)
    certificate = verify(model, images().contiguous(memory_format=torch.channels_last), mode="train")
    assert certificate.ok, str(certificate)
    assert certificate.fused_sites == len(SITES)


def test_torchvision_passes(torchvision: ModuleType) -> None:
    certificate = verify(network("torchvision"), images(), mode="train")
    assert certificate.ok, str(certificate)
    assert certificate.fused_sites == len(SITES)


class Own(nn.Module):
    """A network of fastres.nn's modules, with a bias before batch norm, dropout and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastres.nn.ConvBnAct2d(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.second = fastres.nn.ConvBnAct2d(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.bn = fastres.nn.BnAct2d(nn.BatchNorm2d(16))
        self.add = fastres.nn.AddAct()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x)
        z = self.add(self.bn(y), self.second(y, residual=y))
        return {"maps": [y, z], "logits": self.dropout(z.mean((2, 3)))}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modules_of_ones_own_pass(mode: str) -> None:
    certificate = verify(randomise(Own()), images(size=16), mode=mode)
    assert certificate.ok, str(certificate)
    assert {site.name for site in certificate.sites} == {"first", "second", "bn", "add"}
    assert certificate.fused_sites == 4
    outputs = {row.tensor for row in certificate.rows if (row.site, row.kind) == (MODEL, "output")}
    assert outputs == {"output.maps.0", "output.maps.1", "output.logits"}
    second = {row.tensor for row in certificate.rows if (row.site, row.kind) == ("second", "input gradient")}
    assert second == {"input", "residual"}


def wrong_in_layer2(result: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A fused convolution that changes the result of layer2.0's second one."""
    right = sites.conv_bn_act

    def wrong(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, **options: Any) -> Tensor:
        y = right(conv, bn, x, **options)
        return result(y) if (conv.in_channels, conv.out_channels) == (128, 128) else y

    return wrong


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_output_is_found(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1e-3 if dtype is torch.float32 else 3e-2
    monkeypatch.setattr(sites, "conv_bn_act", wrong_in_layer2(lambda y: y * (1 + size)))
    certificate = verify(network(), images(), mode=mode, dtype=dtype)
    assert not certificate.ok
    assert failing_sites(certificate) - {MODEL} == {"layer2.0"}
    assert any((row.site, row.kind) == ("layer2.0", "output") for row in certificate.failures)
    assert certificate.first == "layer2.0" and "first at layer2.0" in certificate.verdict()
    assert "FAIL" in str(certificate) and "layer2.0" in str(certificate)


def test_one_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(y: Tensor) -> Tensor:
        return y.index_fill(0, torch.tensor([1]), 0.0) if y.shape[0] > 1 else y

    monkeypatch.setattr(sites, "conv_bn_act", wrong_in_layer2(spoil))
    assert "layer2.0" in failing_sites(verify(network(), images()))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_wrong_gradient_of_one_parameter_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.conv_bn_act

    def wrong(
        x: Tensor, conv_weight: Tensor, mean: Any, var: Any, weight: Tensor, bias: Tensor, *more: Any, **options: Any
    ) -> Tensor:
        bias = bias + 1e-3 * (bias - bias.detach())  # the same value, a gradient 1e-3 too large
        return right(x, conv_weight, mean, var, weight, bias, *more, **options)

    monkeypatch.setattr(functional, "conv_bn_act", wrong)
    certificate = verify(network(), images(), mode=mode)
    assert not certificate.ok
    of_block = {row.label for row in certificate.failures if row.site == "layer2.0"}
    assert of_block == {"bn1.bias.grad", "bn2.bias.grad", "downsample.1.bias.grad"}


def test_a_biased_running_variance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.ops.update_running_stats.op
    monkeypatch.setattr(functional.ops.update_running_stats, "op", lambda *args: right(*args[:-1], 1 << 50))
    certificate = verify(network(), images(), mode="train")
    assert failing_sites(certificate) == {MODEL, *SITES}
    assert {row.tensor.rpartition(".")[2] for row in certificate.failures} == {"running_var"}


def test_a_counter_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch_norm.options

    def wrong(bn: nn.BatchNorm2d) -> Any:
        found = right(bn)
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked -= 1
        return found

    monkeypatch.setattr(batch_norm, "options", wrong)
    certificate = verify(network(), images(), mode="train")
    assert failing_sites(certificate) == {MODEL, *SITES}
    assert {row.kind for row in certificate.failures} == {"counter"}


def test_statistics_that_change_in_eval_mode_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch_norm.running

    def wrong(bn: nn.BatchNorm2d) -> Any:
        bn.running_mean += 1e-6  # type: ignore[operator]
        return right(bn)

    monkeypatch.setattr(batch_norm, "running", wrong)
    assert {row.kind for row in verify(network(), images()).failures} >= {"buffer"}


def test_a_missing_gradient_and_another_dtype_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "conv_bn_act", wrong_in_layer2(lambda y: y.detach()))
    certificate = verify(network(), images(), mode="train")
    assert any("layer2.0: conv2.weight (gradient): fused gives None" in problem for problem in certificate.problems)
    monkeypatch.undo()
    monkeypatch.setattr(sites, "conv_bn_act", wrong_in_layer2(Tensor.double))
    assert not verify(network(), images()).ok


def test_a_fused_model_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(y: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(sites, "conv_bn_act", wrong_in_layer2(broken))
    certificate = verify(network(), images())
    assert not certificate.ok
    assert any("the fused model raised RuntimeError: no such kernel" in problem for problem in certificate.problems)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a run could change in a model."""
    return {
        "state": {name: (t.clone(), t._version, t.dtype) for name, t in model.state_dict(keep_vars=True).items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modules": [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_nothing_is_touched(mode: str, fused: bool) -> None:
    model, x = network(), images().requires_grad_()
    if fused:
        fastres.fuse_(model)
    model.train(mode == "eval")
    model.layer1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad is not None
    before, image, gradient, version = everything(model), x.detach().clone(), x.grad.clone(), x._version
    random = torch.random.get_rng_state()
    with torch.no_grad():
        assert verify(model, x, mode=mode).ok
    after = everything(model)
    assert after["modules"] == before["modules"]
    for name, (value, old, dtype) in before["state"].items():
        now = after["state"][name]
        assert torch.equal(now[0], value) and now[1:] == (old, dtype), name
    for name, value in before["grads"].items():
        now = after["grads"][name]
        assert now is value is None or torch.equal(now, value), name
    assert torch.equal(x, image) and torch.equal(x.grad, gradient) and x._version == version
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not nn.modules.module._global_forward_pre_hooks
    assert any(isinstance(m, FusedModule) for m in model.modules()) == fused


def test_the_same_seed_gives_the_same_certificate() -> None:
    model, x = network(), images()
    first = verify(model, x, mode="train")
    torch.manual_seed(99)
    second = verify(copy.deepcopy(model), x.clone(), mode="train")
    assert first.rows == second.rows
    assert first.rows != verify(model, x, mode="train", seed=1).rows


def test_inside_no_grad_inference_mode_and_autocast() -> None:
    model, x = network(), images()
    expected = verify(model, x, mode="train").rows
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify(model, x + 0.0, mode="train").rows == expected


def test_nothing_fused_is_no_proof() -> None:
    certificate = verify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), images())
    assert not certificate.ok
    assert all(row.ok for row in certificate.rows)
    assert "nothing ran fused (inside Sequential: SiLU" in certificate.verdict()


def test_sites_that_did_not_run_fused_are_named() -> None:
    model = network()
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    certificate = verify(model, images(), mode="train")
    assert certificate.ok
    assert {site.name: site.reason for site in certificate.sites if not site.fused} == {"layer1.0": "hooks on bn1"}
    assert "3 of 4 sites ran fused, not:\n  layer1.0: hooks on bn1" in str(certificate)


def test_json_round_trip(tmp_path: Path) -> None:
    certificate = verify(network(), images(), mode="eval")
    found = certificate.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["ok"] is True and found["verdict"].startswith("PASS")
    assert found["input_shape"] == [4, 3, 32, 32] and (found["mode"], found["dtype"]) == ("eval", "float32")
    assert set(found["versions"]) == {"python", "torch", "fastres"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["cpu"]
    assert len(found["rows"]) == len(certificate.rows)
    assert set(found["rows"][0]) == {"site", "kind", "tensor", "eager_error", "fused_error", "budget", "ok"}
    certificate.save(tmp_path / "new" / "certificate.json")
    assert json.loads((tmp_path / "new" / "certificate.json").read_text()) == found


def test_errors_that_are_not_finite_fail_and_stay_valid_json() -> None:
    for error in (math.inf, math.nan):
        row = Row("layer1.0", "output", "output", 1e-7, error, 2e-7)
        certificate = Certificate("Net", "eval", "float32", "cpu", (1, 3, 8, 8), 0, rows=[row])
        assert not certificate.ok
        assert row.share == math.inf
        assert json.loads(json.dumps(certificate.to_json(), allow_nan=False))["rows"][0]["fused_error"] == str(error)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("resnet18", torch.zeros(1, 3, 8, 8)), {}, TypeError, "takes an nn.Module, got str"),
        ((nn.ReLU(), [1.0]), {}, TypeError, "floating-point input tensor, got list"),
        ((nn.ReLU(), torch.zeros(1, dtype=torch.int)), {}, TypeError, "got torch.int32"),
        ((nn.ReLU(), torch.zeros(1)), {"mode": "both"}, ValueError, 'mode must be "eval" or "train"'),
        ((nn.ReLU(), torch.zeros(1)), {"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ((nn.Conv2d(3, 4, 1), torch.zeros(1, 2, 8, 8)), {}, UserError, "does not run on this input: RuntimeError"),
    ],
)
def test_bad_input(arguments: tuple[Any, Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(*arguments, **options)


def test_inputs_are_moved_off_the_kinks() -> None:
    block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).double().train()
    x = torch.randn(2, 4, 12, 12)
    x[1, :, 6:9, 6:9] = x.amax()  # the largest values of a window are the same
    x[0, 1, 3, 3] = 0.0
    x[0, 1, 3, 3] = x[:, 1].sum() / (x[:, 1].numel() - 1) + 1e-8  # the mean, about: normalised to about 0
    moved, left = kinks.avoid(block, Call((x,), {}), seed=0)
    assert left == 0
    changed = (moved.args[0] != x).any(1)
    assert bool(changed[0, 3, 3]) and bool(changed[1, 6:9, 6:9].any())
    assert int(changed.sum()) < 20
    torch.testing.assert_close(moved.args[0], x, rtol=0, atol=0.1)


def test_top1_does_not_count_ties() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = fastres.nn.BnAct2d(nn.BatchNorm2d(2), act="identity")

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).flatten(1)

    x = torch.tensor([[1.0, 1.0 + 2**-23], [2.0, 1.0]]).reshape(2, 2, 1, 1)
    (row,) = (row for row in verify(Logits(), x).rows if row.kind == "top-1")
    assert (row.eager_error, row.fused_error, row.budget) == (0, 0, 0)
