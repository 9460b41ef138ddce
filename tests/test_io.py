"""Files: what is saved is what is loaded; what is damaged is refused whole."""

from __future__ import annotations

import copy
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from file_cases import Edit, assert_unchanged, edited, flipped, header_size, layers, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import FusedActivation, SparseLinear


class Net(nn.Module):
    """N:M, blocks, a fused activation, a tied head, buffers, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64, bias=False))
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.mlp(self.embed(tokens))))


TOKENS = torch.arange(24)


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def converted() -> Net:
    model = net(0)
    model.norm.running_mean.fill_(0.5)
    patterns = {"mlp.0": "2:4v4", "mlp.2": "bsr16x16@0.5"}
    report = sk.convert(model, patterns, TOKENS, gate="always", progress=False)
    assert report.sparse == ["mlp.0", "mlp.2"]
    assert isinstance(model.mlp[1], FusedActivation)
    return model


@pytest.fixture
def path(converted: Net, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    sk.save(converted, path)
    return path


# --- round trips ------------------------------------------------------------------------------


def test_load_into_a_dense_model(converted: Net, path: Path) -> None:
    model = net(1)
    sk.load(model, path)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), converted(TOKENS))
    assert repr(model) == repr(converted)
    assert model.head.weight is model.embed.weight
    assert not any(module.training for module in model.modules())


def test_load_into_a_converted_model(converted: Net, path: Path) -> None:
    model = net(1)
    sk.convert(model, "2:4", TOKENS, gate="always", progress=False)
    sk.load(model, path)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), converted(TOKENS))


def test_load_packs_for_the_target(path: Path) -> None:
    model = net(1)
    sk.load(model, path, target="reference")
    assert [model.mlp[0].packed.format, model.mlp[2].packed.format] == ["nm", "bsr"]


def test_load_takes_the_dtypes_of_the_file(converted: Net, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    sk.save(converted.bfloat16(), path)
    model = net(1)
    parameter = model.embed.weight
    sk.load(model, path)
    assert model.embed.weight is parameter is model.head.weight
    assert parameter.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(TOKENS), converted(TOKENS))


def test_loaded_tensors_do_not_depend_on_the_file(converted: Net, path: Path) -> None:
    model = net(1)
    sk.load(model, path)
    with torch.no_grad():
        expected = model(TOKENS)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert torch.equal(model(TOKENS), expected)


def test_parameters_keep_their_identity_and_requires_grad(path: Path) -> None:
    model = net(1)
    model.mlp[0].bias.requires_grad_(False)
    kept = {name: parameter for name, parameter in model.named_parameters() if "weight" not in name}
    sk.load(model, path)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in kept.items())
    assert not model.mlp[0].bias.requires_grad


def test_the_file_is_canonical(converted: Net, path: Path) -> None:
    tensors = load_file(path)
    assert "mlp.2.crow_indices" in tensors
    assert "mlp.0.weight" not in tensors
    assert "head.weight" not in tensors  # tied: stored once, as embed.weight
    canonical = converted.mlp[0].packed.canonical()
    assert torch.equal(tensors["mlp.0.values"], canonical.values)
    assert torch.equal(tensors["mlp.0.indices"], canonical.indices)
    dense = sum(value.numel() * 4 for value in net(0).state_dict().values())
    assert path.stat().st_size < dense


def test_a_shared_layer_stays_shared(tmp_path: Path) -> None:
    def shared(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layer = nn.Linear(32, 32)
        return nn.Sequential(layer, nn.Tanh(), layer)

    model, other, x = shared(0), shared(1), torch.ones(2, 32)
    sk.convert(model, "2:4", x, gate="always", progress=False)
    assert model[0] is model[2]
    sk.save(model, tmp_path / "f")
    sk.load(other, tmp_path / "f")
    assert other[0] is other[2]
    assert torch.equal(model(x), other(x))


def test_states_of_tensors_and_packed_weights(tmp_path: Path) -> None:
    weight = torch.eye(32)
    base = torch.arange(12.0)
    state = {
        "0": sk.pack(weight, "2:4"),
        "0.bias": torch.ones(32),
        "view": base[3:9],
        "strided": base.view(3, 4).t(),
        "empty": torch.zeros(0),
        "empty2": torch.zeros(0),
    }
    sk.save(state, tmp_path / "f")
    tensors = load_file(tmp_path / "f")
    assert torch.equal(tensors["view"], base[3:9])
    assert torch.equal(tensors["strided"], base.view(3, 4).t())
    sk.save({"0": state["0"], "0.bias": state["0.bias"]}, tmp_path / "g")
    model = nn.Sequential(nn.Linear(32, 32))
    sk.load(model, tmp_path / "g")
    assert torch.equal(model(torch.ones(1, 32)), torch.full((1, 32), 2.0))


def test_a_dense_model_is_a_file_too(tmp_path: Path) -> None:
    sk.save(net(0), tmp_path / "f")
    model = net(1)
    sk.load(model, tmp_path / "f")
    with torch.no_grad():
        assert torch.equal(model(TOKENS), net(0)(TOKENS))
    assert "no sparse layers" in str(sk.inspect(tmp_path / "f"))


def test_inspect(path: Path) -> None:
    summary = sk.inspect(path)
    assert list(summary.layers) == ["mlp.0", "mlp.2"]
    assert str(summary.layers["mlp.0"].pattern) == "2:4v4"
    assert summary.layers["mlp.0"].activation == "gelu"
    assert summary.fused == {"mlp.1": "gelu"}
    assert summary.tied == {"head.weight": "embed.weight"}
    assert summary.dense["embed.weight"] == ("float32", (24, 64))
    assert summary.nbytes == path.stat().st_size
    text = str(summary)
    for part in ("version 1", "mlp.2", "bsr16x16@0.5", "48 x 64", "1 tied names"):
        assert part in text


# --- writing ----------------------------------------------------------------------------------


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' is a int, a file holds dense tensors only"):
        sk.save({"a": 3}, tmp_path / "f")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'a' is a Tensor, a file holds dense tensors only"):
        sk.save({"a": torch.eye(3).to_sparse()}, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_has_ordinary_permissions_and_an_old_one_keeps_its_own(
    converted: Net, tmp_path: Path
) -> None:
    path, ordinary = tmp_path / "f", tmp_path / "ordinary"
    ordinary.touch()
    sk.save(converted, path)
    assert path.stat().st_mode == ordinary.stat().st_mode
    path.chmod(0o640)
    sk.save(converted, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_rename_leaves_the_old_file(
    converted: Net, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        sk.save({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


FULL_DISK = """
import resource, signal, sys, torch, sparsekit as sk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sk.save({"a": torch.zeros(100_000)}, sys.argv[1])
except OSError as error:
    print("OSError", error)
