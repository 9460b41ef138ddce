"""Reading batches and collecting statistics."""

from collections import UserDict

import pytest
import torch
from torch import nn

from sparsekit.prune.calibration import CACHE_BYTES, Calibration, read_batches
from sparsekit.prune.layers import Layer


class Block(nn.Module):
    """Attention-like: three layers share an input, one follows them."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.runs = 0

    def forward(self, x, attention_mask=None):
        self.runs += 1
        return (x + self.o(torch.tanh(self.q(x) + self.k(x) * self.v(x))),)


class Model(nn.Module):
    def __init__(self, width=8, depth=3, in_place=False):
        super().__init__()
        self.layer = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 4)
        self.in_place = in_place

    def forward(self, x, attention_mask=None):
        for block in self.layer:
            (x,) = block(x, attention_mask)
            if self.in_place:
                x.mul_(2)
        return self.head(x)


def layers_of(model):
    return [Layer(name, [m]) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def batches_of(count=3, width=8, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, width, generator=make) for _ in range(count)]


def names(group):
    return [layer.name for layer in group.layers]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


# --- reading ----------------------------------------------------------------------------------


def test_tensors_tuples_lists_and_mappings_are_batches():
    x = torch.zeros(2)
    read = read_batches(iter([x, (x, 1), [x], {"x": x}, UserDict(x=x)]))
    assert [len(batch.args) for batch in read] == [1, 2, 1, 0, 0]
    assert [list(batch.kwargs) for batch in read] == [[], [], [], ["x"], ["x"]]


def test_a_generator_is_read_once_and_refused_when_exhausted():
    generator = (torch.zeros(1) for _ in range(2))
    assert len(read_batches(generator)) == 2
    with pytest.raises(ValueError, match=r"calibration: the iterable gave no batches.*exhausted"):
        read_batches(generator)


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_no_batches_are_refused(empty):
    with pytest.raises(ValueError, match="gave no batches"):
        read_batches(empty)


@pytest.mark.parametrize("single", [torch.zeros(2, 2), {"x": 1}, "text"])
def test_one_batch_in_place_of_batches_is_refused(single):
    with pytest.raises(ValueError, match=r"expected an iterable of batches.*\[batch\]"):
        read_batches(single)


def test_what_is_no_batch_is_named():
    with pytest.raises(ValueError, match="batch 1 is a int"):
        read_batches([torch.zeros(1), 3])


# --- order and groups -------------------------------------------------------------------------


def test_groups_follow_execution_and_share_inputs(model):
    shuffled = layers_of(model)[::-1]
    with Calibration(model, read_batches(batches_of()), shuffled) as calibration:
        assert [names(group) for group in calibration.groups] == [
            *(
                [f"layer.{i}.{name}" for name in part]
                for i in range(3)
                for part in (["q", "k", "v"], ["o"])
            ),
            ["head"],
        ]


def test_layers_of_equal_inputs_in_different_tensors_stay_apart():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x.add_(1)  # Same address, other values.
            return y + self.b(x)

    model = Copies()
    with Calibration(model, read_batches([torch.zeros(2, 4)]), layers_of(model)) as calibration:
        assert [names(group) for group in calibration.groups] == [["a"], ["b"]]


def test_a_layer_no_batch_reaches_is_told(model):
    model.extra = nn.Linear(8, 8)
    with Calibration(model, read_batches(batches_of()), layers_of(model)) as calibration:
        assert [layer.name for layer in calibration.unreached] == ["extra"]


# --- moments ----------------------------------------------------------------------------------


def inputs_of(model, module, batches):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("in_place", [False, True])
def test_moments_are_those_of_the_model_pruned_so_far(cache_bytes, in_place):
    torch.manual_seed(0)
    model, batches = Model(in_place=in_place), batches_of()
    layers = layers_of(model)
    with Calibration(model, read_batches(batches), layers, cache_bytes) as calibration:
        for group in calibration.groups:
            (moment,) = calibration.moments(group)
            # A copy without playback, with the weights as they are now.
            fresh = Model(in_place=in_place)
            fresh.load_state_dict(model.state_dict())
            x = inputs_of(fresh, fresh.get_submodule(group.layers[0].name), batches)
            torch.testing.assert_close(moment, x.t() @ x / len(x))
            for layer in group.layers:
                with torch.no_grad():
                    layer.weight.mul_(0.5)  # Stands for pruning: changes what comes after.
            calibration.done(group)


def test_finished_blocks_are_played_back_not_computed(model):
    batches = batches_of()
    runs = {}
    for cache_bytes in (0, 1 << 30):
        for block in model.layer:
            block.runs = 0
        with Calibration(
            model, read_batches(batches), layers_of(model), cache_bytes
        ) as calibration:
            for group in calibration.groups:
                calibration.moments(group)
                calibration.done(group)
        runs[cache_bytes] = [block.runs for block in model.layer]
    # Traced on one batch; then a block runs for its own two groups, and once more to be cached.
    assert runs[1 << 30] == [1 + 3 * 3] * 3
    assert runs[0] == [1 + 7 * 3, 1 + 5 * 3, 1 + 3 * 3]


def test_the_forward_stops_after_the_group(model):
    batches = batches_of()
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        before = model.layer[1].runs
        calibration.moments(calibration.groups[1])
        assert model.layer[1].runs == before


def test_padding_is_left_out(model):
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batches = read_batches([{"x": x, "attention_mask": mask}])
    with Calibration(model, batches, layers_of(model)) as calibration:
        (moment,) = calibration.moments(calibration.groups[0])
    real = x[mask.bool()]
    torch.testing.assert_close(moment, real.t() @ real / 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_name(model, value):
    batches = batches_of()
    batches[1][0, 0, 0] = value
    with (
        Calibration(model, read_batches(batches), layers_of(model)) as calibration,
        pytest.raises(ValueError, match=r"inputs of layer 'layer\.0\.q' hold NaN or infinity"),
    ):
        calibration.moments(calibration.groups[0])


def test_half_precision_inputs_are_summed_in_float32(model):
    model.bfloat16()
    batches = [batch.bfloat16() for batch in batches_of()]
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        (moment,) = calibration.moments(calibration.groups[0])
    x = torch.cat(batches).flatten(0, 1).float()
    assert moment.dtype == torch.float32
    torch.testing.assert_close(moment, x.t() @ x / len(x))


def test_the_model_comes_back_as_it_was(model):
    model.train()
    model.layer[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    with Calibration(model, read_batches(batches_of()), layers_of(model)) as calibration:
        assert not any(module.training for module in model.modules())
        for group in calibration.groups:
            calibration.moments(group)
            calibration.done(group)
        assert "forward" in model.layer[0].__dict__
    assert {name: module.training for name, module in model.named_modules()} == flags
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_shared_layer_counts_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    model, x = Twice(), torch.randn(6, 4)
    with Calibration(model, read_batches([x]), layers_of(model)) as calibration:
        (moment,) = calibration.moments(calibration.groups[0])
    both = torch.cat([x, torch.tanh(model.a(x))]).detach()
    torch.testing.assert_close(moment, both.t() @ both / 12)


# --- what is kept of finished blocks ----------------------------------------------------------


class Skips(nn.Module):
    """Reads the outputs of early blocks again after the later ones."""

    def __init__(self, depth=6):
        super().__init__()
        self.layer = nn.ModuleList([Block(8) for _ in range(depth)])
        self.joins = nn.ModuleList([nn.Linear(16, 8) for _ in range(2)])

    def forward(self, x):
        outputs = []
        for block in self.layer:
            (x,) = block(x)
            outputs.append(x)
        for join, early in zip(self.joins, (outputs[1], outputs[3]), strict=True):
            x = join(torch.cat([x, early], -1))
        return x


def kept_bytes(calibration):
    return sum(playback.nbytes for playback in calibration._played.values())


def test_a_stack_keeps_the_outputs_of_one_block():
    torch.manual_seed(0)
    model, batches = Model(depth=5), batches_of()
    one = sum(batch.nbytes for batch in batches)
    with Calibration(
        model, read_batches(batches), layers_of(model), cache_bytes=one
    ) as calibration:
        for group in calibration.groups:
            calibration.moments(group)
            calibration.done(group)
            assert kept_bytes(calibration) == one * (len(calibration._played) > 0)
        assert len(calibration._played) == 5


def moments_of(model, batches, name):
    x = inputs_of(model, model.get_submodule(name), batches)
    return x.t() @ x / len(x)


@pytest.mark.parametrize("blocks_at_a_time", [1, 4])
def test_blocks_that_others_read_are_kept(blocks_at_a_time):
    torch.manual_seed(0)
    model, batches = Skips(), batches_of()
    one = sum(batch.nbytes for batch in batches)
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        for number, group in enumerate(calibration.groups):
            # A resumed run has many blocks finished before the first moments.
            if number >= 2 * (blocks_at_a_time - 1):
                (moment,) = calibration.moments(group)
                fresh = Skips()
                fresh.load_state_dict(model.state_dict())
                expected = moments_of(fresh, batches, group.layers[0].name)
                torch.testing.assert_close(moment, expected)
            calibration.done(group)
        assert kept_bytes(calibration) == 3 * one  # of the two that are read, and the last


@pytest.mark.parametrize("first", [0, 6])
def test_stacks_within_a_stack(first):
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
                for _ in range(3)
            )

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

    torch.manual_seed(0)
    model, batches = Stages(), batches_of()
    one = sum(batch.nbytes for batch in batches)
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        for number, group in enumerate(calibration.groups):
            if number >= first:
                (moment,) = calibration.moments(group)
                fresh = Stages()
                fresh.load_state_dict(model.state_dict())
                expected = moments_of(fresh, batches, group.layers[0].name)
                torch.testing.assert_close(moment, expected)
                # Of the last stage and of the last block in this one.
                assert kept_bytes(calibration) <= 2 * one
            calibration.done(group)
        assert calibration._cache_left == CACHE_BYTES - kept_bytes(calibration)


def test_outputs_are_those_of_the_model_as_it_is():
    torch.manual_seed(0)
    model, batches = Skips(), batches_of()
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        for group in calibration.groups[:-2]:
            calibration.moments(group)
            calibration.done(group)
        assert any(playback.is_hollow for playback in calibration._played.values())
        with torch.no_grad():
            model.joins[0].weight.mul_(0.5)
            found = list(calibration.outputs(2))
    assert len(found) == 2
    for batch, output in zip(batches, found, strict=False):
        torch.testing.assert_close(output, model(batch))


def test_a_block_that_runs_twice_for_one_batch_and_never_for_another_is_computed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
            self.last = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(len(x) - 1):
                x = self.experts[0](x)
            return self.last(x)

    torch.manual_seed(0)
    model, batches = Experts(), [torch.randn(3, 4, 8), torch.randn(1, 4, 8)]
    with Calibration(model, read_batches(batches), layers_of(model)) as calibration:
        for group in calibration.groups:
            (moment,) = calibration.moments(group)
            calibration.done(group)
    torch.testing.assert_close(moment, moments_of(model, batches, "last"))


def test_groups_that_are_known_spare_the_tracing(model):
    batches = read_batches(batches_of())
    with Calibration(model, batches, layers_of(model)[:-1]) as calibration:
        groups = calibration.groups
    before = model.layer[0].runs
    with Calibration(model, batches, layers_of(model), groups=groups) as calibration:
        assert model.layer[0].runs == before
        assert calibration.groups == groups
        assert [layer.name for layer in calibration.unreached] == ["head"]
