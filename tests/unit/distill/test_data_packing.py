"""Rows and batches against a slow reading of the definitions; the order of local data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relinear.distill.data.batch import Batch
from relinear.distill.data.feeds import LocalFeed
from relinear.distill.data.packing import Rows, make_batch, padded_rows, place_rows
from relinear.distill.data.tokenise import Tokens
from relinear.distill.errors import UserError

BOS = 1


def corpus(lengths: list[int], seed: int = 0) -> Tokens:
    """Documents of BOS and ids that are all different, some of which may not be targets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(100, 100 + offsets[-1], dtype=np.int32)
    ids[offsets[:-1]] = BOS
    scored = np.random.default_rng(seed).random(len(ids)) < 0.8
    scored[offsets[:-1]] = False
    return Tokens(ids, offsets, scored)


def check(batch: Batch, tokens: Tokens) -> None:
    """Everything that `Batch` promises, position by position; pieces must be runs of one document."""
    scored = {int(i): bool(s) for i, s in zip(tokens.ids, tokens.scored, strict=True)}
    owner = {int(i): d for d in range(len(tokens)) for i in tokens.document(d)}
    rows, width = batch.shape
    for r in range(rows):
        assert batch.segments[r, 0] == 0 and batch.position_ids[r, 0] == 0
        for t in range(width):
            token, position = int(batch.input_ids[r, t]), int(batch.position_ids[r, t])
            before = int(batch.input_ids[r, t - 1]) if t else None
            if not batch.real[r, t]:
                assert position == 0 and not batch.targets[r, t]
                assert not t or batch.segments[r, t] == batch.segments[r, t - 1] + 1
                assert t + 1 == width or not batch.real[r, t + 1]
                continue
            starts = t == 0 or token == BOS
            if not starts:
                assert before is not None and batch.real[r, t - 1]
                assert token == before + 1 or (before == BOS and tokens.document(owner[token])[1] == token)
                assert position == batch.position_ids[r, t - 1] + 1
                assert batch.segments[r, t] == batch.segments[r, t - 1]
            else:
                assert position == 0
                assert not t or batch.segments[r, t] == batch.segments[r, t - 1] + 1
            assert bool(batch.targets[r, t]) == (not starts and scored[token])


def take_epoch(feed: LocalFeed, tokens: int) -> np.ndarray:
    """The ids of so many tokens, from the feed's place on."""
    out: list[np.ndarray] = []
    while sum(map(len, out)) < tokens:
        rows = feed.take(3)
        out += [rows.ids[r, : rows.lengths[r]] for r in range(3)]
    return np.concatenate(out)[:tokens]


LENGTHS = [5, 1, 17, 40, 2, 3, 9, 30, 8, 8, 1, 21]


@pytest.mark.parametrize("seq_len", [2, 7, 16, 64, 144, 145])  # of 145 tokens in all
def test_packed_rows_are_full_and_know_their_borders(seq_len: int) -> None:
    tokens = corpus(LENGTHS)
    feed = LocalFeed(tokens, seq_len, True, (0, 0), "x")
    for _ in range(10):
        batch = make_batch(feed.take(4))
        assert batch.shape == (4, seq_len) and batch.tokens == 4 * seq_len
        check(batch, tokens)


@pytest.mark.parametrize("seq_len", [2, 7, 16, 64])
def test_padded_rows_are_one_piece_each(seq_len: int) -> None:
    tokens = corpus(LENGTHS)
    feed = LocalFeed(tokens, seq_len, False, (0, 0), "x")
    for _ in range(10):
        batch = make_batch(feed.take(4))
        assert batch.real[:, 1].all() and batch.shape[1] == batch.real.sum(1).max()
        assert (batch.segments.masked_fill(~batch.real, 0) == 0).all()
        check(batch, tokens)


