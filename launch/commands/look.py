"""The commands that only look: `ls`, `show`, `check` and `plan`. None of them imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
from enum import StrEnum
from typing import Annotated, Any

import typer

from ...distill.errors import UserError
from ...distill.families import FAMILIES
from ...mixers import registry
from ...mixers.specs.base import Geometry, MixerSpec
from ...recipes.units import format_bytes
from ..output import data, data_json, next_command, table, talk
from .common import Json, Overrides, Recipe, check_source, command_line, examples

EXAMPLE = Geometry(hidden_size=2048, num_heads=16, num_kv_heads=4, head_dim=128)
"""The attention that a mixer's card is computed for."""


class Kind(StrEnum):
    """What `ls` can list."""

    MIXERS = "mixers"
    RECIPES = "recipes"
    FAMILIES = "families"
    TEACHERS = "teachers"


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        "ls",
        epilog=examples("relinear ls", "relinear ls mixers", "relinear ls recipes --json", then="relinear show rwkv7"),
    )(ls)
    app.command(
        epilog=examples(
            "relinear show rwkv7 > mine.yaml",
            "relinear show rwkv7 teacher.model=FOLDER data.source=FILE layers.keep=1,3",
            "relinear show --mixer gated_deltanet",
            then="relinear check mine.yaml",
        )
    )(show)
    app.command(
        epilog=examples(
            "relinear check mine.yaml",
            "relinear check rwkv7 teacher.model=FOLDER data.source=FILE",
            then="relinear plan mine.yaml",
        )
    )(check)
    app.command(
        epilog=examples(
            "relinear plan rwkv7 teacher.model=FOLDER data.source=FILE",
            "relinear plan qwen2.5-7b-rwkv7 teacher.model=FOLDER_WITH_CONFIG_JSON --gpu H200 --json",
            "relinear plan my.yaml engine.parallel=fsdp2 --nproc 8 --nodes 2 --gpu H100 --price 2.5",
            then="relinear run rwkv7 teacher.model=FOLDER data.source=FILE",
        )
    )(plan)


