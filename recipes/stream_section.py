"""`align: {stream: …}`: a teacher larger than memory, one layer at a time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Section


class StreamSection(Section):
    """One decoder layer at a time is read from the shards; what passes between layers lies on the disk."""

    borders: Literal["compute", "bfloat16", "float8"] = Field(
        default="bfloat16",
        description="how hidden states are kept: as computed, which gives the numbers of align in memory; rounded to "
        "bfloat16; or in float8 with a scale for each 128 channels",
    )
    dir: str | None = Field(
        default=None, min_length=1, description="folder for them, on a fast disk with room; in the run folder if null"
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        description="layers in a block, for several processes at once: the teacher's states at the first layer of "
        "every block are made before; null is one block, for one process",
    )
    keep_borders: bool = Field(default=False, description="leave hidden states on the disk when the stage has ended")
