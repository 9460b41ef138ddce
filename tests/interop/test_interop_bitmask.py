"""compressed-tensors' bitmask files: against bytes worked out by hand and a slow writer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsekit as sk
from sparsekit import interop

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slowly(weight: Tensor, mask: Tensor, two_of_four: bool) -> dict[str, Tensor]:
    """The tensors of a layer, bit by bit."""
    n, k = weight.shape
    rows = [[0] * (-(-k // 8)) for _ in range(n)]
    values, offsets = [], []
    for row in range(n):
        offsets.append(len(values))
        for column in range(k):
            if mask[row, column]:
                rows[row][column // 8] |= 1 << column % 8
                values.append(weight[row, column])
    bits = torch.tensor(rows, dtype=torch.uint8)
    kept = torch.stack(values) if values else weight.new_zeros(0)
    if two_of_four:
        return {"compressed": kept.view(n, -1), "bitmask": bits, "shape": torch.tensor([[n], [k]])}
    return {
        "compressed": kept,
        "bitmask": bits,
        "shape": torch.tensor([n, k]),
        "row_offsets": torch.tensor(offsets),
    }


def named(layer: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{part}": tensor for part, tensor in parts.items()}


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = sk.mask(weight, "2:4")
    return weight * mask, mask, named("a.q_proj", slowly(weight, mask, True))


# --- reading ----------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    state = {
        "fc.compressed": torch.tensor([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]]),
        # 1001 0110 and 0110 1001, the first column in the lowest bit.
        "fc.bitmask": torch.tensor([[0x69], [0x96]], dtype=torch.uint8),
        "fc.shape": torch.tensor([[2], [8]]),
        "fc.bias": torch.ones(2),
    }
    imported = interop.from_compressed_tensors(state)
    assert imported.state.keys() == {"fc.weight", "fc.bias"}
    assert imported.state["fc.weight"].tolist() == [
        [5, 0, 0, 6, 0, 7, 8, 0],
        [0, 1, 2, 0, 3, 0, 0, 4],
    ]
    assert torch.equal(imported.masks["fc"], imported.state["fc.weight"] != 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_of_four_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    weight, mask, state = example(dtype)
    save_file({**state, "norm.weight": torch.ones(20)}, tmp_path / "f.safetensors")
    for source in (tmp_path / "f.safetensors", str(tmp_path / "f.safetensors"), tmp_path):
        imported = interop.from_compressed_tensors(source)
        assert imported.state.keys() == {"a.q_proj.weight", "norm.weight"}
        assert torch.equal(imported.state["a.q_proj.weight"], weight)
        assert list(imported.masks) == ["a.q_proj"]
        assert torch.equal(imported.masks["a.q_proj"], mask)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10**6))
def test_any_mask(n: int, k: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mask = torch.rand(n, k, generator=generator) < density
    imported = interop.from_compressed_tensors(named("x", slowly(weight, mask, False)))
    assert torch.equal(imported.state["x.weight"], weight * mask)
    assert torch.equal(imported.masks.get("x", torch.ones_like(mask)), mask)


def test_a_stored_zero_is_kept() -> None:
    weight, mask, state = example()
    state["a.q_proj.compressed"].zero_()
    imported = interop.from_compressed_tensors(state)
    assert torch.equal(imported.masks["a.q_proj"], mask)
    assert not bool(imported.state["a.q_proj.weight"].any())
    assert weight.any()


def test_a_folder_of_shards_with_a_config(tmp_path: Path) -> None:
    weight, _, state = example()
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.bias": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    config: dict[str, Any] = {"quantization_config": {"sparsity_config": sparsity}}
    for content in (config, {"compression_config": config["quantization_config"]}, {}, [1]):
        (tmp_path / "config.json").write_text(json.dumps(content))
        imported = interop.from_compressed_tensors(tmp_path)
        assert torch.equal(imported.state["a.q_proj.weight"], weight)
        assert imported.state.keys() == {"a.q_proj.weight", "b.bias"}
    sparsity["format"] = "marlin-24"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says the format is 'marlin-24', expected"):
        interop.from_compressed_tensors(tmp_path)
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is no JSON"):
            interop.from_compressed_tensors(tmp_path)


def test_names_that_only_end_alike_are_left_alone() -> None:
    state = {"x.compressed": torch.ones(3), "y.bitmask": torch.ones(3), "z.shape": torch.ones(2)}
    assert interop.from_compressed_tensors(state).state.keys() == state.keys()


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_the_slow_writer_writes(
    pattern: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(10, 20).to(dtype)
    mask = sk.mask(weight, pattern)
    strided = torch.randn(3, 4).t()
    packed = sk.pack(weight, pattern, mask=mask)
    config = interop.to_compressed_tensors({"fc": packed, "t": strided}, tmp_path / "f.safetensors")
    tensors = load_file(tmp_path / "f.safetensors")
    assert torch.equal(tensors.pop("t"), strided)
    expected = named("fc", slowly(weight, mask, True))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["sparsity_config"]["targets"] == ["fc"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    imported = interop.from_compressed_tensors(tmp_path)
    assert torch.equal(imported.state["fc.weight"], weight * mask)


def test_groups_that_keep_fewer_are_filled_up(tmp_path: Path) -> None:
    weight = torch.zeros(4, 8)
    weight[0, 3], weight[1, 0] = 5, 6
    interop.to_compressed_tensors({"fc": sk.pack(weight)}, tmp_path / "f")
    assert torch.equal(interop.from_compressed_tensors(tmp_path / "f").state["fc.weight"], weight)


def test_what_the_format_does_not_hold(tmp_path: Path) -> None:
    for value, says in (
        (sk.pack(torch.randn(8, 8), "1:4"), r"'fc' is 1:4 of shape \[8, 8\]; the format holds"),
        (sk.pack(torch.randn(8, 8), "bsr4x4"), "the format holds 2:4 matrices"),
        (sk.pack(torch.randn(8, 10), "2:4"), "with a multiple of 4 columns"),
        (sk.pack(torch.randn(8, 8, 3, 3), "2:4"), "the format holds 2:4 matrices"),
        (torch.eye(3).to_sparse(), "'fc' is a Tensor; expected packed weights and dense tensors"),
        (3, "'fc' is a int; expected packed weights and dense tensors"),
    ):
        with pytest.raises(ValueError, match=says):
            interop.to_compressed_tensors({"fc": value}, tmp_path / "f")  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


# --- refusing ---------------------------------------------------------------------------------

Edit = Callable[[dict[str, Tensor]], object]


def change(part: str, value: Tensor | Callable[[Tensor], Tensor]) -> Edit:
    def edit(state: dict[str, Tensor]) -> None:
        name = f"a.q_proj.{part}"
        state[name] = value(state[name]) if callable(value) else value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda s: s.pop("a.q_proj.shape"), "'a.q_proj': expected two integers as its .* nothing"),
        (change("shape", torch.tensor([6, 20, 1])), r"two integers as its shape, got torch.int64"),
        (change("shape", torch.tensor([6.0, 20.0])), "two integers as its shape, got torch.float"),
        (change("shape", torch.tensor([0, 20])), r"expected a shape of positive sides, got \[0"),
        (change("shape", torch.tensor([6, -20])), r"expected a shape of positive sides"),
        (change("shape", torch.tensor([6, 24])), r"keeps 60|expected values \[6, 12\]"),
        (change("shape", torch.tensor([6, 10**15])), "expected a bitmask uint8"),
        (change("shape", torch.tensor([6, 17])), "has bits beyond column 17"),
        (change("bitmask", lambda t: t[1:]), r"expected a bitmask uint8 \[6, 3\] .* \[5, 3\]"),
        (change("bitmask", lambda t: t.int()), r"expected a bitmask uint8 .* got torch.int32"),
        (change("bitmask", lambda t: t ^ 1), r"keeps \d+ values, there are 60"),
        (change("bitmask", lambda t: t.flip(1)), "beyond column 20"),
        (lambda s: s["a.q_proj.bitmask"][2, 0].fill_(0x0F), "the bitmask is not 2:4: row 2, col"),
        (change("compressed", lambda t: t[:-1]), "the bitmask keeps 60 values, there are 50"),
        (change("compressed", lambda t: t.flatten()), r"expected values \[6, 10\] of a 2:4 weight"),
        (change("compressed", lambda t: t.to(torch.int8)), "are torch.int8; a quantised weight is"),
        (change("compressed", lambda t: t.to(torch.float8_e4m3fn)), "a quantised weight is not"),
        (change("row_offsets", torch.arange(6)), "the row offsets are not those of the bitmask"),
        (change("row_offsets", torch.arange(0, 50, 10)), "the row offsets are not those"),
        (lambda s: s.update({"a.q_proj.weight": torch.ones(6, 20)}), "is there both dense and"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(edit: Edit, says: str, tmp_path: Path) -> None:
    _, _, state = example()
    edit(state)
    with pytest.raises(ValueError, match=says):
        interop.from_compressed_tensors(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f")
    with pytest.raises(ValueError, match=says):
        interop.read(tmp_path / "f")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no safetensors file"):
        interop.from_compressed_tensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        interop.from_compressed_tensors(tmp_path / "gone")
    (tmp_path / "f.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged or cut off"):
        interop.from_compressed_tensors(tmp_path)
    for name in ("f.safetensors", "g.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="'a' is in more than one file"):
        interop.from_compressed_tensors(tmp_path)


@pytest.mark.parametrize("two_of_four", [True, False])
def test_any_damage_is_refused_or_harmless(two_of_four: bool, tmp_path: Path) -> None:
    weight, mask, _ = example()
    state = named("a", slowly(weight, mask, two_of_four))
    save_file(state, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    rng = random.Random(two_of_four)
    refused = 0
    for _ in range(300):
        bad = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (tmp_path / "f").write_bytes(
            bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))]
        )
        try:
            imported = interop.read(tmp_path / "f")
        except ValueError:
            refused += 1
        else:
            for layer, kept in imported.masks.items():
                assert imported.state[f"{layer}.weight"].shape == kept.shape
    assert refused > 100
