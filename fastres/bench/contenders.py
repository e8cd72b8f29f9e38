"""The contenders that are PyTorch: eager in both layouts, torch.compile, fastres; and the float64 reference.

A contender is built, set up (timed, up to its first result) and stepped (timed) in a process of its own, see worker.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from fastres.bench.task import Task, build_model
from fastres.saved import SavedTensors


class Contender(ABC):
    """One way to run a network.

    Attributes:
        title: its name in tables.
        packages: what must be installed for it.
        devices, modes, dtypes: what it can be measured on.
    """

    title = ""
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = ("infer", "train")
    one_mode = False  # whether it needs a new process for the other mode
    exported_by = ""  # the form of the model that it reads, see Task.exports
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "tf32")
    captured_peak = 0  # bytes of device memory at the peak of a CUDA graph's capture: its replays allocate nothing

    @classmethod
    def why_not(cls, mode: str, dtype: str, device: str) -> str | None:
        """Why it cannot take part, or None. Imports nothing."""
        for package in cls.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if mode not in cls.modes:
            return "inference only"
        if dtype not in cls.dtypes:
            return f"not measured in {dtype}"
        return None if device in cls.devices else f"not measured on {device}"

    @classmethod  # noqa: B027  most need nothing
    def imports(cls) -> None:
        """Import what it needs, so that memory can be counted without libraries."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def setup(self) -> None:
        """Everything from a model in memory to the first result."""

    @abstractmethod
    def step(self) -> None:
        """One iteration, finished when it returns."""

    def timed(self, iterations: int) -> list[float]:
        """Seconds of each of some iterations."""
        samples = []
        for _ in range(iterations):
            start = time.perf_counter()
            self.step()
            samples.append(time.perf_counter() - start)
        return samples

    def after_setup(self) -> dict[str, Any]:
        """What is to be said once it is set up: the error of its first result against float64."""
        return {}


def logits_error(logits: np.ndarray, task: Task) -> dict[str, float]:
    """Relative L2 error of logits against the float64 reference, and the share of images with the same top class."""
    if not task.file("logits.npy").exists():  # the reference process failed
        return {}
    exact = np.load(task.file("logits.npy"))
    wrong = logits.astype(np.float64) - exact
    same = (logits.argmax(1) == exact.argmax(1)).mean()
    return {"error": float(np.linalg.norm(wrong) / np.linalg.norm(exact)), "same_top1": float(same)}


