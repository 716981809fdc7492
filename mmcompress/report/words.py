"""What is said of a paired difference in quality, the same in every view."""

from __future__ import annotations

from mmcompress.measure.conclusion import points
from mmcompress.report.alerts import Alert, Tone
from mmcompress.report.format import MetricFormat
from mmcompress.report.schema import Change
from mmcompress.report.schema_data import Leaks


def change_tone(change: Change) -> Tone:
    """Good news is a difference that is shown to be harmless as well, not only a gain."""
    if change.verdict == "worse":
        return "caution" if within_margin(change) else "bad"
    if change.verdict in ("better", "identical") or change.conclusion.startswith("no worse"):
        return "good"
    return "caution" if change.conclusion else "neutral"


def within_margin(change: Change) -> bool:
    """True for a loss that is certain, and certainly smaller than the margin."""
    return change.verdict == "worse" and change.conclusion.startswith("worse, but by less")


def p_value_words(change: Change) -> str:
    """``"exact McNemar p = 0.031"``, or nothing where there is no such test."""
    if change.p_value is None:
        return ""
    return f"exact McNemar p {'< 0.0001' if change.p_value < 1e-4 else f'= {change.p_value:.2g}'}"


def change_alerts(fmt: MetricFormat, change: Change) -> list[Alert]:
    """What a reader must not miss about one metric of the final model."""
    facts = [f"95% interval {fmt.change_interval(change)}", f"{change.won:,} won, {change.lost:,} lost", p_value_words(change)]
    words = f"{fmt.change(change)} ({'; '.join(fact for fact in facts if fact)})"
    if change.verdict == "worse":
        margin = f", {change.words.removeprefix('worse, ')}" if within_margin(change) else ""
        return [Alert(change_tone(change), f"{fmt.name} is clearly worse than the baseline's{margin}: {words}.")]
    if change.conclusion.startswith("not enough"):
        what = f"whether {fmt.name} fell by more than the margin of {points(change.margin or 0.0)}"
        if not fmt.higher_is_better:
            what = f"whether {fmt.name} rose by more than the margin of {points(change.margin or 0.0)}"
        return [Alert("caution", f"{change.n:,} examples are too few to say {what}: {change.words}; {words}.")]
    return []


def change_note(metric: str, change: Change) -> str:
    """A sentence for a row's notes where a loss is certain, or where it cannot be told; else an empty one."""
    numbers = f"95% interval {100 * change.low:+.2f} to {100 * change.high:+.2f}"
    p_value = p_value_words(change)
    facts = f"({numbers}{'; ' + p_value if p_value else ''})"
    if change.verdict == "worse":
        margin = f", {change.words.removeprefix('worse, ')}" if within_margin(change) else ""
        return f"{metric} is worse than the baseline's by {abs(100 * change.difference):.2f} points{margin} {facts}."
    if change.conclusion.startswith("not enough"):
        return f"{metric} against the baseline's: {change.words} {facts}."
    return ""


def leak_words(leaks: Leaks | None) -> str:
    """``"30 of 200 evaluation pictures are also in data.train"`` where the recipe allowed that; else nothing."""
    if leaks is None or not leaks.found:
        return ""
    parts = [f"{p.examples:,} of {p.n:,} evaluation {leaks.what}s are also in data.{p.first}" for p in leaks.found]
    return " and ".join([parts[0], *(part.replace("evaluation ", "") for part in parts[1:])])


def leak_alerts(leaks: Leaks | None) -> list[Alert]:
    """Nothing else on the page can be believed where the model has seen what it is scored on."""
    words = leak_words(leaks)
    return [Alert("bad", f"{words} (data.allow_leaks): quality is overstated.")] if words else []
