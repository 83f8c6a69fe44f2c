"""The public API is lazy, complete and what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import relinear


def test_importing_relinear_loads_nothing_heavy() -> None:
    code = (
        "import sys, relinear; relinear.plan; relinear.load_recipe;"
        "print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert set(relinear._PUBLIC) | {"__version__"} == set(relinear.__all__)
    for name in relinear.__all__:
        assert getattr(relinear, name)
        assert name in dir(relinear)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = relinear.nothing  # pyright: ignore[reportAttributeAccessIssue]
