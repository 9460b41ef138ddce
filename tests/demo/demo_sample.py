"""A report with every key, its figures all different, as `run` writes it."""

from __future__ import annotations

from typing import Any


def report() -> dict[str, Any]:
    """A new copy on every call."""

    def engine(name: str, ms: float, sparse: bool = False) -> dict[str, Any]:
        low, high = ms * 0.97, ms * 1.04
        times = {"ms": ms, "ms_low": low, "ms_high": high, "speedup": 543.2 / ms}
        return {"name": name, "sparse": sparse, **times}

    def layer(number: int, name: str, shape: list[int], ms: tuple[float, float]) -> dict[str, Any]:
        return {
            "name": f"bert.encoder.layer.{number}.{name}",
            "shape": shape,
            "pattern": "2:4",
            "kernel": "matmul_nm_f32_avx512",
            "activation": "gelu" if shape[0] > shape[1] else None,
            "dense_ms": ms[0],
            "sparse_ms": ms[1],
            "speedup": ms[0] / ms[1],
            "verdict": "sparse" if ms[1] < ms[0] else "dense",
            "reason": f"{ms[0] / ms[1]:.2f}x of dense (oneDNN)",
        }

    return {
        "quick": False,
        "settings": {
            "model": "all-MiniLM-L6-v2",
            "pattern": "2:4",
            "method": "sparsegpt",
            "dtype": "float32",
        },
        "quality": {
            "dense": {"recall_at_1": 0.541, "recall_at_10": 0.868, "cosine": 1.0},
            "pruned": {"recall_at_1": 0.532, "recall_at_10": 0.847, "cosine": 0.871},
            "recovered": {"recall_at_1": 0.539, "recall_at_10": 0.861, "cosine": 0.9435},
            "converted": {"recall_at_1": 0.538, "recall_at_10": 0.862, "cosine": 0.9415},
        },
        "latency": {
            "batch_32": {
                "batch": 32,
                "tokens": 128,
                "rounds": 9,
                "engines": [
                    engine("torch eager float32", 543.2),
                    engine("torch.compile, frozen float32", 283.4),
                    engine("ONNX Runtime float32", 280.6),
                    engine("sparsekit eager float32", 231.7, sparse=True),
                    engine("sparsekit torch.compile, frozen float32", 201.3, sparse=True),
                ],
                "fastest_dense": "ONNX Runtime float32",
                "fastest_sparse": "sparsekit torch.compile, frozen float32",
                "sparse_vs_eager": 2.698,
                "sparse_vs_fastest_dense": 1.394,
            },
            "batch_1": {
                "batch": 1,
                "tokens": 127,
                "rounds": 30,
                "engines": [
                    engine("torch eager float32", 18.63),
                    {"name": "ONNX Runtime float32", "sparse": False, "skipped": "not installed"},
                    engine("sparsekit eager float32", 19.21, sparse=True),
                ],
                "fastest_dense": "torch eager float32",
                "fastest_sparse": "sparsekit eager float32",
                "sparse_vs_eager": 0.969,
                "sparse_vs_fastest_dense": 0.977,
            },
        },
        "files": {
            "dense_bytes": 90_261_000,
            "sparse_bytes": 70_343_000,
            "ratio": 1.283,
            "dense_linear_bytes": 42_500_000,
            "sparse_linear_bytes": 22_600_000,
            "linear_ratio": 1.881,
        },
        "fresh_process": {
            "equal": False,
            "max_abs_difference": 2.5e-7,
            "load_seconds": 0.417,
            "texts": 602,
        },
        "layers": [
            layer(0, "attention.self.query", [384, 384], (2.914, 1.807)),
            layer(1, "attention.self.query", [384, 384], (2.914, 1.807)),
            layer(0, "intermediate.dense", [1536, 384], (10.31, 7.222)),
            layer(0, "output.dense", [384, 1536], (10.07, 10.93)),
            layer(1, "output.dense", [384, 1536], (0.0, 1.0))
            | {"dense_ms": None, "sparse_ms": None, "speedup": None, "kernel": None}
            | {"verdict": "dense", "reason": "no kernel"},
        ],
        "pruning": {
            "reconstruction": "least_squares",
            "layers": 36,
            "sparsity": 0.503,
            "mean_error": 0.1234,
            "max_error": 0.2345,
            "texts": 604,
        },
        "recovery": {"texts": 1683, "steps": 240, "first_loss": 0.3456, "last_loss": 0.0567},
        "corpus": {
            "docstrings": 1682,
            "candidates": 728,
            "calibration_pairs": 302,
            "test_pairs": 301,
            "sha256": "e35cca99",
        },
        "seconds": {"pruning": 21.34, "recovery": 109.8, "total": 312.9},
        "machine": {
            "cpu": "Some CPU",
            "isa": "avx512bf16",
            "cores": 4,
            "threads": 2,
            "torch": "2.13.0",
        },
    }
