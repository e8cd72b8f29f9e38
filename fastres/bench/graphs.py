"""Contenders that only GPUs know: torch.compile with CUDA graphs, TensorRT, and fastres in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import fastres
from fastres.bench.contenders import ChannelsLast, Compile, Fastres

_WARM_UP = 3  # calls before a capture: kernels are compiled and chosen, buffers of the optimizer made


def capture(run: Callable[[], Any], device: str) -> tuple[Callable[[], Any], Any]:
    """A CUDA graph of run(): the function that replays it, and what run() returned, which every replay overwrites.

    On a CPU the function is `run` itself, so that what is built on this can be tried there.
    """
    if device != "cuda":
        return run, run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class Autotune(Compile):
    """With CUDA graphs, which are part of max-autotune."""

    title = "torch.compile max-autotune"
    options = {"mode": "max-autotune"}


class ReduceOverhead(Compile):
    title = "torch.compile reduce-overhead"
    options = {"mode": "reduce-overhead"}


class TensorRt(ChannelsLast):
    title = "TensorRT"
    packages = ("torch_tensorrt",)
    devices = ("cuda",)
    modes = ("infer",)  # type: ignore[assignment]
    dtypes = ("float32", "float16", "bfloat16")

    @classmethod
    def imports(cls) -> None:
        import torch_tensorrt  # noqa: F401

    def prepare(self) -> None:
        super().prepare()
        import torch_tensorrt

        self.call = torch_tensorrt.compile(
            self.model,
            ir="dynamo",
            inputs=[self.images.contiguous(memory_format=self.layout)],
            enabled_precisions={self.dtype},
            min_block_size=1,
        )


class FastresCuda(Fastres):
    """With the CUDA C++ kernels in place of those of Triton."""

    title = "fastres, CUDA C++"
    kernels = ("cuda", "cudnn", "reference")

    def setup(self) -> None:
        with fastres.use_kernels(*self.kernels):
            super().setup()

    def start(self) -> None:
        with fastres.use_kernels(*self.kernels):
            super().start()


class FastresGraphed(Fastres):
    """Inference by fastres.graphed, which copies its input and its result."""

    title = "fastres.graphed"
    modes = ("infer",)  # type: ignore[assignment]

    def prepare(self) -> None:
        super().prepare()
        example = self.images.contiguous(memory_format=self.layout)
        self.call = fastres.graphed(self.model, example)


class FastresGraph(Fastres):
    """Inference, or a whole training step; in fp16 the step of the optimizer stays outside, because a GradScaler asks
    for what the device has computed."""

    title = "fastres, CUDA graph"
    one_mode = True

    def setup(self) -> None:
        self.prepare()
        self.images = self.images.contiguous(memory_format=self.layout)
        if self.task.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.task.mode == "infer":
            self.replay, self.logits = capture(self._infer, self.task.device)
        else:
            self._capture_training()
        if self.task.device == "cuda":
            self.captured_peak = torch.cuda.max_memory_allocated()
        self.start()
        self.synchronize()

    def _infer(self) -> torch.Tensor:
        with torch.no_grad():
            return self.call(self.images)

    def _capture_training(self) -> None:
        """And put everything back to where it was, so that the first replay is the first step."""
        before = copy.deepcopy(self.model.state_dict())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.replay, self.loss = capture(self._train, self.task.device)
        self.model.load_state_dict(before)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def _train(self) -> torch.Tensor:
        # Without gradients at its start, the graph writes new ones at every replay and adds to none.
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward_backward()
        if not self.scaler.is_enabled():
            self.optimizer.step()
        return loss

    def start(self) -> None:
        self.replay()
        if self.task.mode == "train" and self.scaler.is_enabled():
            self.optimize()
