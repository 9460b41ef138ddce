"""GPUs: what can be decided without one; streams, graphs, modules and mistakes on one."""

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import (
    ACTIVATIONS,
    CASES,
    DTYPES,
    GPU,
    KERNELS,
    MAIN,
    PATTERNS,
    each_format,
    pack_for,
    problem_on_gpu,
)
from torch import Tensor, nn

import sparsekit as sk
from sparsekit import _native, _ops, gate
from sparsekit._native import KernelInfo
from sparsekit.dispatch import doctor
from sparsekit.testing import assert_matmul_exact, make_problem, reference
from sparsekit.workload import LinearWorkload

# --- without a GPU ----------------------------------------------------------------------------


def test_the_header_is_the_first_bytes_of_the_packed_weight() -> None:
    packed = sk.pack(torch.eye(64), "2:4")
    assert len(packed.meta.header) == 13
    header = torch.tensor(packed.meta.header, dtype=torch.int64)
    assert torch.equal(header.view(torch.uint8), packed.data[:104])
    assert copy.deepcopy(packed).meta == packed.meta
    assert packed.to(torch.bfloat16).meta.header != packed.meta.header
    with pytest.raises(ValueError, match="not a buffer written by sk_pack"):
        _native.packed_header(torch.zeros(256, dtype=torch.uint8))


def test_a_call_is_refused_by_its_header_before_a_gpu_is_asked_for() -> None:
    packed = sk.pack(torch.eye(64, dtype=torch.bfloat16), "2:4")
    header = list(packed.meta.header)
    arguments = (4, 64, 64, 1, 128, 64, 128, packed.nbytes, 4096, 64, 0, 0, 0, False, 0, 1, None)
    with pytest.raises(ValueError, match="the header is damaged"):
        _native._C.matmul(*arguments, (0, 0, [*header[:5], 1, *header[6:]], 128, 1))
    with pytest.raises(TypeError):
        _native._C.matmul(*arguments, (0, 0, header[:12], 128, 1))
    unaligned = (*arguments[:4], 136, *arguments[5:])
    with pytest.raises(ValueError, match="copy x to an aligned buffer"):
        _native._C.matmul(*unaligned, (0, 0, header, 128, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 8, 13, 64])
def test_rows_are_copied_only_where_they_are_not_aligned(k: int, dtype: torch.dtype) -> None:
    def check(x: Tensor, copied: bool) -> None:
        rows = _ops._aligned_rows(x)
        assert torch.equal(rows, x.reshape(-1, k))
        assert rows.data_ptr() % 16 == 0
        assert rows.shape[0] <= 1 or rows.stride(0) * 2 % 16 == 0
        assert rows.stride(1) == 1
        assert (rows.data_ptr() != x.data_ptr()) == copied

    whole = torch.arange(72 * 72, dtype=torch.float32).to(dtype).view(72, 72)
    check(whole[:, :k], False)  # rows 144 bytes apart
    check(whole[:, 8 : 8 + k], False)
    check(whole[:, 1 : 1 + k], True)
    check(whole[:1, 1 : 1 + k], True)
    check(whole[:1, 8 : 8 + k], False)
    check(whole[:, :k].contiguous(), k % 8 != 0)
    check(whole[:1, :k].contiguous(), False)
    check(whole[:k].t(), True)
    check(whole[:1, :k].expand(9, k), True)
    check(whole[:0, :k], False)


