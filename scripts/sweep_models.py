"""The models of the sweep: everything with convolutions and batch norms that timm, torchvision, Hugging Face and
segmentation_models_pytorch build without a download, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sweep_hugging_face
from torch import nn

#: Modules of timm.models: ResNets and their kin, other networks of convolutions and batch norms, hybrids with
#: attention, and one without any batch norm.
TIMM = (
    *("resnet", "resnetv2", "regnet", "res2net", "resnest", "sknet", "senet", "byobnet", "byoanet"),
    *("vovnet", "dla", "densenet", "dpn", "hrnet", "cspnet", "cspnext", "selecsls", "tresnet", "rdnet", "vgg"),
    *("inception_v3", "inception_v4", "inception_resnet_v2", "xception", "xception_aligned", "nasnet", "pnasnet"),
    *("mobilenetv3", "ghostnet", "repghost", "repvit", "lcnetv2", "hardcorenas", "rexnet", "hgnet", "fasternet"),
    *("starnet", "shvit", "convmixer", "efficientnet"),
    *("vision_transformer_hybrid", "levit", "mobilevit", "efficientformer", "efficientformer_v2", "efficientvit_mit"),
    *("efficientvit_msra", "tiny_vit", "fastvit", "nextvit", "visformer", "edgenext", "swiftformer", "lowformer"),
    *("cpubone", "efficientvim", "coat", "maxxvit", "nfnet"),
)
#: Options of timm's models that its names do not cover: blocks that are dropped, layers that are replaced.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18, drop_path 0.2": ("resnet18", {"drop_path_rate": 0.2}),
    "resnet26d, drop_path 0.2": ("resnet26d", {"drop_path_rate": 0.2}),
    "resnetv2_18, drop_path 0.2": ("resnetv2_18", {"drop_path_rate": 0.2}),
    "regnetx_002, drop_path 0.2": ("regnetx_002", {"drop_path_rate": 0.2}),
    "resnet18, drop_block 0.1": ("resnet18", {"drop_block_rate": 0.1}),
    "resnet18, output stride 8": ("resnet18", {"output_stride": 8}),
    "resnet26, output stride 16": ("resnet26", {"output_stride": 16}),
    "resnet18, features": ("resnet18", {"features_only": True}),
    "regnetx_002, features": ("regnetx_002", {"features_only": True}),
    "resnet18, leaky_relu": ("resnet18", {"act_layer": "leaky_relu"}),
    "resnet18, silu": ("resnet18", {"act_layer": "silu"}),
    "resnet26, gelu": ("resnet26", {"act_layer": "gelu"}),
    "resnet18, groupnorm": ("resnet18", {"norm_layer": "groupnorm"}),
}


@dataclass(frozen=True)
class Model:
    """One model of the sweep.

    Attributes:
        library: "timm", "torchvision", "transformers" or "smp". name: within the library.
        build: returns it, with random weights.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]

    @property
    def key(self) -> str:
        return f"{self.library} {self.name}"


def all_models(libraries: tuple[str, ...]) -> list[Model]:
    """The models of these libraries."""
    return [model for library in libraries for model in LIBRARIES[library]()]


# ---------------------------------------------------------------------------------------------------------------- timm


def _timm() -> list[Model]:
    import timm

    found = [(name, (name, {})) for module in TIMM for name in timm.list_models(module=module)]
    models = [Model("timm", name, functools.partial(_build_timm, *what)) for name, what in [*found, *VARIANTS.items()]]
    return [*models, Model("timm", "resnet26, frozen batch norms", _frozen_timm)]


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    classes = {} if "features_only" in options else {"num_classes": 10}
    return timm.create_model(name, pretrained=False, **classes, **options)


def _frozen_timm() -> nn.Module:
    from timm.utils import freeze

    model = _build_timm("resnet26", {})
    freeze(model, ["layer1", "layer2"])
    return model


# --------------------------------------------------------------------------------------------------------- torchvision


def _torchvision() -> list[Model]:
    from torchvision import models

    tasks = {"classification": [], "quantized": [], "segmentation": [], "detection": [], "video": []}
    for name in models.list_models():
        if name.startswith("quantized_"):
            tasks["quantized"].append(name)
        elif hasattr(models.segmentation, name):
            tasks["segmentation"].append(name)
        elif hasattr(models.detection, name):
            tasks["detection"].append(name)
        elif hasattr(models.video, name) or hasattr(models.optical_flow, name):
            tasks["video"].append(name)
        else:
            tasks["classification"].append(name)
    left_out = ("vit_", "swin", "maxvit")  # no batch norm, or too large for small images
    plain = [name for name in tasks["classification"] + tasks["quantized"] if not name.startswith(left_out)]
    found = [Model("torchvision", name, functools.partial(_build_torchvision, name)) for name in plain]
    found += [Model("torchvision", name, functools.partial(_segmentation, name)) for name in tasks["segmentation"]]
    return found + [
        Model("torchvision", f"{name}, backbone", functools.partial(_backbone, name)) for name in tasks["detection"]
    ]


def _build_torchvision(name: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    return models.get_model(name, weights=None, num_classes=10, **options)


def _segmentation(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def _backbone(name: str) -> nn.Module:
    """The part of a detector that is convolutions; what follows (boxes, suppression) jumps with rounding errors. Built
    as people do who fine-tune: with frozen batch norms where there would be weights."""
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    if name.endswith("resnet50_fpn") and "retinanet" not in name and "fcos" not in name:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        return resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    return models.get_model(name, weights=None, weights_backbone=None).backbone


# ------------------------------------------------------------------------------------------------------------------ smp


def _smp() -> list[Model]:
    import segmentation_models_pytorch as smp

    decoders = (
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    )
    found = [
        Model("smp", f"Unet, {e}", functools.partial(_build_smp, "Unet", e)) for e in smp.encoders.get_encoder_names()
    ]
    return found + [Model("smp", f"{d}, resnet18", functools.partial(_build_smp, d, "resnet18")) for d in decoders]


def _build_smp(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=3)


# -------------------------------------------------------------------------------------------------------- transformers


def _transformers() -> list[Model]:
    import transformers

    transformers.logging.set_verbosity_error()
    return [Model("transformers", name, build) for name, build in sweep_hugging_face.models().items()]


LIBRARIES: dict[str, Callable[[], list[Model]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "smp": _smp,
}
