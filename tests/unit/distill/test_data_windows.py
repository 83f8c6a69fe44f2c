"""Evaluation windows: every target once, no window with two documents, whatever the lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from relinear.distill.data.tokenise import Tokens
from relinear.distill.data.windows import eval_batches, eval_windows

BOS = 1


def corpus(lengths: list[int], bos: bool) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(100, 100 + offsets[-1], dtype=np.int32)
    scored = np.ones(len(ids), bool)
    if bos:
        ids[offsets[:-1]] = BOS
        scored[offsets[:-1]] = False
    return Tokens(ids, offsets, scored)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("window", [2, 3, 8, 64])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_target_exactly_once(bos: bool, window: int, batch: int) -> None:
    generator = np.random.default_rng(window)
    lengths = [1, 2, 3, 7, 8, 9, 15, 16, 64, 65, 127, 128, *generator.integers(1, 200, 20).tolist()]
    tokens = corpus(lengths, bos)
    owner = {int(i): d for d in range(len(tokens)) for i in tokens.document(d) if i != BOS}
    seen: Counter[int] = Counter()
    inputs: Counter[int] = Counter()
    for made, documents in eval_batches(tokens, window, batch):
        rows, width = made.shape
        assert width <= window and rows * width <= batch * window and documents.shape == made.shape
        for r in range(rows):
            length = int(made.real[r].sum())
            assert made.real[r, :length].all() and length >= 2
            assert made.position_ids[r, :length].tolist() == list(range(length))
            assert set(documents[r, :length].tolist()) == {int(documents[r, 0])} and (documents[r, length:] == -1).all()
            ids = made.input_ids[r, :length].tolist()
            assert ids[1:] == list(range(ids[1], ids[1] + length - 1)) and ids[0] in (BOS, ids[1] - 1)
            for t in range(length):
                inputs[ids[t]] += 1
                if made.targets[r, t]:
                    assert t > 0 and owner[ids[t]] == documents[r, t]
                    seen[ids[t]] += 1
    expected = {int(i) for d in range(len(tokens)) for i in tokens.document(d)[1:]}
    assert set(seen) == expected and set(seen.values()) == {1}
    # Windows overlap by the one token of context, never by more.
    assert max(count for token, count in inputs.items() if token != BOS) <= 2


def test_windows_are_as_stated() -> None:
    tokens = corpus([10, 1, 4], True)
    document, start, length = eval_windows(tokens, 4)
    assert document.tolist() == [0, 0, 0, 2]
    assert start.tolist() == [0, 3, 6, 11] and length.tolist() == [4, 4, 4, 4]


def test_unscored_tokens_are_no_targets() -> None:
    tokens = corpus([6], True)
    tokens.scored[2:4] = False
    ((batch, _),) = eval_batches(tokens, 8, 2)
    assert batch.targets.tolist() == [[False, True, False, False, True, True]]


def test_short_windows_share_batches_longest_first() -> None:
    tokens = corpus([4] * 30 + [32] * 2, True)
    shapes = [batch.shape for batch, _ in eval_batches(tokens, 32, 2)]
    assert shapes == [(2, 32), (16, 4), (14, 4)]


def test_too_small_a_window() -> None:
    with pytest.raises(ValueError, match="window=1"):
        eval_windows(corpus([3], True), 1)


def test_no_documents() -> None:
    assert list(eval_batches(corpus([], True), 8, 2)) == []
