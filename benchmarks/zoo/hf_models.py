"""One small model of every image architecture of transformers, built from a configuration alone.

Sizes are chosen so that few of them coincide by chance: 48 channels in 4 heads of 12, 80 hidden units, 36 patches.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VIT = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80,
    "image_size": 48, "patch_size": 8,
}  # fmt: skip
VIT_RATIO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {"image_size": 128, "embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 8], "window_size": 4}
STAGES = {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 24, 40, 56]}
RESNET = {"embedding_size": 16, "depths": [2, 2, 2, 2], "hidden_sizes": [32, 48, 64, 96]}
PYRAMID = STAGES | {"hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 5, 8]}
TOWER = VIT | {"image_size": 48, "patch_size": 8}
TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 99}
LEVIT = {
    "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2],
}  # fmt: skip
BACK = {"out_indices": [1, 2, 3]}
LABELS = {"num_labels": 10}

RESNET_BACK = {"model_type": "resnet", **RESNET, **BACK, "out_indices": [2, 3, 4]}
SWIN_BACK = {"model_type": "swin", **SWIN, "out_indices": [1, 2, 3, 4]}
DETR = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "num_queries": 10, **LABELS,
}  # fmt: skip
RT_DETR = {
    "d_model": 48, "encoder_hidden_dim": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "num_queries": 10,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2,
    "encoder_in_channels": [48, 64, 96], "decoder_in_channels": [48, 48, 48], **LABELS,
    "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, "out_indices": [2, 3, 4]},
}  # fmt: skip
PP_LCNET = {
    "stem_channels": 8, "class_expand": 64,
    "block_configs": [
        [[3, 8, 16, 1, False]], [[3, 16, 24, 2, False]], [[3, 24, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 48, 2, False], [5, 48, 48, 1, False]], [[5, 48, 64, 2, True], [5, 64, 64, 1, True]],
    ],
}  # fmt: skip
HGNET = {
    "stem_channels": [3, 16, 16], "stage_in_channels": [16, 32, 48, 64], "stage_mid_channels": [16, 24, 32, 40],
    "stage_out_channels": [32, 48, 64, 96], "stage_num_blocks": [1, 1, 2, 1], "stage_numb_of_layers": [3, 3, 3, 3],
    "embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 2, 1],
}  # fmt: skip

# name -> (class, configuration, side of the image)
HF: dict[str, tuple[str, dict[str, Any], int]] = {
    # image classification
    "beit": ("BeitForImageClassification", VIT | LABELS, 48),
    "beit-relative": ("BeitForImageClassification", VIT | LABELS | {"use_relative_position_bias": True}, 48),
    "bit": ("BitForImageClassification", RESNET | LABELS | {"num_groups": 4}, 64),
    "clip": ("CLIPForImageClassification", {"vision_config": TOWER, "text_config": TEXT} | LABELS, 48),
    "convnext": ("ConvNextForImageClassification", STAGES | LABELS, 64),
    "convnextv2": ("ConvNextV2ForImageClassification", STAGES | LABELS, 64),
    "cvt": (
        "CvtForImageClassification",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]} | LABELS,
        64,
    ),
    "data2vec-vision": ("Data2VecVisionForImageClassification", VIT | LABELS, 48),
    "deit": ("DeiTForImageClassification", VIT | LABELS, 48),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", VIT | LABELS, 48),
    "dinov2": ("Dinov2ForImageClassification", VIT_RATIO | LABELS, 48),
    "dinov2-swiglu": ("Dinov2ForImageClassification", VIT_RATIO | LABELS | {"use_swiglu_ffn": True}, 48),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", VIT_RATIO | LABELS, 48),
    "donut-swin": ("DonutSwinForImageClassification", SWIN | LABELS, 128),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640} | LABELS,
        64,
    ),
    "focalnet": (
        "FocalNetForImageClassification",
        {"image_size": 64, "embed_dim": 24, "hidden_sizes": [24, 48, 96, 96], "depths": [2, 2, 2, 2]} | LABELS,
        64,
    ),
    "hgnet_v2": ("HGNetV2ForImageClassification", HGNET | LABELS, 64),
    "hiera": (
        "HieraForImageClassification",
        {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]} | LABELS,
        224,
    ),
    "ijepa": ("IJepaForImageClassification", VIT | LABELS, 48),
    "imagegpt": (
        "ImageGPTForImageClassification",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 99} | LABELS,
        8,
    ),
    "levit": (
        "LevitForImageClassification",
        LEVIT | LABELS,
        64,
    ),
    "levit-teacher": (
        "LevitForImageClassificationWithTeacher",
        LEVIT | LABELS,
        64,
    ),
    "metaclip_2": ("MetaClip2ForImageClassification", {"vision_config": TOWER, "text_config": TEXT} | LABELS, 48),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64} | LABELS, 64),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 64} | LABELS, 64),
    "mobilevit": (
        "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [48, 56, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96]} | LABELS,
        64,
    ),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {"image_size": 64, "width_multiplier": 0.25} | LABELS, 64),
    "perceiver-learned": (
        "PerceiverForImageClassificationLearned",
        {"num_latents": 12, "d_latents": 48, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
         "num_cross_attention_heads": 1, "image_size": 16} | LABELS,
        16,
    ),
    "perceiver-fourier": (
        "PerceiverForImageClassificationFourier",
        {"num_latents": 12, "d_latents": 48, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
         "num_cross_attention_heads": 1} | LABELS,
        224,
    ),
    "perceiver-conv": (
        "PerceiverForImageClassificationConvProcessing",
        {"num_latents": 12, "d_latents": 48, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
         "num_cross_attention_heads": 1} | LABELS,
        224,
    ),
    "poolformer": ("PoolFormerForImageClassification", STAGES | LABELS, 64),
    "pp_lcnet": ("PPLCNetForImageClassification", PP_LCNET | LABELS, 64),
    "pvt": ("PvtForImageClassification", PYRAMID | LABELS | {"image_size": 64}, 64),
    "pvt_v2": ("PvtV2ForImageClassification", PYRAMID | LABELS | {"image_size": 64}, 64),
    "pvt_v2-linear": (
        "PvtV2ForImageClassification",
        PYRAMID | LABELS | {"image_size": 64, "linear_attention": True},
        64,
    ),
    "regnet": ("RegNetForImageClassification", RESNET | LABELS | {"groups_width": 8}, 64),
    "regnet-x": ("RegNetForImageClassification", RESNET | LABELS | {"groups_width": 8, "layer_type": "x"}, 64),
    "resnet": ("ResNetForImageClassification", RESNET | LABELS, 64),
    "resnet-basic": ("ResNetForImageClassification", RESNET | LABELS | {"layer_type": "basic"}, 64),
    "segformer": ("SegformerForImageClassification", PYRAMID | LABELS, 64),
    "siglip": ("SiglipForImageClassification", {"vision_config": TOWER, "text_config": TEXT} | LABELS, 48),
    "siglip2": (
        "Siglip2ForImageClassification",
        {"vision_config": VIT | {"num_patches": 36}, "text_config": TEXT} | LABELS,
        48,
    ),
    "swiftformer": (
        "SwiftFormerForImageClassification",
        {"image_size": 64, "depths": [2, 2, 2, 2], "embed_dims": [16, 24, 40, 56]} | LABELS,
        64,
    ),
    "swin": ("SwinForImageClassification", SWIN | LABELS, 128),
    "swinv2": ("Swinv2ForImageClassification", SWIN | LABELS, 128),
    "textnet": (
        "TextNetForImageClassification",
        {"stem_out_channels": 16, "hidden_sizes": [16, 24, 40, 56, 72], "image_size": [64, 64]} | LABELS,
        64,
    ),
    "timm_wrapper": ("TimmWrapperForImageClassification", {"architecture": "test_vit"} | LABELS, 160),
    "timm_wrapper-resnet": ("TimmWrapperForImageClassification", {"architecture": "test_resnet"} | LABELS, 160),
    "vit": ("ViTForImageClassification", VIT | LABELS, 48),
    "vit_msn": ("ViTMSNForImageClassification", VIT | LABELS, 48),
    "shieldgemma2": (
        "ShieldGemma2ForImageClassification",
        {"vision_config": TOWER | {"vision_use_head": False}, "mm_tokens_per_image": 9, "image_token_index": 5,
         "boi_token_index": 6, "eoi_token_index": 7,
         "text_config": TEXT | {"vocab_size": 20000, "head_dim": 12, "num_key_value_heads": 2, "num_hidden_layers": 2}},
        48,
    ),
    # backbones
    "backbone/beit": ("BeitBackbone", VIT | BACK, 48),
    "backbone/bit": ("BitBackbone", RESNET | BACK | {"num_groups": 4}, 64),
    "backbone/convnext": ("ConvNextBackbone", STAGES | BACK, 64),
    "backbone/convnextv2": ("ConvNextV2Backbone", STAGES | BACK, 64),
    "backbone/dinov2": ("Dinov2Backbone", VIT_RATIO | BACK, 48),
    "backbone/dinov2_with_registers": ("Dinov2WithRegistersBackbone", VIT_RATIO | BACK, 48),
    "backbone/dinov3_convnext": ("DINOv3ConvNextBackbone", STAGES | BACK, 64),
    "backbone/dinov3_vit": ("DINOv3ViTBackbone", VIT | BACK, 48),
    "backbone/focalnet": (
        "FocalNetBackbone",
        {"image_size": 64, "embed_dim": 24, "hidden_sizes": [24, 48, 96, 96], "depths": [2, 2, 2, 2]} | BACK,
        64,
    ),
    "backbone/hgnet_v2": ("HGNetV2Backbone", HGNET | BACK, 64),
    "backbone/hiera": (
        "HieraBackbone",
        {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]} | BACK,
        224,
    ),
    "backbone/lw_detr_vit": (
        "LwDetrViTBackbone",
        VIT_RATIO | BACK | {"image_size": 64, "pretrain_image_size": 64, "window_block_indices": [1]},
        64,
    ),
    "backbone/maskformer-swin": ("MaskFormerSwinBackbone", SWIN | BACK, 128),
    "backbone/pixio": ("PixioBackbone", VIT_RATIO | BACK, 48),
    "backbone/pp_lcnet": ("PPLCNetBackbone", PP_LCNET | BACK, 64),
    "backbone/pp_lcnet_v3": ("PPLCNetV3Backbone", {"scale": 0.5} | BACK, 64),
    "backbone/pp_lcnet_v4": ("PPLCNetV4Backbone", {"scale": 0.5} | BACK, 64),
    "backbone/pvt_v2": ("PvtV2Backbone", PYRAMID | BACK | {"image_size": 64}, 64),
    "backbone/resnet": ("ResNetBackbone", RESNET | BACK, 64),
    "backbone/rf_detr_dinov2": ("RfDetrDinov2Backbone", VIT_RATIO | BACK | {"num_windows": 2, "image_size": 64}, 64),
    "backbone/rt_detr_resnet": ("RTDetrResNetBackbone", RESNET | BACK, 64),
    "backbone/sapiens2": (
        "Sapiens2Backbone",
        VIT | BACK | {"num_key_value_attention_heads": 2, "num_first_full_attention_layers": 1,
                      "num_last_full_attention_layers": 1},
        48,
    ),
    "backbone/swin": ("SwinBackbone", SWIN | BACK, 128),
    "backbone/swinv2": ("Swinv2Backbone", SWIN | BACK, 128),
    "backbone/textnet": (
        "TextNetBackbone",
        {"stem_out_channels": 16, "hidden_sizes": [16, 24, 40, 56, 72], "image_size": [64, 64]} | BACK,
        64,
    ),
    "backbone/timm_backbone": ("TimmBackbone", {"backbone": "test_resnet"} | BACK, 64),
    "backbone/tipsv2": ("Tipsv2VisionBackbone", VIT_RATIO | BACK, 48),
    "backbone/uvdoc": ("UVDocBackbone", BACK, 64),
    "backbone/vitdet": (
        "VitDetBackbone",
        VIT_RATIO | BACK | {"pretrain_image_size": 48, "window_size": 3, "window_block_indices": [0, 1],
                            "use_relative_position_embeddings": True, "residual_block_indices": [2]},
        48,
    ),
    "backbone/vitpose": (
        "VitPoseBackbone",
        VIT_RATIO | BACK | {"image_size": [48, 48], "patch_size": [8, 8]},
        48,
    ),
    # towers and pre-training models
    "clip-vision": ("CLIPVisionModel", TOWER, 48),
    "siglip-vision": ("SiglipVisionModel", TOWER, 48),
    "siglip2-vision": ("Siglip2VisionModel", VIT | {"num_patches": 36}, 48),
    "aimv2-vision": ("Aimv2VisionModel", TOWER, 48),
    "mlcd-vision": ("MLCDVisionModel", TOWER, 48),
    "dinov3_vit": ("DINOv3ViTModel", VIT, 48),
    "videomae": (
        "VideoMAEForVideoClassification",
        VIT | LABELS | {"num_frames": 4, "tubelet_size": 2},
        48,
    ),
    # dense tasks
    "segformer-semantic": ("SegformerForSemanticSegmentation", PYRAMID | LABELS | {"decoder_hidden_size": 32}, 64),
    "upernet-swin": (
        "UperNetForSemanticSegmentation",
        {"backbone_config": SWIN_BACK, "hidden_size": 32, "auxiliary_channels": 24,
         "auxiliary_in_channels": 96} | LABELS,
        128,
    ),
    "upernet-convnext": (
        "UperNetForSemanticSegmentation",
        {"backbone_config": {"model_type": "convnext", **STAGES, "out_indices": [1, 2, 3, 4]}, "hidden_size": 32,
         "auxiliary_channels": 24, "auxiliary_in_channels": 40} | LABELS,
        64,
    ),
    "beit-semantic": (
        "BeitForSemanticSegmentation",
        VIT | LABELS | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 24},
        48,
    ),
    "mobilevit-semantic": (
        "MobileViTForSemanticSegmentation",
        {"image_size": 64, "hidden_sizes": [48, 56, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96],
         "aspp_out_channels": 32} | LABELS,
        64,
    ),
    "dpt-depth": (
        "DPTForDepthEstimation",
        VIT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 24, 32, 40],
               "fusion_hidden_size": 32},
        48,
    ),
    "dpt-dinov2-depth": (
        "DPTForDepthEstimation",
        {"backbone_config": {"model_type": "dinov2", **VIT_RATIO, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                             "reshape_hidden_states": False},
         "neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 32},
        48,
    ),
    "depth_anything": (
        "DepthAnythingForDepthEstimation",
        {"backbone_config": {"model_type": "dinov2", **VIT_RATIO, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                             "reshape_hidden_states": False},
         "patch_size": 8, "reassemble_hidden_size": 48, "neck_hidden_sizes": [16, 24, 32, 40],
         "fusion_hidden_size": 32, "head_hidden_size": 16},
        48,
    ),
    "glpn-depth": ("GLPNForDepthEstimation", PYRAMID | {"decoder_hidden_size": 32}, 64),
    "maskformer": (
        "MaskFormerForInstanceSegmentation",
        {"backbone_config": SWIN_BACK, "fpn_feature_size": 64, "mask_feature_size": 64,
         "decoder_config": {"model_type": "detr", **DETR, "backbone_config": RESNET_BACK}} | LABELS,
        128,
    ),
    "mask2former": (
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": SWIN_BACK, "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64,
         "encoder_feedforward_dim": 80, "dim_feedforward": 96, "encoder_layers": 2, "decoder_layers": 3,
         "num_attention_heads": 4, "num_queries": 10} | LABELS,
        128,
    ),
    "eomt": (
        "EomtForUniversalSegmentation",
        VIT_RATIO | LABELS | {"num_blocks": 1, "num_queries": 10, "num_upscale_blocks": 1},
        48,
    ),
    "vitpose": (
        "VitPoseForPoseEstimation",
        {"backbone_config": {"model_type": "vitpose_backbone", **VIT_RATIO, "image_size": [48, 48],
                             "patch_size": [8, 8], "out_indices": [3]}, "num_labels": 10},
        48,
    ),
    "swin2sr": (
        "Swin2SRForImageSuperResolution",
        {"image_size": 16, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        16,
    ),
    # detection
    "detr-resnet": ("DetrForObjectDetection", DETR | {"backbone_config": RESNET_BACK}, 64),
    "detr-timm": (
        "DetrForObjectDetection",
        DETR | {"backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet",
                                    "out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False}},
        64,
    ),
    "conditional_detr": ("ConditionalDetrForObjectDetection", DETR | {"backbone_config": RESNET_BACK}, 64),
    "yolos": ("YolosForObjectDetection", VIT | LABELS | {"image_size": [48, 48], "num_detection_tokens": 10}, 48),
    "rt_detr": ("RTDetrForObjectDetection", RT_DETR, 64),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", RT_DETR, 64),
    "deformable_detr": (
        "DeformableDetrForObjectDetection",
        DETR | {"d_model": 64, "backbone_config": RESNET_BACK, "num_feature_levels": 3, "disable_custom_kernels": True},
        64,
    ),
}  # fmt: skip

# What is registered as an image model but cannot be built from a configuration alone.
LEFT_OUT = {"dinat": "needs the compiled package natten"}

Builder = Callable[[], tuple[nn.Module, Any]]


def hf_zoo() -> dict[str, Builder]:
    """Return the builders by name: `hf/swin`, `hf/backbone/swin`."""
    return {f"hf/{name}": _builder(name, *entry) for name, entry in HF.items()}


def _builder(name: str, class_name: str, settings: dict[str, Any], side: int) -> Builder:
    def build() -> tuple[nn.Module, Any]:
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**settings))
        return model, _inputs(name.removeprefix("backbone/").split("-")[0], side)

    return build


def _inputs(model_type: str, side: int) -> dict[str, Tensor]:
    """Return what the model is called with: an image, or what its processor makes of one."""
    image = torch.randn(1, 3, side, side)
    if model_type == "imagegpt":
        return {"input_ids": torch.arange(side * side).reshape(1, -1) % 99}
    if model_type == "perceiver":
        return {"inputs": image}
    if model_type == "videomae":
        return {"pixel_values": torch.randn(1, 4, 3, side, side)}
    if model_type == "siglip2":
        patches = torch.randn(1, 36, 3 * 8 * 8)
        mask = torch.ones(1, 36, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[6, 6]])}
    if model_type == "shieldgemma2":
        tokens = torch.tensor([[2, 6, *[5] * 9, 7, 11, 12, 13]])
        return {"input_ids": tokens, "pixel_values": image, "token_type_ids": (tokens == 5).long()}
    return {"pixel_values": image}
