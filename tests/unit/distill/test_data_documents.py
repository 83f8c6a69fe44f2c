"""Sources to documents: what separates documents, which fields are read, and every message about bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.data.documents import Fields, local_files, read_documents
from relinear.distill.errors import UserError

EOT = "<|endoftext|>"


def read(path: Path | str, **fields: Any) -> list[Any]:
    files = local_files(str(path))
    assert files is not None
    return [document.content for document in read_documents(files, Fields(**fields))]


def refused(path: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "separator", "documents"),
    [
        pytest.param(f"a\n{EOT}\nb\n{EOT}\n", "auto", ["a", "b"], id="on lines of their own"),
        pytest.param(f"a.{EOT}b.{EOT}", "auto", ["a.", "b."], id="between stories on one line"),
        pytest.param(
            f"{EOT}\na\n\nstill a\n{EOT}\n\n{EOT}\nb", "auto", ["a\n\nstill a", "b"], id="blank ones left out"
        ),
        pytest.param("a\n\nb\n---\nc", "auto", ["a\n\nb\n---\nc"], id="none in the file: one document"),
        pytest.param(f"a\n{EOT}\nb", "none", [f"a\n{EOT}\nb"], id="none asked for"),
        pytest.param("a\n---\nb\n---\n", "\n---\n", ["a", "b"], id="own string"),
        pytest.param(f"a\n\nb {EOT} b\n\nc", "\n\n", ["a", f"b {EOT} b", "c"], id="own string replaces the default"),
        pytest.param(f"a\r\n{EOT}\r\nb\r\nb", "auto", ["a", "b\nb"], id="windows line ends"),
        pytest.param(f"\ufeffa{EOT}\u00e9\u4e2d", "auto", ["a", "\u00e9\u4e2d"], id="byte order mark"),
        pytest.param("", "auto", [], id="empty"),
    ],
)
def test_separator(tmp_path: Path, content: str, separator: str, documents: list[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content.encode("utf-8"))
    assert read(file, separator=separator) == documents


def test_separator_across_the_chunks_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text"
    file.write_text(f"one\n{EOT}\ntwo two{EOT}three", encoding="utf-8")
    for chunk in range(1, 20):
        monkeypatch.setattr("relinear.distill.data.documents._CHUNK", chunk)
        assert read(file) == ["one", "two two", "three"]


def test_records_of_every_kind(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    records = [{"text": f"story {i} {EOT}", "other": i} for i in range(5)]
    expected = [record["text"] for record in records]
    assert read(lines(tmp_path / "a.jsonl", *records)) == expected
    assert read(lines(tmp_path / "b.json", *records)) == expected
    (tmp_path / "c.json").write_text(" \n" + json.dumps(records, indent=1), encoding="utf-8")
    assert read(tmp_path / "c.json") == expected
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == expected
    assert read(lines(tmp_path / "e.jsonl", {"body": "x"}, {"body": " "}), text="body") == ["x"]


def test_messages_beside_texts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = lines(tmp_path / "a.jsonl", {"text": "t"}, {"messages": messages, "text": "unused"}, {"messages": []})
    assert read(file, text="text", messages="messages") == ["t", messages]
    assert "no field 'messages'" in refused(file, text=None, messages="messages")


def test_folders_and_globs_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden.txt", "picture.png", "odd.story"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read(tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert read(f"{tmp_path}/*.story") == ["odd.story"]
    assert read(f"{tmp_path}/**/*.txt") == ["b.txt", "sub/c.txt"]
    assert read(tmp_path / "odd.story") == ["odd.story"]


@pytest.mark.parametrize("name", ["roneneldan/TinyStories", "mlfoundations/dclm-baseline-1.0", "wikitext"])
def test_dataset_names_are_not_local(name: str) -> None:
    assert local_files(name) is None


@pytest.mark.parametrize("name", ["gone.txt", "./gone", "/gone/away", "a/b/c", "stories/train.jsonl", "~/gone"])
def test_missing_files_are_named(name: str) -> None:
    message = refused(name)
    assert message.startswith(f"{name}: no such file or folder") and "data.source" in message


def test_missing_file_in_an_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    assert "stories/gone: no such file" in refused("stories/gone")


def test_nothing_in_a_folder_or_pattern(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    assert "no data files" in refused(tmp_path)
    assert "no file matches" in refused(f"{tmp_path}/*.txt")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text", encoding="utf-8")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refused(file).startswith(f"{file}: cannot be read (Permission denied)")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_undecodable_text(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"latin{suffix}"
    file.write_bytes("caf\u00e9 au lait".encode("latin-1"))
    message = refused(file)
    assert message.startswith(f"{file}: not UTF-8 text (byte 0xe9)") and "iconv" in message


def test_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\0cd")
    assert f"{tmp_path}/a.txt: binary data" in refused(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    assert "a.parquet: not a readable parquet file" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("second", "fields", "expected"),
    [
        ('{"text": "a"', {}, ":2: not valid JSON"),
        ("[1, 2]", {}, ":2: expected an object with fields, found list"),
        ('{"body": "a", "id": 1}', {}, ":2: no field 'text'; found fields: body, id; set data.text"),
        ('{"text": 5}', {}, ":2: field 'text' is int, expected a string"),
        ('{"text": null}', {}, ":2: field 'text' is NoneType, expected a string"),
        ('{"text": [{"role": "user"}]}', {}, "set data.messages"),
        ('{"m": "hi"}', {"text": None, "messages": "m"}, ":2: field 'm' is str, expected a list"),
        ('{"text": "a"}', {"text": None, "messages": "m"}, ":2: no field 'm'; found fields: text; set data.messages"),
        ('{"body": "a"}', {"messages": "m"}, ":2: no field 'm' or 'text'; found fields: body; set data.text"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path: Path, second: str, fields: dict[str, Any], expected: str) -> None:
    first = {"text": "fine", "m": [{"role": "user", "content": "fine"}]}
    message = refused(lines(tmp_path / "a.jsonl", first, second), **fields)
    assert message.startswith(str(tmp_path / "a.jsonl")) and expected in message


def test_missing_parquet_column_names_those_found(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert "row 1: no field 'text'; found fields: body, id" in refused(tmp_path / "a.parquet")


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="neither text nor messages"):
        Fields(text=None)
    with pytest.raises(UserError, match="separator is empty"):
        Fields(separator="")
