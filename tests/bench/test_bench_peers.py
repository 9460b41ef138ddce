import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import peer_worker, peers
from bench.baselines import BASELINES, Baseline, Unavailable
from bench.peers import SCIPY, Worker, python_of, start_workers, worker_baseline
from bench.timing import Rivals, SelfTimed, timed_call

ROOT = Path(__file__).parents[2]

# An engine without an engine: reads the layer from the worker's request and multiplies.
FAKE = """
import json, os, sys
import numpy
from bench import peer_worker
numpy.set_printoptions(threshold=3)
def load(request):
    print("an engine's own words")
    if request["threads"] == 99:
        raise MemoryError("no room\\nfor this")
    if request["threads"] == 98:
        os._exit(3)
    weight, bias = numpy.load(request["weight"]), numpy.load(request["bias"])
    (x,) = map(numpy.load, request["inputs"])
    return (lambda: x @ weight.T + bias + (request["threads"] == 97)), "fake"
os_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
peer_worker.serve(load, sys.stdin, os_out)
"""


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("xnnpack", [sys.executable, "-c", FAKE]) as started:
        yield started


def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(48, 32), torch.randn(48), torch.randn(5, 32)


def test_a_worker_computes_and_times_itself(worker: Worker) -> None:
    weight, bias, x = layer()
    call = worker_baseline(worker).build(weight, bias, x)
    torch.testing.assert_close(call(), x @ weight.t() + bias)
    assert isinstance(call, SelfTimed)
    seconds = call.turn()
    assert seconds
    assert all(second > 0 for second in seconds)
    # Another layer takes its place.
    worker_baseline(worker).build(weight[:16], bias[:16], x)
    assert timed_call(call) > 0


def test_a_worker_takes_turns_with_others(worker: Worker) -> None:
    weight, bias, x = layer()
    call = worker_baseline(worker).build(weight, bias, x)
    rivals = Rivals({"here": lambda: None, "there": call}).run(2)
    assert [len(seconds) for seconds in rivals.seconds.values()] == [2, 2]


def test_a_refusal_is_a_reason(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(Unavailable, match=r"^xnnpack: MemoryError: no room$"):
        worker_baseline(worker).build(*layer())


def test_the_end_of_a_worker_is_a_reason(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 98)
    with pytest.raises(Unavailable, match="its process ended: an engine's own words"):
        worker_baseline(worker).build(*layer())
    # It stays gone.
    with pytest.raises(Unavailable, match="its process ended"):
        worker.ask(do="run")


def test_a_wrong_result_is_a_reason(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    with pytest.raises(Unavailable, match="differs from dense by 1"):
        worker_baseline(worker).build(*layer())


@pytest.mark.parametrize("engine", peers.WORKERS)
def test_a_worker_without_bfloat16_says_so(engine: str, worker: Worker) -> None:
    worker.engine = engine
    weight, bias, x = (tensor.bfloat16() for tensor in layer())
    with pytest.raises(Unavailable, match="no bfloat16"):
        worker_baseline(worker).build(weight, bias, x)


def serve(*requests: Mapping[str, Any], load: Any = None) -> list[dict[str, Any]]:
    answers = io.StringIO()
    peer_worker.serve(load, [json.dumps(request) for request in requests], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_the_protocol(tmp_path: Path) -> None:
    output = tmp_path / "y.npy"
    answers = serve(
        {"do": "run"},
        {"do": "load", "output": str(output)},
        {"do": "run"},
        {"do": "quit"},
        {"do": "run"},
        load=lambda request: (lambda: np.arange(3), "words"),
    )
    assert answers[0] == {"error": "nothing is loaded"}
    assert answers[1] == {"about": "words"}
    assert len(answers[2]["seconds"]) == 3
    assert len(answers) == 3
    assert np.load(output).tolist() == [0, 1, 2]


def test_a_failed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    def load(request: Mapping[str, Any]) -> tuple[Any, str]:
        if request.get("bad"):
            raise ValueError("bad")
        return lambda: np.arange(3), ""

    first = {"do": "load", "output": str(tmp_path / "y.npy")}
    answers = serve(first, {**first, "bad": True}, {"do": "run"}, load=load)
    assert answers[1:] == [{"error": "ValueError: bad"}, {"error": "nothing is loaded"}]


def test_where_an_environment_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARSEKIT_DEEPSPARSE", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    pythons = [tmp_path / name for name in ("flag", "variable", "peers/deepsparse/bin/python")]
    for python in pythons:
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
    assert python_of("deepsparse") == pythons[2]
    monkeypatch.setenv("SPARSEKIT_DEEPSPARSE", str(pythons[1]))
    assert python_of("deepsparse") == pythons[1]
    assert python_of("deepsparse", str(pythons[0])) == pythons[0]


def test_no_worker_starts_where_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Worker, "start", start)
    missing = r"no Python at /nowhere; run `make peers-env`(.|\n)*ai-edge-litert(.|\n)*--xnnpack"
    with pytest.raises(Unavailable, match=missing):
        start_workers(
            ["deepsparse", "xnnpack"], {"deepsparse": sys.executable, "xnnpack": "/nowhere"}
        )


def test_what_make_installs_is_what_the_message_says() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("'", '"')
    for engine, packages in peers._PACKAGES.items():
        assert f"$(VENV)/peers/{engine}/.done: PACKAGES = {packages}\n" in makefile


@pytest.mark.parametrize("baseline", SCIPY, ids=lambda b: b.name)
def test_scipy_computes_the_same_product(baseline: Baseline) -> None:
    weight = torch.randint(-3, 4, (48, 32)).float()
    weight[:16, 16:] = 0
    bias, x = torch.randint(-3, 4, (48,)).float(), torch.randint(-3, 4, (5, 32)).float()
    assert torch.equal(baseline.build(weight, bias, x)(), x @ weight.t() + bias)
    with pytest.raises(Unavailable, match="no bfloat16"):
        baseline.build(weight.bfloat16(), bias, x)


def test_scipy_blocks_must_divide() -> None:
    with pytest.raises(Unavailable, match="do not divide"):
        SCIPY[1].build(torch.ones(20, 16), torch.zeros(20), torch.ones(2, 16))


def test_engines_that_cannot_be_limited_are_known() -> None:
    unlimited = {baseline.name for baseline in BASELINES if not baseline.every_isa}
    assert unlimited == {"onnxruntime"}


@pytest.mark.parametrize("engine", peers.WORKERS)
def test_real_engines_where_they_are(engine: str) -> None:
    try:
        python = python_of(engine)
    except Unavailable as reason:
        pytest.skip(str(reason).splitlines()[0])
    weight, bias, x = layer()
    with Worker.start(engine, python) as worker:
        call = worker_baseline(worker).build(weight, bias, x)
        assert timed_call(call) > 0
        torch.testing.assert_close(call(), x @ weight.t() + bias, rtol=1e-4, atol=1e-4)


def test_the_worker_script_needs_no_torch() -> None:
    """Whoever imports it in an engine's environment finds neither torch nor this package."""
    blocked = "import sys; sys.modules['torch'] = sys.modules['sparsekit'] = None"
    command = [sys.executable, "-c", f"{blocked}; import bench.peer_worker"]
    subprocess.run(command, cwd=ROOT, check=True)
