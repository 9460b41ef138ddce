"""Residual adds and activations that sparse convolutions take over by a rewritten forward."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_models import BasicBlock, always, exact, network, prune, run, shake
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.nn import SparseConv2d, fuse_residuals
from sparsekit.nn import residual as rewriting

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions and an activation, in a forward that is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 1)
        self.act = nn.ReLU()
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.5))
        self.body = body
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def converted(body: Callable[[Any, Tensor], Any]) -> tuple[Block, Block]:
    """A block with sparse convolutions, and what it was."""
    dense = prune(Block(body)).eval()
    sparse = copy.deepcopy(dense)
    assert always(sparse, None, fuse=False).sparse == ["conv", "other"]
    return sparse, dense  # type: ignore[return-value]


def kinds(model: nn.Module) -> list[tuple[bool, str | None]]:
    return [(each.residual, each.activation) for each in fuse_residuals(model)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda self, x: self.act(self.conv(x) + x), [(True, "relu")]),
        (lambda self, x: self.act(x + self.conv(x)), [(True, "relu")]),
        (lambda self, x: x + self.conv(x), [(True, None)]),
        (lambda self, x: torch.add(self.conv(x), x), [(True, None)]),
        (lambda self, x: torch.add(x, self.conv(x), alpha=1), [(True, None)]),
        (lambda self, x: self.conv(x).add(x).relu(), [(True, "relu")]),
        (lambda self, x: self.conv(x).add_(x).relu_(), [(True, "relu")]),
        (lambda self, x: functional.relu(self.conv(x) + x, inplace=True), [(True, "relu")]),
        (lambda self, x: torch.relu(self.conv(x)), [(False, "relu")]),
        (lambda self, x: functional.relu6(self.conv(x)), [(False, "relu6")]),
        (lambda self, x: functional.silu(self.conv(x) + x), [(True, "silu")]),
        (lambda self, x: functional.gelu(self.conv(x)), [(False, "gelu")]),
        (lambda self, x: functional.gelu(self.conv(x), approximate="tanh"), [(False, "gelu_tanh")]),
        # One activation module for all calls.
        (
            lambda self, x: self.act(self.other(self.act(self.conv(x))) + x),
            [(False, "relu"), (True, "relu")],
        ),
        # Of two convolutions that are added, one adds the other.
        (lambda self, x: self.act(self.conv(x) + self.other(x)), [(True, "relu")]),
        # A value that is broadcast: added outside the kernel, when it is seen.
        (lambda self, x: self.act(self.conv(x) + self.scale), [(True, "relu")]),
        (lambda self, x: self.act(self.conv(x) + x.mean()), [(True, "relu")]),
        # In three dimensions, for one image.
        (lambda self, x: self.act(self.conv(x[0]) + x[1]), [(True, "relu")]),
    ],
)
def test_what_is_fused(body: Callable[[Any, Tensor], Any], expected: list[Any]) -> None:
    sparse, dense = converted(body)
    plain = run(sparse, X)
    assert kinds(sparse) == expected
    torch.testing.assert_close(run(sparse, X), exact(dense, X))
    torch.testing.assert_close(run(sparse, X), plain)
    # Only the forward is new: the children still compute what they did.
    torch.testing.assert_close(run(Block.forward.__get__(sparse), X), plain)
    assert isinstance(sparse, Block)
    assert type(sparse).__name__ == "FusedBlock"
    assert [type(child).__name__ for child in sparse.children()] == ["SparseConv2d"] * 2 + ["ReLU"]
    assert fuse_residuals(sparse) == []


def iadd_to_the_input(self: Any, x: Tensor) -> Tensor:
    x += self.conv(x)
    return x


def input_changes_before_the_add(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv(x)
    x.mul_(2)
    return y + x


def view_of_the_input_changes(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    part = x[:1]
    y = self.conv(x)
    part.zero_()
    return y + part


def keeps_what_it_saw(self: Any, x: Tensor) -> Tensor:
    self.seen.append(1)
    return self.act(self.conv(x) + x)


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return self.act(self.conv(x) + x)


def constant(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) * torch.tensor([2.0])


def other_when_training(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) if self.training else self.conv(x) + x


def other_with_gradients(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) if torch.is_grad_enabled() else self.conv(x) + x


def dropped(self: Any, x: Tensor) -> Tensor:
    return self.act(functional.dropout(self.conv(x), 0.5, self.training) + x)


def asks_for_the_type(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) if not isinstance(x, Tensor) else self.conv(x) - x


def draws_a_number(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) if random.random() < 2 else x


def draws_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.act(self.conv(x) + x) if torch.rand(()) < 2 else x


def values_decide(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.act(y + x) if y.sum() > -1e9 else y


@pytest.mark.parametrize(
    "body",
    [
        iadd_to_the_input,
        input_changes_before_the_add,
        view_of_the_input_changes,
        keeps_what_it_saw,
        remembers,
        constant,
        other_when_training,
        other_with_gradients,
        dropped,
        values_decide,
        asks_for_the_type,
        draws_a_number,
        draws_a_tensor,
        lambda self, x: (lambda y: self.act(y + x) + y)(self.conv(x)),
        lambda self, x: (lambda y: y + y)(self.conv(x)),
        lambda self, x: self.conv(x) + 1.0,
        # It cannot be seen that clone() gives memory of its own.
        lambda self, x: self.conv(x) + x.clone().mul_(2),
        lambda self, x: torch.add(self.conv(x), x, alpha=2),
        lambda self, x: self.conv(x) - x,
        lambda self, x: functional.gelu(self.conv(x) * 2),
        lambda self, x: functional.leaky_relu(self.conv(x)),
    ],
)
def test_what_is_not_proven_stays(body: Callable[[Any, Tensor], Any]) -> None:
    sparse, _ = converted(body)
    before, attributes = run(sparse, X.clone()), dict(sparse.__dict__)
    seen = list(sparse.seen)
    assert fuse_residuals(sparse) == []
    assert type(sparse) is Block
    assert sparse.__dict__ == attributes
    assert sparse.seen == seen
    assert torch.equal(run(sparse, X.clone()), before)


def test_in_place_adds_elsewhere_stay_in_place() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        y = self.act(self.conv(x) + x)
        x += 1
        return y

    sparse, dense = converted(body)
    assert kinds(sparse) == [(True, "relu")]
    mine, theirs = X.clone(), X.clone()
    torch.testing.assert_close(run(sparse, mine), run(dense, theirs))
    assert torch.equal(mine, theirs)
    assert torch.equal(mine, X + 1)


@pytest.mark.parametrize("kind", ["optional", "sequential", "reduce", "hooked", "replaced"])
def test_parents_that_are_left_alone(kind: str) -> None:
    class Optional(Block):
        def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
            return self.body(self, x)

    class Reduces(Block):
        def __reduce__(self) -> Any:
            return super().__reduce__()

    def body(self: Any, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)

    torch.manual_seed(0)
    model: nn.Module = {"optional": Optional, "reduce": Reduces}.get(kind, Block)(body)
    if kind == "sequential":
        act = nn.ReLU()
        model = nn.Sequential(nn.Conv2d(16, 16, 1), act, nn.Conv2d(16, 16, 1), act)
    always(model.eval(), X, fuse=False)
    if kind == "hooked":
        model.conv.register_forward_hook(lambda *_: None)
    if kind == "replaced":
        model.forward = lambda x: body(model, x)  # type: ignore[method-assign]
    assert fuse_residuals(model) == []


def test_a_convolution_that_activates_itself_is_left_alone() -> None:
    sparse, _ = converted(lambda self, x: self.conv(x) + x)
    assert isinstance(sparse.conv, SparseConv2d)
    sparse.conv.activation = "silu"
    assert fuse_residuals(sparse) == []


def test_a_child_that_changes_later_is_respected() -> None:
    sparse, dense = converted(lambda self, x: self.act(self.conv(x) + x))
    fuse_residuals(sparse)
    # Another dtype of the shortcut, hooks, a dense layer put back: the plain way is taken.
    seen: list[int] = []
    sparse.conv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(run(sparse, X), exact(dense, X))
    assert seen == [1]
    sparse.conv = dense.conv
    assert torch.equal(run(sparse, X), run(dense, X))


def test_a_convolution_that_becomes_sparse_later_joins() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return self.act(self.other(self.act(self.conv(x))) + x)

    dense = prune(Block(body)).eval()
    model = copy.deepcopy(dense)
    report = always(model, X, {"conv": "2:4", "*": None}, fuse="all")
    assert [row.residual for row in report.rows] == [False, False]
    torch.testing.assert_close(run(model, X), exact(dense, X))
    report = always(model, X, fuse="all")
    assert [(row.layer, row.residual, row.activation) for row in report.rows] == [
        ("other", True, "relu")
    ]
    assert type(model).__mro__[1] is Block
    torch.testing.assert_close(run(model, X), exact(dense, X))


def test_the_class_makes_plain_objects() -> None:
    sparse, _ = converted(lambda self, x: self.act(self.conv(x) + x))
    fuse_residuals(sparse)
    assert type(type(sparse)(lambda self, x: x)) is Block


def test_compiles_where_modules_are_not_inlined() -> None:
    """As with `torch._inductor.config.freezing`; the class's own `__init__` takes arguments."""
    sparse, dense = converted(lambda self, x: self.act(self.conv(x) + x))
    fuse_residuals(sparse)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False), torch.inference_mode():
        torch._dynamo.reset()
        compiled = torch.compile(sparse, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), exact(dense, X))


