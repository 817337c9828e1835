"""Write a hundred more networks as ONNX files: families that the 58 models of the tables do not hold.

    python -m benchmarks.zoo --out DIR [--only NAME,NAME]

Classifiers and segmentation of torchvision, timm's architectures, small configurations of transformers' and
diffusers' models, and a few written here. Weights are random, shapes fixed; nothing is downloaded. Run it in the
environment of `benchmarks.export` with timm and diffusers in it; `benchmarks.cpu NAME ... --generated DIR` times them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.export import prepare, write
from benchmarks.networks import SEED, Apply, Network, generator, load_torchvision, normal, token_ids

# Architectures by the size of their image.
TORCHVISION = {
    "vit_b_32": 224, "swin_t": 224, "swin_v2_t": 224, "densenet121": 224, "googlenet": 224, "inception_v3": 299,
    "regnet_y_400mf": 224, "regnet_x_800mf": 224, "efficientnet_v2_s": 224, "maxvit_t": 224, "alexnet": 224,
    "deeplabv3_mobilenet_v3_large": 224, "fcn_resnet50": 128,
}  # fmt: skip
TIMM = {
    "mobilevit_s": 256, "mobilevitv2_050": 256, "levit_128": 224, "efficientformer_l1": 224, "ghostnet_100": 224,
    "hrnet_w18_small": 224, "dla34": 224, "res2net50_26w_4s": 224, "resnest14d": 224, "repvgg_a0": 224, "fastvit_t8": 256,
    "edgenext_x_small": 256, "poolformer_s12": 224, "deit_tiny_patch16_224": 224, "mobilenetv4_conv_small": 224,
    "mobileone_s1": 224, "xcit_nano_12_p16_224": 224, "coat_tiny": 224, "pvt_v2_b0": 224, "twins_svt_small": 224,
    "crossvit_9_240": 240, "beit_base_patch16_224": 224, "nfnet_l0": 224, "dm_nfnet_f0": 192, "tf_efficientnet_lite0": 224,
    "lcnet_100": 224, "tinynet_a": 192, "rexnet_100": 224, "vovnet39a": 224, "convmixer_768_32": 112, "gmlp_s16_224": 224,
    "convnextv2_atto": 224, "hgnetv2_b0": 224, "repghostnet_100": 224, "skresnet18": 224, "gcresnet33ts": 224,
    "darknet53": 224, "cspdarknet53": 224, "eva02_tiny_patch14_224": 224, "vit_small_patch16_224": 224,
    "tiny_vit_5m_224": 224, "efficientvit_b0": 224, "efficientvit_m0": 224, "starnet_s1": 224, "ese_vovnet19b_dw": 224,
    "regnetz_b16": 224, "bat_resnext26ts": 256, "volo_d1_224": 224, "visformer_tiny": 224, "inception_next_tiny": 224,
    "focalnet_tiny_srf": 224, "davit_tiny": 224, "nest_tiny": 224, "mixnet_s": 224, "sequencer2d_s": 224,
}  # fmt: skip
BERT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 5000}
CAUSAL = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 768, "vocab_size": 5000,
          "use_cache": False}  # fmt: skip
VISION = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SPEECH = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024}
DEBERTA = {"relative_attention": True, "position_buckets": 32, "norm_rel_ebd": "layer_norm", "share_att_key": True,
           "pos_att_type": ["p2c", "c2p"]}  # fmt: skip
# Model class, configuration class, settings; by what they read.
TEXT = {
    "roberta": ("RobertaModel", "RobertaConfig", BERT), "electra": ("ElectraModel", "ElectraConfig", BERT),
    "albert": ("AlbertModel", "AlbertConfig", BERT), "deberta_v2": ("DebertaV2Model", "DebertaV2Config", {**BERT, **DEBERTA}),
    "mpnet": ("MPNetModel", "MPNetConfig", BERT),
    "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", {**BERT, "embedding_size": 256}),
    "t5_encoder": ("T5EncoderModel", "T5Config", {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4,
                                                  "vocab_size": 5000}),
}  # fmt: skip
LANGUAGE = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**CAUSAL, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**CAUSAL, "num_key_value_heads": 2, "head_dim": 64}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**CAUSAL, "num_key_value_heads": 4, "pad_token_id": 0}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**CAUSAL, "ffn_dim": 768, "word_embed_proj_dim": 256}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**CAUSAL, "n_layer": 3, "n_head": 4}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**CAUSAL, "num_key_value_heads": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", CAUSAL),
}
IMAGES = {
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {}),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", VISION), "dinov2": ("Dinov2Model", "Dinov2Config", VISION),
    "yolos": ("YolosModel", "YolosConfig", {**VISION, "hidden_size": 192, "num_attention_heads": 3, "image_size": [224, 224]}),
}  # fmt: skip
WAVES = {"wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", SPEECH), "hubert": ("HubertModel", "HubertConfig", SPEECH)}


class First(nn.Module):
    """The first result of a model that takes its inputs by name."""

    def __init__(self, model: nn.Module, names: Sequence[str], **settings: Any) -> None:
        super().__init__()
        self.model, self.names, self.settings = model, tuple(names), settings

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, arguments)), **self.settings)[0]


def jittered(module: nn.Module) -> nn.Module:
    """Statistics of batch normalisations that are neither zero nor one, so that nothing folds away."""
    random = generator(1)
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=random) * 0.1)
            layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=random) + 0.5)
    return module


def network(module: nn.Module, *arguments: Tensor) -> Network:
    """A network of fixed shapes; inputs are numbered."""
    with torch.no_grad():
        jittered(module.eval())
    names = [f"x{number}" for number in range(len(arguments))]
    return Network(module, arguments, names, ["y"])


def of_torchvision(name: str, size: int) -> Network:
    """A classifier or a segmentation of an image."""
    models = load_torchvision().models
    torch.manual_seed(SEED)
    settings: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith(("deeplab", "fcn")):
        settings["weights_backbone"] = None
    module = models.get_model(name, weights=None, **settings)
    if "weights_backbone" in settings:
        module = Apply(module, lambda model, x: model(x)["out"])
    return network(module, normal(1, 3, size, size))


def of_timm(name: str, size: int) -> Network:
    """One of timm's classifiers."""
    import timm

    load_torchvision()
    torch.manual_seed(SEED)
    return network(timm.create_model(name, pretrained=False, exportable=True), normal(1, 3, size, size))


