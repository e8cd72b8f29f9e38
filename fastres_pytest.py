"""The pytest plugin of fastres: proofs of parity as tests of your own suite.

    def test_my_model(assert_parity):
        assert_parity(make_model(), images)

and `pytest --fastres-verify` adds a test for each mode of each model that the ini option `fastres_verify` lists. A
module of its own beside the package, because pytest loads it in every run, and fastres imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastres.verify import Certificate

MODES = ("eval", "train")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres")
    group.addoption(
        "--fastres-verify",
        action="store_true",
        help="also verify the models of the ini option fastres_verify: fused and eager against float64",
    )
    parser.addini(
        "fastres_verify",
        "models for --fastres-verify, one a line: package.module:callable, which returns (model, inputs)",
        type="linelist",
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("fastres_verify"):
        models = Models.from_parent(session, name="fastres-verify", nodeid="fastres-verify")
        items.extend(models.collect())


@pytest.fixture
def assert_parity() -> Callable[..., Certificate]:
    """assert_parity(model, inputs, *, mode="eval", dtype=torch.float32, seed=0): an AssertionError with the values
    outside their budget, unless fusing leaves the model's numbers what they are; else the Certificate. Arguments as in
    `fastres.verify`."""

    def check(
        model: nn.Module, inputs: Any, *, mode: str = "eval", dtype: torch.dtype | None = None, seed: int = 0
    ) -> Certificate:
        __tracebackhide__ = True
        import torch

        return _proof(model, inputs, mode=mode, dtype=dtype or torch.float32, seed=seed)

    return check


def _proof(model: nn.Module, inputs: Any, **options: Any) -> Certificate:
    __tracebackhide__ = True
    from fastres.verify import verify

    certificate = verify(model, inputs, **options)
    if not certificate.ok:
        raise AssertionError(certificate.failure())
    return certificate


class Models(pytest.Collector):
    """The models of the ini option."""

    def collect(self) -> Iterator[ModelItem]:
        specs = self.config.getini("fastres_verify")
        if not specs:
            raise pytest.UsageError("--fastres-verify: the ini option fastres_verify lists no model")
        for spec in specs:
            for mode in MODES:
                yield ModelItem.from_parent(self, name=f"{spec}[{mode}]", spec=spec, mode=mode)


class ModelItem(pytest.Item):
    """One model in one mode."""

    def __init__(self, *, spec: str, mode: str, **options: Any) -> None:
        super().__init__(**options)
        self.spec, self.mode = spec, mode

    def runtest(self) -> None:
        import torch

        from fastres import factory
        from fastres.errors import UserError

        torch.manual_seed(0)
        model, inputs = factory.make(self.spec)
        if inputs is None:
            raise UserError(f"{self.spec} returns no inputs: return (model, inputs)")
        _proof(model, inputs, mode=self.mode)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from fastres.errors import UserError

        if isinstance(excinfo.value, (AssertionError, UserError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"fastres verify {self.name}"
