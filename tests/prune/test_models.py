"""Pruning real architectures, small and untrained: BERT, Llama and a ViT."""

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from sparsekit.patterns import NM
from sparsekit.prune import prune


def bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return transformers.BertModel(config), tokens(), "encoder.*"


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config), tokens(), None


def vit():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=5)
    make = torch.Generator().manual_seed(0)
    return model, [torch.randn(100, 3, 32, 32, generator=make) for _ in range(2)], None


def tokens():
    make = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = 0
    return [
        {"input_ids": torch.randint(50, (4, 9), generator=make), "attention_mask": mask}
        for _ in range(3)
    ]


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_played_back_blocks_give_what_recomputed_ones_give(make):
    torch.manual_seed(0)
    model, batches, targets = make()
    copied = copy.deepcopy(model)
    options = {"method": "sparsegpt", "targets": targets, "calibration": batches, "progress": False}
    report = prune(model, "2:4", **options)
    recomputed = prune(copied, "2:4", cache_bytes=0, **options)
    assert report.masks.keys() == recomputed.masks.keys()
    for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    dense = {"lm_head"} if make is llama else {"pooler.dense"} if make is bert else set()
    assert report.masks.keys() == set(linears) - dense
    for name in report.masks:
        assert NM(2, 4).fits(model.get_submodule(name).weight != 0)


def test_the_report_says_why_a_tied_head_stays_dense():
    model, batches, _ = llama()
    report = prune(model, "2:4", "wanda", calibration=batches, progress=False)
    (head,) = [layer for layer in report.layers if layer.name == "lm_head"]
    assert head.pattern is None
    assert "tied to Embedding 'model.embed_tokens'" in head.reason
