"""Whatever is in a file: an error in one line, or what was meant; no crash, no hang, and nothing half done.

`python scripts/fuzz.py` looks for longer, with coverage as its guide.
"""

import copy
import io
import json
import string
import struct

import _fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres import config
from fastres.errors import UserError

SETTINGS = settings(
    max_examples=25,
    deadline=30_000,  # milliseconds, of one example: a hang, not slowness
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw, content):
    """A file with some bytes changed, cut out, put in or doubled, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(["flip", "cut", "insert", "double", "truncate", "number"]))
        size = draw(st.integers(1, 64))
        if what == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + size]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size))
        elif what == "double":
            data[at:at] = data[at : at + size]
        elif what == "truncate":
            del data[at:]
        else:  # a length that is much too large
            data[at : at + 4] = struct.pack("<i", draw(st.sampled_from([-1, 2**31 - 1, 2**30, 65535])))
    return bytes(data)


FORMATS = [
    pytest.param(name, marks=pytest.mark.skipif(not target.there(), reason=f"there is no {target.needs}"))
    for name, target in _fuzz.TARGETS.items()
]


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_themselves_are_read(name, tmp_path):
    target = _fuzz.TARGETS[name]
    for content in target.seeds():
        assert target.read(tmp_path, content) is None


@pytest.mark.parametrize("name", FORMATS)
@SETTINGS
@given(data=st.data())
def test_damaged_files(name, data, tmp_path):
    target = _fuzz.TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds()))
    _fuzz.check(target.read(tmp_path, data.draw(damaged(seed))))


@pytest.mark.parametrize("name", FORMATS)
@SETTINGS
@given(content=st.binary(max_size=200))
def test_random_bytes(name, content, tmp_path):
    _fuzz.check(_fuzz.TARGETS[name].read(tmp_path, content))


shapes = st.lists(st.integers(0, 4), max_size=4)
values = st.one_of(
    st.builds(lambda s, d: torch.zeros(s, dtype=d), shapes, st.sampled_from([torch.float32, torch.int8, torch.bool])),
    st.builds(lambda s: torch.full(s, float("nan")), shapes),
    st.builds(lambda: torch.zeros(1).expand(2**20, 2**20)),
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@SETTINGS
@given(
    st.dictionaries(st.sampled_from(["0.weight", "0.bias", "1.weight", "module.0.weight", "x", ""]), values, max_size=5)
)
def test_state_dicts_of_anything(state):
    """Well-formed files with wrong keys, shapes, types, numbers."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _fuzz.check(_fuzz.TARGETS["checkpoint"].read(None, buffer.getvalue()))


def test_nan_is_a_value(tmp_path):
    """Weights of a run that diverged are loaded as they are."""
    model = _fuzz.model()
    state = {
        key: value * float("nan") if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert _fuzz.TARGETS["checkpoint"].read(tmp_path, buffer.getvalue()) is None


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["ops", "bn_act", "kernel", "most_bytes", "channels_last", "cpu", "k", "BLOCK"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["choices", "block sizes"])
@SETTINGS
@given(value=json_values)
def test_json_of_anything(name, value, tmp_path):
    _fuzz.check(_fuzz.TARGETS[name].read(tmp_path, json.dumps(value).encode()))


@pytest.mark.parametrize("name", ["choices", "block sizes"])
def test_deep_json(name, tmp_path):
    assert isinstance(_fuzz.TARGETS[name].read(tmp_path, b"[" * 100_000), UserError)
    assert isinstance(_fuzz.TARGETS[name].read(tmp_path, b'{"ops": ' * 100_000), UserError)


@SETTINGS
@given(
    field=st.sampled_from(["options", "progress", "classes", "samples", "model", "optimizer", "ema"]),
    value=st.one_of(json_values, values),
)
def test_state_of_a_run_with_a_field_of_anything(field, value):
    """The trainer takes the whole state or nothing of it."""
    trainer, state = _fuzz.run()
    before = copy.deepcopy(trainer.model.state_dict())
    state = {**state, field: value}
    try:
        trainer.load_state(state)
    except UserError:
        assert all(torch.equal(t, before[key]) for key, t in trainer.model.state_dict().items())
        assert trainer.progress.step == 0


def test_choices_are_compared_with_what_works(tmp_path, monkeypatch):
    """A file that is well-formed, with a block size that no kernel has."""
    from fastres.kernels.triton import tuning

    path = tmp_path / "x.json"
    path.write_text(json.dumps({"cpu": {"k": {"BLOCK": 7}}}))
    monkeypatch.setattr(config, "triton_choices", str(path))
    with pytest.raises(UserError, match="is none of"):
        tuning.choose(lambda: "k", torch.device("cpu"), {"BLOCK": 8}, lambda: [{"BLOCK": 8}])


@SETTINGS
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM"]),
)
def test_images_of_every_mode(mode, size, kind):
    from PIL import Image

    buffer = io.BytesIO()
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, ValueError):
        return  # the format has no such mode
    found = _fuzz.TARGETS["image"].read(None, buffer.getvalue())
    assert found is None or "more than 8 bits" in str(found)


def test_labels_out_of_range_are_no_classes(tmp_path):
    content = bytearray(_fuzz.cifar_record(3))
    content[0] = 200
    assert "label is not in 0..9" in str(_fuzz.read_records(tmp_path, bytes(content)))
