"""Files that are the old ones or the new ones, whatever happens while they are written."""

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file under another name first, and rename it when it is complete.

    Raises:
        OSError: If it cannot be written; what was there before stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)  # noqa: PTH105 (says what it does: one atomic step)
