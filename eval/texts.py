"""The held-out text of an evaluation: files that the user names, or what a run set apart. Read when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.digest import files_fingerprint
from ..distill.errors import UserError


@dataclass(frozen=True)
class Text:
    """Held-out text, not read yet.

    Attributes:
        label: what it is, for settings and messages.
        digest: of its content.
        tokens: tokenizer -> its documents as `distill.data.tokenise.Tokens`.
        files: () -> the same as plain text files.
        seq_len: window for it, if shorter than the models' context.
    """

    label: str
    digest: str
    tokens: Callable[[Any], Any]
    files: Callable[[], list[Path]]
    seq_len: int | None = None


def text_files(source: str) -> Text:
    """The text of a file, folder or glob.

    Raises:
        UserError: no such file or folder.
    """
    from ..distill.data.documents import local_files

    found = local_files(source)
    if found is None:
        raise UserError(f"{source}: no such file or folder; evaluation reads local text, .jsonl or .parquet files")
    paths = found

    def tokens(tokenizer: Any) -> Any:
        from ..distill.data.documents import Fields, read_documents
        from ..distill.data.tokenise import tokenise

        return tokenise(read_documents(paths, Fields()), tokenizer)

    return Text(source, files_fingerprint(paths), tokens, lambda: paths)
