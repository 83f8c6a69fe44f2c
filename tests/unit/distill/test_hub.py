"""What is looked at before a model leaves the machine: proof, secrets, paths, licence; and its card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relinear.distill.card import CONVERSION, conversion, model_card
from relinear.distill.digest import teacher_fingerprint
from relinear.distill.errors import MachineError, UserError
from relinear.distill.hub import proof
from relinear.distill.hub.card_results import figures, model_index, read_results, speed_table
from relinear.distill.hub.citations import PAPERS, bibtex, methods
from relinear.distill.hub.errors import explain
from relinear.distill.hub.leaks import leaks, public_name, public_recipe
from relinear.distill.hub.licence import front_matter, licence_of, parse_licence
from relinear.distill.hub.push import named, plan_push
from relinear.distill.manifest import check_manifest, renew, write_manifest
from relinear.mixers import registry

PASSED = {"checks": {"loads": {"ok": True, "detail": "strict"}}}
FAILED = {"checks": {"loads": {"ok": False, "detail": "no"}}}
HOME = "/ho" + "me/somebody"
QUICK = {
    "student": {"perplexity": 5.5, "perplexity_stderr": 0.2},
    "teacher": {"perplexity": 5.0},
    **{"perplexity_ratio": 1.1, "perplexity_ratio_stderr": 0.01, "kl": 0.09, "top1_agreement": 0.85, "tokens": 4000},
}


def record(**teacher: Any) -> dict[str, Any]:
    """run.json, as far as a card reads it."""
    return {
        "recipe": {
            "data": {"mix": {"open-thoughts/OpenThoughts-114k": 0.5, f"{HOME}/private/notes.txt": 0.5}, "seq_len": 64},
            "stages": [{"transfer": {}}, {"align": {"tokens": 1000}}, {"glue": {"tokens": 2000, "train": "lora"}}],
        },
        "teacher": {"source": f"{HOME}/models/mini", "revision": None, "family": "llama", **teacher},
        "layers": {"1": ["rwkv7", {}], "2": ["rwkv7", {}], "3": ["gated_deltanet", {"window": 32}]},
        "environment": {"torch": "2", "transformers": "5", "relinear": "0", "gpu": None, "threads": 2, "world_size": 1},
    }


def result() -> dict[str, Any]:
    stage = {"name": "align", "steps": 10, "tokens": 1000, "seconds": 7.0, "loss": 0.25}
    return {"fidelity": QUICK, "recall": None, "stages": [stage], "tokens": 3000, "seconds": 3600.0, "step": 10}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export as far as these parts read it, proved."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "model_type": "relinear"}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "recipe.yaml").write_text("schema: 1\n")
    facts = conversion(record(), {"stage": "glue", "step": 10, "tokens": 3000}, result(), {"license": "mit"}, "float32")
    (folder / CONVERSION).write_text(json.dumps(facts))
    (folder / "README.md").write_text(model_card(folder))
    proof.write(folder, {"5.23.0": PASSED}, {"min": "5.23.0", "max": "5.23.0"})
    return folder


def test_a_proved_folder_has_no_problems_and_words_of_its_card_may_change(folder: Path) -> None:
    assert proof.problems(folder) == []
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Limits", "## Known limits").replace("OWNER/NAME", "me/mine"))
    assert proof.problems(folder) == []
    card.write_text(card.read_text().replace("max_new_tokens=32", "max_new_tokens=64"))
    assert len(proof.problems(folder)) == 1 and "Python code" in proof.problems(folder)[0]


def test_what_changed_since_the_proof_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "modeling_extra.py").write_text("")
    (folder / "recipe.yaml").unlink()
    found = " ".join(proof.problems(folder))
    assert "model.safetensors: changed" in found and "modeling_extra.py: was not there" in found
    assert "recipe.yaml: gone" in found
    (folder / "verify.json").unlink()
    assert "has no verify.json" in proof.problems(folder)[0]


def test_a_failed_proof_does_not_count(folder: Path) -> None:
    proof.write(folder, {"5.23.0": PASSED, "5.20.0": FAILED}, None)
    assert ["under transformers 5.20.0" in text for text in proof.problems(folder)] == [True]


@pytest.mark.parametrize(
    ("seen", "claimed"),
    [
        ({"5.23.0": PASSED}, ("5.23.0", "5.23.0")),
        ({"5.9.0": PASSED, "5.23.0": PASSED, "5.20.1": PASSED}, ("5.9.0", "5.23.0")),
        ({"5.9.0": FAILED, "5.23.0": PASSED}, ("5.23.0", "5.23.0")),
        ({"5.9.0": PASSED, "5.20.0": FAILED, "5.23.0": PASSED}, ("5.23.0", "5.23.0")),
        ({"5.9.0": PASSED, "5.20.0": FAILED}, ("5.9.0", "5.9.0")),
        ({"5.9.0": FAILED}, None),
    ],
)
def test_no_version_is_claimed_that_was_not_seen_to_work(seen: dict[str, Any], claimed: tuple[str, str] | None) -> None:
    found = proof.claim(seen)
    assert found == (None if claimed is None else {"min": claimed[0], "max": claimed[1]})


SECRETS = {
    "hf_" + "a" * 34: "Hugging Face token",
    "sk-" + "proj-" + "b" * 40: "API key",
    "AKIA" + "C" * 16: "AWS key",
    "ghp_" + "d" * 36: "GitHub token",
    "-----BEGIN RSA " + "PRIVATE KEY-----": "private key",
    "https://me:" + "secret1@example.org/x": "password",
    f"{HOME}/x": "path of this machine",
    "/data/lab/runs/x": "path of this machine",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_and_private_paths_are_found_where_they_stand(folder: Path, secret: str) -> None:
    (folder / "notes.yaml").write_text(f"one: 1\ntwo: '{secret}'\n")
    (found,) = leaks(folder, ["/data/lab"])
    assert (found.file, found.line) == ("notes.yaml", 2) and SECRETS[secret] in found.what
    if "path" not in found.what:
        assert secret not in str(found)  # an error message is no place for it either


def test_binary_files_vocabularies_and_ordinary_text_are_left_alone(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {f"{HOME}/": 1, "/data/lab/x": 2}}))
    (folder / "weights.safetensors").write_bytes(b"\0" + b"hf_" + b"a" * 34)
    (folder / "code.py").write_text(
        "# see https://arxiv.org/abs/2505.03005, /usr/lib, task-specific, hf_hub_download\n"
    )
    assert leaks(folder, ["/data/lab", "/"]) == []


def test_a_recipe_loses_the_places_of_this_machine_and_nothing_else() -> None:
    text = yaml.safe_dump(
        {
            "teacher": {"model": f"{HOME}/models/mini"},
            "data": {"mix": {"../texts/a.jsonl": 0.5, "org/set": 0.5}, "separator": "<|endoftext|>"},
            "save": {"dir": "~/runs/one/"},
        }
    )
    made = yaml.safe_load(public_recipe(text))
    assert made["teacher"]["model"] == "mini" and made["save"]["dir"] == "one"
    assert made["data"] == {"mix": {"a.jsonl": 0.5, "org/set": 0.5}, "separator": "<|endoftext|>"}
    assert public_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B" and public_name("C:\\Users\\me\\x.txt") == "x.txt"


def test_the_licence_is_the_teachers(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    assert licence_of(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: x\nlanguage: en\n---\n# A"
    )
    assert licence_of(tmp_path) == {"license": "other", "license_name": "qwen", "license_link": "x"}
    assert parse_licence("MIT") == {"license": "mit"}
    assert parse_licence("mine=https://x.org/l")["license_name"] == "mine"
    with pytest.raises(UserError, match=r"--license apach: .* Did you mean apache-2\.0"):
        parse_licence("apach")


def test_the_card_is_what_the_hub_takes(folder: Path) -> None:
    from huggingface_hub import ModelCard

    text = model_card(folder)
    data = ModelCard(text).data  # parses, and checks the model-index
    assert data.license == "mit" and data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.datasets == ["open-thoughts/OpenThoughts-114k"] and data.base_model is None
    assert {"relinear", "linear-attention", "llama", "rwkv7", "gated_deltanet"} <= set(data.tags or [])
    values = {found.metric_type: found.metric_value for found in data.eval_results or []}
    assert values == {"perplexity": 5.5, "perplexity_ratio": 1.1, "kl": 0.09, "top1_agreement": 0.85}
    assert HOME not in text and "notes.txt" in text
    for line in (
        "| 0 | the teacher's own",
        "| 1–2 | [",
        "| 3 | [Gated",
        "window of 32",
        "| align | 10 | 1,000 |",
    ):
        assert line in text, line
    assert "Not measured: recall, benchmark tasks" in text and "step 10 of stage `glue`" in text
    assert "1.00 hours of one CPU" in text and "arxiv2106_09685" in text  # LoRA trained it


def test_a_teacher_on_the_hub_is_the_base_model(folder: Path) -> None:
    known = record(source="org/mini", revision="0" * 40)
    (folder / CONVERSION).write_text(json.dumps(conversion(known, None, None, {}, "float32")))
    made = front_matter(model_card(folder))
    assert (made["base_model"], made["base_model_relation"]) == ("org/mini", "finetune")
    assert "model-index" not in made


def test_given_metadata_stays_when_the_card_is_written_anew(folder: Path) -> None:
    given = {**parse_licence("apache-2.0"), "base_model": "org/mini", "name": "me/mine"}
    (folder / "README.md").write_text(model_card(folder, given=given))
    again = model_card(folder, {"core": core()})
    made = front_matter(again)
    assert (made["license"], made["base_model"]) == ("apache-2.0", "org/mini")
    assert 'model_id = "me/mine"' in again and made["model-index"][0]["name"] == "me/mine"


def core() -> dict[str, Any]:
    pair = {"student": {"value": 0.4, "stderr": 0.05}, "teacher": {"value": 0.5, "stderr": 0.05}}
    return {
        "tasks": {"arc": {"metric": "acc", "n": 100, **pair, "recovery": {"value": 0.8, "stderr": 0.1}}},
        "mean": {},
    }


def test_every_suite_has_its_place(tmp_path: Path) -> None:
    exact = {"exact": 0.5, "exact_stderr": 0.1}
    needle = {"chance": {"exact": 0.1}, "signal": ["exact"], "models": {"teacher": {"exact": 1.0}, "student": exact}}
    noise = {"chance": {"exact": 0.1}, "signal": [], "models": {"teacher": {"exact": 0.1}, "student": exact}}
    results = {
        "quick": QUICK,
        "core": core(),
        "recall": {"lengths": [256], "tasks": {"needle": needle, "pairs": noise}},
        "generation": {"tasks": {"gsm8k": {"metric": "exact_match", "student": {"value": 0.2, "stderr": 0.1}}}},
        "mt_bench": {"judge": "J", "student": {"score": 5.0, "stderr": 0.1}, "teacher": None},
        "bench": {"lengths": [{"length": 1024, "student": {"cache_bytes": 10}, "teacher": {"cache_bytes": 40}}]},
    }
    for suite, value in results.items():
        (tmp_path / f"{suite}.json").write_text(json.dumps(value))
    (tmp_path / "long.json").write_text("{broken")
    assert read_results(tmp_path) == results
    found = figures(results)
    assert [(f.suite, f.data) for f in found[4:]] == [
        *(("core", "arc (100 questions)"), ("generation", "gsm8k")),
        *(("mt_bench", "MT-Bench, judged by J"), ("recall", "needle")),
    ]
    assert found[4].extra == "80.0 %" and found[4].teacher == 0.5
    (index,) = model_index("mine", found, "text")
    assert [r["dataset"]["name"] for r in index["results"]][:2] == ["text", "arc"]
    assert speed_table(results["bench"])[-1] == "| 1024 |  |  | 10 / 40 |"


def test_every_mixer_can_be_cited() -> None:
    for name in registry.names():
        numbers = methods([name], [{"align": {}}])
        assert numbers and all(number in PAPERS for number in numbers), name
    text = bibtex(["2505.03005", "2505.03005"])
    assert text.startswith("@misc{arxiv2505_03005,") and "year = {2025}" in text
    assert methods([], [{"matrix": {}}, {"glue": {"train": "all"}}]) == ["2408.10189", "2505.03005"]


def test_a_plan_says_what_is_missing_and_what_forbids_it(folder: Path) -> None:
    plan = plan_push(folder, "me/mine")
    assert plan.problems == [] and [text.partition(":")[0] for text in plan.missing] == ["base_model"]
    (folder / "README.md").write_text(re.sub("license: mit\n", "", (folder / "README.md").read_text()))
    assert "license" in plan_push(folder, "me/mine").missing[0]
    assert "license" in plan_push(folder, "me/mine", private=False).problems[0]
    (folder / "recipe.yaml").write_text(f"dir: {HOME}/x\n")
    problems = plan_push(folder, "me/mine").problems
    assert any("recipe.yaml: changed" in text for text in problems)
    assert any(text.endswith(f"recipe.yaml:1: a path of this machine, {HOME}") for text in problems)
    with pytest.raises(UserError, match="not an export"):
        plan_push(folder / "nothing", "me/mine")


def test_the_quick_start_names_the_model_as_it_is_called_there(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert 'model_id = "me/mine"' in named(card, "me/mine")
    assert 'from_pretrained(model_id, revision="glue-10", trust_remote_code=True)' in named(card, "me/mine", "glue-10")
    assert proof.code_hash(named(card, "me/mine")) == proof.code_hash(card)


class Answer:
    def __init__(self, status: int) -> None:
        self.status_code = status


class Refusal(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("the Hub's words\nand more")
        self.response = Answer(status)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (Refusal(401), UserError, "hf auth login"),
        (Refusal(403), UserError, "may not write to me"),
        (Refusal(404), UserError, "not found"),
        (Refusal(409), UserError, "changed meanwhile"),
        (Refusal(400), UserError, "status 400: the Hub's words"),
        (Refusal(429), MachineError, "type the same command again"),
        (Refusal(503), MachineError, "status 503"),
        (ConnectionError("no route"), MachineError, "cannot be reached"),
    ],
)
def test_what_the_hub_says_becomes_what_to_type(error: Exception, kind: type[Exception], says: str) -> None:
    outer = RuntimeError("while uploading")
    outer.__cause__ = error
    for found in (explain(error, "me/mine"), explain(outer, "me/mine")):
        assert isinstance(found, kind) and says in str(found) and "and more" not in str(found)
    assert explain(ValueError("a mistake of ours"), "me/mine") is None


def test_what_verify_notes_in_config_json_makes_no_other_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1, "verified_transformers": None}))
    before = teacher_fingerprint(tmp_path)
    path.write_text(json.dumps({"verified_transformers": {"min": "5.0.0", "max": "5.1.0"}, "a": 1}))
    assert teacher_fingerprint(tmp_path) == before
    path.write_text(json.dumps({"verified_transformers": None, "a": 2}))
    assert teacher_fingerprint(tmp_path) != before


def test_a_manifest_learns_of_what_was_written_on_purpose_and_of_nothing_else(tmp_path: Path) -> None:
    for name in ("export/README.md", "export/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    write_manifest(tmp_path, complete=True)
    for name in ("export/README.md", "export/config.json"):
        (tmp_path / name).write_text("newer")
    renew([tmp_path / "export" / "README.md"])
    (problem,) = check_manifest(tmp_path)
    assert "config.json" in problem
    (tmp_path / "export" / "config.json").rename(tmp_path / "export" / "other.json")
    renew([tmp_path / "export"])
    assert check_manifest(tmp_path) == []
    (tmp_path / "export" / "other.json").write_text("changed")
    assert len(check_manifest(tmp_path)) == 1