class Eager(Contender):
    title = "eager"
    modes: tuple[str, ...] = ("infer",)  # in training its slower layout would cost a minute and tell nothing
    layout = torch.contiguous_format
    compute_dtype: torch.dtype | None = None  # the task's own

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        folder = task.folder
        self.model = build_model(task.model)
        self.model.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
        if task.dtype == "tf32":
            torch.set_float32_matmul_precision("high")  # convolutions may use it anyway
        dtype = self.compute_dtype or (torch.float32 if task.dtype == "tf32" else getattr(torch, task.dtype))
        self.autocast = task.mode == "train" and dtype in (torch.bfloat16, torch.float16)
        self.autocast_dtype = dtype if self.autocast else None
        # So small that nothing overflows in the first step, whose gradients are compared.
        scaled = self.autocast and dtype is torch.float16
        self.scaler = torch.amp.GradScaler(task.device, init_scale=16.0, enabled=scaled)
        self.dtype = torch.float32 if self.autocast else dtype
        self.model.to(task.device, self.dtype).train(task.mode == "train")
        images = np.load(f"{folder}/images.npy", mmap_mode="r")[: task.batch]
        self.images = torch.from_numpy(np.array(images)).to(task.device, self.dtype)
        self.labels = torch.from_numpy(np.load(f"{folder}/labels.npy")[: task.batch]).to(task.device)
        torch.backends.cudnn.benchmark = True

    def prepare(self) -> None:
        """From the eager model to the form of this contender."""
        self.model = self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.call: Callable[..., Any] = self.model

    def setup(self) -> None:
        self.prepare()
        self.images = self.images.contiguous(memory_format=self.layout)
        if self.task.mode == "infer":
            with torch.no_grad():
                self.logits = self.call(self.images)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
            self.loss = self.train_step()
        self.synchronize()

    def forward_backward(self) -> torch.Tensor:
        """The loss, after its gradients (times the scale of fp16) were computed."""
        with torch.autocast(self.task.device, self.autocast_dtype, enabled=self.autocast):
            loss = nn.functional.cross_entropy(self.call(self.images), self.labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def optimize(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train_step(self) -> torch.Tensor:
        loss = self.forward_backward()
        self.optimize()
        return loss

    def start(self) -> None:
        """One iteration; on a GPU it may still be running."""
        if self.task.mode == "infer":
            with torch.no_grad():
                self.call(self.images)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.train_step()

    def step(self) -> None:
        self.start()
        self.synchronize()

    def timed(self, iterations: int) -> list[float]:
        """On a GPU iterations follow each other without waiting, as in training; its own clock tells their times."""
        if self.task.device != "cuda":
            return super().timed(iterations)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
        events[0].record()
        for event in events[1:]:
            self.start()
            event.record()
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]

    def saved(self) -> dict[str, int]:
        """What one training step keeps for its backward pass: bytes, and the number of storages."""
        with SavedTensors(self.model) as found:
            self.train_step()  # also of a contender whose steps are replays
        return {"bytes": found.bytes, "storages": found.storages}

    def synchronize(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> list[np.ndarray]:
        """The parameters' gradients, which a step leaves behind, as float64 vectors in the order of the parameters."""
        return [p.grad.double().cpu().numpy().ravel() for p in self.model.parameters() if p.grad is not None]

    def after_setup(self) -> dict[str, Any]:
        if self.task.mode == "infer":
            return logits_error(self.logits.double().cpu().numpy(), self.task)
        if not self.task.file("loss.npy").exists():  # the reference process failed
            return {}
        exact = np.load(self.task.file("gradients.npy"), mmap_mode="r")
        wrong = norm = 0.0
        start = 0
        for grad in self.gradients():  # one at a time: together they are larger than the model
            part = exact[start : start + grad.size]
            wrong += float(((grad - part) ** 2).sum())
            norm += float((part**2).sum())
            start += grad.size
        if start != exact.size:
            raise RuntimeError(f"gradients of {start} values, where the reference has {exact.size}")
        exact_loss = float(np.load(self.task.file("loss.npy")))
        return {"error": (wrong / norm) ** 0.5, "loss_error": abs(self.loss.item() - exact_loss) / abs(exact_loss)}


class ChannelsLast(Eager):
    title = "eager channels_last"
    modes = ("infer", "train")
    layout = torch.channels_last


class Compile(ChannelsLast):
    title = "torch.compile"
    one_mode = True  # what it keeps of one mode would count as memory of the other
    options: ClassVar[dict[str, str]] = {}

    def prepare(self) -> None:
        super().prepare()
        if self.task.mode == "infer":
            import torch._inductor.config as inductor

            inductor.freezing = True  # in this process only, which has one mode
        torch._dynamo.reset()
        self.call = torch.compile(self.model, dynamic=False, **self.options)  # type: ignore[call-overload]


class Fastres(ChannelsLast):
    title = "fastres"

    def prepare(self) -> None:
        import fastres

        fastres.fuse_(self.model)
        super().prepare()


class FastresLow(Fastres):
    title = "fastres, memory low"

    def prepare(self) -> None:
        import fastres

        fastres.fuse_(self.model, memory="low", example=self.images.contiguous(memory_format=self.layout))
        super().prepare()


class Reference(Eager):
    """Float64, to compare the others with. Its process also writes the exported forms that other runtimes read."""

    title = "float64"
    modes = ("infer", "train")
    compute_dtype = torch.float64

    def after_setup(self) -> dict[str, Any]:
        task = self.task
        if task.mode == "train":
            np.save(task.file("gradients.npy"), np.concatenate(self.gradients()))
            np.save(task.file("loss.npy"), self.loss.item())
            return {}
        np.save(task.file("logits.npy"), self.logits.cpu().numpy())
        self.model.float()
        found: dict[str, Any] = {}
        for package, export in (("onnx", self.export_onnx), ("pnnx", self.export_torchscript)):
            if package not in task.exports:
                continue
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    export()
            except Exception as error:  # then the runtimes that need it are missing, with this reason
                found[f"{package}_failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            found[f"{package}_seconds"] = time.perf_counter() - start
        return found

    def export_onnx(self) -> None:
        """The eager model as it is; each runtime folds its batch norms by itself."""
        images, path = self.images.float(), os.fspath(self.task.file("model.onnx"))
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        try:
            torch.onnx.export(self.model, (images,), path, dynamo=False, opset_version=17, **names)
        except Exception:  # the newer exporter needs onnxscript and three times as long, but may know more
            torch.onnx.export(self.model, (images,), path, dynamo=True, external_data=False, verbose=False, **names)

    def export_torchscript(self) -> None:
        torch.jit.trace(self.model, self.images[:1].float()).save(os.fspath(self.task.file("model.pt")))
