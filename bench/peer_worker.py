"""The other side of `bench/peers.py`: one engine in a Python of its own, told what to do by lines.

    python -m bench.peer_worker deepsparse|xnnpack

Each line on stdin is a JSON object, answered by one on stdout: `load` takes a model and its
inputs and leaves the result in a file, `run` times one turn, `quit` ends it. What goes wrong is
answered with `error`. That Python has numpy and the engine, no torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from bench.timing import turn

# A call without arguments that returns the first output as an array.
Run = Callable[[], Any]


def _load(request: Mapping[str, Any], name: str) -> Any:
    return importlib.import_module("numpy").load(request[name])


def load_deepsparse(request: Mapping[str, Any]) -> tuple[Run, str]:
    """Compiles the ONNX file `model` and binds `inputs`; says how much of it is DeepSparse's."""
    deepsparse = importlib.import_module("deepsparse")
    numpy = importlib.import_module("numpy")
    # The sizes in the file hold: no batch size.
    engine = deepsparse.Engine(request["model"], None, num_cores=request["threads"])
    inputs = [numpy.ascontiguousarray(numpy.load(path)) for path in request["inputs"]]
    return (
        lambda: engine.run(inputs, val_inp=False)[0],
        f"DeepSparse {deepsparse.__version__}, {engine.fraction_of_supported_ops:.0%} of the "
        f"operations, {engine.cpu_avx_type}",
    )


def load_xnnpack(request: Mapping[str, Any]) -> tuple[Run, str]:
    """XNNPACK's fully connected operator, through LiteRT, whose default for float32 it is."""
    interpreter_module = importlib.import_module("ai_edge_litert.interpreter")
    weight, bias = _load(request, "weight"), _load(request, "bias")
    (x,) = (importlib.import_module("numpy").load(path) for path in request["inputs"])
    interpreter = interpreter_module.Interpreter(
        model_content=_fully_connected(weight, bias, x.shape[0]), num_threads=request["threads"]
    )
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(source["index"], x)

    def run() -> Any:
        interpreter.invoke()
        return interpreter.tensor(result["index"])()

    return run, "XNNPACK in LiteRT"


def _fully_connected(weight: Any, bias: Any, m: int) -> bytes:
    """A TensorFlow Lite file of one layer, written with the schema that comes with LiteRT."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    flatbuffers = importlib.import_module("flatbuffers")
    numpy = importlib.import_module("numpy")

    def buffer(array: Any) -> Any:
        made = schema.BufferT()
        made.data = None if array is None else numpy.frombuffer(array.tobytes(), numpy.uint8)
        return made

    def tensor(name: str, shape: Iterable[int], number: int) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.buffer = name, list(shape), number
        made.type = schema.TensorType.FLOAT32
        return made

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    layer = schema.OperatorT()
    layer.opcodeIndex, layer.inputs, layer.outputs = 0, [0, 1, 2], [3]
    layer.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    layer.builtinOptions = schema.FullyConnectedOptionsT()
    n, k = weight.shape
    graph = schema.SubGraphT()
    graph.name, graph.operators, graph.inputs, graph.outputs = "main", [layer], [0], [3]
    # Buffer 0 is the empty one, by the format's rule.
    graph.tensors = [
        tensor("x", (m, k), 0),
        tensor("weight", (n, k), 1),
        tensor("bias", (n,), 2),
        tensor("y", (m, n), 0),
    ]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [buffer(None), buffer(weight), buffer(bias)]
    builder = flatbuffers.Builder(weight.nbytes + (1 << 16))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


ENGINES: dict[str, Callable[[Mapping[str, Any]], tuple[Run, str]]] = {
    "deepsparse": load_deepsparse,
    "xnnpack": load_xnnpack,
}


def serve(
    load: Callable[[Mapping[str, Any]], tuple[Run, str]], lines: Iterable[str], answers: TextIO
) -> None:
    """Answers requests until the lines end or one says `quit`.

    Args:
        load: Makes a call from a `load` request, and a text about it.
        lines: Requests.
        answers: Where the answers go, one line each.
    """
    run: Run | None = None
    for line in lines:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "quit":
                return
            if request["do"] == "load":
                # The one before goes first: two large models may not fit.
                run = None
                run, about = load(request)
                importlib.import_module("numpy").save(request["output"], run())
                answer = {"about": about}
            elif run is None:
                answer = {"error": "nothing is loaded"}
            else:
                answer = {"seconds": turn(run)}
        # Whatever an engine raises is the other process's business.
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    engine = sys.argv[1]
    # What engines print goes to stderr; stdout carries answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(ENGINES[engine], sys.stdin, answers)


if __name__ == "__main__":
    main()
