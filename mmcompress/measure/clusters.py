"""Scores with what the data says about which examples stand or fall together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.data.groups import groups_of
from mmcompress.tasks.base import Scores


def clustered(scores: Scores, examples: Examples) -> Scores:
    """The scores with ``clusters`` filled from the data; what the task itself knows stays where no column says more."""
    if scores.kept is None or (scores.clusters is not None and "cluster" not in examples.columns):
        return scores
    found = groups_of(examples, scores.kept)
    return scores if found is None else replace(scores, clusters=found[0])


def clusters_note(scores: Scores, examples: Examples) -> str:
    """A sentence on the intervals where examples stand together, else an empty one."""
    if scores.clusters is None or scores.kept is None:
        return ""
    found, groups = groups_of(examples, scores.kept), len(np.unique(scores.clusters))
    if groups == len(scores.clusters) or found is None:
        return ""
    return (
        f"Intervals, here and below, are over {groups:,} groups by {found[1]}, not over {len(scores.kept):,} single examples: "
        "examples of one group stand or fall together."
    )
