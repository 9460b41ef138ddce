"""What TensorRT's ONNX parser makes of a file, in a process of its own: it may end with it.

    python tensorrt_parser.py FILE

Prints one line of JSON: whether the file was read, the parser's errors, and the attributes that the
creators of our plugins were handed. They make no plugin, so a file with nodes of ours is read up to
the first of them. The parser is that of TensorRT-RTX, the one which runs without a GPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt


class Creator(trt.IPluginCreatorV3One):
    """Remembers what it is asked to make."""

    def __init__(self, name: str, attributes: list[str], seen: list[dict[str, Any]]) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name = name
        self.plugin_namespace, self.plugin_version = "sparsekit", "1"
        self.field_names = trt.PluginFieldCollection(
            [trt.PluginField(each, np.array([]), trt.PluginFieldType.INT32) for each in attributes]
        )
        self._seen = seen

    def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
        self._seen.append(
            {field.name: [field.type.name, np.asarray(field.data).tolist()] for field in fields}
        )


def main(path: Path, attributes: dict[str, list[str]]) -> None:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    seen: list[dict[str, Any]] = []
    registry = trt.get_plugin_registry()
    creators = [Creator(name, names, seen) for name, names in attributes.items()]
    for creator in creators:
        assert registry.register_creator(creator, "sparsekit")
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # the parser does not keep it
    parser = trt.OnnxParser(network, logger)
    read = parser.parse_from_file(str(path))
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    print(json.dumps({"read": read, "errors": [each.desc() for each in errors], "seen": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
