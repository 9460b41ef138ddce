"""The text collection: what is read, what is left out, and a split that keeps the halves apart."""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path

import pytest

from sparsekit.demo.corpus import MIN_CHARACTERS, Corpus, Docstring, collect, split

LONG = "A first paragraph that is long enough.\n\n" + "The rest of the text, longer yet. " * 6


@pytest.fixture(scope="module")
def docstrings() -> list[Docstring]:
    return collect(progress=False)


@pytest.fixture(scope="module")
def parts(docstrings: list[Docstring]) -> Corpus:
    return split(docstrings)


def write(folder: Path, module: str, source: str) -> None:
    (folder / f"{module}.py").write_text(source)


def test_the_standard_library_gives_the_expected_order_of_texts(parts: Corpus) -> None:
    assert 200 <= len(parts.test) <= 450
    assert abs(len(parts.test) - len(parts.calibration)) <= 1
    assert "textwrap.fill" in {doc.name for doc in (*parts.test, *parts.calibration)}


def test_collecting_again_gives_the_same(tmp_path: Path) -> None:
    for name in ("textwrap", "string", "shelve"):
        write(tmp_path, name, (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text())
    first, second = collect(tmp_path, progress=False), collect(tmp_path, progress=False)
    assert len(first) > 10
    assert first == second
    assert split(first).digest() == split(second).digest()


def test_the_split_does_not_depend_on_the_order(docstrings: list[Docstring], parts: Corpus) -> None:
    shuffled = list(docstrings)
    random.Random(1).shuffle(shuffled)
    assert split(shuffled) == parts


def test_training_never_sees_a_text_of_the_test_half(parts: Corpus) -> None:
    tested = {part for doc in parts.test for part in (doc.query, doc.document, doc.text)}
    assert tested.isdisjoint(parts.training_texts())
    assert len(set(parts.training_texts())) == len(parts.training_texts())


def test_no_two_queries_have_the_same_answer(parts: Corpus) -> None:
    pairs = (*parts.test, *parts.calibration)
    assert len({doc.query for doc in pairs}) == len(pairs)
    assert len({doc.document for doc in pairs}) == len(pairs)


def test_about_750_docstrings_are_public_and_long(docstrings: list[Docstring]) -> None:
    assert 500 <= sum(doc.is_candidate for doc in docstrings) <= 1000
    assert all(doc.length > MIN_CHARACTERS for doc in docstrings if doc.is_candidate)


def test_sources_are_parsed_and_never_run(tmp_path: Path) -> None:
    write(tmp_path, "textwrap", f'"""{LONG}"""\nraise RuntimeError("this module was run")\n')
    (doc,) = collect(tmp_path, progress=False)
    assert doc.name == "textwrap"
    assert doc.query == "A first paragraph that is long enough."
    assert doc.document == ("The rest of the text, longer yet. " * 6).strip()


def test_private_names_and_methods_are_no_pairs(tmp_path: Path) -> None:
    public, method, private = (f"{name} {LONG} {name}" for name in ("One:", "Two:", "Three:"))
    source = (
        f'class Public:\n    """{public}"""\n    def method(self):\n        """{method}"""\n'
        f'def _private():\n    """{private}"""\n'
    )
    write(tmp_path, "textwrap", source)
    assert {doc.name: doc.is_pair for doc in collect(tmp_path, progress=False)} == {
        "textwrap.Public": True,
        "textwrap.Public.method": False,
        "textwrap._private": False,
    }


def test_copies_and_short_docstrings_are_left_out(tmp_path: Path) -> None:
    short = 'def short():\n    """Too short a text."""\n'
    write(tmp_path, "posixpath", f'def join():\n    """{LONG}"""\n{short}')
    write(tmp_path, "ntpath", f'def join():\n    """{LONG}"""\n')
    assert [doc.name for doc in collect(tmp_path, progress=False)] == ["ntpath.join"]


def test_tests_and_private_modules_are_not_read(tmp_path: Path) -> None:
    for name in ("_private", "antigravity", "not_in_the_standard_library"):
        write(tmp_path, name, f'"""{LONG}"""')
    write(tmp_path, "abc", '"""Short."""')
    assert collect(tmp_path, progress=False) == []
    assert "antigravity" in sys.stdlib_module_names


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the standard library's sources in"):
        collect(tmp_path, progress=False)
