"""The licence that a converted model inherits from its teacher, in the Hub's words. Torch-free."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

# https://huggingface.co/docs/hub/repositories-licenses; anything else is `other`, with a name and a link.
KNOWN = (
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    *("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd"),
    *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5"),
    *("cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0"),
    *("epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl"),
    *("apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0"),
    *("postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license"),
    *("fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
    *("grok2-community", "gemma", "unknown", "other"),
)
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
    "llama3.3": r"LLAMA 3\.3 COMMUNITY LICENSE",
    "llama3.2": r"LLAMA 3\.2 COMMUNITY LICENSE",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE",
    "llama3": r"(META )?LLAMA 3 COMMUNITY LICENSE",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE",
    "llama4": r"LLAMA 4 COMMUNITY LICENSE",
    "gemma": r"Gemma Terms of Use",
}


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the top of a model card; nothing where there is none that can be read."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        made = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return made if isinstance(made, dict) else {}


def licence_of(folder: Path) -> dict[str, str]:
    """`license`, for `other` its name and link too, as a teacher's card or licence file says; nothing if none does."""
    card = folder / "README.md"
    said = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    if isinstance(said.get("license"), str):
        keys = ("license", "license_name", "license_link")
        return {key: said[key] for key in keys if isinstance(said.get(key), str)}
    for path in licence_files(folder):
        text = path.read_text(encoding="utf-8", errors="replace")
        for name, pattern in _TEXTS.items():
            if re.search(pattern, text, re.IGNORECASE):
                return {"license": name}
    return {}


def licence_files(folder: Path) -> list[Path]:
    """The files that a licence asks to be passed on: LICENSE, NOTICE, USE_POLICY."""
    starts = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper().startswith(starts))


def parse_licence(given: str) -> dict[str, str]:
    """What `--license` names: one of the Hub's, or `NAME=LINK` for another.

    Raises:
        UserError: neither.
    """
    if given.lower() in KNOWN and given.lower() != "other":
        return {"license": given.lower()}
    name, equals, link = given.partition("=")
    if equals and name and link:
        return {"license": "other", "license_name": name, "license_link": link}
    near = difflib.get_close_matches(given.lower(), KNOWN, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--license {given}: not one that the Hub knows.{hint} Give one of theirs, e.g. apache-2.0, or a name and "
        "where its text is: --license my-licence=https://…"
    )
