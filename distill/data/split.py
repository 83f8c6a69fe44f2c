"""Which documents are held out: by what they say, not by where they stand."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from .tokenise import Tokens

FEW_DOCUMENTS = 20
"""Below it whole documents are too coarse a share: the end of every document is held out instead."""


def document_hash(ids: np.ndarray, seed: int) -> int:
    """A number in [0, 2^64) from a document's tokens and the seed alone."""
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=8, key=key).digest(), "little")


def in_share(ids: np.ndarray, fraction: float, seed: int) -> bool:
    """Whether a document of a stream is held out: its hash lies in the lowest `fraction`."""
    return document_hash(ids, seed) < fraction * 2.0**64


def split_documents(
    tokens: Tokens,
    fraction: float = 0.01,
    *,
    min_documents: int = 32,
    min_tokens: int = 16384,
    bos: int | None = None,
    seed: int = 0,
) -> tuple[Tokens, Tokens]:
    """Training and held-out documents, (train, valid), which never overlap.

    Documents are ranked by the hash of their tokens and the lowest are held out until they make `fraction` of all
    tokens and at least `min_documents` and `min_tokens`, neither of which may take more than a tenth; documents larger
    than all that should be held out stay in training. The choice does not depend on the documents' order, and copies of
    one document fall on the same side. Where there are fewer than `FEW_DOCUMENTS`, or hardly one small enough, the last
    part of every document is held out instead, with a BOS before it where the document has one.

    Args:
        tokens: all documents.
        fraction: share of the tokens to hold out, in [0, 1); 0 holds out nothing.
        min_documents: documents to hold out at least, where that is no more than a tenth of them.
        min_tokens: tokens to hold out at least, where that is no more than a tenth of them.
        bos: the tokenizer's BOS id.
        seed: another seed holds out other documents.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    if fraction == 0 or not len(tokens):
        return tokens, tokens.select(np.zeros(0, np.int64))
    total = int(tokens.offsets[-1])
    goal = max(math.ceil(fraction * total), min(min_tokens, total // 10))
    small = np.flatnonzero(tokens.lengths <= goal)
    if len(tokens) < FEW_DOCUMENTS or tokens.lengths[small].sum() < 2 * goal:
        return _split_tails(tokens, goal / total, bos)
    hashes = np.array([document_hash(tokens.document(d), seed) for d in small.tolist()], np.uint64)
    order = np.argsort(hashes, kind="stable")
    by_tokens = int(np.searchsorted(np.cumsum(tokens.lengths[small[order]]), goal)) + 1
    count = max(by_tokens, min(min_documents, len(small) // 10))
    held = np.zeros(len(tokens), bool)
    held[small[hashes <= hashes[order[count - 1]]]] = True
    return tokens.select(np.flatnonzero(~held)), tokens.select(np.flatnonzero(held))


def _split_tails(tokens: Tokens, share: float, bos: int | None) -> tuple[Tokens, Tokens]:
    starts, stops = tokens.offsets[:-1], tokens.offsets[1:]
    cuts = stops - np.round(share * tokens.lengths).astype(np.int64)
    cuts = np.where(stops - cuts > 1, cuts, stops)
    held = cuts < stops
    valid = tokens.pieces(cuts[held], stops[held])
    if bos is not None:
        at = valid.offsets[:-1][tokens.ids[starts[held]] == bos]
        added = np.searchsorted(at, valid.offsets, side="left")
        valid = Tokens(np.insert(valid.ids, at, bos), valid.offsets + added, np.insert(valid.scored, at, False))
    return tokens.pieces(starts, cuts), valid
