"""relinear: turn pretrained softmax-attention transformers into linear-attention hybrids.

The public functions load what they need when they are first used; importing relinear does no work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distill.export import export
    from .distill.teacher import load_model, load_teacher
    from .distill.verify import verify
    from .eval.fidelity import compare
    from .recipes.loader import load as load_recipe
    from .recipes.plan import plan
    from .recipes.runner import convert

__version__ = "0.1.0"

# name: (module, name in it)
_PUBLIC = {
    "compare": ("eval.fidelity", "compare"),
    "convert": ("recipes.runner", "convert"),
    "export": ("distill.export", "export"),
    "load_model": ("distill.teacher", "load_model"),
    "load_recipe": ("recipes.loader", "load"),
    "load_teacher": ("distill.teacher", "load_teacher"),
    "plan": ("recipes.plan", "plan"),
    "verify": ("distill.verify", "verify"),
}

__all__ = [
    "__version__",
    "compare",
    "convert",
    "export",
    "load_model",
    "load_recipe",
    "load_teacher",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
