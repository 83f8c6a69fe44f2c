"""Results by key: found again, never overwritten by another one's, and what changes a checkpoint's digest."""

from __future__ import annotations

import json
import shutil

import pytest

from relinear.distill.errors import UserError
from relinear.eval import store


def test_a_result_is_found_by_its_key_and_steps_aside_for_another(tmp_path):
    kept = store.Store(tmp_path / "results")
    assert kept.find("quick", "a" * 64) is None
    kept.put("quick", {"key": "a" * 64, "kl": 1.0})
    kept.put("quick", {"key": "b" * 64, "kl": 2.0})
    assert json.loads(kept.path("quick").read_text())["kl"] == 2.0
    for key, kl in (("a" * 64, 1.0), ("b" * 64, 2.0)):
        found = kept.find("quick", key)
        assert found is not None and found["kl"] == kl
    assert kept.find("recall", "a" * 64) is None
    kept.put("quick", {"key": "b" * 64, "kl": 3.0})
    assert [path.name for path in (kept.folder / "earlier").iterdir()] == ["quick-aaaaaaaaaaaa.json"]


def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path):
    kept = store.Store(tmp_path)
    for text in ("[1]", "{"):
        kept.path("quick").write_text(text)
        with pytest.raises(UserError, match=r"quick\.json.*--out DIR"):
            kept.put("quick", {"key": "a"})
        assert kept.path("quick").read_text() == text


def test_the_digest_is_of_what_changes_answers(llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    before = store.checkpoint_digest(llama)
    assert len(before) == 64 and store.checkpoint_digest(folder) == before
    (folder / "README.md").write_text("another card")
    assert store.checkpoint_digest(folder) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert store.checkpoint_digest(folder) != before, name
        (folder / name).write_bytes(content)
    assert store.checkpoint_digest(folder) == before


def test_results_lie_in_the_run_or_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    run = tmp_path / "runs" / "mine"
    assert store.results_folder("runs/mine/export") == run / "eval" == store.results_folder(run / "export")
    assert store.results_folder(run) == run / "eval"
    assert str(store.results_folder("models/small")) == "eval-results/small"
    assert store.results_folder(run, tmp_path / "there") == tmp_path / "there"
