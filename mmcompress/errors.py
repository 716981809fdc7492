"""The errors a user can cause. Each says where, what was found and what is allowed, in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: a file, a setting, a model folder, a full disk. Exit code 1."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe or a command line that cannot be run as it is written. Exit code 2."""

    exit_code = 2


class DataError(UserError):
    """Data that cannot be used: a missing column, an empty split, a picture that does not decode."""


class ModelError(UserError):
    """A model folder that cannot be used: damaged, of an unknown family, not what its config says."""


class TrainingError(UserError):
    """Training that went wrong by itself, such as a loss that is not a number."""


class ProcessError(UserError):
    """Another process of a data-parallel training ended, so that this one cannot go on."""


class UnavailableError(UserError):
    """Something that this machine or an installed library cannot do."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest allowed word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(what: str, found: str, allowed: Iterable[str]) -> str:
    """A message that names what was found, what is allowed, and the nearest match."""
    names = list(allowed)
    return f"unknown {what} {found!r}; allowed: {', '.join(names)}{did_you_mean(found, names)}"
