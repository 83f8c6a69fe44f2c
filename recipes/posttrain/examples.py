"""From a recipe's data to the records that TRL takes, checked one by one, and the held-out ones set aside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...distill.data.documents import Document, local_files, read_records
from ...distill.errors import UserError
from . import arithmetic
from .schema import ARITHMETIC, PosttrainRecipe

FIELDS = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt", "answer")}
"""Of a record of each method; sft takes `messages` alone too."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """What a run trains on and what it is measured on.

    Attributes:
        train, valid: records of `FIELDS`, or of `messages`.
        chat: they hold messages, not texts.
    """

    train: list[Record]
    valid: list[Record]
    chat: bool


def open_examples(recipe: PosttrainRecipe) -> Examples:
    """All examples of a recipe.

    Raises:
        UserError: no such source, a record that does not fit the method, too few of them; file and line are named.
        MachineError: a Hub dataset cannot be reached.
    """
    data = recipe.data
    if data.source == ARITHMETIC and data.arithmetic is not None:
        found = list(enumerate(arithmetic.examples(recipe.method, data.arithmetic, recipe.seed), 1))
        records = [(f"{ARITHMETIC}, problem {number}", record) for number, record in found]
    else:
        records = list(islice(_records(recipe, data.source, "data.source"), data.limit))
    checked = _checked(recipe.method, records)
    if isinstance(data.valid, str):
        train = checked
        valid = _checked(recipe.method, list(islice(_records(recipe, data.valid, "data.valid"), data.limit)))
    else:
        train, valid = split(checked, data.valid)
    for part, what in ((train, "to train on"), (valid, "held out")):
        if not part:
            raise UserError(
                f"{recipe.place('data.source')}: {len(checked)} examples, none of them {what}. Give more, or another "
                "share to hold out: data.valid=0.2"
            )
    return Examples(train, valid, _is_chat(train[0]))


def split(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(train, held out): the examples whose prompts have the lowest hashes are held out, `share` of them.

    The choice depends on the prompts alone, not on their order, and examples of one prompt fall on the same side.
    """
    hashes = [_hash(record) for record in records]
    held = set(sorted(set(hashes))[: max(1, round(share * len(set(hashes))))])
    train = [record for record, own in zip(records, hashes, strict=True) if own not in held]
    return train, [record for record, own in zip(records, hashes, strict=True) if own in held]


def _hash(record: Record) -> bytes:
    asked = record.get("prompt", record.get("messages"))
    return hashlib.blake2b(
        json.dumps(asked, sort_keys=True, ensure_ascii=False).encode("utf-8"), digest_size=8
    ).digest()


def _records(recipe: PosttrainRecipe, source: str, key: str) -> Iterator[tuple[str, Any]]:
    try:
        files = local_files(source)
    except UserError as error:
        raise UserError(f"{recipe.place(key)}: {error}") from None
    if files is not None:
        wanted = {".jsonl", ".ndjson", ".json", ".parquet"}
        yield from read_records([path for path in files if path.suffix.lower() in wanted] or files)
        return
    from ...distill.data.streams import load_stream, reading

    stream = load_stream(source, source, split=recipe.data.split)
    for number, record in enumerate(reading(source, stream), 1):
        yield f"{source}, record {number}", record


def _checked(method: str, records: Iterable[tuple[str, Any]]) -> list[Record]:
    """The fields that a method reads, of records that all have them in the same form."""
    made: list[Record] = []
    first = ""
    for place, record in records:
        own = _fields(method, place, record)
        form = _form(method, place, own)
        if first and form != first:
            raise UserError(f"{place}: holds {form}, the examples before it {first}; all of a source are of one kind")
        first = form
        made.append(own)
    return made


def _fields(method: str, place: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with fields, found {type(record).__name__}")
    if method == "sft" and "messages" in record and "completion" not in record:
        return {"messages": record["messages"], "place": place}
    missing = [name for name in FIELDS[method] if record.get(name) is None]
    if missing:
        also = " or messages" if method == "sft" else ""
        found = ", ".join(sorted(map(str, record))) or "none"
        raise UserError(
            f"{place}: no field {', '.join(missing)}; {method} reads {', '.join(FIELDS[method])}{also}. Found: {found}"
        )
    return {name: record[name] for name in FIELDS[method]}


def _form(method: str, place: str, record: Record) -> str:
    """`messages`, `messages alone` or `texts`, of a record whose fields agree."""
    if "messages" in record:
        _check_messages(place, "messages", record["messages"])
        return "messages alone"
    kinds = {}
    for name in FIELDS[method]:
        value = record[name]
        if name == "answer":
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                raise UserError(f"{place}: answer is {value!r}, expected a number or a text")
            record[name] = str(value)
        elif isinstance(value, list):
            _check_messages(place, name, value)
            kinds[name] = "messages"
        elif isinstance(value, str) and value:
            kinds[name] = "texts"
        else:
            raise UserError(f"{place}: {name} is {str(value)[:40]!r}, expected a text or a list of {{role, content}}")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{place}: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}; write all alike")
    return kinds["prompt"]


def _check_messages(place: str, name: str, value: Any) -> None:
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
    if not good:
        raise UserError(f"{place}: {name} is {str(value)[:60]!r}, expected a list of {{role, content}}, both texts")


def _is_chat(record: Record) -> bool:
    return "messages" in record or isinstance(record["prompt"], list)


def set_template(recipe: PosttrainRecipe, tokenizer: Any, chat: bool) -> str | None:
    """Give the tokenizer the recipe's chat template; refuse chats without any.

    Returns:
        The recipe's template, where there is one.

    Raises:
        UserError: no chat template although the examples are messages, a file that cannot be read or is no template;
            or a tokenizer without a mark for the end.
    """
    given = None
    if recipe.data.chat_template is not None:
        given = _template(recipe.place("data.chat_template"), Path(recipe.data.chat_template).expanduser(), tokenizer)
    if chat and not tokenizer.chat_template:
        plain = " (data.arithmetic.chat=false)" if recipe.data.source == ARITHMETIC else ""
        raise UserError(
            f"{recipe.place('data.source')}: the examples are chat messages, and the tokenizer of {recipe.model} has "
            "no chat template. Give one: data.chat_template=FILE; or write "
            f"{' and '.join(FIELDS[recipe.method])} as plain texts{plain}"
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"{recipe.model}: its tokenizer names no eos_token, so a completion would never end. Write one into its "
            "tokenizer_config.json"
        )
    return given


def _template(place: str, path: Path, tokenizer: Any) -> str:
    import jinja2

    try:
        text = tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except OSError as error:
        raise UserError(f"{place}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{place}: {path} is not UTF-8 text; expected a chat template") from None
    except jinja2.TemplateError as error:
        raise UserError(f"{place}: {path} is no chat template ({error})") from None
    return text


def tokenised(records: list[Record], tokenizer: Any) -> list[Record]:
    """Conversations as {input_ids, labels}, with labels on the assistant's tokens alone (-100 elsewhere)."""
    from ...distill.data.tokenise import tokenise

    made = tokenise((Document(record["messages"], record["place"]) for record in records), tokenizer)
    rows = []
    for start, stop in zip(made.offsets[:-1], made.offsets[1:], strict=True):
        ids, scored = made.ids[start:stop].tolist(), made.scored[start:stop].tolist()
        labels = [token if counts else -100 for token, counts in zip(ids, scored, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows
