"""Sections of the end-to-end stages: what glue and extend minimise, what adapters they train, what they read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .fields import Section


class LossWeights(Section):
    """Weights of the parts of an end-to-end loss; at least one of the first three is above 0."""

    kl: float = Field(default=0.0, ge=0, description="forward KL(teacher || student)")
    reverse_kl: float = Field(default=0.0, ge=0, description="reverse KL(student || teacher)")
    ce: float = Field(default=0.0, ge=0, description="cross-entropy on the text itself")
    align: float = Field(
        default=0.0, ge=0, description="of each mixer's relative error on the teacher's layer input, as in align"
    )

    @model_validator(mode="after")
    def _some(self) -> LossWeights:
        if self.kl + self.reverse_kl + self.ce == 0:
            raise ValueError("every weight is 0, so nothing would be learnt; write for example {kl: 1.0}")
        return self


class LoraSection(Section):
    """Low-rank adapters W + alpha / rank B A on linear layers, merged into them at the end of the stage."""

    rank: int = Field(default=8, ge=1, le=4096, description="rows of A")
    alpha: float = Field(default=16.0, gt=0, description="see above")
    targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="names of the linear layers that get one, in every decoder layer that has them",
    )


class TeacherLogitsSection(Section):
    """The teacher's likeliest tokens at every counted position, kept on the disk and read in place of its forward."""

    top_k: int = Field(
        default=64, ge=1, le=2**20, description="tokens kept per position; all others count as one outcome"
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="of the log-probabilities")
    temperature: float | None = Field(
        default=None, gt=0, le=100, description="that the logits are divided by; the stage's, and no other"
    )
    dir: str | None = Field(
        default=None,
        min_length=1,
        description="folder of caches, or one of them; teacher-logits beside the run folder if null",
    )
