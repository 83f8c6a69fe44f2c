"""One process of a run, for launchers: `torchrun --nproc-per-node 8 -m relinear.recipes.run RECIPE KEY=VALUE …`.

Takes what `relinear run` takes and does the same. It is started, never imported, so it alone of this room may call on
`launch`.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Carry out the command line as `relinear run` would and return its exit code."""
    from ..launch.main import main as command

    arguments = sys.argv[1:]
    before = arguments[:1] if arguments[:1] == ["--traceback"] else []
    return command([*before, "run", *arguments[len(before) :]])


if __name__ == "__main__":
    sys.exit(main())
