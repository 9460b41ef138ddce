"""The guides' code runs as it is printed, and touches no more places than they say."""

import platform
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from sparsekit import patterns, prune
from sparsekit.prune import methods, scores

DOCS = Path(__file__).parent.parent / "docs"


def code(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.5"])
def test_the_guide_to_a_pruning_method(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    score, line = code("adding_a_pruning_method.md")
    names = {**vars(scores), "torch": torch}
    exec("from __future__ import annotations\n" + score, names)
    written = SimpleNamespace(relative_importance=names["relative_importance"])
    (entry,) = eval("{" + line + "}", {"scores": written, "Method": methods.Method}).items()
    monkeypatch.setitem(methods.METHODS, *entry)

    model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    model[0].weight.data[3] = 0
    report = prune(model, pattern, "ria", calibration=[torch.randn(8, 32)], progress=False)
    mask = report.masks["0"]
    assert patterns.parse_pattern(pattern).fits(mask)
    assert not bool((model[0].weight != 0)[~mask].any())


def test_the_permutation_of_a_basic_block() -> None:
    (example,) = [block for block in code("getting_started.md") if "permute_channels" in block]
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).double().eval()
    for name in ("layer2", "layer3", "layer4"):
        setattr(model, name, model.layer2[:0])  # the first stage alone: it shall be quick
    model.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    before = model.layer1[0].conv2.weight.detach().clone()
    exec(example, {"model": model})
    torch.testing.assert_close(model(x), expected)
    assert prune.kept_share(model.layer1[0].conv2.weight, "2:4") > prune.kept_share(before, "2:4")


def test_the_guide_to_a_pattern() -> None:
    cls, spelling = code("adding_a_pattern.md")
    names = dict(vars(patterns))
    exec("from __future__ import annotations\n" + cls, names)
    body = "\n".join("    " + line for line in spelling.splitlines())
    exec(f"def parse(pattern):\n{body}", names)

    pattern = names["parse"]("balanced4x8@0.75")
    assert str(pattern) == "balanced4x8@0.75"
    mask = pattern.mask(torch.rand(18, 64))
    blocks = pattern.occupancy(mask)
    assert blocks.sum(1).tolist() == [2] * 5
    assert pattern.fits(mask)
    mask[4] = True
    problem = pattern.first_violation(mask)
    assert problem is not None
    assert problem.startswith("in block row 1: 8 of 8 blocks of 4x8 are kept, at most 2")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an AVX2 kernel")
def test_the_guide_to_a_kernel_compiles(tmp_path: Path) -> None:
    (source,) = code("adding_a_kernel.md", "cpp")
    file = tmp_path / "matmul_bsr_avx2.cc"
    file.write_text(source)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    include = [f"-I{DOCS.parent / 'csrc'}", f"-I{DOCS.parent / 'csrc' / 'include'}"]
    subprocess.run(["c++", *flags, *include, "-fsyntax-only", str(file)], check=True)