def test_a_call_on_a_gpu_gets_aligned_rows_the_header_and_the_streams_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU's function with a CPU's kernel in its place."""
    problem = make_problem(6, 33, 70, "2:4", torch.bfloat16, integers=True)
    packed = sk.pack(problem.weight, "2:4")
    workspace = torch.zeros(1)
    seen: list[Tensor] = []
    matmul = _native.matmul

    def fake(x: Tensor, *rest: Any, gpu: _native.GpuCall, **named: Any) -> None:
        assert gpu == (packed.meta.header, 7, workspace)
        seen.append(x)
        matmul(x, *rest, **named)

    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(_ops, "_workspace", lambda device, stream: workspace)
    monkeypatch.setattr(_native, "matmul", fake)
    x = problem.x.view(2, 3, 70)
    residual = problem.residual.view(2, 3, 33)
    y = _ops._linear_cuda(
        x, packed.data, 33, problem.bias, "relu", residual, None, packed.meta.header
    )
    assert y.shape == (2, 3, 33)
    arguments = (problem.bias, "relu", problem.residual)
    assert_matmul_exact(y.view(6, 33), problem.x, problem.weight, *arguments)
    assert seen[0].stride(0) == 72
    with pytest.raises(ValueError, match="needs its header; pass header="):
        _ops._linear_cuda(x, packed.data, 33)
    dense = _ops._to_dense_cuda(packed.data, 33, 70, torch.bfloat16, packed.meta.header)
    assert torch.equal(dense, problem.weight)
    assert dense.is_contiguous()


def test_a_stream_has_one_workspace_and_each_captured_call_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing = False
    threads: list[int] = []

    def make(device: torch.device, wait: bool = False) -> Tensor:
        threads.append(threading.get_ident())
        assert wait != capturing
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_ops, "_new_workspace", make)
    monkeypatch.setattr(_ops, "_workspaces", {})
    first = _ops._workspace(GPU, 1)
    assert _ops._workspace(GPU, 1) is first
    assert _ops._workspace(GPU, 2) is not first
    assert _ops._workspace(torch.device("cuda:1"), 1) is not first
    assert threading.get_ident() not in threads
    capturing = True
    assert _ops._workspace(GPU, 1) is not _ops._workspace(GPU, 1)
    assert threads[-2:] == [threading.get_ident()] * 2
    capturing = False
    assert _ops._workspace(GPU, 1) is first


def test_packing_for_a_gpu_needs_none() -> None:
    weight = make_problem(1, 33, 70, "2:4", torch.bfloat16).weight
    if not KERNELS:
        with pytest.raises(NotImplementedError, match="this build has no CUDA kernels; rebuild"):
            sk.pack(weight, "2:4", target="cuda")
        return
    for kernel, pattern in CASES:
        dtype = DTYPES[kernel.dtype]
        weight = make_problem(1, 33, 70, pattern, dtype).weight
        packed = sk.pack(weight, pattern, target="cuda")
        assert packed.device.type == "cpu"
        assert packed.format in {k.format for k in KERNELS if k.dtype == kernel.dtype}
        assert torch.equal(packed.to_dense(), weight)
        assert copy.deepcopy(packed).format == packed.format
        if packed.format not in {k.format for k in _native.kernels() if k.device == "cpu"}:
            with pytest.raises(
                NotImplementedError, match="format is not for CPUs; pack the weight"
            ):
                sk.linear(torch.zeros(1, 70, dtype=dtype), packed)


@pytest.mark.skipif(not KERNELS, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_kernels_for_gpus_take_every_pattern(dtype: torch.dtype) -> None:
    for pattern in (*PATTERNS, "1:2", "15:16", "bsr128x1@0.5", "bsr3x127@0.5"):
        weight = make_problem(1, 33, 70, pattern, dtype).weight
        packed = sk.pack(weight, pattern, target="cuda")
        assert torch.equal(packed.to_dense(), weight)
        formats = {kernel.format for kernel in KERNELS if DTYPES[kernel.dtype] == dtype}
        assert packed.format in formats


@pytest.mark.skipif(not KERNELS, reason="this build has no CUDA kernels")
def test_tensor_cores_come_first() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = make_problem(1, 64, 64, "2:4", dtype).weight
        assert sk.pack(weight, "2:4", target="cuda").format == "nm_mma_sp"
        assert sk.pack(weight, "bsr16x16@0.5", target="cuda").format == "bsr_mma"
        assert sk.pack(weight, "1:4", target="cuda").format == "nm"


def test_the_reason_for_no_gpu_is_told_everywhere() -> None:
    reason = _native.cuda_unavailable_reason()
    if not reason:  # then the tests on the GPU apply
        assert _native.cuda_device_count() > 0
        return
    assert _native.cuda_device_count() == 0
    assert f"none: {reason}" in doctor()
    with pytest.raises(NotImplementedError, match="CUDA: "):
        _native.cuda_info(0)
    for kernel in sk.kernels():
        if kernel.device == "cuda":
            assert (kernel.available, kernel.reason) == (False, reason)
    for kernel, pattern in CASES:
        answer = sk.explain(pattern, m=4, n=64, k=64, dtype=DTYPES[kernel.dtype], device="cuda")
        assert answer.chosen is None
        assert {c.kernel: c.reason for c in answer.candidates}[kernel.name] == reason
    with pytest.raises(NotImplementedError, match="CUDA: "):
        sk.explain("2:4", m=1, n=4, k=4, device="cuda:0")


def test_explain_wants_a_cpu_or_a_gpu() -> None:
    packed = sk.pack(torch.eye(8), "2:4")
    with pytest.raises(ValueError, match="expected a device of type cpu or cuda, got meta"):
        sk.explain(packed, m=1, device="meta")
    answer = sk.explain(packed, m=1, device="cuda" if not _native.cuda_device_count() else GPU)
    reasons = {c.kernel: c.reason for c in answer.candidates}
    assert reasons["matmul_nm_f32_scalar"] == "runs on the CPU, the problem is on a GPU"
    assert "on cuda" in str(answer)
    assert "matmul_nm_f32_scalar" not in str(answer)


def test_verdicts_name_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"name": "Some GPU", "sm_count": 3, "driver_version": 13000}
    monkeypatch.setattr(_native, "cuda_info", lambda index: facts)
    text = gate.machine_fingerprint(GPU)
    assert text.startswith("Some GPU, 3 SMs, driver for CUDA 13.0, ")
    assert str(_native.cpu_info()["model"]).strip() not in text


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@each_format
def test_any_strides_and_alignment(kernel: KernelInfo, pattern: str) -> None:
    problem = problem_on_gpu(kernel, pattern, 12, 33, 70)
    packed = sk.pack(problem.weight, pattern, problem.mask)
    arguments = (problem.weight, problem.bias, "relu", problem.residual)
    x, residual = problem.x, problem.residual

    def inside(tensor: Tensor, width: int, first: int) -> Tensor:
        wide = torch.full((len(tensor), width), float("nan"), dtype=x.dtype, device=GPU)
        wide[:, first : first + tensor.shape[1]] = tensor
        return wide[:, first : first + tensor.shape[1]]

    for view in (
        inside(x, 91, 3),
        inside(x, 96, 8),
        inside(x, 96, 1),
        x.t().contiguous().t(),
        x.view(3, 4, 70).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        y = sk.linear(
            view,
            packed,
            problem.bias,
            "relu",
            inside(residual, 50, 7).view(*view.shape[:-1], 33)
            if view.dim() == 2
            else residual.view(*view.shape[:-1], 33),
        )
        assert_matmul_exact(y.reshape(12, 33), x, *arguments)
    row = x[:1].expand(12, 70)
    assert_matmul_exact(sk.linear(row, packed), row, problem.weight)
    empty = sk.linear(x[:0].view(0, 5, 70), packed, problem.bias)
    assert empty.shape == (0, 5, 33)
    assert empty.device == GPU


@pytest.mark.gpu
@each_format
def test_streams_do_not_disturb_each_other(kernel: KernelInfo, pattern: str) -> None:
    n, k = 64, 8192  # sums that several blocks share, through the workspace
    problems = [problem_on_gpu(kernel, pattern, m, n, k, seed=m) for m in (1, 17)]
    packed = [pack_for(kernel, pattern, problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for i, (problem, (data, header)) in enumerate(zip(problems, packed, strict=True)):
            with torch.cuda.stream(streams[i]):
                y = _ops.linear(problem.x, data, n, None, None, None, None, header)
                results[i].append(y)
    torch.cuda.synchronize()
    for problem, ys in zip(problems, results, strict=True):
        for y in ys:
            assert_matmul_exact(y, problem.x, problem.weight)


def capture(call: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


@pytest.mark.gpu
@each_format
def test_a_captured_graph_replays_with_new_inputs(kernel: KernelInfo, pattern: str) -> None:
    for m, n, k in ((1, 64, 8192), (40, 65, 71)):
        problem = problem_on_gpu(kernel, pattern, m, n, k)
        packed = sk.pack(problem.weight, pattern, problem.mask)
        x = problem.x.clone()
        graph, y = capture(lambda x=x, p=packed, b=problem.bias: sk.linear(x, p, b, "relu"))
        for seed in range(4):
            other = problem_on_gpu(kernel, pattern, m, n, k, seed=seed)
            x.copy_(other.x)
            graph.replay()
            assert_matmul_exact(y, other.x, problem.weight, problem.bias, "relu")


@pytest.mark.gpu
@each_format
def test_graphs_replay_at_the_same_time(kernel: KernelInfo, pattern: str) -> None:
    problems = [problem_on_gpu(kernel, pattern, 1, 64, 8192, seed=seed) for seed in range(2)]
    packed = [sk.pack(p.weight, pattern, p.mask) for p in problems]
    captured = [
        capture(lambda x=problem.x, p=p: sk.linear(x, p))
        for problem, p in zip(problems, packed, strict=True)
    ]
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, y), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                y.zero_()
                for _ in range(10):
                    graph.replay()
        torch.cuda.synchronize()
        for problem, (_, y) in zip(problems, captured, strict=True):
            assert_matmul_exact(y, problem.x, problem.weight)


@pytest.mark.gpu
@each_format
def test_weights_move_between_cpu_and_gpu(kernel: KernelInfo, pattern: str) -> None:
    problem = make_problem(3, 33, 70, pattern, DTYPES[kernel.dtype], integers=True)
    here = sk.pack(problem.weight, pattern, problem.mask)
    there = here.to("cuda")
    assert there.device == GPU
    assert there.format in {k.format for k in KERNELS}
    assert torch.equal(there.to_dense().cpu(), problem.weight)
    back = there.to("cpu")
    assert back.meta == here.meta
    assert torch.equal(back.data, here.data)
    assert there.to(GPU) is there
    made_there = sk.pack(problem.weight.to(GPU), pattern, problem.mask.to(GPU))
    assert made_there.meta == there.meta
    assert torch.equal(made_there.data, there.data)
    for copied in (copy.deepcopy(there), saved_and_loaded(there)):
        assert copied.meta == there.meta
        assert torch.equal(copied.data, there.data)
    dense = torch.ops.sparsekit.to_dense(there.data, 33, 70, there.dtype, there.meta.header)
    assert torch.equal(dense.cpu(), problem.weight)
    both = there.to("cpu", torch.float32)
    assert (both.dtype, both.device.type) == (torch.float32, "cpu")
    wider = there.to(torch.float32)
    assert (wider.dtype, wider.device) == (torch.float32, GPU)
    assert torch.equal(wider.to_dense().cpu(), problem.weight.float())


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_format
def test_gradients_are_those_of_the_dense_layer(
    kernel: KernelInfo, pattern: str, activation: str | None
) -> None:
    problem = problem_on_gpu(kernel, pattern, 6, 33, 70, integers=False)
    packed = sk.pack(problem.weight, pattern, problem.mask)
    ours = [t.clone().requires_grad_() for t in (problem.x, problem.bias, problem.residual)]
    theirs = [t.double().requires_grad_() for t in (problem.x, problem.bias, problem.residual)]
    upstream = torch.randn(6, 33, device=GPU)
    x, bias, residual = ours
    sk.linear(x, packed, bias, activation, residual).backward(upstream.to(packed.dtype))
    x64, bias64, residual64 = theirs
    reference(x64, problem.weight, bias64, activation, residual64).backward(upstream.double())
    # The chain rounds the argument, the activation's derivative, their product and the sum.
    rtol = 8 * torch.finfo(packed.dtype).eps
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        error = (mine.grad.double() - right.grad).abs().max()
        assert bool(error <= rtol * right.grad.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@each_format
def test_compile_fullgraph(kernel: KernelInfo, pattern: str, mode: str) -> None:
    problem = problem_on_gpu(kernel, pattern, 5, 64, 72)
    layer = sk.nn.SparseLinear(sk.pack(problem.weight, pattern, problem.mask), problem.bias, "relu")
    compiled = torch.compile(lambda x: layer(x) + 1, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(4):
            x = problem_on_gpu(kernel, pattern, 5, 64, 72, seed=seed).x
            y = compiled(x).clone()
            assert_matmul_exact(y - 1, x, problem.weight, problem.bias, "relu")


@pytest.fixture
def model() -> nn.Sequential:
    """2:4 in its first layer, blocks in its second, dense in the third; float16 on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 8))
    sk.prune(model, {"0": "2:4", "2": "bsr32x32@0.75", "*": None}, method="magnitude")
    return model.half().eval()


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.gpu
def test_modules_move_and_convert(model: nn.Sequential) -> None:
    x = torch.randn(9, 256).half()
    model[0] = sk.nn.SparseLinear.from_dense(model[0], "2:4")
    here = forward(model, x)
    model.to("cuda")
    assert model[0].packed_data.device == GPU
    torch.testing.assert_close(forward(model, x.cuda()).cpu(), here, rtol=1e-2, atol=1e-2)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    assert torch.equal(forward(copied, x.cuda()), forward(model, x.cuda()))
    loaded = saved_and_loaded(model)
    assert torch.equal(forward(loaded, x.cuda()), forward(model, x.cuda()))
    model.to("cpu", torch.float32)
    assert model[0].meta.dtype == torch.float32
    torch.testing.assert_close(forward(model, x.float()).half(), here, rtol=1e-2, atol=1e-2)
    model.to("cuda")
    torch.testing.assert_close(
        forward(model, x.float().cuda()).cpu().half(), here, rtol=1e-2, atol=1e-2
    )
    assert model[0].packed.format == "nm"
    dense = model.to("cuda", torch.float16)[0].to_dense()
    assert dense.weight.device == GPU


