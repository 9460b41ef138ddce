"""`convert` on convolutional networks: what is swapped, folded and fused, and in which format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_models import (
    IMAGE,
    NETWORKS,
    BasicBlock,
    always,
    exact,
    formats,
    network,
    prune,
    run,
    shake,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit.convert import ConvertReport
from sparsekit.nn import FoldedBatchNorm, FusedActivation, SparseConv2d

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def reasons(report: ConvertReport) -> dict[str, str]:
    return {row.layer: row.reason for row in report.rows if row.verdict == "dense"}


def fused(report: ConvertReport) -> dict[str, str]:
    return {row.layer: row.activation for row in report.rows if row.activation}


def batchnorms(model: nn.Module) -> list[str]:
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"fuse": False},
        {},
        {"fuse": False, "fold_batchnorm": True},
        {"fold_batchnorm": True},
        {"fuse": "all", "fold_batchnorm": True},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "default",
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_computes_the_same(name: str, options: dict[str, Any]) -> None:
    model, x = network(name)
    expected = exact(model, x)
    report = always(model, x, **options)
    torch.testing.assert_close(run(model, x), expected)
    depthwise = [row.layer for row in report.rows if "depthwise" in row.reason]
    assert set(report.sparse) == {row.layer for row in report.rows} - set(depthwise)
    assert len(depthwise) == (2 if name == "mobilenet" else 0)
    assert not any("pruned" in row.reason for row in report.rows)
    if options.get("fold_batchnorm"):
        assert batchnorms(model) == []


def test_what_is_fused_where() -> None:
    model, x = network("resnet")
    report = always(copy.deepcopy(model), x)
    assert fused(report) == {}
    report = always(copy.deepcopy(model), x, fold_batchnorm=True)
    first = [f"layer{stage}.{block}.conv1" for stage in (1, 2) for block in (0, 1)]
    assert fused(report) == dict.fromkeys(["stem", *first], "relu")
    assert [row.layer for row in report.rows if not row.batchnorm] == ["head"]
    report = always(model, x, fold_batchnorm=True, fuse="all")
    second = [name.replace("conv1", "conv2") for name in first]
    assert fused(report) == dict.fromkeys(["stem", *first, *second], "relu")
    assert [row.layer for row in report.rows if row.residual] == second
    assert "sparse + batchnorm + residual + relu" in str(report)
    assert isinstance(model.layer1[0].act1, FusedActivation)
    assert isinstance(model.layer1[0].bn2, FoldedBatchNorm)


def test_activations_after_the_folded_normalisation() -> None:
    expected = {"mobilenet": {"relu6"}, "yolo": {"silu"}, "audio": {"gelu", "relu"}}
    for name, activations in expected.items():
        model, x = network(name)
        assert set(fused(always(model, x, fold_batchnorm=True)).values()) == activations


@pytest.mark.parametrize("maker", ["timm", "torchvision"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_networks_of_timm_and_torchvision(maker: str, name: str) -> None:
    torch.manual_seed(0)
    if maker == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model(name.replace("v2", "v2_035"), num_classes=10)
    else:
        models = pytest.importorskip("torchvision.models")
        options = {"width_mult": 0.35} if name == "mobilenetv2" else {}
        model = models.get_model(name.replace("tv2", "t_v2"), num_classes=10, **options)
    model = prune(shake(model)).eval()
    x = IMAGE[:1]
    expected = exact(model, x)
    # Scalar kernels are slow: the small layers are enough.
    small = {row.layer for row in always(copy.deepcopy(model), None).rows}
    small = {each for each in small if model.get_submodule(each).weight.numel() < 100_000}
    patterns = {**dict.fromkeys(small, "2:4"), "*": None}
    report = always(model, x, patterns, fold_batchnorm=True, fuse="all")
    assert batchnorms(model) == []
    assert len(report.sparse) > 10 - 5 * (name == "resnet18")
    assert ("relu" if name == "resnet18" else "relu6") in fused(report).values()
    if name == "resnet18":
        assert any(row.residual for row in report.rows)
    torch.testing.assert_close(run(model, x), expected)


# --- reasons to stay dense --------------------------------------------------------------------


def refused(layer: nn.Module, x: Tensor | None = X) -> str:
    model = nn.Sequential(layer)
    row = always(model, x).rows[0]
    assert row.verdict == "dense"
    assert model[0] is layer
    return row.reason


def test_reasons_that_need_no_run() -> None:
    class Special(nn.Conv2d):
        pass

    def conv(*arguments: Any, **options: Any) -> nn.Conv2d:
        return nn.Conv2d(16, 16, 3, *arguments, **options)

    hooked, patched, mixed = conv(), conv(), conv()
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    mixed.bias.data = mixed.bias.data.bfloat16()
    quantised = conv()
    quantised.weight = nn.Parameter(quantised.weight.data.to(torch.int8), requires_grad=False)
    for layer, says in [
        (conv(groups=16), "it is depthwise (groups == in_channels): stays dense"),
        (parametrizations.weight_norm(conv()), "it is parametrised; call torch.nn"),
        (torch_prune.random_unstructured(conv(), "weight", 0.5), "its weight is computed"),
        (Special(16, 16, 3), "Special, not a plain nn.Conv2d"),
        (hooked, "it has hooks, which would be lost"),
        (patched, "its forward method was replaced"),
        (nn.LazyConv2d(16, 3), "it is an nn.LazyConv2d that has not run yet; run the model once"),
        (nn.LazyLinear(16), "it is an nn.LazyLinear that has not run yet; run the model once"),
    ]:
        assert says in refused(layer), says
    assert refused(mixed, None) == "its bias is torch.bfloat16, its weight torch.float32"
    assert "it is on meta; there are kernels for" in refused(conv(device="meta"), None)
    assert refused(quantised, None) == "it is quantised already (Tensor, torch.int8)"
    assert "torch.float64; there are kernels for" in refused(conv().double(), X.double())


def test_one_input_channel_is_not_depthwise() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3))
    assert always(model, torch.ones(1, 1, 5, 5)).sparse == ["0"]


def test_a_pattern_that_does_not_fit_the_groups() -> None:
    model = nn.Sequential(nn.Conv2d(16, 12, 3, groups=2))
    row = always(model, X, "2:4v4").rows[0]
    assert "decides 4 rows together, a group has 6 output channels" in row.reason
    assert always(model, X, "2:4").sparse == ["0"]


def test_transposed_convolutions_are_not_looked_at() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    assert [row.layer for row in always(model, X).rows] == ["1"]


def test_tied_filters_stay_dense() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    model[1].weight = model[0].weight
    assert reasons(always(model, X)) == {
        "0": "its weight is tied to 1.weight",
        "1": "its weight is tied to 0.weight",
    }


def test_a_shared_convolution_is_swapped_in_all_places() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    model = prune(nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm2d(16))).eval()
    expected = exact(model, X)
    report = always(model, X, fold_batchnorm=True)
    assert report.sparse == ["0"]
    assert model[0] is model[2]
    assert isinstance(model[0], SparseConv2d)
    # What follows one call of it does not follow the other.
    assert fused(report) == {}
    assert batchnorms(model) == ["3"]
    torch.testing.assert_close(run(model, X), expected)


def test_a_weight_that_is_read_stays() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)
            self.bn = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.conv.weight.abs().mean()

    model = Reader().eval()
    expected = run(model, X)
    report = always(model, X, fold_batchnorm=True)
    assert reasons(report) == {"conv": "another module reads its weight directly"}
    assert batchnorms(model) == ["bn"]
    assert torch.equal(run(model, X), expected)


def test_a_layer_that_does_not_run_stays() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(16, 16, 1), "b": nn.Conv2d(16, 16, 1)})
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    assert reasons(always(model, X)) == {"b": "it did not run on the example inputs"}


def test_without_a_pattern_the_zeros_decide() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    for index, pattern in ((1, "2:4"), (2, "bsr8x8@0.5")):
        model[index].weight.data *= sk.mask(model[index].weight, pattern)
    report = always(model, X, None)
    assert [str(row.pattern)[:3] for row in report.rows] == ["Non", "2:4", "bsr"]
    assert reasons(report) == {"0": "it is not pruned (0% zeros)"}


# --- batch normalisation ----------------------------------------------------------------------


def pair(batchnorm: nn.Module | None = None, layer: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layer = layer or nn.Conv2d(16, 16, 3, bias=False)
    model = nn.Sequential(layer, batchnorm or nn.BatchNorm2d(16), nn.ReLU())
    return prune(shake(model)).eval()  # type: ignore[return-value]


def not_folded(model: nn.Sequential, x: Tensor = X) -> str:
    before = copy.deepcopy(model)
    report = always(model, x, fold_batchnorm=True)
    assert not report.rows[0].batchnorm
    assert fused(report) == {}
    torch.testing.assert_close(run(model, x), run(before, x))
    return report.rows[0].reason


def test_folding_is_asked_for() -> None:
    model = pair()
    report = always(model, X)
    assert type(model[1]) is nn.BatchNorm2d
    assert isinstance(model[2], nn.ReLU)
    assert report.rows[0].batchnorm is False


def test_folding_needs_examples() -> None:
    with pytest.raises(ValueError, match="fold_batchnorm=True needs example_inputs"):
        always(pair(), None, fold_batchnorm=True)


def test_reasons_not_to_fold() -> None:
    model = pair()
    model[1].train()
    says = "its batch normalisation '1' is in training mode; call model.eval() first"
    assert says in always(copy.deepcopy(model), X, fold_batchnorm=True).rows[0].reason
    assert "'1' has no running statistics" in not_folded(
        pair(nn.BatchNorm2d(16, track_running_stats=False))
    )
    model = pair()
    model[1].running_var.fill_(-1)
    reason = always(model, X, fold_batchnorm=True).rows[0].reason
    assert "'1' gives weights that are not finite in torch.float32" in reason
    assert type(model[1]) is nn.BatchNorm2d
    hooked = pair()
    hooked[1].register_forward_hook(lambda *_: None)
    assert "batch normalisation" not in not_folded(hooked)


def test_a_tied_bias_forbids_folding() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))
    model[2].bias = model[0].bias
    assert "'1' would change a bias that is tied to 2.bias" in not_folded(
        prune(shake(model)).eval()
    )


def test_a_normalisation_over_something_else_is_not_folded() -> None:
    # Of three dimensions nn.BatchNorm1d takes the second for the channels, nn.Linear the last.
    model = pair(nn.BatchNorm1d(16), nn.Linear(16, 16))
    reason = not_folded(model, torch.randn(2, 16, 16))
    assert "was given inputs whose first dimension does not count examples" in reason
    model = pair(nn.BatchNorm1d(16), nn.Linear(16, 16))
    assert always(model, torch.randn(5, 16), fold_batchnorm=True).rows[0].batchnorm


def test_dense_layers_are_folded_too() -> None:
    model = pair()
    expected, weight = exact(model, X), model[0].weight
    report = always(model, X, {"*": None}, fold_batchnorm=True)
    assert report.rows[0].batchnorm
    assert report.rows[0].reason == "no pattern was given for it"
    assert str(report).splitlines()[2].split()[-9:-6] == ["dense", "+", "batchnorm"]
    assert model[0].weight is weight
    assert model[0].bias.requires_grad
    assert isinstance(model[1], FoldedBatchNorm)
    assert type(model[2]) is nn.ReLU
    torch.testing.assert_close(run(model, X), expected)
    # A second time the activation can follow; nothing is left to fold.
    report = always(model, X, fold_batchnorm=True)
    assert fused(report) == {"0": "relu"}
    torch.testing.assert_close(run(model, X), expected)


@pytest.mark.parametrize(
    "batchnorm", [nn.BatchNorm2d(16, affine=False), nn.SyncBatchNorm(16), nn.BatchNorm2d(16, eps=1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_kinds_of_normalisations(batchnorm: nn.Module, bias: bool) -> None:
    model = pair(copy.deepcopy(batchnorm), nn.Conv2d(16, 16, 3, bias=bias))
    expected = exact(model, X)
    assert fused(always(model, X, fold_batchnorm=True)) == {"0": "relu"}
    torch.testing.assert_close(run(model, X), expected)


def test_ignored_layers_are_not_folded() -> None:
    model = pair()
    assert always(model, X, ignore="0", fold_batchnorm=True).rows == []
    assert type(model[1]) is nn.BatchNorm2d


def test_folding_keeps_zeros_and_the_choice_of_the_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16))
    shake(model).eval()
    kept = sk.mask(model[0].weight, "2:4v4")
    report = always(model, X, "2:4v4", fold_batchnorm=True)
    assert report.rows[0].reason == "pruned by magnitude; not measured (gate='always')" + NCHW
    assert torch.equal(model[0].packed.to_dense() != 0, kept)


NCHW = "; x comes as NCHW, each call converts it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    model = pair().to(dtype)
    before = copy.deepcopy(model)
    always(model, X.to(dtype), {"*": None}, fold_batchnorm=True)
    bn = before[1]
    scale = (bn.running_var.double() + bn.eps).rsqrt() * bn.weight.double()
    expected = before[0].weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(model[0].weight, expected.to(dtype))
    shift = bn.bias.double() - bn.running_mean.double() * scale
    assert torch.equal(model[0].bias, shift.to(dtype))


def test_a_folded_weight_that_overflows_is_left() -> None:
    model = pair().half()
    model[1].running_var.fill_(0)
    model[1].weight.data.fill_(6e4)
    report = always(model, X.half(), {"*": None}, fold_batchnorm=True)
    assert "gives weights that are not finite in torch.float16" in report.rows[0].reason


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: normalise, drop, activate."""

    def __init__(self, channels: int, act: nn.Module, scale: float = 1.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.scale = nn.Identity(), act, scale

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input))) * self.scale


