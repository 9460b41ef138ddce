"""`train_sparse` as a handle: what every method has in common."""

import copy
import math
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn import functional

import sparsekit as sk
from sparsekit.patterns import parse_pattern
from sparsekit.prune import TRAINING_METHODS, train_sparse

PATTERNS = ["2:4", "1:4v4", "bsr4x4@0.75", "bsr1x1@0.6"]
STEPS = 24
# Swaps and schedules shall happen in a run as short as this.
OFTEN = {"gradual": {"every": 4}, "rigl": {"every": 3}, "set": {"every": 3}, "dsa": {"every": 2}}
every_method = pytest.mark.parametrize("method", TRAINING_METHODS)


class Net(nn.Module):
    """Convolutions and linear layers, one of which reads a tied weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.body = nn.Linear(32, 32)
        self.twin = nn.Linear(32, 32)
        self.twin.weight = self.body.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = functional.relu(self.grouped(functional.relu(self.conv(x))))
        x = self.depthwise(x).flatten(1)
        return self.head(torch.tanh(self.twin(torch.tanh(self.body(x)))))


def new(seed=0):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        make = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, 6, 6, generator=make)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5, 0, 0]).square().mean()
        loss.backward()
        optimizer.step()


def begin(model, optimizer, method, pattern="2:4", **options):
    return train_sparse(
        model, pattern, method, optimizer, steps=STEPS, ignore="head", **OFTEN.get(method, {}),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@every_method
def test_the_weights_end_in_the_pattern_and_learn(method, pattern):
    model, optimizer = new()
    before = copy.deepcopy(model)
    with begin(model, optimizer, method, pattern) as run:
        assert set(run.masks) == {"conv", "grouped", "body"}
        train(model, optimizer, STEPS)
        assert run.step == STEPS
        zeros, rows = run.sparsity, run.allocation
    report = run.report
    assert zeros == pytest.approx(report.sparsity, abs=0.02)
    assert run.finish() is report
    for layer in report.layers:
        if layer.pattern is None:
            continue
        weight, mask = model.get_submodule(layer.name).weight, report.masks[layer.name]
        assert not bool(weight[~mask].any())
        assert not torch.equal(weight[mask], before.get_submodule(layer.name).weight[mask])
        follows = rows[layer.name]
        assert str(follows) == layer.pattern
        if method != "dsa":
            assert follows == parse_pattern(pattern)
        for matrix in _matrices(model.get_submodule(layer.name), mask, follows):
            assert follows.first_violation(matrix) is None
    assert model.twin.weight is model.body.weight
    reasons = {layer.name: layer.reason for layer in report.layers if layer.pattern is None}
    assert "shares its weight with body" in reasons["twin"]
    assert "depthwise" in reasons["depthwise"]
    assert f"{method}, reconstruction none" in str(report)
    assert not model.body.weight._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def _matrices(module, mask, pattern):
    from sparsekit.prune.layers import Layer

    return Layer("", [module]).matrices(mask, pattern)


@every_method
def test_convert_takes_the_result(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(8, 32)
    with train_sparse(model, "bsr4x4@0.75", method, optimizer, steps=8):
        for _ in range(8):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    expected = model(x)
    report = sk.convert(model, example_inputs=x, gate="always", progress=False)
    assert isinstance(model[0], sk.nn.SparseLinear), report
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 7, 13, 20])
@every_method
def test_a_resumed_run_gives_the_same_bits(method, stop, tmp_path):
    options = {"start": 0.1, "end": 0.7}
    model, optimizer = new()
    with begin(model, optimizer, method, "bsr2x2@0.6", **options) as run:
        train(model, optimizer, stop)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
        run.save(tmp_path / "run.safetensors")
        train(model, optimizer, STEPS - stop, first=stop)
    # The model's state may be loaded before the run begins or after it, or after the run's.
    for order in ("model run state", "run model state", "run state model"):
        its_weights, its_moments, its_state = copy.deepcopy(saved)
        other, its_optimizer = new(seed=5)
        with ExitStack() as stack:
            for what in order.split():
                if what == "model":
                    other.load_state_dict(its_weights)
                    its_optimizer.load_state_dict(its_moments)
                elif what == "run":
                    resumed = begin(other, its_optimizer, method, "bsr2x2@0.6", **options)
                    stack.enter_context(resumed)
                elif order == "run model state":
                    resumed.load(tmp_path / "run.safetensors")
                else:
                    resumed.load_state_dict(its_state)
            assert resumed.step == stop
            train(other, its_optimizer, STEPS - stop, first=stop)
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert resumed.allocation == run.allocation
        assert all(torch.equal(mask, resumed.masks[name]) for name, mask in run.masks.items())


@every_method
def test_a_copy_in_training_is_a_plain_model(method, tmp_path):
    model, optimizer = new()
    x = torch.randn(2, 12, 6, 6)
    with begin(model, optimizer, method) as run:
        train(model, optimizer, 5)
        with torch.no_grad():
            expected = model.eval()(x)
            copied = copy.deepcopy(model)
            other, its_optimizer = new(seed=1)
            other.load_state_dict(model.state_dict())
            torch.save(model, tmp_path / "model.pt")
            loaded = torch.load(tmp_path / "model.pt", weights_only=False)
            for same in (copied, other, loaded):
                assert torch.equal(same(x), expected)
        before = copy.deepcopy(copied.state_dict())
        train(model.train(), optimizer, 1)  # Hooks of the one leave the other alone.
        assert all(torch.equal(v, before[n]) for n, v in copied.state_dict().items())
        train(other, its_optimizer, 2)
        assert bool((other.conv.weight != 0).all())
        run.finish(early=True)


@every_method
def test_finish_before_the_end(method):
    model, optimizer = new()
    run = begin(model, optimizer, method, end=0.5)
    train(model, optimizer, 9)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"reaches the pattern at step 12 and has made 9; make 3"):
        run.finish()
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    report = run.finish(early=True)
    for name, mask in report.masks.items():
        assert not bool(model.get_submodule(name).weight[~mask].any())
        sparsity = 1 - float(mask.float().mean())
        assert run.allocation[name].sparsity == pytest.approx(sparsity, abs=0.02)
    train(model, optimizer, 1)  # nothing holds any more
    assert bool((model.conv.weight != 0).all())


def test_a_loop_that_is_cut_short_raises_and_an_exception_passes():
    model, optimizer = new()
    with pytest.raises(ValueError, match="make 18 more"), begin(model, optimizer, "gradual"):
        pass
    assert not model.body.weight._backward_hooks
    with pytest.raises(KeyError), begin(model, optimizer, "sr_ste"):
        raise KeyError
    assert not model.body.weight._backward_hooks
    assert not optimizer._optimizer_step_post_hooks


@every_method
def test_training_goes_on_under_the_final_masks(method):
    model, optimizer = new()
    with begin(model, optimizer, method, end=0.5) as run:
        train(model, optimizer, 12)
        masks = {name: mask.clone() for name, mask in run.masks.items()}
        weight = model.body.weight.detach().clone()
        train(model, optimizer, STEPS, first=12)  # more than was said is fine
        assert run.step == 12 + STEPS
    for name, mask in masks.items():
        assert torch.equal(mask, run.report.masks[name])
    assert not torch.equal(model.body.weight, weight)


@every_method
def test_weights_in_half_precision_and_another_layout(method):
    model, _ = new()
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(4, 12, 6, 6, dtype=torch.bfloat16)
    with begin(model, optimizer, method) as run:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert not bool(model.conv.weight[~run.report.masks["conv"]].any())
    assert model.conv.weight.dtype == torch.bfloat16
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["rigl", "sr_ste", "dsa"])
def test_steps_that_overflow_under_a_scaler_do_not_count(method, fused):
    """A scaler leaves out the step of an ordinary optimizer; a fused one gets it, and a flag."""
    results = []
    for scale in (1.0, 2.0**8):
        model, _ = new()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        options = {"decay": 0.5} if method == "sr_ste" else {}
        with begin(model, optimizer, method, end=0.5, **options) as run:
            for step in range(14):
                x = torch.randn(8, 12, 6, 6, generator=torch.Generator().manual_seed(step))
                loss = (model(x) - x[:, :5, 0, 0]).square().mean()
                if step == 2:
                    loss = loss * math.inf
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update(new_scale=scale)
            assert run.step == 13
        results.append(model.body.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"method": "gradula"}, "unknown method 'gradula'; known are dsa, gradual, group_lasso"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"dorp": 0.3}, "'rigl' has no option 'dorp'; it has drop, every, start, end, seed"),
        ({"drop": 0.0}, "drop must be above 0 and at most 1, got 0.0"),
        ({"drop": 1.5}, "drop must be above 0 and at most 1, got 1.5"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1, got start=0.5, end=0.5"),
        ({"start": -0.1}, "0 <= start < end <= 1"),
        ({"end": 1.1}, "0 <= start < end <= 1"),
        ({"method": "sr_ste", "decay": -1.0}, "decay must be at least 0, got -1.0"),
        ({"method": "group_lasso", "strength": 0.0}, "strength must be above 0, got 0.0"),
        ({"method": "group_lasso", "groups": "rows"}, "'dropped', 'all' or 'filters', got 'rows'"),
        ({"method": "dsa", "rate": 2.0}, "rate must be above 0 and at most 1, got 2.0"),
        ({"method": "dsa", "temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"pattern": "4:2"}, "n must be between 1 and m-1"),
        ({"targets": "nothing"}, "'nothing' matches no layer"),
    ],
)
def test_bad_arguments(arguments, message):
    model, optimizer = new()
    before = copy.deepcopy(model.state_dict())
    arguments = {"pattern": "2:4", "method": "rigl", "steps": 10} | arguments
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        train_sparse(model, optimizer=optimizer, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.body.weight._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_that_cannot_be_trained():
    model, _ = new()
    without = torch.optim.SGD(model.body.parameters(), 0.1)
    with pytest.raises(ValueError, match="weight of 'conv' is not among the optimizer's param"):
        train_sparse(model, "2:4", "set", without, steps=10)
    model, optimizer = new()
    model.body.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weight of 'body' is frozen \(requires_grad=False\)"):
        train_sparse(model, "2:4", "set", optimizer, steps=10)
    model, optimizer = new()
    nn.init.constant_(model.body.weight, torch.nan)
    with pytest.raises(ValueError, match="weight of 'body' holds NaN or infinities"):
        train_sparse(model, "2:4", "set", optimizer, steps=10)
    empty = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    empty[1].weight = nn.Parameter(torch.empty(4, 0))
    with pytest.raises(ValueError, match=r"weight of '1' is empty \[4, 0\]"):
        train_sparse(empty, "2:4", "set", torch.optim.SGD(empty.parameters(), 0.1), steps=10)


@every_method
def test_a_closure_is_refused(method):
    model, _ = new()
    optimizer = torch.optim.LBFGS(model.parameters())
    with begin(model, optimizer, method) as run:
        with pytest.raises(ValueError, match=r"which got a closure; call loss\.backward"):
            optimizer.step(lambda: torch.zeros(()))
        run.finish(early=True)


@pytest.mark.parametrize("method", ["gradual", "set", "sr_ste", "group_lasso"])
def test_weights_that_diverge_are_noticed_when_masks_are_made(method):
    model, optimizer = new()
    run = begin(model, optimizer, method)
    with pytest.raises(ValueError, match=r"weight of 'conv' holds NaN or inf.*lower the learning"):  # noqa: PT012
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model(torch.randn(2, 12, 6, 6)) * torch.nan).sum().backward()
            optimizer.step()
    assert run.step < STEPS
    run.remove()


@pytest.mark.parametrize(("method", "name"), [("rigl", "conv"), ("dsa", "conv")])
def test_gradients_that_are_not_finite_choose_nothing(method, name):
    model, optimizer = new()
    run = begin(model, optimizer, method)
    masks = {n: m.clone() for n, m in run.masks.items()}
    with pytest.raises(ValueError, match=f"gradient of '{name}' holds NaN or infinities"):  # noqa: PT012
        for _ in range(STEPS):
            optimizer.zero_grad()
            sum(p.sum() for p in model.parameters()).backward()
            if run.step == 1 + (method == "rigl"):
                model.conv.weight.grad[0, 0, 0, 0] = torch.inf
            optimizer.step()
    assert run.step == 1 + (method == "rigl")
    assert all(torch.equal(m, masks[n]) for n, m in run.masks.items())
    run.remove()


def test_rigl_without_gradients():
    model, optimizer = new()
    run = begin(model, optimizer, "rigl")
    with pytest.raises(ValueError, match="layer 'conv' has no gradient to choose new weights by"):  # noqa: PT012
        for _ in range(3):
            optimizer.step()
    run.remove()


@pytest.mark.parametrize("method", ["gradual", "sr_ste", "group_lasso", "dsa", "set"])
def test_a_layer_that_is_not_run_is_pruned_all_the_same(method):
    model, _ = new()
    model.unused = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with begin(model, optimizer, method) as run:
        train(model, optimizer, STEPS)
    mask = run.report.masks["unused"]
    assert int(mask.sum()) == mask.numel() // 2
    assert not bool(model.unused.weight[~mask].any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "set"}, "the state has method 'set', this run has 'rigl'"),
        ({"steps": 7}, "the state has steps 7, this run has 24"),
        ({"options": {}}, "the state has options {}"),
        ({"patterns": {"conv": "1:4"}}, "the state has patterns {'conv': '1:4'}"),
    ],
)
def test_a_state_of_another_run_is_refused(change, message):
    model, optimizer = new()
    with begin(model, optimizer, "rigl") as run:
        train(model, optimizer, 5)
        state = run.state_dict()
        with pytest.raises(ValueError, match=message):
            run.load_state_dict(state | change)
        tensors = dict(state["tensors"])
        tensors["body/mask"] = torch.ones(3, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match="weights of other shapes"):
            run.load_state_dict(state | {"tensors": tensors})
        assert run.step == 5
        run.finish(early=True)


def test_a_file_of_something_else_is_refused(tmp_path):
    model, optimizer = new()
    path = tmp_path / "run.safetensors"
    with begin(model, optimizer, "rigl") as run:
        run.save(path)
        sk.prune.save_masks(run.masks, path)
        with pytest.raises(ValueError, match=r"is damaged \(it holds 'something else'"):
            run.load(path)
        path.write_bytes(b"short")
        with pytest.raises(ValueError, match="no checkpoint of train_sparse, or is damaged"):
            run.load(path)
        with pytest.raises(FileNotFoundError):
            run.load(tmp_path / "none")
        run.finish(early=True)
