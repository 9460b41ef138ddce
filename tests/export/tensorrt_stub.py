"""TensorRT's Python package where there is no TensorRT: its bindings over the lean runtime.

The wheel tensorrt_cu13_bindings wants libnvinfer, libnvinfer_plugin and libnvonnxparser, which have
no wheel. Empty libraries of these names, the first of them in front of tensorrt_lean_cu13_libs, are
enough to register plugins; nothing can be built or run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SYMBOLS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "getBuilderPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


def why_not() -> str:
    """Why `load` cannot give it; "" when it can."""
    if importlib.util.find_spec("tensorrt") is not None:
        return ""
    for package, wheel in (
        ("tensorrt_bindings", "tensorrt_cu13_bindings"),
        ("tensorrt_lean_libs", "tensorrt_lean_cu13_libs"),
    ):
        if importlib.util.find_spec(package) is None:
            return f"{wheel} is not installed"
    return "" if shutil.which("cc") else "no C compiler for the stub libraries"


def load(folder: Path) -> Any:
    """The package `tensorrt`, the real one where it is installed.

    Args:
        folder: where the stub libraries may be written.
    """
    if importlib.util.find_spec("tensorrt") is None:
        _load_stubs(folder)
    return importlib.import_module("tensorrt")


def _load_stubs(folder: Path) -> None:
    found = importlib.util.find_spec("tensorrt_lean_libs")
    assert found is not None
    assert found.origin is not None
    (lean,) = Path(found.origin).parent.glob("libnvinfer_lean.so.*")
    major = lean.name.rsplit(".", 1)[1]
    for name, symbols in SYMBOLS.items():
        source, library = folder / f"{name}.c", folder / f"lib{name}.so.{major}"
        source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        needed = ["-Wl,--no-as-needed", str(lean)] if name == "nvinfer" else []
        subprocess.run(
            [
                "cc",
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library.name}",
                "-o",
                library,
                source,
                *needed,
            ],
            check=True,
        )
    for library in (lean, *sorted(folder.glob("*.so.*"))):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    # The bindings are the package `tensorrt` under another name; its modules import that one.
    bindings = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = bindings
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin",
        Path(bindings.__path__[0]) / "plugin" / "__init__.py",
        submodule_search_locations=[str(Path(bindings.__path__[0]) / "plugin")],
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = package
    spec.loader.exec_module(package)
    bindings.plugin = package
