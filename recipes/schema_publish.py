"""Part of the schema: where a run's model goes when it is pushed."""

from __future__ import annotations

from pydantic import Field, field_validator

from ..distill.errors import UserError
from ..distill.hub.licence import parse_licence
from .fields import Section


class PublishSection(Section):
    """Where the result goes when it is pushed."""

    repo: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?$",
        description="Hub repository, NAME or OWNER/NAME",
    )
    private: bool = Field(default=True, description="create it as a private repository")
    license: str | None = Field(
        default=None,
        min_length=1,
        description="licence of the model as the Hub names it, or NAME=LINK; what the teacher's files say if null",
    )
    base_model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?$",
        description="the teacher's Hub id for the card, where `teacher.model` is a local folder",
    )
    collection: str | None = Field(
        default=None, min_length=1, description="title or slug of a collection of yours to put the model in"
    )
    steps: bool = Field(default=False, description="push every saved step too, each as a revision named STAGE-STEP")

    @field_validator("license")
    @classmethod
    def _known_license(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_licence(value)
            except UserError as error:
                raise ValueError(
                    str(error).removeprefix(f"--license {value}: ").replace("--license ", "license: ")
                ) from None
        return value
