"""Models by name, or by "package.module:callable", with inputs of their own if the callable gives some."""

from __future__ import annotations

import importlib
import sys
from functools import reduce
from typing import Any

from torch import Tensor, nn

from fastres import models
from fastres.errors import UserError


def make(spec: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The unfused model that `spec` names, and its positional inputs, None if it comes without.

    Args:
        spec: a name that `fastres.models.create_model` knows, or "package.module:callable", also from the current
            folder. It is called without arguments, and returns a module, or (module, input) or (module, tuple of
            inputs).

    Raises:
        UserError: if there is no such model; the message says what was wrong with which part.
    """
    if ":" not in spec:
        return models.create_model(spec, fused=False), None
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, which the `fastres` script has not
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"no model {spec}: importing {module}: {type(error).__name__}: {error}") from error
    try:
        made = reduce(getattr, name.split("."), imported)()  # type: ignore[operator]
    except Exception as error:
        raise UserError(f"no model {spec}: {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec}() gave a {type(model).__name__}, not an nn.Module or (module, inputs)")
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise UserError(f"{spec}() gave inputs of type {type(inputs).__name__}, not a tensor or a tuple")
    return model, None if inputs is None else tuple(inputs)
