"""Student and teacher of an evaluation: found at once, loaded when the first suite needs them, shared by all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distill.errors import MachineError, UserError
from ..distill.teacher import DTYPES, locate, read_config
from .store import checkpoint_digest

AUTO = "auto"


@dataclass
class Models:
    """One or two checkpoints.

    Attributes:
        names: "student" and "teacher" as given; "teacher" may be None.
        folders: where they lie, of those that there are.
        dtype: of the weights: `float32`, `bfloat16`, `float16`, or `auto`: as each was saved.
        device: where they go: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: run code from the folder of a foreign model.
        loaded: (model, tokenizer) of those that are in memory.
    """

    names: dict[str, str | None]
    folders: dict[str, Path]
    dtype: str = "float32"
    device: str = AUTO
    trust_remote_code: bool = False
    loaded: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _alike: bool = False

    def digest(self, side: str) -> str | None:
        """`checkpoint_digest` of a side, None where there is none."""
        if side not in self.folders:
            return None
        if side not in self._digests:
            self._digests[side] = checkpoint_digest(self.folders[side])
        return self._digests[side]

    def get(self, side: str) -> tuple[Any, Any]:
        """(model in eval mode, tokenizer) of a side."""
        if side not in self.loaded:
            from ..distill.teacher import load_model

            folder = self.folders[side]
            dtype = saved_dtype(folder) if self.dtype == AUTO else self.dtype
            self.loaded[side] = load_model(
                folder, dtype=dtype, device=self.place, trust_remote_code=self.trust_remote_code
            )
        return self.loaded[side]

    def pair(self) -> tuple[Any, Any, Any]:
        """(student, its tokenizer, teacher or None), of one vocabulary.

        Raises:
            UserError: a model cannot be read, or their tokenizers differ.
        """
        student, tokenizer = self.get("student")
        if "teacher" not in self.folders:
            return student, tokenizer, None
        teacher = self.get("teacher")
        if not self._alike:
            from .fidelity import check_same_vocabulary

            names = {side: str(name) for side, name in self.names.items()}
            check_same_vocabulary(names["student"], names["teacher"], (student, tokenizer), teacher)
            self._alike = True
        return student, tokenizer, teacher[0]

    @property
    def place(self) -> str:
        """The device that `device` means on this machine."""
        return pick_device(self.device)

    @property
    def sides(self) -> list[str]:
        """`student`, and `teacher` where there is one."""
        return list(self.folders)


def open_models(
    student: str,
    teacher: str | None,
    *,
    dtype: str = "float32",
    device: str = AUTO,
    trust_remote_code: bool = False,
) -> Models:
    """Find one or two checkpoints, without loading them.

    Args:
        student: folder or Hub id; the latter is fetched.
        teacher: likewise, or None.
        dtype: see `Models`.
        device: `auto` takes a GPU where there is one.
        trust_remote_code: see `Models`.

    Raises:
        UserError: no such checkpoint, or an unknown dtype or device.
        MachineError: the Hub cannot be reached.
    """
    if dtype not in (AUTO, *DTYPES):
        raise UserError(f"--dtype {dtype}: expected one of {AUTO}, {', '.join(DTYPES)}; e.g. --dtype bfloat16")
    if device not in (AUTO, "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N; e.g. --device cpu")
    given = {"student": student, "teacher": teacher}
    folders = {side: locate(name)[0] for side, name in given.items() if name is not None}
    for folder in folders.values():
        read_config(folder)
    return Models(given, folders, dtype, device, trust_remote_code)


def pick_device(asked: str) -> str:
    """`cpu`, or a GPU's name for torch.

    Raises:
        MachineError: a GPU is asked for, and there is none.
    """
    if asked == "cpu":
        return asked
    import torch

    if asked == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        raise MachineError(f"--device {asked}: torch sees no GPU here. Leave it out, or write --device cpu")
    return asked


def saved_dtype(folder: Path) -> str:
    """What a checkpoint's weights were saved in, as its config.json says; float32 where it says nothing."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
