"""The errors that end a command, by whose they are. The command line maps each to its exit code."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong (exit code 2). The message names place, finding, expectation and mending command."""

    exit_code = 2


class MachineError(Exception):
    """The environment lacks something: a package, disk, memory, network (exit code 3)."""

    exit_code = 3


class RunFailed(Exception):
    """The work itself failed, e.g. a NaN (exit code 1). Names the layer and the step where it can."""

    exit_code = 1
