"""Loading a teacher, or any other checkpoint, and everything that can be wrong with one before work starts."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..mixers.specs.base import Geometry
from . import families
from .digest import inside, teacher_fingerprint
from .errors import MachineError, UserError
from .family import Family, Head

DTYPES = ("float32", "bfloat16", "float16")
_WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "*.md"]


@dataclass
class Teacher:
    """A frozen softmax-attention model with its tokenizer.

    Attributes:
        model: the Hugging Face causal language model, in eval mode, no parameter requiring a gradient.
        tokenizer: its tokenizer.
        family: where attention lives.
        values: its config.json as a dict.
        source: path or Hub id as the user gave it.
        folder: the local folder that was read.
        revision: commit of the Hub snapshot, None for a local folder.
        whole: a forward pass must run to its end: an engine's hooks gather and free the weights on the way.
        known: what its files are, where its weights are not at hand and it is never run; see `load_bare`.
    """

    model: Any
    tokenizer: Any
    family: Family
    values: dict[str, Any]
    source: str
    folder: Path
    revision: str | None = None
    whole: bool = False
    known: dict[str, str] | None = None

    @property
    def bare(self) -> bool:
        """Without weights."""
        return self.known is not None

    def fingerprint(self) -> dict[str, str]:
        """What its files are, as `digest.teacher_fingerprint` says."""
        return teacher_fingerprint(self.folder) if self.known is None else self.known

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def context(self) -> int:
        """Positions that the teacher was made for (max_position_embeddings)."""
        return self.config.max_position_embeddings

    @property
    def backbone(self) -> Any:
        """The model below the output head: embeddings, decoder layers, final norm."""
        return getattr(self.model, self.family.backbone)

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return getattr(self.backbone, self.family.layers)

    @property
    def head(self) -> Head:
        """What the model does to the output projection's result."""
        return self.family.logits(self.values)

    @property
    def layer_types(self) -> list[str]:
        """What each layer's attention is, in transformers' closed vocabulary."""
        return self.family.layer_types(self.values)

    def geometry(self, layer: int) -> Geometry:
        """The shape and conventions of a layer's attention."""
        return self.family.geometry(self.values, layer)

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return getattr(self.layers[layer], self.family.attention)

    def attention_path(self, layer: int) -> str:
        """The attention module's name in the model."""
        family = self.family
        return f"{family.backbone}.{family.layers}.{layer}.{family.attention}"

    def attention_tensors(self, layer: int) -> dict[str, Any]:
        """A layer's attention by the names that most families use, fused projections split; copies of fused parts.

        Returns:
            q_proj, k_proj, v_proj, o_proj (`.weight`, and `.bias` where there is one), q_norm.weight and k_norm.weight
            where the family has them. Rows are heads in their order.
        """
        return split_attention(self.attention(layer).state_dict(), self.family, self.geometry(layer))


def split_attention(state: dict[str, Any], family: Family, geometry: Geometry) -> dict[str, Any]:
    """The tensors of an attention module under their usual names; see `Teacher.attention_tensors`."""
    if not family.fused:
        return dict(state)
    made = {}
    for name, value in state.items():
        part, kind = name.rsplit(".", 1)
        if part == "qkv_proj":
            pieces = value.split((geometry.inner_size, geometry.kv_size, geometry.kv_size))
        elif part == "query_key_value":
            pieces = value.unflatten(0, (geometry.num_heads, 3, geometry.head_dim)).unbind(1)
            pieces = [piece.flatten(0, 1) for piece in pieces]
        else:
            made["o_proj." + kind if part == "dense" else name] = value
            continue
        made |= {f"{letter}_proj.{kind}": piece.clone() for letter, piece in zip("qkv", pieces, strict=True)}
    return made


def load_teacher(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str | None = None,
    weights: bool = True,
) -> Teacher:
    """A frozen teacher from a local folder or a Hub id.

    Args:
        name_or_path: folder with config.json, safetensors (single or sharded) and tokenizer, or a Hub id.
        revision: branch, tag or commit on the Hub.
        dtype: `float32`, `bfloat16` or `float16`.
        device: where the weights go.
        attn_implementation: transformers' name of the attention implementation; None takes the family's fastest that
            needs nothing beside torch.
        weights: False leaves every parameter on the meta device and reads no shard beyond its header.

    Raises:
        UserError: unknown family, missing or truncated file, tokenizer that does not fit the vocabulary.
        MachineError: the Hub cannot be reached.
    """
    return _open(name_or_path, revision, dtype, device, attn_implementation, weights)


def load_bare(name_or_path: str | Path, revision: str | None, dtype: str, known: dict[str, str]) -> Teacher:
    """A teacher that is never run, whose folder need hold config.json and the tokenizer only.

    Args:
        name_or_path, revision, dtype: as for `load_teacher`.
        known: what its files were where it was whole; those that are here must be the same.

    Raises:
        UserError: as `load_teacher`, but for missing weights; or a file is another one.
    """
    made = _open(name_or_path, revision, dtype, "cpu", None, None)
    for name, value in teacher_fingerprint(made.folder).items():
        if known.get(name) != value:
            raise UserError(
                f"{made.folder / name}: is not what it was where the teacher was whole. Fetch the file again, or name "
                "that teacher: teacher.model=PATH"
            )
    made.known = known
    return made


