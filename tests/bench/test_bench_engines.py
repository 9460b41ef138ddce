"""The benchmark of TensorRT engines, as far as it goes without a GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sparsekit as sk
from bench import engines
from bench.baselines import Unavailable

sys.path.append(str(Path(__file__).parents[1] / "export"))
import tensorrt_stub


class Recorder:
    """A TensorRT that writes down what it is asked; `reads` and `builds` are its answers."""

    def __init__(self, reads: bool = True, builds: bool = True) -> None:
        self.calls: list[Any] = []
        self._reads, self._builds = reads, builds
        self.__version__ = "10.3.0"
        self.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda *_: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(SPARSE_WEIGHTS="sparse")

    def Builder(self, logger: Any) -> Any:
        config = SimpleNamespace(set_flag=lambda flag: self.calls.append(("flag", flag)))

        def create_network(flags: int) -> str:
            self.calls.append(("network", flags))
            return "network"

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: config,
            build_serialized_network=lambda network, config: b"plan" if self._builds else None,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse_from_file(path: str) -> bool:
            self.calls.append(("file", path))
            return self._reads

        return SimpleNamespace(
            parse_from_file=parse_from_file,
            num_errors=1,
            get_error=lambda i: "no such operator",
        )


@pytest.fixture
def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(sk.nn.SparseLinear.from_dense(nn.Linear(16, 8))), torch.randn(2, 16)


def variant(name: str) -> engines.Variant:
    return next(each for each in engines.VARIANTS if each.name == name)


@pytest.mark.parametrize("each", engines.VARIANTS, ids=lambda each: each.name)
def test_each_variant_is_exported_and_built(
    each: engines.Variant, model: Any, tmp_path: Path
) -> None:
    network, x = model
    trt = Recorder()
    assert engines.build(trt, network, (x,), each, tmp_path) == b"plan"
    assert ("network", 2) in trt.calls
    assert (("flag", "sparse") in trt.calls) == each.sparse_weights
    (file,) = tmp_path.iterdir()
    assert ("file", str(file)) in trt.calls
    written = file.read_bytes()
    assert (b"SparseLinear" in written) == each.plugin
    assert (b"QuantizeLinear" in written) == ("int8" in each.name)


def test_what_tensorrt_refuses_is_told(model: Any, tmp_path: Path) -> None:
    network, x = model
    with pytest.raises(RuntimeError, match=r"does not read .*: no such operator"):
        engines.build(Recorder(reads=False), network, (x,), engines.OURS, tmp_path)
    with pytest.raises(RuntimeError, match="TensorRT built no engine of"):
        engines.build(Recorder(builds=False), network, (x,), engines.OURS, tmp_path)


def test_the_plugin_is_loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[str] = []
    registry = SimpleNamespace(
        get_creator=lambda *key: key if loaded else None,
        load_library=lambda path: loaded.append(path) or "handle",
    )
    trt = SimpleNamespace(get_plugin_registry=lambda: registry, __version__="10.3.0")
    monkeypatch.setattr(sk.export, "plugin_path", lambda: tmp_path / "plugin.so")
    engines.load_plugin(trt)
    engines.load_plugin(trt)
    assert loaded == [str(tmp_path / "plugin.so")]
    loaded.clear()
    registry.load_library = lambda path: None
    with pytest.raises(RuntimeError, match=re.escape("TensorRT 10.3.0 did not load")):
        engines.load_plugin(trt)


def test_what_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match="TensorRT's Python package cannot be imported"):
        engines.import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="torch finds no GPU"):
            engines.import_tensorrt()

    def no_plugin() -> Path:
        raise FileNotFoundError("this build has no plugin")

    monkeypatch.setattr(sk.export, "plugin_path", no_plugin)
    with pytest.raises(Unavailable, match="this build has no plugin"):
        engines.load_plugin(SimpleNamespace())


def test_types_of_tensorrt_are_those_of_torch() -> None:
    for name, dtype in (("FLOAT", torch.float32), ("HALF", torch.float16), ("INT64", torch.int64)):
        assert engines._dtype(None, SimpleNamespace(name=name)) == dtype


@pytest.mark.skipif(bool(tensorrt_stub.why_not()), reason=tensorrt_stub.why_not() or "-")
def test_tensorrt_has_what_is_called(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By TensorRT's own classes: every name of the module's source that follows one of them."""
    trt = tensorrt_stub.load(tmp_path_factory.mktemp("stubs"))
    source = Path(engines.__file__).read_text()
    objects = {
        "tensorrt": trt,
        "builder": trt.Builder,
        "config": trt.IBuilderConfig,
        "parser": trt.OnnxParser,
        "registry": trt.IPluginRegistry,
        "self._runtime": trt.Runtime,
        "self._engine": trt.ICudaEngine,
        "self._context": trt.IExecutionContext,
        "tensorrt.NetworkDefinitionCreationFlag": trt.NetworkDefinitionCreationFlag,
        "tensorrt.BuilderFlag": trt.BuilderFlag,
        "tensorrt.TensorIOMode": trt.TensorIOMode,
        "tensorrt.Logger": trt.Logger,
    }
    for name, thing in objects.items():
        called = set(re.findall(rf"(?<![\w.]){re.escape(name)}\.(\w+)", source))
        assert called, name
        assert [each for each in called if not hasattr(thing, each)] == [], name