def test_every_token_once_per_epoch_and_another_order_in_the_next() -> None:
    tokens = corpus(LENGTHS)
    total = len(tokens.ids)
    feed = LocalFeed(tokens, 16, True, (0, 0), "x")
    first, second = np.split(take_epoch(feed, 2 * total), 2)
    assert sorted(first) == sorted(second) == sorted(tokens.ids)
    assert first.tolist() != second.tolist()
    other = take_epoch(LocalFeed(tokens, 16, True, (1, 0), "x"), total)
    assert other.tolist() != first.tolist()
    documents = [tokens.document(d).tolist() for d in range(len(tokens))]
    begins = np.flatnonzero(first == BOS)
    found = [piece.tolist() for piece in np.split(first, begins[1:])]
    assert sorted(found) == sorted(documents)


def test_padded_epochs_hold_every_window_once() -> None:
    tokens = corpus(LENGTHS)
    feed = LocalFeed(tokens, 16, False, (0, 0), "x")
    windows = sum(n // 16 + (n % 16 > 1) for n in LENGTHS)
    epochs = [feed.take(windows) for _ in range(2)]
    lost = [n for n in LENGTHS if n % 16 == 1]  # the last token of those has nothing to be predicted from
    for rows in epochs:
        ids = np.concatenate([rows.ids[r, : rows.lengths[r]] for r in range(windows)])
        assert len(ids) == len(tokens.ids) - len(lost) and len(set(ids[ids != BOS])) == (ids != BOS).sum()
    assert epochs[0].ids.tolist() != epochs[1].ids.tolist()


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_a_pure_function_of_seed_and_number(pack: bool) -> None:
    tokens = corpus(LENGTHS)
    straight = LocalFeed(tokens, 16, pack, (3, 1), "x")
    rows = [straight.take(1) for _ in range(60)]
    for start, count in [(0, 60), (37, 5), (12, 1), (59, 1), (8, 30), (3, 4)]:
        feed = LocalFeed(tokens, 16, pack, (3, 1), "x")
        feed.load_state_dict({"row": start})
        taken = feed.take(count)
        for number in range(count):
            length = taken.lengths[number]
            expected = rows[start + number]
            assert taken.ids[number, :length].tolist() == expected.ids[0, : expected.lengths[0]].tolist()
            assert taken.first[number, :length].tolist() == expected.first[0, : expected.lengths[0]].tolist()
            assert taken.scored[number, :length].tolist() == expected.scored[0, : expected.lengths[0]].tolist()


def test_batches_larger_than_the_corpus() -> None:
    tokens = corpus([6, 7, 9])
    rows = LocalFeed(tokens, 20, True, (0, 0), "x").take(11)
    flat = rows.ids.reshape(-1)
    assert all(sorted(flat[k : k + 22]) == sorted(tokens.ids) for k in range(0, 220, 22))


def test_what_is_too_short() -> None:
    with pytest.raises(UserError, match=r"stories: 22 tokens to train on, fewer than one sequence of 23.*seq_len"):
        LocalFeed(corpus([6, 7, 9]), 23, True, (0, 0), "stories")
    with pytest.raises(UserError, match="fewer than one sequence"):
        LocalFeed(corpus([1, 1]), 8, False, (0, 0), "stories")
    assert LocalFeed(corpus([6]), 23, False, (0, 0), "stories").take(2).ids.shape == (2, 6)


def test_rows_of_several_parts_keep_their_places() -> None:
    one = padded_rows([(np.array([1, 2]), np.array([True, True]))])
    two = padded_rows([(np.array([3, 4, 5]), np.ones(3, bool)), (np.array([6, 7]), np.ones(2, bool))])
    rows = place_rows([(np.array([1]), one), (np.array([2, 0]), two)])
    assert rows.ids.tolist() == [[6, 7, 0], [1, 2, 0], [3, 4, 5]] and rows.lengths.tolist() == [2, 2, 3]


def test_types_and_parts_of_a_batch() -> None:
    first = np.array([[True, False, True, False], [True, False, False, False]])
    scored = np.array([[True, True, False, True], [True, True, True, True]])
    batch = make_batch(Rows(np.arange(8, dtype=np.int32).reshape(2, 4), first, scored, np.array([4, 2])))
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.segments.dtype == torch.int64
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]
    assert batch.targets.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert batch.rows(1, 2).tokens == 2
