"""Which layer the hybrid arms of `bench methods` keep: chosen as their papers choose, once per teacher. Torch-free.

OUT/kept.json holds what was chosen, by teacher and arm, with the scores; a choice is made again where the arm's recipe,
the teacher or the text is another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from ..distill.files import finite, write_json
from . import bench_methods_arms as arms
from .bench_methods_arms import Place, Rates

GUIDED_SHARE = 12
"""kl-guided trains each candidate on so many-th of an arm's tokens: 50k of 600k."""


def choose(arm: str, place: Place, held: dict[str, Any], out: Path, work: Path, say: Callable[[str], None]) -> None:
    """Choose an arm's kept layer where that is not done yet; adds it to `held` and to OUT/kept.json.

    Args:
        arm: whose header names a method of `relinear select`; nothing is done for another.
        place: teacher, text and tokens.
        held: what kept.json holds.
        out: folder of kept.json.
        work: folder for the aligned student, deleted afterwards.
        say: whom to tell.

    Raises:
        KeyboardInterrupt: stopped; the next call goes on.
    """
    method = arms.header(arm).get("Kept layer")
    if method is None:
        return
    key = arms.content_key(arms.recipes(arm, place, 0, Rates(), None, work), place.teacher)
    if held.get(place.name, {}).get(arm, {}).get("key") == key:
        return
    from .select.run import select

    say(f"{arm}: choosing the kept layer by {method}")
    folder = work / f"select-{key}"
    overrides = arms.overrides(arm, place, 0, Rates(), None, work)[-1]
    try:
        found = select(
            f"methods/{arm}",
            [*overrides, "eval.assembled=false", f"eval.every={place.tokens}"],
            keep=1,
            by=method,
            out=folder,
            resume=True,
            tokens_per_layer=max(1, place.tokens // GUIDED_SHARE),
        )
    except UserError as error:
        say(f"{arm}: {error}. The recipe's own layer is kept")
        return
    if found["status"] != "complete":
        raise KeyboardInterrupt
    scores = found["methods"][method]
    (layer,) = found["chosen"]
    chosen = {"key": key, "layer": layer, "method": method, "scores": scores["scores"], "stderr": scores["stderr"]}
    chosen |= {"higher_is": scores["higher_is"], "tokens": place.tokens, "signal": scores.get("signal", True)}
    held.setdefault(place.name, {})[arm] = chosen
    write_json(out / "kept.json", finite(held))
    say(f"{arm}: layer {layer}" + ("" if chosen["signal"] else ", though the scores are most likely noise"))
    shutil.rmtree(folder, ignore_errors=True)


def layer_of(arm: str, place: Place, held: dict[str, Any]) -> int | None:
    """The layer that was chosen for an arm; None leaves its recipe's."""
    return held.get(place.name, {}).get(arm, {}).get("layer")
