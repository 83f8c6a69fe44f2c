"""Training sources: resumed equals straight, mixtures keep their shares, held-out text stays out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from relinear.distill.data.batch import Batch
from relinear.distill.data.corpus import Corpus, open_corpus, open_train, read_tokens
from relinear.distill.data.source import Source
from relinear.distill.data.streams import RecordStream
from relinear.distill.errors import MachineError, UserError


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources whose every document begins with the source's own letter; `a` is longer than what is read at once."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    made = {}
    for letter, count, words in [("a", 150, 12), ("b", 60, 40), ("c", 90, 8)]:
        made[letter] = folder / f"{letter}.jsonl"
        with made[letter].open("w", encoding="utf-8") as file:
            for number in range(count):
                text = f"{letter}{letter} {number} " + f"{letter} " * int(generator.integers(1, 2 * words))
                file.write(json.dumps({"text": text}) + "\n")
    chat = folder / "chat.jsonl"
    turns = [[{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")] for n in range(50)]
    chat.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    return made | {"chat": chat}


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(value, getattr(two, name)) for name, value in vars(one).items())


def stored(state: Any, tensors: list[torch.Tensor]) -> Any:
    """As a checkpoint keeps it: tensors aside, everything else through JSON."""
    if isinstance(state, torch.Tensor):
        tensors.append(state.clone())
        return {"tensor": len(tensors) - 1}
    if isinstance(state, dict):
        return {key: stored(value, tensors) for key, value in state.items()}
    return [stored(value, tensors) for value in state] if isinstance(state, list) else state


def restored(state: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(state, dict):
        if "tensor" in state:
            return tensors[state["tensor"]]
        return {key: restored(value, tensors) for key, value in state.items()}
    return [restored(value, tensors) for value in state] if isinstance(state, list) else state


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    tensors: list[torch.Tensor] = []
    return restored(json.loads(json.dumps(stored(state, tensors))), tensors)


KINDS = {
    "local": {"source": "a"},
    "mixture": {"mix": {"a": 0.6, "b": 0.3, "chat": {"weight": 0.1, "messages": "messages"}}},
    "stream": {"source": "a", "stream": True},
    "mixture with a stream": {"mix": {"a": {"weight": 0.5, "stream": True}, "b": 0.3, "c": 0.2}},
}


def opened(kind: str, files: dict[str, Path], tokenizer: Any, **more: Any) -> Corpus:
    data = dict(KINDS[kind])
    if "source" in data:
        data["source"] = str(files[str(data["source"])])
    if "mix" in data:
        data["mix"] = {str(files[name]): value for name, value in KINDS[kind]["mix"].items()}
    return open_corpus(tokenizer=tokenizer, **{"valid_fraction": 0.0, **data, **more})


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_straight(kind: str, pack: bool, files: dict[str, Path], tokenizer: Any) -> None:
    corpus = opened(kind, files, tokenizer)

    def source() -> Source:
        return corpus.train(seq_len=48, batch=5, seed=3, pack=pack, shuffle_buffer=16)

    straight = source()
    batches, states = [], []
    for _ in range(70):  # several epochs
        states.append(through_a_checkpoint(straight.state_dict()))
        batches.append(straight.next_batch())
    assert not same(batches[0], batches[1])
    for start in (0, 1, 13, 42, 69):
        resumed = source()
        for _ in range(start % 3):  # load into a source that has run already, too
            resumed.next_batch()
        resumed.load_state_dict(states[start])
        for number in range(start, 70):
            assert same(resumed.next_batch(), batches[number]), (start, number)


@pytest.mark.parametrize("kind", KINDS)
def test_taking_batches_ahead_changes_nothing(kind: str, files: dict[str, Path], tokenizer: Any) -> None:
    corpus = opened(kind, files, tokenizer)
    ahead, lazy = (corpus.train(seq_len=48, batch=4) for _ in range(2))
    taken = [ahead.next_batch() for _ in range(20)]
    for batch in taken:
        lazy.state_dict()
        assert same(lazy.next_batch(), batch)
    assert not same(corpus.train(seq_len=48, batch=4, seed=1).next_batch(), taken[0])


def test_local_order_needs_no_history(files: dict[str, Path], tokenizer: Any) -> None:
    corpus = opened("local", files, tokenizer)
    source = corpus.train(seq_len=32, batch=4, seed=9)
    begin = source.state_dict()
    batches = [source.next_batch() for _ in range(30)]
    jumped = corpus.train(seq_len=32, batch=4, seed=9)
    jumped.load_state_dict(begin | {"row": 25 * 4, "feeds": [{"row": 25 * 4}]})
    assert same(jumped.next_batch(), batches[25])


def owners(batch: Batch, tokenizer: Any) -> Iterator[tuple[str, int]]:
    """The letter of each row's text, and its tokens."""
    for ids, real in zip(batch.input_ids, batch.real, strict=True):
        text = tokenizer.decode(ids[real], skip_special_tokens=True)
        yield max("abc", key=text.count), int(real.sum())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_mixture_shares_are_of_tokens(pack: bool, stream: bool, files: dict[str, Path], tokenizer: Any) -> None:
    weights = {"a": 5, "b": 3, "c": 2}
    corpus = open_corpus(
        tokenizer=tokenizer, mix={str(files[k]): w for k, w in weights.items()}, stream=stream, valid_fraction=0
    )
    source = corpus.train(seq_len=64, batch=16, pack=pack)
    counts = dict.fromkeys(weights, 0)
    for _ in range(40):
        for letter, tokens in owners(source.next_batch(), tokenizer):
            counts[letter] += tokens
    total = sum(counts.values())
    for letter, weight in weights.items():
        assert abs(counts[letter] / total - weight / 10) < (0.005 if pack else 0.03)


