"""`prune_file`: the same as `prune`, from files to files, and what happens when it is stopped."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.prune import prune, prune_file
from sparsekit.prune.disk import streaming
from sparsekit.prune.disk.shards import INDEX
from sparsekit.prune.hollow import Hollow

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x)) * self.k(x))


class Model(nn.Module):
    """Tied embedding, a parameter of its own, blocks, a buffer and a layer that nothing runs."""

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.position = nn.Parameter(torch.randn(5, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def dense_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    model.norm.running_mean += 0.1
    return model


def batches_of(seed=1):
    make = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (40, 5), generator=make) for _ in range(3)]


def on_meta(dtype=torch.float32):
    with torch.device("meta"):
        return Model().to(dtype)


def save_source(folder, dtype=torch.float32, tensors=None):
    """In three shards, the tied weight once."""
    folder.mkdir()
    state = dense_model(dtype).state_dict() if tensors is None else tensors
    state.pop("head.weight", None)
    names = sorted(state)
    shard_of = {}
    for number in range(3):
        file = f"part-{number}.safetensors"
        save_file({name: state[name] for name in names[number::3]}, folder / file)
        shard_of |= dict.fromkeys(names[number::3], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


@pytest.fixture
def source(tmp_path):
    return save_source(tmp_path / "source")


LAYERS = [f"blocks.{block}.{name}" for block in range(3) for name in ("q", "k", "o")]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """What a run that nothing interrupts writes."""
    folder = tmp_path_factory.mktemp("at_once")
    run(save_source(folder / "source"), folder / "out")
    return written(folder / "out")


def run(source, out, **options):
    options = {"calibration": batches_of(), "progress": False} | options
    return prune_file(on_meta(), source, out, "2:4", **options)


def written(out):
    """What the folder holds, read by its index."""
    index = json.loads((Path(out) / INDEX).read_text())
    shards = {file: load_file(Path(out) / file) for file in set(index["weight_map"].values())}
    assert {path.name for path in Path(out).glob("*.safetensors")} == set(shards)
    total = sum(t.nbytes for shard in shards.values() for t in shard.values())
    assert index["metadata"]["total_size"] == total
    return {name: shards[file][name].clone() for name, file in index["weight_map"].items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- the same as prune ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_the_bits_are_those_of_prune(tmp_path, method, dtype):
    source, model = save_source(tmp_path / "source", dtype), dense_model(dtype)
    expected = prune(model, "2:4", method, batches_of(), progress=False)
    empty = on_meta(dtype)
    found = prune_file(empty, source, tmp_path / "out", "2:4", method, batches_of(), progress=False)
    state = model.state_dict()
    del state["head.weight"]
    assert_equal(written(tmp_path / "out"), state)
    assert found.masks.keys() == expected.masks.keys()
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name], mask)
    rows = [
        [(r.name, r.shape, r.pattern, r.sparsity, r.error, r.reason) for r in report.layers]
        for report in (found, expected)
    ]
    assert sorted(rows[0]) == sorted(rows[1])
    assert found.sparsity == expected.sparsity == 0.5
    assert all(t.device.type == "meta" for t in empty.state_dict().values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in empty.modules())


def test_without_calibration(source, tmp_path):
    model = dense_model()
    prune(model, "1:4", "magnitude", progress=False)
    prune_file(on_meta(), source, tmp_path / "out", "1:4", "magnitude", progress=False)
    found = written(tmp_path / "out")
    assert_equal(found, {n: t for n, t in model.state_dict().items() if n != "head.weight"})
    assert sk.detect(found["unused.weight"]) == sk.NM(1, 4)


def test_the_checkpoint_loads_and_converts(source, tmp_path):
    run(source, tmp_path / "out")
    model = Model().eval()
    model.load_state_dict(written(tmp_path / "out") | {"head.weight": model.head.weight}, False)
    expected = model(batches_of()[0])
    report = sk.convert(model, "2:4", batches_of()[0], gate="always", progress=False)
    assert sum(row.verdict == "sparse" for row in report.rows) == 9
    torch.testing.assert_close(model(batches_of()[0]), expected, rtol=1e-4, atol=1e-4)


def test_the_source_may_be_wider_than_the_model(source, tmp_path):
    """Computed in bfloat16, written in the source's float32."""
    prune_file(
        on_meta(torch.bfloat16), source, tmp_path / "out", "2:4", calibration=batches_of(),
        progress=False,
    )  # fmt: skip
    found = written(tmp_path / "out")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in found.values())
    assert_equal(
        {n: t for n, t in found.items() if "bias" in n},
        {n: t for n, t in dense_model().state_dict().items() if "bias" in n},
    )
    assert sk.detect(found["blocks.0.q.weight"]) == sk.NM(2, 4)


