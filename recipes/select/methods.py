"""The selection methods by name: what each asks, where it comes from, and which take part in `combined`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ...distill.errors import UserError
from ..rules import nearest


@dataclass(frozen=True)
class Method:
    """One way to score layers.

    Attributes:
        name: on the command line.
        what: a score of a layer, in words.
        higher_is: what a high score speaks for, `keep` or `convert`.
        needs: `nothing`, `text`, `recall` documents, or `training`.
        paper: where it was published, empty where it is common practice.
    """

    name: str
    what: str
    higher_is: str
    needs: str
    paper: str = ""


_ALL = (
    Method("uniform", "evenly spread, no data", "keep", "nothing"),
    Method("lower", "the lowest layers, no data", "keep", "nothing"),
    Method("upper", "the highest layers, no data", "keep", "nothing"),
    Method("restore-kl", "KL of the all-linear student with this layer's attention restored", "convert", "text"),
    Method("replace-kl", "KL of the teacher with this layer converted", "keep", "text"),
    Method("greedy-kl", "as restore-kl, scored anew after each choice", "keep", "text"),
    Method("recall", "recall that the teacher loses with this layer converted", "keep", "recall"),
    Method(
        "halo",
        "recall lost over next-token accuracy lost with this layer converted",
        "keep",
        "recall",
        "https://arxiv.org/abs/2601.22156",
    ),
    Method(
        "lazy",
        "attention mass on the first and the nearest tokens",
        "convert",
        "text",
        "https://arxiv.org/abs/2410.13846",
    ),
    Method(
        "retrieval-heads",
        "how often its heads look at the very token that must be said next",
        "keep",
        "recall",
        "https://arxiv.org/abs/2404.15574",
    ),
    Method(
        "kl-guided",
        "KL after a short training with this layer's attention restored",
        "convert",
        "training",
        "https://arxiv.org/abs/2512.20569",
    ),
    Method("combined", "mean rank over several methods", "convert", "text"),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
BY_PLACE = ("uniform", "lower", "upper")
COMBINED = ("restore-kl", "greedy-kl", "replace-kl", "recall", "retrieval-heads")
"""What `combined` averages; those that need recall only where the teacher recalls and some layer matters for it."""
EVERY = "all"
"""Stands for every method that trains nothing."""


def parse(text: str) -> list[str]:
    """The methods that `--by` names, in order, each once; the first decides.

    Raises:
        UserError: an unknown name, with the nearest right one.
    """
    names: list[str] = []
    for part in text.split(","):
        name = part.strip().lower()
        if name == EVERY:
            names += ["combined", *(m.name for m in _ALL if m.needs != "training")]
        elif name in METHODS:
            names.append(name)
        else:
            known = [*METHODS, EVERY]
            raise UserError(
                f"--by: there is no method {part.strip()!r}.{nearest(name, known)} Methods: {', '.join(known)}"
            )
    return list(dict.fromkeys(names))


def ordered(names: list[str]) -> list[str]:
    """What must run for `names`: `uniform` always, and what `combined` averages before it."""
    wanted = [*names, "uniform", *(COMBINED if "combined" in names else ())]
    return sorted(dict.fromkeys(wanted), key=list(METHODS).index)


def check_keep(keep: int, num_layers: int) -> None:
    """Refuse a number of kept layers that leaves nothing to choose.

    Raises:
        UserError: keep is not between 1 and one less than the layers.
    """
    if not 1 <= keep < num_layers:
        raise UserError(
            f"--keep {keep}: the teacher has {num_layers} layers, and some must be kept and some converted. Give 1 to "
            f"{num_layers - 1}"
        )
