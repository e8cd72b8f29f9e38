"""How the named models are made: a function for each line of the tables in resnet.py and cifar.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def constructor(
    name: str,
    parameters: int,
    network: type[Network],
    block: type[nn.Module],
    layers: Sequence[int],
    classes: int,
    **fixed: Any,
) -> Callable[..., Network]:
    """A function `name(num_classes=classes, *, fused=True, **options)` that makes the network with random weights.

    Args:
        parameters: how many it has, for its documentation.
        network: its class. block, layers, fixed: arguments of that class that make it this model.
    """

    def make(num_classes: int = classes, *, fused: bool = True, **options: Any) -> Network:
        model = network(block, layers, num_classes, **fixed, **options)
        if fused:
            from fastres.fuse import fuse_  # here, because its recipes import the models

            fuse_(model)
        return model

    given = "".join(f", {option}={value}" for option, value in fixed.items())
    make.__name__ = make.__qualname__ = name
    make.__module__ = network.__module__
    make.__doc__ = (
        f"{network.__name__} of {', '.join(map(str, layers))} {block.__name__}s{given}: {parameters:,} parameters.\n\n"
        f"fused: call `fastres.fuse_` on it. options: as in `{network.__name__}`."
    )
    return make
