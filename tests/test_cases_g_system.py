"""Cases G4 to G9: graphs, tuning, threads and processes, incomplete installations, memory."""

import copy
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    assert_same_in_threads,
    block,
    buffers,
    image,
    kinds,
    network,
    some_kernels,
    step,
    watched,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.saved import SavedTensors

ROOT = Path(fastres.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


class Names(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@kinds
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_g4_nothing_is_read_back(kind, mode):
    """A step asks no tensor for a value, which would end a graph's capture, with momentum None too."""
    model = torch.nn.Sequential(block(kind=kind, stride=2), block(kind=kind))
    for bn in (model[0].bn1, model[1].bn2):
        bn.momentum = None
    fastres.fuse_(model)
    model.train(mode == "train")
    x = image().requires_grad_()
    with watched() as seen, Names() as names:
        training_step(model, x)
    assert_path(seen, "fast")
    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
    assert not [name for name in names.names if name.rpartition("::")[2].split(".")[0] in forbidden]


def test_g4_warm_up_leaves_statistics():
    """A capture needs steps before it: they are taken back in place, in the memory that the graph will hold."""
    model = network().train()
    fastres.fuse_(model)
    before, held = buffers(model), [b.data_ptr() for b in model.buffers()]
    with fastres.snapshot_statistics(model):
        for _ in range(3):
            step(model, image(3, size=32), "train")
    assert_same(buffers(model), before, 0.0)
    assert [b.data_ptr() for b in model.buffers()] == held


def test_g5_only_the_update_writes():
    """Kernels that are tried out may run any number of times: no op but those for statistics writes an argument, and
    none of theirs is tuned."""
    names = [name[9:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastres::")]
    written = {name for name in names if getattr(torch.ops.fastres, name).default._schema.is_mutable}
    assert written == {"update_running_stats_", "update_all_running_stats_"} and len(names) > 10
    triton = ROOT / "fastres" / "kernels" / "triton"
    tuned = [path.name for path in triton.glob("*.py") if "tuning.choose(" in path.read_text()]
    assert tuned and not [name for name in tuned if "running" in (triton / name).read_text()]


def test_g6_one_model_in_threads():
    eager = network().eval()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    assert_same_in_threads(eager, fused, image(3, size=32))


def test_g6_training_in_threads():
    """Each thread trains a copy of its own, with other threads' forwards in between."""
    model = network()
    fastres.fuse_(model)
    x = image(3, size=32)

    def train(i):
        return [step(copies[i], x, "train") for _ in range(3)][-1]

    copies = [copy.deepcopy(model) for _ in range(4)]
    want = [step(model, x, "train") for _ in range(3)][-1]
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(train, range(4)):
            assert_same(got, want)


def in_child(work, seconds=60):
    """What work() returns, as text, in a forked process; "no answer" if it takes too long."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = str(work())
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], seconds)
    answer = os.read(read, 4000).decode() if ready else "no answer"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    return answer


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_g6_fork(mode):
    """A worker that a process forks after all its threads have computed: with one thread, as DataLoader's workers
    have. With more, OpenMP's are not there, and PyTorch's own convolutions wait for them too."""
    model = network()
    fastres.fuse_(model)
    x = image(3, size=32)
    models = [copy.deepcopy(model) for _ in range(2)]
    want = step(models[0], x, mode)  # with all threads, and buffers that are kept

    def work():
        torch.set_num_threads(1)
        assert_same(step(models[1], x, mode), want)
        return "the same"

    assert in_child(work) == "the same"
    assert_same(step(models[1], x, mode), want)


CHECK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('triton', 'torchvision', 'timm', 'matplotlib', 'rich', 'sklearn', 'PIL'):
            raise ModuleNotFoundError(f'no {name}', name=name)
sys.meta_path.insert(0, Missing())
import torch, fastres
from fastres.kernels import extension
model = fastres.models.resnet20(fused=False).train()
x = torch.randn(2, 3, 16, 16)
torch.manual_seed(0)
want = model(x)
report = fastres.fuse_(model)
got = model(x)
assert torch.allclose(got, want, atol=1e-4), (got - want).abs().max()
got.sum().backward()
assert report.fused > 0
print(extension.load_error())
print(fastres.explain(model, x))
from fastres.cli import main
sys.exit(main(['doctor']))
"""


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    """What that prints in a process that has nothing but PyTorch, and a binary that does not load."""
    place = tmp_path_factory.mktemp("other")
    package = place / "fastres"
    shutil.copytree(ROOT / "fastres", package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    (package / "_C.abi3.so").write_bytes(b"\x7fELF of something else")
    built = {"compiled": True, "error": None, "torch": "1.2.3", "compiler": "c++", "flags": []}
    (package / "_build_info.json").write_text(json.dumps(built))
    env = os.environ | {"PYTHONPATH": str(place), "FASTRES_NO_EXT": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env, cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_g7_nothing_but_torch(incomplete):
    """No Triton, no kernels, no GPU, no other package: all works through PyTorch, and doctor says what is missing."""
    assert "\n0 of" in incomplete and incomplete.count("fastres._C does not load") >= 2
    assert "C++ kernels" in incomplete and "not loaded" in incomplete


def test_g8_binary_of_another_torch(incomplete):
    """It is said once, with both versions, and PyTorch computes."""
    first = incomplete.splitlines()[0]
    assert first.startswith("fastres._C does not load (built for torch 1.2.3, this is") and torch.__version__ in first
    assert incomplete.count("1.2.3") >= 2  # doctor too


class Live(TorchDispatchMode):
    """The storages that operators returned: which of them are alive, and the most bytes that were at one time. Those
    of a model and its input do not count."""

    def __init__(self, model, x):
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())}
        self.storages, self.peak = {}, 0

    def bytes(self):
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(results):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return results


def training_step(model, x):
    """Forward and backward without gradients of parameters left behind; None."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


@kinds
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_g9_memory(kind, mode):
    """A step saves no more for backward than eager's, and its peak is no higher; afterwards nothing is held, without
    the garbage collector's help."""
    saved, peaks = [], []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(block(kind=kind, width=64, stride=2), block(kind=kind, width=64))
        model.train(mode == "train")
        if fuse:
            fastres.fuse_(model)
        x = image(64, n=8, size=16)
        training_step(model, x)
        with SavedTensors(model) as found:
            training_step(model, x)
        gc.collect()
        gc.disable()
        try:
            with Live(model, x) as live:
                training_step(model, x)
            assert live.bytes() == 0
        finally:
            gc.enable()
        saved.append(found.bytes)
        peaks.append(live.peak)
    assert saved[1] <= saved[0] and peaks[1] <= peaks[0], (saved, peaks)


def test_g9_memory_after_errors():
    """Nor does a step that fails hold anything."""
    model = block(stride=2)
    fastres.fuse_(model)
    x = image().requires_grad_()
    with Live(model, x) as live:
        y, failed = model(x), False
        try:
            y.backward(torch.ones(3))
        except RuntimeError:
            failed = True
        del y
    gc.collect()  # of the exception
    assert failed and live.bytes() == 0
