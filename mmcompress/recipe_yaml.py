"""YAML to plain data with the line of every key, and errors that say where."""

from __future__ import annotations

from typing import Any

import yaml

from mmcompress.errors import RecipeError
from mmcompress.recipe_errors import LineMap, cut_middle

TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
MOST_VALUES = 100_000
"""A few lines of nested YAML aliases can stand for billions of values; a recipe of this many is damaged."""


def parse_yaml(text: str, file: str) -> tuple[dict[str, Any], LineMap]:
    """YAML to plain data and a map from key paths to line numbers. Repeated keys are errors."""
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _walk(node, (), lines, file)
        raw = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{file}{at}: is not valid YAML: {_yaml_problem(e)}") from e
    except yaml.YAMLError as e:
        raise RecipeError(
            f"{file}: is not valid YAML: {cut_middle(str(e).splitlines()[0]) if str(e) else type(e).__name__}"
        ) from e
    except RecursionError as e:
        raise RecipeError(f"{file}: is not valid YAML: nested too deeply, or an alias that holds itself") from e
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values; found {found}")
    return raw, LineMap(file, lines)


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            # PyYAML stumbles so over values that do not fit their explicit tag, impossible dates, and endless numbers.
            said = f"the value {cut_middle(repr(node.value))} is no {node.tag.removeprefix('tag:yaml.org,2002:')}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from e


def _yaml_problem(e: yaml.MarkedYAMLError) -> str:
    said = cut_middle(str(e.problem or e.context))
    if said.startswith("could not determine a constructor for the tag"):
        return f"the tag {said.split(chr(39))[1].replace('tag:yaml.org,2002:', '!!')} is not allowed; a recipe is plain data"
    return said


def _walk(node: yaml.Node | None, at: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], file: str) -> None:
    """Fills ``lines``.

    Raises:
        RecipeError: a key stands twice, a text is no Unicode, or aliases of aliases stand for more values than any recipe has.
    """
    if node is None:
        return
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if len(lines) > MOST_VALUES:
        raise RecipeError(f"{file}, line {line}: more than {MOST_VALUES} values, with aliases written out; a recipe has fewer")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "[...]"
            if key.tag not in TEXT_TAGS:
                kind = key.tag.removeprefix("tag:yaml.org,2002:")
                raise RecipeError(
                    f"{file}, line {key.start_mark.line + 1}: the key {cut_middle(name)} is of type {kind}; allowed: a text"
                )
            _check_text(key, file)
            if name in seen and name != "<<":
                raise RecipeError(f"{file}, line {key.start_mark.line + 1}: the key {cut_middle(name)!r} stands twice")
            seen.add(name)
            lines[(*at, name)] = key.start_mark.line + 1
            _walk(value, (*at, name), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*at, i), lines, file)
    elif isinstance(node, yaml.ScalarNode):
        _check_text(node, file)


def _check_text(node: yaml.ScalarNode, file: str) -> None:
    """Escapes can write half of a surrogate pair, which no file can hold, or NUL, which no path can."""
    bad = next((c for c in str(node.value) if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise RecipeError(f"{file}, line {node.start_mark.line + 1}: a text holds {bad!r}, which is no character of a text")
