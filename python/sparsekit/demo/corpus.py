"""Real text without a download: the docstrings of Python's standard library.

The first paragraph of a docstring is a query, the rest of it the document that the query must find.
Source files are parsed with `ast`, never imported, so collecting has no side effects.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

MIN_CHARACTERS = 120
"""A docstring can become a pair when it is longer than this."""

# Shorter paragraphs ("Example:", a bare signature) say nothing about the rest of the text.
_MIN_QUERY = 20
_MIN_DOCUMENT = 60

# Not documentation of a library: tests, applications, and jokes.
_EXCLUDED = {"antigravity", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}


@dataclass(frozen=True)
class Docstring:
    """One docstring, white space normalised.

    Attributes:
        name: Qualified name, such as `textwrap.fill`.
        query: First paragraph; the whole text where there is no second one.
        document: Everything after the first paragraph, "" where there is nothing.
        length: Characters of the docstring as it stands in the source, without indentation.
        public: Whether it belongs to a module or to a public name at its top level.
    """

    name: str
    query: str
    document: str
    length: int
    public: bool

    @property
    def is_candidate(self) -> bool:
        """Whether it is public and longer than `MIN_CHARACTERS`."""
        return self.public and self.length > MIN_CHARACTERS

    @property
    def is_pair(self) -> bool:
        """Whether it is a candidate and both parts are long enough to search for and to find."""
        long_enough = len(self.query) >= _MIN_QUERY and len(self.document) >= _MIN_DOCUMENT
        return self.is_candidate and long_enough

    @property
    def text(self) -> str:
        """Both halves."""
        return f"{self.query} {self.document}".strip()


@dataclass(frozen=True)
class Corpus:
    """The fixed split of the docstrings.

    Attributes:
        test: Pairs that only the evaluation may read.
        calibration: The other pairs, for calibration and recovery.
        unpaired: Docstrings that are no pairs; also for calibration and recovery.
    """

    test: tuple[Docstring, ...]
    calibration: tuple[Docstring, ...]
    unpaired: tuple[Docstring, ...]

    def training_texts(self) -> list[str]:
        """What recovery trains on: both parts of the pairs, and every unpaired text."""
        pairs = [part for doc in self.calibration for part in (doc.query, doc.document)]
        return pairs + [doc.text for doc in self.unpaired]

    def digest(self) -> str:
        """SHA-256 over all texts and the split, to compare two machines' reports."""
        sha = hashlib.sha256()
        for part in (self.test, self.calibration, self.unpaired):
            for doc in part:
                sha.update(f"{doc.name}\0{doc.query}\0{doc.document}\0".encode())
            sha.update(b"\1")
        return sha.hexdigest()


def collect(root: Path | None = None, progress: bool = True) -> list[Docstring]:
    """Reads the docstrings of public modules and of everything defined in them.

    Args:
        root: Folder of the standard library's sources; default: this interpreter's.
        progress: Whether to show a progress bar.

    Returns:
        Docstrings of 20 characters and more, sorted by name; of equal texts only the first.

    Raises:
        FileNotFoundError: The folder holds no module sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sources = list(_sources(folder))
    if not sources:
        raise FileNotFoundError(
            f"demo: expected the standard library's sources in {folder}, found none; "
            "run with a Python that ships its .py files."
        )
    found: list[Docstring] = []
    seen: set[str] = set()
    for module, path in tqdm(sources, desc="reading docstrings", unit="file", disable=not progress):
        for doc in docstrings_of(module, path.read_bytes()):
            # Copies (os and posixpath, say) would be two right answers to one query.
            if doc.query not in seen and (not doc.document or doc.document not in seen):
                found.append(doc)
            seen.update((doc.query, doc.document))
    return sorted(found, key=_order)


def split(docstrings: list[Docstring]) -> Corpus:
    """Halves the pairs by a hash of their names: fixed, and blind to module and length.

    Args:
        docstrings: What `collect` returned.

    Returns:
        The corpus, each part sorted by name.
    """
    pairs = sorted((doc for doc in docstrings if doc.is_pair), key=_hash)
    half = len(pairs) // 2

    def by_name(docs: list[Docstring]) -> tuple[Docstring, ...]:
        return tuple(sorted(docs, key=_order))

    return Corpus(
        test=by_name(pairs[:half]),
        calibration=by_name(pairs[half:]),
        unpaired=by_name([doc for doc in docstrings if not doc.is_pair]),
    )


def _order(doc: Docstring) -> tuple[str, str]:
    # A name can be defined twice, in the branches of an `if` for instance.
    return doc.name, doc.query


def _hash(doc: Docstring) -> str:
    return hashlib.sha256("\0".join(_order(doc)).encode()).hexdigest()


def _sources(folder: Path) -> Iterator[tuple[str, Path]]:
    for name in sorted(sys.stdlib_module_names - _EXCLUDED):
        if name.startswith("_"):
            continue
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                yield name, path


def docstrings_of(module: str, source: bytes) -> Iterator[Docstring]:
    """The docstrings of 20 characters and more in a source file, in its order.

    Args:
        module: What names begin with.
        source: Python; parsed, not run.

    Raises:
        SyntaxError: It is no Python that this interpreter reads.
    """

    def visit(node: ast.AST, name: str, public: bool) -> Iterator[Docstring]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _MIN_QUERY:
                query, _, document = text.strip().partition("\n\n")
                query, document = " ".join(query.split()), " ".join(document.split())
                yield Docstring(name, query, document, len(text), public)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt):
                continue  # no definition stands inside an expression
            own = getattr(child, "name", None)
            inner = isinstance(node, ast.Module) and not str(own).startswith("_")
            yield from visit(child, f"{name}.{own}" if own else name, inner)

    yield from visit(ast.parse(source), module, True)
