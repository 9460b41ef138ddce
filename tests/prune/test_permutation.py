"""`permute`: which channels may change places, and that the network computes the same."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.prune import PermuteReport, kept_share, permute, prune
from sparsekit.prune.permutation import api as driver
from sparsekit.prune.permutation import rules
from sparsekit.prune.permutation.freedom import TANGLED


def integers(model, seed=0):
    """Small whole numbers in float64: sums are exact in any order."""
    make = torch.Generator().manual_seed(seed)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randint(-3, 4, tensor.shape, generator=make).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.copy_(torch.tensor([0.25, 1, 4]).repeat(99)[: module.num_features])
            module.eps = 0.0
    return model.eval()


def uneven(model, seed=0):
    """Weights whose channels differ in scale, as trained ones do."""
    make = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
            weight = module.weight.data
            scale = torch.randn(weight.shape[:2], generator=make).exp()
            noise = torch.randn(weight.shape, generator=make) * 0.1
            weight.copy_(noise * scale.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    return model.double().eval()


def shuffled(model, example):
    """Every free block of a traced model in a random order, applied in place: sizes of blocks."""
    with torch.no_grad(), driver._quiet(model):
        (batch,) = driver.read_batches([example], "example")
        dimensions, freedom = driver._traced(model, batch)
        moved = np.arange(len(freedom.channel))
        numbers = np.random.default_rng(0)
        sizes = []
        for block in np.flatnonzero(freedom.sizes > 1):
            members = np.flatnonzero((freedom.block == block) & (freedom.channel == moved))
            moved[members] = numbers.permutation(members)
            sizes.append(len(members))
        orders = driver.Orders(freedom, dimensions, [])
        orders._moved = moved
        driver._apply(orders.changes(), inverse=False)
    return sorted(sizes, reverse=True)


def outputs(model, example):
    (batch,) = driver.read_batches([example], "example")
    with torch.no_grad():
        return driver._outputs(model, batch)


def assert_same(ours, theirs, exact):
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        if exact:
            assert torch.equal(tensor, theirs[path]), path
        else:
            torch.testing.assert_close(tensor, theirs[path], rtol=1e-9, atol=1e-11)


# --- architectures ----------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.gate, self.up = nn.Linear(12, 16), nn.Linear(12, 16)
        self.both, self.down = nn.Linear(12, 32), nn.Linear(16, 8)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(torch.relu(gate) * up)


class Block(nn.Module):
    def __init__(self, channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([norm(channels), norm(channels)])

    def forward(self, x):
        inside = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inside)) + x)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24)
        self.deep, self.down = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)

    def forward(self, x):
        x = F.relu6(self.norm(self.up(x)), inplace=True)
        x = F.relu6(self.deep(x))
        scale = self.excite(torch.relu(self.squeeze(x.sum((2, 3), keepdim=True))))
        return self.down(x * scale)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.loop = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        while x.abs().amax() < 1e6:
            x = x + self.loop(x) if x.sum().item() > 0 else x - self.loop(x)
        return self.last(x)


class Einsum(nn.Module):
    """Parameters of an own shape, read by an einsum."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 6, 16))
        self.scale = nn.Parameter(torch.ones(16))
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.einsum("bk,hkn->bhn", x, self.up) * self.scale)


def flat(order):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), Permuted(order), nn.Flatten(), nn.Linear(16 * 9, 5)
    )


class Permuted(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


def mlp():
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)
    )


def shared():
    hidden = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(6, 16), hidden, nn.ReLU(), hidden, nn.Linear(16, 3))


def group_norm(groups):
    convs = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
    return nn.Sequential(convs[0], nn.GroupNorm(groups, 16), nn.ReLU(), convs[1])


def grouped():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 4, 1))


def upwards():
    return nn.Sequential(
        nn.ConvTranspose2d(3, 16, 2), nn.Upsample(scale_factor=2), nn.Conv2d(16, 4, 1)
    )


def image(*shape):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).double()


