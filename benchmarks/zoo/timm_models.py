"""One small model or more of every architecture module of timm.

Of each module the smallest registered model stands here, and more where one file holds several designs (byobnet,
vision_transformer, eva, ...). What has no small variant is made shallower or narrower by its own keyword arguments.
The list was chosen once and is data, so that the benchmark is the same in every run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

# module -> (model, side of the image or None for the model's own, keyword arguments)
TIMM: dict[str, list[tuple[str, int | None, dict[str, Any]]]] = {
    "beit": [
        ("beit_base_patch16_224", 96, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 96}),
        ("beitv2_base_patch16_224", 96, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 96}),
    ],
    "byoanet": [
        ("halonet_h1", None, {}),
        ("eca_botnext26ts_256", 256, {}),
        ("eca_halonext26ts", 256, {}),
        ("lambda_resnet26rpt_256", 256, {}),
    ],
    "byobnet": [
        ("test_byobnet", None, {}),
        ("mobileone_s0", 128, {}),
        ("gernet_s", 128, {}),
        ("repvgg_a0", 128, {}),
        ("resnet32ts", 128, {}),
        ("gcresnext26ts", 128, {}),
    ],
    "cait": [("cait_xxs24_224", 128, {"depth": 4, "img_size": 128})],
    "coat": [("coat_lite_tiny", None, {}), ("coat_tiny", None, {})],
    "convit": [("convit_tiny", None, {})],
    "convmixer": [("convmixer_768_32", 128, {})],
    "convnext": [
        ("test_convnext", None, {}),
        ("test_convnext2", None, {}),
        ("test_convnext3", None, {}),
        ("convnext_atto", 128, {}),
        ("convnextv2_atto", 128, {}),
    ],
    "cpubone": [("cpubone_nano", None, {})],
    "crossvit": [("crossvit_tiny_240", None, {})],
    "csatv2": [("csatv2", 256, {})],
    "cspnet": [("cs3darknet_focus_s", None, {}), ("cspresnet50", 128, {}), ("darknet17", 128, {})],
    "cspnext": [("cspnext_tiny", None, {})],
    "davit": [
        ("davit_tiny", None, {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (2, 4, 6, 8)}),
    ],
    "deepseek_vit": [("deepseek_vit_412m", 112, {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": 112})],
    "deit": [("deit_tiny_patch16_224", None, {}), ("deit_tiny_distilled_patch16_224", None, {})],
    "densenet": [("densenet121", 128, {}), ("densenetblur121d", 128, {})],
    "dla": [("dla46_c", None, {}), ("dla46x_c", None, {})],
    "dpn": [("dpn48b", 128, {})],
    "edgenext": [("edgenext_xx_small", None, {})],
    "efficientformer": [("efficientformer_l1", None, {})],
    "efficientformer_v2": [("efficientformerv2_s0", None, {})],
    "efficientnet": [
        ("test_efficientnet", None, {}),
        ("test_efficientnet_gn", None, {}),
        ("test_efficientnet_ln", None, {}),
        ("test_efficientnet_evos", None, {}),
        ("efficientnet_b0", 128, {}),
        ("efficientnetv2_rw_t", 128, {}),
        ("mobilenetv2_050", 128, {}),
        ("mnasnet_small", 128, {}),
        ("mixnet_s", 128, {}),
        ("tinynet_e", None, {}),
        ("fbnetc_100", 128, {}),
    ],
    "efficientvim": [("efficientvim_m1", None, {})],
    "efficientvit_mit": [("efficientvit_b0", None, {})],
    "efficientvit_msra": [("efficientvit_m0", None, {})],
    "eva": [
        ("eva02_tiny_patch14_224", None, {}),
        ("vit_tiny_patch16_dinov3_qkvb", None, {}),
        ("vit_small_patch16_rope_224", 128, {"depth": 4, "img_size": 128}),
        ("eva_giant_patch14_224", 112, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 112}),
    ],
    "fasternet": [("fasternet_t0", None, {})],
    "fastvit": [("fastvit_t8", None, {}), ("fastvit_sa12", 128, {})],
    "focalnet": [("focalnet_tiny_srf", 128, {})],
    "gcvit": [("gcvit_xxtiny", None, {})],
    "gemma4_vit": [("gemma4_vit_167m", 192, {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": 192})],
    "ghostnet": [("ghostnet_050", None, {}), ("ghostnetv2_100", 128, {}), ("ghostnetv3_050", None, {})],
    "hardcorenas": [("hardcorenas_a", 128, {})],
    "hgnet": [("hgnetv2_b0", None, {}), ("hgnet_tiny", 128, {})],
    "hiera": [("hiera_tiny_224", None, {"embed_dim": 32, "stages": (1, 1, 2, 1)})],
    "hieradet_sam2": [("hieradet_small", 128, {"embed_dim": 32, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)})],
    "hrnet": [("hrnet_w18_small", 128, {})],
    "iformer": [("iformer_t", None, {})],
    "inception_next": [("inception_next_atto", None, {})],
    "inception_resnet_v2": [("inception_resnet_v2", 160, {})],
    "inception_v3": [("inception_v3", 160, {})],
    "inception_v4": [("inception_v4", 160, {})],
    "lcnetv2": [("lcnetv2_small", None, {})],
    "levit": [("levit_128s", None, {}), ("levit_conv_128s", None, {})],
    "lowformer": [("lowformer_b0", None, {})],
    "mambaout": [("test_mambaout", None, {})],
    "maxxvit": [("test_coatnet", None, {}), ("test_maxvit", None, {}), ("coatnext_nano_rw_224", None, {})],
    "metaformer": [
        ("poolformer_s12", 128, {}),
        ("poolformerv2_s12", 128, {}),
        ("convformer_s18", 128, {}),
        ("caformer_s18", 128, {}),
    ],
    "mlp_mixer": [
        ("gmlp_ti16_224", None, {}),
        ("gmixer_12_224", None, {}),
        ("resmlp_12_224", None, {}),
        ("mixer_s32_224", None, {}),
    ],
    "mobilenetv3": [("mobilenetv3_small_050", None, {}), ("lcnet_035", None, {}), ("fbnetv3_b", 128, {})],
    "mobilenetv5": [("mobilenetv5_base", None, {})],
    "mobilevit": [("mobilevit_xxs", None, {}), ("mobilevitv2_050", None, {})],
    "mvitv2": [
        ("mvitv2_tiny", None, {}),
        ("mvitv2_small_cls", None, {}),
    ],
    "naflexvit": [("naflexvit_base_patch16_gap", 128, {"depth": 3, "embed_dim": 96, "num_heads": 4})],
    "nasnet": [("nasnetalarge", 160, {})],
    "nest": [("nest_tiny", None, {})],
    "nextvit": [("nextvit_small", 128, {"depths": (1, 1, 5, 1)})],
    "nfnet": [("test_nfnet", None, {}), ("nf_regnet_b0", None, {})],
    "pit": [("pit_ti_224", None, {}), ("pit_ti_distilled_224", None, {})],
    "pnasnet": [("pnasnet5large", 160, {})],
    "pvt_v2": [
        ("pvt_v2_b0", None, {}),
        ("pvt_v2_b2_li", 128, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 128)}),
    ],
    "qwen3_vit": [("qwen3_vit_88m", 128, {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": 128})],
    "rdnet": [("rdnet_tiny", 128, {})],
    "regnet": [("regnetx_002", None, {}), ("regnety_002", None, {}), ("regnetz_005", 128, {})],
    "repghost": [("repghostnet_050", None, {})],
    "repvit": [("repvit_m0_9", None, {})],
    "res2net": [("res2net50_14w_8s", 128, {"layers": (1, 1, 1, 1)}), ("res2next50", 128, {"layers": (1, 1, 1, 1)})],
    "resnest": [("resnest14d", 128, {})],
    "resnet": [
        ("test_resnet", None, {}),
        ("resnet10t", 128, {}),
        ("resnet18", 128, {}),
        ("resnet26d", 128, {}),
        ("resnetblur50", 128, {"layers": (1, 1, 1, 1)}),
        ("resnetaa50", 128, {"layers": (1, 1, 1, 1)}),
        ("seresnext26d_32x4d", 128, {"layers": (1, 1, 1, 1)}),
        ("ecaresnet26t", 128, {"layers": (1, 1, 1, 1)}),
        ("resnext50_32x4d", 128, {"layers": (1, 1, 1, 1)}),
    ],
    "resnetv2": [("resnetv2_18", 128, {}), ("resnetv2_50x1_bit", 128, {})],
    "rexnet": [("rexnet_100", None, {})],
    "selecsls": [("selecsls42", 128, {})],
    "senet": [("legacy_seresnet18", 128, {}), ("legacy_seresnext26_32x4d", 128, {})],
    "sequencer": [
        (
            "sequencer2d_s",
            None,
            {"layers": (1, 1, 1, 1), "embed_dims": (48, 96, 96, 96), "hidden_sizes": (12, 24, 24, 24)},
        ),
    ],
    "shvit": [("shvit_s1", None, {})],
    "sknet": [("skresnet18", 128, {}), ("skresnext50_32x4d", 128, {"layers": (1, 1, 1, 1)})],
    "starnet": [("starnet_s050", None, {})],
    "swiftformer": [("swiftformer_xs", None, {})],
    "swin_transformer": [("swin_tiny_patch4_window7_224", None, {"depths": (2, 2, 2, 2), "embed_dim": 48})],
    "swin_transformer_v2": [("swinv2_tiny_window8_256", None, {"depths": (2, 2, 2, 2), "embed_dim": 48})],
    "swin_transformer_v2_cr": [("swinv2_cr_tiny_224", None, {"depths": (2, 2, 2, 2), "embed_dim": 48})],
    "tiny_vit": [("tiny_vit_5m_224", None, {})],
    "tnt": [("tnt_s_patch16_224", None, {"depth": 3})],
    "tresnet": [("tresnet_m", 128, {"layers": (1, 1, 2, 1)})],
    "twins": [
        ("twins_svt_small", None, {"depths": (1, 1, 2, 1)}),
        ("twins_pcpvt_small", None, {"depths": (1, 1, 2, 1)}),
    ],
    "vgg": [("vgg11", None, {"mlp_ratio": 0.0625}), ("vgg11_bn", None, {"mlp_ratio": 0.0625})],
    "visformer": [("visformer_tiny", None, {})],
    "vision_transformer": [
        ("test_vit", None, {}),
        ("test_vit2", None, {}),
        ("test_vit3", None, {}),
        ("test_vit4", None, {}),
        ("vit_tiny_patch16_224", None, {"depth": 4}),
        ("vit_small_patch14_reg4_dinov2", 112, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 112}),
        ("vit_giant_patch14_dinov2", 112, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 112}),
        ("vit_base_patch16_siglip_224", 96, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 96}),
        ("vit_base_patch16_clip_224", 96, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 96}),
        ("vit_small_patch16_18x2_224", 96, {"depth": 3, "embed_dim": 96, "num_heads": 4, "img_size": 96}),
        ("vit_pwee_patch16_reg1_gap_256", 128, {"depth": 3, "img_size": 128}),
        ("vit_dpwee_patch16_reg1_gap_256", 128, {"depth": 3, "img_size": 128}),
    ],
    "vision_transformer_hybrid": [("vit_tiny_r_s16_p8_224", None, {"depth": 4})],
    "vision_transformer_relpos": [("test_vit_relpos", None, {}), ("vit_srelpos_small_patch16_224", 224, {"depth": 3})],
    "vision_transformer_sam": [
        ("samvit_base_patch16_224", 224, {"depth": 3, "embed_dim": 96, "num_heads": 4, "global_attn_indexes": (2,)})
    ],
    "vitamin": [("vitamin_small_224", None, {})],
    "volo": [("volo_d1_224", None, {})],
    "vovnet": [("ese_vovnet19b_slim_dw", None, {}), ("ese_vovnet19b_slim", 128, {})],
    "xception": [("legacy_xception", 160, {})],
    "xception_aligned": [("xception41p", 128, {}), ("xception41", 128, {})],
    "xcit": [("xcit_nano_12_p16_224", None, {"depth": 4}), ("xcit_tiny_12_p8_224", 112, {"depth": 3, "img_size": 112})],
}  # fmt: skip

Builder = Callable[[], tuple[nn.Module, Any]]


def timm_zoo() -> dict[str, Builder]:
    """Return the builders by name: `timm/vit_tiny_patch16_224`."""
    return {f"timm/{name}": _builder(name, side, settings) for name, side, settings in _entries()}


def _entries() -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    for models in TIMM.values():
        yield from models


def _builder(name: str, side: int | None, settings: dict[str, Any]) -> Builder:
    def build() -> tuple[nn.Module, Tensor]:
        model: Any = timm.create_model(name, pretrained=False, **settings)
        channels, height, width = model.pretrained_cfg["input_size"]
        return model, torch.randn(1, channels, side or height, side or width)

    return build
