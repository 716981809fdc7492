"""Which layers a user's `exclude` patterns mean: one rule for torch modules and for nodes of an exported graph."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def module_path(node_name: str) -> str:
    """The module a graph node came from: `export_component` names nodes `<module path>/<op type>`."""
    return node_name.rpartition("/")[0] or node_name


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module path is meant by one pattern.

    A pattern with `*`, `?` or `[` is a glob over the whole path; one without is a run of whole components anywhere in
    the path. So `layers.1` means `encoder.layers.1.mlp.fc1` but not `encoder.layers.11.mlp.fc1`.

    Args:
        name: Module path, e.g. `vision_model.encoder.layers.0.mlp.fc1`.
        pattern: What the user wrote.
    """
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns means this module path."""
    return any(matches(name, pattern) for pattern in patterns)


def unmatched(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns that mean none of the names: most likely a typing error."""
    known = list(names)
    return tuple(pattern for pattern in patterns if not any(matches(name, pattern) for name in known))