EXACT = {
    "mlp": (mlp, image(4, 6), [24, 16]),
    "tokens": (mlp, image(2, 3, 6), [24, 16]),
    "gated": (lambda: Gated(fused=False), image(4, 12), [16]),
    "fused gate": (lambda: Gated(fused=True), image(4, 12), [16]),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.Conv2d(8, 4, 1)),
        image(2, 3, 8, 8),
        [8, 8, 8],
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.MaxPool1d(2), nn.Conv1d(16, 4, 1)),
        image(2, 3, 8),
        [16],
    ),
    "concatenation": (Dense, image(2, 3, 6, 6), [8, 8, 8, 8]),
    "depthwise": (Depthwise, image(2, 8, 6, 6), [24, 8]),
    "flattened": (lambda: flat((0, 1, 2, 3)), image(2, 3, 5, 5), [16]),
    "flattened, channels last": (lambda: flat((0, 2, 3, 1)), image(2, 3, 5, 5), [16]),
    "control flow": (Branching, image(3, 6), [16]),
    "einsum": (Einsum, image(3, 6), [16]),
    "shared layer": (shared, image(4, 6), [16]),
    "groups": (grouped, image(2, 3, 6, 6), [8, 8]),
    "transposed convolution": (upwards, image(2, 3, 4, 4), [16]),
}


class Odd(nn.Module):
    """A layer, something that is done to its channels, and another layer."""

    def __init__(self, between, channels=16):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(channels, 4)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Expert(nn.Module):
    def forward(self, x):
        chosen = x.new_zeros(x.shape) if x.sum() > 1e9 else x.clone()
        chosen[0] = x[1]
        return chosen


MOVED = {
    "stack": (lambda x: torch.stack([x, x * 2], 1).sum(1), 16, [16]),
    "stack, last": (lambda x: torch.stack([x, x * 2], -1).flatten(1), 32, [16]),
    "twice": (lambda x: torch.cat([x, x * x], 1), 32, [16]),
    "repeat": (lambda x: x.repeat(1, 2), 32, [16]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), 32, [16]),
    "index_select": (lambda x: x.index_select(0, torch.tensor([1, 0])), 16, [16]),
    "index": (lambda x: x[torch.tensor([1, 0])][:, None][:, 0], 16, [16]),
    "unbind": (lambda x: sum(x.view(-1, 2, 8).unbind(1)).repeat(1, 2), 16, [8]),
    "heads": (lambda x: x.view(-1, 4, 4).transpose(0, 1).transpose(0, 1).flatten(1), 16, [4] * 4),
    "shuffle": (lambda x: x.view(-1, 4, 4).mT.flatten(1), 16, [4] * 4),
    "glu": (lambda x: torch.cat([F.glu(x * 0, 1), x[:, :8]], 1), 16, [8]),
    "maximum": (lambda x: torch.maximum(x, x.amax(1, keepdim=True) - 1), 16, [16]),
    "expand": (lambda x: x * x.sum(1, keepdim=True).expand(-1, 16), 16, [16]),
    "in place": (lambda x: x.add_(1).unsqueeze_(0).mul_(2).squeeze_(0), 16, [16]),
    "written": (Expert(), 16, [16]),
    "outer": (lambda x: torch.bmm(x[:, :, None], x[:, None]).sum(2), 16, [16]),
    "pieces": (lambda x: torch.cat(x.split([4, 12], 1)[::-1], 1), 16, [12, 4]),
}


@pytest.mark.parametrize("name", MOVED)
def test_values_that_are_moved_or_picked(name):
    between, channels, sizes = MOVED[name]
    model = integers(Odd(between, channels))
    before = outputs(model, image(2, 6))
    assert shuffled(model, image(2, 6)) == sizes
    assert_same(outputs(model, image(2, 6)), before, exact=True)


@pytest.mark.parametrize("name", EXACT)
def test_any_order_it_calls_free_computes_exactly_the_same(name):
    make, example, sizes = EXACT[name]
    model = integers(make())
    before = outputs(model, example)
    weights = copy.deepcopy(model.state_dict())
    assert shuffled(model, example)[: len(sizes)] == sizes
    assert any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert_same(outputs(model, example), before, exact=True)
    assert all(float(value.abs().max()) > 0 for value in before.values())


# Layer norm and softmax round, so that the order of a sum shows in the last digits.


class Attended(nn.Module):
    """torch's own attention between two linear layers."""

    def __init__(self, inside):
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(6, 32), inside, nn.Linear(32, 3)

    def forward(self, x):
        x = self.first(x)
        if isinstance(self.inside, nn.MultiheadAttention):
            return self.last(self.inside(x, x, x)[0] + x)
        return self.last(self.inside(x))


def encoder_layer(**options):
    return Attended(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options))


def bert(attention="sdpa"):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation=attention,
    )
    return transformers.BertModel(config)


def llama(tied=False, attention="sdpa"):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)


def tokens(**more):
    numbers = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": numbers, **more}


