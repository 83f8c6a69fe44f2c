"""What users install: the wheel holds the package, its data and nothing else, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mixers", "distill", "recipes", "eval", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what git knows or would take; offline, so without pip's isolation."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    """Files in the wheel, its metadata left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def ours(pattern: str) -> set[str]:
    """Files of the rooms as they should be named in the wheel."""
    found = {path for room in ROOMS for path in (ROOT / room).rglob(pattern)}
    return {
        f"relinear/{path.relative_to(ROOT)}" for path in found if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_module_and_no_other(contents):
    assert {name for name in contents if name.endswith(".py")} == ours("*.py") | {"relinear/__init__.py"}


def test_wheel_holds_the_data(contents):
    data = {name for name in contents if not name.endswith(".py")}
    assert data == ours("*.yaml") | ours("*.html") | ours("*.css") | {
        f"relinear/{p.relative_to(ROOT)}" for p in embedded()
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {Path(name).name for name in data}
    assert any(name.endswith(".yaml") for name in data)


def embedded() -> list[Path]:
    """Files of the embedded teacher."""
    return [path for path in (ROOT / "recipes" / "embedded" / "teacher").rglob("*") if path.is_file()]


def test_embedded_teacher_is_small():
    assert 0 < sum(path.stat().st_size for path in embedded()) <= 4_000_000


def test_wheel_says_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        commands = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("gpu", "mamba", "deepspeed", "eval", "wandb", "lora", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "relinear = relinear.launch.main:main" in commands


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import relinear, sys; from relinear.launch.main import main; print(relinear.__file__, file=sys.stderr);"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for arguments in (["ls"], ["check", "quickstart"], ["show", "quickstart"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(str(tmp_path / "site")), "the checkout was imported"