def test_a_file_or_shards_are_sources_too(source, tmp_path):
    everything = {}
    for path in source.glob("*.safetensors"):
        everything |= load_file(path)
    (tmp_path / "single").mkdir()
    save_file(everything, tmp_path / "single" / "model.safetensors")
    model = dense_model()
    prune(model, "2:4", progress=False)
    expected = model.state_dict()
    del expected["head.weight"]
    for number, given in enumerate(
        [
            source,
            sorted(source.glob("*.safetensors")),
            tmp_path / "single",
            str(tmp_path / "single" / "model.safetensors"),
        ]
    ):
        out = tmp_path / f"out{number}"
        run(given, out, method="magnitude", calibration=None)
        assert_equal(written(out), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("twice", [False, True])
def test_layers_that_share_a_weight(tmp_path, twice):
    torch.manual_seed(0)
    model, data = Tied(), [torch.randn(40, WIDTH)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not twice:
        del state["second.weight"]
    save_file(state, tmp_path / "dense.safetensors")
    expected = prune(model, "2:4", "sparsegpt", data, progress=False)
    with torch.device("meta"):
        empty = Tied()
    found = prune_file(
        empty, tmp_path / "dense.safetensors", tmp_path / "out", "2:4", calibration=data,
        progress=False,
    )  # fmt: skip
    assert_equal(written(tmp_path / "out"), {name: model.state_dict()[name] for name in state})
    assert [(r.name, r.sparsity, r.reason) for r in found.layers] == [
        (r.name, r.sparsity, r.reason) for r in expected.layers
    ]
    assert empty.second.weight is empty.first.weight


def test_calibration_that_reaches_no_layer_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no calibration batch runs any of the layers"):
        run(source, tmp_path / "out", targets="unused")


class Attention(nn.Module):
    """Modules whose forward reads the weights of others, and one that keeps a second list."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recurrent = nn.LSTM(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.encoder(x)
        x, _ = self.attention(x, x, x)
        return self.last(self.recurrent(x)[0])


def test_attention_and_recurrent_modules(tmp_path):
    torch.manual_seed(0)
    model, data = Attention().eval(), [torch.randn(4, 6, WIDTH)]
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    prune(model, "2:4", "sparsegpt", data, progress=False)
    with torch.device("meta"):
        empty = Attention()
    prune_file(
        empty, tmp_path / "dense.safetensors", tmp_path / "out", "2:4", calibration=data,
        progress=False,
    )  # fmt: skip
    found = written(tmp_path / "out")
    torch.testing.assert_close(found["last.weight"], model.last.weight.data)
    assert torch.equal(found["last.weight"] == 0, model.last.weight == 0)


def test_weights_are_in_memory_only_while_they_are_used(source, tmp_path):
    model, present = on_meta(), []

    def look(*_):
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        present.append({name for name, tensor in own.items() if not isinstance(tensor, Hollow)})

    model.blocks[1].o.register_forward_hook(look)
    prune_file(model, source, tmp_path / "out", "2:4", calibration=batches_of(), progress=False)
    # The root's own parameter stays for the whole forward.
    assert present
    assert all(names == {"position", "blocks.1.o.weight", "blocks.1.o.bias"} for names in present)


# --- stopped and resumed ----------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from prune.test_streaming import run
from sparsekit.prune.disk import shards
save_file, calls = shards.save_file, iter(range(100))
def save(tensors, path, metadata):
    if next(calls) == 4:
        open(path, "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return save_file(tensors, path, metadata)
shards.save_file = save
run({source!r}, {out!r})
"""


def test_a_killed_run_goes_on_to_the_same_bits(source, tmp_path, at_once):
    out = tmp_path / "out"
    path = [str(Path(__file__).parents[1])]
    code = KILLED.format(path=path, source=str(source), out=str(out))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (out / INDEX).exists()
    assert list(out.glob(".model*")), "killed within a file"
    done = json.loads((out / "prune.json").read_text())["layers"]
    assert [layer["name"] for layer in done] == ["blocks.0.q", "blocks.0.k", "blocks.0.o"]
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(kept) == 4

    report = run(source, out)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "done twice"
    assert_equal(written(out), at_once)
    assert [layer.name for layer in report.layers if layer.pattern] == LAYERS
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("call", [0, 3])
def test_a_run_that_ends_between_a_shard_and_the_journal(source, tmp_path, at_once, call):
    """The journal names no layer, or one less than there are files."""
    with pytest.MonkeyPatch.context() as patch:
        write_json, calls = streaming.write_json, iter(range(100))

        def write(*args):
            if next(calls) == call:
                raise KeyboardInterrupt
            write_json(*args)

        patch.setattr(streaming, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert_equal(written(tmp_path / "out"), at_once)


def _holds(path, layers):
    with safe_open(path, "pt") as file:
        return set(file.keys()) & {f"{layer['name']}.weight" for layer in layers}


def test_a_finished_run_is_only_reported(source, tmp_path):
    first = run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    again = run(source, tmp_path / "out")
    assert again.layers == first.layers
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_layer_whose_file_is_lost_is_done_again(source, tmp_path, at_once):
    run(source, tmp_path / "out")
    (path,) = [
        p for p in (tmp_path / "out").glob("*.safetensors") if _holds(p, [{"name": "blocks.1.o"}])
    ]
    path.write_bytes(path.read_bytes()[:-10])
    run(source, tmp_path / "out")
    assert_equal(written(tmp_path / "out"), at_once)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dampening": 0.02}, "another dampening"),
        ({"method": "wanda"}, "another method"),
        ({"calibration": batches_of(2)}, "another calibration"),
        ({"ignore": "blocks.0.*"}, "another pattern"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(source, tmp_path, options, what):
    run(source, tmp_path / "out", method="magnitude")
    with pytest.raises(ValueError, match=rf"{what} .*call as before.*or pass a new folder"):
        run(source, tmp_path / "out", **{"method": "magnitude"} | options)


def test_a_source_that_changed_is_refused(source, tmp_path):
    run(source, tmp_path / "out", method="magnitude")
    os.utime(source / "part-1.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="another source"):
        run(source, tmp_path / "out", method="magnitude")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', '{"version": 1}'])
def test_a_damaged_journal_is_refused(source, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prune.json").write_text(text)
    with pytest.raises(ValueError, match=r"prune\.json is damaged"):
        run(source, tmp_path / "out")


def test_a_journal_of_other_layers_is_refused(source, tmp_path):
    run(source, tmp_path / "out", method="magnitude", calibration=None)
    path = tmp_path / "out" / "prune.json"
    path.write_text(path.read_text().replace("blocks.1.q", "blocks.7.q"))
    journal = json.loads(path.read_text())
    journal["settings"]["pattern"]["blocks.1.q"] = journal["settings"]["pattern"].pop("blocks.7.q")
    path.write_text(json.dumps(journal))
    with pytest.raises(ValueError, match=r"prune\.json is damaged \(its layers\)"):
        run(source, tmp_path / "out", method="magnitude", calibration=None)


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="holds files that are not from a run"):
        run(source, source)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        run(source, source / INDEX)


def test_two_runs_at_once_are_refused(source, tmp_path):
    messages = []

    def loss(model, batch):
        with pytest.raises(RuntimeError) as error:
            run(source, tmp_path / "out")
        messages.append(str(error.value))
        return model(batch)

    run(source, tmp_path / "out", loss=loss)
    assert "another process is writing into" in messages[0]


# --- what can go wrong ------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(source, tmp_path, at_once):
    """The kernel refuses to write a file of that size as it refuses a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, calls = on_meta(), iter(range(100))

    def limit(*_):
        if next(calls) == 3:  # after the tracing
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))

    model.blocks[2].register_forward_pre_hook(limit)
    try:
        with pytest.raises(OSError, match=r"could not be written .*\d layers are finished.*go on"):
            prune_file(
                model, source, tmp_path / "out", "2:4", calibration=batches_of(), progress=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / INDEX).exists()
    run(source, tmp_path / "out")
    assert_equal(written(tmp_path / "out"), at_once)


def test_a_disk_too_small_is_told_at_once(source, tmp_path, monkeypatch):
    usage = streaming.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 0\.0 GiB more, its disk has 0\.0; make room"):
        run(source, tmp_path / "out")


def test_what_the_source_lacks_is_named(tmp_path):
    state = dense_model().state_dict()
    del state["blocks.1.q.bias"]
    source = save_source(tmp_path / "source", tensors=state)
    with pytest.raises(ValueError, match=r"the source lacks blocks\.1\.q\.bias; it has .* and \d+"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(WIDTH, 8), r"'blocks\.1\.q\.weight' with shape \[16, 8\], the model with"),
        (torch.zeros(WIDTH, WIDTH, dtype=torch.int8), "as I8, the model as torch.float32"),
        (
            torch.zeros(WIDTH, WIDTH).to(torch.float8_e5m2),
            "as F8_E5M2, the model as torch.float32; both",
        ),
        (torch.full((WIDTH, WIDTH), torch.nan), r"weight of 'blocks\.1\.q' holds 256 NaN"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, value, message):
    state = dense_model().state_dict() | {"blocks.1.q.weight": value}
    source = save_source(tmp_path / "source", tensors=state)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_damaged_sources_are_refused(source, tmp_path):
    part = source / "part-1.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-1\.safetensors is damaged or cut off"):
        run(source, tmp_path / "out")
    part.unlink()
    with pytest.raises(FileNotFoundError, match="part-1"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": {"a": "../part-0.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"a": "part-0.safetensors"}}', "has 'a'; it has not"),
    ],
)
def test_a_damaged_index_is_refused(source, tmp_path, index, message):
    (source / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out")


def test_other_sources_are_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"holds neither {INDEX} nor"):
        run(tmp_path / "empty", tmp_path / "out")
    part = source / "part-0.safetensors"
    with pytest.raises(ValueError, match="both hold"):
        run([part, part], tmp_path / "out")
    with pytest.raises(IsADirectoryError, match="expected a safetensors file"):
        run([source], tmp_path / "out")


def test_a_model_in_memory_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"weight of 'blocks\.0\.q' is in memory .*or use prune"):
        prune_file(Model(), source, tmp_path / "out", "2:4", calibration=batches_of())


def test_calibration_is_asked_for(source, tmp_path):
    with pytest.raises(ValueError, match="needs calibration data"):
        run(source, tmp_path / "out", calibration=None)
    with pytest.raises(ValueError, match="pixels must be at least 1"):
        run(source, tmp_path / "out", pixels=0)


def test_methods_that_look_at_the_whole_model_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="'fpgm' looks at the whole model before it prunes"):
        run(source, tmp_path / "out", method="fpgm")


def test_few_tokens_are_warned_of(source, tmp_path):
    few = [batch[:2] for batch in batches_of()[:1]]
    with pytest.warns(UserWarning, match="saw 10 calibration tokens") as caught:
        run(source, tmp_path / "out", calibration=few)
    assert caught[0].filename == __file__


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(WIDTH) / WIDTH, persistent=False)
        self.plain = torch.ones(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x * self.table + self.plain)


def test_buffers_that_no_checkpoint_holds(tmp_path):
    model, data = Rotary(), [torch.randn(40, WIDTH)]
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = Rotary()
    options = {"calibration": data, "progress": False}
    with pytest.raises(ValueError, match=r"no checkpoint holds: table, plain; .*assign these"):
        prune_file(empty, tmp_path / "a.safetensors", tmp_path / "out", "2:4", **options)
    empty.table, empty.plain = Rotary().table, Rotary().plain
    prune_file(empty, tmp_path / "a.safetensors", tmp_path / "out", "2:4", **options)
    prune(model, "2:4", "sparsegpt", **options)
    assert_equal(written(tmp_path / "out"), dict(model.state_dict()))


class Reader(nn.Module):
    """Uses a weight without calling its module."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(nn.functional.linear(x, self.first.weight))


def test_weights_read_by_somebody_else_are_told(tmp_path):
    model = Reader()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = Reader()
    options = {"calibration": [torch.randn(40, WIDTH)], "progress": False}
    with pytest.raises(ValueError, match=r"'first\.weight' was read while its module was not"):
        prune_file(empty, tmp_path / "a.safetensors", tmp_path / "out", "2:4", **options)
    empty.first = model.first
    prune_file(
        empty, tmp_path / "a.safetensors", tmp_path / "out", "2:4", targets="second", **options
    )
    assert sk.detect(written(tmp_path / "out")["second.weight"]) == sk.NM(2, 4)


def test_batches_on_the_meta_device_are_told(source, tmp_path):
    batches = [torch.zeros(2, 5, dtype=torch.int64, device="meta")]
    with pytest.raises(ValueError, match="batch 0 is on the meta device; make it outside"):
        run(source, tmp_path / "out", calibration=batches)