MASK = torch.ones(2, 9, dtype=torch.int64).index_fill_(1, torch.tensor([7, 8]), 0)
HEADS = [16] * 8  # queries with keys, and values, of two heads in two layers
CLOSE = {
    "bert": (bert, tokens(attention_mask=MASK), [64, 64, *HEADS]),
    "bert, eager": (lambda: bert("eager"), tokens(attention_mask=MASK), [64, 64, *HEADS]),
    "llama": (llama, tokens(use_cache=False), [64, 64, 32, 8, 8, 8, 8]),
    "llama, eager": (lambda: llama(attention="eager"), tokens(use_cache=False), [64, 64, 32]),
    "llama, tied": (lambda: llama(tied=True), tokens(use_cache=False), [64, 64, 32, 8, 8, 8, 8]),
    "vit": (vit, image(2, 3, 32, 32), [768, 768, 192, *[64] * 12]),
    "attention": (lambda: Attended(nn.MultiheadAttention(32, 4)), image(5, 2, 6), [32, *[8] * 8]),
    "encoder layer": (encoder_layer, image(2, 5, 6), [64, 32, *[8] * 8]),
    "norm first": (lambda: encoder_layer(norm_first=True), image(2, 5, 6), [64, 32, *[8] * 8]),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)),
        image(4, 6),
        [16],
    ),
    "one group": (lambda: group_norm(1), image(2, 3, 6, 6), [16]),
    "groups of four": (lambda: group_norm(4), image(2, 3, 6, 6), [4, 4, 4, 4]),
    "groups of one": (lambda: group_norm(16), image(2, 3, 6, 6), [16]),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=5),
        image(1, 3, 64, 64),
        [1280, 640],
    ),
}


@pytest.mark.parametrize("name", CLOSE)
def test_any_order_it_calls_free_computes_the_same(name):
    make, example, sizes = CLOSE[name]
    torch.manual_seed(0)
    model = uneven(make())
    before = outputs(model, example)
    assert shuffled(model, example)[: len(sizes)] == sizes
    after = outputs(model, example)
    if name.startswith("llama"):  # its norms compute in float32
        for path, tensor in before.items():
            torch.testing.assert_close(after[path], tensor, rtol=1e-4, atol=1e-5)
    else:
        assert_same(after, before, exact=False)


def test_rotated_queries_and_tables_made_anew_keep_their_order():
    model = llama()
    dimensions, freedom = driver._traced(model, driver.read_batches([tokens(use_cache=False)])[0])
    (query,) = [d for d in dimensions["model.layers.0.self_attn.q_proj.weight"] if d.axis == 0]
    assert not freedom.free(query.atoms).any()
    assert "made anew whenever the model is loaded" in freedom.reason(int(query.atoms[0]))
    (table,) = dimensions["model.rotary_emb.inv_freq"]
    assert not freedom.free(table.atoms).any()


def test_a_cache_among_the_outputs_keeps_the_values_in_their_order():
    model = llama().double()
    report = permute(model, "2:4", tokens(), targets="*o_proj", progress=False)
    assert all(layer.free == 0 for layer in report.layers)
    reason = "output['past_key_values'].layers[0].values keeps its order"
    assert report.layers[0].reason == reason
    report = permute(model, "2:4", tokens(use_cache=False), targets="*o_proj", progress=False)
    assert all(layer.free == 32 for layer in report.layers)


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["2:4", "1:4", "2:4v4", "4:8v4", "2:4v8", "bsr8x8@0.5", "bsr8x4@0.5", "bsr4x8@0.5"]
)
def test_a_network_keeps_more_and_computes_the_same(pattern):
    model = uneven(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    )
    example, dense = image(4, 16), copy.deepcopy(model)
    before = outputs(model, example)
    report = permute(model, pattern, example, progress=False)
    assert report.applied
    assert report.difference < 1e-12
    assert_same(outputs(model, example), before, exact=False)
    old, new = (sum(getattr(one, when) for one in report.layers) for when in ("before", "after"))
    assert new > old + 0.01
    # What the report says is what `prune` keeps.
    for one, name in zip(report.layers, ("0", "2", "4"), strict=True):
        assert one.name == name
        weight = model.get_submodule(name).weight.detach()
        assert one.after == pytest.approx(kept_share(weight, pattern), rel=1e-6)
        assert one.before == pytest.approx(kept_share(dense.get_submodule(name).weight, pattern))
    expected = dense[2].weight.detach()
    for axis, order in report.orders["2.weight"].items():
        expected = expected.index_select(axis, order)
    assert torch.equal(model[2].weight, expected)
    report = prune(model, pattern, progress=False)
    assert all(layer.pattern for layer in report.layers)


