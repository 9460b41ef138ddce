"""What the compiler made of the CUDA kernels: registers, shared memory, occupancy, instructions.

    python -m bench.cuda_report build/cuda/CMakeFiles/sparsekit.dir/csrc/cuda/*.o --out FILE.md

needs cuobjdump and nvdisasm (of the CUDA toolkit, or the PyPI packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm). Fails when a kernel spills, uses local memory, has no tensor-core instruction
of its kind, loads its weights in less than 16 bytes a thread, or is compiled for fewer GPUs than
the others. No GPU is needed, and nothing here is a measurement.
"""

import argparse
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Of an SM: 32-bit registers, and KiB of shared memory by compute capability.
REGISTERS = 65536
SHARED_KIB = {
    **dict.fromkeys(("80", "87"), 164),
    **dict.fromkeys(("86", "89", "120"), 100),
    **dict.fromkeys(("90", "90a", "100", "110"), 228),
}
# The system takes this much of each block.
SHARED_RESERVED = 1024

# The longest loop of the SASS names is part of the proof; these are the instructions it must have.
SPARSE_MMA, DENSE_MMA = "HMMA.SP.16832", "HMMA.16816"

# The kernels of csrc/cuda/tiles.inc, by the start of their ids.
FAMILIES = {
    "matmul_nm_mma_sp": "2:4",
    "matmul_bsr_mma": "blocks",
    "conv2d_nm_mma_sp": "2:4, convolutions",
    "conv2d_bsr_mma": "blocks, convolutions",
}

# Kernels on CUDA cores: what a thread block of each computes, by the end of its id.
CORES = {
    "cores": "rows of W x tokens of a tile",
    "decode": "tokens together; v: rows of a vector together",
}

HEAD = """# What the compiler made of the CUDA kernels

Made by `make cuda-report`, which fails where a kernel spills registers, touches local memory, lacks
its tensor-core instruction (`HMMA.SP.16832` for 2:4, `HMMA.16816` for blocks), or copies and loads
in less than 16 bytes a thread. Columns of GPUs: registers of a thread (the larger of f16 and bf16),
and how many blocks an SM holds at once by registers and shared memory. Nothing here was measured on
a GPU.
"""


@dataclass(frozen=True)
class Tile:
    """A line of csrc/cuda/tiles.inc."""

    family: str  # the start of the kernel's id, as "matmul_nm_mma_sp"
    rows: int
    tokens: int
    warps: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: a ring of stages of 64 columns, and 16 a pixel."""
        weights = self.rows * 64 * 2 if self.family.endswith("bsr_mma") else self.rows // 16 * 1152
        windows = self.tokens * 16 if self.family.startswith("conv2d") else 0
        return self.stages * (weights + self.tokens * 64 * 2) + windows

    def blocks_of_sm(self, architecture: str, registers: int) -> int:
        """Blocks that fit an SM at once; registers are given out in units of 256 a warp."""
        by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * self.warps)
        by_shared = SHARED_KIB[architecture] * 1024 // (self.shared + SHARED_RESERVED)
        return min(by_registers, by_shared)


@dataclass
class Code:
    """One kernel for one architecture."""

    registers: int = 0
    stack: int = 0
    local: int = 0
    instructions: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def tiles() -> dict[str, Tile]:
    """The tiles by the name of their kernels without dtype: "matmul_nm_mma_sp 256x128"."""
    text = (ROOT / "csrc/cuda/tiles.inc").read_text()
    found = {}
    for conv, kind, numbers in re.findall(
        r"^SK_(CONV_)?(NM|BSR)_TILE\(([\d, ]+),", text, re.MULTILINE
    ):
        rows, tokens, along_rows, along_tokens, stages, blocks = map(int, numbers.split(","))
        family = family_of("conv2d" if conv else "matmul", kind)
        tile = Tile(family, rows, tokens, along_rows * along_tokens, stages, blocks)
        found[f"{family} {rows}x{tokens}"] = tile
    return found


def family_of(op: str, kind: str) -> str:
    return f"{op}_{'nm_mma_sp' if kind.lower() == 'nm' else 'bsr_mma'}"


def kernel_name(mangled: str) -> str:
    """An instance of matmul_mma is "matmul_nm_mma_sp f16 256x128"; other names stay."""
    match = re.search(
        r"matmul_mma.*?ptx\d+(B?F16)ELi(\d+)ELi(\d+)E.*?(Nm|Bsr)Weights.*?(Row|Pixel)Copier",
        mangled,
    )
    if not match:
        return cores_name(mangled)
    dtype, rows, tokens, kind, copier = match.groups()
    family = family_of("conv2d" if copier == "Pixel" else "matmul", kind)
    return f"{family} {dtype.lower()} {rows}x{tokens}"


def cores_name(mangled: str) -> str:
    """An instance of a kernel on CUDA cores is "matmul_nm_cores f32 128x64"; other names stay."""
    if tile := re.search(
        r"5coresI.*?\d(B?F\d\d)ELi(\d+)ELi(\d+)E.*?(Nm|Bsr)Cores.*?(Matrix|Pixel)X", mangled
    ):
        dtype, rows, tokens, kind, source = tile.groups()
        op = "matmul" if source == "Matrix" else "conv2d"
        return f"{op}_{kind.lower()}_cores {dtype.lower()} {rows}x{tokens}"
    if few := re.search(r"(nm|bsr)_decodeI.*?\d(B?F\d\d)ELi(\d+)E(?:Li\d+ELb(\d))?", mangled):
        kind, dtype, tokens, vector = few.groups()
        return f"matmul_{kind}_decode {dtype.lower()} {tokens}{'v' if vector == '1' else ''}"
    return mangled


def find_tool(name: str) -> str:
    """The tool on the PATH, of a CUDA toolkit, or of the PyPI package."""
    places = [
        Path(sysconfig.get_path("platlib")) / "nvidia" / cuda / "bin" for cuda in ("cu13", "cu12")
    ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places), "/usr/local/cuda/bin"])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SystemExit(
            f"{name} is missing; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return tool


def dump(objects: list[str], *options: str) -> str:
    tool = find_tool("cuobjdump")
    environment = dict(
        os.environ,
        PATH=os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), os.environ["PATH"]]),
    )
    texts = [
        subprocess.run(
            [tool, *options, path], check=True, capture_output=True, text=True, env=environment
        ).stdout
        for path in objects
    ]
    return "\n".join(texts)


def read_code(objects: list[str]) -> dict[tuple[str, str], Code]:
    """Every kernel, by name and architecture."""
    found: dict[tuple[str, str], Code] = defaultdict(Code)
    architecture, code = "", None
    for line in dump(objects, "-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            code = found[kernel_name(match[1]), architecture]
        elif code and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line)):
            code.registers, code.stack, code.local = map(int, match.groups())
    code = None
    for line in dump(objects, "-sass").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", line.strip()):
            code = found[kernel_name(match[1]), architecture]
        elif code and (
            match := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line.strip())
        ):
            code.instructions[match[1]] += 1
    return found


def faults(name: str, architecture: str, code: Code) -> list[str]:
    """What a kernel's code should not be."""
    count = code.instructions
    known = " " in name and not on_cores(name)
    wanted = DENSE_MMA if "bsr_mma" in name else SPARSE_MMA
    found = []
    if code.stack or code.local:
        found.append(f"{code.stack} bytes of stack and {code.local} of local memory")
    if spills := sum(n for op, n in count.items() if op.split(".")[0] in ("LDL", "STL")):
        found.append(f"{spills} loads and stores of local memory")
    if known and not any(op.startswith(wanted) for op in count):
        found.append(f"no {wanted}")
    if known and not any(re.match(r"LDGSTS.*\.128", op) for op in count):
        found.append("no asynchronous copies of 16 bytes")
    if known and not any(op.startswith("LDS.128") for op in count):
        found.append("no loads of 16 bytes from shared memory")
    if on_cores(name) and not any(op.startswith("FFMA") for op in count):
        found.append("no FFMA")
    if "_cores " in name and not any(op.startswith("LDS.128") for op in count):
        found.append("no loads of 16 bytes from shared memory")
    return [f"{name} for sm_{architecture}: {fault}" for fault in found]


