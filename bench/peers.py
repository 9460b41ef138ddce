"""Engines that are no dependency: SciPy, and DeepSparse and XNNPACK in environments of their own.

DeepSparse 1.8.0 wants an old numpy and Python 3.11, LiteRT (which carries XNNPACK) versions of its
own; both run as a process that `bench/peer_worker.py` serves, so that their turns interleave with
ours. `make peers-env` makes both environments.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.baselines import Baseline, Call, Unavailable, gemm_model

_ROOT = Path(__file__).parents[1]

# What `make peers-env` installs, for the message of who made none.
_PACKAGES = {
    "deepsparse": '--only-binary deepsparse deepsparse==1.8.0 "numpy<2"',
    "xnnpack": "ai-edge-litert",
}
WORKERS = tuple(_PACKAGES)


def python_of(engine: str, given: str | None = None) -> Path:
    """The Python of an engine's environment.

    Args:
        engine: One of `WORKERS`.
        given: Its path from the command line; else `SPARSEKIT_<ENGINE>` of the environment, else
            where `make peers-env` puts it.

    Raises:
        Unavailable: There is none; the message says how to make it.
    """
    variable = f"SPARSEKIT_{engine.upper()}"
    asked = given or os.environ.get(variable)
    path = Path(asked) if asked else Path(sys.prefix) / "peers" / engine / "bin" / "python"
    if not path.is_file():
        raise Unavailable(
            f"{engine}: no Python at {path}; run `make peers-env`, or make one with\n"
            f"  python3.11 -m venv DIR && DIR/bin/pip install {_PACKAGES[engine]}\n"
            f"and pass --{engine} DIR/bin/python (or set {variable})"
        )
    return path


class Worker:
    """A process that runs one engine, one model at a time.

    Args:
        engine: Its name, for messages.
        command: What starts it.
    """

    def __init__(self, engine: str, command: Sequence[str]) -> None:
        self.engine = engine
        self._folder = tempfile.TemporaryDirectory(prefix="sparsekit-bench-")
        self.folder = Path(self._folder.name)
        self._log = (self.folder / "log.txt").open("w+")
        # The engines' own reports home would run while others are timed.
        environment = {**os.environ, "NM_DISABLE_ANALYTICS": "1", "PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    @classmethod
    def start(cls, engine: str, python: Path) -> Worker:
        """The worker of an engine in its own Python."""
        return cls(engine, [str(python), "-m", "bench.peer_worker", engine])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            Unavailable: The engine refused, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-3:]
            raise Unavailable(f"{self.engine}: its process ended: {' '.join(last) or 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{self.engine}: {answer['error'].splitlines()[0]}")
        return answer

    def load(self, inputs: Sequence[Tensor], threads: int, **files: Path) -> WorkerCall:
        """Loads a model and runs it once.

        Args:
            inputs: Of the model, in its order.
            threads: To use.
            files: What the engine reads, by the name of the request's field.
        """
        paths = []
        for index, tensor in enumerate(inputs):
            paths.append(self.folder / f"input{index}.npy")
            np.save(paths[-1], tensor.numpy())
        output = self.folder / "output.npy"
        answer = self.ask(
            do="load",
            inputs=[str(path) for path in paths],
            output=str(output),
            threads=threads,
            **{name: str(path) for name, path in files.items()},
        )
        return WorkerCall(self, torch.from_numpy(np.load(output)), str(answer["about"]))

    def close(self) -> None:
        """Ends the process and removes its files."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # It may have ended by itself, with a request still in the pipe.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerCall:
    """A loaded model in another process: gives its result, and times its own turns.

    Args:
        worker: Which process.
        result: What the model gave for its inputs.
        about: The engine's words about itself.
    """

    def __init__(self, worker: Worker, result: Tensor, about: str) -> None:
        self.about = about
        self._worker, self._result = worker, result

    def __call__(self) -> Tensor:
        return self._result

    def turn(self) -> list[float]:
        """One turn's seconds, without the way to the other process."""
        seconds: list[float] = self._worker.ask(do="run")["seconds"]
        return seconds


def only_f32(name: str, weight: Tensor) -> None:
    """Refuses a weight of another type for an engine that has float32 alone."""
    if weight.dtype != torch.float32:
        raise Unavailable(f"{name} has no bfloat16 layer")


def checked(name: str, call: WorkerCall, expected: Tensor) -> Call:
    """A fast wrong answer is no engine; only gross faults are looked for."""
    result = call()
    if result.shape != expected.shape:
        raise Unavailable(f"{name}: its result is {list(result.shape)}")
    error, scale = (result - expected).abs().max().item(), expected.abs().max().item()
    if not error <= 1e-4 * scale:
        raise Unavailable(f"{name}: its result differs from dense by {error:.3g} of {scale:.3g}")
    return call


def _deepsparse(worker: Worker, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    import onnx

    only_f32("DeepSparse", weight)
    path = worker.folder / "linear.onnx"
    onnx.save(gemm_model(weight, bias, x.shape[0]), str(path))
    call = worker.load([x], torch.get_num_threads(), model=path)
    return checked("DeepSparse", call, torch.nn.functional.linear(x, weight, bias))


def _xnnpack(worker: Worker, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    only_f32("LiteRT's XNNPACK", weight)
    files = {"weight": weight, "bias": bias}
    for name, tensor in files.items():
        np.save(worker.folder / f"{name}.npy", tensor.numpy())
    paths = {name: worker.folder / f"{name}.npy" for name in files}
    call = worker.load([x], torch.get_num_threads(), **paths)
    return checked("XNNPACK", call, torch.nn.functional.linear(x, weight, bias))


def _scipy(block: tuple[int, int] | None, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """SciPy multiplies from the left and knows one thread, whatever it is given."""
    only_f32("SciPy", weight)
    from scipy import sparse

    if block is None:
        matrix = sparse.csr_array(weight.numpy())
    else:
        sides = tuple(weight.shape)
        if any(side % part for side, part in zip(sides, block, strict=True)):
            raise Unavailable(f"blocks of {block} do not divide a weight of {sides}")
        matrix = sparse.bsr_array(weight.numpy(), blocksize=block)
    columns = np.ascontiguousarray(x.t().numpy())
    added = bias.unsqueeze(1).numpy()
    return lambda: torch.from_numpy(matrix @ columns + added).t()


SCIPY = (
    Baseline("scipy-csr", False, partial(_scipy, None)),
    Baseline("scipy-bsr16x16", False, partial(_scipy, (16, 16))),
)

# XNNPACK's fully connected operator reads dense weights, and cannot be told to leave AVX-512 alone.
_WORKER_BASELINES = {
    "deepsparse": lambda worker: Baseline("deepsparse", False, partial(_deepsparse, worker)),
    "xnnpack": lambda worker: Baseline("xnnpack", True, partial(_xnnpack, worker), every_isa=False),
}


def worker_baseline(worker: Worker) -> Baseline:
    """The baseline that a worker's engine is."""
    return _WORKER_BASELINES[worker.engine](worker)


def start_workers(engines: Sequence[str], pythons: Mapping[str, str | None]) -> list[Worker]:
    """A worker for each engine.

    Args:
        engines: Of `WORKERS`.
        pythons: What the command line says of their Pythons.

    Raises:
        Unavailable: An engine has no environment; checked for all before any is started.
    """
    found = {engine: python_of(engine, pythons.get(engine)) for engine in engines}
    return [Worker.start(engine, python) for engine, python in found.items()]
