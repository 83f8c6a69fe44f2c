"""The student's configuration: the teacher's own, plus which layer holds which mixer."""

from __future__ import annotations

from typing import Any

from ...mixers.specs.base import Geometry

# Our own keys in config.json. Everything else is the teacher's, unchanged.
FIELDS: dict[str, Any] = {
    # The family: transformers' model_type of the teacher.
    "base_model_type": None,
    # What each layer is, in transformers' closed vocabulary.
    "layer_types": None,
    # The mixer of each layer by our own name, null where attention stays.
    "mixer_types": None,
    # Options by mixer name; per-layer differences under "layers" -> index.
    "mixers": None,
    # The attention that the mixers replaced: fields of mixers.specs.base.Geometry.
    "geometry": None,
    # The transformers versions that the model was verified with: {"min": …, "max": …}.
    "verified_transformers": None,
    # The version of relinear that wrote the folder.
    "relinear_version": None,
}


def config_class(base: type, name: str, module: str) -> type:
    """A configuration class over a family's own.

    Args:
        base: the family's config class, e.g. `LlamaConfig`.
        name: the new class's name.
        module: `__module__` of the new class: where transformers looks for the file to copy when saving.
    """

    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        if self.layer_types is None:
            # Families without the field: all layers attend alike until mixers are named.
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.mixer_types is None:
            self.mixer_types = [None] * self.num_hidden_layers
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types has {len(self.mixer_types)} entries for num_hidden_layers={self.num_hidden_layers}"
            )

    body = {
        "__annotations__": dict.fromkeys(FIELDS, Any),
        "__post_init__": __post_init__,
        "__module__": module,
        "__doc__": f"{base.__name__} with linear mixers in some layers (see `mixer_types` and `mixers`).",
        "model_type": "relinear",
        **FIELDS,
    }
    return type(base)(name, (base,), body)


def mixer_plan(config: Any) -> dict[int, tuple[str, dict[str, Any]]]:
    """Layer index -> (mixer name, options as a plain dict) for the converted layers of a student's config."""
    plan = {}
    for layer, name in enumerate(config.mixer_types):
        if name is None:
            continue
        settings = dict((config.mixers or {}).get(name) or {})
        per_layer = settings.pop("layers", {})
        plan[layer] = (name, {**settings, **per_layer.get(str(layer), {})})
    return plan


def is_first(plan: dict[int, tuple[str, dict[str, Any]]], layer: int) -> bool:
    """Whether `layer` is the lowest that its mixer takes: the source of what couples the mixer's layers."""
    return layer == min(index for index, (name, _) in plan.items() if name == plan[layer][0])


def geometry(config: Any) -> Geometry:
    """The geometry that a student's config states."""
    return Geometry(**config.geometry)
