"""Quick plugins of TensorRT: the kernels' PTX, the nodes, and TensorRT's view of them."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorrt_stub
import torch
from onnx import TensorProto, helper
from torch import Tensor

import sparsekit as sk
from sparsekit import _native
from sparsekit.export import quick, register_quick_plugins
from sparsekit.testing import assert_matmul_close, assert_matmul_exact, make_problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = [quick.kernel_name(dtype, tactic) for dtype in DTYPES for tactic in (1, 2)]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
needs_ptx = pytest.mark.skipif(
    not any(kernel.device == "cuda" for kernel in _native.kernels()),
    reason="this build has no CUDA kernels",
)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# --- PTX ----------------------------------------------------------------------------------------


@needs_ptx
@each_kernel
def test_parameters_are_those_of_a_plugin(kernel: str) -> None:
    """Pointers to two inputs, m and the other integers, a pointer to the output."""
    (name,) = re.findall(r"\.visible \.entry (\w+)\(", quick.ptx(kernel))
    assert name == kernel
    head = quick.ptx(kernel).split(f".entry {kernel}(")[1].split(")")[0]
    integers = quick._integers(8, 8, sk.NM(2, 4), torch.float32, True, 0, None)
    types = ["u64", "u64", *["u32"] * (1 + len(integers)), "u64"]
    assert re.findall(r"\.param \.(\w+) ", head) == types


@needs_ptx
@each_kernel
def test_ptx_runs_on_every_gpu_and_needs_no_more_than_it_is_given(kernel: str) -> None:
    text = quick.ptx(kernel)
    assert ".target sm_80\n" in text
    assert quick.threads(kernel) in (128, 256)
    # Shared memory is dynamic, and what a block has without asking.
    assert re.findall(r"\.shared \.align .*\[(\d*)\];", text) == [""]
    assert quick.SHARED_BYTES <= 48 << 10
    assert ".local " not in text


def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "ptx_folder", lambda: tmp_path)
    monkeypatch.setattr(quick, "_require_tensorrt", lambda: None)
    quick.ptx.cache_clear()
    with pytest.raises(NotImplementedError, match="is missing; this build has no CUDA kernels"):
        register_quick_plugins()


def test_tensorrt_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match=r"needs TensorRT 10\.9 or later .* pip install tensorrt"):
        register_quick_plugins()
    old = ModuleType("tensorrt")
    old.__version__ = "10.8.0.43"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(ImportError, match=r"got 10\.8\.0\.43; use the plugin library"):
        register_quick_plugins()


# --- nodes --------------------------------------------------------------------------------------


def sparse_linear(name: str, *, inputs: tuple[str, ...] = ("x", "w"), **changes: Any) -> Any:
    attributes = {
        "n": 8,
        "k": 16,
        "pattern": [0, 2, 4, 1, 0, 0],
        "nnzb": 0,
        "dtype": 0,
        "format": "canonical",
        "has_bias": 0,
        "activation": 0,
        "residual_first": 0,
        "plugin_version": "1",
        "plugin_namespace": "sparsekit",
    }
    domain = changes.pop("domain", "sparsekit")
    return helper.make_node(
        "SparseLinear", inputs, [f"{name}.y"], name, domain=domain, **{**attributes, **changes}
    )


def test_rewrite_turns_what_one_kernel_computes() -> None:
    nodes = [
        sparse_linear("plain"),
        sparse_linear("no residual", inputs=("x", "w", "")),
        sparse_linear("residual", inputs=("x", "w", "r")),
        sparse_linear("packed", format="nm_mma_sp"),
        sparse_linear("blocks", pattern=[1, 0, 0, 0, 16, 16], nnzb=1),
        sparse_linear("foreign", domain="other"),
        helper.make_node("Relu", ["x"], ["y"], "relu"),
    ]
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 16])
    model = helper.make_model(helper.make_graph(nodes, "g", [tensor], [tensor]))
    before = [node.op_type for node in nodes]
    assert quick.rewrite(model) == ["plain", "no residual"]
    for i, node in enumerate(model.graph.node):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if i < 2:
            assert node.op_type == "SparseLinearQuick"
            assert list(node.input) == ["x", "w"]
            assert attributes["aot"] == 1
            assert attributes["plugin_namespace"] == b"sparsekit"
        else:
            assert node.op_type == before[i]
            assert "aot" not in attributes
    assert quick.rewrite(model) == []


@each_dtype
@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", "15:16"])
def test_sections_of_the_weight(pattern: str, dtype: torch.dtype) -> None:
    weight, bias = weight_words(pattern, dtype, 13, 37, with_bias=True)
    kind = sk.parse_pattern(pattern)
    assert isinstance(kind, sk.NM)
    n, k, kept, group, vector, indices, at_bias, activation = quick._integers(
        13, 37, kind, dtype, True, 4, weight.numel()
    )
    assert (n, k, kept, group, vector, activation) == (13, 37, kind.n, kind.m, kind.vector, 4)
    data = weight.view(torch.uint8)
    assert torch.equal(data[16 * at_bias :][: bias.nbytes].view(dtype), bias)
    canonical = canonical_of(pattern, dtype, 13, 37)
    assert torch.equal(
        data[16 * indices :][: canonical.indices.numel()], canonical.indices.flatten()
    )
    for words in (weight.numel() - 1, weight.numel() + 1):
        with pytest.raises(ValueError, match=f"expected a weight of {weight.numel()} int32"):
            quick._integers(13, 37, kind, dtype, True, 4, words)
    without = quick._integers(13, 37, kind, dtype, False, 0, None)
    assert without[5:7] == (indices, 0)


def canonical_of(pattern: str, dtype: torch.dtype, n: int, k: int) -> _native.Canonical:
    problem = make_problem(1, n, k, pattern, dtype, integers=True)
    return sk.pack(problem.weight, pattern, problem.mask).canonical()


def weight_words(
    pattern: str, dtype: torch.dtype, n: int, k: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """The initialiser of a node as docs/onnx.md says, and its bias."""
    problem = make_problem(1, n, k, pattern, dtype, integers=True)
    canonical = sk.pack(problem.weight, pattern, problem.mask).canonical()
    data = bytearray()
    parts = [canonical.values, canonical.indices, *([problem.bias] if with_bias else [])]
    for part in parts:
        data += bytes(-len(data) % 16)
        data += part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 4)
    return torch.frombuffer(data, dtype=torch.int32), problem.bias


# --- TensorRT -----------------------------------------------------------------------------------


class Expression:
    """An `IDimensionExpr` that knows its value; `known` only where TensorRT would."""

    def __init__(self, value: int, known: bool = True) -> None:
        self.value, self.known = value, known

    def is_constant(self) -> bool:
        return self.known

    def get_constant_value(self) -> int:
        assert self.known
        return self.value


class ExpressionBuilder:
    def __init__(self, operations: Any) -> None:
        self.functions = {
            operations.SUM: lambda a, b: a + b,
            operations.PROD: lambda a, b: a * b,
            operations.CEIL_DIV: cdiv,
            operations.MAX: max,
        }

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, kind: Any, a: Expression, b: Expression) -> Expression:
        return Expression(self.functions[kind](a.value, b.value), a.known and b.known)


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if reason := tensorrt_stub.why_not():
        pytest.skip(reason)
    trt = tensorrt_stub.load(tmp_path_factory.mktemp("stubs"))
    quick.ptx.cache_clear()
    register_quick_plugins()
    register_quick_plugins()  # does nothing
    return trt


@pytest.fixture
def expressions(tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt.plugin._tensor import SymIntExpr

    monkeypatch.setattr(tensorrt, "IDimensionExpr", Expression)
    monkeypatch.setattr(SymIntExpr, "_exprBuilder", ExpressionBuilder(tensorrt.DimensionOperation))


def attributes_of(
    pattern: str, dtype: torch.dtype, n: int, k: int, has_bias: bool = True
) -> dict[str, Any]:
    numbers = np.array(_native.encode_pattern(sk.parse_pattern(pattern)), dtype=np.int32)
    code = _native.DTYPES[dtype]
    return {
        "n": n,
        "k": k,
        "pattern": numbers,
        "dtype": code,
        "has_bias": int(has_bias),
        "activation": 1,
    }


def tensor(trtp: Any, dtype: Any, *shape: Expression) -> Any:
    desc = trtp.TensorDesc()
    desc.dtype = dtype
    desc.shape_expr = trtp.ShapeExprs.from_tuple(tuple(trtp.ShapeExpr(size) for size in shape))
    return desc


def trt_type(trt: Any, dtype: torch.dtype) -> Any:
    types = {torch.float32: trt.DataType.FLOAT, torch.float16: trt.DataType.HALF}
    return types.get(dtype, trt.DataType.BF16)


def definition() -> Any:
    from tensorrt.plugin._lib import QDP_REGISTRY

    return QDP_REGISTRY["sparsekit::SparseLinearQuick"]


@needs_ptx
def test_the_creator_makes_an_ahead_of_time_plugin(tensorrt: Any) -> None:
    trt = tensorrt
    creator = trt.get_plugin_registry().get_creator("SparseLinearQuick", "1", "sparsekit")
    assert creator is not None
    attributes = attributes_of("2:4v4", torch.float16, 24, 40)
    assert [field.name for field in creator.field_names] == list(attributes)
    fields = [
        trt.PluginField(name, np.atleast_1d(np.asarray(value, np.int32)), trt.PluginFieldType.INT32)
        for name, value in attributes.items()
    ]
    plugin = creator.create_plugin(
        "SparseLinearQuick",
        "sparsekit",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    assert type(plugin).__name__ == "_TemplateAOTPlugin"
    for name, value in attributes.items():
        assert np.array_equal(plugin.attrs[name], value)


@needs_ptx
@each_dtype
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 5), (4, 0)])
def test_launches_follow_the_shapes(
    tensorrt: Any, expressions: None, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    import tensorrt.plugin as trtp

    n, k, pattern = 200, 72, "1:4"
    words, _ = weight_words(pattern, dtype, n, k, with_bias=True)
    attributes = attributes_of(pattern, dtype, n, k)
    sizes = [Expression(size, known=False) for size in lead]
    x = tensor(trtp, trt_type(tensorrt, dtype), *sizes, Expression(k))
    weight = tensor(trtp, tensorrt.DataType.INT32, Expression(words.numel()))
    y = definition().register_func(x, weight, **attributes)
    assert [size._expr.value for size in y.shape_expr] == [*lead, n]
    assert y.dtype == x.dtype
    (combination,) = definition().autotune_func(x, weight, (y,))
    assert [c.tactics for c in combination._get_combinations()] == [[1, 2]]
    assert combination._get_combinations()[0].types == [x.dtype, weight.dtype, y.dtype]
    m = int(np.prod(lead))
    for tactic in (1, 2):
        name, code, launch, extra = definition().aot_impl_func(
            x, weight, *attributes.values(), (y,), tactic
        )
        assert name == quick.kernel_name(dtype, tactic)
        assert code == quick.ptx(name)
        kind = sk.parse_pattern(pattern)
        assert isinstance(kind, sk.NM)
        integers = quick._integers(n, k, kind, dtype, True, 1, None)
        assert [argument._expr.value for argument in extra] == [m, *integers]
        assert [type(argument) for argument in extra] == [trtp.SymInt32] * len(extra)
        grid = max(1, quick.blocks(tactic, n, m, cdiv))
        assert launch.grid_x._expr.value == grid
        assert (launch.grid_y._expr.value, launch.grid_z._expr.value) == (1, 1)
        assert launch.block_x._expr.value == quick.threads(name)
        assert launch.shared_mem._expr.value == quick.SHARED_BYTES


@needs_ptx
def test_tensors_that_do_not_fit_are_refused(tensorrt: Any, expressions: None) -> None:
    import tensorrt.plugin as trtp

    attributes = attributes_of("2:4", torch.float32, 8, 16)
    words, _ = weight_words("2:4", torch.float32, 8, 16, with_bias=True)
    good = tensor(trtp, tensorrt.DataType.FLOAT, Expression(16))
    weight = tensor(trtp, tensorrt.DataType.INT32, Expression(words.numel()))
    definition().register_func(good, weight, **attributes)
    long = tensor(trtp, tensorrt.DataType.FLOAT, Expression(17))
    with pytest.raises(ValueError, match="x has k=17, the weight has k=16"):
        definition().register_func(long, weight, **attributes)
    half = tensor(trtp, tensorrt.DataType.HALF, Expression(16))
    with pytest.raises(ValueError, match=r"x is .*HALF, the weight torch\.float32; export"):
        definition().register_func(half, weight, **attributes)
    short = tensor(trtp, tensorrt.DataType.INT32, Expression(words.numel() - 1))
    with pytest.raises(ValueError, match=f"expected a weight of {words.numel()} int32"):
        definition().aot_impl_func(good, short, *attributes.values(), (good,), 1)


# --- on a GPU -----------------------------------------------------------------------------------


class Driver:
    """The kernels of quick plugins through the CUDA driver, as TensorRT launches them."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes a context current
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.cuda, name)(*arguments)
        assert error == 0, f"{name} returned {error}"

    def launch(self, kernel: str, grid: int, arguments: list[Any]) -> None:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        code = quick.ptx(kernel).encode()
        self.call("cuModuleLoadData", ctypes.byref(module), code)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in arguments)
        )
        block = (quick.threads(kernel), 1, 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (grid, 1, 1, *block, quick.SHARED_BYTES)
        self.call("cuLaunchKernel", function, *sizes, stream, pointers, None)
        torch.cuda.synchronize()
        self.call("cuModuleUnload", module)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("tactic", [1, 2])
@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", "4:8", "3:4"])
def test_kernels_launched_as_tensorrt_does(pattern: str, tactic: int, dtype: torch.dtype) -> None:
    driver, kind = Driver(), sk.parse_pattern(pattern)
    assert isinstance(kind, sk.NM)
    kernel = quick.kernel_name(dtype, tactic)
    for m, (n, k), integers in itertools.product((1, 9, 130), ((64, 256), (33, 70)), (True, False)):
        problem = make_problem(m, n, k, pattern, dtype, integers=integers)
        canonical = sk.pack(problem.weight, pattern, problem.mask).canonical()
        data = bytearray()
        for part in (canonical.values, canonical.indices, problem.bias):
            data += bytes(-len(data) % 16)
            data += part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        weight = torch.frombuffer(data, dtype=torch.uint8).cuda()
        x, y = problem.x.contiguous().cuda(), torch.full((m + 1, n), 7, dtype=dtype, device="cuda")
        numbers = (m, *quick._integers(n, k, kind, dtype, True, _native.ACTIVATIONS["relu"], None))
        arguments: list[Any] = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(weight.data_ptr())]
        arguments += [ctypes.c_int32(number) for number in numbers]
        driver.launch(
            kernel,
            quick.blocks(tactic, n, m, cdiv),
            [*arguments, ctypes.c_void_p(y.data_ptr())],
        )
        check = assert_matmul_exact if integers else assert_matmul_close
        check(y[:m].cpu(), problem.x, problem.weight, problem.bias, "relu")
        assert bool((y[m:] == 7).all())
