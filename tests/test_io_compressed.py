"""Files with shared and coded values: what was shared is what is loaded; damage is refused."""

from __future__ import annotations

import copy
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_models import always, network, run
from file_cases import Edit, assert_unchanged, edited, flipped, header_size, layers, snapshot
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import FusedActivation, SparseConv1d, SparseConv2d, SparseLinear


class Net(nn.Module):
    """Every kind of pattern and layer, a fused activation, a shared layer, a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.one = nn.Linear(64, 96)
        self.act = nn.GELU()
        self.two = nn.Linear(96, 64, bias=False)
        self.shared = nn.ModuleList([nn.Linear(64, 64)])
        self.shared.append(self.shared[0])
        self.conv = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.line = nn.Conv1d(32, 24, 5, padding=2)
        self.head = nn.Linear(64, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.shared[1](self.shared[0](self.two(self.act(self.one(self.embed(tokens))))))
        y = self.line(self.conv(x.view(-1, 16, 2, 2)).flatten(2))
        return self.head(x) + y.mean(2)


TOKENS = torch.arange(24)


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for parameter in model.parameters():  # as trained weights are; uniform ones have no short codes
        nn.init.normal_(parameter, std=0.1)
    return model


def sparse(dtype: torch.dtype = torch.float32) -> Net:
    model = net(0).to(dtype)
    model.one = SparseLinear.from_dense(model.one, "2:4v4", activation="gelu")
    model.act = FusedActivation("gelu").eval()
    model.two = SparseLinear.from_dense(model.two, "bsr16x16@0.5")
    model.shared[0] = model.shared[1] = SparseLinear.from_dense(model.shared[0], "4:8")
    model.conv = SparseConv2d.from_dense(model.conv, "2:4")
    model.line = SparseConv1d.from_dense(model.line, "bsr8x8@0.5")
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    sk.save(sparse(), path, 4)
    return path


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "compression",
    [sk.Compression(4), sk.Compression(3, "channel"), sk.Compression(6, "tensor", False)],
)
def test_what_is_loaded_is_what_was_shared(
    dtype: torch.dtype, compression: sk.Compression, tmp_path: Path
) -> None:
    model = sparse(dtype)
    sk.save(model, tmp_path / "f", compression)
    other = net(1)
    sk.load(other, tmp_path / "f")
    plain = output(model)
    sk.apply_codebooks(model, compression)
    assert torch.equal(output(other), output(model))
    assert not torch.equal(output(other), plain)
    assert repr(other) == repr(model)
    assert other.shared[0] is other.shared[1]
    assert other.head.weight is other.embed.weight
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = sparse()
    before = snapshot(model)
    sk.save(model, tmp_path / "f", 2)
    assert_unchanged(model, before)


def contents(path: Path) -> tuple[dict[str, str], bytes]:
    """The metadata, whose order safetensors leaves open, and everything behind the header."""
    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
    content = path.read_bytes()
    return metadata, content[header_size(content) :]


def test_files_of_other_versions_are_as_before(path: Path, tmp_path: Path) -> None:
    sk.save(sparse(), tmp_path / "plain")
    sk.save(sparse(), tmp_path / "none", None)
    assert contents(tmp_path / "plain") == contents(tmp_path / "none")
    for file, version in ((tmp_path / "plain", "1"), (path, "2")):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        assert metadata["version"] == version
        coded = ["coding" in entry for entry in json.loads(metadata["layers"]).values()]
        assert coded == [version == "2"] * 6
    assert path.stat().st_size < 0.5 * (tmp_path / "plain").stat().st_size


def test_a_file_with_nothing_to_compress_is_an_ordinary_one(tmp_path: Path) -> None:
    for name, compress in (("f", 5), ("g", None)):
        generator = torch.Generator().manual_seed(0)
        state = {
            "small": sk.pack(torch.randn(4, 4, generator=generator), "2:4"),
            "dense": torch.ones(64, 64),
        }
        sk.save(state, tmp_path / name, compress)
    assert contents(tmp_path / "f") == contents(tmp_path / "g")
    assert sk.inspect(tmp_path / "f").version == 1


def test_a_weight_under_two_names_is_stored_once(path: Path, tmp_path: Path) -> None:
    tied = {name: source for name, source in sk.inspect(path).tied.items() if "shared" in name}
    assert tied == {
        f"shared.1.{part}": f"shared.0.{part}"
        for part in ("bias", "codebook", "codes", "positions")
    }
    packed = sk.pack(torch.randn(64, 64), "2:4")
    sk.save({"a": packed, "b": packed}, tmp_path / "f", 4)
    assert set(load_file(tmp_path / "f")) == {"a.codebook", "a.codes", "a.positions"}
    assert list(sk.inspect(tmp_path / "f").layers) == ["a", "b"]


def test_folded_normalisations(tmp_path: Path) -> None:
    model, x = network("resnet")
    always(model, x, fold_batchnorm=True)
    sk.save(model, tmp_path / "f", 5)
    other, _ = network("resnet")
    sk.load(other, tmp_path / "f", progress=False)
    sk.apply_codebooks(model, 5)
    assert torch.equal(run(other, x), run(model, x))
    assert repr(other) == repr(model)


def test_into_a_sparse_model_and_for_a_target(path: Path) -> None:
    model, other = sparse(), sparse()
    sk.load(other, path, target="reference")
    sk.apply_codebooks(model, 4)
    assert other.two.packed.format == "bsr"
    assert torch.equal(other.two.packed.to_dense(), model.two.packed.to_dense())


def test_inspect(path: Path, tmp_path: Path) -> None:
    summary = sk.inspect(path)
    assert summary.version == 2
    coding = summary.layers["two"].coding
    assert coding is not None
    assert (coding.bits, coding.per, coding.codes, coding.nnzb) == (4, "tensor", "huffman", 12)
    tensors = load_file(path)
    parts = [tensors[f"one.{part}"] for part in ("codebook", "codes", "positions")]
    assert summary.layer_bytes["one"] == sum(part.nbytes for part in parts)
    assert not any("codes" in name or "codebook" in name for name in summary.dense)
    text = str(summary)
    assert "version 2" in text
    assert "compression" in text
    assert "4 bits per tensor, huffman" in text
    sk.save(sparse(), tmp_path / "plain")
    assert "compression" not in str(sk.inspect(tmp_path / "plain"))


def test_wrong_compressions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a Compression, a number of bits or None, got s"):
        sk.save(sparse(), tmp_path / "f", "5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, got 9"):
        sk.save(sparse(), tmp_path / "f", 9)
    assert list(tmp_path.iterdir()) == []


# --- refusing ---------------------------------------------------------------------------------


def coding(metadata: dict[str, Any], name: str = "one") -> dict[str, Any]:
    return layers(metadata)[name]["coding"]  # type: ignore[no-any-return]


def swap(tensors: dict[str, Tensor], one: str, two: str) -> None:
    tensors[one], tensors[two] = tensors[two], tensors[one]


BOMB = torch.tensor(list(zlib.compress(bytes(1_000_000))), dtype=torch.uint8)

REFUSED: list[tuple[str, Edit, str]] = [
    ("version 1", lambda t, m: m.update(version="1"), "wrongly: coded in a file of version 1"),
    ("null", lambda t, m: layers(m)["one"].update(coding=None), "describes layer 'one' wrongly"),
    ("empty", lambda t, m: layers(m)["one"].update(coding={}), "'one' wrongly: 'bits'"),
    ("bits", lambda t, m: coding(m).update(bits=9), "'one' wrongly: Compression: bits must be"),
    ("per", lambda t, m: coding(m).update(per="group"), "'one' wrongly: Compression: per must be"),
    ("coder", lambda t, m: coding(m).update(codes="lzma"), "'one' wrongly: streams 'lzma'"),
    ("nnzb", lambda t, m: coding(m, "two").update(nnzb=11), "damaged layer 'two': codes: "),
    ("nnzb huge", lambda t, m: coding(m, "two").update(nnzb=10**12), "damaged layer 'two'"),
    ("bytes", lambda t, m: coding(m).update(position_bytes=10**12), "layer 'one': positions: "),
    ("plain", lambda t, m: layers(m)["one"].pop("coding"), "lacks one.values of a 2:4v4 layer"),
    ("no codes", lambda t, m: t.pop("one.codes"), "lacks one.codes of a 2:4v4 layer"),
    ("values too", lambda t, m: t.update({"x.values": BOMB}), "unexpected x.values"),
    ("nan", lambda t, m: t["one.codebook"][0, :1].fill_(torch.nan), "'one': codebook: a value"),
    ("inf", lambda t, m: t["one.codebook"][0, 3:4].fill_(torch.inf), "'one': codebook: a value"),
    ("dtype", lambda t, m: t.update({"one.codebook": t["one.codebook"].half()}), "'one': codebook"),
    ("entries", lambda t, m: t.update({"one.codebook": t["one.codebook"][:, :3]}), "is beyond a"),
    ("flat", lambda t, m: t.update({"one.codebook": t["one.codebook"][0]}), "'one': codebook"),
    ("cut", lambda t, m: t.update({"one.codes": t["one.codes"][:-5]}), "'one': codes: the stream"),
    ("long", lambda t, m: t.update({"one.codes": t["one.codes"].repeat(2)}), "'one': codes: the"),
    ("bomb", lambda t, m: t.update({"one.codes": BOMB}), "'one': codes: the stream goes on after"),
    ("int32", lambda t, m: t.update({"one.codes": t["one.codes"].int()}), "'one': codes: expected"),
    ("other", lambda t, m: t.update({"one.codes": t.pop("line.codes")}), "lacks line.codes"),
    ("swap", lambda t, m: swap(t, "line.codes", "one.codes"), "damaged layer 'one': codes"),
    ("positions", lambda t, m: swap(t, "two.positions", "one.positions"), "'one': positions"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "edit", "says"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_does_not_fit_is_refused_whole(path: Path, what: str, edit: Edit, says: str) -> None:
    model = net(1)
    before = snapshot(model)
    bad = edited(path, edit)
    with pytest.raises(ValueError, match=says) as caught:
        sk.load(model, bad)
    assert str(bad) in str(caught.value)
    assert_unchanged(model, before)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    rng = random.Random(0)
    for cut in sorted(rng.randrange(len(content)) for _ in range(60)):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is damaged or cut off"):
            sk.load(net(1), path)


@pytest.mark.parametrize("region", ["header", "data"])
@pytest.mark.parametrize("entropy", [True, False])
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, region: str, entropy: bool) -> None:
    path = tmp_path / "f"
    sk.save(sparse(), path, sk.Compression(4, "channel", entropy))
    model = net(1)
    before = snapshot(model)
    refused = 0
    for bad in flipped(path.read_bytes(), region, 120):
        path.write_bytes(bad)
        candidate = copy.deepcopy(model)
        try:
            sk.load(candidate, path)
        except ValueError:
            refused += 1
            assert_unchanged(candidate, before)
        else:
            assert isinstance(candidate.one, SparseLinear)
            assert output(candidate).shape == (24, 24)
    assert refused > (5 if region == "header" or entropy else 0)
