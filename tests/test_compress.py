"""What compression does to a model, and the report of what it saves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk

X = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))


def model(**patterns: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 8))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    chosen = {"0": "2:4", "2": "bsr16x16@0.75", "*": None}
    sk.convert(net.eval(), chosen, X, gate="always", progress=False)
    return net


def test_the_report_says_what_files_take(tmp_path: Path) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    for compression in (sk.Compression(4), sk.Compression(4, entropy=False)):
        report = sk.compression_report(net, compression)
        sk.save(net, tmp_path / "f", compression)
        summary = sk.inspect(tmp_path / "f")
        assert {row.name: row.coded for row in report.layers} == summary.layer_bytes
        tensors = load_file(tmp_path / "f")
        assert report.total.coded == sum(tensor.nbytes for tensor in tensors.values())
    assert [row.shared == row.coded for row in report.layers] == [True, True]
    sk.save(net, tmp_path / "g")
    assert report.total.sparse == sum(t.nbytes for t in load_file(tmp_path / "g").values())
    assert {row.name: row.sparse for row in report.layers} == sk.inspect(tmp_path / "g").layer_bytes
    first = report.layers[0]
    assert (first.dense, first.int8) == (4 * 256 * 256, 256 * 256 + 4 * 256)
    assert report.rest.dense == 4 * (256 + 256 + 256 * 8 + 8)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_the_table() -> None:
    text = str(sk.compression_report(model(), 5))
    assert text.splitlines()[0] == "5 bits per tensor, Huffman coded; bytes"
    for part in ("bsr16x16@0.75", "262,144", "66,560 (3.9x)", "sparse layers", "everything else"):
        assert part in text
    assert "not entropy coded" in str(sk.compression_report(model(), sk.Compression(entropy=False)))


def test_more_bits_err_less_and_take_more() -> None:
    rows = [sk.compression_report(model(), bits).layers[0] for bits in (2, 4, 6, 8)]
    errors = [row.error for row in rows]
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]
    assert errors[0] > 0.2  # type: ignore[operator]
    assert errors[3] < 0.01  # type: ignore[operator]
    assert [row.coded for row in rows] == sorted(row.coded for row in rows)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_applied_codebooks_are_those_of_the_file(tmp_path: Path, per: str) -> None:
    net, other = model(), model()
    dense = net[0].packed.to_dense()
    compression = sk.Compression(3, per)
    sk.save(net, tmp_path / "f", compression)
    report = sk.apply_codebooks(net, compression)
    assert report == sk.compression_report(model(), compression)
    weight = net[0].packed.to_dense()
    rows = weight if per == "channel" else weight.view(1, -1)
    assert all(row.unique().numel() <= 8 + 1 for row in rows)  # and what is pruned
    relative = float((weight - dense).norm() / dense.norm())
    assert relative == pytest.approx(report.layers[0].error, rel=1e-4)
    assert torch.equal(weight != 0, dense != 0)
    sk.load(other, tmp_path / "f", progress=False)
    with torch.no_grad():
        assert torch.equal(other(X), net(X))
    # And what is saved once more loses nothing more.
    sk.save(net, tmp_path / "g", compression)
    sk.load(other, tmp_path / "g", progress=False)
    with torch.no_grad():
        assert torch.equal(other(X), net(X))
    assert [row.error for row in sk.compression_report(net, compression).layers] == [0, 0]


def test_wrong_calls() -> None:
    for call in (sk.compression_report, sk.apply_codebooks):
        with pytest.raises(ValueError, match=r"has no sparse layer; run sparsekit\.convert first"):
            call(nn.Linear(4, 4))
        with pytest.raises(ValueError, match="expected a Compression, a number of bits or None"):
            call(model(), "5")  # type: ignore[arg-type]
