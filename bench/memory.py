"""How much memory a network takes: the high-water mark of a process that only runs it.

    python -m bench.memory MODEL INPUTS THREADS

`MODEL` and `INPUTS` are files of `torch.save`; the mark is printed in MiB.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from bench.baselines import Unavailable
from bench.vision import import_torchvision
from sparsekit.demo.latency import Inputs

_ROOT = Path(__file__).parents[1]
# The first packs and makes buffers; later ones would show what grows.
_CALLS = 5


def peak_mib(model: nn.Module, inputs: Inputs, threads: int, folder: Path) -> float:
    """Runs a model in a fresh process.

    Args:
        model: Its classes can be imported there.
        inputs: What it is called with.
        threads: For torch and ours.
        folder: For the files.

    Raises:
        Unavailable: The process failed, or this system does not tell.
    """
    paths = folder / "model.pt", folder / "inputs.pt"
    torch.save(model, paths[0])
    torch.save(inputs, paths[1])
    ended = subprocess.run(
        [sys.executable, "-m", "bench.memory", *map(str, paths), str(threads)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:]
        raise Unavailable(f"the process that measures memory failed: {' '.join(last)}")
    return float(ended.stdout)


def high_water_mib() -> float:
    """Of this process, by the kernel's account.

    `getrusage` does not serve: its maximum is inherited from the process that started this one.

    Raises:
        OSError: There is no /proc.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    model_path, inputs_path, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with suppress(ImportError):
        import_torchvision()  # timm's modules import it
    model = torch.load(model_path, weights_only=False)
    inputs = torch.load(inputs_path)
    with torch.no_grad():
        for _ in range(_CALLS):
            model(*inputs)
    print(high_water_mib())


if __name__ == "__main__":
    main()