@pytest.mark.parametrize("pattern", ["2:4v4", "2:4v8", "2:4v16", "bsr4x4@0.5", "bsr16x4@0.5"])
def test_rows_are_reordered_where_nothing_reads_them_as_columns(pattern):
    model = uneven(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    example = image(4, 16)
    before = outputs(model, example)
    report = permute(model, pattern, example, targets="0", progress=False)
    (layer,) = report.layers
    assert layer.free == 0
    assert layer.after > layer.before + 0.01
    assert report.orders.keys() == {"0.weight", "0.bias", "2.weight"}
    assert_same(outputs(model, example), before, exact=False)


def test_tall_vectors_cost_the_columns_nothing():
    model = uneven(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)))
    alone = copy.deepcopy(model)
    mapping = {"0": "2:4v8", "2": "2:4"}
    both = permute(model, mapping, image(4, 16), progress=False)
    columns = permute(alone, {"2": "2:4"}, image(4, 16), progress=False)
    assert both.layers[1].after == pytest.approx(columns.layers[0].after)
    assert both.layers[0].after > both.layers[0].before


def test_layers_of_other_patterns_in_one_stream_count_together():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 32)
            self.reads = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            return [read(x) for read in self.reads]

    model = uneven(Stream())
    mapping = {"reads.0": "2:4", "reads.1": "bsr8x8@0.5", "reads.2": "4:8"}
    before = outputs(model, image(3, 4))
    report = permute(model, mapping, image(3, 4), progress=False)
    totals = [float(read.weight.detach().abs().sum()) for read in model.reads]
    old, new = (
        sum(getattr(one, when) * total for one, total in zip(report.layers, totals, strict=True))
        for when in ("before", "after")
    )
    assert new > old
    assert_same(outputs(model, image(3, 4)), before, exact=False)


@pytest.mark.parametrize(
    "make", [bert, vit, Dense, lambda: timm.create_model("resnet18", num_classes=5)]
)
def test_real_architectures_keep_more(make):
    torch.manual_seed(0)
    model = uneven(make())
    example = tokens() if make is bert else image(1, 3, 32, 32)
    before = outputs(model, example)
    report = permute(model, "2:4", example, rows=128, rounds=20, progress=False)
    assert report.applied
    assert_same(outputs(model, example), before, exact=False)
    gained = [one for one in report.layers if one.after is not None and one.after > one.before]
    assert len(gained) >= 3
    assert all(one.reason for one in report.layers if one.free < one.channels)


def test_scores_decide_instead_of_magnitudes():
    model = uneven(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)))
    norms = torch.linspace(0.01, 3, 16, dtype=torch.float64) ** 3
    scores = {"2": model[2].weight.detach() * norms}
    report = permute(
        copy.deepcopy(model), "2:4", image(3, 6), scores=scores, targets="2", progress=False
    )
    order = report.orders["2.weight"][1]
    assert report.layers[0].after == pytest.approx(kept_share(scores["2"], "2:4", order))
    plain = permute(copy.deepcopy(model), "2:4", image(3, 6), targets="2", progress=False)
    other = plain.orders["2.weight"][1]
    assert kept_share(scores["2"], "2:4", other) < kept_share(scores["2"], "2:4", order)


