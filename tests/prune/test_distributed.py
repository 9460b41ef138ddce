"""Pruning by two processes: equal masks, and errors that reach both."""

import copy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from sparsekit.prune import prune
from sparsekit.prune.distributed import ALONE, Ranks, all_reduce_sum, checksum

WIDTH = 24


class Model(nn.Module):
    """Two blocks, then one of two experts: which one, the batch says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x, expert):
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.experts[expert](x))


def batches_of(rank):
    """Of unequal number; rank 1 alone reaches expert 1."""
    make = torch.Generator().manual_seed(10 + rank)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return [(torch.randn(64, WIDTH, generator=make) @ mix, int(rank)) for _ in range(2 + rank)]


def pruned(batches, method="sparsegpt", model=None, **options):
    model = Model() if model is None else model
    report = prune(model, "2:4", method, batches, progress=False, **options)
    return {
        "masks": dict(report.masks),
        "weights": model.state_dict(),
        "layers": [(layer.name, layer.reason) for layer in report.layers],
    }


def loss(model, batch):
    return model(*batch).square().mean()


def failing(method="sparsegpt", **options):
    try:
        pruned(method=method, distributed=True, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class Broken(Model):
    def forward(self, x, expert):
        raise MemoryError("out of memory")


def nan(batches):
    batches = copy.deepcopy(batches)
    batches[-1][0][3, 2] = float("nan")
    return batches


def scenarios(rank):
    """What both processes do, one after the other."""
    mine = batches_of(rank)
    yield "sparsegpt", pruned(mine, distributed=True)
    yield "group", pruned(mine, "wanda", distributed=distributed.group.WORLD)
    yield "uncalibrated", pruned(None, "magnitude", distributed=True)
    yield "one idle", pruned(mine if rank == 0 else [], distributed=True)
    yield "taylor", pruned(mine, "taylor", distributed=True, loss=loss)
    yield "taylor, one idle", pruned(mine if rank else [], "taylor", distributed=True, loss=loss)
    yield "owl", pruned(mine, "wanda", distributed=True, allocation="owl")
    yield "random", pruned(None, "random", distributed=True)
    yield "both idle", failing(batches=[])
    yield "both idle, taylor", failing(batches=[], method="taylor", loss=loss)
    yield "nan", failing(batches=nan(mine) if rank == 1 else mine)
    yield "nan on 0", failing(batches=nan(mine) if rank == 0 else mine)
    yield "forward", failing(batches=mine, model=Broken() if rank == 1 else None)
    yield "no batch", failing(batches=mine if rank == 0 else torch.zeros(1))
    yield "settings", failing(batches=mine, dampening=0.01 * (rank + 1))
    model = Model()
    model.experts[1].weight.data[0, 0] += rank
    yield "allocation", failing(batches=mine, allocation="owl" if rank else "uniform")
    yield "weights", failing(batches=mine, model=model)
    tensors = [torch.full((2,), rank + 1.0), torch.tensor(rank + 1)]
    all_reduce_sum(tensors, Ranks.of(True))
    yield "sum", tensors
    # After all that the group is as good as new.
    yield "again", pruned(mine, distributed=True)


def main(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    try:
        results.update(scenarios(rank))
    except BaseException:
        results["crash"] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tests = str(Path(__file__).parents[1])
    code = (
        "import sys; sys.path.insert(0, {!r}); "
        "from prune.test_distributed import main; main({}, {!r})"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code.format(tests, rank, str(folder))])
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.wait(120) == 0
    finally:
        for process in processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for answers in found:
        assert "crash" not in answers, answers["crash"]
    return found


@pytest.mark.parametrize(
    ("scenario", "method", "ranks"),
    [
        ("sparsegpt", "sparsegpt", (0, 1)),
        ("group", "wanda", (0, 1)),
        ("one idle", "sparsegpt", (0,)),
        ("taylor", "taylor", (0, 1)),
        ("owl", "wanda", (0, 1)),
        ("taylor, one idle", "taylor", (1,)),
        ("again", "sparsegpt", (0, 1)),
    ],
)
def test_masks_are_those_of_one_process_with_all_batches(results, scenario, method, ranks):
    first, second = (answers[scenario] for answers in results)
    options = {"loss": loss} if method == "taylor" else {}
    if scenario == "owl":
        options["allocation"] = "owl"
    alone = pruned([batch for rank in ranks for batch in batches_of(rank)], method, **options)
    assert first["layers"] == second["layers"] == alone["layers"]
    assert first["masks"].keys() == second["masks"].keys() == alone["masks"].keys()
    assert ("experts.1" in alone["masks"]) == (1 in ranks)
    for name, mask in alone["masks"].items():
        assert torch.equal(first["masks"][name], mask), name
        assert torch.equal(second["masks"][name], mask), name
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-4)


def test_half_of_the_data_would_not_do(results):
    """What the test above shows is not that any data gives these masks."""
    masks, alone = results[0]["sparsegpt"]["masks"], pruned(batches_of(0))["masks"]
    assert not all(torch.equal(masks[name], mask) for name, mask in alone.items())


@pytest.mark.parametrize(
    ("scenario", "method"), [("uncalibrated", "magnitude"), ("random", "random")]
)
def test_without_calibration_nothing_is_added_up(results, scenario, method):
    alone = pruned(None, method)
    for answers in results:
        for name, mask in alone["masks"].items():
            assert torch.equal(answers[scenario]["masks"][name], mask)


@pytest.mark.parametrize(
    ("scenario", "kind", "message", "failed"),
    [
        ("nan", "ValueError", "inputs of layer 'blocks.0.0' hold NaN or infinity", 1),
        ("nan on 0", "ValueError", "inputs of layer 'blocks.0.0' hold NaN or infinity", 0),
        ("no batch", "ValueError", "expected an iterable of batches, got one tensor", 1),
        ("forward", "RuntimeError", "MemoryError: out of memory", 1),
    ],
)
def test_what_fails_on_one_rank_fails_on_both(results, scenario, kind, message, failed):
    other = results[1 - failed][scenario]
    assert other[0] == kind
    assert other[1].startswith(f"rank {failed} of 2 failed: ")
    assert message in other[1]
    if kind == "ValueError":
        assert message in results[failed][scenario][1]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("both idle", "no rank has any batches; give at least one of them some"),
        ("both idle, taylor", "no rank has any batches; give at least one of them some"),
        ("settings", "the call of rank 1 differs from that of rank 0"),
        ("allocation", "the call of rank 1 differs from that of rank 0"),
        ("weights", "a weight of rank 1 differs from that of rank 0; every rank must call"),
    ],
)
def test_ranks_that_cannot_agree_are_told(results, scenario, message):
    for answers in results:
        kind, text = answers[scenario]
        assert kind == "ValueError"
        assert message in text
    if scenario == "weights":
        assert "(experts.1: " in text
    if scenario == "settings":
        assert "dampening=0.02" in text


def test_sums(results):
    for answers in results:
        floats, integer = answers["sum"]
        assert floats.tolist() == [3.0, 3.0]
        assert integer == 3


def test_alone():
    tensor = torch.ones(2)
    all_reduce_sum([tensor], None)
    all_reduce_sum([tensor], ALONE)
    assert tensor.tolist() == [1.0, 1.0]
    assert ALONE.exchange(3) == [3]
    assert pruned(batches_of(0), distributed=None)["masks"].keys() >= {"head"}


def test_checksums_tell_tensors_apart():
    weight = torch.randn(8, 8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.bool):
        one = weight.to(dtype)
        other = one.clone()
        assert checksum(one) == checksum(other)
        other[3, 3] = 1 - other[3, 3].float()
        assert checksum(one) != checksum(other)


def test_no_process_group_is_refused():
    with pytest.raises(ValueError, match=r"no process group is initialised; .*torchrun"):
        pruned(batches_of(0), distributed=True)
