"""Inference without the time that launches take: a CUDA graph for each kind of input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from fastres import folding
from fastres.kernels.table import PackedConvolution

_WARM_UP = 3  # calls before a capture: kernels are compiled, algorithms chosen, weights folded
#: The graph, its input, its output, and folded weights that it reads: their memory must not be used again.
_Graph = tuple[torch.cuda.CUDAGraph, Tensor, Tensor, list[PackedConvolution]]


def graphed(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that computes model(x), of a tensor to a tensor, without gradients.

    On a CUDA device it replays a graph, captured for the example now and for an input of another shape, dtype, layout
    or device when it first comes. Where a weight was written or lies in other memory, the graphs are captured anew; a
    write behind autograd's back (`.data`) goes unnoticed. On a CPU it calls the model.

    Args:
        model: in evaluation mode: a graph would repeat a training step's updates.
        example: an input.

    Raises:
        ValueError: if a module of the model is in training mode, also at a later call.
    """
    found = _Graphed(model)
    found(example)
    return found


class _Graphed:
    def __init__(self, model: nn.Module):
        self.model = model
        self.graphs: dict[tuple[object, ...], _Graph] = {}
        self.weights: list[object] = []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if any(module.training for module in self.model.modules()):
            raise ValueError("fastres.graphed: the model is in training mode; call model.eval() first")
        if not x.is_cuda:
            return self.model(x)
        tensors = chain(self.model.parameters(), self.model.buffers())
        weights: list[object] = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
        if weights != self.weights:
            self.graphs.clear()
            self.weights = weights
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self.graphs:
            self.graphs[key] = self._capture(x)
        graph, source, result, _ = self.graphs[key]
        with torch.cuda.device(x.device):
            source.copy_(x)
            graph.replay()
            return result.clone()

    def _capture(self, x: Tensor) -> _Graph:
        with torch.cuda.device(x.device):
            source = x.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self.model(source)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.model(source)
            return graph, source, result, folding.kept(self.model)
