"""`convert` on real models: what is swapped, what stays dense and why, what is fused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sparsekit as sk
from sparsekit import gate
from sparsekit.convert import ConvertReport
from sparsekit.gate import Verdict
from sparsekit.nn import FusedActivation, PackedModule
from sparsekit.nn.fusion import activation_name
from sparsekit.workload import LinearWorkload, activate


def always(model: nn.Module, inputs: Any, pattern: Any = "2:4", **options: Any) -> ConvertReport:
    return sk.convert(
        model, pattern, example_inputs=inputs, gate="always", progress=False, **options
    )


def reasons(report: ConvertReport) -> dict[str, str]:
    return {row.layer: row.reason for row in report.rows if row.verdict == "dense"}


def fused(report: ConvertReport) -> dict[str, str]:
    return {row.layer: row.activation for row in report.rows if row.activation}


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        y = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return y if isinstance(y, Tensor) else y[0]


def check_same(model: nn.Module, before: nn.Module, inputs: Any) -> None:
    """The converted model computes what the old one does with the pruned weights."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            before.get_submodule(name).weight.data.copy_(module.packed.to_dense())
    torch.testing.assert_close(run(model, inputs), run(before, inputs))


def judged(monkeypatch: pytest.MonkeyPatch, speedup: Callable[[int], float]) -> list[int]:
    """Replaces the measurement: the speed-up is a function of m."""
    seen: list[int] = []

    def fake(workload: LinearWorkload) -> Verdict:
        seen.append(workload.m)
        ratio = speedup(workload.m)
        return Verdict(ratio, 1.0, ratio, "oneDNN", "kernel")

    monkeypatch.setattr(gate, "measure", fake)
    return seen


# --- real models ------------------------------------------------------------------------------


def bert(head: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
    )
    kind = transformers.BertForMaskedLM if head else transformers.BertModel
    return kind(config).eval()


TOKENS = {"input_ids": torch.arange(18).view(2, 9)}


def test_bert() -> None:
    model = bert()
    before = copy.deepcopy(model)
    report = always(model, TOKENS)
    assert len(report.sparse) == len(report.rows) == 13
    assert fused(report) == {f"encoder.layer.{i}.intermediate.dense": "gelu" for i in range(2)}
    check_same(model, before, TOKENS)
    row = next(row for row in report.rows if row.layer == "encoder.layer.0.output.dense")
    assert row.m == (18,)


def test_bert_with_a_tied_head() -> None:
    model = bert(head=True)
    before = copy.deepcopy(model)
    report = always(model, TOKENS)
    assert reasons(report) == {
        "cls.predictions.decoder": "its weight is tied to bert.embeddings.word_embeddings.weight"
    }
    assert fused(report)["cls.predictions.transform.dense"] == "gelu"
    check_same(model, before, TOKENS)


def test_bert_with_per_layer_patterns() -> None:
    model = bert()
    report = always(
        model,
        TOKENS,
        {"encoder.*.intermediate.dense": "2:4", "re:.*attention.*": "bsr16x16@0.75", "*": None},
    )
    patterns = {row.layer: row.pattern for row in report.rows}
    assert patterns["encoder.layer.0.intermediate.dense"] == "2:4"
    assert patterns["encoder.layer.1.attention.self.query"] == "bsr16x16@0.75"
    assert reasons(report)["pooler.dense"] == "no pattern was given for it"


def test_vit() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=4, num_classes=10, img_size=32
    ).eval()
    before, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    report = always(model, x)
    assert len(report.sparse) == len(report.rows) == 10
    assert "patch_embed.proj" in report.sparse
    assert fused(report) == {f"blocks.{i}.mlp.fc1": "gelu" for i in range(2)}
    check_same(model, before, x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_keeps_its_fast_path(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    x = torch.randn(3, 5, 64)
    expected = run(model.eval(), x)
    report = always(model, x)
    assert report.sparse == []
    for name, reason in reasons(report).items():
        if name.endswith("out_proj"):
            assert "nn.MultiheadAttention reads its weight" in reason
        else:
            assert "fused path of nn.TransformerEncoderLayer reads its weight" in reason
    assert torch.equal(run(model, x), expected)
    model.train()(x).sum().backward()
    assert model.layers[0].linear1.weight.grad is not None


def test_transformer_decoder_layer_is_converted_but_for_its_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True).eval()
    before = copy.deepcopy(model)
    inputs = {"tgt": torch.randn(2, 5, 64), "memory": torch.randn(2, 5, 64)}
    report = always(model, inputs)
    assert report.sparse == ["linear1", "linear2"]
    check_same(model, before, inputs)


def test_t5_reads_a_weight() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=64, d_ff=128, num_layers=1, num_heads=4, d_kv=16, vocab_size=100
    )
    model = transformers.T5EncoderModel(config).eval()
    report = always(model, TOKENS)
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert reasons(report) == {name: "another module reads its weight directly"}
    assert type(model.get_submodule(name)) is nn.Linear
    run(model, TOKENS)


