"""Checkpoints: what comes back, and what a kill leaves."""

import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from sparsekit.prune import resume

VALUE = {
    "tensors": [torch.arange(6.0).view(2, 3).t(), torch.tensor(True), torch.zeros(0, 3)],
    "state": {0: {"step": torch.tensor(3.0), "momentum": None}, 7: {}},
    "groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "fused": False, "params": [0, 7]}],
    "losses": [0.1 + 0.2, 1e-300, float("inf")],
    "name": "Ådam",
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_everything_comes_back_as_it_was(tmp_path):
    path = tmp_path / "file"
    resume.write(path, "test", VALUE)
    found = resume.read(path, "test")
    assert same(found, VALUE)
    assert not same(found, VALUE | {"losses": [0.3, 1e-300, float("inf")]})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_tensors_of_one_storage(tmp_path):
    whole = torch.arange(8.0)
    resume.write(tmp_path / "file", "test", [whole, whole[2:4], whole])
    assert same(resume.read(tmp_path / "file", "test"), [whole, whole[2:4], whole])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: resume.write(path, "other", VALUE),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save(VALUE, path),
        lambda path: save_file({"0": torch.ones(1)}, path),
        lambda path: save_file({}, path, {"kind": "test"}),
        lambda path: save_file({}, path, {"kind": "test", "structure": '{"tensor": "0"}'}),
        lambda path: save_file({}, path, {"kind": "test", "structure": '{"tensor": []}'}),
        lambda path: save_file({}, path, {"kind": "test", "structure": '{"a": 1, "b": 2}'}),
        lambda path: save_file({}, path, {"kind": "test", "structure": "[" * 100_000}),
    ],
)
def test_anything_else_is_refused(tmp_path, damage):
    path = tmp_path / "file"
    resume.write(path, "test", VALUE)
    damage(path)
    with pytest.raises(ValueError, match=r"file is no checkpoint of test, or is damaged \(.+\)"):
        resume.read(path, "test")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    resume.write(path, "test", VALUE)
    with pytest.raises(TypeError):
        resume.write(path, "test", object())
    with pytest.MonkeyPatch.context() as patch:

        def half(tensors, file, metadata):
            file.write_bytes(b"half")
            raise OSError("no space left")

        patch.setattr(resume, "save_file", half)
        with pytest.raises(OSError, match="no space"):
            resume.write(path, "test", VALUE)
    assert same(resume.read(path, "test"), VALUE)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_kill_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    program = (
        "import sys, pathlib, torch\n"
        "from sparsekit.prune import checkpoints\n"
        "for count in range(10**9):\n"
        "    value = [torch.full((300_000,), count), count]\n"
        "    resume.write(pathlib.Path(sys.argv[1]), 'test', value)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        writer.kill()
        writer.wait()
    tensor, count = resume.read(path, "test")
    assert bool((tensor == count).all())


def test_masks():
    masks = {"a": torch.tensor([[True, False, True]] * 3), "b": torch.ones(2, 8, dtype=torch.bool)}
    packed = resume.pack_masks(masks)
    assert [mask.numel() for mask in packed.values()] == [2, 2]
    assert resume.same_masks(packed, masks)
    assert not resume.same_masks(packed, {"a": masks["a"]})
    changed = masks["a"].clone()
    changed[2, 2] = False
    assert not resume.same_masks(packed, masks | {"a": changed})
