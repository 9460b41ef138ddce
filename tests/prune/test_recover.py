"""Distillation from the dense model, with the zeros held."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsekit.prune import LOSSES, distill, hold_masks, prune
from sparsekit.prune.recovery.distill import cosine, kl_divergence, relative_mse


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        for layer in self.body:
            x = torch.tanh(layer(x))
        return (self.head(self.dropout(x)),)


def batches_of(count=4):
    make = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, 16, generator=make) for _ in range(count)]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Net()
    student = copy.deepcopy(teacher)
    masks = prune(student, "2:4", targets="body.*", progress=False).masks
    return student, teacher, masks


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def absolute(student, teacher):
    return (student - teacher).abs().mean()


def spelled(options):
    return ", ".join(f"{name}={getattr(o, '__name__', o)}" for name, o in options.items())


def distance(student, teacher):
    student.eval(), teacher.eval()
    with torch.no_grad():
        return sum(float((student(x)[0] - teacher(x)[0]).norm()) for x in batches_of(8)[4:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": "body.*"},
        {"hidden": ["body.0", "re:body\\.[12]"], "output_weight": 0.0},
        {"output_loss": "cosine", "hidden": "body.*"},
        {"output_loss": absolute},
        {"autocast": torch.bfloat16, "hidden": "body.*"},
        {"autocast": "auto"},
        {"optimizer": sgd, "lr": 0.1},
        {"max_seconds": 60.0},
        {"train": "*"},
    ],
    ids=spelled,
)
def test_the_student_comes_closer_and_its_zeros_stay(pair, options):
    student, teacher, masks = pair
    frozen = {n: p.clone() for n, p in student.named_parameters() if "body" not in n}
    before = distance(student, teacher)
    target = copy.deepcopy(teacher.state_dict())
    arguments = {"steps": 60, "lr": 3e-3, "progress": False} | options
    report = distill(student, teacher, iter(batches_of()), masks, **arguments)
    assert report.steps == 60
    assert report.stopped == "steps"
    assert distance(student, teacher) < 0.8 * before
    for name, mask in masks.items():
        assert bool((student.get_submodule(name).weight[~mask] == 0).all())
    assert all(torch.equal(value, target[name]) for name, value in teacher.state_dict().items())
    if "train" not in options:  # Only the pruned layers learn.
        named = dict(student.named_parameters())
        assert all(torch.equal(named[name], value) for name, value in frozen.items())


def test_the_models_come_back_as_they_were(pair):
    student, teacher, masks = pair
    student.train(), teacher.train()
    student.head.bias.requires_grad_(False)
    distill(student, teacher, batches_of(), masks, hidden="body.*", progress=False)
    for model in pair[:2]:
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {"head.bias"}
    assert all(p.grad is None and not p._backward_hooks for p in student.parameters())


def test_padding_does_not_count(pair):
    student, teacher, masks = pair
    mask = torch.ones(8, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    weights = []
    for filler in (0.0, 100.0):
        copied = copy.deepcopy(student)
        batch = {"x": batches_of(1)[0].clone(), "attention_mask": mask}
        batch["x"][:, 3:] = filler
        distill(copied, teacher, [batch], masks, hidden="body.*", steps=3, progress=False)
        weights.append(copied.body[1].weight.detach())
    assert torch.equal(*weights)


def test_the_output_reader_gets_the_batch(pair):
    student, teacher, masks = pair
    seen = []

    def output(returned, batch):
        seen.append(batch.kwargs["x"])
        return returned[0].mean(1)

    batch = {"x": batches_of(1)[0]}
    distill(student, teacher, [batch], masks, output=output, progress=False)
    assert len(seen) == 2
    assert all(x is batch["x"] for x in seen)


def test_each_batch_is_used_once_unless_steps_are_given(pair):
    student, teacher, masks = pair
    assert distill(student, teacher, batches_of(), masks, progress=False).steps == 4
    assert distill(student, teacher, batches_of(), masks, steps=9, progress=False).steps == 9


def test_the_time_budget_ends_the_run(pair):
    student, teacher, masks = pair
    report = distill(
        student, teacher, batches_of(), masks, steps=10**7, max_seconds=0.3, progress=False
    )
    assert report.stopped == "time"
    assert 0 < report.steps < 10**7
    assert report.seconds >= 0.3
    assert "ended by time" in str(report)


def test_the_learning_rate_rises_and_falls_to_nearly_zero(pair):
    student, teacher, masks = pair
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    distill(
        student,
        teacher,
        batches_of(),
        masks,
        steps=100,
        lr=1.0,
        warmup=0.1,
        optimizer=lambda p: Spy(p, 1.0),
        output_weight=1e-6,
        progress=False,
    )
    assert rates[:9] == sorted(rates[:9])
    assert 0 < rates[0] <= 0.1
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert 0 < rates[-1] < 0.01


class Interrupted(Exception):
    pass


def interrupted_after(count):
    """An output reader that raises when it is called once more."""
    calls = 0

    def read(returned, batch):
        nonlocal calls
        calls += 1
        if calls > count:
            raise Interrupted
        return returned[0]

    return read


OPTIMIZERS = {
    "Adam": None,
    "SGD": sgd,
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "SGD in groups": lambda p: torch.optim.SGD(
        [{"params": p[:2]}, {"params": p[2:], "momentum": 0.5, "nesterov": True}], 0.1
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(pair, tmp_path, optimizer):
    student, teacher, masks = pair
    whole, halves = copy.deepcopy(student), copy.deepcopy(student)
    arguments = {"steps": 12, "progress": False, "optimizer": optimizer}
    expected = distill(whole, teacher, batches_of(), masks, **arguments)
    arguments["checkpoint"] = tmp_path / "distill.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekit.prune.recovery.distill.CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(Interrupted):
            distill(halves, teacher, batches_of(), masks, output=interrupted_after(14), **arguments)
    resumed = copy.deepcopy(student)  # A new process starts from the pruned model again.
    report = distill(
        resumed, teacher, batches_of(), masks, output=interrupted_after(10), **arguments
    )
    assert report.losses == expected.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["distill.safetensors"]


def test_a_checkpoint_of_something_else_is_refused(pair, tmp_path):
    student, teacher, masks = pair
    file = tmp_path / "distill.safetensors"
    arguments = {"steps": 2, "progress": False, "checkpoint": file}
    distill(student, teacher, batches_of(), masks, **arguments)

    def refuses(message, masks=masks, **changed):
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=message):
            distill(student, teacher, batches_of(), masks, **(arguments | changed))
        after = student.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    refuses("of another model or other trained parameters", train="body.0.*")
    refuses("of the optimizer Adam, not SGD", optimizer=sgd)
    more = {name: mask.clone() for name, mask in masks.items()}
    more["body.1"][0] = True
    refuses("of other masks; delete it or pass another path", masks=more)
    file.write_bytes(file.read_bytes()[:-1])
    refuses("is no checkpoint of distill, or is damaged")
    torch.save({"losses": []}, file)
    refuses("is no checkpoint of distill, or is damaged")


# --- the task's own loss ------------------------------------------------------------------------


def labelled(count=4):
    make = torch.Generator().manual_seed(2)
    return [(x, torch.randint(4, (8, 5), generator=make)) for x in batches_of(count)]


def cross_entropy(model, batch):
    x, labels = batch
    return nn.functional.cross_entropy(model(x)[0].flatten(0, 1), labels.flatten())


def test_training_on_labels_is_the_loop_that_anybody_would_write(pair):
    student, _, masks = pair
    by_hand = copy.deepcopy(student).eval()
    report = distill(
        student, None, labelled(), masks, loss=cross_entropy, steps=6, warmup=0, lr=0.1,
        optimizer=sgd, train="*", progress=False,
    )  # fmt: skip
    optimizer = sgd(by_hand.parameters())
    losses = []
    with hold_masks(by_hand, masks, optimizer):
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
            loss = cross_entropy(by_hand, labelled()[step % 4])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert list(report.losses) == losses
    for name, value in by_hand.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
    assert not student.body[0].weight[~masks["body.0"]].any()


def test_all_losses_add_up(pair):
    student, teacher, masks = pair
    student.eval(), teacher.eval()
    batch = labelled()[0]
    with torch.no_grad():
        got, wanted = student(batch[0])[0], teacher(batch[0])[0]
        expected = 0.5 * cross_entropy(student, batch) + 2.0 * kl_divergence(got, wanted)
        for of_student, of_teacher in zip(student.body, teacher.body, strict=True):
            # The first layer's input is the batch; the others see what came before.
            x = y = batch[0]
            for inner, outer in zip(student.body, teacher.body, strict=True):
                a, b = inner(x), outer(y)
                if inner is of_student:
                    expected += 3.0 / 3 * relative_mse(a, b)
                    break
                x, y = torch.tanh(a), torch.tanh(b)
            assert outer is of_teacher
    report = distill(
        student, teacher, [batch], masks, loss=cross_entropy, loss_weight=0.5, output_loss="kl",
        output_weight=2.0, hidden="body.*", hidden_weight=3.0, steps=1, progress=False,
    )  # fmt: skip
    assert report.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_batch_reaches_the_loss_as_it_was_given(pair):
    student, teacher, masks = pair
    batch = {"input": batches_of(1)[0], "anything": object()}
    seen = []

    def loss(model, given):
        seen.append((model, given))
        return model(given["input"])[0].square().mean()

    distill(student, teacher, [batch], masks, loss=loss, progress=False)
    assert [model is student for model, _ in seen] == [False, True]
    assert all(given is batch for _, given in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": None, "loss": None}, "nothing to minimise; pass a teacher, loss=, or both"),
        ({"teacher": None, "hidden": "body.*"}, "hidden= compares with a teacher; pass one"),
        ({"output_weight": 0.0}, "or teacher=None to train on the loss alone"),
        ({"loss": lambda model, batch: model(batch[0])[0]}, r"scalar tensor, got \[8, 5, 4\]"),
        ({"loss": lambda model, batch: [model(batch[0])]}, "scalar tensor, got list"),
        (
            {"loss": lambda model, batch: model.head(batch[0]).mean()},
            "loss= did not call the model it was given",
        ),
    ],
)
def test_refusals_about_the_loss(pair, arguments, message):
    student, teacher, masks = pair
    given = {"teacher": teacher, "loss": cross_entropy, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        distill(student, given.pop("teacher"), labelled(), masks, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "distill: the iterable gave no batches"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"hidden": "trunk.*"}, r"hidden: 'trunk\.\*' matches no layer"),
        ({"train": "trunk.*"}, r"train: 'trunk\.\*' matches no layer"),
        ({"output_weight": 0.0}, "nothing to compare"),
        ({"output_loss": "huber"}, "unknown output_loss 'huber'; known are cosine, kl"),
        ({"masks": {}}, "nothing to train"),
        ({"masks": {"body.9": torch.ones(1)}}, r"no layer 'body\.9'"),
        ({"output": lambda returned, batch: returned[0] / 0}, "loss is nan at step 1"),
        ({"hidden": "body"}, "hidden module 'body' did not run"),
    ],
)
def test_refusals(pair, arguments, message):
    student, teacher, masks = pair
    given = {"batches": batches_of(), "masks": masks, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, **given)


def test_an_output_that_is_no_tensor_is_refused(pair):
    class Text(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            self.net(x)
            return "text"

    student, teacher, masks = pair
    named = {f"net.{name}": mask for name, mask in masks.items()}
    with pytest.raises(ValueError, match="the model returns a str; pass output="):
        distill(Text(student), Text(teacher), batches_of(), named, progress=False)


def test_losses_are_zero_for_equals_and_known_otherwise():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    for loss in LOSSES.values():
        assert float(loss(x, x)) == pytest.approx(0.0, abs=1e-6)
    assert float(relative_mse(torch.zeros_like(x), x)) == pytest.approx(1.0)
    assert float(cosine(-x, x)) == pytest.approx(2.0)
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    # KL((1/2, 1/2) || (3/4, 1/4)) = ln(2 / sqrt 3)
    expected = torch.tensor(2 / 3**0.5).log()
    assert float(kl_divergence(student, teacher)) == pytest.approx(float(expected), rel=1e-5)
