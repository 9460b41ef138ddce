"""`SparseConv2d` and `SparseConv1d` in everything torch does with modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import SparseConv1d, SparseConv2d, SparseLinear
from sparsekit.workload import activate

LAYERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "3x3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride": (nn.Conv2d, {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0)}),
    "same": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "dilation": 2, "bias": False}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "uneven circular": (
        nn.Conv2d,
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    ),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "1x1 stride": (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "1d replicate": (
        nn.Conv1d,
        {"kernel_size": 5, "padding": 2, "padding_mode": "replicate", "stride": 2, "groups": 2},
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_pattern = pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.75"])


def dense(name: str = "3x3", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kind, options = LAYERS[name]
    return kind(32, 32, **options)


def sparse(
    name: str = "3x3", pattern: str = "2:4", activation: str | None = None, seed: int = 0
) -> SparseConv2d | SparseConv1d:
    layer = dense(name, seed)
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseConv1d
    return kind.from_dense(layer, pattern, activation=activation)


def x(name: str = "3x3", batch: int = 2) -> Tensor:
    size = (9,) if name.startswith("1d") else (7, 9)
    return torch.randn(batch, 32, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_layer
@each_pattern
def test_from_dense_and_back(name: str, pattern: str) -> None:
    layer = dense(name).eval()
    layer.weight.data *= sk.mask(layer.weight, pattern)
    module = type(sparse(name)).from_dense(layer, pattern)
    assert not module.training
    back = module.to_dense()
    assert type(back) is type(layer)
    assert repr(back) == repr(layer)
    assert torch.equal(back.weight, layer.weight)
    assert (back.bias is None) == (layer.bias is None) == (module.bias is None)
    if layer.bias is not None:
        assert torch.equal(back.bias, layer.bias)
        assert module.bias is not layer.bias
    for batch in (x(name), x(name).contiguous(), x(name)[0]):
        torch.testing.assert_close(module(batch), layer(batch), rtol=1e-4, atol=1e-5)


def test_from_dense_takes_a_mask() -> None:
    layer = dense()
    mask = sk.mask(torch.rand(32, 32, 3, 3), "2:4")
    module = SparseConv2d.from_dense(layer, "2:4", mask)
    assert torch.equal(module.packed.to_dense(), layer.weight.detach() * mask)


@each_layer
def test_activation_and_residual(name: str) -> None:
    module, plain = sparse(name, activation="relu6"), sparse(name)
    y = plain(x(name))
    residual = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(module(x(name)), activate(y, "relu6"))
    torch.testing.assert_close(module(x(name), residual), activate(y, "relu6") + residual)
    first = module(x(name), residual, residual_first=True)
    torch.testing.assert_close(first, activate(y + residual, "relu6"))


def test_wrong_arguments_are_refused() -> None:
    packed = sk.pack(torch.ones(8, 4, 3, 3), "2:4")
    with pytest.raises(ValueError, match="SparseConv2d: unknown activation 'elu'"):
        SparseConv2d(packed, activation="elu")
    with pytest.raises(ValueError, match=r"SparseConv2d: expected a bias of shape \[8\]"):
        SparseConv2d(packed, torch.zeros(4))
    with pytest.raises(ValueError, match="SparseConv2d: expected padding_mode to be one of"):
        SparseConv2d(packed, padding_mode="mirror")
    with pytest.raises(ValueError, match="conv2d: expected padding as one number or two"):
        SparseConv2d(packed, padding=-1)
    with pytest.raises(ValueError, match="SparseConv1d: expected a weight packed from a conv1d"):
        SparseConv1d(packed)
    with pytest.raises(ValueError, match="SparseConv2d: expected a weight packed from a conv2d"):
        SparseConv2d(sk.pack(torch.ones(8, 4), "2:4"))
    with pytest.raises(ValueError, match=r"SparseLinear: .* use SparseConv2d"):
        SparseLinear(packed)
    with pytest.raises(ValueError, match="a depthwise convolution"):
        SparseConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=8))
    for kind, layer in (
        (SparseConv2d, nn.ConvTranspose2d(8, 8, 3)),
        (SparseConv1d, nn.Conv2d(8, 8, 3)),
        (SparseConv2d, nn.Linear(8, 8)),
    ):
        with pytest.raises(
            ValueError, match=f"expected an nn.Conv.d, got a {type(layer).__name__}"
        ):
            kind.from_dense(layer)
    with pytest.raises(ValueError, match="conv2d: x has 5 channels"):
        SparseConv2d(packed)(torch.zeros(1, 5, 4, 4))


def test_repr_names_everything() -> None:
    text = repr(sparse("reflect", "2:4v4", "gelu"))
    for part in ("32, 32, kernel_size=(3, 3)", "padding=(1, 1)", "reflect", "2:4v4", "=gelu"):
        assert part in text
    assert "activation" not in repr(sparse())


# --- state_dict, copies, dtypes ---------------------------------------------------------------


@each_layer
@each_pattern
def test_state_dict_is_canonical_and_loads(name: str, pattern: str) -> None:
    one, other = sparse(name, pattern, seed=0), sparse(name, pattern, seed=1)
    state = one.state_dict()
    canonical = one.packed.canonical()
    assert torch.equal(state["values"], canonical.values)
    assert "packed_data" not in state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert not torch.equal(one(x(name)), other(x(name)))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(one(x(name)), other(x(name)))


def test_state_dict_of_other_filters_is_refused() -> None:
    layer = sparse("groups")
    before = layer.packed.to_dense()
    with pytest.raises(RuntimeError, match="While loading values"):
        layer.load_state_dict(sparse("3x3").state_dict())
    with pytest.raises(RuntimeError, match="SparseConv2d: expected floating-point values"):
        layer.load_state_dict({**layer.state_dict(), "values": layer.state_dict()["values"].int()})
    assert torch.equal(layer.packed.to_dense(), before)


@each_layer
@each_pattern
def test_deepcopy_and_pickle(name: str, pattern: str) -> None:
    layer = sparse(name, pattern, "gelu").eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x(name)), layer(x(name)))
        assert other.packed_data.data_ptr() != layer.packed_data.data_ptr()
        assert not other.training
        assert repr(other) == repr(layer)


@each_layer
def test_dtypes_and_devices(name: str) -> None:
    half = sparse(name).to(torch.bfloat16)
    assert half(x(name).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.packed.to_dense(), sparse(name).packed.to_dense().bfloat16())
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        sparse(name).double()
    assert sparse(name).to("meta")(x(name).to("meta")).shape == sparse(name)(x(name)).shape
    last = sparse("3x3").to(memory_format=torch.channels_last)  # a hint for weights of 4 dimensions
    assert torch.equal(last(x()), sparse("3x3")(x()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(x(name)), half(x(name).bfloat16()))


# --- graphs -----------------------------------------------------------------------------------


class Block(nn.Module):
    """What residual networks are made of."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.one = sparse("3x3", pattern, "relu")
        self.two = sparse("3x3", pattern, "relu", seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x), x, residual_first=True)
        return nn.functional.silu(y, inplace=True)


