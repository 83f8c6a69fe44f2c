"""Fingerprints notice what is another file; the manifest notices a byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from relinear.distill import digest, files, manifest
from relinear.distill.errors import UserError


def flip(path: Path, place: int) -> None:
    """Change one bit of a file, as a disk does: its time stays."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_every_byte_of_a_small_file_counts_and_samples_of_a_large_one(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(2000))
    large.write_bytes(bytes(40 * 2**20))
    before = [digest.fingerprint(small), digest.fingerprint(large), digest.checksum(large)]
    flip(small, 1234)
    flip(large, 3 * 2**20)  # between two samples
    after = [digest.fingerprint(small), digest.fingerprint(large), digest.checksum(large)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]
    for place in (5, 2**24 + 9, 40 * 2**20 - 1):
        flip(large, place)
        assert digest.fingerprint(large) != before[1]
        flip(large, place)


def test_a_teacher_is_its_weights_config_and_tokenizer(llama: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(llama, one)
    shutil.copytree(llama, other)
    (other / "README.md").write_text("said differently")
    held = digest.teacher_fingerprint(one)
    assert held == digest.teacher_fingerprint(other)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= held.keys()
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = digest.teacher_fingerprint(other)
    assert [name for name in held if held[name] != changed[name]] == ["model.safetensors"]
    (other / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        digest.teacher_fingerprint(other)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "", "..", "a\\b", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"index\.json: names the file"):
        digest.inside(name, "index.json")
    assert digest.inside("model-00001-of-00002.safetensors", "index.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, text in {"run.json": "{}", "metrics.jsonl": "", "measured/align.json": "{}"}.items():
        files.write_text(folder / name, text)
    for name, complete in {"align-6": True, "glue-2": False}.items():
        files.write_text(folder / "checkpoints" / name / "state.json", json.dumps({"complete": complete}))
        save_file({"x": torch.zeros(9)}, folder / "checkpoints" / name / "weights.safetensors")
    return folder


def test_the_manifest_holds_what_is_final(run: Path) -> None:
    weights = "checkpoints/align-6/weights.safetensors"
    found = manifest.write_manifest(run, complete=False)
    assert found.keys() == {"run.json", "measured/align.json", "checkpoints/align-6/state.json", weights}
    assert found[weights] == {
        "bytes": (run / weights).stat().st_size,
        "hash": digest.checksum(run / weights),
    }
    assert manifest.check_manifest(run) == []
    files.write_text(run / "metrics.jsonl", "more")
    shutil.rmtree(run / "checkpoints" / "glue-2")
    assert manifest.check_manifest(run) == []
    assert "metrics.jsonl" in manifest.write_manifest(run, complete=True)


def test_a_flipped_byte_a_cut_and_a_missing_file_are_named(run: Path) -> None:
    manifest.write_manifest(run, complete=True)
    flip(run / "checkpoints/align-6/weights.safetensors", 80)
    (run / "measured" / "align.json").unlink()
    files.write_text(run / "metrics.jsonl", "more")
    problems = manifest.check_manifest(run)
    assert [problem.split(": ")[1].split(" ")[0] for problem in sorted(problems)] == ["other", "gone;", "4"]
    # What was damaged stays so: a later manifest does not take the damage for the content.
    manifest.write_manifest(run, complete=True)
    assert any("weights.safetensors: other content" in problem for problem in manifest.check_manifest(run))
