"""Windows for measuring: every token that can be a target is counted exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .batch import Batch
from .packing import make_batch, padded_rows
from .tokenise import Tokens


def eval_windows(tokens: Tokens, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows of all documents: (document, start, length), each (n,) int64, in the documents' order.

    A document of n tokens is cut at multiples of window - 1: window k holds its tokens k (window - 1) to
    k (window - 1) + window - 1, so it begins with the token that ended the one before. There that token was a target;
    here it is only input, from which the first new token is predicted. The targets of a document's windows are
    therefore disjoint and are its tokens 1 … n - 1; the document's first token (BOS where there is one) has nothing to
    be predicted from and is never one. No window holds two documents. Documents of one token have no windows.

    Raises:
        ValueError: window < 2.
    """
    if window < 2:
        raise ValueError(f"a window holds at least an input and a target, got window={window}")
    stride = window - 1
    counts = np.maximum(tokens.lengths - 1, 0) + stride - 1
    counts //= stride
    document = np.repeat(np.arange(len(tokens)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = tokens.offsets[:-1][document] + number * stride
    return document, start, np.minimum(tokens.offsets[1:][document] - start, window)


def eval_batches(tokens: Tokens, window: int, batch: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Batches of evaluation windows with the document that each position belongs to.

    Each row is one window (`eval_windows`), padded on the right: exact for every causal model, also one that does not
    know of packed documents. Rows come sorted by length, longest first, and a batch of short windows takes more rows,
    up to batch * window positions, so that little is padded and the largest batch is the first.

    Args:
        tokens: the documents.
        window: positions per row, min(context, seq_len).
        batch: rows of full length in one batch.

    Yields:
        (Batch, documents): documents (B, T) int64 is the number of the document in `tokens`, -1 at padding. Its
        `targets` count every token once that is neither a BOS nor, in conversations, outside the assistant's replies.
    """
    document, start, length = eval_windows(tokens, window)
    order = np.argsort(-length, kind="stable")
    at = 0
    while at < len(order):
        width = int(length[order[at]])
        rows = order[at : at + batch * window // width]
        at += len(rows)
        pieces = [slice(start[row], start[row] + length[row]) for row in rows]
        made = make_batch(padded_rows([(tokens.ids[piece], tokens.scored[piece]) for piece in pieces]))
        owners = torch.from_numpy(document[rows])[:, None].expand(made.shape)
        yield made, owners.masked_fill(~made.real, -1)