@pytest.mark.gpu
def test_convert_measures_on_the_gpu(model: nn.Sequential, tmp_path: Path) -> None:
    model.to(GPU)
    x = torch.randn(64, 256, device=GPU).half()
    before = forward(model, x)
    cache = tmp_path / "verdicts.json"
    measured = copy.deepcopy(model)
    report = sk.convert(measured, example_inputs=x, cache=cache, progress=False)
    for row in report.rows[:2]:
        assert row.dense_ms is not None
        assert row.dense_ms > 0
        assert row.sparse_ms is not None
        assert row.sparse_ms > 0
        assert row.kernel in {kernel.name for kernel in KERNELS}
    (machine,) = json.loads(cache.read_text())["machines"]
    assert machine.startswith(torch.cuda.get_device_name(GPU))
    always = copy.deepcopy(model)
    report = sk.convert(always, example_inputs=x, gate="always", progress=False)
    assert report.sparse == ["0", "2"]
    for converted in (measured, always):
        torch.testing.assert_close(forward(converted, x), before, rtol=1e-2, atol=1e-2)
    sk.save(always, tmp_path / "model.safetensors")
    sk.load(model, tmp_path / "model.safetensors", progress=False)
    assert torch.equal(forward(model, x), forward(always, x))


@pytest.mark.gpu
def test_a_model_in_float32_converts(model: nn.Sequential) -> None:
    model.float().to(GPU)
    x = torch.randn(4, 256, device=GPU)
    before = forward(model, x)
    report = sk.convert(model, example_inputs=x, gate="always", progress=False)
    assert report.sparse == ["0", "2"]
    torch.testing.assert_close(forward(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@each_format
def test_measure_finds_no_fault(kernel: KernelInfo, pattern: str) -> None:
    problem = problem_on_gpu(kernel, pattern, 1, 256, 512, integers=False)
    packed = sk.pack(problem.weight, pattern, problem.mask)
    for m in (1, 64):
        verdict = gate.measure(LinearWorkload(packed, m, problem.bias, "gelu"))
        assert verdict.fault == ""
        assert verdict.dense_path == "torch"
        assert verdict.kernel in {k.name for k in KERNELS}
        assert min(verdict.dense_ms, verdict.sparse_ms) > 0


@pytest.mark.gpu
def test_doctor_and_explain_report_the_gpu() -> None:
    info = _native.cuda_info(0)
    properties = torch.cuda.get_device_properties(0)
    assert info["name"] == properties.name
    assert info["capability"] == (properties.major, properties.minor)
    assert info["sm_count"] == properties.multi_processor_count
    assert info["memory_bytes"] == properties.total_memory
    text = doctor()
    assert properties.name in text
    assert "on the GPU:" in text
    for kernel, pattern in MAIN:
        answer = sk.explain(pattern, m=64, n=256, k=256, dtype=DTYPES[kernel.dtype], device=GPU)
        assert answer.chosen is not None
        assert answer.chosen.kernel in text


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        yield patch
    _native.reload_environment()


@pytest.mark.gpu
@each_format
def test_mistakes_are_refused(
    kernel: KernelInfo, pattern: str, environment: pytest.MonkeyPatch
) -> None:
    problem = problem_on_gpu(kernel, pattern, 4, 64, 64)
    packed = sk.pack(problem.weight, pattern, problem.mask)
    header, x = packed.meta.header, problem.x
    with pytest.raises(ValueError, match="x is on cpu, the packed weight on cuda:0"):
        sk.linear(x.cpu(), packed)
    with pytest.raises(ValueError, match="bias is on cpu, the packed weight on cuda:0"):
        sk.linear(x, packed, problem.bias.cpu())
    with pytest.raises(ValueError, match=r"x has k=63, the packed weight has k=64"):
        sk.linear(x[:, :63], packed)
    with pytest.raises(ValueError, match=f"packed weight is {x.dtype}"):
        sk.linear(x.double(), packed)
    # The operator itself, where nothing has been checked before.
    with pytest.raises(ValueError, match="needs its header"):
        _ops.linear(x, packed.data, 64)
    with pytest.raises(ValueError, match="the header is damaged"):
        _ops.linear(x, packed.data, 64, None, None, None, None, [*header[:4], 1, *header[5:]])
    with pytest.raises(ValueError, match="expected bias in the memory of device 0, got host"):
        _ops.linear(x, packed.data, 64, problem.bias.cpu(), None, None, None, header)
    with pytest.raises(ValueError, match="packed weight"):
        _ops.linear(x, packed.data.cpu(), 64, None, None, None, None, header)
    with pytest.raises(ValueError, match="the buffer is cut at"):
        _ops.linear(x, packed.data[:-1], 64, None, None, None, None, header)
    with pytest.raises(ValueError, match="no kernel is called 'fastest'"):
        _ops.linear(x, packed.data, 64, None, None, None, "fastest", header)
    with pytest.raises(NotImplementedError, match="runs on the CPU, the problem is on a GPU"):
        _ops.linear(x, packed.data, 64, None, None, None, "matmul_nm_f32_scalar", header)
    call = _native.GpuCall(header, 0, _ops._workspace(GPU, 0))
    small = call._replace(workspace=torch.zeros(128, dtype=torch.uint8, device=GPU))
    with pytest.raises(ValueError, match="expected a workspace of"):
        _native.matmul(x, packed.data, torch.empty_like(x), gpu=small)
    with pytest.raises(ValueError, match="y overlaps x; pass a y of its own"):
        _native.matmul(x, packed.data, x, gpu=call)
    environment.setenv("SPARSEKIT_KERNEL", "matmul_nm_f32_scalar")
    _native.reload_environment()
    with pytest.raises(NotImplementedError, match="runs on the CPU, the problem is on a GPU"):
        sk.linear(x, packed)
    environment.setenv("SPARSEKIT_KERNEL", kernel.name)
    _native.reload_environment()
    with pytest.raises(NotImplementedError, match="runs on a GPU, the problem is on the CPU"):
        sk.linear(torch.zeros(1, 64), sk.pack(torch.eye(64), "2:4"))


@pytest.mark.gpu
def test_a_layout_for_cpus_on_a_gpu_is_refused_with_every_reason() -> None:
    canonical = sk.pack(torch.eye(64), "2:4").canonical()
    data = _native.pack(canonical, "nm_rows16")
    header = _native.packed_header(data)
    with pytest.raises(NotImplementedError, match="no kernel can run matmul 2:4 f32") as caught:
        _ops.linear(
            torch.zeros(1, 64, device=GPU), data.to(GPU), 64, None, None, None, None, header
        )
    for kernel in KERNELS:
        assert f"\n  {kernel.name}: reads format {kernel.format}" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_canonical_layout_runs_on_a_gpu(dtype: torch.dtype) -> None:
    problem = make_problem(5, 33, 70, "2:4", dtype, integers=True)
    packed = sk.pack(problem.weight, "2:4", problem.mask, target="reference").to("cuda")
    assert packed.format == "nm"
    y = sk.linear(problem.x.to(GPU), packed)
    assert_matmul_exact(y, problem.x.to(GPU), problem.weight.to(GPU))


@pytest.mark.gpu
@each_format
def test_every_gpu_of_the_machine_works(kernel: KernelInfo, pattern: str) -> None:
    problem = problem_on_gpu(kernel, pattern, 4, 64, 64)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        packed = sk.pack(problem.weight.to(device), pattern, problem.mask.to(device))
        y = sk.linear(problem.x.to(device), packed)
        assert y.device == device
        assert_matmul_exact(y.to(GPU), problem.x, problem.weight)
        assert torch.cuda.current_device() == 0
        if index:
            with pytest.raises(ValueError, match=f"x is on cuda:0, the packed weight on {device}"):
                sk.linear(problem.x, packed)
