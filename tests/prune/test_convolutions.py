"""`prune` on convolutions: every method and pattern, groups, refusals, shared inputs."""

import copy

import pytest
import timm
import torch
from torch import nn

import sparsekit as sk
from sparsekit.filters import to_matrix
from sparsekit.patterns import BlockSparse, parse_pattern
from sparsekit.prune import METHODS, RECONSTRUCTIONS, distill, hold_masks, prune
from sparsekit.prune.calibration import Calibration, read_batches
from sparsekit.prune.layers import Layer

PATTERNS = ["2:4", "4:8", "2:4v4", "bsr4x4@0.5", "bsr8x16@0.5"]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(10, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
    ).eval()


def images(count=2, channels=10, size=9):
    make = torch.Generator().manual_seed(1)
    mix = torch.randn(channels, channels, generator=make)
    x = torch.randn(count, 4, channels, size, size, generator=make)
    return list(torch.einsum("nbchw,cd->nbdhw", x, mix))


def square(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("spelling", PATTERNS)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_fit_the_pattern(method, reconstruction, spelling):
    model, pattern = small(), parse_pattern(spelling)
    report = prune(
        model,
        spelling,
        method,
        images(),
        reconstruction=reconstruction,
        progress=False,
        loss=square,
    )
    assert list(report.masks) == ["0", "3", "5"]
    for layer in report.layers:
        weight, mask = model.get_submodule(layer.name).weight, report.masks[layer.name]
        assert mask.shape == weight.shape
        assert layer.shape == tuple(weight.shape)
        assert mask.is_contiguous()
        if reconstruction == "none":
            assert torch.equal(weight != 0, mask)
        # A layer that lost whole filters feeds zeros to the next, where a sweep needs no weights.
        assert not bool((weight != 0)[~mask].any())
        assert pattern.first_violation(to_matrix(mask, pattern)) is None
        assert 0 <= layer.error <= 1
        # Padding takes no place: as much is kept as of a matrix that has none.
        matrices = Layer("", [model.get_submodule(layer.name)]).matrices(mask, pattern)
        if isinstance(pattern, BlockSparse):
            rows = matrices.flatten(0, 1)
            assert int(pattern.occupancy(rows).sum()) == pattern.blocks_kept(*rows.shape)
    assert "16x10x3x3" in str(report)
    assert report.to_dict()["layers"][0]["shape"] == [16, 10, 3, 3]


@pytest.mark.parametrize("spelling", ["2:4", "bsr4x4@0.5"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [24, 20])
def test_the_error_is_that_of_the_convolution(channels, groups, method, spelling):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 16, 3, stride=2, padding=1, groups=groups, bias=False)
    dense, batches = copy.deepcopy(conv), images(3, channels)
    report = prune(conv, spelling, method, batches, targets="", progress=False, loss=square)
    with torch.no_grad():
        ours, theirs = (torch.cat([m(x) for x in batches]) for m in (conv, dense))
    assert report.layers[0].error == pytest.approx(
        float((ours - theirs).norm() / theirs.norm()), rel=1e-3
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_better_methods_change_the_output_less(groups):
    def error(method, **options):
        torch.manual_seed(0)
        conv = nn.Conv2d(20, 16, 3, padding=1, groups=groups)
        return (
            prune(conv, "2:4", method, images(channels=20), progress=False, **options)
            .layers[0]
            .error
        )

    exact = error("sparsegpt", reconstruction="least_squares")
    assert exact < error("sparsegpt") < error("wanda") < error("magnitude")


def test_groups_have_statistics_of_their_own():
    torch.manual_seed(0)
    whole = nn.Conv2d(16, 8, 3, groups=2, bias=False)
    halves = [nn.Conv2d(8, 4, 3, bias=False) for _ in range(2)]
    for half, part in zip(halves, whole.weight.detach().chunk(2), strict=True):
        half.weight.data.copy_(part)
    batches = images(channels=16)
    for x in batches:
        x[:, :8] *= 100  # One scale would make the groups' columns compete.
    prune(whole, "2:4", "sparsegpt", batches, progress=False)
    for index, half in enumerate(halves):
        part = [x[:, 8 * index : 8 * index + 8] for x in batches]
        prune(half, "2:4", "sparsegpt", part, progress=False)
        torch.testing.assert_close(whole.weight.chunk(2)[index], half.weight)


def test_blocks_compete_across_groups():
    conv = nn.Conv2d(32, 8, 3, groups=2, bias=False)
    with torch.no_grad():
        conv.weight[:4] *= 100
    report = prune(conv, "bsr4x4@0.5", progress=False)
    assert report.masks[""][:4].all()
    assert not report.masks[""][4:].any()
    assert report.sparsity == 0.5


def test_a_conv1d_is_pruned_like_a_flat_conv2d():
    torch.manual_seed(0)
    line = nn.Conv1d(12, 8, 3, padding=1)
    flat = nn.Conv2d(12, 8, (1, 3), padding=(0, 1))
    flat.weight.data.copy_(line.weight.data[:, :, None])
    x = torch.randn(4, 12, 30)
    report = prune(line, "2:4", "sparsegpt", [x], progress=False)
    prune(flat, "2:4", "sparsegpt", [x[:, :, None]], progress=False)
    assert report.masks[""].shape == (8, 12, 3)
    torch.testing.assert_close(line.weight, flat.weight[:, :, 0])


def test_a_1x1_convolution_is_pruned_like_a_linear_layer():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(10, 8, 1), nn.Linear(10, 8)
    linear.weight.data.copy_(conv.weight.data.flatten(1))
    x = images()
    prune(conv, "2:4", "sparsegpt", x, progress=False)
    prune(linear, "2:4", "sparsegpt", [part.movedim(1, -1) for part in x], progress=False)
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


def test_channels_that_fill_no_group_lose_nothing_to_padding():
    # Tiles of 3 taps: channels 0-3, and 4-5 with two columns of padding.
    conv = nn.Conv1d(6, 4, 3)
    conv.weight.data[:, 4:] = 1e-20
    mask = prune(conv, "2:4", targets="", progress=False).masks[""]
    assert mask[:, 4:].all()
    assert (mask[:, :4].sum(1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_channels_last(dtype):
    torch.manual_seed(0)
    model = nn.Conv2d(16, 16, 3).to(dtype).to(memory_format=torch.channels_last)
    batches = [x.to(dtype).to(memory_format=torch.channels_last) for x in images(channels=16)]
    report = prune(model, "2:4", "sparsegpt", batches, progress=False)
    assert model.weight.dtype == dtype
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight != 0, report.masks[""])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spelling", PATTERNS)
def test_a_pruned_weight_packs_without_change(spelling, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(40, 16, 3, groups=groups)
    report = prune(conv, spelling, progress=False)
    for mask in (None, report.masks[""]):
        packed = sk.pack(conv.weight, spelling, mask, groups=groups)
        assert torch.equal(packed.to_dense(), conv.weight)


# --- which layers -----------------------------------------------------------------------------


def reasons_of(model, pattern="2:4", **arguments):
    report = prune(model, pattern, progress=False, **arguments)
    return {layer.name: layer.reason for layer in report.layers if layer.pattern is None}


def test_depthwise_convolutions_stay_dense():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1))
    assert "one input channel (depthwise)" in reasons_of(model)["0"]
    with pytest.raises(ValueError, match=r"no layer can be pruned \(0: .*depthwise"):
        prune(model, "2:4", targets="0", progress=False)


def test_a_stem_is_pruned_only_when_it_is_named():
    def model():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))

    assert reasons_of(model()).keys() == {"0"}
    assert "3 input channels, fewer than 8" in reasons_of(model())["0"]
    assert reasons_of(model(), targets=["0", "1"]) == {}


