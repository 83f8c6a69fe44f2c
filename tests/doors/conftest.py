"""Other projects' libraries on exported students. Run by `make test-doors`, in an environment of its own."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

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
