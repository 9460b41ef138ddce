"""`SparseLinear` in everything torch does with modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import _native
from sparsekit.nn import SparseLinear
from sparsekit.testing import assert_matmul_close

PATTERNS = ["2:4", "2:4v4", "bsr16x16@0.75"]


def dense(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(70, 33, bias=bias)


def sparse(pattern: str = "2:4", activation: str | None = None, seed: int = 0) -> SparseLinear:
    return SparseLinear.from_dense(dense(seed=seed), pattern, activation=activation)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5,)), 70, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_dense_and_back(pattern: str, bias: bool) -> None:
    linear = dense(bias).eval()
    linear.weight.data *= sk.mask(linear.weight, pattern)
    layer = SparseLinear.from_dense(linear, pattern)
    assert not layer.training
    assert layer.packed.pattern == sk.parse_pattern(pattern)
    back = layer.to_dense()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert (back.bias is None) == (not bias)
    if bias:
        assert torch.equal(back.bias, linear.bias)
        assert layer.bias is not linear.bias
    assert_matmul_close(layer(x(2, 3)), x(2, 3), linear.weight, linear.bias)


def test_from_dense_takes_a_mask() -> None:
    linear = dense()
    mask = sk.mask(torch.rand(33, 70), "2:4")
    layer = SparseLinear.from_dense(linear, "2:4", mask)
    assert torch.equal(layer.packed.to_dense(), linear.weight.detach() * mask)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_and_residual(activation: str) -> None:
    layer = sparse(activation=activation)
    residual = torch.randn(5, 33, generator=torch.Generator().manual_seed(2))
    weight = layer.packed.to_dense()
    assert_matmul_close(layer(x()), x(), weight, layer.bias, activation)
    assert_matmul_close(
        layer(x(), residual=residual), x(), weight, layer.bias, activation, residual
    )


def test_wrong_arguments_are_refused() -> None:
    packed = sk.pack(torch.eye(8), "2:4")
    with pytest.raises(ValueError, match="SparseLinear: unknown activation 'elu'"):
        SparseLinear(packed, activation="elu")
    with pytest.raises(
        ValueError, match=r"bias of shape \[8\] and dtype torch\.float32, got \[4\]"
    ):
        SparseLinear(packed, torch.zeros(4))
    with pytest.raises(ValueError, match=r"and torch\.float16"):
        SparseLinear(packed, torch.zeros(8).half())
    with pytest.raises(ValueError, match="x has k=7"):
        SparseLinear(packed)(torch.zeros(1, 7))


def test_repr_names_everything() -> None:
    text = repr(sparse("2:4v4", "gelu"))
    for part in ("in_features=70", "out_features=33", "pattern=2:4v4", "activation=gelu"):
        assert part in text
    assert "activation" not in repr(sparse())


# --- state_dict -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_dict_is_canonical_and_loads(pattern: str) -> None:
    model, other = (nn.Sequential(sparse(pattern, seed=seed), nn.ReLU()) for seed in (0, 1))
    state = model.state_dict()
    names = {"0.bias", "0.values", "0.indices"}
    assert set(state) == names | ({"0.crow_indices"} if "bsr" in pattern else set())
    canonical = model[0].packed.canonical()
    assert torch.equal(state["0.values"], canonical.values)
    assert not torch.equal(model(x()), other(x()))
    other.load_state_dict(state)
    assert torch.equal(model(x()), other(x()))


def test_state_dict_loads_into_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    state = sparse(seed=0).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(_native, "default_format", lambda *_: "nm")
        other = sparse(seed=1)
        other.load_state_dict(state)
        assert other.packed.format == "nm"
    assert torch.equal(other.packed.to_dense(), sparse(seed=0).packed.to_dense())


def test_state_dict_survives_torch_save() -> None:
    buffer = io.BytesIO()
    torch.save(sparse(seed=0).state_dict(), buffer)
    buffer.seek(0)
    other = sparse(seed=1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x()), sparse(seed=0)(x()))


def test_state_dict_converts_to_the_module_dtype() -> None:
    other = sparse(seed=1).to(torch.bfloat16)
    other.load_state_dict(sparse(seed=0).state_dict())
    assert other.packed.dtype == torch.bfloat16
    assert torch.equal(other.packed.to_dense(), sparse(seed=0).packed.to_dense().bfloat16())


def test_state_dict_that_does_not_fit_is_refused() -> None:
    layer = sparse()
    before = layer(x())
    state = layer.state_dict()
    missing = {key: value for key, value in state.items() if key != "indices"}
    with pytest.raises(RuntimeError, match=r"Missing key.*indices"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        layer.load_state_dict({**state, "weight": torch.zeros(33, 70)})
    with pytest.raises(RuntimeError, match="values"):
        layer.load_state_dict({**state, "values": state["values"][:, :-1]})
    with pytest.raises(RuntimeError, match="expected floating-point values"):
        layer.load_state_dict({**state, "values": state["values"].long()})
    with pytest.raises(RuntimeError, match="NaN or an infinity"):
        layer.load_state_dict({**state, "values": state["values"] * torch.inf})
    with pytest.raises(RuntimeError, match="the state has pattern 1:4, the module 2:4"):
        layer.load_state_dict(sparse("1:4").state_dict())
    assert torch.equal(layer(x()), before)


def test_hostile_indices_are_refused() -> None:
    layer = sparse("bsr16x16@0.75")
    state = layer.state_dict()
    for key, value in (("indices", 10**6), ("indices", -1), ("crow_indices", -5)):
        bad = {name: tensor.clone() for name, tensor in state.items()}
        bad[key][-1] = value
        with pytest.raises(RuntimeError, match="While loading values"):
            layer.load_state_dict(bad)


def test_a_partial_state_leaves_the_rest_alone() -> None:
    layer = sparse()
    before = layer.packed.to_dense()
    result = layer.load_state_dict({"bias": torch.ones(33)}, strict=False)
    assert sorted(result.missing_keys) == ["indices", "values"]
    assert torch.equal(layer.packed.to_dense(), before)
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.ones(33))


# --- copies, dtypes, devices ------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_deepcopy_and_pickle(pattern: str) -> None:
    layer = sparse(pattern, "gelu").eval()
    dumped = pickle.dumps(layer)
    for other in (copy.deepcopy(layer), pickle.loads(dumped)):
        assert torch.equal(other(x()), layer(x()))
        assert other.bias is not layer.bias
        assert other.packed_data.data_ptr() != layer.packed_data.data_ptr()
        assert "packed_data" in dict(other.named_buffers())
        assert not other.training
        assert other.state_dict().keys() == layer.state_dict().keys()
    assert layer.packed_data.numpy().tobytes() not in dumped


def test_deepcopy_keeps_shared_parameters_shared() -> None:
    layer = sparse()
    model = nn.ModuleList([layer, layer])
    other = copy.deepcopy(model)
    assert other[0] is other[1]


def test_dtype_conversions() -> None:
    reference = sparse()
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.type(torch.float16),
    ):
        layer = convert(sparse())
        dtype = layer.bias.dtype
        assert layer.packed_data.dtype == torch.uint8
        assert layer.packed.dtype == dtype
        assert torch.equal(layer.packed.to_dense(), reference.packed.to_dense().to(dtype))
        assert layer(x().to(dtype)).dtype == dtype
    assert torch.equal(sparse().float()(x()), reference(x()))
    assert torch.equal(sparse().type(torch.float32)(x()), reference(x()))


def test_a_dtype_without_kernels_is_refused_and_changes_nothing() -> None:
    layer = sparse()
    before = layer(x())
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        layer.double()
    assert torch.equal(layer(x()), before)


def test_devices() -> None:
    layer = sparse().to("meta")
    assert layer.packed_data.device.type == "meta"
    assert layer.bias is not None
    assert layer.bias.device.type == "meta"
    assert torch.equal(sparse().to("cpu")(x()), sparse()(x()))
    assert torch.equal(sparse().share_memory()(x()), sparse()(x()))


# --- gradients, autocast ----------------------------------------------------------------------


def test_gradients_flow_to_input_and_bias_only() -> None:
    layer = sparse(activation="gelu")
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    inputs = x().requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    with torch.no_grad():
        assert not layer(inputs).requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    layer = sparse().bfloat16()
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x().bfloat16()))


# --- graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.75"])
def test_compile_fullgraph_forward_and_backward(pattern: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(sparse(pattern, "gelu"), nn.LayerNorm(33), nn.Linear(33, 4))
    compiled = torch.compile(model, fullgraph=True)
    for rows in (5, 8, 11):  # the second and third make the batch size dynamic
        one, two = x(rows).requires_grad_(), x(rows).requires_grad_()
        y, expected = compiled(one), model(two)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(one.grad, two.grad)


def test_export_save_and_load() -> None:
    model = nn.Sequential(sparse(activation="relu"), nn.Linear(33, 4)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x(),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "sparsekit.linear.default" in targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (5, 9):
        assert torch.equal(loaded(x(rows)), model(x(rows)))


def test_fx_trace_keeps_the_layer() -> None:
    model = nn.Sequential(sparse(), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x()), model(x()))
