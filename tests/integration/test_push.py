"""Pushing through huggingface_hub's own HTTP client, to a Hub on this machine, and loading from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from relinear.distill.export import export
from relinear.distill.hub import proof
from relinear.distill.manifest import check_manifest
from relinear.launch.main import main
from relinear.recipes import loader, runner

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Relinear = Callable[..., Done]


class Server:
    """A Hub in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        _, said = self.process.communicate()
        assert said == ""

    def fail(self, match: str, **how: Any) -> None:
        """The next requests that match fail, as tests/hub_server.py says."""
        self.post("fail", match=match, **how)

    def post(self, what: str, **value: Any) -> None:
        """Ask the server for something of its own."""
        data = json.dumps(value).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.address}/_test/{what}", data, method="POST")).close()

    def log(self) -> list[str]:
        with urllib.request.urlopen(f"{self.address}/_test/log") as answer:
            return json.load(answer)

    def files(self, repo: str, branch: str = "main") -> dict[str, Path]:
        """What a branch holds: path -> where its content is."""
        held = json.loads((self.folder / "state.json").read_text())["repos"][repo]
        tree = held["commits"][held["refs"][branch]]
        return {name: self.folder / "objects" / entry["oid"] for name, entry in tree.items()}

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())


# Commands one after the other in one process, as starting one for each takes most of the time.
WORKER = """
import contextlib, io, json, os, sys
from relinear.launch.main import main
for line in sys.stdin:
    arguments, environment = json.loads(line)
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hub"))
    yield server
    server.close()


@pytest.fixture
def hub(server: Server) -> Server:
    """The Hub, empty."""
    server.post("reset")
    return server


def reaching(hub: Server, home: Path, token: str = "owner") -> dict[str, str]:
    """An environment in which huggingface_hub talks to that Hub."""
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return env | {"HF_TOKEN": token, "HF_HOME": str(home), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def relinear(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relinear]:
    """relinear(*arguments, **environment) where the Hub of these tests is the Hub."""
    home = tmp_path_factory.mktemp("home")
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=reaching(server, home), cwd=home, **pipes)
    assert worker.stdin is not None and worker.stdout is not None
    incoming, outgoing = worker.stdin, worker.stdout

    def run(*arguments: str | Path, **environment: str) -> Done:
        print(json.dumps([list(map(str, arguments)), {"HF_TOKEN": "owner"} | environment]), file=incoming, flush=True)
        return Done(*json.loads(outgoing.readline()))

    yield run
    worker.kill()
    worker.communicate()


def small(teacher: Path, text: Path, out: Path, *changes: str) -> Any:
    """A recipe of a few steps, with two saved ones in glue."""
    stage = {"batch": 4, "lr": 1e-3, "warmup": 1}
    stages = [{"transfer": {}}, {"align": {"tokens": "1k", **stage}}, {"glue": {"tokens": "2k", **stage}}]
    given = [f"teacher.model={teacher}", f"data.source={text}", f"save.dir={out}", f"stages={json.dumps(stages)}"]
    fixed = ["data.seq_len=32", "eval.tokens=500", "save.every=1k", "layers.keep=1"]
    return loader.load("gated_deltanet", [*given, *fixed, *changes])


@pytest.fixture(scope="module")
def made(llama: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its export in several shards. Its proof is written, not made: test_export.py has the real one."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    runner.run(small(llama, story_file, run))
    export(run, out=run / "export", overwrite=True, max_shard_size="30KB")
    claim_proof(run / "export")
    return run


def claim_proof(folder: Path) -> None:
    checks = {"loads": {"ok": True, "detail": "strict"}}
    proof.write(folder, {"5.23.0": {"checks": checks}}, {"min": "5.23.0", "max": "5.23.0"})


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "runs" / "mine"))


def test_what_goes_up_is_the_folder_and_a_second_push_sends_nothing(relinear: Relinear, hub: Server, run: Path) -> None:
    before = {p.name: p.read_bytes() for p in (run / "export").iterdir()}
    dry = relinear("push", run, "--repo", "owner/mine", "--dry-run", "--json")
    plan = json.loads(dry.stdout)
    assert dry.returncode == 0 and {f["path"] for f in plan["files"]} == before.keys() and plan["private"]
    assert hub.log() == [] and "Nothing was sent" in dry.stderr
    done = relinear("push", run, "--repo", "owner/mine", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["url"] == f"{hub.address}/owner/mine" and told["private"] and told["files"] == len(before)
    there = hub.files("owner/mine")
    assert there.keys() == before.keys() | {".gitattributes"}
    for name, content in before.items():
        if name != "README.md":
            assert there[name].read_bytes() == content, name
    assert 'model_id = "owner/mine"' in there["README.md"].read_text()
    assert len([name for name in before if name.endswith(".safetensors")]) > 2
    sent = len([line for line in hub.log() if line.startswith("PUT")])
    again = relinear("push", run, "--repo", "owner/mine", "--json")
    assert json.loads(again.stdout)["commit"] == told["commit"]
    assert len([line for line in hub.log() if line.startswith("PUT")]) == sent


def test_files_of_an_earlier_push_go(relinear: Relinear, hub: Server, run: Path) -> None:
    assert relinear("push", run, "--repo", "owner/mine").returncode == 0
    export(run, out=run / "export", overwrite=True)
    claim_proof(run / "export")
    assert relinear("push", run, "--repo", "owner/mine").returncode == 0
    assert [name for name in hub.files("owner/mine") if name.endswith(".safetensors")] == ["model.safetensors"]


def test_a_push_that_broke_goes_on_where_it_stopped(relinear: Relinear, hub: Server, run: Path) -> None:
    """The third shard is refused; what was sent before is not sent again, and nobody sees a half of it."""
    shards = sorted((run / "export").glob("*.safetensors"))
    oids = [proof.sha256(path) for path in shards]
    hub.fail(f"PUT /_lfs/{oids[2]}", status=403)
    broken = relinear("push", run, "--repo", "owner/mine")
    assert broken.returncode == 2 and "may not write to owner" in broken.stderr
    assert hub.files("owner/mine").keys() == {".gitattributes"}
    first = [line for line in hub.log() if line.startswith("PUT")]
    assert [any(oid in line for line in first) for oid in oids[:4]] == [True, True, True, False]
    assert relinear("push", run, "--repo", "owner/mine").returncode == 0
    later = [line for line in hub.log() if line.startswith("PUT")][len(first) :]
    assert [any(oid in line for line in later) for oid in oids[:4]] == [False, False, True, True]
    assert shards[0].name in hub.files("owner/mine")


def test_lost_connections_are_tried_again_without_a_second_commit(relinear: Relinear, hub: Server, run: Path) -> None:
    hub.fail("PUT /_lfs/", after=1000)  # in the middle of a shard
    hub.fail("POST .*/commit/", status=503)
    done = relinear("push", run, "--repo", "owner/mine")
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr
    log = hub.state()["repos"]["owner/mine"]["log"]
    assert [commit["title"] for commit in log] == ["initial commit", "Upload export with relinear"]


def test_whoever_may_not_is_told_what_to_type(relinear: Relinear, hub: Server, run: Path) -> None:
    for token, says in {"stranger": "hf auth login", "reader": "may not write to owner"}.items():
        done = relinear("push", run, "--repo", "owner/mine", HF_TOKEN=token)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert hub.state()["repos"] == {}
    missing = relinear("push", run)
    assert missing.returncode == 2 and "--repo: where to?" in missing.stderr


def test_offline_is_said_before_anything_is_sent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "--repo", "owner/mine"]) == 3  # tests are offline
    assert "HF_HUB_OFFLINE=0" in capsys.readouterr().err


def test_what_was_not_verified_and_secrets_never_leave(relinear: Relinear, hub: Server, run: Path) -> None:
    """With the proof gone, with one byte changed, and with a token in a file."""
    folder = run / "export"
    secret = "hf_" + "x" * 30
    (folder / "metrics.jsonl").write_text(f'{{"a": 1}}\n{{"token": "{secret}"}}\n')
    for arguments in ((), ("--dry-run",)):
        done = relinear("push", run, "--repo", "owner/mine", *arguments)
        assert done.returncode == 2
        assert "metrics.jsonl: changed since it was verified" in done.stderr
        assert "metrics.jsonl:2: a Hugging Face token" in done.stderr and secret not in done.stderr + done.stdout
        assert f"relinear verify {folder}" in done.stderr
    assert hub.log() == []


def test_visibility_is_as_asked(relinear: Relinear, hub: Server, run: Path) -> None:
    refused = relinear("push", run, "--repo", "owner/mine", "--public")
    assert refused.returncode == 2 and "license" in refused.stderr  # nobody said whose the weights are
    assert relinear("card", run, "--license", "mit").returncode == 0
    assert not [text for text in check_manifest(run) if "README.md" in text]
    assert relinear("push", run, "--repo", "owner/mine", "--public").returncode == 0
    assert not hub.state()["repos"]["owner/mine"]["private"]
    private = relinear("push", run, "--repo", "owner/mine")
    assert private.returncode == 2 and "everybody can read it" in private.stderr


def test_steps_are_revisions_and_collections_are_kept(relinear: Relinear, hub: Server, run: Path) -> None:
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(steps) >= 2
    for name in steps:
        stage, _, step = name.rpartition("-")
        claim_proof(export(run, int(step), stage=stage))
    done = relinear("push", run, "--repo", "mine", "--steps", "--collection", "My models", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sorted(made["revision"] for made in told["steps"]) == steps and told["repo"] == "owner/mine"
    assert hub.state()["repos"]["owner/mine"]["refs"].keys() == {"main", *steps}
    align = next(name for name in steps if name.startswith("align"))
    card = hub.files("owner/mine", align)["README.md"].read_text()
    assert f'revision="{align}"' in card and "stage `align`" in card
    assert "model-index" not in yaml.safe_load(card.split("---")[1])  # what was measured is another step
    (collection,) = hub.state()["sets"].values()
    assert [item["id"] for item in collection["items"]] == ["owner/mine"]


@pytest.mark.slow
def test_a_run_pushes_by_itself_and_a_stranger_loads_it(
    relinear: Relinear, hub: Server, llama: Path, story_file: Path, tmp_path: Path
) -> None:
    """run → verify → card → push, then transformers alone, with another's token, from the Hub."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(loader.dump(small(llama, story_file, tmp_path / "run", "publish.repo=owner/auto")))
    done = relinear("run", recipe)
    assert done.returncode == 0 and f"pushed: {hub.address}/owner/auto" in done.stderr, done.stderr
    code = (
        "import torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "m = M.from_pretrained('owner/auto', trust_remote_code=True)\n"
        "t = T.from_pretrained('owner/auto', trust_remote_code=True)\n"
        "i = t('Once', return_tensors='pt', return_token_type_ids=False)\n"
        "made = m.generate(**i, max_new_tokens=5, do_sample=False)\n"
        "print(type(m).__name__, made.shape[1] - i['input_ids'].shape[1])\n"
    )
    env = reaching(hub, tmp_path / "stranger", "reader")
    command = [sys.executable, "-I", "-c", code]
    made = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.stdout == "RelinearForCausalLM 5\n", made.stderr


@pytest.mark.slow
def test_a_push_that_fails_harms_no_run(
    relinear: Relinear, hub: Server, llama: Path, story_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(loader.dump(small(llama, story_file, tmp_path / "run", "publish.repo=owner/auto")))
    done = relinear("run", recipe, HF_TOKEN="stranger")
    assert done.returncode == 0, done.stderr
    assert f"relinear push {tmp_path / 'run'} --repo owner/auto" in done.stderr
    assert check_manifest(tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "complete"
    assert relinear("push", tmp_path / "run", "--repo", "owner/auto").returncode == 0
