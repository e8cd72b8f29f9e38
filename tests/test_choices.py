"""Measured choices of kernels: files that are read, rules that fit, and the table's order without them."""

import json

import pytest
import torch

from fastres.kernels import choices, table
from fastres.testing import LAYOUTS

RULES = [{"kernel": "cuda", "channels_last": True, "most_bytes": 4096}, {"kernel": "reference", "most_bytes": 100}]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def on_gpu(*shape, order="contiguous"):
    return torch.empty(shape).contiguous(memory_format=LAYOUTS[order]).as_subclass(OnGpu)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """RULES for bn_act on sm_90, and a device of that architecture."""
    (tmp_path / "sm_90.json").write_text(json.dumps({"measured": {}, "ops": {"bn_act": RULES}}))
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    choices.rules.cache_clear()
    yield
    choices.rules.cache_clear()


def test_first_rule_that_fits(measured):
    assert choices.preferred("bn_act", on_gpu(2, 8, 4, 4, order="channels_last")) == "cuda"
    assert choices.preferred("bn_act", on_gpu(2, 8, 4, 4)) is None
    assert choices.preferred("bn_act", on_gpu(1, 2, 2, 2)) == "reference"
    assert choices.preferred("bn_act", on_gpu(2, 64, 8, 8, order="channels_last")) is None  # too large
    assert choices.preferred("add_act", on_gpu(2, 8, 4, 4, order="channels_last")) is None
    assert choices.preferred("bn_act", torch.empty(2, 8, 4, 4)) is None


def names(op, x):
    return [kernel.name for kernel in table.candidates(op, (x,))]


def test_order_of_the_table(measured):
    small, other = on_gpu(2, 8, 4, 4, order="channels_last"), on_gpu(2, 8, 4, 4)
    assert names("bn_act", small) == ["cuda", "triton", "cuda_persistent", "reference"]
    assert names("bn_act", other) == ["triton", "cuda", "cuda_persistent", "reference"]
    with table.use_kernels("triton", "reference"):
        assert names("bn_act", small) == ["triton", "reference"]
    with table.use_kernels("cuda_persistent", "cuda"):  # in the order in which they are named
        assert names("bn_act", small) == ["cuda_persistent", "cuda"]


def test_other_architectures_have_no_rules(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert choices.preferred("bn_act", on_gpu(2, 8, 4, 4, order="channels_last")) is None


def test_committed_files_name_kernels_that_exist():
    known = {kernel.name for row in table.TABLE.values() for kernel in row}
    for path in choices.FOLDER.glob("*.json"):
        for op, found in json.loads(path.read_text())["ops"].items():
            assert op in table.OPS and {rule["kernel"] for rule in found} <= known
            assert all(set(rule) <= {"kernel", "channels_last", "most_bytes"} for rule in found)
