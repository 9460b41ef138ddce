"""`pytest bench/test_tensorrt.py --benchmark-only`: TensorRT, dense and sparse, and our plugin.

Each case is a pruned network in float16; every engine runs the same weights as a CUDA graph, in
turns. Where there is no TensorRT, no GPU or no plugin, the reason is reported.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import sparsekit as sk
from bench import engines
from bench.baselines import Unavailable
from bench.networks import MODELS, Model, folded
from bench.timing import Rivals, rounds_within, settle, timed_call

_MODELS = {model.name: model for model in MODELS}
# From here on a half-precision engine computes something else.
_LEAST_COSINE = {True: 0.99, False: 0.999}


def _pruned(model: Model, pattern: str, batch: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    inputs = tuple(x.cuda() for x in model.inputs(batch))
    network = model.build()
    network = folded(network, model.inputs(1)) if model.convolutional else deepcopy(network)
    network = network.half().cuda()
    inputs = tuple(x.half() if x.is_floating_point() else x for x in inputs)
    sk.prune(network, pattern, targets=model.targets, progress=False)
    # What is faster in torch is not what is faster in TensorRT: all pruned layers are compared.
    sk.convert(network, example_inputs=inputs, gate="always", progress=False)
    return network, inputs


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("pattern", ["2:4", "bsr32x32@0.75"])
@pytest.mark.parametrize("name", ["resnet18", "minilm", "vit-b16"])
def test_tensorrt(
    name: str,
    pattern: str,
    batch: int,
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    try:
        tensorrt = engines.import_tensorrt()
        engines.load_plugin(tensorrt)
    except Unavailable as reason:
        pytest.skip(str(reason))
    network, inputs = _pruned(_MODELS[name], pattern, batch)
    with torch.no_grad():
        expected = network(*inputs).float().flatten()
    runs: dict[str, engines.Engine] = {}
    failed: dict[str, str] = {}
    for variant in engines.VARIANTS:
        if variant.sparse_weights and pattern != "2:4":
            continue
        try:
            plan = engines.build(tensorrt, network, inputs, variant, tmp_path)
            run = engines.Engine(tensorrt, plan, inputs)
        except RuntimeError as error:
            if variant in (engines.DENSE, engines.OURS):
                raise
            failed[variant.name] = str(error)
            continue
        got = run()[0].float().flatten()
        cosine = float(torch.nn.functional.cosine_similarity(got, expected, dim=0))
        assert cosine >= _LEAST_COSINE["int8" in variant.name], (variant.name, cosine)
        runs[variant.name] = run
    ours = runs.pop(engines.OURS.name)
    rivals = Rivals(runs)
    once = timed_call(ours) + sum(timed_call(run) for run in runs.values())

    def before_each_round() -> None:
        rivals.run_round()
        settle(ours)

    benchmark.pedantic(
        ours,
        setup=before_each_round,
        rounds=rounds_within(request.config.option.seconds, 5 * once, at_least=11),
    )
    assert benchmark.stats is not None, "run it with --benchmark-only"
    rivals.seconds["ours"] = list(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name(),
        tensorrt=tensorrt.__version__,
        model=name,
        pattern=pattern,
        batch=batch,
        ms={each: seconds * 1e3 for each, seconds in rivals.medians().items()},
        over={each: rivals.speedup("ours", each) for each in runs},
        failed=failed,
    )
