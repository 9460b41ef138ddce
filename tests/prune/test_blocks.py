"""Block-wise recovery: each block against the dense one, on the inputs it really gets."""

import copy

import pytest
import torch
from torch import nn

from sparsekit.prune import prune, reconstruct_blocks
from sparsekit.prune.recovery.distill import relative_mse


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(self.dropout(torch.tanh(self.up(x)))),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x, scale=2.0)[0]
        return self.head(x)


BLOCKS = r"re:blocks\.\d"


def batches_of(count=4, seed=1):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, 16, generator=make) for _ in range(count)]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Net().train()
    student = copy.deepcopy(teacher)
    masks = prune(student, "2:4", targets="blocks.*", progress=False).masks
    return student, teacher, masks


def errors(student, teacher, batches):
    """Relative error after each block."""
    student.eval(), teacher.eval()
    out = []
    with torch.no_grad():
        for place in range(3):
            total = 0.0
            for x in batches:
                y = x
                for mine, dense in zip(
                    student.blocks[: place + 1], teacher.blocks[: place + 1], strict=True
                ):
                    x, y = mine(x, scale=2.0)[0], dense(y, scale=2.0)[0]
                total += float(relative_mse(x, y)) / len(batches)
            out.append(total)
    return out


def test_every_block_comes_closer_and_the_zeros_stay(pair):
    student, teacher, masks = pair
    head = student.head.weight.clone()
    dense = copy.deepcopy(teacher.state_dict())
    before = errors(copy.deepcopy(student), copy.deepcopy(teacher), batches_of(4, seed=9))
    report = reconstruct_blocks(
        student, teacher, iter(batches_of()), masks, blocks=BLOCKS, steps=80, lr=5e-3,
        progress=False,
    )  # fmt: skip
    assert all(module.training for model in (student, teacher) for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    # On inputs that it never saw.
    after = errors(student, teacher, batches_of(4, seed=9))
    assert all(new < 0.6 * old for new, old in zip(after, before, strict=True))
    assert [block.name for block in report.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(block.after < block.before for block in report.blocks)
    # What is reported is what the dense model puts out there, from the inputs there now are.
    found = errors(student, teacher, batches_of())
    assert [block.after for block in report.blocks] == pytest.approx(found, rel=1e-4)
    assert "blocks.0: relative error" in str(report)
    for name, mask in masks.items():
        assert not student.get_submodule(name).weight[~mask].any()
    assert torch.equal(student.head.weight, head)
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())


def test_a_block_never_gets_worse(pair):
    student, teacher, masks = pair
    before = copy.deepcopy(student.state_dict())
    report = reconstruct_blocks(
        student, teacher, batches_of(), masks, blocks=BLOCKS, steps=5, lr=1e3, progress=False
    )
    assert [block.after for block in report.blocks] == [block.before for block in report.blocks]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_padding_does_not_count(pair):
    student, teacher, masks = pair
    mask = torch.ones(8, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    weights = []
    for filler in (0.0, 100.0):
        copied = copy.deepcopy(student)
        batch = {"x": batches_of(1)[0].clone(), "attention_mask": mask}
        batch["x"][:, 3:] = filler
        reconstruct_blocks(copied, teacher, [batch], masks, blocks=BLOCKS, steps=3, progress=False)
        weights.append(copied.blocks[2].up.weight.detach())
    assert torch.equal(*weights)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def test_a_resumed_run_equals_an_uninterrupted_one(pair, tmp_path):
    student, teacher, masks = pair
    arguments = {"blocks": BLOCKS, "steps": 10, "optimizer": sgd, "lr": 0.1, "progress": False}
    whole = copy.deepcopy(student)
    expected = reconstruct_blocks(whole, teacher, batches_of(), masks, **arguments)
    arguments["checkpoint"] = tmp_path / "blocks"
    made = 0

    def interrupted(parameters):
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return sgd(parameters)

    with pytest.raises(KeyboardInterrupt):
        reconstruct_blocks(
            copy.deepcopy(student), teacher, batches_of(), masks,
            **(arguments | {"optimizer": interrupted}),
        )  # fmt: skip
    resumed = copy.deepcopy(student)  # A new process starts from the pruned model again.
    found = reconstruct_blocks(resumed, teacher, batches_of(), masks, **arguments)
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        assert (a.name, a.before, a.after) == (b.name, b.before, b.after)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    more = {name: mask.clone() for name, mask in masks.items()}
    more["blocks.1.up"][0] = True
    for other in ({"masks": more}, {"blocks": "blocks.0"}):
        given = {"masks": masks} | arguments | other
        with pytest.raises(ValueError, match="is of another model, other masks or other blocks"):
            reconstruct_blocks(resumed, teacher, batches_of(), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "reconstruct_blocks: the iterable gave no batches"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"blocks": "trunk.*"}, r"blocks: 'trunk\.\*' matches no layer"),
        ({"blocks": "blocks.*"}, r"block 'blocks\.0\.up' lies in block 'blocks\.0'"),
        ({"blocks": "blocks"}, "block 'blocks' runs 0 times in a forward, expected once"),
        ({"blocks": "head"}, "masks= holds no layer of block 'head'"),
        ({"masks": {"blocks.9": torch.ones(1)}}, r"no layer 'blocks\.9'"),
    ],
)
def test_refusals(pair, arguments, message):
    student, teacher, masks = pair
    given = {"batches": batches_of(), "masks": masks, "blocks": BLOCKS, "progress": False}
    with pytest.raises(ValueError, match=message):
        reconstruct_blocks(student, teacher, **(given | arguments))
    assert student.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_batch_that_leaves_a_block_out_is_refused(pair):
    student, teacher, masks = pair
    for model in (student, teacher):
        model.forward = lambda x, short=False, model=model: (
            model.blocks[0](x) if short else Net.forward(model, x)
        )
    with pytest.raises(ValueError, match=r"batch 1 does not run block 'blocks\.1'"):
        reconstruct_blocks(
            student, teacher, [batches_of(1), (batches_of(1)[0], True)], masks, blocks=BLOCKS,
            steps=1, progress=False,
        )  # fmt: skip


def test_a_block_that_returns_no_tensor_is_refused(pair):
    student, teacher, masks = pair
    for model in (student, teacher):
        forward = model.blocks[1].forward
        model.blocks[1].forward = lambda x, scale, forward=forward: {0: forward(x, scale)[0]}
    with pytest.raises(ValueError, match=r"block 'blocks\.1' returns a dict"):
        reconstruct_blocks(student, teacher, batches_of(), masks, blocks=BLOCKS, progress=False)
