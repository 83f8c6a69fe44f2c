"""How large a cache of top-k logits is. Torch-free."""

from __future__ import annotations

VALUE_BYTES = {"float16": 2, "float32": 4}
"""Of one log-probability, by `dtype`. The tail's is always fp32."""
SHARD_BYTES = 2**28
"""Of one file at most, unless a single row needs more."""
ROW_BYTES = 12
"""Of a row beside its positions: where they begin, and the checksum of its tokens."""


def id_bytes(vocab: int) -> int:
    """Of one token id."""
    return 2 if vocab <= 2**16 else 4


def position_bytes(top_k: int, dtype: str, vocab: int) -> int:
    """Of one counted position: k ids, k log-probabilities, the tail.

    Args:
        top_k: k; no more than `vocab` are kept.
        dtype: a key of `VALUE_BYTES`.
        vocab: tokens of the vocabulary.
    """
    return min(top_k, vocab) * (id_bytes(vocab) + VALUE_BYTES[dtype]) + 4


def rows_per_shard(seq_len: int, per_position: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Rows of one file; the first position of a row has no target."""
    return max(1, shard_bytes // ((seq_len - 1) * per_position + ROW_BYTES))


def cache_bytes(tokens: int, batch: int, seq_len: int, top_k: int, dtype: str, vocab: int) -> int:
    """Of a stage's whole cache at most, where windows are full: an epoch's last step is not cut short."""
    rows = -(-tokens // (batch * seq_len)) * batch
    return rows * ((seq_len - 1) * position_bytes(top_k, dtype, vocab) + ROW_BYTES)
