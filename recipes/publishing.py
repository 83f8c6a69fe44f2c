"""The end of a run whose recipe names a repository: its model goes to the Hub. The run is complete, and stays so."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distill.errors import MachineError, RunFailed, UserError
from ..distill.hub.card_results import read_results
from ..distill.hub.publish import Wish, publish
from .schema import Recipe

Say = Callable[[str], None]


def before_work(recipe: Recipe) -> list[str]:
    """What would keep the model from being pushed at the end, said before hours of work; they are done all the same."""
    repo = recipe.publish.repo
    if repo is None:
        return []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [f"warning: publish.repo: {repo}: HF_HUB_OFFLINE is set, so nothing will be pushed at the end"]
    from huggingface_hub import get_token

    if get_token() is None:
        return [f"warning: publish.repo: {repo}: nobody is logged in to the Hub. Before the run ends: hf auth login"]
    return []


def publish_run(recipe: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Verify, describe and push what a run made.

    Args:
        recipe: of the run.
        folder: of the run, complete.
        say: whom to tell; a failure too, with the command that pushes later.

    Returns:
        {"published": what `push` returned, or {"error": text}}; nothing where no repository is named.
    """
    asked = recipe.publish
    if asked.repo is None:
        return {}
    wish = Wish(asked.repo, asked.private, asked.license, asked.base_model, asked.collection, asked.steps)
    try:
        made = publish(folder, wish, read_results(folder / "eval"), say)
    except (UserError, MachineError, RunFailed) as error:
        say(f"warning: {error}")
        say(f"The run is complete all the same. To push its model later: {_again(wish, folder)}")
        return {"published": {"error": str(error)}}
    say(f"pushed: {made['url']}" + (f", and {len(made['steps'])} saved steps" if made["steps"] else ""))
    return {"published": made}


def _again(wish: Wish, folder: Path) -> str:
    words = ["relinear", "push", str(folder), "--repo", wish.repo]
    words += [] if wish.private else ["--public"]
    words += ["--steps"] if wish.steps else []
    words += ["--collection", wish.collection] if wish.collection else []
    return shlex.join(words)
