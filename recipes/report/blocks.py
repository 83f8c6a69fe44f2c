"""What a page is made of. The template knows how each of these looks; nothing here knows HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Notice:
    """Something that must not be overlooked."""

    text: str
    kind: ClassVar[str] = "notice"


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that would make it."""

    text: str
    command: str | None = None
    kind: ClassVar[str] = "missing"


@dataclass(frozen=True)
class Tile:
    """One figure of the verdict."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures that meet the eye first."""

    tiles: Sequence[Tile]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names its line.

    Attributes:
        caption: what the table is of; screen readers say it.
        header: one text per column.
        rows: one text per cell.
        words: columns of words, set to the left; all others hold figures.
        folded: shown on demand, under this line.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    folded: str | None = None
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of the file, without folder.
        draw: writes it to a path.
        alt: what it shows, for those who do not see it.
        caption: below it.
        aside: it is written, but not shown: the page has the same in words.
        scale: its colours are a scale and stay as they are on a dark page.
    """

    name: str
    draw: Callable[[Path], object]
    alt: str
    caption: str = ""
    aside: bool = False
    scale: bool = False
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Gallery:
    """Pictures or tables beside each other, as many as fit."""

    blocks: Sequence[Picture | Table]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file or is typed; `folded` as for a table."""

    text: str
    folded: str | None = None
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Cell:
    """One layer of the layer map: its number, letter, what stands there, its colour and that of the letter."""

    layer: int
    letter: str
    name: str
    colour: str
    ink: str


@dataclass(frozen=True)
class LayerCells:
    """The layer map."""

    cells: Sequence[Cell]
    legend: Sequence[Cell]
    kind: ClassVar[str] = "layers"


Block = Text | Notice | Missing | Tiles | Table | Picture | Gallery | Code | LayerCells


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        name: for links, e.g. `layers`; unique within a chapter.
        title: the heading.
        blocks: in order.
    """

    name: str
    title: str
    blocks: Sequence[Block]

    @property
    def pictures(self) -> list[Picture]:
        """All of them, those of galleries too."""
        return [
            picture
            for block in self.blocks
            for picture in (block.blocks if isinstance(block, Gallery) else [block])
            if isinstance(picture, Picture)
        ]


@dataclass(frozen=True)
class Chapter:
    """One run, or what several have in common.

    Attributes:
        key: for links and folders of pictures; unique on a page.
        title: the heading.
        lead: a sentence below it.
        sections: in order.
    """

    key: str
    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)
