"""Held-out text that needs not be named: what a run set apart, or new documents of the embedded teacher's kind.

Torch-free until the text is read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..distill import files, run_folder
from ..distill.data.documents import SEPARATOR, local_files
from ..distill.digest import checksum, files_fingerprint, value_digest
from ..distill.errors import UserError
from ..distill.teacher import read_config
from ..eval.texts import Text
from . import loader
from .embedded import text as embedded
from .plan import window
from .schema import EMBEDDED, Recipe
from .teacher_config import locate

TOKENS = 200_000
"""Held-out tokens of a run that are measured at its end, at most."""

SEED, DOCUMENTS = 3, 200
LABEL = "held out by the run"


def run_text(run: Path, folder: Path) -> Text:
    """The documents that a run set apart, as it measures them at its end.

    Args:
        run: its folder.
        folder: where plain files of it are written, if they are needed.

    Raises:
        UserError: the run set nothing apart.
    """
    recipe = loader.load(str(run / "recipe.yaml"))
    if recipe.data.valid == 0:
        raise UserError(f"--text FILE: {run} set no held-out text apart (data.valid: 0). Add --text FILE")
    context = read_config(run / "export")["max_position_embeddings"]
    return recipe_text(recipe, context, run, folder)


def recipe_text(recipe: Recipe, context: int, run: Path, folder: Path) -> Text:
    """`run_text` of a recipe that is loaded, for models of that context."""
    read = partial(_run_tokens, recipe, run)
    return Text(
        LABEL, _digest(recipe), read, partial(_decoded, read, run, folder), window(recipe.data.seq_len, context)[0]
    )


def embedded_text(folder: Path) -> Text:
    """New documents of the kind that the embedded teacher knows, which neither it nor a quickstart was trained on.

    Args:
        folder: where they are written as a file.
    """
    path = folder / "text" / "embedded-valid.txt"

    def written() -> list[Path]:
        if not path.exists():
            files.write_text(path, f"\n{SEPARATOR}\n".join(embedded.documents(SEED, DOCUMENTS, "valid")) + "\n")
        return [path]

    def tokens(tokenizer: Any) -> Any:
        from ..distill.data.corpus import read_tokens

        return read_tokens(str(written()[0]), tokenizer=tokenizer)

    return Text("embedded", value_digest(["embedded", SEED, DOCUMENTS]), tokens, written)


def knows_embedded(folder: Path) -> bool:
    """Whether a checkpoint has the embedded teacher's tokenizer, byte for byte."""
    ours, theirs = Path(locate(EMBEDDED)) / "tokenizer.json", folder / "tokenizer.json"
    return theirs.is_file() and checksum(ours) == checksum(theirs)


def _run_tokens(recipe: Recipe, run: Path, tokenizer: Any) -> Any:
    from .session import embedded_text as toy_text
    from .session import open_data

    if recipe.data.source == EMBEDDED:
        toy_text(run)
    try:
        corpus = open_data(recipe, tokenizer, run)
    except UserError as error:
        raise UserError(
            f"{run}: its held-out text cannot be had again ({error}). Name other text: --text FILE"
        ) from None
    if not len(corpus.valid):
        raise UserError(f"--text FILE: {run} set no held-out text apart. Add --text FILE")
    return corpus.valid.head(TOKENS)


def _decoded(read: partial[Any], run: Path, folder: Path) -> list[Path]:
    """The documents as a plain text file, for suites that cut their own windows."""
    from ..distill.teacher import load_tokenizer

    path = folder / "text" / "held-out.txt"
    if not path.exists():
        record = run_folder.read(run)
        export = run / "export"
        source = export if (export / "tokenizer.json").exists() else Path(record["teacher"]["folder"])
        tokenizer = load_tokenizer(source, 2**31)
        tokens = read(tokenizer)
        texts = (tokenizer.decode(tokens.document(i), skip_special_tokens=True) for i in range(len(tokens)))
        files.write_text(path, f"\n{SEPARATOR}\n".join(texts) + "\n")
    return [path]


def _digest(recipe: Recipe) -> str:
    """Of what decides which documents are held out; of local files their content."""
    data = recipe.data
    named = [data.source] if data.source is not None else list(data.mix or {})
    named += [data.valid] if isinstance(data.valid, str) else []
    found = [local_files(name) if name != EMBEDDED else None for name in named]
    contents = [None if paths is None else files_fingerprint(paths) for paths in found]
    return value_digest([recipe.to_dict()["data"], contents])