# --- what stays in its order ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.cumsum(-1), "aten.cumsum.default needs them in their order, or is not"),
        (lambda x: x.flip(-1), "aten.flip"),
        (lambda x: x * torch.arange(16.0, dtype=x.dtype), "a tensor made on the way"),
        (lambda x: x + x.argmax(-1, keepdim=True), "aten.argmax"),
        (lambda x: F.conv1d(x[:, None], x.new_ones(1, 1, 3), padding=1)[:, 0], "aten.convolution"),
        (lambda x: x + x.sort(-1).values, "aten.sort"),
        (lambda x: x[:, torch.arange(16)], "aten.index.Tensor"),
        (lambda x: torch.fft.rfft(x).abs()[:, :1] + x, "aten._fft_r2c"),
        (lambda x: torch.mul(x, 2, out=torch.empty_like(x)), "aten.mul.out"),
        (lambda x: x.unflatten(1, (4, 4)).mT.flatten(1) + x, TANGLED),
        (lambda x: x + torch.cat([x[:, 3:], x[:, :3]], 1), TANGLED),
    ],
)
def test_channels_that_an_operation_needs_in_order_stay(between, reason):
    model = uneven(Odd(between))
    weights = copy.deepcopy(model.state_dict())
    report = permute(model, "2:4", image(3, 6), targets="last", progress=False)
    (layer,) = report.layers
    assert layer.free == 0
    assert reason in layer.reason
    assert not report.applied
    assert report.reason == "no order was found that keeps more"
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_weights_that_are_not_plain_or_not_read_stay():
    class Unused(Odd):
        def forward(self, x):
            return self.last(self.first(x)) if x.shape[0] > 99 else x.sum()

    report = permute(Unused(None), "2:4", torch.ones(2, 6), progress=False, targets="last")
    assert report.layers[0].reason == "nothing in the example run reads last.weight"

    class Behind(Odd):
        def forward(self, x):
            return self.last(self.first(x)) + torch.from_numpy(
                self.last.weight.detach().numpy()
            ).sum(1)

    report = permute(Behind(None), "2:4", torch.ones(2, 6), progress=False, targets="last")
    assert report.layers[0].reason == "the model reads the memory of last.weight itself"

    model = uneven(Odd(nn.Identity()))
    nn.utils.parametrizations.weight_norm(model.first)
    before = outputs(model, image(3, 6))
    report = permute(model, "2:4", image(3, 6), progress=False)
    assert report.layers[0].free == 0
    assert "parametris" in report.layers[1].reason
    assert report.layers[1].pattern is None
    assert_same(outputs(model, image(3, 6)), before, exact=False)

    model = Odd(nn.Identity())
    model.last.weight = nn.Parameter(torch.ones(4, 16))
    model.other = nn.Parameter(model.last.weight.data[:2])
    report = permute(model, "2:4", torch.ones(2, 6), progress=False, targets="last")
    assert report.layers[0].reason == "other and last.weight share memory"


def test_a_wrong_rule_is_found_out_and_the_model_given_back(monkeypatch):
    # A sum with something of another order, taken for one that any order will do for.
    monkeypatch.setitem(rules.RULES, "cumsum", rules.pointwise)
    model = uneven(Odd(lambda x: x.cumsum(-1)))
    model.train()
    weights = copy.deepcopy(model.state_dict())
    report = permute(model, "2:4", image(3, 6), targets="last", progress=False)
    assert not report.applied
    assert "output differs by" in report.reason
    assert "more than rounding explains (1.5e-08); the model is as before" in report.reason
    assert report.difference > 1e-3
    assert report.layers[0].after == report.layers[0].before
    assert report.orders == {}
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert model.first.training
    assert "more than rounding explains" in " ".join(str(report).split())


def test_dropout_and_random_numbers_do_not_look_like_a_difference():
    class Noisy(Odd):
        def forward(self, x):
            return self.last(F.dropout(self.first(x), 0.5, self.training)) + torch.rand(4)

    model = uneven(Noisy(None)).train()
    state = torch.random.get_rng_state()
    report = permute(model, "2:4", image(3, 6), progress=False)
    assert report.applied
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_their_bits(dtype):
    model = uneven(mlp()).to(dtype)
    before = {key: value.float().abs().sum() for key, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    report = permute(model, "2:4", image(4, 6).to(dtype), progress=False)
    assert report.applied
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.float().abs().sum(), before[key])
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_the_report_prints_and_serialises():
    report = permute(uneven(mlp()), "2:4", image(4, 6), progress=False)
    assert isinstance(report, PermuteReport)
    assert "applied, outputs differ by" in str(report)
    assert report.to_dict()["layers"][1]["free"] == 16
    assert sk.prune.permute is permute


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "permute: rounds must be at least 1, got 0"),
        ({"rows": 0}, "permute: rows must be at least 1, got 0"),
        ({"scores": {"9": torch.ones(3)}}, "scores are for '9', which is no layer to prune; those"),
        ({"scores": {"2": torch.ones(3)}}, r"scores of '2' have shape \[3\], its weight has \[24"),
        ({"scores": {"2": torch.full((24, 16), torch.nan)}}, "scores of '2' holds NaN"),
        ({"targets": "nothing"}, "targets: 'nothing' matches no layer"),
    ],
)
def test_bad_options_are_refused(options, message):
    model = mlp()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        permute(model, "2:4", torch.ones(2, 6), progress=False, **options)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_examples_and_models_that_prove_nothing_are_refused():
    with pytest.raises(ValueError, match="example_inputs: batch 0 is a int"):
        permute(mlp(), "2:4", 3, progress=False)

    class Silent(Odd):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(ValueError, match="outputs hold no tensors, so nothing would prove"):
        permute(Silent(nn.ReLU()), "2:4", torch.ones(2, 6), progress=False)
    broken = mlp()
    broken[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the weight of '0' holds NaN or infinities"):
        permute(broken, "2:4", torch.ones(2, 6), progress=False, targets=["0", "2"])