def test_a_converted_model_compiles() -> None:
    torch._dynamo.reset()
    model = bert()
    always(model, TOKENS)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run(compiled, TOKENS), run(model, TOKENS))


# --- fusion -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A parent whose forward is given."""

    def __init__(self, forward: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 32)
        self.act = act or nn.ReLU()
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


X = torch.linspace(-1, 1, 96).view(3, 32)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU6(), "relu6"),
    ],
)
def test_activations_that_fuse(act: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 48), act, nn.Dropout(), nn.Linear(48, 32)).eval()
    before = copy.deepcopy(model)
    report = always(model, X)
    assert fused(report) == {"0": name}
    assert isinstance(model[1], FusedActivation)
    assert not model[1].training
    check_same(model, before, X)


@pytest.mark.parametrize(
    "act", [nn.Tanh(), nn.LeakyReLU(), nn.Hardtanh(), nn.Identity(), nn.Softmax(-1)]
)
def test_other_activations_stay(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(32, 32), act)
    assert fused(always(model, X)) == {}
    assert model[1] is act


def test_a_subclass_is_no_known_activation() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    assert activation_name(Shifted()) is None
    assert fused(always(nn.Sequential(nn.Linear(32, 32), Shifted()), X)) == {}


def test_activations_of_transformers_and_timm() -> None:
    hf = pytest.importorskip("transformers.activations")
    timm = pytest.importorskip("timm.layers.activations")
    x = torch.linspace(-6, 6, 1000)
    for module, name in [
        (hf.GELUActivation(), "gelu"),
        (hf.GELUActivation(use_gelu_python=True), None),
        (hf.GELUTanh(), "gelu_tanh"),
        (hf.GELUTanh(use_gelu_tanh_python=True), None),
        (hf.SiLUActivation(), "silu"),
        (hf.QuickGELUActivation(), None),
        (timm.GELU(), "gelu"),
        (timm.GELUTanh(), "gelu_tanh"),
        (timm.Swish(), "silu"),
        (timm.QuickGELU(), None),
    ]:
        assert activation_name(module) == name
        if name:
            torch.testing.assert_close(module(x), activate(x, name))


def test_an_activation_with_a_replaced_forward_is_not_fused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model[1].forward = torch.tanh  # type: ignore[method-assign]
    assert fused(always(model, X)) == {}


