"""Counts the instructions of the aarch64 kernels' inner loops: no machine is here to time them.

    python -m bench.instructions build/aarch64/CMakeFiles/sparsekit.dir/csrc/cpu/*_neon*.o

needs aarch64-linux-gnu-objdump. An inner loop is what a backward branch closes, without another
such loop inside, and multiplies.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

# The loops that docs/performance.md lists: title and what its function's name matches.
LOOPS = {
    "2:4, f32, 2 rows": "nm_micro<Neon, float, 2, 1, 8, 2, 2>",
    "2:4, f16, 2 rows": "nm_micro<Neon, f16, 2, 1, 8, 2, 2>",
    "2:4, f32, pairs of rows": "pair_micro<Neon, 8>",
    "2:4v4, f32, 4 rows": "nm_micro<Neon, float, 4, 4, 6, 2, 2>",
    "2:4v4, f16, 4 rows": "nm_micro<Neon, f16, 4, 4, 6, 2, 2>",
    "blocks, f32, 8 rows": "bsr_micro<Fma<Neon, float, false>, 8, 3>",
    "blocks, bf16, 8 rows": "bsr_micro<Fma<Neon, bf16, true>, 8, 3>",
    "blocks, f16, 8 rows": "bsr_micro<Fma<Neon, f16, true>, 8, 3>",
    "2:4, bf16, bfdot, 4 rows": "dot_micro<4, 1, 6>",
    "2:4v4, bf16, bfdot, 4 rows": "dot_micro<4, 4, 6>",
    "blocks, bf16, bfdot, 8 rows": "bsr_micro<DotBf16, 8, 3>",
    "2:4, f32, 5 tokens": "nm_decode_panels<Neon, float, 5, 2>",
    "2:4, f16, 5 tokens": "nm_decode_panels<Neon, f16, 5, 2>",
}


@dataclass(frozen=True)
class Loop:
    """What one round of an inner loop executes."""

    instructions: int
    multiplies: int  # fmla or bfdot, of a whole register
    loads: int  # into vector registers, a pair counts twice
    others: int  # on vectors
    spills: int  # to or from the stack

    @classmethod
    def of(cls, body: list[str]) -> "Loop":
        """Classifies the instructions of a loop's body."""
        loads = [i for i in body if re.match(r"ld\w* (\{ ?v|[qdsh]\d)", i)]
        multiplies = [i for i in body if re.match(r"fmla|bfdot", i)]
        vector = [i for i in body if re.search(r"\bv\d+\.", i) and not i.startswith(("ld", "st"))]
        return cls(
            instructions=len(body),
            multiplies=len(multiplies),
            loads=sum(2 if i.startswith("ldp") else 1 for i in loads),
            others=len(vector) - len(multiplies),
            spills=sum("[sp" in i and re.match(r"(ld|st)\w* [qdsh]", i) is not None for i in body),
        )


def functions(objects: list[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Yields each function's name and its instructions with their addresses."""
    command = ["aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", *objects]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in re.split(r"\n(?=[0-9a-f]+ <)", text):
        head, _, rest = part.partition("\n")
        if not (match := re.match(r"[0-9a-f]+ <(.*)>:", head)):
            continue
        lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", rest, re.MULTILINE)
        name = match[1].replace("sk::", "").replace("(anonymous namespace)::", "")
        yield name, [(int(address, 16), line.replace("\t", " ")) for address, line in lines]


def inner_loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The loops of a function that multiply and contain no other loop."""
    index = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for end, (_, line) in enumerate(code):
        branch = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z) .*?\b([0-9a-f]+) <", line)
        start = index.get(int(branch[1], 16)) if branch else None
        if start is not None and start <= end:
            spans.append((start, end))
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    loops = [Loop.of([line for _, line in code[a : b + 1]]) for a, b in inner]
    return [loop for loop in loops if loop.multiplies]


def main() -> None:
    """Prints the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objects", nargs="+")
    code = list(functions(parser.parse_args().objects))
    print("| inner loop | instructions | multiply-adds | loads | other vector | spills |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for title, pattern in LOOPS.items():
        rows = {loop for name, lines in code if pattern in name for loop in inner_loops(lines)}
        if not rows:
            raise SystemExit(f"no inner loop in a function that contains {pattern}")
        for loop in sorted(rows, key=lambda loop: loop.instructions):
            cells = (loop.instructions, loop.multiplies, loop.loads, loop.others, loop.spills)
            print(f"| {title} |", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
