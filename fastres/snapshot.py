"""Whether modules are as they were: the very objects, compared in one pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from fastres.kernels import extension


def unchanged(modules: Iterable[nn.Module], views: Iterable[dict[Any, Any]]) -> Callable[[], bool]:
    """A function that says whether every module still has its type and its `__dict__`, and every dictionary the same
    objects in the same order.

    Args:
        views: the dictionaries, such as the modules' attributes. With more than one entry only plain ones: an
            OrderedDict, which keeps its order elsewhere, never is as it was.
    """
    modules, views = tuple(modules), tuple(views)
    expected = tuple(chain.from_iterable(chain.from_iterable(view.items() for view in views)))
    return partial(_same, modules, tuple(type(m) for m in modules), tuple(m.__dict__ for m in modules), views, expected)


def _same_in_python(modules: Any, kinds: Any, dicts: Any, views: Any, expected: Any) -> bool:
    now = [*chain.from_iterable(chain.from_iterable(view.items() for view in views))]
    return (
        all(type(m) is kind and m.__dict__ is own for m, kind, own in zip(modules, kinds, dicts, strict=True))
        and all(type(view) is dict or len(view) < 2 for view in views)
        and len(now) == len(expected)
        and all(a is b for a, b in zip(now, expected, strict=True))
    )


_compiled = sys.modules["fastres._C"] if extension.available() else None
_same = getattr(_compiled, "same_attributes", _same_in_python)
