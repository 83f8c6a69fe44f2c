"""What mkdocs is told beyond mkdocs.yml: links that leave docs/, and where griffe finds the package.

Pages link to files of the repository by relative paths, which GitHub follows. On the site such a link becomes one to
the repository; whether its file exists is checked here, so that a broken one stops the build like any other.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/relinear/relinear/blob/main"
LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)(#[^)\s]*)?(\))")
ROOMS = ("__init__.py", "mixers", "distill", "recipes", "eval", "launch")
log = logging.getLogger("mkdocs.hooks.repository")


def on_startup(*, command: str, dirty: bool) -> None:
    """A folder in which the package has its own name, whatever the checkout's: griffe reads sources below it."""
    package = ROOT / "build" / "sources" / "relinear"
    package.mkdir(parents=True, exist_ok=True)
    for name in ROOMS:
        if not (package / name).exists():
            (package / name).symlink_to(ROOT / name)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/, or go to its scripts, as links to the repository."""
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_uri).parent

    def rewritten(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target.is_relative_to(docs) and not target.is_relative_to(docs / "tools"):
            return found[0]
        if not target.exists():
            log.warning("Doc file '%s' links to '%s', which does not exist", page.file.src_uri, found[2])
        return f"{found[1]}{REPOSITORY}/{target.relative_to(ROOT).as_posix()}{found[3] or ''}{found[4]}"

    return LINK.sub(rewritten, markdown)
