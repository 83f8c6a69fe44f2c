"""A teacher's config.json alone: from a folder, from the Hub's cache, or one small download. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..distill import families
from ..distill.errors import MachineError, UserError
from ..distill.family import Family
from ..distill.teacher import read_config
from ..mixers.specs.base import Geometry
from .schema import EMBEDDED

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class TeacherConfig:
    """What config.json says of a teacher.

    Attributes:
        source: path or Hub id as given.
        family: its architecture.
        config: config.json as a dict.
    """

    source: str
    family: Family
    config: dict[str, Any]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config["num_hidden_layers"]

    @property
    def layer_types(self) -> list[str]:
        """What each layer's attention is, in transformers' closed vocabulary."""
        return self.family.layer_types(self.config)

    def geometry(self, layer: int) -> Geometry:
        """The shape and conventions of a layer's attention."""
        return self.family.geometry(self.config, layer)

    @property
    def context(self) -> int:
        """Positions that the teacher was made for."""
        return self.config["max_position_embeddings"]


def locate(model: str) -> str:
    """The folder or Hub id that `teacher.model` means: `embedded` is the toy teacher inside the package."""
    return str(resources.files(f"{__package__}.embedded") / "teacher") if model == EMBEDDED else model


def read_teacher_config(model: str, revision: str | None = None, place: str = "teacher.model") -> TeacherConfig:
    """What config.json says of a teacher.

    Args:
        model: `teacher.model` of a recipe.
        revision: on the Hub.
        place: how to name the key in an error.

    Raises:
        UserError: no such model, an unknown family, or a config.json without the sizes that a plan needs.
        MachineError: the Hub cannot be reached and its cache does not hold the file.
    """
    folder = _folder(locate(model), revision, place)
    config = read_config(folder)
    where = f"{place}: {folder / 'config.json'}"
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a mapping, found {type(config).__name__}. Fetch the file again")
    if config.get("model_type") == "relinear":
        raise UserError(
            f"{where}: this is a converted model, not a teacher. Give the original: teacher.model=PATH_OR_ID"
        )
    family = families.family_of(config, where)
    for key in _SIZES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is {value!r}; expected a whole number above 0. Fetch the file again")
    teacher = TeacherConfig(model, family, config)
    try:
        for layer in range(teacher.num_layers):
            teacher.geometry(layer)
            family.experts(config, layer)
        types = teacher.layer_types
    except (ValueError, TypeError, KeyError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: {reason}. Fetch the file again") from None
    if len(types) != teacher.num_layers:
        raise UserError(
            f"{where}: layer_types has {len(types)} entries for num_hidden_layers={teacher.num_layers}. Fetch the file "
            "again"
        )
    return teacher


def _folder(name: str, revision: str | None, place: str) -> Path:
    """The folder that holds config.json."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{place}: {name}: no such folder. Give a folder with config.json, or a Hub id: teacher.model=PATH_OR_ID"
        )
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{place}: {name}: no such folder, not in the Hub's cache, and HF_HUB_OFFLINE forbids to ask. Give a "
                f"folder, or fetch it where there is a network: hf download {name}"
            )
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except HFValidationError:
        raise UserError(f"{place}: {name}: no such folder, and not a Hub id. Give teacher.model=PATH_OR_ID") from None
    except GatedRepoError:
        raise UserError(f"{place}: {name}: gated on the Hub. Accept its terms there, then: hf auth login") from None
    except RevisionNotFoundError:
        raise UserError(
            f"{place}: {name}: has no revision {revision!r}. Give one that exists: teacher.revision=main"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{place}: {name}: no such folder and no such model on the Hub (private? then: hf auth login)"
        ) from None
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise MachineError(f"{place}: {name}: no such folder, and the Hub cannot be reached ({reason})") from None
