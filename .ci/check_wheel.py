#!/usr/bin/env python3
"""What a Linux wheel, or a shared library alone, asks of the machine that it is installed on.

    python .ci/check_wheel.py [--here] dist/*.whl build/libsparsekit_tensorrt.so

Prints sizes and needs, and fails where a file is too large for PyPI, needs a library that is not on
every Linux or a newer one than Ubuntu 22.04 has (JetPack 6), was built for another machine than the
wheel's name says, or where the wheel lacks its licence. Reads ELF itself: `readelf` is not there on
every machine, and need not know the other one's files.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

MAX_MEGABYTES = 100  # PyPI's limit for a file

# The newest symbol versions of Ubuntu 22.04: glibc 2.35 and the libraries of GCC 12.
NEWEST = {"GLIBC": "2.35", "GLIBCXX": "3.4.30", "CXXABI": "1.3.13", "GCC": "12.0.0"}

# What the manylinux policies allow and this project has a use for.
ALLOWED = {
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}

MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine


@dataclass(frozen=True)
class Needs:
    """What the dynamic linker looks for when it loads an ELF file."""

    machine: str
    libraries: tuple[str, ...]
    versions: dict[str, str]  # the newest of each, as {"GLIBC": "2.34"}; "" where it is no number
    run_path: str


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class _Elf:
    """A 64-bit little-endian ELF file, read by its program headers as the dynamic linker does."""

    _LOAD, _DYNAMIC = 1, 2

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("expected a 64-bit little-endian ELF file")
        self._data = data
        self.machine: int = struct.unpack_from("<H", data, 18)[0]
        (table,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        headers = [struct.unpack_from("<IIQQQQQQ", data, table + i * size) for i in range(count)]
        self._loads: list[tuple[int, int, int]] = [
            (h[3], h[5], h[2]) for h in headers if h[0] == self._LOAD
        ]
        dynamic = [h for h in headers if h[0] == self._DYNAMIC]
        if not dynamic:
            raise ValueError("expected a shared library, this file has no dynamic section")
        self.dynamic: list[tuple[int, int]] = []
        for at in range(dynamic[0][2], dynamic[0][2] + dynamic[0][5], 16):
            self.dynamic.append(struct.unpack_from("<qQ", data, at))
            if self.dynamic[-1][0] == 0:
                break

    def offset(self, address: int) -> int:
        for start, size, offset in self._loads:
            if start <= address < start + size:
                return offset + address - start
        raise ValueError(f"address {address:#x} lies in no part of the file")

    def first(self, tag: int) -> int | None:
        return next((value for t, value in self.dynamic if t == tag), None)

    def string(self, index: int) -> str:
        strings = self.first(5)
        if strings is None:
            raise ValueError("the dynamic section has no string table")
        start = self.offset(strings) + index
        return self._data[start : self._data.index(b"\0", start)].decode()

    def version_names(self) -> Iterator[str]:
        first, count = self.first(0x6FFFFFFE), self.first(0x6FFFFFFF)
        if first is None or count is None:
            return
        entry = self.offset(first)
        for _ in range(count):
            _, names, _, name, following = struct.unpack_from("<HHIII", self._data, entry)
            name += entry
            for _ in range(names):
                _, _, _, text, next_name = struct.unpack_from("<IHHII", self._data, name)
                yield self.string(text)
                name += next_name
            entry += following


def read_needs(data: bytes) -> Needs:
    """Reads an ELF file.

    Raises:
        ValueError: it is none, or cut off.
    """
    try:
        elf = _Elf(data)
        versions: dict[str, str] = {}
        for text in elf.version_names():
            found = re.fullmatch(r"(\w+)_([0-9]+(?:\.[0-9]+)*)", text)
            name, number = found.groups() if found else (text, "")
            known = versions.setdefault(name, number)
            if number and _number(number) > _number(known):
                versions[name] = number
        return Needs(
            MACHINES.get(elf.machine, f"machine {elf.machine}"),
            tuple(elf.string(value) for tag, value in elf.dynamic if tag == 1),
            dict(sorted(versions.items())),
            ":".join(elf.string(value) for tag, value in elf.dynamic if tag in (15, 29)),
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"the ELF file is cut off or broken: {error}") from None


def check_library(needs: Needs, newest: dict[str, str], here: bool = False) -> list[str]:
    """Why a library cannot be loaded on every machine with `newest`, or `here`: of any age."""
    problems = [
        f"needs {library}, which is not on every Linux; link it statically or load it at run time"
        for library in needs.libraries
        if library not in ALLOWED
    ]
    for name, version in needs.versions.items():
        limit = newest.get(name)
        if limit is None or not version:
            problems.append(f"needs symbols of {name} {version}".rstrip() + ", which no policy has")
        elif _number(version) > _number(limit) and not here:
            problems.append(
                f"needs {name} {version}; expected {limit} or older: build on an older system, "
                "or for this one alone with --here"
            )
    if needs.run_path:
        problems.append(f"looks for libraries in {needs.run_path}; expected no RPATH or RUNPATH")
    return problems


@dataclass(frozen=True)
class WheelName:
    """`distribution-version-python-abi-platform.whl`."""

    stem: str  # distribution-version
    python: str  # as "cp311"
    machine: str
    newest: dict[str, str]  # what the platform tag promises, and not more than NEWEST

    @classmethod
    def parse(cls, file: str) -> WheelName:
        found = re.fullmatch(r"(\w+-[\w.]+)(?:-\d\w*)?-(cp\d+)-\w+-([\w.]+)\.whl", file)
        platforms = (
            re.findall(r"(?:^|\.)(?:many)?linux[\d_]*_(x86_64|aarch64)", found[3]) if found else []
        )
        if not found or len(set(platforms)) != 1:
            raise ValueError(
                f"the name is {file}; expected one as "
                "sparsekit_kernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
            )
        glibc = [f"{a}.{b}" for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", found[3])]
        newest = NEWEST | {"GLIBC": min([*glibc, NEWEST["GLIBC"]], key=_number)}
        return cls(found[1], found[2], platforms[0], newest)

    @property
    def module(self) -> str:
        return f"sparsekit/_C.cpython-{self.python[2:]}-{self.machine}-linux-gnu.so"


def _check_metadata(wheel: zipfile.ZipFile, info: str) -> Iterator[str]:
    names = set(wheel.namelist())
    if f"{info}/METADATA" not in names:
        yield f"has no {info}/METADATA"
        return
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    licences = metadata.get_all("License-File", [])
    if not licences or "License-Expression" not in metadata:
        yield "names no licence: expected License-Expression and License-File in METADATA"
    for licence in licences:
        file = f"{info}/licenses/{licence}"
        if file not in names or not wheel.read(file).strip():
            yield f"has no text of the licence in {file}"
    if not metadata.get_payload() or metadata["Description-Content-Type"] != "text/markdown":
        yield "has no description in Markdown: expected README.md in METADATA"


def check_wheel(path: Path, here: bool = False) -> tuple[list[str], list[str]]:
    """Lines to print, and what is wrong."""
    megabytes = path.stat().st_size / 1e6
    lines = [f"{path.name}: {megabytes:.2f} MB"]
    problems = []
    if megabytes > MAX_MEGABYTES:
        problems.append(f"has {megabytes:.1f} MB; expected {MAX_MEGABYTES} or less")
    try:
        expected = WheelName.parse(path.name)
    except ValueError as error:
        return lines, [*problems, str(error)]
    with zipfile.ZipFile(path) as wheel:
        info = f"{expected.stem}.dist-info"
        problems += _check_metadata(wheel, info)
        names = wheel.namelist()
        # auditwheel puts copies of libraries beside the package.
        strangers = sorted({n.split("/")[0] for n in names} - {"sparsekit", info})
        if strangers:
            problems.append(f"has {', '.join(strangers)}; expected sparsekit and {info} only")
        if expected.module not in names:
            problems.append(f"has no {expected.module}, which its name promises")
        for name in names:
            if not name.endswith(".so") and ".so." not in name:
                continue
            printed, found = check_file(
                name, wheel.read(name), expected.newest, expected.machine, here
            )
            lines += [f"  {line}" for line in printed]
            problems += [f"{name}: {problem}" for problem in found]
    return lines, problems


def check_file(
    name: str,
    data: bytes,
    newest: dict[str, str],
    machine: str | None = None,
    here: bool = False,
) -> tuple[list[str], list[str]]:
    """Lines to print about a shared library, and what is wrong with it."""
    size = f"{name}: {len(data) / 1e6:.2f} MB"
    try:
        needs = read_needs(data)
    except ValueError as error:
        return [size], [str(error)]
    versions = ", ".join(f"{n} {v}" for n, v in needs.versions.items())
    lines = [
        f"{size}, {needs.machine}",
        f"  needs {versions or 'no versions'}",
        f"  needs {', '.join(needs.libraries)}",
    ]
    problems = check_library(needs, newest, here)
    if machine not in (None, needs.machine):
        problems.append(f"is for {needs.machine}; expected {machine}")
    return lines, problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="wheels and shared libraries"
    )
    parser.add_argument(
        "--here", action="store_true", help="for this machine alone: symbol versions of any age"
    )
    options = parser.parse_args(arguments)
    failed = False
    for path in options.files:
        try:
            if path.suffix == ".whl":
                lines, problems = check_wheel(path, options.here)
            else:
                data = path.read_bytes()
                lines, problems = check_file(path.name, data, NEWEST, here=options.here)
        except (OSError, zipfile.BadZipFile) as error:
            lines, problems = [], [f"cannot be read: {error}"]
        print("\n".join(lines))
        for problem in problems:
            print(f"{path.name}: error: {problem}", file=sys.stderr)
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