def test_groups_that_cut_the_patterns_rows_stay_dense():
    model = nn.Sequential(nn.Conv2d(16, 12, 3, groups=2), nn.Conv2d(12, 12, 3))
    assert reasons_of(model) == {}
    for pattern in ("2:4v4", "bsr4x4@0.5"):
        assert "groups of 6 filters" in reasons_of(model, pattern)["0"]


def test_convolutions_with_a_forward_of_their_own_stay_dense():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardised(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert "Standardised computes in its own way" in reasons_of(model)["0"]


def test_transposed_and_3d_convolutions_are_not_looked_at():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.Conv3d(8, 8, 3), nn.Conv2d(8, 8, 3))
    report = prune(model, "2:4", progress=False)
    assert [layer.name for layer in report.layers] == ["2"]


def test_parametrised_convolutions_stay_dense():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    assert "parametrised" in reasons_of(model)["0"]


class Tied(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16 * groups, 16, 3, padding=2, dilation=2, groups=groups)
        self.b.weight = self.a.weight

    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y] * self.b.groups, 1))


def test_a_weight_two_geometries_share_is_pruned_for_both():
    torch.manual_seed(0)
    model, (x, *_) = Tied(), images(channels=16)
    with Calibration(model, read_batches([x]), [Layer("a", [model.a, model.b])]) as run:
        both = run.moments(run.groups[0])
    parts = []
    for module, given in ((model.a, x), (model.b, model.a(x).detach())):
        with Calibration(module, read_batches([given]), [Layer("", [module])]) as run:
            parts.append(run.moments(run.groups[0]))
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
    assert list(prune(model, "2:4", "wanda", [x], progress=False).masks) == ["a"]


