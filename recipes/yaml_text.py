"""YAML as recipes read it: plain values by the YAML 1.2 rules, and the place where each one stands.

PyYAML follows YAML 1.1, where `1e-3` is a text, `on` is True and `012` is 10. Here `1e-3` is a number, `on`, `off`,
`yes` and `no` are texts, and `012` is 12. A bare `None` is refused where it can only be a mistake for `null`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..distill.errors import UserError

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_PLAIN = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _PLAIN:
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern.pattern})$"), _first)


@dataclass
class Tree:
    """A YAML text as plain values.

    Attributes:
        value: mappings (keys as text), lists and plain values.
        places: path -> `file:line` of the key, or of the list item.
        faults: mistakes that do not stop the reading: (path, place, message).
    """

    value: Any = None
    places: dict[Path, str] = field(default_factory=dict)
    faults: list[tuple[Path, str, str]] = field(default_factory=list)


def read(text: str, name: str, none_is_word: Callable[[Path], bool] = lambda path: False) -> Tree:
    """Parse a YAML document.

    Args:
        text: the document.
        name: of the file, as it stands in places.
        none_is_word: paths where a bare `none` is meant.

    Raises:
        UserError: not YAML; names file, line and reason.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UserError(f"{where}: not YAML: {reason}. Mend the line, then: relinear check {name}") from None
    except RecursionError:
        raise UserError(f"{name}: not a recipe: brackets are nested too deeply") from None
    tree = Tree()
    if node is not None:
        tree.value = _Builder(tree, name, none_is_word).build(node, ())
    return tree


def scalar(text: str) -> Any:
    """A plain value as a recipe would read it: `1e-3` -> 0.001, `yes` -> "yes"."""
    for name, pattern, _ in _PLAIN:
        if pattern.fullmatch(text):
            return _plain(name, text)
    return text


def write(value: Any) -> str:
    """Plain values as YAML that `read` gives back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Builder:
    """Values and places from PyYAML's nodes."""

    def __init__(self, tree: Tree, name: str, none_is_word: Callable[[Path], bool]) -> None:
        self.tree = tree
        self.name = name
        self.none_is_word = none_is_word
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node; notes the places of what lies below it."""
        self.tree.places.setdefault(path, self._place(node))
        if any(node is parent for parent in self.open):
            self._fault(path, node, "this alias contains itself; write the value out")
            return None
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(path, key_node, "a key must be a plain word")
                continue
            key = key_node.value
            below = (*path, key)
            if key in result:
                first = self.tree.places[below].rpartition(":")[2]
                self._fault(below, key_node, f"this key stands here twice (first in line {first}); remove one of them")
                continue
            self.tree.places[below] = self._place(key_node)
            result[key] = self.build(value_node, below)
        return result

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text = str(node.value)
        if kind == "str":
            plain = getattr(node, "style", None) is None
            if plain and text in ("None", "none", "NONE") and not self.none_is_word(path):
                self._fault(path, node, f"{text} is a text in YAML; write null for no value")
                return None
            return text
        if kind not in ("null", "bool", "int", "float"):
            self._fault(path, node, f"the tag {node.tag} has no meaning in a recipe; write the plain value")
            return None
        try:
            return _plain(kind, text)
        except ValueError:  # an explicit tag on a value of another kind: !!int abc
            self._fault(path, node, f"{text!r} is not of the kind that its tag {node.tag} says")
            return None

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _fault(self, path: Path, node: yaml.Node, message: str) -> None:
        self.tree.faults.append((path, self._place(node), message))
