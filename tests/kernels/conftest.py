"""Other projects' kernels on a CPU: Triton interpreted, with what its interpreter lacks.

Run by `make test-kernels`, in an environment of its own: where fla and Triton are installed on a machine without a GPU,
transformers prefers them to its own code and fails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported


FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What these libraries warn of on a strange device, or numpy of values that a kernel masks, is not our fault."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore:::(fla|triton|mamba_ssm)\b"))


@pytest.fixture
def poisoned(request: pytest.FixtureRequest) -> None:
    """Uninitialised memory is NaN. On a CPU: on a GPU that would forbid what has no deterministic form."""
    if not torch.cuda.is_available():
        request.getfixturevalue("nan_empty")


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> None:
    """fla, able to run here; without it every test of this folder is skipped."""
    absent = [name for name in ("triton", "fla") if find_spec(name) is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not installed: run `make test-kernels`")
    if not torch.cuda.is_available():
        _mend_interpreter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla says that there is no GPU
            _mend_fla()


def _mend_interpreter() -> None:
    """Three things that Triton 3.7's interpreter lacks for kernels written for a compiler."""
    driver = importlib.import_module("triton.runtime.driver").driver
    interpreter = importlib.import_module("triton.runtime.interpreter")

    class NoDriver:
        """The autotuner asks the GPU's driver how to measure: the first configuration is as good as any."""

        def get_benchmarker(self) -> Any:
            return lambda *args, **kwargs: [0.0, 0.0, 0.0]

        def get_current_target(self) -> Any:
            raise RuntimeError("no GPU")

    driver.set_active(NoDriver())

    def visit_for(self: Any, node: ast.For) -> ast.For:
        """The variable of `for i in range(n)` stays a Python int, on which kernels then call `.to(tl.int64)`."""
        self.generic_visit(node)
        called = getattr(node.iter, "func", None)
        if getattr(called, "id", getattr(called, "attr", "")) == "range" and isinstance(node.target, ast.Name):
            name = node.target.id
            node.body = [*ast.parse(f"{name} = interpreter_semantic.to_tensor({name}, False)").body, *node.body]
        return node

    interpreter.ASTTransformer.visit_For = visit_for
    # mamba-ssm's launchers name the device and ask how many processors it has.
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=1)  # type: ignore


def _mend_fla() -> None:
    """`from triton.language import gather` keeps the function that the interpreter replaces while a kernel runs."""
    language = importlib.import_module("triton.language")
    original = language.gather
    importlib.import_module("fla.ops")

    def gather(src: Any, index: Any, axis: int = 0) -> Any:
        return language.gather(src, index, axis)

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and getattr(module, "gather", None) is original:
            module.gather = gather  # type: ignore[attr-defined]


@pytest.fixture
def measured(record_property: Any) -> Any:
    """Call with the largest error of a test: printed at the end, and copied into docs/reference/kernels.md."""
    return lambda error: record_property("largest error", f"{error:.1e}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The largest error of every test that measured one."""
    lines = [
        f"{dict(report.user_properties)['largest error']}  {report.nodeid.split('::')[-1]}"
        for report in terminalreporter.stats.get("passed", [])
        if "largest error" in dict(report.user_properties)
    ]
    if lines:
        terminalreporter.section("largest error against our step-by-step form in fp64")
        terminalreporter.write_line("\n".join(sorted(lines, key=lambda line: line.split("  ")[1])))


@pytest.fixture
def mamba_ssm() -> types.ModuleType:
    """mamba-ssm without its CUDA extensions."""
    if find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm not installed: `make test-kernels` installs it where its source can be had")
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if name not in sys.modules and find_spec(name) is None:
            if torch.cuda.is_available():
                pytest.skip(f"mamba-ssm's {name} is not built")
            sys.modules[name] = types.ModuleType(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("mamba_ssm")