@pytest.mark.parametrize(
    ("pattern", "backend"), [("2:4", "inductor"), ("bsr16x16@0.75", "aot_eager")]
)
def test_compile_fullgraph_forward_and_backward(pattern: str, backend: str) -> None:
    torch._dynamo.reset()
    model = Block(pattern)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3, 5):  # the second and third make the batch size dynamic
        inputs = x(batch=batch)
        if batch == 3:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        one, two = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        y, expected = compiled(one), model(two)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@each_layer
def test_every_layer_compiles_and_exports(name: str) -> None:
    torch._dynamo.reset()
    layer = sparse(name, activation="silu").eval()
    with torch.no_grad():
        expected = layer(x(name))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x(name)), expected)
        assert torch.equal(torch.export.export(layer, (x(name),)).module()(x(name)), expected)


def test_export_save_and_load() -> None:
    model = nn.Sequential(Block("2:4"), nn.Conv2d(32, 4, 1)).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 3: torch.export.Dim("width", max=64)}
    program = torch.export.export(model, (x(),), dynamic_shapes=({**sizes},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("sparsekit.conv2d.default") == 2
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for inputs in (x(), x(batch=5), torch.randn(1, 32, 7, 12)):
        torch.testing.assert_close(loaded(inputs), model(inputs))


def test_fx_trace_keeps_the_layers() -> None:
    model = nn.Sequential(sparse(), nn.ReLU(), sparse("groups"))
    traced = torch.fx.symbolic_trace(model)
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(x()), model(x()))
