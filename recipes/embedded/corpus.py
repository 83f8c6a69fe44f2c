"""The embedded teacher's text as a file, which `data.source: embedded` stands for. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ...distill import files
from .text import documents

SEED = 1
"""Other documents than the teacher was trained on (its own seed is 0)."""

DOCUMENTS = 4000


def write_text(path: Path) -> Path:
    """Write the text, documents separated as plain text files separate them; a file that exists is left alone.

    Args:
        path: file to write.

    Returns:
        `path`.
    """
    if not path.exists():
        files.write_text(path, "\n<|endoftext|>\n".join(documents(SEED, DOCUMENTS)) + "\n")
    return path
