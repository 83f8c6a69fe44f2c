"""From a source to documents: local text, jsonl and parquet.

A source is a file, a folder, a glob, or else the name of a dataset for `datasets` (streams.py). What a file holds is
told by its name: `.jsonl`/`.ndjson` (one object per line), `.json` (the same, or one list), `.parquet` (one row per
document); everything else is plain text, UTF-8. A folder gives its data files (`_IN_FOLDERS`), in sorted order.

Plain text is split into documents at every `<|endoftext|>` (`separator: auto`), wherever it stands: on a line of its
own or between two stories on one line. Another string can be the separator, and `none` makes a file one document. The
separator and the white space around a document are not part of it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import UserError

T = TypeVar("T")

SEPARATOR = "<|endoftext|>"
"""What `separator: auto` stands for."""

_IN_FOLDERS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".parquet")
_LINES = (".jsonl", ".ndjson", ".json")
_CHUNK = 16 * 2**20  # characters read at once


class Document(NamedTuple):
    """One document: a text, or the messages of one conversation, and where it was found (for error messages)."""

    content: str | list[dict[str, Any]]
    place: str


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold the document, and what separates documents in plain text.

    Attributes:
        text: field with a text.
        messages: field with a list of {role, content} (or {from, value}). Where both are named, a record that has the
            messages field is a conversation and any other a text.
        separator: `auto`, `none`, or the string that stands between documents of a plain text file.
    """

    text: str | None = "text"
    messages: str | None = None
    separator: str = "auto"

    def __post_init__(self) -> None:
        if not self.text and not self.messages:
            raise UserError("data: neither text nor messages names a field; set data.text=FIELD or data.messages=FIELD")
        if not self.separator:
            raise UserError("data.separator is empty; expected auto, none or a string, e.g. data.separator=none")


def local_files(source: str) -> list[Path] | None:
    """The files of a local source in sorted order; None where it can only be the name of a dataset.

    A local file or folder comes before a dataset of the same name.

    Raises:
        UserError: a path that does not exist, a glob without a match, a folder without data files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)) and file.is_file())
        if not files:
            raise UserError(
                f"{source}: no data files in this folder; expected files ending in {', '.join(_IN_FOLDERS)}; "
                f'name other text files by a glob, e.g. data.source="{source.rstrip("/")}/*"'
            )
        return files
    if path.exists():
        return [path]
    if any(sign in source for sign in "*?["):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise UserError(f"{source}: no file matches this pattern; see what is there with: ls {path.parent}")
        return files
    if _looks_local(source):
        raise UserError(
            f"{source}: no such file or folder; expected plain text, .jsonl, .parquet, a folder or a glob of those, "
            "or the name of a dataset; set data.source to an existing path"
        )
    return None


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in _IN_FOLDERS and not any(part.startswith(".") for part in path.parts)


def _looks_local(source: str) -> bool:
    """A path rather than `name` or `organisation/name` (which may end in a version such as -1.0)."""
    path = Path(source)
    if source.startswith((".", "~", "/")) or len(path.parts) > 2 or path.suffix.lower() in _IN_FOLDERS:
        return True
    return path.parent.is_dir() if len(path.parts) == 2 else bool(path.suffix)


def read_documents(files: list[Path], fields: Fields) -> Iterator[Document]:
    """Every document of the files, in order; blank ones are left out.

    Raises:
        UserError: an unreadable or undecodable file, invalid JSON, a missing field; file and line are named.
    """
    for path in files:
        if path.suffix.lower() in (*_LINES, ".parquet"):
            for place, record in read_records([path], [name for name in (fields.text, fields.messages) if name]):
                if document := record_document(record, fields, place):
                    yield document
        else:
            yield from _readable(path, _text_documents(path, fields.separator))


def read_records(files: list[Path], columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of jsonl, json and parquet files, in order.

    Args:
        files: what they hold is told by their names.
        columns: of parquet, those that are read, where the file has one of them; all otherwise.

    Raises:
        UserError: another kind of file, an unreadable one, invalid JSON; file and line are named.
    """
    for path in files:
        suffix = path.suffix.lower()
        if suffix in _LINES:
            yield from _readable(path, _json_records(path))
        elif suffix == ".parquet":
            yield from _readable(path, _parquet_records(path, columns))
        else:
            raise UserError(f"{path}: expected records, in a file that ends in {', '.join((*_LINES, '.parquet'))}")


def _readable(path: Path, found: Iterator[T]) -> Iterator[T]:
    """What reading a file gives, with the errors of the file system and of its encoding in our words."""
    try:
        yield from found
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); expected plain text, .jsonl or "
            f".parquet; if it is text in another encoding: iconv -f LATIN1 -t UTF-8 {path} > {path.stem}.utf8.txt"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); expected a readable file; look with: ls -l {path}"
        ) from None


def record_document(record: Any, fields: Fields, place: str) -> Document | None:
    """The document of one record of a jsonl, parquet or streamed source; None where it is blank.

    Raises:
        UserError: the field is missing or holds something else; place and the fields found are named.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with fields, found {type(record).__name__}; wrap it as an object")
    if fields.messages and (fields.messages in record or not fields.text):
        messages = _field(record, "messages", place, fields.messages)
        if not isinstance(messages, list):
            raise UserError(
                f"{place}: field {fields.messages!r} is {type(messages).__name__}, expected a list of "
                "{role, content}; set data.messages to another field"
            )
        return Document(messages, place) if messages else None
    text = _field(record, "text", place, fields.text or "", fields.messages)
    if not isinstance(text, str):
        hint = "data.messages" if isinstance(text, list) else "data.text"
        raise UserError(
            f"{place}: field {fields.text!r} is {type(text).__name__}, expected a string; set {hint} to its field"
        )
    return Document(text, place) if text.strip() else None


def _field(record: dict[str, Any], setting: str, place: str, name: str, other: str | None = None) -> Any:
    if name in record:
        return record[name]
    missing = f"{name!r}" if other is None else f"{other!r} or {name!r}"
    found = ", ".join(sorted(map(str, record))) or "none"
    raise UserError(f"{place}: no field {missing}; found fields: {found}; set data.{setting} to one of them")


def _text_documents(path: Path, separator: str) -> Iterator[Document]:
    mark = {"auto": SEPARATOR, "none": None}.get(separator, separator)
    for number, text in enumerate(_pieces(path, mark), 1):
        if text := text.strip():
            yield Document(text, f"{path}, document {number}")


def _pieces(path: Path, mark: str | None) -> Iterator[str]:
    """The text between marks. Reads in chunks: files may be larger than what their documents should occupy at once."""
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(_CHUNK):
            if "\0" in chunk:
                raise UserError(f"{path}: binary data, not text; expected UTF-8 plain text, .jsonl or .parquet")
            rest += chunk
            if mark is not None:
                *whole, rest = rest.split(mark)
                yield from whole
    yield rest


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if path.suffix.lower() == ".json" and start == "[":
            for number, record in enumerate(_parse(file.read(), str(path)), 1):
                yield f"{path}, record {number}", record
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            yield place, _parse(line, place)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}); expected one JSON object per line; "
            "correct or remove it"
        ) from None
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deeply; expected one JSON object per line") from None


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        wanted = [name for name in columns if name in file.schema_arrow.names]
        # Without any, whoever asked can name the fields that there are.
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted or None):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable parquet file ({first}); expected parquet; write it anew") from None