"""


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"OSError save: {path} could not be written")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_an_oserror(converted: Net, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sk.save(converted, tmp_path / "no" / "f")


# --- refusing ---------------------------------------------------------------------------------


REFUSED: list[tuple[str, Edit, str]] = [
    ("another format", lambda t, m: m.update(format="pt"), "is no sparsekit file .*'pt'"),
    ("a future version", lambda t, m: m.update(version="3"), "has version '3', this library reads"),
    ("no version", lambda t, m: m.pop("version"), "has version None"),
    ("no layers", lambda t, m: m.pop("layers"), "damaged metadata: 'layers'"),
    ("layers as a list", lambda t, m: m.update(layers=[]), "damaged metadata: 'layers'"),
    ("tied as text", lambda t, m: m.update(tied="{"), "damaged metadata: 'tied'"),
    ("deep", lambda t, m: m.update(fused="[" * 100_000), "damaged metadata: 'fused'"),
    ("a pattern", lambda t, m: layers(m)["mlp.0"].update(pattern="2:3"), "'mlp.0' wrongly: NM: m"),
    ("a dtype", lambda t, m: layers(m)["mlp.0"].update(dtype="int8"), "'mlp.0' wrongly: 'int8'"),
    ("a list", lambda t, m: layers(m).update({"mlp.0": []}), "describes layer 'mlp.0' wrongly"),
    ("shape -1", lambda t, m: layers(m)["mlp.0"].update(shape=[-1, 64]), "'mlp.0' wrongly: shape"),
    ("shape 1e9", lambda t, m: layers(m)["mlp.0"].update(shape=[10**18, 64]), "with shape"),
    ("true shape", lambda t, m: layers(m)["mlp.0"].update(shape=[True, 64]), "wrongly: shape"),
    ("act", lambda t, m: layers(m)["mlp.0"].update(activation="tan"), "wrongly: activation 'tan'"),
    ("layer", lambda t, m: layers(m).update({"x": layers(m)["mlp.0"]}), "lacks x.values"),
    ("embed", lambda t, m: layers(m).update({"": layers(m)["mlp.0"]}), "lacks .values"),
    ("fused elsewhere", lambda t, m: m.update(fused={"norm": "gelu"}), "fuses the gelu at 'norm'"),
    ("fused twice", lambda t, m: m["fused"].update({"mlp.3": "gelu"}), "fuses the gelu at 'mlp.3'"),
    ("fused unknown", lambda t, m: m.update(fused={"mlp.1": 3}), "unknown activation 3"),
    ("fused relu", lambda t, m: m.update(fused={"mlp.1": "relu"}), "fuses the relu at 'mlp.1'"),
    ("tied to nothing", lambda t, m: m["tied"].update({"head.weight": "no"}), "to 'no', which"),
    ("tied to itself", lambda t, m: m["tied"].update({"embed.weight": "embed.weight"}), "ties"),
    ("tied to a list", lambda t, m: m["tied"].update({"head.weight": ["x"]}), "ties"),
    ("missing", lambda t, m: t.pop("norm.bias"), r"missing norm\.bias; unexpected nothing"),
    ("unexpected", lambda t, m: t.update(new=torch.ones(1)), "missing nothing; unexpected new"),
    ("no values", lambda t, m: t.pop("mlp.0.values"), r"lacks mlp\.0\.values of a 2:4v4 layer"),
    ("no crow", lambda t, m: t.pop("mlp.2.crow_indices"), r"lacks mlp\.2\.crow_indices"),
    ("no bias", lambda t, m: t.pop("mlp.0.bias"), r"missing mlp\.0\.bias"),
    ("wrong shape", lambda t, m: t.update({"norm.bias": torch.ones(3)}), r"'norm\.bias' as"),
    ("int bias", lambda t, m: t.update({"norm.bias": torch.ones(64).int()}), r"'norm\.bias' as"),
    ("bias dtype", lambda t, m: t.update({"mlp.0.bias": torch.ones(48).half()}), "a bias of 'mlp"),
    ("cut values", lambda t, m: t.update({"mlp.0.values": t["mlp.0.values"][1:]}), "layer 'mlp.0'"),
    ("int values", lambda t, m: t.update({"mlp.0.values": t["mlp.0.values"].int()}), "'mlp.0'"),
    ("nan", lambda t, m: t["mlp.0.values"].view(-1)[5:6].fill_(torch.nan), "a value is not finite"),
    ("columns", lambda t, m: t["mlp.2.indices"][:1].fill_(10**6), "damaged layer 'mlp.2'"),
    ("negative", lambda t, m: t["mlp.2.indices"][:1].fill_(-1), "damaged layer 'mlp.2'"),
    ("crow", lambda t, m: t["mlp.2.crow_indices"][-1:].fill_(10**6), "damaged layer 'mlp.2'"),
    ("crow back", lambda t, m: t["mlp.2.crow_indices"][1:2].fill_(99), "damaged layer 'mlp.2'"),
    ("positions", lambda t, m: t["mlp.0.indices"].fill_(0), "damaged layer 'mlp.0'"),
    ("int64", lambda t, m: t.update({"mlp.2.indices": t["mlp.2.indices"].long()}), "int32"),
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


def test_another_architecture_is_refused(path: Path) -> None:
    for model, says in (
        (nn.Sequential(nn.Linear(64, 48)), "has a sparse layer 'mlp.0', the model has nothing"),
        (nn.ModuleDict({"mlp": nn.Sequential(nn.ReLU())}), "the model has a ReLU there"),
    ):
        with pytest.raises(ValueError, match=says):
            sk.load(model, path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="is on the meta device; make the model on the CPU"):
        sk.load(model, path)


def test_files_that_are_none(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    save_file({"a": torch.zeros(3)}, plain)
    for name, content in (("empty", b""), ("text", b"hello, world"), ("zeros", b"\0" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or cut off"):
            sk.inspect(tmp_path / name)
    with pytest.raises(ValueError, match="is no sparsekit file"):
        sk.inspect(plain)
    with pytest.raises(FileNotFoundError):
        sk.inspect(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        sk.inspect(tmp_path)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    head = header_size(content)
    rng = random.Random(0)
    cuts = {0, 1, 7, 8, 9, head - 1, head, head + 1, len(content) - 1}
    cuts |= {rng.randrange(head) for _ in range(40)}
    cuts |= {rng.randrange(head, len(content)) for _ in range(40)}
    model = net(1)
    before = snapshot(model)
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is damaged or cut off"):
            sk.load(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("region", ["length", "header", "data"])
def test_flipped_bits_are_refused_or_harmless(path: Path, region: str) -> None:
    """Damage raises ValueError and leaves the model alone, or gives a model that runs."""
    model = net(1)
    before = snapshot(model)
    refused = 0
    for bad in flipped(path.read_bytes(), region, 60 if region == "length" else 250):
        path.write_bytes(bad)
        candidate = copy.deepcopy(model)
        try:
            sk.load(candidate, path)
        except ValueError:
            refused += 1
            assert_unchanged(candidate, before)
        else:
            assert isinstance(candidate.mlp[0], SparseLinear)
            with torch.no_grad():
                assert candidate(TOKENS).shape == (24, 24)
    assert refused > 0
