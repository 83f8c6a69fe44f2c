"""The console command: what there is, and how each end of a command becomes an exit code and one message."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Annotated

import typer

from .. import __version__
from ..distill.errors import MachineError, RunFailed, UserError
from ..mixers.errors import KernelMissing, KernelRefused
from . import worker
from .commands import bench, doctor, evaluate, look, model, nodes, posttrain, prepare, publish, report, select, work
from .commands.common import examples
from .output import talk
from .signals import FAILED, INTERRUPTED, MACHINE, OK, USER, Stopped
from .signals import STOPPED as STOPPED

app = typer.Typer(
    name="relinear",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "relinear quickstart",
        "relinear ls recipes",
        "relinear plan rwkv7 teacher.model=FOLDER data.source=FILE",
        then="relinear quickstart",
    ),
)
for commands in (work, prepare, nodes, look, select, posttrain, evaluate, model, publish, bench, report, doctor):
    commands.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"relinear {__version__}")
        raise typer.Exit()


@app.callback()
def group(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from: relinear --traceback COMMAND …")
    ] = False,
) -> None:
    """Turn pretrained softmax-attention transformers into linear-attention hybrids.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 your input, 3 the machine,
    75 stopped and saved (go on with --resume), 130 interrupted.
    """


def main(argv: list[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default) and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # Looked for here too: an error can come before the options are parsed.
    show = "--traceback" in arguments[:1]
    with worker.quiet():
        return _main(arguments, show)


def _main(arguments: list[str], show: bool) -> int:
    try:
        # typer returns an exit code where a command ends early, and 130 for Ctrl-C; a finished command returns None.
        with _choices_shown():
            code = app(args=arguments, prog_name="relinear", standalone_mode=False) or OK
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Stopped as stopped:
        talk(f"{stopped}: stopped where nothing had to be saved. Go on: the same command with --resume")
        return STOPPED
    except Exception as error:
        return _explain(error, show)
    if code == INTERRUPTED:
        talk("interrupted")
    return code


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        talk(f"kernels: {record.getMessage()}")


@contextlib.contextmanager
def _choices_shown() -> Iterator[None]:
    """Whose kernels run, and why, is said by the module that chooses: once for each recurrence."""
    # transformers loads DeepSpeed wherever it is installed, which then talks of itself on stdout.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    logger, handler = logging.getLogger("relinear.mixers.kernels"), _Talk()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _explain(error: Exception, show_traceback: bool) -> int:
    """Say what went wrong in one message and return the exit code."""
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        text, code = _usage(error), USER
    elif isinstance(error, (UserError, MachineError, RunFailed, KernelMissing, KernelRefused)):
        text, code = f"error: {error}", error.exit_code
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        text = f"error: no space left on the disk{where}. Free some, or choose another folder with --out"
        code = MACHINE
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"error: out of memory: {str(error).splitlines()[0] if str(error) else 'the machine has no more'}"
        code = MACHINE
    else:
        where = "" if show_traceback else f"\nThe traceback is in {_keep_traceback(error)}"
        first = (str(error).splitlines() or [""])[0]
        text, code = f"error: unexpected {type(error).__name__}: {first}{where}", FAILED
    known = not text.startswith("error: unexpected ")
    if not worker.report_error(text.removeprefix("error: "), code, known):
        talk(text)
    return code


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    if context is not None and not context.args and error.message == context.get_help():  # a bare `relinear`
        return error.message
    command = context.command_path if context is not None else "relinear"
    return f"error: {command}: {error.format_message()} See: {command} --help"


def _keep_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="relinear-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return f"what follows, as no file could be written:\n{text}"
    return file.name
