"""Options of the benchmark run; see `make bench`."""

from __future__ import annotations

import pytest
import torch

from bench.case import chosen_cases, kernel_cases
from bench.shapes import SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsekit")
    group.addoption("--all-shapes", action="store_true", help="every shape, not the quick ones")
    group.addoption("--all-kernels", action="store_true", help="also each kernel, forced")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads to use")
    group.addoption("--seconds", type=float, default=1.0, help="time budget of one case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.option
        shapes = SHAPES if option.all_shapes else tuple(shape for shape in SHAPES if shape.quick)
        cases = list(chosen_cases(shapes))
        if option.all_kernels:
            cases += kernel_cases()
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
