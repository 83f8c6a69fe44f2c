"""The command line's reference page, made from the commands' own help texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

HEADER = """# Command line

<!-- Generated from `--help` by relinear.launch.reference; a test keeps it equal. Write it anew with
     python -m relinear.launch.reference > docs/reference/cli.md -->

Results go to stdout, everything else to stderr, so `relinear COMMAND --json | jq` works with progress on the screen.

| exit code | means |
|---|---|
| 0 | done |
| 1 | the work failed: a NaN, a checkpoint that does not verify, or an error in relinear itself |
| 2 | your input: an option, a recipe, a file |
| 3 | the machine: memory, disk, network, a package that is not installed |
| 75 | stopped by SIGTERM, SIGUSR1, Ctrl-C or `--max-hours` and saved: go on with `--resume`. Schedulers requeue on it |
| 130 | interrupted at once, by a second Ctrl-C or where there was nothing to save |
"""
WIDTH = 100


def markdown() -> str:
    """The page, as it stands in docs/reference/cli.md."""
    from .main import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("relinear", [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH)
    return "\n".join([HEADER, *_sections(group, context)])


def _sections(command: Any, context: Any) -> Iterator[str]:
    """A command's help and, where it is a group, those of its commands."""
    yield _section(context.command_path, command.get_help(context))
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        inner = command.get_command(context, name)
        yield from _sections(inner, inner.make_context(name, [], parent=context, resilient_parsing=True))


def _section(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.rstrip().splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    print(markdown(), end="")