@pytest.mark.parametrize(
    ("act", "name"), [(nn.ReLU6(), "relu6"), (nn.Hardswish(), None), (nn.Identity(), None)]
)
def test_a_normalisation_that_activates(act: nn.Module, name: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), BatchNormAct(16, act))
    prune(shake(model)).eval()
    expected = exact(model, X)
    dense = copy.deepcopy(model)
    report = always(model, X, fold_batchnorm=True)
    assert report.rows[0].batchnorm
    assert report.rows[0].activation == name
    assert isinstance(model[1], FoldedBatchNorm)
    assert isinstance(model[1].act, FusedActivation) == (name is not None)
    torch.testing.assert_close(run(model, X), expected)
    # A layer that stays dense keeps the activation, where it was.
    always(dense, X, {"*": None}, fold_batchnorm=True)
    assert type(dense[1].act) is type(act)
    torch.testing.assert_close(run(dense, X), expected)


def test_a_normalisation_that_does_something_else_is_found_out() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), BatchNormAct(16, nn.ReLU(), 2.0))
    reason = not_folded(prune(shake(model)).eval())
    assert "'1' is a BatchNormAct, which does something else" in reason


class Reused(nn.Module):
    """A batch normalisation that is called twice, or its layer from outside."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: self.bn(self.conv(x)) + self.bn(x),
        lambda self, x: self.bn(self.conv(self.conv(x))),
        lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)),
        lambda self, x: self.bn(self.conv(x) * 2),
    ],
)
def test_what_is_not_proven_is_not_folded(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = shake(Reused(body)).eval()
    before = copy.deepcopy(model)
    assert not always(model, X, {"*": None}, fold_batchnorm=True).rows[0].batchnorm
    assert torch.equal(run(model, X), run(before, X))


def test_a_layer_called_from_outside_its_parent_is_not_folded() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Reused(lambda self, x: self.bn(self.conv(x)))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.conv(x)

    model = shake(Outer()).eval()
    before = copy.deepcopy(model)
    assert not always(model, X, {"*": None}, fold_batchnorm=True).rows[0].batchnorm
    assert torch.equal(run(model, X), run(before, X))


def test_a_chain_may_pass_through_what_does_nothing() -> None:
    conv = nn.Conv2d(16, 16, 1)
    idle = [nn.Identity(), nn.Dropout2d(0.0)]
    model = nn.Sequential(conv, *idle, nn.BatchNorm2d(16), *idle, nn.ReLU())
    prune(shake(model)).eval()
    expected = exact(model, X)
    report = always(model, X, fold_batchnorm=True)
    assert fused(report) == {"0": "relu"}
    torch.testing.assert_close(run(model, X), expected)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Dropout(0.1), nn.ReLU()).eval()
    assert fused(always(model, X)) == {}


def test_a_chain_in_a_list_of_modules() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU()])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    model = prune(shake(Listed())).eval()
    expected = exact(model, X)
    assert fused(always(model, X, fold_batchnorm=True)) == {"parts.0": "silu"}
    torch.testing.assert_close(run(model, X), expected)


def test_a_model_in_training_mode_is_converted_but_not_folded() -> None:
    model = pair().train()
    statistics = model[1].running_mean.clone()
    report = always(model, X, fold_batchnorm=True)
    assert report.sparse == ["0"]
    assert "in training mode" in report.rows[0].reason
    assert [module.training for module in model] == [True] * 3
    assert torch.equal(model[1].running_mean, statistics)
    model(X).sum().backward()
    assert model[1].weight.grad is not None


# --- memory formats ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "yolo"])
@pytest.mark.parametrize("every", [1, 3])
def test_one_conversion_serves_the_whole_network(name: str, every: int) -> None:
    model, x = network(name)
    convs = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    chosen = convs[1::every]
    before = copy.deepcopy(model)
    report = always(model, x, {**dict.fromkeys(chosen, "2:4"), "*": None}, fold_batchnorm=True)
    received = formats(model, x)
    assert [n for n, beside in received.items() if not beside] == [convs[0]]
    # What the report says of each layer is what it gets.
    said = {row.layer: row.inputs[0].endswith("NHWC") for row in report.rows if row.inputs}
    assert said == received
    # Without a sparse convolution nothing changes.
    always(before, x, {"*": None})
    assert not any(formats(before, x).values())


def test_formats_of_1d_convolutions() -> None:
    model, x = network("audio")
    report = always(model, x)
    assert [row.inputs for row in report.rows] == [("2x8x40 NCL",), ("2x16x24 NCL",)]
    single = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1))
    report = always(single, x[0])
    assert [row.inputs for row in report.rows] == [("8x40 CL",), ("8x40 CL",)]
    single = nn.Sequential(nn.Conv1d(8, 8, 1))
    report = always(single, x[0].t().contiguous().t())
    assert [row.inputs for row in report.rows] == [("8x40 LC",)]


def test_dense_weights_change_their_format_only_beside_a_sparse_convolution() -> None:
    model, x = network("resnet")
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    strides = {name: p.stride() for name, p in weights.items()}
    always(model, x, {"head": "2:4", "*": None})
    assert {name: p.stride() for name, p in weights.items()} == strides
    always(model, x, {"layer1.0.conv1": "2:4", "*": None}, ignore="stem")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            assert parameter is weights[name]
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_a_view_of_tied_filters_keeps_its_tie() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
    model[1].weight = nn.Parameter(model[0].weight.data.view(16, 16, 3, 3))
    always(model, X)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert model[0].weight.is_contiguous()


class Flat(nn.Module):
    """Takes a view that only NCHW has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 256))