def on_cores(name: str) -> bool:
    return name.split()[0].endswith(tuple(f"_{variant}" for variant in CORES))


def cores_table(found: dict[tuple[str, str], Code], architectures: list[str]) -> list[str]:
    """Registers of the kernels on CUDA cores, the largest of the dtypes."""
    registers: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (name, architecture), code in found.items():
        if on_cores(name):
            kernel, _, size = name.split()
            of = registers[kernel, size]
            of[architecture] = max(of[architecture], code.registers)
    lines = []
    for variant, meaning in CORES.items():
        head = ["kernel", meaning, *(f"sm_{a}" for a in architectures)]
        lines += [f"## CUDA cores: `<op>_<format>_<dtype>_sm80_{variant}`, registers", ""]
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        for (kernel, size), of in sorted(registers.items()):
            if kernel.endswith(f"_{variant}"):
                cells = [kernel, size, *(str(of[a]) for a in architectures)]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def table(found: dict[tuple[str, str], Code], all_tiles: dict[str, Tile]) -> str:
    """The page for the documentation."""
    architectures = sorted(
        {architecture for _, architecture in found}, key=lambda a: int(a.rstrip("a"))
    )
    head = ["tile", "threads", "stages", "shared memory", *(f"sm_{a}" for a in architectures)]
    lines = []
    for family, title in FAMILIES.items():
        lines += [f"## {title}: `{family}_<dtype>_sm80_<tile>`", ""]
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        for name, tile in all_tiles.items():
            if tile.family != family:
                continue
            size = name.split()[1]
            cells = [size, str(tile.threads), str(tile.stages), f"{tile.shared / 1024:.1f} KiB"]
            for architecture in architectures:
                codes = [
                    found[f"{family} {dtype} {size}", architecture] for dtype in ("f16", "bf16")
                ]
                registers = max(code.registers for code in codes)
                blocks = tile.blocks_of_sm(architecture, registers)
                cells.append(f"{registers}, {blocks}" if blocks else f"{registers}, does not fit")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(
        [
            HEAD,
            *lines,
            *cores_table(found, architectures),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "objects", nargs="+", help="object files, cubins or libraries with CUDA code"
    )
    parser.add_argument("--out", type=Path, help="write the page here")
    arguments = parser.parse_args()
    found, all_tiles = read_code(arguments.objects), tiles()
    architectures = {architecture for _, architecture in found}
    bad = [
        fault
        for (name, architecture), code in found.items()
        for fault in faults(name, architecture, code)
    ]
    for name in all_tiles:
        family, size = name.split()
        bad += [
            f"{family} {dtype} {size} for sm_{architecture}: not there"
            for dtype in ("f16", "bf16")
            for architecture in architectures
            if (f"{family} {dtype} {size}", architecture) not in found
        ]
    if bad or not found:
        raise SystemExit("\n".join(bad) or "no kernels found")
    page = table(found, all_tiles)
    if arguments.out:
        arguments.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