def uses_output_twice(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return self.act(h) + h


def calls_layer_twice(self: Any, x: Tensor) -> Tensor:
    return self.act(self.fc(self.fc(x)))


def calls_activation_twice(self: Any, x: Tensor) -> Tensor:
    return self.act(self.act(x) + self.fc(x)) + self.act(self.fc(x))


def asks_for_the_type(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return self.act(h) + h if isinstance(x, Tensor) else self.act(h)


def something_between(self: Any, x: Tensor) -> Tensor:
    return self.act(self.fc(x) * 2)


def depends_on_training(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return self.act(h) + h if self.training else self.act(h)


def depends_on_values(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return self.act(h) if h.sum() > -1e9 else h


def reaches_outside_the_graph(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return self.act(h) + float(h.detach().sum()) * 0


def plain(self: Any, x: Tensor) -> Tensor:
    return self.act(self.fc(x))


@pytest.mark.parametrize(
    "forward",
    [
        uses_output_twice,
        calls_layer_twice,
        calls_activation_twice,
        something_between,
        asks_for_the_type,
        depends_on_training,
        depends_on_values,
        reaches_outside_the_graph,
    ],
)
def test_what_is_not_proven_is_not_fused(forward: Callable[..., Tensor]) -> None:
    model = Block(forward).eval()
    before = copy.deepcopy(model)
    assert fused(always(model, X)) == {}
    assert isinstance(model.act, nn.ReLU)
    check_same(model, before, X)


def test_a_plain_parent_is_fused_and_restored_after_tracing() -> None:
    model = Block(plain)
    state = dict(model.__dict__)
    before = copy.deepcopy(model)
    report = always(model, X)
    assert fused(report) == {"fc": "relu"}
    assert model.__dict__.keys() == state.keys()
    assert model.training
    check_same(model.eval(), before.eval(), X)


def test_optional_arguments_forbid_fusion() -> None:
    class Optional(Block):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            h = self.fc(x)
            return self.act(h) if residual is not None else self.act(h) + h

    assert fused(always(Optional(plain), X)) == {}


def test_a_layer_called_from_outside_its_parent_is_not_fused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(plain)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block.fc(x)

    model = Outer().eval()
    before = copy.deepcopy(model)
    assert fused(always(model, X)) == {}
    check_same(model, before, X)


def test_a_shared_activation_is_not_fused() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(32, 32), act, nn.Linear(32, 32), act)
    assert fused(always(model, X)) == {}


def test_a_hooked_activation_is_not_fused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    assert fused(always(model, X)) == {}


def test_a_replaced_forward_is_not_fused() -> None:
    model = Block(plain)
    model.forward = lambda x: uses_output_twice(model, x)  # type: ignore[method-assign]
    assert fused(always(model, X)) == {}


def test_fusion_can_be_switched_off_and_needs_examples() -> None:
    assert fused(always(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), X, fuse=False)) == {}
    assert fused(always(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), None)) == {}


# --- reasons to stay dense --------------------------------------------------------------------


def refused(layer: nn.Module, **options: Any) -> str:
    """The reason for one layer inside a model."""
    model = nn.Sequential(layer)
    report = always(model, X, **options)
    assert model[0] is layer
    assert [row.verdict for row in report.rows] == ["dense"]
    return report.rows[0].reason


def test_reasons_that_need_no_run() -> None:
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(32, 32)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for layer, says in [
        (parametrizations.weight_norm(nn.Linear(32, 32)), "it is parametrised; call torch.nn"),
        (prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5), "its weight is computed"),
        (Special(32, 32), "Special, not a plain nn.Linear"),
        (hooked, "it has hooks, which would be lost"),
        (patched, "its forward method was replaced"),
    ]:
        assert says in refused(layer)
    mixed = nn.Sequential(nn.Linear(32, 32))
    mixed[0].bias.data = mixed[0].bias.data.bfloat16()
    reason = always(mixed, None).rows[0].reason
    assert reason == "its bias is torch.bfloat16, its weight torch.float32"
    model = nn.Sequential(nn.Linear(32, 32).double())
    assert "torch.float64; there are kernels for" in always(model, X.double()).rows[0].reason


def test_a_quantised_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    report = always(model, None)
    assert report.rows[0].reason == "it is quantised already (Tensor, torch.int8)"


def test_the_model_itself_cannot_be_swapped_in_place() -> None:
    report = always(nn.Linear(32, 32), X)
    assert "it is the model itself; use SparseLinear.from_dense" in report.rows[0].reason
    report = always(nn.Conv2d(8, 8, 3), torch.ones(1, 8, 4, 4))
    assert "it is the model itself; use SparseConv2d.from_dense" in report.rows[0].reason


def test_a_layer_that_does_not_run_stays() -> None:
    model = Block(lambda self, x: self.act(x))
    assert reasons(always(model, X)) == {"fc": "it did not run on the example inputs"}
    assert always(Block(lambda self, x: self.act(x)), None).sparse == ["fc"]


def test_without_a_pattern_the_zeros_decide() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model[1].weight.data *= sk.mask(model[1].weight, "2:4v4")
    model[2].weight.data *= torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) > 0.6
    model[3].weight.data *= sk.mask(model[3].weight, "bsr16x16@0.75")
    before = copy.deepcopy(model)
    report = always(model, torch.randn(3, 64), None)
    assert report.sparse == ["1", "3"]
    assert [row.pattern for row in report.rows] == [None, "2:4v4", None, "bsr16x16@0.75"]
    assert reasons(report)["0"] == "it is not pruned (0% zeros)"
    assert "follow no pattern" in reasons(report)["2"]
    # Nothing was pruned, so nothing changes.
    torch.testing.assert_close(run(model, torch.ones(2, 64)), run(before, torch.ones(2, 64)))
    assert not any("pruned by magnitude" in row.reason for row in report.rows)


def test_with_a_pattern_pruning_is_said() -> None:
    report = always(nn.Sequential(nn.Linear(32, 32)), X)
    assert report.rows[0].reason == "pruned by magnitude; not measured (gate='always')"


def test_targets_and_ignore() -> None:
    def names(**options: Any) -> list[str]:
        model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
        return [row.layer for row in always(model, None, **options).rows]

    assert names(targets="a") == ["a"]
    assert names(ignore="re:a|c") == ["b"]
    with pytest.raises(ValueError, match="targets: 'c' matches no layer"):
        names(targets="c")
    with pytest.raises(ValueError, match="convert: pattern: 'c' matches no layer"):
        names(pattern={"c": "2:4"})


# --- the gate ---------------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))


