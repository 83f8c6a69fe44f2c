"""What trains, what must not change, and what did: every tensor by a hash of its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...distill.errors import RunFailed
from ...distill.fingerprints import different, fingerprints
from ...distill.glue import trained_parameters

PARTS = ("ffn", "mixers", "rest")
"""Feed-forward blocks, mixers, and all else: embeddings, norms, attention that was kept, the head."""


@dataclass(frozen=True)
class Held:
    """A model's tensors before training.

    Attributes:
        mlp: what the family calls a decoder layer's feed-forward block.
        hashes: name -> hash, of every parameter and buffer that is saved.
        frozen: the tensors that must come out as they went in, by name.
        trained: number of parameters that learn.
    """

    mlp: str
    hashes: dict[str, str]
    frozen: dict[str, Any]
    trained: int


def hold(model: Any, train: str, mlp: str) -> Held:
    """Choose what learns (`requires_grad`, in place) and note how everything is.

    Args:
        model: a RelinearForCausalLM without adapters. With `lora` all of it is frozen: peft adds what learns.
        train: one of `distill.glue.TRAIN`.
        mlp: see `Held`.
    """
    model.requires_grad_(False)
    chosen: dict[str, Any] = {}
    if train != "lora":
        mixers, rest = trained_parameters(model, train, mlp)
        chosen = mixers | rest
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    learns = {id(parameter) for parameter in chosen.values()}
    tensors = model.state_dict(keep_vars=True)
    frozen = {name: tensor for name, tensor in tensors.items() if id(tensor) not in learns}
    return Held(mlp, fingerprints(tensors), frozen, sum(p.numel() for p in chosen.values()))


def check_frozen(held: Held) -> None:
    """Compare what was frozen with how it was, byte for byte.

    Raises:
        RunFailed: something changed; nothing is exported.
    """
    changed = different({name: held.hashes[name] for name in held.frozen}, fingerprints(held.frozen))
    if changed:
        raise RunFailed(f"frozen tensors changed: {', '.join(sorted(changed)[:5])}; nothing is exported")


def changes(held: Held, model: Any) -> dict[str, dict[str, int]]:
    """Of each of `PARTS`: its tensors and bytes, and those of the tensors that differ from how they were.

    Args:
        held: from before.
        model: trained, adapters merged.
    """
    tensors = model.state_dict()
    changed = set(different(held.hashes, fingerprints(tensors)))
    own = {name for name, module in model.named_modules() if any(module is mixer for mixer in model.mixers().values())}
    found: dict[str, dict[str, int]] = {
        part: {"tensors": 0, "bytes": 0, "changed_tensors": 0, "changed_bytes": 0} for part in PARTS
    }
    for name, tensor in tensors.items():
        mixer = any(name.startswith(f"{prefix}.") for prefix in own)
        part = found["mixers" if mixer else "ffn" if f".{held.mlp}." in name else "rest"]
        size = tensor.numel() * tensor.element_size()
        part["tensors"] += 1
        part["bytes"] += size
        part["changed_tensors"] += name in changed
        part["changed_bytes"] += size * (name in changed)
    return found
