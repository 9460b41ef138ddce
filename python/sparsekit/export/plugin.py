"""Where the TensorRT plugin is."""

from __future__ import annotations

from pathlib import Path

from sparsekit import _native


def plugin_path() -> Path:
    """The library that runs our ONNX nodes in TensorRT, for its plugin registry to load.

    `trtexec --dynamicPlugins=PATH`, `tensorrt.get_plugin_registry().load_library(PATH)`.

    Raises:
        FileNotFoundError: this build has none.
    """
    path = _native.tensorrt_plugin()
    if path is None:
        raise FileNotFoundError(
            "this build of sparsekit has no TensorRT plugin: when it was built, TensorRT's headers "
            "or a CUDA compiler were missing; build the wheel where both are, with "
            "--config-settings=cmake.define.SPARSEKIT_TENSORRT=ON (see docs/jetson.md)"
        )
    return path
