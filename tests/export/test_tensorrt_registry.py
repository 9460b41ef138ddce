"""The library of plugins in TensorRT's own registry, of whatever version is installed.

The lean runtime's wheels (`tensorrt_lean_cu13_libs`, `tensorrt_lean_cu13_bindings`) suffice, and no
GPU is needed. Nothing here needs torch: `pytest --noconftest` runs it in an environment of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAME = "libsparsekit_tensorrt.so"

# What runs with TensorRT loaded: in its own process, left before anything is torn down, because
# parts of TensorRT crash there where no GPU is.
PROGRAM = """
import json, os, sys
import numpy as np
if sys.argv[1] == "tensorrt_lean_bindings":
    import tensorrt_lean_libs
trt = __import__(sys.argv[1])
registry = trt.get_plugin_registry()

def ours():
    return sorted(c.name for c in registry.all_creators if c.plugin_namespace == "sparsekit")

kept = []  # a field points into its array

def fields(attributes):
    made = []
    for name, value in attributes.items():
        if isinstance(value, str):
            data = np.frombuffer(value.encode() + b"\\0", np.int8), trt.PluginFieldType.CHAR
        elif isinstance(value, float):
            data = np.array([value], np.float32), trt.PluginFieldType.FLOAT32
        else:
            data = np.atleast_1d(np.array(value, np.int32)), trt.PluginFieldType.INT32
        kept.append(data[0])
        made.append(trt.PluginField(name, *data))
    return trt.PluginFieldCollection(made)

def create(op, attributes):
    creator = registry.get_creator(op, "1", "sparsekit")
    plugin = creator.create_plugin("layer", fields(attributes), trt.TensorRTPhase.BUILD)
    if plugin is None:
        return None
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    return [core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs]

def field_names(op):
    return [f.name for f in registry.get_creator(op, "1", "sparsekit").field_names]

answer = {}
exec(sys.argv[2])
print("ANSWER" + json.dumps(answer), flush=True)
os._exit(0)
"""

LINEAR = {
    "n": 32,
    "k": 64,
    "pattern": [0, 2, 4, 1, 0, 0],
    "nnzb": 0,
    "dtype": 2,
    "format": "canonical",
    "has_bias": 1,
    "activation": 2,
    "residual_first": 0,
}
CONV = {
    **LINEAR,
    "k": 9 * 64,
    "channels": 64,
    "kernel_shape": [3, 3],
    "strides": [1, 2],
    "dilations": [1, 1],
    "pads": [1, 1, 0, 2],
    "group": 2,
}


def _tensorrt() -> str:
    for module in ("tensorrt", "tensorrt_lean", "tensorrt_lean_bindings"):
        if importlib.util.find_spec(module):
            return module
    pytest.skip("no TensorRT: pip install tensorrt_lean_cu13_libs tensorrt_lean_cu13_bindings")


def _library() -> Path:
    named = os.environ.get("SPARSEKIT_TENSORRT_LIBRARY")
    places = (
        [Path(named)]
        if named
        else [ROOT / "python/sparsekit" / NAME, ROOT / "build/tensorrt" / NAME]
    )
    for place in places:
        if place.exists():
            return place
    assert not named, f"SPARSEKIT_TENSORRT_LIBRARY={named} does not exist"
    pytest.skip(f"no {NAME}: make tensorrt TENSORRT_INCLUDE_DIR=…")


def _run(program: str) -> tuple[dict[str, Any], str]:
    """What `program` put into `answer`, and the errors it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, _tensorrt(), program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    _, found, answer = done.stdout.partition("ANSWER")
    assert found, done.stdout + done.stderr
    return json.loads(answer), done.stderr


def test_both_plugins_are_found_with_the_fields_of_their_nodes() -> None:
    path = str(_library())
    answer, errors = _run(
        f"answer['loaded'] = registry.load_library({path!r}) is not None\n"
        "answer['names'] = ours()\n"
        "answer['linear'] = field_names('SparseLinear')\n"
        "answer['conv'] = field_names('SparseConv2d')"
    )
    assert answer["loaded"], errors
    assert answer["names"] == ["SparseConv2d", "SparseLinear"]
    assert sorted(answer["linear"]) == sorted(LINEAR)
    assert sorted(answer["conv"]) == sorted(CONV)


def test_right_attributes_make_a_plugin_and_wrong_ones_a_message() -> None:
    path = str(_library())
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "expected attribute n from 1 to 2147483647, got 0": ("SparseLinear", {**LINEAR, "n": 0}),
        "expected 6 numbers in attribute pattern, got 2": (
            "SparseLinear",
            {**LINEAR, "pattern": [2, 4]},
        ),
        "expected attribute dtype of type int32 (5), got type 1": (
            "SparseLinear",
            {**LINEAR, "dtype": 2.0},
        ),
        "unknown format 'tiles'": ("SparseLinear", {**LINEAR, "format": "tiles"}),
        "expected an attribute channels, there is none": ("SparseConv2d", LINEAR),
        "k=576 is not 3x3 positions of 65 channels or more": (
            "SparseConv2d",
            {**CONV, "channels": 65},
        ),
    }
    answer, errors = _run(
        f"registry.load_library({path!r})\n"
        f"answer['linear'] = create('SparseLinear', {LINEAR!r})\n"
        f"answer['conv'] = create('SparseConv2d', {CONV!r})\n"
        f"answer['wrong'] = [create(op, a) for op, a in {list(wrong.values())!r}]"
    )
    assert answer["linear"] == ["SparseLinear", "1", "sparsekit", 1]
    assert answer["conv"] == ["SparseConv2d", "1", "sparsekit", 1]
    assert answer["wrong"] == [None] * len(wrong)
    for message in wrong:
        assert message in errors


def test_the_library_can_be_unloaded_and_loaded_again() -> None:
    path = str(_library())
    answer, _ = _run(
        f"handle = registry.load_library({path!r})\n"
        "registry.deregister_library(handle)\n"
        "answer['after'] = ours()\n"
        f"answer['again'] = registry.load_library({path!r}) is not None\n"
        f"answer['plugin'] = create('SparseLinear', {LINEAR!r})"
    )
    assert answer["after"] == []
    assert answer["again"]
    assert answer["plugin"] is not None


def test_a_copy_of_the_library_takes_over_where_the_first_one_goes(tmp_path: Path) -> None:
    first = _library()
    second = shutil.copy(first, tmp_path / "another.so")
    answer, errors = _run(
        f"one = registry.load_library({str(first)!r})\n"
        f"two = registry.load_library({str(second)!r})\n"
        "answer['at_once'] = two is not None\n"
        "answer['both'] = ours()\n"
        f"answer['plugin'] = create('SparseLinear', {LINEAR!r})\n"
        "registry.deregister_library(one)\n"
        f"two = registry.load_library({str(second)!r})\n"
        "answer['second'] = two is not None\n"
        f"answer['still'] = create('SparseLinear', {LINEAR!r})"
    )
    assert not answer["at_once"]  # TensorRT keeps one plugin of a name
    assert answer["both"] == ["SparseConv2d", "SparseLinear"]
    assert answer["plugin"] is not None
    assert answer["second"]
    assert answer["still"] is not None, errors