def ls(
    kind: Annotated[Kind | None, typer.Argument(help="One of them; all when left out.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List mixers, recipes, families and teachers."""
    lists = {Kind.MIXERS: _mixers, Kind.RECIPES: _recipes, Kind.FAMILIES: _families, Kind.TEACHERS: _teachers}
    found = {str(k): rows() for k, rows in lists.items() if kind in (None, k)}
    if json:
        data_json(found if kind is None else found[str(kind)])
        return
    singular = {Kind.MIXERS: "mixer", Kind.RECIPES: "recipe", Kind.FAMILIES: "family", Kind.TEACHERS: "teacher"}
    tables = []
    for name, rows in found.items():
        header = list(rows[0]) if rows else ["name"]
        tables.append(table([list(row.values()) for row in rows], [singular[Kind(name)], *header[1:]]))
    data("\n\n".join(tables))


def _mixers() -> list[dict[str, Any]]:
    specs = [registry.spec(name) for name in registry.names()]
    return [{"name": spec.name, "title": spec.title, "paper": spec.paper} for spec in specs]


def _families() -> list[dict[str, Any]]:
    return [{"name": family.name, "transformers": family.lm_class} for family in FAMILIES.values()]


def _recipes() -> list[dict[str, Any]]:
    from ...recipes import loader

    names = (*loader.shipped(), *loader.posttrain(), *loader.methods())
    return [{"name": name, "what": loader.summary(name)} for name in names]


def _teachers() -> list[dict[str, Any]]:
    """The teachers that shipped recipes name; any other one of a known family works as well."""
    from ...recipes import loader

    found = []
    for name in loader.shipped():
        with contextlib.suppress(UserError):  # a recipe for any teacher names none
            found.append({"name": loader.load(name).teacher.model, "recipe": name})
    return found


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A recipe's name or file, or with --mixer a mixer's name.")
    ],
    overrides: Overrides = None,
    mixer: Annotated[bool, typer.Option("--mixer", help="Show the mixer of this name, not the recipe.")] = False,
    json: Json = False,
) -> None:
    """Print a resolved recipe, or a mixer's card.

    Resolved means: with every default written out, `extends` followed and the changes made.
    """
    if mixer:
        _show_mixer(name, overrides, json)
        return
    from ...recipes import loader
    from ...recipes.posttrain import schema as posttrain

    if not loader.inside(name) and _is_mixer(name):
        _show_mixer(name, overrides, json)
        return
    try:
        recipe = (posttrain if posttrain.is_posttrain(name) else loader).load(name, overrides)
    except UserError as error:
        if json or overrides or not loader.inside(name):
            raise
        data(loader.text_of(name))
        talk(f"The recipe as it stands, as something is left for you to give:\n{error}")
        return
    if json:
        data_json(recipe.to_dict())
    else:
        data(loader.dump(recipe))
    if _is_mixer(name):
        talk(f"{name} is also a mixer: relinear show --mixer {name}")


def _is_mixer(name: str) -> bool:
    try:
        registry.resolve(name)
    except ValueError:
        return False
    return True


def _show_mixer(name: str, overrides: list[str] | None, json: bool) -> None:
    if overrides:
        raise UserError(f"{overrides[0]}: a mixer's card takes no changes. Leave it out: relinear show --mixer {name}")
    try:
        spec = registry.spec(name)
    except ValueError as error:
        raise UserError(f"{error}. See: relinear ls mixers") from None
    if json:
        data_json(card(spec))
    else:
        data(_card_text(card(spec)))


def card(spec: type[MixerSpec]) -> dict[str, Any]:
    """A mixer as its spec describes it, with tensors and costs for one layer of an example geometry."""
    options = spec.options()
    return {
        "name": spec.name,
        "title": spec.title,
        "paper": spec.paper,
        "options": [
            {"name": f.name, "type": str(f.type), "default": getattr(options, f.name), **_bounds(f)}
            for f in dataclasses.fields(options)
        ],
        "example": dataclasses.asdict(EXAMPLE),
        "tensors": [dataclasses.asdict(row) for row in spec.tensors(EXAMPLE, options, first=False, position=0.5)],
        "flops_per_token": spec.flops_per_token(EXAMPLE, options),
        "state_bytes": spec.state_bytes(EXAMPLE, options),
    }


def _bounds(field: dataclasses.Field) -> dict[str, Any]:
    return {name: field.metadata.get(name) for name in ("help", "low", "high", "choices")}


def _card_text(card: dict[str, Any]) -> str:
    options = [(o["name"], o["type"], o["default"], _allowed(o), o["help"]) for o in card["options"]]
    tensors = [
        (t["name"], " x ".join(map(str, t["shape"])), t["source"], t["origin"], "fp32" if t["fp32"] else "")
        for t in card["tensors"]
    ]
    geometry = ", ".join(
        f"{name} {card['example'][name]}" for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim")
    )
    parts = [
        f"{card['name']}: {card['title']}\n{card['paper']}",
        table(options, ("option", "type", "default", "allowed", "what it does")),
        f"Tensors of one layer at {geometry}:",
        table(tensors, ("tensor", "shape", "source", "from", "kept in")),
        f"{card['flops_per_token']:,} FLOPs per token; {format_bytes(card['state_bytes'])} of state per sequence",
    ]
    return "\n\n".join(parts)


def _allowed(option: dict[str, Any]) -> str:
    if option["choices"]:
        return " | ".join(map(str, option["choices"]))
    low, high = option["low"], option["high"]
    return "" if low is None and high is None else f"{'' if low is None else low} .. {'' if high is None else high}"


def check(recipe: Recipe, overrides: Overrides = None, json: Json = False) -> None:
    """Check a recipe without working.

    Every key and value, the layers against the teacher's config.json, and that the files exist.
    """
    from ...recipes import loader
    from ...recipes import plan as planner
    from ...recipes.posttrain import schema as posttrain

    after = posttrain.is_posttrain(recipe)
    loaded = (posttrain if after else loader).load(recipe, overrides)
    notes = [] if after else planner.plan(loaded).notes  # pyright: ignore[reportArgumentType]
    _check_sources(loaded)
    if json:
        data_json({"recipe": recipe, "ok": True, "notes": notes})
    else:
        data(f"{recipe}: ok")
        for note in notes:
            talk(f"note: {note}")
    next_command(command_line("posttrain" if after else "plan", recipe, overrides))


def _check_sources(recipe: Any) -> None:
    """Every local file that the recipe's text comes from exists."""
    from ...recipes.posttrain.schema import ARITHMETIC
    from ...recipes.schema import EMBEDDED

    mix = getattr(recipe.data, "mix", None) or {}
    sources = [("data.source", recipe.data.source), *(("data.mix", name) for name in mix)]
    if isinstance(recipe.data.valid, str):
        sources.append(("data.valid", recipe.data.valid))
    for key, source in sources:
        if source not in (None, EMBEDDED, ARITHMETIC):
            check_source(recipe.place(key), source)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="GPU whose hours are estimated.")] = "H100",
    mfu: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of its peak that is reached.", show_default=False)
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="Processes per node, one GPU each.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, metavar="M", help="Nodes.")] = 1,
    price: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Of a GPU-hour: what the recipe costs.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a recipe will do, before any work.

    From the teacher's config.json alone: which layers, where every tensor comes from, parameters, FLOPs and hours per
    stage, what memory each rank holds, and how much smaller the decode cache becomes. No GPU is needed, for any number
    of them.
    """
    from ...recipes import loader
    from ...recipes import plan as planner

    assumed = {} if mfu is None else {"mfu": mfu}
    made = planner.plan(loader.load(recipe, overrides), gpu, nproc=nproc, nodes=nodes, price=price, **assumed)
    if json:
        data_json(made.to_dict())
    else:
        data(planner.render(made))
    next_command(command_line("run", recipe, overrides))
