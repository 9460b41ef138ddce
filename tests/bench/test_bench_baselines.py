import pytest
import torch

from bench.baselines import BASELINES, Baseline, Unavailable

BY_NAME = {baseline.name: baseline for baseline in BASELINES}


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_every_baseline_computes_the_same_product(baseline: Baseline, m: int) -> None:
    # Small integers: exact in float32 whatever the order of summation.
    weight = torch.randint(-3, 4, (48, 32)).float()
    weight[:16, 16:] = 0
    bias = torch.randint(-3, 4, (48,)).float()
    x = torch.randint(-3, 4, (m, 32)).float()
    y = baseline.build(weight, bias, x)()
    assert torch.equal(y, x @ weight.t() + bias)


@pytest.mark.parametrize("name", ["torch", "oneDNN"])
def test_dense_baselines_run_bfloat16(name: str) -> None:
    weight = torch.randint(-2, 3, (16, 16)).bfloat16()
    x = torch.randint(-2, 3, (3, 16)).bfloat16()
    bias = torch.zeros(16).bfloat16()
    y = BY_NAME[name].build(weight, bias, x)()
    assert torch.equal(y, (x.float() @ weight.float().t()).bfloat16())


@pytest.mark.parametrize("name", ["onnxruntime", "torch-csr", "torch-bsr16x16"])
def test_a_path_without_bfloat16_says_so(name: str) -> None:
    weight = torch.ones(16, 16).bfloat16()
    with pytest.raises(Unavailable, match="no bfloat16"):
        BY_NAME[name].build(weight, torch.zeros(16).bfloat16(), torch.ones(2, 16).bfloat16())


def test_blocks_that_do_not_divide_the_weight_are_reported() -> None:
    weight = torch.ones(20, 16)
    with pytest.raises(Unavailable, match="20"):
        BY_NAME["torch-bsr16x16"].build(weight, torch.zeros(20), torch.ones(2, 16))
