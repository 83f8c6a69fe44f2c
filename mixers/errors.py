"""What can be wrong with a kernel that was asked for by name. Free of torch, so that the command line can know them."""

from __future__ import annotations


class KernelMissing(ImportError):
    """The machine lacks what the kernel needs: a package, a device (the command line's exit code 3)."""

    exit_code = 3


class KernelRefused(ValueError):
    """No kernel takes this: the head size, the dtype, the recurrence, or a name that is none (exit code 2)."""

    exit_code = 2
