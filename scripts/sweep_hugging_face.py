"""Models of Hugging Face transformers for the sweep: ResNets and all that is built on them, and other networks with
batch norms, from small configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]}
_BOTTLENECK = {**_RESNET, "hidden_sizes": [64, 128, 192, 256]}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETECTOR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_DETECTOR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "dropout": 0.0}
_RT = {"encoder_hidden_dim": 32, "encoder_in_channels": [128, 192, 256], "encoder_ffn_dim": 32, "d_model": 32}
_RT |= {"encoder_attention_heads": 2, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 32, "num_queries": 5}
_RT |= {"decoder_attention_heads": 2, "decoder_layers": 2, "hidden_expansion": 1.0, "num_denoising": 0}
_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}

#: name -> (class of the model, class of the configuration, options); a configuration within another is a tuple.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ResNet, basic": ("ResNetForImageClassification", "ResNetConfig", {**_RESNET, "layer_type": "basic"}),
    "ResNet, bottleneck": ("ResNetForImageClassification", "ResNetConfig", _BOTTLENECK),
    "ResNet, stride in the first 1x1": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**_BOTTLENECK, "downsample_in_bottleneck": True},
    ),
    "ResNet, stride in the first stage": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**_BOTTLENECK, "downsample_in_first_stage": True},
    ),
    "ResNet, silu": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**_RESNET, "layer_type": "basic", "hidden_act": "silu"},
    ),
    "ResNet-18": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    ),
    "ResNet-50": ("ResNetForImageClassification", "ResNetConfig", {}),
    "ResNet, backbone": ("ResNetBackbone", "ResNetConfig", {**_BOTTLENECK, **_STAGES}),
    "ResNet, headless": ("ResNetModel", "ResNetConfig", _BOTTLENECK),
    "RegNet X": ("RegNetForImageClassification", "RegNetConfig", {**_RESNET, "groups_width": 16, "layer_type": "x"}),
    "RegNet Y": ("RegNetForImageClassification", "RegNetConfig", {**_RESNET, "groups_width": 16, "layer_type": "y"}),
    "BiT": ("BitForImageClassification", "BitConfig", {**_BOTTLENECK, "num_groups": 8}),
    "RT-DETR ResNet, backbone": ("RTDetrResNetBackbone", "RTDetrResNetConfig", {**_BOTTLENECK, **_STAGES}),
    "RT-DETR ResNet basic, backbone": (
        "RTDetrResNetBackbone",
        "RTDetrResNetConfig",
        {**_RESNET, **_STAGES, "layer_type": "basic"},
    ),
    "DETR": (
        "DetrForObjectDetection",
        "DetrConfig",
        {**_DETECTOR, "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]})},
    ),
    "DETR, timm backbone": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **_DETECTOR,
            "backbone_config": (
                "TimmBackboneConfig",
                {"backbone": "resnet18", "out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False},
            ),
        },
    ),
    "DETR, segmentation": (
        "DetrForSegmentation",
        "DetrConfig",
        {
            **_DETECTOR,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "backbone_config": ("ResNetConfig", {**_RESNET, **_STAGES}),
        },
    ),
    "Conditional DETR": (
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrConfig",
        {**_DETECTOR, "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]})},
    ),
    "Deformable DETR": (
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        {**_DETECTOR, "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]})},
    ),
    "DAB-DETR": (
        "DabDetrForObjectDetection",
        "DabDetrConfig",
        {
            "hidden_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_queries": 5,
            "dropout": 0.0,
            "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]}),
        },
    ),
    "Table Transformer": (
        "TableTransformerForObjectDetection",
        "TableTransformerConfig",
        {**_DETECTOR, "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]})},
    ),
    "RT-DETR": (
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        {
            **_RT,
            "backbone_config": ("RTDetrResNetConfig", {**_BOTTLENECK, "out_features": ["stage2", "stage3", "stage4"]}),
        },
    ),
    "RT-DETRv2": (
        "RTDetrV2ForObjectDetection",
        "RTDetrV2Config",
        {
            **_RT,
            "backbone_config": ("RTDetrResNetConfig", {**_BOTTLENECK, "out_features": ["stage2", "stage3", "stage4"]}),
        },
    ),
    "D-FINE": (
        "DFineForObjectDetection",
        "DFineConfig",
        {
            **_RT,
            "backbone_config": ("RTDetrResNetConfig", {**_BOTTLENECK, "out_features": ["stage2", "stage3", "stage4"]}),
        },
    ),
    "MaskFormer": (
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "backbone_config": ("ResNetConfig", {**_RESNET, **_STAGES}),
            "decoder_config": ("DetrConfig", {**_DETECTOR, "backbone_config": ("ResNetConfig", _RESNET)}),
        },
    ),
    "Mask2Former": (
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 32,
            "num_queries": 5,
            "backbone_config": ("ResNetConfig", {**_RESNET, **_STAGES}),
        },
    ),
    "UperNet, ResNet": (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {
            "hidden_size": 32,
            "auxiliary_in_channels": 192,
            "num_labels": 5,
            "backbone_config": ("ResNetConfig", {**_BOTTLENECK, **_STAGES}),
        },
    ),
    "UperNet, RT-DETR ResNet": (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {
            "hidden_size": 32,
            "auxiliary_in_channels": 48,
            "num_labels": 5,
            "backbone_config": ("RTDetrResNetConfig", {**_RESNET, **_STAGES, "layer_type": "basic"}),
        },
    ),
    "DPT hybrid": (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **_VIT,
            "is_hybrid": True,
            "image_size": 64,
            "patch_size": 16,
            "neck_hidden_sizes": [64, 128, 32, 32],
            "fusion_hidden_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "backbone_featmap_shape": [1, 192, 4, 4],
            "use_batch_norm_in_fusion_residual": True,
            "backbone_config": (
                "BitConfig",
                {
                    **_BOTTLENECK,
                    "num_groups": 8,
                    "depths": [2, 2, 2],
                    "hidden_sizes": [64, 128, 192],
                    "out_features": ["stage1", "stage2", "stage3"],
                    "layer_type": "bottleneck",
                },
            ),
        },
    ),
    "DPT, batch norm in fusion": (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **_VIT,
            "image_size": 64,
            "patch_size": 16,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "use_batch_norm_in_fusion_residual": True,
        },
    ),
    "EfficientNet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "image_size": 64,
            "hidden_dim": 640,
            "width_coefficient": 0.5,
            "depth_coefficient": 0.5,
            "drop_connect_rate": 0.0,
            "dropout_rate": 0.0,
        },
    ),
    "ALIGN, vision": (
        "AlignVisionModel",
        "AlignVisionConfig",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "drop_connect_rate": 0.0},
    ),
    "MobileNetV1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.5}),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.5}),
    "MobileNetV2, DeepLabV3+": ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {"depth_multiplier": 0.5}),
    "MobileViT": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [32, 32, 32], "neck_hidden_sizes": [16, 16, 16, 32, 32, 32, 64]},
    ),
    "MobileViT, DeepLabV3": (
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 32, 32],
            "neck_hidden_sizes": [16, 16, 16, 32, 32, 32, 64],
            "aspp_out_channels": 32,
        },
    ),
    "MobileViTV2": (
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.5},
    ),
    "LeViT": (
        "LevitForImageClassification",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "SwiftFormer": (
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 1, 1]},
    ),
    "CvT": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 64], "depth": [1, 2, 3], "num_heads": [1, 2, 2], "drop_path_rate": [0.0, 0.0, 0.0]},
    ),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 32,
            "drop_path_rate": 0.0,
        },
    ),
    "BEiT, segmentation": (
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {
            **_VIT,
            "image_size": 64,
            "patch_size": 16,
            "out_indices": [1, 2, 3, 4],
            "drop_path_rate": 0.0,
            "auxiliary_channels": 16,
        },
    ),
    "Data2Vec, segmentation": (
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {
            **_VIT,
            "image_size": 64,
            "patch_size": 16,
            "out_indices": [0, 1, 2, 3],
            "drop_path_rate": 0.0,
            "auxiliary_channels": 16,
        },
    ),
    "ViTPose": (
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        {
            "num_labels": 5,
            "use_simple_decoder": False,
            "backbone_config": ("VitPoseBackboneConfig", {**_VIT, "image_size": [64, 64], "out_features": ["stage4"]}),
        },
    ),
    "TextNet": ("TextNetForImageClassification", "TextNetConfig", {}),
    "HGNetV2": ("HGNetV2ForImageClassification", "HGNetV2Config", {}),
    "PP-LCNet": ("PPLCNetForImageClassification", "PPLCNetConfig", {}),
    "PP-LCNetV3, backbone": ("PPLCNetV3Backbone", "PPLCNetV3Config", {}),
    "PP-LCNetV4, backbone": ("PPLCNetV4Backbone", "PPLCNetV4Config", {}),
    "timm wrapper, resnet18": (
        "TimmWrapperForImageClassification",
        "TimmWrapperConfig",
        {"architecture": "resnet18", "num_labels": 10},
    ),
    "timm backbone, resnet26d": (
        "TimmBackbone",
        "TimmBackboneConfig",
        {"backbone": "resnet26d", "use_pretrained_backbone": False},
    ),
    "timm backbone, frozen": (
        "TimmBackbone",
        "TimmBackboneConfig",
        {"backbone": "resnet18", "use_pretrained_backbone": False, "freeze_batch_norm_2d": True},
    ),
}


def models() -> dict[str, Callable[[], nn.Module]]:
    """What builds each of them, with random weights."""
    return {name: functools.partial(_build, *what) for name, what in _MODELS.items()}


def _build(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, model)(_config(config, options))


def _config(name: str, options: dict[str, Any]) -> Any:
    import transformers

    inner = {key: _config(*value) if isinstance(value, tuple) else value for key, value in options.items()}
    return getattr(transformers, name)(**inner)
