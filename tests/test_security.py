"""No code of the package runs what a file or a string says: checked in its syntax trees. And nothing that loads a file
follows a pipe, unpacks a bomb, or believes what a header says."""

import ast
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import fastres
from fastres import models
from fastres.errors import UserError
from fastres.images import open_image
from fastres.train import checkpoint, cifar, network, run
from fastres.train.options import Options
from fastres.transfer import features

PACKAGE = Path(fastres.__file__).parent
#: Calls that can run what they are given, by what follows the last module's name; with the files that may, and why.
FORBIDDEN = {
    "eval": {},
    "exec": {},
    "compile": {},
    "__import__": {},
    "os.system": {},
    "os.popen": {},
    "pickle.load": {},
    "pickle.loads": {},
    "pickle.Unpickler": {},
    "marshal.loads": {},
    "shelve.open": {},
    "yaml.load": {},
    "joblib.load": {},
    "torch.jit.load": {},
    "torch.package.PackageImporter": {},
    "tar.extractall": {},
    "archive.extractall": {},
    "importlib.import_module": {
        "factory.py": "a model that the user names on the command line, in pytest.ini or in a call",
        "kernels/extension.py": "our own binaries, by constant names",
        "kernels/triton/__init__.py": "our own modules, by constant names",
        "recipes/__init__.py": "our own modules, by constant names",
        "bench/table.py": "the engines to compare with, by constant names",
        "bench/worker.py": "the engines to compare with, by constant names",
        "train/network.py": "--model package.module:callable, which the user has typed (check_named)",
    },
}


def name_of(node):
    """The dotted name of a call's function, as written."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else ["?"]), *reversed(parts)])


def calls():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), node, name_of(node.func)


CALLS = list(calls())


def constant(call, keyword):
    return next((k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)), None)


def test_nothing_runs_what_it_is_given():
    wrong = [
        f"{path}:{call.lineno}: {name}"
        for path, call, name in CALLS
        for forbidden, allowed in FORBIDDEN.items()
        if name == forbidden and path not in allowed
    ]
    assert not wrong


def test_allowed_places_are_there():
    used = {(path, name) for path, _, name in CALLS}
    assert not [path for path in FORBIDDEN["importlib.import_module"] if (path, "importlib.import_module") not in used]


def test_loaders_are_told_to_refuse_code():
    loads = [(path, call, name) for path, call, name in CALLS if name in ("torch.load", "np.load", "numpy.load")]
    assert {path for path, _, name in loads if name == "torch.load"} >= {"models/checkpoint.py", "bench/contenders.py"}
    wrong = [
        f"{p}:{c.lineno}" for p, c, name in loads if name == "torch.load" and constant(c, "weights_only") is not True
    ]
    wrong += [f"{p}:{c.lineno}" for p, c, name in loads if name != "torch.load" and constant(c, "allow_pickle") is True]
    wrong += [f"{path}:{call.lineno}: {name}" for path, call, name in CALLS if constant(call, "shell") is True]
    assert not wrong


def test_pickles_are_read_by_the_unpickler_that_refuses_alone():
    users = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "import pickle" in p.read_text()}
    assert users == {"train/cifar.py"}
    with pytest.raises(Exception, match=r"asks for os\.system"):
        cifar._unpickle(b"cos\nsystem\n(S'true'\ntR.")


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    return path


def test_pipes_are_refused_instead_of_waited_for(pipe):
    model = torch.nn.Linear(1, 1)
    for load in (open_image, checkpoint.load, lambda path: models.load_checkpoint(model, path)):
        with pytest.raises(UserError, match="not a regular file"):
            load(pipe)


def test_other_programs_formats_are_not_opened(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file's name."""
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=r"x\.png: unknown or damaged format"):
        open_image(path)


def test_image_bombs(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))))
    with pytest.raises(UserError, match=r"bomb\.png: .*decompression bomb"):
        open_image(path)


def compressed(source, target):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))


def test_compressed_checkpoints(tmp_path):
    """4 MB of zeros in a few KB."""
    model = torch.nn.Linear(1000, 1000)
    torch.save({"format": 1, **{k: torch.zeros_like(v) for k, v in model.state_dict().items()}}, tmp_path / "plain.pt")
    compressed(tmp_path / "plain.pt", tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match="torch.save does not compress"):
        models.load_checkpoint(model, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="corrupt, or not a checkpoint"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert torch.equal(model.weight, before)


KINDS = {
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_cannot_be_copied_leave_the_model_whole(kind, tmp_path):
    """load_state_dict would copy the others before it raises, or drop an imaginary part."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["1.weight"] = KINDS[kind](state["1.weight"])
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"(of another kind: 1\.weight|cannot load checkpoint)"):
        models.load_checkpoint(model, tmp_path / "x.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_archives_are_bounded_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_MOST_BYTES_IN_ALL", 1 << 20)
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "cifar-10-binary.tar.gz"
    archive(path, [("unrelated", bytes(3 << 20))])
    with pytest.raises(UserError, match=r"more than 1 MB in it"):
        cifar.read(folder, cifar.KINDS["cifar10"])
    outside = tmp_path / "outside"
    archive(path, [("../outside", b"x"), (str(outside), b"x"), ("cifar-10-batches-bin/test_batch.bin", b"x")])
    with pytest.raises(UserError, match="corrupt or incomplete"):
        cifar.read(folder, cifar.KINDS["cifar10"])
    assert [p.name for p in tmp_path.rglob("*")] == ["in", path.name]


def test_pickle_that_asks_for_a_table_of_gigabytes():
    """LONG_BINPUT with the largest index: the unpickler in C makes room for as many."""
    with pytest.raises(Exception, match="holds no dict"):
        cifar._unpickle(b"\x80\x02]r\xff\xff\xff\x7f.")


def test_a_checkpoint_alone_imports_nothing(tmp_path):
    """A run's model may be code of the user's: to resume it, the user names it again."""
    options = Options.of(data="synthetic", model="os:abort", out=str(tmp_path))
    checkpoint.save({"options": vars(options), "progress": {}, "classes": [], "samples": 1}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"asks for code of os:abort.*--model os:abort"):
        run.resume(tmp_path)
    network.check_named("os:abort", {"model": "os:abort"})


@pytest.mark.parametrize(
    "change", [{"batch": "64"}, {"seed": None}, {"nothing": 1}, {"milestones": [1, "2"]}, {"lr": -1.0}]
)
def test_options_of_a_checkpoint_are_checked(change, tmp_path):
    options = vars(Options.of(data="synthetic", out=str(tmp_path))) | change
    checkpoint.save({"options": options}, tmp_path / "last.pt")
    with pytest.raises(UserError):
        run.resume(tmp_path)
    checkpoint.save({"options": [1]}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="damaged"):
        run.resume(tmp_path)


def test_cached_features_are_no_pickles(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, key=np.array("k"), features=np.array([{}], dtype=object), labels=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="corrupt"):
        features._read(path, "k", 1)


def test_our_own_files_hold_no_code():
    """The files of choices that it ships are JSON that passes its check."""
    from fastres.kernels import choices

    for path in choices.FOLDER.glob("*.json"):
        assert choices.read(path) == json.loads(path.read_text())["ops"]
