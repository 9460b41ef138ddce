"""Loads a saved model in a process of its own and embeds the test half."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekit.demo.encoder import embed, empty, load_tokenizer
from sparsekit.io import load


def compare(model: Path, texts: list[str], expected: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Has another process load the file and embed the texts, and compares bit for bit.

    Args:
        model: The saved file.
        texts: What to embed.
        expected: This process's embeddings, float32 [texts, hidden].
        dtype: Of the model.

    Returns:
        `equal`, `max_abs_difference`, `load_seconds` and `texts`.

    Raises:
        RuntimeError: The other process failed; the message ends with its last output.
    """
    with tempfile.TemporaryDirectory(prefix="sparsekit-demo-") as name:
        folder = Path(name)
        (folder / "model.safetensors").symlink_to(model.resolve())
        (folder / "texts.json").write_text(json.dumps(texts))
        # Not `-m`: the package imports this module, and runpy warns when it runs one twice.
        code = "import sparsekit.demo.fresh as fresh; fresh.main()"
        command = [sys.executable, "-c", code, name]
        command += [str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"demo: loading {model} in a fresh process failed with exit code "
                f"{done.returncode}: {done.stdout[-2000:]}"
            )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        loaded = load_file(folder / "embeddings.safetensors")["embeddings"]
    return {
        "equal": torch.equal(loaded, expected),
        "max_abs_difference": (loaded - expected).abs().max().item(),
        "load_seconds": result["load_seconds"],
        "texts": len(texts),
    }


def main() -> None:
    """The other process's side of `compare`; arguments FOLDER DTYPE THREADS.

    Reads `model.safetensors` and `texts.json` in the folder and writes `embeddings.safetensors`;
    the last line on stdout is a JSON object.
    """
    folder, dtype, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    encoder = empty(getattr(torch, dtype))
    start = time.perf_counter()
    load(encoder, folder / "model.safetensors")
    seconds = time.perf_counter() - start
    texts = json.loads((folder / "texts.json").read_text())
    rows = embed(encoder, load_tokenizer(), texts, label="embedding in a fresh process")
    save_file({"embeddings": rows}, folder / "embeddings.safetensors")
    print(json.dumps({"load_seconds": seconds}))