def _open(
    name_or_path: str | Path,
    revision: str | None,
    dtype: str,
    device: str,
    attn_implementation: str | None,
    weights: bool | None,
) -> Teacher:
    """See `load_teacher`; with `weights` None their files need not be there."""
    folder, commit = locate(str(name_or_path), revision)
    config = read_config(folder)
    if config.get("model_type") == "relinear":
        raise UserError(
            f"{folder}: this is a converted model, not a softmax-attention teacher. Give the original: "
            "teacher.model=PATH_OR_ID"
        )
    family = families.family_of(config, str(folder / "config.json"))
    if weights is not None:
        _check_weights(folder)
    model = _load(folder, dtype, device, attn_implementation=attn_implementation) if weights else _empty(folder, dtype)
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    return Teacher(model, tokenizer, family, config, str(name_or_path), folder, commit)


def load_model(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Any causal language model and its tokenizer; relinear's own exports through the installed classes.

    Args:
        name_or_path: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        dtype: `float32`, `bfloat16` or `float16`.
        device: where the weights go.
        trust_remote_code: allow code from the folder of a foreign model. Never needed for relinear's own.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        UserError: as `load_teacher`, without the restriction to known families.
    """
    folder, _ = locate(str(name_or_path), revision)
    config = read_config(folder)
    _check_weights(folder)
    if config.get("model_type") == "relinear":
        from .modeling.classes import student_classes

        base = families.family(config.get("base_model_type", ""), str(folder / "config.json"))
        model = _load(folder, dtype, device, cls=student_classes(base.name).causal_lm)
    elif config.get("auto_map") and not trust_remote_code:
        raise UserError(
            f"{folder}: this model runs its own code. If you trust it, say so: add --trust-remote-code to the command"
        )
    else:
        model = _load(folder, dtype, device, trust_remote_code=trust_remote_code)
    return model.eval(), load_tokenizer(folder, model.config.vocab_size)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict.

    Raises:
        UserError: missing or not JSON.
    """
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found. A model folder holds config.json, *.safetensors and a tokenizer") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Fetch the file again") from None


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: no tokenizer there, or one with ids beyond the model's vocabulary.
    """
    from transformers import AutoTokenizer

    # Beside one of our own config.json files transformers says that it does not know the type, and needs not to.
    ours = (folder / "config.json").exists() and read_config(folder).get("model_type") == "relinear"
    try:
        with _hushed("transformers.configuration_utils", ours):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder}: no usable tokenizer ({reason}). Copy tokenizer.json from the original") from None
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {vocab_size}. "
            "They do not belong together: copy the tokenizer files of this model's original"
        )
    return tokenizer


@contextmanager
def _hushed(name: str, when: bool) -> Iterator[None]:
    """Without the warnings of one of transformers' loggers: here, that it does not know our model type."""
    logger = logging.getLogger(name)
    level = logger.level
    if when:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def locate(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder for a path or Hub id, which is fetched, and the commit for the latter.

    Raises:
        UserError: no such folder or model.
        MachineError: the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder. Give a folder with config.json or a Hub id such as Qwen/Qwen2.5-0.5B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WEIGHT_PATTERNS))
    except GatedRepoError:
        raise UserError(f"{name}: gated on the Hub. Accept its terms there, then: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder and no such model on the Hub (private? then: hf auth login)") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise MachineError(f"{name}: no such folder, and the Hub cannot be reached ({reason})") from None
    return folder, folder.name


def _check_weights(folder: Path) -> None:
    """Refuse missing and truncated safetensors before anything is loaded."""
    if (folder / "adapter_config.json").exists():
        # transformers would load the adapter's weights on top without a word, from wherever it says.
        raise UserError(
            f"{folder / 'adapter_config.json'}: this folder holds an adapter (peft). Merge it into the model first "
            "(merge_and_unload, save_pretrained), and give the merged folder"
        )
    index = folder / "model.safetensors.index.json"
    shards = _indexed(index) if index.exists() else ["model.safetensors"]
    for shard in shards:
        path = folder / shard
        if not path.exists():
            named = f" (named in {index.name})" if index.exists() else ""
            raise UserError(f"{path}: not found{named}. relinear reads safetensors; fetch the file again")
        problem = _truncation(path)
        if problem:
            raise UserError(f"{path}: {problem}. Fetch the file again")


def _indexed(index: Path) -> list[str]:
    """The shards that an index names.

    Raises:
        UserError: not an index, or one that leads out of its folder.
    """
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards ({error!r}). Fetch the file again") from None
    return sorted(inside(str(shard), str(index)) for shard in named)


def _truncation(path: Path) -> str | None:
    """What is wrong with a safetensors file's size or header, None when nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return f"{size} bytes, too short for safetensors"
        (length,) = struct.unpack("<Q", head)
        if length + 8 > size:
            return f"truncated or corrupt: its header should end at byte {length + 8}, the file has {size} bytes"
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return "corrupt: its header is not JSON"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"truncated or corrupt: expected {expected} bytes, found {size}"


def _empty(folder: Path, dtype: str) -> Any:
    """The model with parameters on the meta device; buffers, which no shard holds, are computed."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    return model


def _load(folder: Path, dtype: str, device: str, cls: Any = None, **kwargs: Any) -> Any:
    """from_pretrained, strict: nothing missing, nothing left over."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # relinear shows its own progress
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    loader: Any = cls or AutoModelForCausalLM
    try:
        # Of weights safetensors alone are read: other formats are pickles, and can run what they like.
        model, info = loader.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True, **kwargs
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder}: cannot be loaded ({reason}). Fetch the files again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            found = ", ".join(sorted(map(str, info[kind]))[:3])
            raise UserError(f"{folder}: {kind.replace('_', ' ')} in the weights, e.g. {found}. Fetch the files again")
    return model.to(device)
