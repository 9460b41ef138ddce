"""The one list of layer shapes the benchmarks run: layers of models people deploy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer, `y[m, n] = x[m, k] · W[n, k]ᵀ`, at the batch sizes it meets in practice.

    Attributes:
        model: The model it belongs to.
        layer: Its role there.
        n: out_features.
        k: in_features.
        rows: Values of m: tokens, or pixels for a 1x1 convolution.
        quick: Part of the short run.
    """

    model: str
    layer: str
    n: int
    k: int
    rows: tuple[int, ...]
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}.{self.layer}"


SHAPES = (
    Shape("minilm", "attention", 384, 384, (128, 4096)),
    Shape("minilm", "up", 1536, 384, (128, 4096), quick=True),
    Shape("minilm", "down", 384, 1536, (128, 4096)),
    Shape("bert-base", "attention", 768, 768, (128, 1024)),
    Shape("bert-base", "up", 3072, 768, (128, 1024), quick=True),
    Shape("bert-base", "down", 768, 3072, (128, 1024)),
    Shape("vit-b", "qkv", 2304, 768, (197, 1576)),
    Shape("vit-b", "up", 3072, 768, (197, 1576)),
    Shape("llama-8b", "qkv", 6144, 4096, (1, 256)),
    Shape("llama-8b", "up", 14336, 4096, (1, 256)),
    Shape("llama-8b", "down", 4096, 14336, (1, 256)),
    Shape("resnet-50", "layer1.conv3", 256, 64, (3136,)),
    Shape("resnet-50", "layer2.conv3", 512, 128, (784,)),
    Shape("resnet-50", "layer3.conv1", 256, 1024, (196,)),
    Shape("resnet-50", "layer4.conv3", 2048, 512, (49,), quick=True),
    Shape("reference", "wide", 4096, 1024, (1, 256), quick=True),
)
