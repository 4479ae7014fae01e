"""`metadata`: up to 16 notes that clients hang on what is kept.

https://platform.openai.com/docs/api-reference/batch/create#batch-create-metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from headrace.api.bounds import at_most
from headrace.errors import InvalidRequestError

MAX_ENTRIES, MAX_KEY, MAX_VALUE = 16, 64, 512


Metadata = Annotated[dict[str, str], at_most(MAX_ENTRIES)]


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Raises InvalidRequestError for more than may be kept."""
    entries = metadata or {}
    if len(entries) > MAX_ENTRIES or any(
        len(key) > MAX_KEY or len(value) > MAX_VALUE for key, value in entries.items()
    ):
        raise InvalidRequestError(
            f"metadata takes at most {MAX_ENTRIES} entries, with keys of at most {MAX_KEY} "
            f"characters and values of at most {MAX_VALUE}.",
            param="metadata",
        )
