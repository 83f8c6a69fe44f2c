"""Other projects' libraries on exported students. Run by `make test-doors`, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What these libraries warn of is not our fault."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.doors)
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def need(*names: str) -> None:
    """Skip without these packages."""
    absent = [name for name in names if find_spec(name) is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not installed: run `make test-doors`")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder of llama.cpp's converter; needs xllamacpp, llama.cpp's server built for a CPU."""
    need("xllamacpp")
    folder = Path(os.environ.get("LLAMA_CPP", ""))
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP names no folder with convert_hf_to_gguf.py: run `make test-doors`")
    return folder.resolve()


TEXT = "Once upon a time, there was a little girl named Lily. She loved to play"


class Exported(NamedTuple):
    """A folder, and what plain transformers makes of it: logits of `ids`, which are a text."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor

    def load(self, **more: Any) -> Any:
        """The model, as anybody loads it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **more).eval()

    def divergence(self, model: Any) -> float:
        """Mean KL divergence in nats of a model's next tokens from the exported one's."""
        with torch.no_grad():
            found = model(self.ids).logits.float().log_softmax(-1)
        expected = self.logits.log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())


def exported(folder: Path, text: str) -> Exported:
    """See the class."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        return Exported(folder, ids, model(ids).logits)


@pytest.fixture(scope="session")
def stories(real_conversion: Callable[..., Path]) -> Exported:
    """stories260k with its third layer kept and gated_deltanet in the others, exported."""
    return exported(real_conversion("gated_deltanet", "{}", "layers.keep=2") / "export", TEXT)


@pytest.fixture(scope="session")
def embedded(real_conversion: Callable[..., Path]) -> Exported:
    """The embedded teacher likewise, with its second layer kept: its widths are multiples of 64."""
    from relinear.recipes.embedded.text import documents

    run = real_conversion("gated_deltanet", "{}", "layers.keep=1", teacher="embedded")
    return exported(run / "export", next(documents(1, 1, "valid"))[:200])
