"""Documents to token ids, flat in memory.

A document becomes BOS + its tokens: BOS once, also where the tokenizer adds it itself or the text begins with it, and
none where the tokenizer has none; no EOS. A conversation's text, end marks included, is what the chat template makes of
it (chat.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..errors import UserError
from . import chat
from .documents import Document

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 * 2**20


@dataclass(frozen=True)
class Tokens:
    """The tokens of D documents.

    Attributes:
        ids: (N,) int32, document after document.
        offsets: (D + 1,) int64; document d is ids[offsets[d] : offsets[d + 1]].
        scored: (N,) bool; whether the token may be a target: not BOS in a text, the assistant's in a conversation.
    """

    ids: np.ndarray
    offsets: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(D,) int64 tokens of every document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def select(self, documents: np.ndarray) -> Tokens:
        """The named documents, in the order given."""
        return self.pieces(self.offsets[documents], self.offsets[documents + 1])

    def pieces(self, starts: np.ndarray, stops: np.ndarray) -> Tokens:
        """ids[starts[i] : stops[i]] as the documents i."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts, dtype=np.int64)])
        # Slices rather than one index array: that would take eight bytes per token.
        slices = [slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        ids = np.concatenate([np.zeros(0, np.int32), *(self.ids[piece] for piece in slices)])
        return Tokens(ids, offsets, np.concatenate([np.zeros(0, bool), *(self.scored[piece] for piece in slices)]))

    def head(self, tokens: int) -> Tokens:
        """The first documents that hold at least so many tokens together (all where there are fewer)."""
        count = int(np.searchsorted(self.offsets, tokens))
        return self.select(np.arange(min(count, len(self))))

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """All documents of the parts, in order."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        ids = np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)])
        scored = np.concatenate([np.zeros(0, bool), *(part.scored for part in parts)])
        return Tokens(ids, np.cumsum(lengths), scored)


def tokenise(documents: Iterable[Document], tokenizer: Any) -> Tokens:
    """Token ids of all documents, in order; texts without a token and conversations without a reply are left out.

    Raises:
        UserError: chat messages that the tokenizer cannot mark (chat.py), and whatever reading the documents raises.
    """
    return Tokens.join([_encode(batch, tokenizer) for batch in _batches(documents)])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.content) if isinstance(document.content, str) else 1000
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(documents: list[Document], tokenizer: Any) -> Tokens:
    bos = tokenizer.bos_token_id
    texts = [index for index, document in enumerate(documents) if isinstance(document.content, str)]
    chats = [index for index, document in enumerate(documents) if not isinstance(document.content, str)]
    ids: list[list[int]] = [[] for _ in documents]
    completions: dict[int, list[bool]] = {}
    if texts:
        # The tokenizer's own BOS and EOS are left out, so that what is added does not depend on its configuration.
        encoded = tokenizer([documents[index].content for index in texts], **_PLAIN)
        for index, found in zip(texts, encoded["input_ids"], strict=True):
            ids[index] = _bos_once(found, bos)
    if chats:
        for index, (found, completion) in zip(chats, _encode_chats(documents, chats, tokenizer), strict=True):
            if any(completion):
                ids[index] = _bos_once(found, bos)
                completions[index] = [False] * (len(ids[index]) - len(found)) + completion
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    scored = np.ones(len(flat), bool) if bos is None else flat != bos
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    for index, completion in completions.items():
        scored[offsets[index] : offsets[index + 1]] = completion
    return Tokens(flat, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[lengths > 0])]), scored)


def _bos_once(ids: list[int], bos: int | None) -> list[int]:
    """BOS in front, unless there is none or it stands there already; nothing stays nothing."""
    return ids if bos is None or not ids or ids[0] == bos else [bos, *ids]


# verbose=False: documents may be longer than the model's context, they are cut into windows later.
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def _encode_chats(
    documents: list[Document], chats: list[int], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool]]]:
    if chat.has_generation_marks(tokenizer):
        for index in chats:
            yield chat.marked_tokens(tokenizer, documents[index])
        return
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} gives no character offsets, needed to find the assistant's tokens; "
            "expected a fast tokenizer (tokenizer.json) or a chat template with {% generation %}"
        )
    marked = [chat.spans(tokenizer, documents[index]) for index in chats]
    encoded = tokenizer([text for text, _ in marked], return_offsets_mapping=True, **_PLAIN)
    for (_, spans), ids, mapping in zip(marked, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        characters = np.asarray(mapping, np.int64).reshape(-1, 2)
        completion = np.zeros(len(ids), bool)
        for start, stop in spans:
            # A token that begins in the prompt belongs to it, even if it reaches into the reply.
            completion |= (characters[:, 0] >= start) & (characters[:, 0] < stop) & (characters[:, 1] > start)
        yield ids, completion.tolist()