class Net(nn.Module):
    """At the top level, so that it pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = prune(shake(Net())).eval()
    report = always(model, X, fold_batchnorm=True, fuse="all")
    assert sum(row.residual for row in report.rows) == 2
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_fused_too(net: Net, copied: Callable[[Net], Net]) -> None:
    expected = run(net, X)
    other = copied(net)
    assert torch.equal(run(other, X), expected)
    assert [type(block).__name__ for block in other.blocks] == ["FusedBasicBlock"] * 2
    assert isinstance(other.blocks[0], BasicBlock)
    assert type(other.blocks[0]).forward is not BasicBlock.forward
    # The copy stands by itself.
    other.blocks[0].conv2 = nn.Identity()
    assert torch.equal(run(net, X), expected)
    assert net.state_dict().keys() == copied(net).state_dict().keys()


def test_state_dicts_have_the_names_they_had(net: Net) -> None:
    plain = prune(shake(Net())).eval()
    always(plain, X, fold_batchnorm=True)
    assert net.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(run(plain, X), run(net, X))


def test_compiled_exported_and_traced(net: Net) -> None:
    torch._dynamo.reset()
    expected = run(net, X)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, X), expected)
    exported = torch.export.export(net, (X,)).module()
    assert torch.equal(run(exported, X), expected)
    assert torch.equal(run(torch.fx.symbolic_trace(net), X), expected)


def unfused(net: Net) -> Net:
    """A copy whose blocks have the forward they had."""
    plain = copy.deepcopy(net)
    for block in plain.blocks:
        block.__class__ = BasicBlock
    return plain


def test_gradients_are_those_of_the_plain_forward(net: Net) -> None:
    def gradient(model: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(net), gradient(unfused(net)))


def test_autocast(net: Net) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(net, X), run(unfused(net), X))


def test_half_precision_loses_no_more_than_the_plain_forward(net: Net) -> None:
    net, x = net.bfloat16(), X.bfloat16()
    reference = unfused(net)
    for parent in list(reference.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseConv2d):
                act = nn.ReLU() if child.activation else nn.Identity()
                setattr(parent, name, nn.Sequential(child.to_dense(), act))
    expected = run(reference.double(), x.double())
    ours, plain = run(net, x).double(), run(unfused(net), x).double()
    assert (ours - expected).abs().max() <= 2 * (plain - expected).abs().max()
    assert (plain - expected).abs().max() > 0


def test_the_add_happens_in_the_kernel(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, bool]] = []
    plain = rewriting.conv_packed

    def spy(**arguments: Any) -> Tensor:
        calls.append((arguments.get("activation"), arguments.get("residual") is not None))
        return plain(**arguments)

    monkeypatch.setattr(rewriting, "conv_packed", spy)
    run(net, X)
    assert calls == [("relu", True)] * 2


def test_a_network(net: Net) -> None:
    model, x = network("resnet")
    expected = exact(model, x)
    always(model, x, fuse="all", fold_batchnorm=True)
    torch.testing.assert_close(run(model, x), expected)
    torch.testing.assert_close(run(model, x[:1]), expected[:1])
