"""fuse_ on blocks of classes it has never seen, written as other libraries write them: numbers, state, copies."""

import copy
import io
import pickle

import pytest
import torch
from _blocks import BLOCKS, WIDTH, FrozenBatchNorm2d, TimmBasic
from _compare import (
    MODES,
    assert_path,
    assert_same,
    check,
    check_numbers,
    image,
    randomise,
    some_kernels,
    step,
    watched,
)

import fastres
from fastres.recipes import units

blocks = pytest.mark.parametrize("name", BLOCKS)
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def make(name, stride=1):
    torch.manual_seed(3)
    return randomise(BLOCKS[name](stride))


def kinds(report, fused=True):
    return sorted(row.kind for row in report.rows if row.fused is fused)


@blocks
@modes
@pytest.mark.parametrize("stride", [1, 2])
def test_numbers_against_float64(name, mode, stride):
    check_numbers(make(name, stride), image(WIDTH, size=8), mode)


@blocks
def test_everything_is_fused(name):
    report = fastres.fuse_(make(name, 2))
    left = [row for row in report.rows if not row.fused and ".fc2" not in row.name and row.kind != "pool"]
    if name == "preactivation":  # its shortcut and last convolution stand alone
        left = [row for row in left if row.name not in ("shortcut",)]
    assert left == []


@blocks
def test_state_is_untouched_and_given_back(name):
    model = make(name, 2)
    keys, tensors = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    before = [(id(m), type(m), list(m.__dict__), [id(v) for v in m.__dict__.values()]) for m in model.modules()]
    text = repr(model)
    fastres.fuse_(model)
    assert isinstance(model, units.Unit) or any(isinstance(m, units.Unit) for m in model.modules())
    assert repr(model) == text and list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    step(model, image(WIDTH, size=8), "train")
    model.zero_grad()
    fastres.unfuse_(model)
    after = [(id(m), type(m), list(m.__dict__), [id(v) for v in m.__dict__.values()]) for m in model.modules()]
    assert after == before


@blocks
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_fused_and_independent(name, how):
    model = make(name)
    fastres.fuse_(model)
    x = image(WIDTH, size=8)
    step(model, x, "train")
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    want = step(model, x, "inference")
    with watched() as seen:
        assert_same(step(other, x, "inference"), want)
    assert_path(seen, "fast")
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert_same(step(model, x, "inference"), want)


def test_twice_is_once():
    model = make("timm", 2)
    first = fastres.fuse_(model)
    kinds_before = [type(m) for m in model.modules()]
    second = fastres.fuse_(model)
    assert [type(m) for m in model.modules()] == kinds_before and first.rows == second.rows


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_frozen_batch_norm_has_its_own_eps(eps):
    from _blocks import Detectron2Bottleneck

    check_numbers(Detectron2Bottleneck(2, norm=lambda: FrozenBatchNorm2d(eps)), image(WIDTH, size=8), "train")


def test_activations_other_than_relu_are_called():
    from torch import nn

    model = randomise(TimmBasic(act=nn.SiLU))
    report = fastres.fuse_(model)
    assert kinds(report) == ["add", "bn", "bn", "conv", "conv"] and "SiLU" in str(report)
    for mode in MODES:
        check(randomise(TimmBasic(act=nn.SiLU)), image(WIDTH, size=8), mode)
