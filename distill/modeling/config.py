"""The student's configuration: the teacher's own, plus which layer holds which mixer."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...mixers.specs.base import Geometry

# Our own keys in config.json. Everything else is the teacher's, unchanged.
FIELDS: dict[str, Any] = {
    # The family: transformers' model_type of the teacher.
    "base_model_type": None,
    # What each layer is, in transformers' closed vocabulary.
    "layer_types": None,
    # What attention each layer holds or held: the `layer_types` of the teacher.
    "attention_types": None,
    # The mixer of each layer by our own name, null where attention stays.
    "mixer_types": None,
    # Options by mixer name; per-layer differences under "layers" -> index.
    "mixers": None,
    # The attention that the mixers replaced: fields of mixers.specs.base.Geometry; per-layer differences as above.
    "geometry": None,
    # What is changed in the layers that keep their attention: fields of `kept.KeptAttention`; null for nothing.
    "kept_attention": None,
    # The transformers versions that the model was verified with: {"min": …, "max": …}.
    "verified_transformers": None,
    # The version of relinear that wrote the folder.
    "relinear_version": None,
}


_ATTENTION = ("full_attention", "sliding_attention")


def config_class(base: Any, name: str, module: str) -> type:
    """A configuration class over a family's own.

    Args:
        base: the family's config class, e.g. `LlamaConfig`.
        name: the new class's name.
        module: `__module__` of the new class: where transformers looks for the file to copy when saving.
    """

    def __post_init__(self: Any, **kwargs: Any) -> None:
        if self.attention_types is None and self.layer_types is not None:
            self.attention_types = [kind if kind in _ATTENTION else _ATTENTION[0] for kind in self.layer_types]
        base.__post_init__(self, **kwargs)
        if self.layer_types is None:
            # Families without the field: all layers attend alike until mixers are named.
            self.layer_types = self.attention_types or [_ATTENTION[0]] * self.num_hidden_layers
        if self.attention_types is None:
            self.attention_types = list(self.layer_types)
        if self.mixer_types is None:
            self.mixer_types = [None] * self.num_hidden_layers
        for field in ("mixer_types", "attention_types"):
            found = len(getattr(self, field))
            if found != self.num_hidden_layers:
                raise ValueError(f"{field} has {found} entries for num_hidden_layers={self.num_hidden_layers}")

    def get_text_config(self: Any, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        # What transformers makes caches from. A mixer with a window is no layer that it could size; the model puts its
        # own in the place of whatever it made.
        return family_view(self) if decoder else base.get_text_config(self, decoder=decoder, encoder=encoder)

    body = {
        "__annotations__": dict.fromkeys(FIELDS, Any),
        "__post_init__": __post_init__,
        "get_text_config": get_text_config,
        "__module__": module,
        "__doc__": f"{base.__name__} with linear mixers in some layers (see `mixer_types` and `mixers`).",
        "model_type": "relinear",
        # Rotary settings may stand under the kinds of attention, also those that no layer has any more.
        "_rope_type_labels": property(lambda self: self.attention_types),
        # Of a view (see `config_view`): the class that it is a view of, and what reads otherwise.
        "_view": None,
        "__reduce_ex__": _reduce,
        **FIELDS,
    }
    return type(base)(name, (base,), body)


@cache
def _view_class(kind: Any, values: tuple[tuple[str, Any], ...]) -> Any:
    """A config class in which some attributes are fixed; None stands for the teacher's kinds of attention."""

    def fixed(value: Any) -> property:
        return property(lambda self: self.attention_types if value is None else value)

    body: dict[str, Any] = {name: fixed(value) for name, value in values}
    return type(kind)(kind.__name__, (kind,), {"__module__": kind.__module__, "_view": (kind, values), **body})


def config_view(config: Any, **values: Any) -> Any:
    """The same configuration, in which these attributes read otherwise. No copy: what is set on one is set on both."""
    kind, before = config._view or (type(config), ())
    return _restore(kind, tuple({**dict(before), **values}.items()), config.__dict__)


def _restore(kind: Any, values: tuple[tuple[str, Any], ...], state: dict[str, Any]) -> Any:
    made = object.__new__(_view_class(kind, values) if values else kind)
    object.__setattr__(made, "__dict__", state)
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    """For copies and pickles: a model's config and the views of it share their state there too."""
    kind, values = self._view or (type(self), ())
    return _restore, (kind, values, self.__dict__)


def family_view(config: Any) -> Any:
    """The configuration as the family's own code must see it: `layer_types` name attention only.

    That code looks up masks, rotary embeddings and windows by these names, for every layer.
    """
    return config_view(config, layer_types=None)


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


def geometry(config: Any, layer: int) -> Geometry:
    """The geometry that a student's config states for a layer."""
    shared = dict(config.geometry)
    differences = shared.pop("layers", {})
    return Geometry(**{**shared, **differences.get(str(layer), {})})