def test_a_model_that_needs_ncl_keeps_its_convolutions() -> None:
    class Flat1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(-1, 8 * 38)

    report = always(Flat1d(), NETWORKS["audio"][1])
    assert "the model fails where its output is channels_last" in reasons(report)["conv"]


def test_a_model_that_needs_nchw_keeps_its_convolutions() -> None:
    model = Flat().eval()
    before = copy.deepcopy(model)
    report = always(model, X)
    assert report.sparse == ["head"]
    reason = reasons(report)["conv"]
    assert reason.startswith("the model fails where its output is channels_last: view size is not")
    assert model.conv.weight.stride() == before.conv.weight.stride()
    assert run(model, X).shape == run(before, X).shape


def test_layers_are_ordinary_again_when_the_example_fails() -> None:
    model, _ = network("resnet")
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        always(model, X)
    assert repr(model) == repr(before)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert old.stride() == new.stride(), name
    torch.testing.assert_close(run(model, IMAGE), run(before, IMAGE))


# --- the model afterwards ---------------------------------------------------------------------


def test_a_converted_network_compiles_and_learns() -> None:
    torch._dynamo.reset()
    model, x = network("mobilenet")
    always(model, x, fold_batchnorm=True, fuse="all")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, x), run(model, x))
    model(x).sum().backward()
    assert model.stem[0].bias.grad is not None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="fuse must be True, False or 'all', got 'some'"):
        always(BasicBlock(16, 16), X, fuse="some")
