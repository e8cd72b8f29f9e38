"""What every contender is given: the same model, weights, images and labels, as files that are written once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Task:
    """One table of the benchmark, and where its files lie.

    Attributes:
        model: a name that `fastres.models.create_model` knows, or "package.module:callable" for one's own.
        mode: "infer" (logits under no_grad) or "train" (forward, cross-entropy, backward, SGD with momentum).
        batch: images in one iteration.
        dtype: "float32", or "bfloat16" / "float16": the whole model is cast for inference, autocast is used for
            training (with a GradScaler in float16); "tf32": float32 whose products may be computed in TF32.
        device: "cpu" or "cuda".
        size: height and width of the images.
        threads: threads of every contender.
        folder: has weights.pt, images.npy [N, 3, size, size] float32, labels.npy [N], and what the reference process
            writes.
        exports: in which forms it is to write the model: "onnx", "pnnx" (TorchScript).
    """

    model: str
    mode: str
    batch: int
    dtype: str
    device: str
    size: int
    threads: int
    folder: str
    exports: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.model} {'inference' if self.mode == 'infer' else 'training'}, batch {self.batch}"

    def file(self, name: str) -> Path:
        """Where a file that belongs to this mode and batch lies."""
        return Path(self.folder) / f"{self.mode}{self.batch}_{name}"  # no dash: pnnx would name its files otherwise

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build_model(spec: str) -> nn.Module:
    """An unfused model by its name, or by "package.module:callable", which is called without arguments.

    Raises:
        UserError: if there is no such model.
    """
    from fastres import factory

    return factory.make(spec)[0]


def prepared_model(spec: str, images: torch.Tensor, checkpoint: str | None = None, seed: int = 0) -> nn.Module:
    """A model with weights that make sense: see `prepare_`.

    Raises:
        UserError: if there is no such model or checkpoint, or the model does not take these images.
    """
    import torch

    torch.manual_seed(seed)
    return prepare_(build_model(spec), images, checkpoint)


def prepare_(model: nn.Module, images: torch.Tensor, checkpoint: str | None = None) -> nn.Module:
    """Loads the checkpoint, or without one gives the batch norms the statistics of these images. Returns the model in
    eval mode."""
    from fastres import images as photographs
    from fastres import models

    if checkpoint is not None:
        models.load_checkpoint(model, checkpoint)
    else:
        photographs.calibrate_(model, images)
    return model.eval()


def write_files(model: nn.Module, images: torch.Tensor, folder: str | Path) -> None:
    """Write weights, images and labels into `folder` for the contenders' processes.

    Raises:
        UserError: if the model does not give logits [N, classes] for these images.
    """
    import numpy as np
    import torch

    with torch.no_grad():
        try:
            logits = model(images[:1])
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            raise UserError(f"the model does not take images of {tuple(images.shape[1:])}: {what}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UserError("the model is no classifier: its output is not a tensor [N, classes]")
    folder = Path(folder)
    torch.save(model.state_dict(), folder / "weights.pt")
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "labels.npy", np.arange(len(images)) % logits.shape[1])
