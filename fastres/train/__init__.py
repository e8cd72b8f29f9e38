"""Training of residual networks: `fastres train`, as functions.

from fastres.train import Options, train
progress = train(Options.of(data="digits", model="resnet20", epochs=5))
"""

from fastres.train.loop import Progress, Stopped, Trainer
from fastres.train.options import Options
from fastres.train.run import resume, train

__all__ = ["Options", "Progress", "Stopped", "Trainer", "resume", "train"]
