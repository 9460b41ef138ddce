"""Calls of our operators become the nodes of docs/onnx.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxscript import ir

from sparsekit.export.calls import Call, Constants, finish, replace
from sparsekit.export.nodes import DOMAIN
from sparsekit.export.report import ExportRow, row_of
from sparsekit.export.weights import encode


def lower(
    model: ir.Model, calls: Sequence[Call], weights: str, step: Callable[[], object]
) -> list[ExportRow]:
    """Replace each call by one node with one initialiser, in place.

    Args:
        model: traced.
        calls: all of it.
        weights: "canonical" or "cuda".
        step: called after each.

    Returns:
        What was written for each call.

    Raises:
        NotImplementedError: weights="cuda", and no kernel on a GPU takes a layer.
    """
    constants = Constants(model)
    shared: dict[tuple[ir.Value, ir.Value | None], ir.Value] = {}
    written: list[ExportRow] = []
    for call in calls:
        try:
            node, weight = encode(
                call.canonical(),
                call.bias(),
                call.activation,
                call.residual_first,
                call.window,
                weights,
            )
        except NotImplementedError as error:
            raise NotImplementedError(
                f"export: {call.layer!r} has no format for GPUs; write weights='canonical', which "
                f"every machine reads. {error}"
            ) from None
        constant = shared.get(call.constants)
        if constant is None:
            tensor = ir.tensor(weight.numpy())
            constant = shared[call.constants] = constants.add(f"{call.layer}.weight", tensor)
        inputs = [call.x, constant]
        if call.residual is not None:
            inputs.append(call.residual)
        name = call.node.name
        new = ir.node(node.op_type, inputs, node.attributes(), domain=DOMAIN, name=name)
        written.append(row_of(call, node.op_type, node.pattern, node.dtype, node.format, constant))
        replace(call, [new], new.outputs[0])
        step()
    finish(model, calls, ours=bool(calls))
    return written
