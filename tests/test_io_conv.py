"""Files with convolutions: what is saved is what is loaded; what is damaged is refused whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from file_cases import Edit, assert_unchanged, edited, flipped, layers, snapshot
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.filters import FilterShape
from sparsekit.nn import FusedActivation, SparseConv1d, SparseConv2d, SparseLinear


class Net(nn.Module):
    """Filters of two kinds, groups, a fused activation, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.two = nn.Conv2d(16, 16, (1, 3), padding="same", padding_mode="circular", groups=2)
        self.line = nn.Conv1d(16, 24, 5, padding=4, dilation=2, bias=False)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.act(self.one(x)))
        return self.head(self.line(y.flatten(2)).mean(2))


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3))


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def sparse(seed: int, pattern: str = "2:4") -> Net:
    model = net(seed)
    model.one = SparseConv2d.from_dense(model.one, pattern, activation="relu")
    model.act = FusedActivation("relu").eval()
    model.two = SparseConv2d.from_dense(model.two, "2:4v4")
    model.line = SparseConv1d.from_dense(model.line, "bsr8x8@0.5")
    model.head = SparseLinear.from_dense(model.head, "2:4")
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    sk.save(sparse(0), path)
    return path


def test_load_into_a_dense_and_into_a_sparse_model(path: Path) -> None:
    for model in (net(1), sparse(1), sparse(1, "bsr16x8@0.5")):
        sk.load(model, path)
        assert torch.equal(output(model), output(sparse(0)))
        assert repr(model) == repr(sparse(0))
        assert not any(module.training for module in model.modules())


def test_load_packs_for_the_target(path: Path) -> None:
    model = net(1)
    sk.load(model, path, target="reference")
    assert [model.one.packed.format, model.line.packed.format] == ["nm", "bsr"]


def test_packed_weights_alone(tmp_path: Path) -> None:
    weight = torch.randn(8, 4, 3, 3)
    packed = sk.pack(weight, "2:4", groups=2)
    sk.save({"conv": packed}, tmp_path / "f")
    entry = sk.inspect(tmp_path / "f").layers["conv"]
    assert entry.filters == FilterShape(8, 4, (3, 3), 2)
    assert entry.shape == (8, 72)
    assert entry.weight_shape == (8, 4, 3, 3)


def test_inspect(path: Path) -> None:
    summary = sk.inspect(path)
    assert list(summary.layers) == ["one", "two", "line", "head"]
    filters = [entry.filters for entry in summary.layers.values()]
    assert filters == [
        FilterShape(16, 8, (3, 3)),
        FilterShape(16, 8, (1, 3), 2),
        FilterShape(24, 16, (1, 5), 1, 1),
        None,
    ]
    text = str(summary)
    for part in ("16 x 8 x 3 x 3", "24 x 16 x 5", "4 x 24", "bsr8x8@0.5"):
        assert part in text


def test_a_file_without_filters_loads_as_before(tmp_path: Path) -> None:
    """What was written before there were convolutions says nothing of filters."""
    model = nn.Sequential(SparseLinear.from_dense(nn.Linear(8, 8)))
    sk.save(model, tmp_path / "f")
    seen: list[Any] = []
    edited(tmp_path / "f", lambda t, m: seen.append(layers(m)["0"].keys()))
    assert set(seen[0]) == {"pattern", "shape", "dtype", "activation"}


def filters(metadata: dict[str, Any]) -> dict[str, Any]:
    return layers(metadata)["one"]["filters"]  # type: ignore[no-any-return]


REFUSED: list[tuple[str, Edit, str]] = [
    ("a list", lambda t, m: layers(m)["one"].update(filters=[]), "describes layer 'one' wrongly"),
    ("null", lambda t, m: layers(m)["one"].update(filters=None), "describes layer 'one' wrongly"),
    ("empty", lambda t, m: layers(m)["one"].update(filters={}), "'one' wrongly: 'weight'"),
    ("no groups", lambda t, m: filters(m).pop("groups"), "'one' wrongly: 'groups'"),
    ("groups 0", lambda t, m: filters(m).update(groups=0), "expected sizes of at least 1"),
    ("groups 3", lambda t, m: filters(m).update(groups=3), "are no multiple of groups=3"),
    ("groups 2", lambda t, m: filters(m).update(groups=2), "'one' with groups=2, the model with"),
    ("groups text", lambda t, m: filters(m).update(groups="2"), "expected sizes of at least 1"),
    ("text", lambda t, m: filters(m).update(weight="abcd"), "'one' wrongly"),
    ("a number", lambda t, m: filters(m).update(weight=3), "'one' wrongly"),
    ("2-D", lambda t, m: filters(m).update(weight=[16, 72]), "'one' wrongly: filters"),
    ("5-D", lambda t, m: filters(m).update(weight=[16, 8, 1, 3, 3]), "'one' wrongly: filters"),
    ("negative", lambda t, m: filters(m).update(weight=[16, 8, -3, -3]), "sizes of at least 1"),
    ("true", lambda t, m: filters(m).update(weight=[16, 8, 9, True]), "sizes of at least 1"),
    ("float", lambda t, m: filters(m).update(weight=[16, 8, 3.0, 3]), "sizes of at least 1"),
    ("huge", lambda t, m: filters(m).update(weight=[16, 8, 10**30, 3]), "'one' wrongly: filters"),
    ("rows", lambda t, m: filters(m).update(weight=[8, 8, 3, 3]), "'one' wrongly: filters"),
    ("9x1", lambda t, m: filters(m).update(weight=[16, 8, 9, 1]), "with shape .*, the model with"),
    ("1-D", lambda t, m: filters(m).update(weight=[16, 8, 9]), "a sparse conv1d 'one', the model"),
    ("linear", lambda t, m: layers(m)["one"].pop("filters"), "a sparse layer 'one', the model has"),
    (
        "a conv",
        lambda t, m: layers(m)["head"].update(filters={"weight": [4, 24, 1], "groups": 1}),
        "has a sparse conv1d 'head', the model has a Linear there",
    ),
    (
        "vectors",
        lambda t, m: layers(m)["two"].update(pattern="2:4v16"),
        "2:4v16 decides 16 rows together, a group has 8",
    ),
    ("cut", lambda t, m: t.update({"two.values": t["two.values"][1:]}), "damaged layer 'two'"),
    ("columns", lambda t, m: t["line.indices"][:1].fill_(10**6), "damaged layer 'line'"),
    ("crow", lambda t, m: t["line.crow_indices"][1:2].fill_(-1), "damaged layer 'line'"),
    ("positions", lambda t, m: t["two.indices"].fill_(0), "damaged layer 'two'"),
]


@pytest.mark.parametrize(("what", "edit", "says"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_does_not_fit_is_refused_whole(path: Path, what: str, edit: Edit, says: str) -> None:
    model = net(1)
    before = snapshot(model)
    bad = edited(path, edit)
    with pytest.raises(ValueError, match=says) as caught:
        sk.load(model, bad)
    assert str(bad) in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("region", ["header", "data"])
def test_flipped_bits_are_refused_or_harmless(path: Path, region: str) -> None:
    """Damage raises ValueError and leaves the model alone, or gives a model that runs."""
    model = net(1)
    before = snapshot(model)
    refused = 0
    for bad in flipped(path.read_bytes(), region, 200):
        path.write_bytes(bad)
        candidate = copy.deepcopy(model)
        try:
            sk.load(candidate, path)
        except ValueError:
            refused += 1
            assert_unchanged(candidate, before)
        else:
            assert isinstance(candidate.one, SparseConv2d)
            assert output(candidate).shape == (2, 4)
    assert refused > 0
