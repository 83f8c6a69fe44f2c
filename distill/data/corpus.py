"""The data of a run: opened and tokenised once, held-out documents set apart, a training source per stage."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .documents import Fields, local_files, read_documents
from .feeds import Feed, LocalFeed, StreamFeed
from .source import MixedSource, Source
from .split import in_share, split_documents
from .streams import RecordStream
from .tokenise import Tokens, tokenise

_SCAN = 200_000  # records of a stream searched for held-out documents, at most


@dataclass
class Part:
    """One source of a corpus: its tokens where it is local, else how to open its stream.

    Attributes:
        source: as the user named it.
        weight: its share of the tokens, before normalisation.
        tokens: training documents in memory, or None.
        open_stream: gives a new stream, or None.
        held_out: (fraction, seed) of the stream's documents that are not for training, or None.
    """

    source: str
    weight: float
    tokens: Tokens | None = None
    open_stream: Callable[[], RecordStream] | None = None
    held_out: tuple[float, int] | None = None


@dataclass
class Corpus:
    """Training data of all stages, and the held-out documents (empty where none were asked for)."""

    parts: list[Part]
    valid: Tokens
    tokenizer: Any

    @property
    def train_tokens(self) -> int | None:
        """Tokens of one epoch; None where a part is a stream."""
        counts = [None if part.tokens is None else len(part.tokens.ids) for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    def train(
        self, *, seq_len: int, batch: int, seed: int = 0, pack: bool = True, shuffle_buffer: int = 2048
    ) -> Source:
        """Batches of `batch` rows of `seq_len` tokens (at most, where not packed), from the first one on.

        Another seed gives another order; the held-out documents stay the same.

        Raises:
            UserError: fewer tokens than one row.
        """
        feeds: list[Feed] = []
        fingerprints = []
        for number, part in enumerate(self.parts):
            stream = None
            if part.tokens is not None:
                feeds.append(LocalFeed(part.tokens, seq_len, pack, (seed, number), part.source))
            elif part.open_stream is not None:
                stream = part.open_stream()
                feeds.append(
                    StreamFeed(stream, self.tokenizer, seq_len, pack, (seed, number), shuffle_buffer, part.held_out)
                )
            fingerprints.append(_fingerprint(part, shuffle_buffer, stream))
        identity = {
            "data": fingerprints,
            "weights": [part.weight for part in self.parts],
            "seq_len": seq_len,
            "batch": batch,
            "seed": seed,
            "pack": pack,
        }
        return MixedSource(feeds, [part.weight for part in self.parts], batch, (seed, len(feeds)), identity)


def open_corpus(
    *,
    tokenizer: Any,
    source: str | None = None,
    mix: Mapping[str, float | Mapping[str, Any]] | None = None,
    text: str | None = None,
    messages: str | None = None,
    separator: str = "auto",
    name: str | None = None,
    split: str = "train",
    stream: bool = False,
    valid_source: str | None = None,
    valid_fraction: float = 0.01,
    valid_documents: int = 32,
    valid_tokens: int = 16384,
    valid_seed: int = 0,
) -> Corpus:
    """Open the data of a run. Local sources are read and tokenised now, once; streams when they are drawn from.

    Args:
        tokenizer: the teacher's.
        source: file, folder, glob, or dataset name; exactly one of `source` and `mix`.
        mix: source → share of the tokens, or → {weight, and any of text, messages, separator, name, split, stream} to
            say something else for this source.
        text: field with the text in jsonl, parquet and datasets; "text" where `messages` is not given either.
        messages: field with chat messages. See `Fields` for both.
        separator: what separates documents in plain text files: auto, none, or a string.
        name: configuration of a dataset.
        split: split of a dataset.
        stream: read local jsonl and parquet as a stream too (for what does not fit in memory).
        valid_source: held-out text; otherwise part of every source is held out (`split_documents`; of a stream, the
            documents with the lowest hashes, of which the first are used).
        valid_fraction: share held out; 0 holds out nothing.
        valid_documents: documents held out at least (of each source).
        valid_tokens: tokens held out at least (of each source).
        valid_seed: another seed holds out other documents.

    Raises:
        UserError: bad settings, unreadable or empty data; the message names file and line.
        MachineError: a dataset that cannot be reached.
    """
    if (source is None) == (mix is None):
        raise UserError("data: expected exactly one of source and mix; set e.g. data.source=FILE")
    common = {
        "text": text,
        "messages": messages,
        "separator": separator,
        "name": name,
        "split": split,
        "stream": stream,
    }
    share = 0.0 if valid_source is not None else valid_fraction
    parts, held = [], []
    for place, options in _sources(source, mix).items():
        part, tokens = _open_part(place, {**common, **options}, tokenizer)
        if tokens is not None:
            part.tokens, valid = split_documents(
                tokens,
                share,
                min_documents=valid_documents,
                min_tokens=valid_tokens,
                bos=tokenizer.bos_token_id,
                seed=valid_seed,
            )
            held.append(valid)
        elif share and part.open_stream is not None:
            part.held_out = share, valid_seed
            held.append(_held_out(part, tokenizer, valid_documents, valid_tokens))
        parts.append(part)
    if valid_source is not None:
        _refuse_overlap(valid_source, [part.source for part in parts])
        held.append(read_tokens(valid_source, tokenizer=tokenizer, text=text, messages=messages, separator=separator))
    return Corpus(parts, Tokens.join(held), tokenizer)


def open_train(*, tokenizer: Any, seq_len: int, batch: int, seed: int = 0, pack: bool = True, **data: Any) -> Source:
    """`open_corpus(**data)` and its training source in one call."""
    return open_corpus(tokenizer=tokenizer, **data).train(seq_len=seq_len, batch=batch, seed=seed, pack=pack)


def read_tokens(
    source: str,
    *,
    tokenizer: Any,
    text: str | None = None,
    messages: str | None = None,
    separator: str = "auto",
) -> Tokens:
    """All documents of a local source, tokenised: what an evaluation reads.

    Raises:
        UserError: not a local source, unreadable or empty; the message names file and line.
    """
    files = local_files(source)
    if files is None:
        raise UserError(f"{source}: no such file or folder; expected plain text, .jsonl or .parquet")
    tokens = tokenise(read_documents(files, _fields(text, messages, separator)), tokenizer)
    if not len(tokens):
        raise UserError(
            f"{source}: empty corpus: no document with text (or, in conversations, with a reply of the assistant) in "
            f"{len(files)} file(s); give a source with text"
        )
    return tokens


def _sources(source: str | None, mix: Mapping[str, float | Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    if source is not None:
        return {source: {"weight": 1.0}}
    sources = {}
    for place, given in (mix or {}).items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = options.setdefault("weight", 1.0)
        known = {"weight", "text", "messages", "separator", "name", "split", "stream"}
        if unknown := sorted(set(options) - known):
            raise UserError(f"data.mix: {place}: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"data.mix: {place} has weight {weight!r}; expected a positive number, e.g. 0.5")
        if {"text", "messages"} & set(options):
            # What is said for this source replaces what is said for all: both fields, not one of them.
            options = {"text": None, "messages": None, **options}
        sources[place] = options
    if not sources:
        raise UserError("data.mix is empty; expected SOURCE: SHARE, e.g. data.mix={stories.txt: 0.9, chat.jsonl: 0.1}")
    return sources


def _fields(text: str | None, messages: str | None, separator: str) -> Fields:
    return Fields("text" if text is None and messages is None else text, messages, separator)


def _open_part(place: str, options: dict[str, Any], tokenizer: Any) -> tuple[Part, Tokens | None]:
    part = Part(place, float(options["weight"]))
    files = local_files(place)
    if files is not None and not options["stream"]:
        wanted = {key: options[key] for key in ("text", "messages", "separator")}
        return part, read_tokens(place, tokenizer=tokenizer, **wanted)
    fields = _fields(options["text"], options["messages"], options["separator"])
    part.open_stream = lambda: RecordStream(place, fields, name=options["name"], split=options["split"], files=files)
    return part, None


def _refuse_overlap(valid_source: str, sources: list[str]) -> None:
    held = {path.resolve() for path in local_files(valid_source) or []}
    for source in sources:
        if both := held & {path.resolve() for path in local_files(source) or []}:
            raise UserError(
                f"data.valid={valid_source}: {min(both)} is training data too ({source}); expected other files; "
                "leave data.valid out to hold out a part"
            )


def _held_out(part: Part, tokenizer: Any, documents: int, tokens: int) -> Tokens:
    """The first held-out documents of a stream, enough of them."""
    assert part.open_stream is not None and part.held_out is not None
    stream, (fraction, seed) = part.open_stream(), part.held_out
    found: list[Tokens] = []
    scanned = 0
    while scanned < _SCAN and not stream.exhausted:
        read = tokenise(stream.read(1024), tokenizer)
        scanned += 1024
        held = [d for d in range(len(read)) if in_share(read.document(d), fraction, seed)]
        found.append(read.select(np.array(held, np.int64)))
        if sum(map(len, found)) >= documents and sum(len(part.ids) for part in found) >= tokens:
            break
    valid = Tokens.join(found)
    if not len(valid):
        raise UserError(
            f"{part.source}: none of the first {min(scanned, _SCAN)} records fell into the held-out share of "
            f"{fraction}; set data.valid=FILE, a larger share, or 0 for none"
        )
    return valid


def _fingerprint(part: Part, shuffle_buffer: int, stream: RecordStream | None) -> str:
    """Tells corpora apart: by their tokens, wherever the files are; streams by files, or name, and settings."""
    tokens = part.tokens
    if tokens is None:
        files = stream.fingerprint() if stream is not None else None
        content = "" if files is None else f", files {files}"
        return f"stream of {part.source}{content}, buffer {shuffle_buffer}, held out {part.held_out}"
    check = zlib.crc32(tokens.offsets.tobytes(), zlib.crc32(tokens.ids.tobytes()))
    return f"{len(tokens)} documents, {len(tokens.ids)} tokens, {check:08x}"
