"""fuse_ on models of timm, Hugging Face, torchvision and segmentation_models_pytorch, where they are installed.

In float64, where the reference serves every op: what is compared is the rewriting, without rounding and kinks. Then one
inference in float32 by the compiled kernels."""

import copy
import importlib

import _torchvision
import pytest
import torch
from _compare import assert_same, randomise, some_kernels, step, watched

import fastres
from fastres.recipes import units


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def library(name):
    vision, reason = _torchvision.load()
    if vision is None:
        pytest.skip(reason)
    if name == "torchvision":
        return vision
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


def timm_resnet(block="BasicBlock", **options):
    models = importlib.import_module("timm.models.resnet", library("timm").__name__)
    return models.ResNet(getattr(models, block), [1, 1, 1, 1], num_classes=5, **options)


def timm_regnet(**options):
    models = library("timm").models.regnet
    config = models.RegNetCfg(depth=8, w0=8, wa=8.0, wm=2.0, group_size=8, stem_width=8, **options)
    return models.RegNet(config, num_classes=5)


def timm_resnetv2(**options):
    layers = library("timm").layers
    models = importlib.import_module("timm.models.resnetv2")
    options = {"conv_layer": layers.create_conv2d, "norm_layer": layers.BatchNormAct2d, "stem_chs": 8} | options
    return models.ResNetV2([1, 1], channels=(16, 32), num_classes=5, **options)


def timm_frozen():
    return library("timm").layers.freeze_batch_norm_2d(randomise(timm_resnetv2(preact=False)))


def hugging_face(kind, **options):
    transformers = library("transformers")
    config = getattr(transformers, f"{kind}Config")(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5, **options
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return Logits(model)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def detection_backbone():
    vision = library("torchvision")
    norm = vision.ops.FrozenBatchNorm2d
    blocks = vision.models.resnet
    backbone = blocks.ResNet(blocks.Bottleneck, [1, 1, 1, 1], norm_layer=norm, num_classes=5)
    for module in backbone.modules():
        if isinstance(module, norm):
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1)
    return backbone


def torchvision_regnet():
    vision = library("torchvision")
    parameters = vision.models.regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return vision.models.regnet.RegNet(parameters, num_classes=5, stem_width=8)


def mobilenet():
    return library("torchvision").models.MobileNetV2(
        num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [4, 8, 2, 2]], dropout=0.0
    )


def unet():
    return library("segmentation_models_pytorch").Unet(
        "resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(16, 8, 8), classes=2
    )


#: name -> (how to make it, share of its convolutions and batch norms that have to be fused at least)
MODELS = {
    "timm_basic": (timm_resnet, 1.0),
    "timm_se_d": (
        lambda: timm_resnet("Bottleneck", stem_type="deep", avg_down=True, block_args={"attn_layer": "se"}),
        0.9,
    ),
    "timm_eca_blur": (
        lambda: timm_resnet(aa_layer=library("timm").layers.BlurPool2d, block_args={"attn_layer": "eca"}),
        0.8,
    ),
    "timm_drop": (lambda: timm_resnet(drop_path_rate=0.3, drop_block_rate=0.2), 0.9),
    "timm_regnet": (lambda: timm_regnet(se_ratio=0.25), 0.85),
    "timm_preactivation": (timm_resnetv2, 0.7),
    "timm_frozen": (timm_frozen, 0.9),
    "hf_resnet_basic": (lambda: hugging_face("ResNet", layer_type="basic"), 1.0),
    "hf_resnet": (lambda: hugging_face("ResNet"), 1.0),
    "hf_regnet": (lambda: hugging_face("RegNet", groups_width=8, layer_type="y"), 0.8),
    "detection": (detection_backbone, 1.0),
    "torchvision_regnet": (torchvision_regnet, 0.8),
    "mobilenet": (mobilenet, 1.0),
    "unet": (unet, 0.9),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    make, share = MODELS[name]
    torch.manual_seed(0)
    eager = randomise(make())
    fused = copy.deepcopy(eager)
    report = fastres.fuse_(fused)
    assert any(isinstance(m, units.Unit) for m in fused.modules())
    rows = [row for row in report.rows if row.kind in ("conv", "bn")]
    assert sum(row.fused for row in rows) >= share * len(rows), report
    assert all(row.reason for row in report.rows if not row.fused)
    if name in ("hf_resnet_basic", "hf_resnet"):  # the pooling too, behind the check of the number of channels
        assert report.fused == report.total
    x = torch.randn(2, 3, 32, 32)
    exact, truth = copy.deepcopy(fused).double(), copy.deepcopy(eager).double()
    for mode in ("train", "eval"):
        outcomes = []
        for model in (exact, truth):
            torch.manual_seed(1)
            with watched() as seen:
                outcomes.append(step(model, x.double(), mode))
            if model is exact:
                assert any(reason is None for _, reason in seen)
        assert_same(*outcomes, tolerance=1e-9)
    x = x.contiguous(memory_format=torch.channels_last)
    if name == "unet":  # its decoders are called with sizes and a skip connection
        found = fastres.explain(fused, x)
        left = {row.name for row in found.rows if not row.fused and "did not run" not in row.reason}
        assert left == {"encoder.maxpool", "segmentation_head.0"}, found
    for _ in range(3):  # recorded, recorded, replayed
        assert_same(step(fused, x, "inference"), step(eager, x, "inference"), tolerance=1e-4)
    fastres.unfuse_(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in eager.modules()]
