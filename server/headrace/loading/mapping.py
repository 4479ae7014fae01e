"""Files as read-only memory maps, with errors that name the file."""

from __future__ import annotations

import mmap
from pathlib import Path

from headrace.errors import CheckpointError


def map_file(path: Path) -> mmap.mmap:
    """Map the whole of `path`, read-only. Raises CheckpointError if it is missing or empty."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # what mmap says of a file without a byte
        raise CheckpointError(f"{path}: the file is empty. Download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
