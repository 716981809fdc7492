"""Which layers a user's `include` and `exclude` patterns mean, in torch modules and exported graphs alike."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

REGULAR = "re:"
"""What a pattern begins with that is a regular expression."""


def module_path(node_name: str) -> str:
    """The module a graph node came from: `export_component` names nodes `<module path>/<op type>`; optimizers append to that."""
    return node_name.partition("/")[0] or node_name


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module path is meant by one pattern.

    A pattern with `*`, `?` or `[` is a glob over the whole path; one without is a run of whole components anywhere in
    the path. So `layers.1` means `encoder.layers.1.mlp.fc1` but not `encoder.layers.11.mlp.fc1`. After `re:` stands a
    regular expression that is looked for anywhere in the path.

    Args:
        name: Module path, e.g. `vision_model.encoder.layers.0.mlp.fc1`.
        pattern: What the user wrote.
    """
    if pattern.startswith(REGULAR):
        return re.search(pattern.removeprefix(REGULAR), name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns means this module path."""
    return any(matches(name, pattern) for pattern in patterns)


def is_meant(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a module path is to be quantized: meant by `include` where that holds anything, and not by `exclude`."""
    return (not include or is_excluded(name, include)) and not is_excluded(name, exclude)


def broken(patterns: Iterable[str]) -> list[str]:
    """What is wrong with the regular expressions among patterns, a sentence each."""
    found = []
    for pattern in patterns:
        if pattern.startswith(REGULAR):
            try:
                re.compile(pattern.removeprefix(REGULAR))
            except re.error as e:
                found.append(f"{pattern!r} is no regular expression: {e}")
    return found


def unmatched(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns that mean none of the names: most likely a typing error."""
    known = list(names)
    return tuple(pattern for pattern in patterns if not any(matches(name, pattern) for name in known))