def test_a_layer_that_wins_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda m: 2.0)
    model = two_layers()
    report = sk.convert(model, "2:4", X, progress=False)
    assert report.sparse == ["0", "2"]
    row = report.rows[0]
    assert (row.dense_ms, row.sparse_ms, row.speedup) == (2.0, 1.0, 2.0)
    assert row.reason == "pruned by magnitude; 2.00x of dense (oneDNN)"
    assert row.activation == "relu"


def test_a_layer_that_loses_stays_dense_with_its_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged(monkeypatch, lambda m: 1.04)
    model = two_layers()
    weights = [model[0].weight, model[2].weight]
    report = sk.convert(model, "2:4", X, progress=False)
    assert report.sparse == []
    assert report.rows[0].reason == "1.04x of dense (oneDNN), less than 1.05x"
    assert report.rows[0].speedup == 1.04
    assert isinstance(model[1], nn.ReLU)
    assert model[0].weight is weights[0]
    assert model[2].weight is weights[1]


def test_every_shape_seen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = judged(monkeypatch, lambda m: 3.0 if m > 4 else 0.9)
    report = sk.convert(two_layers(), "2:4", [X, torch.ones(2, 4, 32)], progress=False)
    assert set(seen) == {3, 8}
    assert report.rows[0].m == (3, 8)
    assert report.rows[0].reason == "slower than dense at m=3 (0.90x)"
    assert report.sparse == []


def test_times_are_weighted_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda m: float(m))
    model = two_layers()
    report = sk.convert(model, "2:4", [X, X, torch.ones(5, 32)], progress=False)
    row = report.rows[0]
    assert (row.dense_ms, row.sparse_ms) == (2 * 3.0 + 5.0, 3.0)
    assert row.speedup == 11 / 3


def test_a_fault_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Verdict(9.0, 1.0, 9.0, "torch", "kernel", "the sparse result differs")
    monkeypatch.setattr(gate, "measure", lambda *_: broken)
    report = sk.convert(two_layers(), "2:4", X, progress=False)
    assert set(reasons(report).values()) == {"the sparse result differs"}


def test_no_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Verdict:
        raise NotImplementedError("kernel x: needs another CPU")

    monkeypatch.setattr(gate, "measure", none)
    report = sk.convert(two_layers(), "2:4", X, progress=False)
    assert set(reasons(report).values()) == {"kernel x: needs another CPU"}


def test_measured_for_real_every_swap_is_a_win() -> None:
    report = sk.convert(two_layers(), "2:4", X, progress=False)
    for row in report.rows:
        assert row.speedup is not None
        assert (row.verdict == "sparse") == (row.speedup >= gate.MIN_SPEEDUP)


# --- the call and the report ------------------------------------------------------------------


def test_modes_and_random_state_are_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 8))
    model[1].eval()
    statistics = model[1].running_mean.clone()
    always(model, X)
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, statistics)


def test_layers_are_ordinary_again_when_the_example_fails() -> None:
    model = two_layers()
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        always(model, torch.ones(2, 7))
    assert type(model[0]) is nn.Linear
    assert not model[1]._forward_pre_hooks
    assert model.training
    assert run(model, X).shape == (3, 32)


@pytest.mark.parametrize("inputs", [X, (X,), {"input": X}, [X, (X,), {"input": X}]])
def test_forms_of_example_inputs(inputs: Any) -> None:
    report = always(two_layers(), inputs)
    assert set(report.rows[0].m) == {3}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="gate must be 'measure' or 'always', got 'maybe'"):
        sk.convert(two_layers(), "2:4", X, gate="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate='measure' needs example_inputs"):
        sk.convert(two_layers(), "2:4")
    with pytest.raises(ValueError, match="expected a Pattern or a spelling"):
        always(two_layers(), X, "2-4")


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes() -> None:
    model = two_layers()
    model[2].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer '2': the weight is nan at row 1, column 2"):
        always(model, X)
    assert type(model[0]) is nn.Linear


def test_report() -> None:
    report = always(two_layers(), X)
    text = str(report)
    assert text.splitlines()[0].split()[:3] == ["layer", "pattern", "kernel"]
    assert "sparse + relu" in text
    assert text.endswith("2 of 2 layers are sparse")
    rows = json.loads(report.to_json())
    assert [row["layer"] for row in rows] == ["0", "2"]
    assert rows[0]["activation"] == "relu"
    assert rows[0]["m"] == [3]


def test_biases_stay_the_parameters_they_were() -> None:
    model = two_layers()
    biases = [model[0].bias, model[2].bias]
    model[0].bias.requires_grad_(False)
    always(model, X)
    assert [model[0].bias is biases[0], model[2].bias is biases[1]] == [True, True]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.bias"]


def test_converting_twice_is_harmless() -> None:
    model = two_layers()
    always(model, X)
    text = repr(model)
    assert always(model, X).rows == []
    assert repr(model) == text
