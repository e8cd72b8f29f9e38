"""Transfer learning: weights that were trained on one task, put to work on another.

backbone = fastres.transfer.feature_extractor(model)          # images to features: frozen, fused
fastres.transfer.replace_head(model, classes=5)               # a new last layer
fastres.transfer.freeze_until(model, ["layer4", "layer3"])    # train head and last stages; call it in place of train()
groups = fastres.transfer.param_groups(model, ["layer4", "layer3"], lr=0.02)
"""

from fastres.transfer.features import Features, cached, extract
from fastres.transfer.freeze import freeze_until, param_groups
from fastres.transfer.heads import MLP, feature_extractor, head_name, load_backbone, replace_head
from fastres.transfer.options import Options
from fastres.transfer.run import resume, transfer
from fastres.transfer.tuning import FineTuner, train_head

__all__ = [
    "MLP",
    "Features",
    "FineTuner",
    "Options",
    "cached",
    "extract",
    "feature_extractor",
    "freeze_until",
    "head_name",
    "load_backbone",
    "param_groups",
    "replace_head",
    "resume",
    "train_head",
    "transfer",
]
