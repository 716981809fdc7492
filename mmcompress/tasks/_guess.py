"""The task that data is meant for, for passes that are called from Python with nothing but data."""

from __future__ import annotations

from mmcompress import registry
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.tasks.base import Task


def guess_task(examples: Examples, abilities: frozenset[str] = frozenset({"image", "embeddings"})) -> Task:
    """The task that reads the most of the data's columns among those that the model can do; of equals the first by name.

    Args:
        abilities: what the model's family can do; see `families.base.Family.abilities`.

    Raises:
        DataError: no task finds all columns that it reads.
    """
    fitting: list[tuple[int, bool, str]] = []
    for name in registry.names("tasks"):
        task: type[Task] = registry.find("tasks", name).TASK
        roles = set(task.roles) - task.optional
        named = "label" not in roles or bool(examples.classes)
        if task.needs <= abilities and roles <= set(examples.columns) and named:
            # A text says more than a label: with both, retrieval is meant.
            fitting.append((-len(roles), "text" not in roles, name))
    if not fitting:
        have = ", ".join(examples.column_names())
        raise DataError(
            f"{examples.name}: no task of this model finds the columns that it reads (texts, labels with class names, questions "
            f"with answers); columns are: {have}"
        )
    best = min(fitting)[2]
    made: Task = registry.find("tasks", best).TASK.model_validate({"type": best})
    return made
