"""The house keeps its order: packages, import directions, file sizes, names and words."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mixers", "distill", "recipes", "eval", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What a room may import of the package beside itself; `None` as a module list means the whole room.
DIRECTIONS: dict[str, dict[str, set[str] | None]] = {
    "mixers": {},
    "distill": {"mixers": None},
    "eval": {
        "mixers": None,
        "distill": {
            *("errors", "families", "family", "files", "digest", "run_folder"),
            *("teacher", "student", "modeling", "data", "draft"),
        },
    },
    "recipes": {"mixers": None, "distill": None, "eval": None},
    "launch": {"mixers": None, "distill": None, "eval": None, "recipes": None},
}
# Started by `python -m` and never imported: above the rooms, whatever its folder.
STARTED = {"recipes.run"}
ONLY_LAUNCH_AND_EACH_OTHER = {
    "recipes.runner",
    "recipes.final_eval",
    "recipes.session",
    "recipes.quickstart",
    "recipes.bench",
}
HEAVY = {
    *("torch", "transformers", "datasets", "safetensors", "numpy", "matplotlib"),
    *("tokenizers", "huggingface_hub", "fla", "pyarrow"),
}
# Rooms and modules that a command may load before any work: no torch, directly or through what they import.
TORCH_FREE = {
    "mixers.specs": True,
    "mixers.registry": False,
    "distill.errors": False,
    "distill.families": False,
    "distill.family": False,
    "distill.files": False,
    **{f"distill.{name}": False for name in ("digest", "lock", "manifest", "run_folder", "spikes", "watchdog")},
    **{
        f"eval.{name}": False
        for name in ("store", "suites", "models", "texts", "local_tasks", "recovery", "core_table")
    },
    "distill.card": False,
    **{f"distill.hub.{name}": False for name in ("proof", "leaks", "licence", "citations", "card_results")},
    **{f"distill.hub.{name}": False for name in ("errors", "push", "publish")},
    "launch": True,
    "recipes": True,
}
TORCH_BOUND = {
    *("recipes.calibration", "recipes.stream_calibration", "recipes.measuring", "recipes.without_teacher"),
    *("recipes.logit_caches", "recipes.bench_logits"),
    *(f"recipes.select.{name}" for name in ("run", "evaluate", "forward", "attention", "guided")),
    *(
        "recipes.runner",
        "recipes.final_eval",
        "recipes.session",
        "recipes.streaming",
        "recipes.quickstart",
        "recipes.embedded.train",
    ),
    *(f"recipes.posttrain.{name}" for name in ("run", "frozen", "measure", "saving", "trainers")),
    *("recipes.bench", "recipes.bench_ops", "recipes.bench_cases", "recipes.bench_steps"),
    *("recipes.bench_ranks", "recipes.bench_train"),
    *("recipes.bench_measure", "recipes.bench_baselines", "recipes.bench_methods_job"),
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the project: those that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for line in sorted(set(listed.stdout.splitlines())) if (path := ROOT / line).is_file()]


SOURCES = [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] in (*ROOMS, "__init__.py")]


def module_name(path: Path) -> str:
    """`mixers.specs.base` for mixers/specs/base.py; a package has the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, whether it is ours, whether it runs on import) of every import in a file; ours without `relinear.`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parent.parts
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, False, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    base = ".".join((*package[: len(package) - child.level + 1], *filter(None, [child.module])))
                    for alias in child.names:
                        full = f"{base}.{alias.name}".strip(".")
                        found.append((full if full in NAMES else base, True, at_import))
                else:
                    found.append((child.module or "", False, at_import))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            visit(
                child, at_import and not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            )

    visit(tree, True)
    return found


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_packages_are_the_folders():
    folders = {"relinear"} | {
        ".".join(("relinear", *path.relative_to(ROOT).parent.parts)) for path in tracked("*/__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)
    assert {name.split(".")[1] for name in folders - {"relinear"}} == set(ROOMS)


def test_every_source_file_is_in_a_package():
    assert [str(p) for p in SOURCES if not (p.parent / "__init__.py").exists()] == []


def test_no_other_python_file_in_the_root():
    assert relative([path for path in tracked("*.py") if path.parent == ROOT]) == ["__init__.py"]


def test_tests_are_no_package():
    assert relative(tracked("tests/**/__init__.py", "tests/__init__.py")) == []


@pytest.mark.parametrize("room", ROOMS)
def test_import_directions(room):
    wrong = []
    for name, path in NAMES.items():
        if name.split(".")[0] != room or name in STARTED:
            continue
        for module, ours, _ in imports(path):
            other, _, rest = module.partition(".")
            if not ours or other in (room, "") or module == "":
                continue
            allowed = DIRECTIONS[room].get(other, set())
            if allowed is not None and rest.split(".")[0] not in allowed:
                wrong.append(f"{name} imports {module}")
            if module in ONLY_LAUNCH_AND_EACH_OTHER and room != "launch":
                wrong.append(f"{name} imports {module}: only launch may")
            if module in STARTED:
                wrong.append(f"{name} imports {module}: it is started, never imported")
    assert wrong == []


def test_nothing_read_can_run_code():
    """No pickle, no code of others but where a flag or its very purpose says so."""
    forbidden = re.compile(
        r"\bpickle\b|allow_pickle=True|weights_only=False|yaml\.load\(|\bexec\(|trust_remote_code=True"
    )
    asked = {"distill/verify_child.py", "distill/card.py"}  # runs an export as its users will; says how
    wrong = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if str(path.relative_to(ROOT)) not in asked:
            wrong += [f"{path.relative_to(ROOT)}: {found}" for found in forbidden.findall(text)]
        wrong += [
            f"{path}: torch.load" for call in re.findall(r"torch\.load\(.*", text) if "weights_only=True" not in call
        ]
    assert wrong == []


def test_mixers_import_torch_only():
    wrong = []
    for name, path in NAMES.items():
        if name.split(".")[0] == "mixers":
            outside = {m.split(".")[0] for m, ours, _ in imports(path) if not ours}
            wrong += [f"{name} imports {m}" for m in outside - {"torch", "__future__"} - set(sys.stdlib_module_names)]
    # The one module that may try the fused kernels.
    assert [w for w in wrong if not w.startswith(("mixers.ops.kernels ", "mixers.kernels "))] == []


def test_no_bare_import_of_a_room():
    """`import mixers`, run in the checkout, makes a second copy of the module."""
    wrong = []
    for path in tracked("*.py"):
        for module, ours, _ in imports(path):
            if not ours and module.split(".")[0] in ROOMS:
                wrong.append(f"{path.relative_to(ROOT)}: import {module}")
            if not ours and module.split(".")[0] == "relinear" and path in SOURCES:
                wrong.append(f"{path.relative_to(ROOT)}: absolute import of {module}")
    assert wrong == []


def torch_free_names() -> list[str]:
    names = []
    for name in NAMES:
        for root, deep in TORCH_FREE.items():
            if (name == root or (deep and name.startswith(root + "."))) and name not in TORCH_BOUND:
                names.append(name)
    return sorted(names)


def test_torch_free_modules_import_no_torch():
    """In one fresh process, as what one module drags in shows in `sys.modules` for all."""
    names = [f"relinear.{name}" for name in torch_free_names()]
    code = (
        "import importlib, sys\n"
        f"heavy = {sorted(HEAVY)!r}\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    found = [m for m in heavy if m in sys.modules]\n"
        "    assert not found, f'{name} imports {found}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(names) > 10


def test_every_module_of_recipes_can_be_the_first_that_is_imported():
    """Commands begin with different ones; a circle shows only where it is entered at the wrong place."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(name for name in TORCH_BOUND if name.startswith('recipes.'))!r}:\n"
        "    for held in [m for m in sys.modules if m.startswith('relinear.recipes')]:\n"
        "        del sys.modules[held]\n"
        "    importlib.import_module(f'relinear.{name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_work_at_import():
    """Module bodies define things; they do not call, open, loop until, or set the environment."""
    wrong = []
    for name, path in NAMES.items():
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
            environment = isinstance(statement, ast.Assign) and "environ" in ast.unparse(statement.targets[0])
            if call or environment or isinstance(statement, ast.With | ast.While):
                wrong.append(f"{name}:{statement.lineno}: {ast.unparse(statement)[:60]}")
    assert wrong == []


def test_files_fit_one_sitting():
    long = {str(p.relative_to(ROOT)): n for p in tracked("*.py") if (n := len(p.read_text().splitlines())) > 600}
    assert long == {}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Module-level functions and classes, and the methods of those classes."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return found


def test_functions_fit_one_screen():
    """80 lines at most, docstring and nested definitions not counted (those are looked at on their own)."""
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := own_lines(node)) > 80:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert long == []


def own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    apart = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    if ast.get_docstring(node) is not None:
        apart.append(node.body[0])
    return span(node) - sum(span(n) for n in apart)


def span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_everything_public_has_a_docstring():
    inherited = {"forward", "mix", "reset_parameters", "tensors", "flops_per_token", "state_bytes"}
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None:
            missing.append(str(path.relative_to(ROOT)))
        missing += [
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in functions(path)
            if not node.name.startswith("_") and node.name not in inherited and ast.get_docstring(node) is None
        ]
    assert missing == []


def test_environment_variables_are_documented():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    read = re.compile(r"(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\()\s*[\"']([A-Z][A-Z0-9_]+)[\"']")
    names = {n for path in SOURCES for n in read.findall(path.read_text())}
    names |= set(re.findall(r"RELINEAR_[A-Z_]+", "".join(path.read_text() for path in SOURCES)))
    assert sorted(n for n in names if f"`{n}`" not in page) == []


# Written so that this file does not contain what it looks for.
MACHINE = re.compile(
    "|".join(("/ho" + "me/", "/Us" + "ers/", "/wo" + "rk/", "/fa" + "rm/", "/sc" + "ratch/", "/ro" + "ot/"))
)


def test_no_machine_paths():
    wrong = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".svg") or path.stat().st_size > 2**20:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert wrong == []


def test_documents_link_to_what_exists():
    link = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")
    wrong = []
    for page in tracked("*.md"):
        for target in link.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert wrong == []


def test_pinned_tools_are_those_of_the_hooks():
    """pre-commit runs the tools of `[dev]` from the environment, so that there is one pin."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = [line.strip() for line in hooks.splitlines() if "entry:" in line]
    assert entries and all(line.startswith("entry: .venv/bin/") for line in entries)
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    assert {"ruff", "basedpyright"} <= {item.split("==")[0] for item in dev if "==" in item}


def test_kernels_stay_out_of_the_test_environment():
    """fla together with Triton breaks stock models on a CPU."""
    base = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    assert not [item for item in base if re.match(r"(flash-linear|fla-|triton|mamba|causal)", item)]


def test_version_is_the_same_everywhere():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text())
    assert version is not None
    assert f"version: {version[1]}" in (ROOT / "CITATION.cff").read_text()
    assert (
        f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()
        or "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_ci_runs_what_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for command in ("make quickstart", "make test", "make lint"):
        assert command in ci
        assert command in (ROOT / "README.md").read_text()