def of_transformers(kind: tuple[str, str, dict[str, Any]], names: Sequence[str], *arguments: Tensor) -> Network:
    """A model of a small configuration."""
    load_torchvision()
    import transformers

    torch.manual_seed(SEED)
    model, configuration, settings = kind
    module = getattr(transformers, model)(getattr(transformers, configuration)(**settings))
    return network(First(module, names), *arguments)


def of_diffusers(kind: str, names: Sequence[str], settings: dict[str, Any], *arguments: Tensor, part: str = "") -> Network:
    """A part of an image generator."""
    import diffusers

    torch.manual_seed(SEED)
    module = getattr(diffusers, kind)(**settings)
    if part:
        return network(Apply(module, lambda model, x: getattr(model, part)(x, return_dict=False)[0]), *arguments)
    return network(First(module, names, return_dict=False), *arguments)


# -- networks written here


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def style_transfer() -> nn.Module:
    """Reflected borders, instance normalisation and upsampling (Johnson et al., 2016)."""

    def block(a: int, b: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        pad = nn.ReflectionPad2d(kernel // 2)
        return [pad, nn.Conv2d(a, b, kernel, stride), nn.InstanceNorm2d(b, affine=True), nn.ReLU()]

    middle = [Residual(*block(128, 128, 3), *block(128, 128, 3)[:3]) for _ in range(3)]
    down = [*block(3, 32, 9), *block(32, 64, 3, 2), *block(64, 128, 3, 2)]
    up = [nn.Upsample(scale_factor=2), *block(128, 64, 3), nn.Upsample(scale_factor=2), *block(64, 32, 3)]
    return nn.Sequential(*down, *middle, *up, nn.ReflectionPad2d(4), nn.Conv2d(32, 3, 9))


def generator_of_images() -> nn.Module:
    """Transposed convolutions from one pixel to 32 (Radford et al., 2015)."""
    layers: list[nn.Module] = []
    for a, b, stride, pad in ((100, 256, 1, 0), (256, 128, 2, 1), (128, 64, 2, 1)):
        layers += [nn.ConvTranspose2d(a, b, 4, stride, pad, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh())


class TextReader(nn.Module):
    """Convolutions, then a recurrent layer in both directions along the line (Shi et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b, pool in ((1, 64, (2, 2)), (64, 128, (2, 2)), (128, 256, (2, 1)), (256, 512, (4, 1))):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(pool)]
        self.image, self.line, self.head = nn.Sequential(*layers), nn.LSTM(512, 128, 2, bidirectional=True), nn.Linear(256, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.image(x).squeeze(2).permute(2, 0, 1))[0])


class Volume(nn.Module):
    """A U-Net over three axes with instance normalisation."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(0.01))

        self.down = nn.ModuleList([block(1, n), block(n, 2 * n), block(2 * n, 4 * n)])
        self.wider = nn.ModuleList([nn.ConvTranspose3d(4 * n, 2 * n, 2, 2), nn.ConvTranspose3d(2 * n, n, 2, 2)])
        self.up, self.head, self.pool = nn.ModuleList([block(4 * n, 2 * n), block(2 * n, n)]), nn.Conv3d(n, 3, 1), nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x)
        b = self.down[1](self.pool(a))
        c = self.up[0](torch.cat([self.wider[0](self.down[2](self.pool(b))), b], 1))
        return self.head(self.up[1](torch.cat([self.wider[1](c), a], 1)))


def builders() -> dict[str, Callable[[], Network]]:
    """How each network is made, by its name."""
    found: dict[str, Callable[[], Network]] = {name: partial(of_torchvision, name, size) for name, size in TORCHVISION.items()}
    found |= {f"timm_{name}": partial(of_timm, name, size) for name, size in TIMM.items()}
    tokens, mask = token_ids(5000, 1, 64), torch.ones(1, 64, dtype=torch.long)
    for table, names, arguments in (
        (TEXT, ("input_ids", "attention_mask"), (tokens, mask)), (LANGUAGE, ("input_ids",), (tokens[:, :32],)),
        (IMAGES, ("pixel_values",), (normal(1, 3, 224, 224),)), (WAVES, ("input_values",), (normal(1, 16000),)),
    ):  # fmt: skip
        found |= {name: partial(of_transformers, kind, names, *arguments) for name, kind in table.items()}
    step = torch.tensor([10])
    unet = {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256, "attention_head_dim": 8}
    decoder = {"block_out_channels": (32, 64, 128), "down_block_types": ("DownEncoderBlock2D",) * 3, "layers_per_block": 1,
               "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4}  # fmt: skip
    latent = normal(1, 4, 32, 32)
    return found | {
        "diffusion_unet": partial(of_diffusers, "UNet2DConditionModel", ("sample", "timestep", "encoder_hidden_states"), unet,
                                  latent, step, normal(1, 16, 256)),
        "vae_decoder": partial(of_diffusers, "AutoencoderKL", (), decoder, latent, part="decode"),
        "style_transfer": lambda: network(style_transfer(), normal(1, 3, 224, 224)),
        "image_generator": lambda: network(generator_of_images(), normal(1, 100, 1, 1)),
        "text_reader": lambda: network(TextReader(), normal(1, 1, 32, 128)),
        "volume": lambda: network(Volume(), normal(1, 1, 32, 32, 32)),
        "video_resnet": lambda: network(load_torchvision().models.video.r3d_18(weights=None), normal(1, 3, 8, 56, 56)),
        "perceptron": lambda: network(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), normal(1, 64)),
    }  # fmt: skip


def main() -> int:
    """Export the chosen networks; 1 if any fails."""
    parser = argparse.ArgumentParser("benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.onnx")
    parser.add_argument("--only", default="", help="comma-separated names; default all")
    arguments = parser.parse_args()
    prepare()
    known = builders()
    names = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown network {unknown[0]}; known: {', '.join(known)}")
    return write({name: known[name] for name in names}, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
