"""`.ci/check_wheel.py`, on ELF files and wheels made here."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci/check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_wheel"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_wheel = _load()

INFO = "sparsekit_kernels-0.1.0.dist-info"
NAME = "sparsekit_kernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
MODULE = "sparsekit/_C.cpython-311-x86_64-linux-gnu.so"
METADATA = """Metadata-Version: 2.4
Name: sparsekit-kernels
License-Expression: MIT
License-File: LICENSE
Description-Content-Type: text/markdown

# sparsekit
"""


def elf(
    libraries: tuple[str, ...] = ("libc.so.6",),
    versions: tuple[str, ...] = ("GLIBC_2.17", "GLIBC_2.4"),
    machine: int = 62,
    run_path: str = "",
) -> bytes:
    """A shared library of headers alone, at address 0x1000: what the dynamic linker reads."""
    base = 0x1000
    strings = b"\0"

    def intern(text: str) -> int:
        nonlocal strings
        strings += text.encode() + b"\0"
        return len(strings) - len(text) - 1

    needed = [(1, intern(library)) for library in libraries]
    if run_path:
        needed.append((29, intern(run_path)))
    names = [intern(version) for version in versions]
    file = intern("libc.so.6")
    verneed = struct.pack("<HHIII", 1, len(names), file, 16, 0)
    for i, name in enumerate(names):
        verneed += struct.pack("<IHHII", 0, 0, 2, name, 16 if i + 1 < len(names) else 0)

    header = 64 + 2 * 56
    verneed_at = header + len(strings)
    dynamic = [*needed, (5, base + header), (10, len(strings))]
    dynamic += [(0x6FFFFFFE, base + verneed_at), (0x6FFFFFFF, 1), (0, 0)]
    table = b"".join(struct.pack("<qQ", *entry) for entry in dynamic)
    table_at = verneed_at + len(verneed)
    end = table_at + len(table)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, end, end, 4096)
    place = struct.pack("<IIQQQQQQ", 2, 4, table_at, base + table_at, 0, len(table), len(table), 8)
    return ident + head + load + place + strings + verneed + table


def problems_of(data: bytes, machine: str | None = None) -> list[str]:
    return check_wheel.check_file("a.so", data, check_wheel.NEWEST, machine)[1]


def make_wheel(folder: Path, name: str = NAME, **files: bytes | None) -> list[str]:
    """What is wrong with a good wheel whose `files`, by stem or path, are others; None: absent."""
    path = folder / name
    contents = {
        MODULE: elf(),
        "sparsekit/__init__.py": b"",
        f"{INFO}/METADATA": METADATA.encode(),
        f"{INFO}/licenses/LICENSE": b"MIT License",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, data in contents.items():
            data = files.pop(file.split("/")[-1].split(".")[0], data)
            if data is not None:
                wheel.writestr(file, data)
        for file, data in files.items():
            wheel.writestr(file, data)
    return check_wheel.check_wheel(path)[1]


def test_reads_what_a_library_needs() -> None:
    needs = check_wheel.read_needs(
        elf(("libm.so.6", "libc.so.6"), ("GLIBC_2.4", "GLIBC_2.17", "GLIBCXX_3.4", "GLIBC_2.3.4"))
    )
    assert needs.machine == "x86_64"
    assert needs.libraries == ("libm.so.6", "libc.so.6")
    assert needs.versions == {"GLIBC": "2.17", "GLIBCXX": "3.4"}  # 17 is more than 4
    assert problems_of(elf()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file of this machine")
def test_agrees_with_readelf() -> None:
    if not (readelf := shutil.which("readelf")):
        pytest.skip("readelf is missing")
    from sparsekit import _native

    module = _native._C.__file__
    needs = check_wheel.read_needs(Path(module).read_bytes())
    text = subprocess.run([readelf, "-dVW", module], check=True, capture_output=True, text=True)
    assert needs.libraries
    for library in needs.libraries:
        assert f"Shared library: [{library}]" in text.stdout
    assert text.stdout.count("Shared library: [") == len(needs.libraries)
    for name, version in needs.versions.items():
        assert f"Name: {name}_{version} " in text.stdout


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (elf(("libcudart.so.13",)), "needs libcudart.so.13, which is not on every Linux"),
        (elf(("libnvinfer.so.10",)), "needs libnvinfer.so.10, which is not on every Linux"),
        (elf(versions=("GLIBC_2.36",)), "needs GLIBC 2.36; expected 2.35 or older"),
        (elf(versions=("GLIBCXX_3.4.31",)), "needs GLIBCXX 3.4.31; expected 3.4.30 or older"),
        (elf(versions=("CXXABI_1.3.14",)), "needs CXXABI 1.3.14; expected 1.3.13 or older"),
        (elf(versions=("GLIBC_PRIVATE",)), "needs symbols of GLIBC_PRIVATE, which no policy has"),
        (elf(versions=("LIBFOO_1.0",)), "needs symbols of LIBFOO 1.0, which no policy has"),
        (elf(run_path="$ORIGIN"), "looks for libraries in $ORIGIN; expected no RPATH"),
        (b"MZ", "expected a 64-bit little-endian ELF file"),
        (elf()[:40], "the ELF file is cut off or broken"),
        (elf()[:-8], "the ELF file is cut off or broken"),
    ],
)
def test_refuses_a_library(data: bytes, problem: str) -> None:
    found = problems_of(data)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_the_newest_versions_pass() -> None:
    names = tuple(f"{name}_{version}" for name, version in check_wheel.NEWEST.items())
    assert problems_of(elf(versions=names)) == []


def test_another_machine() -> None:
    assert problems_of(elf(machine=183), "aarch64") == []
    assert problems_of(elf(machine=183), "x86_64") == ["is for aarch64; expected x86_64"]
    assert problems_of(elf(machine=3), "x86_64") == ["is for machine 3; expected x86_64"]


def test_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path, _C=elf(versions=("GLIBC_2.42",)))
    assert check_wheel.main([str(tmp_path / NAME)]) == 1
    assert check_wheel.main(["--here", str(tmp_path / NAME)]) == 0
    # Only versions may differ.
    make_wheel(tmp_path, _C=elf(("libcudart.so.13",)))
    assert check_wheel.main(["--here", str(tmp_path / NAME)]) == 1
    assert "needs libcudart.so.13" in capsys.readouterr().err


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / NAME).write_bytes(b"PK")
    assert check_wheel.main([str(tmp_path / NAME), str(tmp_path / "none.so")]) == 1
    wheel, library = capsys.readouterr().err.splitlines()
    assert wheel.startswith(f"{NAME}: error: cannot be read: File is not a zip file")
    assert library.startswith("none.so: error: cannot be read: ")


def test_a_good_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_wheel(tmp_path) == []
    assert check_wheel.main([str(tmp_path / NAME)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{NAME}: 0.00 MB" in printed.out
    assert "needs GLIBC 2.17" in printed.out


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"LICENSE": None}, f"has no text of the licence in {INFO}/licenses/LICENSE"),
        ({"LICENSE": b" \n"}, f"has no text of the licence in {INFO}/licenses/LICENSE"),
        ({"METADATA": None}, f"has no {INFO}/METADATA"),
        (
            {"METADATA": METADATA.replace("License-File: LICENSE\n", "").encode()},
            "names no licence: expected License-Expression and License-File in METADATA",
        ),
        (
            {"METADATA": METADATA.replace("# sparsekit\n", "").encode()},
            "has no description in Markdown: expected README.md in METADATA",
        ),
        ({"_C": None}, f"has no {MODULE}, which its name promises"),
        (
            {"sparsekit_kernels.libs/libgomp.so.1": elf()},
            f"has sparsekit_kernels.libs; expected sparsekit and {INFO} only",
        ),
        # The tag promises glibc 2.28.
        (
            {"_C": elf(versions=("GLIBC_2.29",))},
            f"{MODULE}: needs GLIBC 2.29; expected 2.28 or older: build on an older system, or for "
            "this one alone with --here",
        ),
        ({"_C": elf(machine=183)}, f"{MODULE}: is for aarch64; expected x86_64"),
        (
            {"sparsekit/libsparsekit_tensorrt.so": elf(("libnvinfer.so.11",))},
            "sparsekit/libsparsekit_tensorrt.so: needs libnvinfer.so.11, which is not on every "
            "Linux; link it statically or load it at run time",
        ),
    ],
)
def test_refuses_a_wheel(tmp_path: Path, files: dict[str, bytes | None], problem: str) -> None:
    assert make_wheel(tmp_path, **files) == [problem]


def test_a_wheel_of_this_machine_may_need_what_ubuntu_has(tmp_path: Path) -> None:
    local = NAME.replace("manylinux_2_28", "linux")
    assert make_wheel(tmp_path, local, _C=elf(versions=("GLIBC_2.35",))) == []


@pytest.mark.parametrize(
    "name",
    [
        NAME.replace("manylinux", "musllinux"),
        NAME.replace("x86_64", "i686"),
        NAME.replace("manylinux_2_28_x86_64", "macosx_11_0_arm64"),
        NAME.replace("manylinux_2_28_x86_64", "linux_x86_64.linux_aarch64"),
        "sparsekit_kernels-0.1.0-py3-none-any.whl",
    ],
)
def test_refuses_a_name(tmp_path: Path, name: str) -> None:
    (problem,) = make_wheel(tmp_path, name)
    assert problem.startswith(f"the name is {name}; expected one as sparsekit_kernels-0.1.0-cp311")


def test_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_wheel, "MAX_MEGABYTES", 0)
    (problem,) = make_wheel(tmp_path)
    assert problem == "has 0.0 MB; expected 0 or less"
    assert check_wheel.main([str(tmp_path / NAME)]) == 1
    assert capsys.readouterr().err == f"{NAME}: error: {problem}\n"
