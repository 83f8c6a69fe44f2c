"""A recurrence and the forms in which it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Op(NamedTuple):
    """One recurrence.

    Attributes:
        name: of the recurrence, as kernels and tables call it.
        recurrent: token by token in fp32, the truth that the other forms are held against.
        chunked: in chunks, in plain torch; takes `chunk` as well.
        step: one token without gradients: `step(*inputs, state)` gives the output and overwrites the state.
    """

    name: str
    recurrent: Callable[..., Any]
    chunked: Callable[..., Any]
    step: Callable[..., Any]
