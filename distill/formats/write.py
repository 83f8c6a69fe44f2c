"""Writing an exported student in a published architecture's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from ... import __version__
from ..errors import UserError
from ..export import SHARD, copy_teacher_files, shard_bytes
from ..families import FAMILIES
from ..files import commit_directory
from . import pairs

RECORD = "format.json"
_MODULES = {"fla-gla": "fla", "fla-gated_deltanet": "fla"}
_PREFIX = {"fla-gla": "attn", "fla-gated_deltanet": "attn"}
# Of the teacher's config.json, where it is said there.
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act")


def convert(
    source: Path | str,
    name: str,
    out: Path | str,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    max_shard_size: str | int = SHARD,
) -> dict[str, Any]:
    """Write the student of an exported folder in a published format: config, weights, tokenizer.

    Args:
        source: a folder that `relinear export` wrote.
        name: of the format, see `pairs.FORMATS`.
        out: the folder to make.
        dtype: of the weights written; decays and their like stay fp32.
        overwrite: replace a folder that stands there already.
        max_shard_size: as for `export`.

    Returns:
        What format.json holds: `format`, `architecture`, `mixer`, `options`, `notes` on what is not exact for certain.

    Raises:
        UserError: no such folder or format, the pair is not exact, or `out` exists.
        MachineError: the disk is full.
    """
    source, out = Path(source), Path(out)
    wanted = pairs.find(name)
    student, config = pairs.read_student(source)
    pairs.check(wanted, student, str(source))
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already exists. Give another folder with --out, or add --overwrite to replace it")
    files = _files(source)
    module = import_module(f".{_MODULES.get(name, name)}", __package__)
    tensors, notes = _tensors(files, module, wanted, student, getattr(torch, dtype))
    record = {
        "format": name,
        "architecture": wanted.architecture,
        "mixer": wanted.mixer,
        "options": {demand.option: getattr(student.options(0), demand.option) for demand in wanted.demands},
        "notes": notes,
        "relinear_version": __version__,
    }
    limit = shard_bytes(max_shard_size)

    def write(folder: Path) -> None:
        save_torch_state_dict(tensors, folder, max_shard_size=limit, metadata={"format": "pt"})
        _write(folder / "config.json", _config(wanted, module, student, config, dtype))
        _write(folder / RECORD, record)
        copy_teacher_files(source, folder)
        for extra in ("conversion.json", "recipe.yaml"):
            if (source / extra).exists():
                (folder / extra).write_bytes((source / extra).read_bytes())

    commit_directory(out, write, needed=sum(value.numel() * value.element_size() for value in tensors.values()))
    return record


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _tensors(
    files: Mapping[str, Path], module: Any, wanted: pairs.Format, student: pairs.Student, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every tensor under the format's name, and what is not exact for certain."""
    attention = FAMILIES[student.family].attention
    prefix = _PREFIX.get(wanted.name, "self_attn")

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    made = {module.rename(name): read(name).to(dtype) for name in files if f".{attention}." not in name}
    made.setdefault("lm_head.weight", made[module.rename("model.embed_tokens.weight")].clone())
    notes: list[str] = []
    for index in range(student.layers):
        layer = f"model.layers.{index}."

        def take(name: str, layer: str = layer) -> torch.Tensor:
            full = layer + ("input_layernorm.weight" if name == "norm" else f"{attention}.{name}")
            return read(full).double()

        for name, value in module.layer(take, student, index).items():
            kept = torch.float32 if name in module.FP32 else dtype
            made[f"{layer}{prefix}.{name}"] = value.to(kept).contiguous()
        notes += [f"layer {index}: {note}" for note in module.notes(take, student, index)]
    return made, notes


def _config(
    wanted: pairs.Format, module: Any, student: pairs.Student, config: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    keys = _KEYS if module.__name__.endswith(".fla") else _KEYS + _ATTENTION_KEYS
    values = {key: config[key] for key in keys if key in config}
    values |= {"architectures": [wanted.architecture], "tie_word_embeddings": False, "use_cache": True, "dtype": dtype}
    return values | module.config(student)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