def test_a_weight_shared_with_other_groups_counts_for_the_first():
    torch.manual_seed(0)
    model, other = Tied(groups=2), Tied(groups=2)
    other.load_state_dict(model.state_dict())
    alone, batches = other.a, images(channels=16)
    report = prune(model, "2:4", "wanda", batches, progress=False)
    expected = prune(alone, "2:4", "wanda", batches, progress=False)
    assert torch.equal(report.masks["a"], expected.masks[""])
    assert "shares its weight with a" in {r.name: r.reason for r in report.layers}["b"]


@pytest.mark.parametrize("pixels", [0, -3])
def test_a_number_of_pixels_below_one_is_refused(pixels):
    with pytest.raises(ValueError, match=f"pixels must be at least 1, got {pixels}"):
        prune(small(), "2:4", "wanda", images(), pixels=pixels, progress=False)


def test_images_that_are_not_finite_are_refused_by_name():
    batches = images()
    batches[1][0, 0, 4, 4] = torch.nan
    with pytest.raises(ValueError, match="inputs of layer '0' hold NaN or infinity"):
        prune(small(), "2:4", "wanda", batches, progress=False)


def test_images_without_pixels_are_refused_by_name():
    with pytest.raises(ValueError, match="layer '0' saw no tokens or pixels"):
        prune(small(), "2:4", "wanda", [torch.zeros(0, 10, 9, 9)], progress=False)


# --- shared inputs and whole networks ---------------------------------------------------------


class Branches(nn.Module):
    """Sums up what its layers make of one input, cut to a size that all have."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return sum(layer(x)[..., :2, :2] for layer in self.layers)


def test_layers_that_read_the_same_patches_share_statistics():
    usual = {"kernel_size": 3, "stride": 2, "padding": 1}
    other = [
        {"kernel_size": 1},
        {"stride": 1},
        {"padding": 0},
        {"padding": "valid", "stride": 1},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
    ]
    settings = [usual, *(usual | change for change in other), usual | {"bias": False}]
    model = Branches(*(nn.Conv2d(8, 8, **setting) for setting in settings))
    layers = [Layer(str(i), [layer]) for i, layer in enumerate(model.layers)]
    with Calibration(model, read_batches(images(channels=8)), layers) as run:
        names = [[layer.name for layer in group.layers] for group in run.groups]
    assert names == [["0", "8"], *([str(i)] for i in range(1, 8))]


def test_shared_statistics_serve_patterns_of_different_tiles():
    torch.manual_seed(0)
    model = Branches(*(nn.Conv2d(18, 8, 3) for _ in range(2)))
    alone = copy.deepcopy(model.layers[1])
    batches = images(channels=18)
    patterns = {"*.0": "4:8", "*.1": "bsr4x4@0.5"}
    report = prune(model, patterns, "wanda", batches, progress=False)
    expected = prune(alone, "bsr4x4@0.5", "wanda", batches, progress=False)
    assert torch.equal(report.masks["layers.1"], expected.masks[""])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "resnext26ts"])
def test_whole_networks(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    copied = copy.deepcopy(model)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    targets = "re:.*(layer3|blocks\\.[34]|stages\\.2).*"
    options = {"method": "wanda", "targets": targets, "calibration": batches, "progress": False}
    report = prune(model, "2:4", **options)
    recomputed = prune(copied, "2:4", cache_bytes=0, **options)
    assert len(report.masks) >= 5
    assert report.masks.keys() == recomputed.masks.keys()
    for (key, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    for layer in report.layers:
        assert layer.pattern is not None or "depthwise" in layer.reason or "8" in layer.reason
    for key, mask in report.masks.items():
        assert torch.equal(model.get_submodule(key).weight != 0, mask)
        assert mask.float().mean() == pytest.approx(0.5)
    model.train()
    model(batches[0])  # as it was: own forwards, no hooks


# --- training further -------------------------------------------------------------------------


def test_masks_hold_while_training():
    model = small().train()
    report = prune(model, "2:4", progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    before = model[0].weight.detach().clone()
    with hold_masks(model, report.masks, optimizer):
        for x in images():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert not torch.equal(model[0].weight, before)
    for name, mask in report.masks.items():
        assert not model.get_submodule(name).weight[~mask].any()


def test_distillation_recovers_and_keeps_zeros():
    student, teacher = small(), small()
    report = prune(student, "2:4", progress=False)
    found = distill(
        student,
        teacher,
        images(),
        report.masks,
        hidden=["0", "3"],
        steps=30,
        lr=3e-3,
        progress=False,
    )
    assert found.losses[-1] < 0.5 * found.losses[0]
    for name, mask in report.masks.items():
        assert not student.get_submodule(name).weight[~mask].any()
