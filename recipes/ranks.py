"""How a stage's bytes are divided among the ranks of an engine: what `distill.engine` does, without torch.

ddp holds everything on every rank. fsdp2 holds shards of teacher, weights, gradients and optimizer, and whole what
computes at the time. DeepSpeed shards the optimizer (zero1), the gradients too (zero2), weights and teacher too
(zero3); in stages on single layers its mixers are whole everywhere, and the optimizer's state of a layer lies on the
rank that owns it (`distill/engine/zero.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distill.errors import UserError

SHARDED = ("fsdp2", "deepspeed-zero3")
"""Engines under which weights and teacher lie in shards."""


@dataclass(frozen=True)
class World:
    """The processes that a plan is for.

    Attributes:
        parallel: `engine.parallel`.
        nproc: processes per node, one device each.
        nodes: so many.
        offload: where DeepSpeed's optimizer lies.
    """

    parallel: str = "single"
    nproc: int = 1
    nodes: int = 1
    offload: str = "none"

    def __post_init__(self) -> None:
        """Raises:
        UserError: several processes for `single`.
        """
        if self.size > 1 and self.parallel == "single":
            raise UserError(
                f"engine.parallel: single, but --nproc {self.nproc} --nodes {self.nodes} are {self.size} processes. "
                "Write engine.parallel=ddp (or fsdp2, deepspeed-zero1, deepspeed-zero2, deepspeed-zero3)"
            )

    @property
    def size(self) -> int:
        """Ranks."""
        return self.nproc * self.nodes

    def rows(self, batch: int, micro: int | None) -> int:
        """Sequences of one forward pass of a rank."""
        own = -(-batch // self.size)
        return min(own, micro or own)

    def divide(
        self, whole: dict[str, int], *, per_layer: bool, gathered: int, owned: int | None = None
    ) -> dict[str, int]:
        """A stage's bytes on one device, as one rank holds them: `whole` but for what lies elsewhere.

        Args:
            whole: from `costs.memory`, its activations those of a rank.
            per_layer: a stage on single layers (align, matrix).
            gathered: bytes that a sharded engine holds whole while it computes.
            owned: with DeepSpeed in such a stage, parameters that train in layers of this rank's.
        """
        if self.size == 1 or self.parallel in ("single", "ddp"):
            return whole
        made, n = dict(whole), self.size
        if self.parallel in SHARDED:
            made["teacher"] = -(-whole["teacher"] // n)
            made["gathered"] = gathered
        if self.parallel == "fsdp2":
            for part in ("student", "gradients", "optimizer"):
                made[part] = -(-whole[part] // n)
            return made
        if per_layer:
            made["optimizer"] = 8 * owned if owned is not None else whole["optimizer"]
            return made
        stage = int(self.parallel[-1])
        # Besides both moments DeepSpeed keeps an fp32 copy of the share of the weights that the rank updates.
        made["optimizer"] = -(-(whole["optimizer"] + whole["gradients"]) // n) if self.offload == "none" else 0
        if stage >= 2:
            made["gradients"] = -(-whole["gradients"] // n)
        if stage == 3:
            made["student"] = -(-whole["student"] // n) if self.offload == "none" else 0
        return made

    def owned(self, mixers: dict[int, int], rank: int) -> int:
        """Parameters in those layers of {layer: parameters} that a rank owns under DeepSpeed in align."""
        return sum(count for number, (_, count) in enumerate(sorted(mixers.items())) if number % self.size == rank)
