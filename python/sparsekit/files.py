"""Files that are replaced whole: a write that fails costs nobody the old one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write the new file in, under the same name.

    When the block ends, what is in the folder is renamed into place, `path` itself last: it names
    what lies beside it. When it raises, nothing has happened.
    """
    folder = path.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as name:
        scratch = Path(name)
        yield scratch
        ordinary = scratch / ".ordinary"
        ordinary.touch()
        mode = (path if path.exists() else ordinary).stat().st_mode & 0o777
        ordinary.unlink()
        for part in sorted(scratch.iterdir(), key=lambda part: part.name == path.name):
            # Some libraries make files for their owner alone; these are to be like any other.
            part.chmod(mode)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, folder / part.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new names survive a power cut as well
    finally:
        os.close(descriptor)
