"""`sparsekit.export.onnx`: a model to a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from sparsekit.export.packages import require_exporter, require_onnx
from sparsekit.export.report import ExportReport, ExportRow
from sparsekit.files import replacing
from sparsekit.io import PathLike
from sparsekit.nn import PackedModule

if TYPE_CHECKING:
    from onnxscript import ir

WEIGHTS = ("canonical", "cuda")
# TensorRT 10.3, of JetPack 6, reads no later ones. torch writes 18 and later.
OPSET, OLDEST_OPSET, _IR_VERSION = 20, 18, 10
# A file in protobuf's format has less than 2 GiB; what is no constant gets the rest.
_LARGEST_FILE = 2**31 - 2**27


def onnx(
    model: nn.Module,
    args: Any,
    path: PathLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    weights: str = "canonical",
    dense: bool = False,
    quantize: str | None = None,
    calibration: Iterable[Any] | None = None,
    opset_version: int = OPSET,
    progress: bool = True,
) -> ExportReport:
    """Write a model as ONNX; its sparse layers become nodes of the domain `sparsekit`.

    docs/onnx.md defines these nodes. The model is exported as it is in eval mode and not changed.
    The file is checked, written beside `path` and renamed, so a failed export leaves an old file as
    it was. More than 2 GiB of constants go to a file beside it, `<path>.data`.

    Args:
        model: any, on a CPU or a GPU; calls of sparse modules and of `sparsekit.linear`, `conv1d`
            and `conv2d` count.
        args: example input: a tensor, or a tuple of positional arguments.
        path: the file.
        kwargs: keyword arguments of the example.
        dynamic_shapes: as in `torch.onnx.export`, e.g. `({0: "batch", 1: "seq"},)`; None fixes all
            sizes.
        input_names: of the graph, in order.
        output_names: of the graph, in order.
        weights: "canonical" for weights that every machine reads, "cuda" for the packed format of
            GPUs, which saves them a copy.
        dense: write sparse layers as MatMul and Conv with their zeros in place instead, for other
            engines.
        quantize: "int8", with `dense`: the inputs and the weights of sparse layers pass through
            QuantizeLinear and DequantizeLinear, per tensor and per output channel; zeros stay zero.
        calibration: for int8: inputs of the model, each a tensor, a tuple or a mapping; the largest
            magnitude seen decides each layer's input scale. None takes the example.
        opset_version: of ONNX, 18 or later; the default is the last that TensorRT 10.3 reads.
        progress: whether to show a progress bar.

    Returns:
        What was written; `print` it.

    Raises:
        ImportError: the extra `onnx` is not installed, or torch is older than 2.9.
        ValueError: an argument that does not fit; a packed weight that is no constant of the model.
        NotImplementedError: weights="cuda" for a layer that no kernel on a GPU takes.
        OSError: the file cannot be written.
    """
    path = Path(path)
    positional = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    _check_choices(weights, dense, quantize, calibration)
    _check_path(path)
    require_onnx("export")
    require_exporter("export")
    _check_opset(opset_version)
    # They import ONNX, which this package does without until here.
    from sparsekit.export import calibration as ranges_of
    from sparsekit.export import calls as graph_calls
    from sparsekit.export import dense as plain
    from sparsekit.export import lower, trace

    traced = trace.trace(
        model, positional, kwargs, dynamic_shapes, input_names, output_names, opset_version
    )
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
    }
    calls = graph_calls.find_calls(traced, modules.keys())
    ranges = None
    if quantize:
        batches = _batches(positional, kwargs, calibration)
        layers = {call.layer: modules.get(call.layer) for call in calls}
        ranges = ranges_of.input_ranges(model, layers, batches)
    with tqdm(total=len(calls), desc="export", unit="layer", disable=not progress) as bar:
        if dense:
            rows = plain.to_dense(traced, calls, ranges, bar.update)
        else:
            rows = lower.lower(traced, calls, weights, bar.update)
    called = {modules.get(row.layer) for row in rows}
    absent = [
        name for name, module in model.named_modules() if name in modules and module not in called
    ]
    return _write(traced, path, rows, absent)


def _check_choices(weights: str, dense: bool, quantize: str | None, calibration: Any) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"export: expected weights to be one of {WEIGHTS}, got {weights!r}")
    if dense and weights != WEIGHTS[0]:
        raise ValueError(
            f"export: weights={weights!r} is a format of sparse nodes, which dense=True does not "
            "write; leave one of them out"
        )
    if quantize not in (None, "int8"):
        raise ValueError(f"export: expected quantize to be None or 'int8', got {quantize!r}")
    if quantize and not dense:
        raise ValueError(
            "export: quantize='int8' is for plain ONNX; pass dense=True, or leave it out"
        )
    if calibration is not None and not quantize:
        raise ValueError("export: calibration is for quantize='int8'; pass that, or leave it out")


def _check_opset(version: Any) -> None:
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if type(version) is not int or not OLDEST_OPSET <= version <= newest:
        raise ValueError(
            f"export: expected opset_version as a number from {OLDEST_OPSET} to {newest}, the last "
            f"that this ONNX knows, got {version!r}"
        )


def _check_path(path: Path) -> None:
    # Before the graph is made, which takes a while.
    if path.is_dir():
        raise IsADirectoryError(f"export: {path} is a folder, expected a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {path.parent}; make it first")


def _batches(args: tuple[Any, ...], kwargs: Mapping[str, Any], calibration: Any) -> Iterable[Any]:
    if calibration is None:
        if args and kwargs:
            raise ValueError(
                "export: int8 needs calibration where the example has positional and keyword "
                "arguments; pass a list of mappings"
            )
        return [kwargs or args]
    if isinstance(calibration, Tensor | tuple | Mapping):  # one input, not several
        return [calibration]
    batches: Iterable[Any] = calibration
    return batches


def _write(model: ir.Model, path: Path, rows: list[ExportRow], absent: list[str]) -> ExportReport:
    import onnx as checking
    from onnxscript import ir

    from sparsekit.export import schema
    from sparsekit.export.lint import lint

    problems = lint(model)
    if problems:
        raise RuntimeError("export: the graph would not be read: " + "; ".join(problems))
    schema.register()
    model.ir_version = min(model.ir_version, _IR_VERSION)
    constants = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    beside = path.with_name(f"{path.name}.data") if constants > _LARGEST_FILE else None
    with replacing(path) as scratch:
        part = scratch / path.name
        ir.save(model, part, external_data=beside and beside.name)
        checking.checker.check_model(str(part), full_check=True)
        nbytes = sum(file.stat().st_size for file in scratch.iterdir())
    inputs = [
        f"{value.name}: {str(value.dtype).lower()} [{', '.join(map(str, value.shape or ()))}]"
        for value in model.graph.inputs
    ]
    return ExportReport(path, nbytes, beside, rows, absent, inputs)
