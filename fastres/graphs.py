"""Inference without the time that launches take: a CUDA graph for each kind of input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

_WARM_UP = 3  # calls before a capture: kernels are compiled, algorithms chosen


def graphed(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that computes model(x), of a tensor to a tensor, without gradients.

    On a CUDA device it replays a graph, captured for the example now and for an input of another shape, dtype, layout
    or device when it first comes. Weights may be written in place; where one lies in other memory, or a module is
    switched between training and evaluation, the graphs are captured anew. On a CPU it calls the model.

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
        self.graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.places: list[int] = []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if any(module.training for module in self.model.modules()):
            raise ValueError("fastres.graphed: the model is in training mode; call model.eval() first")
        if not x.is_cuda:
            return self.model(x)
        places = [t.data_ptr() for t in chain(self.model.parameters(), self.model.buffers())]
        if places != self.places:
            self.graphs.clear()
            self.places = places
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self.graphs:
            self.graphs[key] = self._capture(x)
        graph, source, result = self.graphs[key]
        with torch.cuda.device(x.device):
            source.copy_(x)
            graph.replay()
            return result.clone()

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
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
            return graph, source, result