def texts(source: Source, batches: int, tokenizer: Any) -> set[int]:
    """The numbers of the documents seen."""
    seen: set[int] = set()
    for _ in range(batches):
        batch = source.next_batch()
        for ids, real in zip(batch.input_ids, batch.real, strict=True):
            for piece in tokenizer.decode(ids[real]).split("<s>")[1:]:
                seen.add(int(piece.split()[1]))
    return seen


def test_an_epoch_of_a_stream_is_every_document_once(files: dict[str, Path], tokenizer: Any) -> None:
    source = opened("stream", files, tokenizer).train(seq_len=256, batch=1, pack=False, shuffle_buffer=16)
    orders = []
    for _ in range(2):
        orders.append([next(iter(texts(source, 1, tokenizer))) for _ in range(150)])
        assert sorted(orders[-1]) == list(range(150))
    assert orders[0] != orders[1] and orders[0] != list(range(150))


@pytest.mark.parametrize("kind", ["local", "stream"])
def test_held_out_documents_are_never_trained_on(kind: str, files: dict[str, Path], tokenizer: Any) -> None:
    corpus = opened(kind, files, tokenizer, valid_fraction=0.1)
    held = {int(tokenizer.decode(corpus.valid.document(d)).split()[1]) for d in range(len(corpus.valid))}
    seen = texts(corpus.train(seq_len=128, batch=1, pack=False), 450, tokenizer)
    assert held and not held & seen and held | seen == set(range(150))
    again = opened(kind, files, tokenizer, valid_fraction=0.1)
    assert again.valid.ids.tolist() == corpus.valid.ids.tolist()


def test_held_out_text_of_its_own(files: dict[str, Path], tokenizer: Any) -> None:
    corpus = open_corpus(tokenizer=tokenizer, source=str(files["a"]), valid_source=str(files["c"]))
    assert corpus.valid.ids.tolist() == read_tokens(str(files["c"]), tokenizer=tokenizer).ids.tolist()
    assert corpus.train_tokens == len(read_tokens(str(files["a"]), tokenizer=tokenizer).ids)
    with pytest.raises(UserError, match=r"a.jsonl is training data too"):
        open_corpus(tokenizer=tokenizer, source=str(files["a"]), valid_source=str(files["a"].parent / "*.jsonl"))


def test_targets_of_conversations(files: dict[str, Path], tokenizer: Any) -> None:
    source = open_train(
        tokenizer=tokenizer, seq_len=64, batch=4, source=str(files["chat"]), messages="messages", valid_fraction=0
    )
    batch = source.next_batch()
    text = tokenizer.decode(batch.input_ids[batch.targets])
    assert "assistant" in text and "user" not in text and 0 < batch.targets.sum() < batch.tokens


def test_parquet_streams_too(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"aa {number} " + "a " * 9, "other": number} for number in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_train(
        tokenizer=tokenizer,
        seq_len=64,
        batch=1,
        pack=False,
        source=str(tmp_path / "a.parquet"),
        stream=True,
        valid_fraction=0,
    )
    assert texts(source, 40, tokenizer) == set(range(40))


