"""Held-out documents: disjoint, enough, and chosen by what they say."""

from __future__ import annotations

import numpy as np
import pytest

from relinear.distill.data.split import document_hash, in_share, split_documents
from relinear.distill.data.tokenise import Tokens

BOS = 1


def corpus(documents: list[list[int]]) -> Tokens:
    lengths = np.array([len(document) for document in documents], np.int64)
    ids = np.array([token for document in documents for token in document], np.int32)
    return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), ids != BOS)


def many(count: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[BOS, *generator.integers(5, 500, generator.integers(5, 80)).tolist()] for _ in range(count)]


def contents(tokens: Tokens) -> list[tuple[int, ...]]:
    return [tuple(tokens.document(d).tolist()) for d in range(len(tokens))]


def test_disjoint_complete_and_independent_of_order() -> None:
    documents = many(800)
    documents += documents[:200]  # copies must fall on the same side
    train, valid = split_documents(corpus(documents), 0.05, bos=BOS)
    assert not set(contents(train)) & set(contents(valid))
    assert sorted(contents(train) + contents(valid)) == sorted(map(tuple, documents))
    shuffled = [documents[i] for i in np.random.default_rng(1).permutation(len(documents))]
    assert sorted(contents(split_documents(corpus(shuffled), 0.05, bos=BOS)[1])) == sorted(contents(valid))
    assert contents(split_documents(corpus(documents), 0.05, bos=BOS, seed=1)[1]) != contents(valid)


def test_share_and_least_amounts() -> None:
    tokens = corpus(many(4000))
    total = len(tokens.ids)
    for fraction, documents, least, expected in [(0.05, 1, 1, 0.05), (0.001, 1, 3000, 3000 / total)]:
        _, valid = split_documents(tokens, fraction, min_documents=documents, min_tokens=least, bos=BOS)
        assert expected <= len(valid.ids) / total < expected + 200 / total
    assert len(split_documents(tokens, 0.001, min_documents=100, min_tokens=1)[1]) == 100
    # Neither minimum takes more than a tenth.
    _, valid = split_documents(corpus(many(100)), 0.01, min_documents=50, min_tokens=10**6)
    assert len(valid) <= 15 and len(valid.ids) < 0.12 * len(corpus(many(100)).ids)


def test_a_giant_document_stays_in_training() -> None:
    giant = [BOS, *range(5, 50_005)]
    train, valid = split_documents(corpus([giant, *many(2000)]), 0.01, bos=BOS)
    assert tuple(giant) in contents(train) and len(valid.ids) < 20_000


@pytest.mark.parametrize("documents", [[[BOS, *range(5, 10_005)]], [[BOS, *range(b, b + 3000)] for b in (5, 4000)]])
def test_few_documents_lose_their_ends(documents: list[list[int]]) -> None:
    train, valid = split_documents(corpus(documents), 0.02, min_tokens=100, bos=BOS)
    for document, head, tail in zip(documents, contents(train), contents(valid), strict=True):
        assert list(head) + list(tail[1:]) == document and tail[0] == BOS and 0.019 < len(tail) / len(document) < 0.021
    assert not valid.scored[valid.offsets[:-1]].any() and valid.scored.sum() == len(valid.ids) - len(valid)


def test_tails_of_documents_without_bos() -> None:
    train, valid = split_documents(corpus([list(range(5, 1005))]), 0.1, bos=None)
    assert train.ids.tolist() + valid.ids.tolist() == list(range(5, 1005)) and len(valid.ids) == 100


def test_nothing_held_out() -> None:
    tokens = corpus(many(30))
    train, valid = split_documents(tokens, 0.0)
    assert contents(train) == contents(tokens) and len(valid) == 0
    with pytest.raises(ValueError, match="fraction"):
        split_documents(tokens, 1.0)


def test_hashes_are_even() -> None:
    documents = [np.array(d, np.int32) for d in many(4000)]
    share = sum(in_share(d, 0.25, 7) for d in documents) / len(documents)
    assert 0.22 < share < 0.28
    assert document_hash(documents[0], 1) != document_hash(documents[0], 2) != document_hash(documents[1], 2)