def test_resuming_with_other_data_is_refused(files: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    copy = tmp_path / "a.jsonl"
    copy.write_text(files["a"].read_text(encoding="utf-8"), encoding="utf-8")

    def source(**more: Any) -> Source:
        settings = {"seq_len": 32, "batch": 4, **more}
        return open_train(tokenizer=tokenizer, source=str(copy), valid_fraction=0, **settings)

    state = source().state_dict()
    source().load_state_dict(state)
    moved = open_train(tokenizer=tokenizer, source=str(files["a"]), valid_fraction=0, seq_len=32, batch=4)
    moved.load_state_dict(state)  # the same text elsewhere is the same data
    for setting, value in [("seq_len", 48), ("batch", 8), ("seed", 1), ("pack", False)]:
        with pytest.raises(UserError, match=f"made with {setting} .* now it is {value}"):
            source(**{setting: value}).load_state_dict(state)
    with copy.open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"made with data .* documents"):
        source().load_state_dict(state)


def test_empty_and_short_data(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("Tom went.", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n', encoding="utf-8")
    (tmp_path / "short.jsonl").write_text('{"text": "Tom went."}\n', encoding="utf-8")

    def source(name: str, **more: Any) -> Source:
        return open_train(tokenizer=tokenizer, seq_len=64, batch=2, source=str(tmp_path / name), **more)

    with pytest.raises(UserError, match=r"empty.txt: empty corpus"):
        source("empty.txt")
    with pytest.raises(UserError, match=r"short.txt: \d+ tokens to train on, fewer than one sequence of 64"):
        source("short.txt")
    for name in ("empty.jsonl", "short.jsonl"):
        with pytest.raises(UserError, match=rf"{name}: \d+ tokens to train on, fewer than one sequence"):
            source(name, stream=True, valid_fraction=0).next_batch()
    with pytest.raises(UserError, match=r"short.jsonl: none of the first .* data.valid=FILE"):
        source("short.jsonl", stream=True)
    with pytest.raises(UserError, match=r"short.txt; to stream, expected only"):
        source("short.txt", stream=True, valid_fraction=0)


def test_bad_stream_records_name_their_number(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "x"}\n', encoding="utf-8")
    source = open_train(tokenizer=tokenizer, seq_len=8, batch=1, source=str(file), stream=True, valid_fraction=0)
    with pytest.raises(UserError, match=r"a.jsonl, record 1: no field 'text'; found fields: body"):
        source.next_batch()
    file.write_text('{"text": "x"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl: the dataset cannot be read"):
        open_train(
            tokenizer=tokenizer, seq_len=8, batch=1, source=str(file), stream=True, valid_fraction=0
        ).next_batch()


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ConnectionError("offline"), MachineError, "no such dataset can be reached"),
        (ValueError("Bad split: nope"), UserError, r"data.split"),
        ("missing", UserError, "neither a local file or folder nor a dataset"),
    ],
)
def test_datasets_that_cannot_be_had(
    raised: Any, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    from relinear.distill.data.documents import Fields

    def refuse(*_: Any, **__: Any) -> Callable[..., Any]:
        raise DatasetNotFoundError("no such") if raised == "missing" else raised

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(expected, match=message) as caught:
        RecordStream("someone/something", Fields())
    assert str(caught.value).startswith("someone/something")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "exactly one of source and mix"),
        ({"source": "x.txt", "mix": {"x.txt": 1}}, "exactly one of source and mix"),
        ({"mix": {}}, "data.mix is empty"),
        ({"mix": {"x.txt": 0}}, "x.txt has weight 0; expected a positive number"),
        ({"mix": {"x.txt": "half"}}, "x.txt has weight 'half'"),
        ({"mix": {"x.txt": {"wieght": 1}}}, "x.txt: unknown wieght"),
    ],
)
def test_bad_settings(data: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=message):
        open_corpus(tokenizer=tokenizer, **data)


def test_evaluation_reads_local_text_only(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="wikitext: no such file"):
        read_tokens("wikitext", tokenizer=tokenizer)


def test_a_file_that_changes_while_it_is_streamed_is_found(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    lines = [json.dumps({"text": f"Story {number}. The fox saw the {number} hens."}) for number in range(400)]
    path.write_text("\n".join(lines))

    def opened() -> Any:
        given = {"source": str(path), "stream": True, "valid_fraction": 0.0}
        return open_corpus(tokenizer=tokenizer, **given).train(seq_len=16, batch=2, shuffle_buffer=8)

    source = opened()
    source.next_batch()
    state = source.state_dict()
    path.write_text("\n".join([*lines[:-1], json.dumps({"text": "Another end."})]))
    with pytest.raises(UserError, match=r"stories\.jsonl: changed while the run was reading it"):
        for _ in range(60):
            source.next_batch()
    with pytest.raises(UserError, match=r"data: the checkpoint was made with data .*files"):
        opened().load_state_dict(state)
    path.unlink()
    with pytest.raises(UserError, match=r"stories\.jsonl: gone or unreadable|no such file"):
        for _ in range(60):
            source.next_batch()
