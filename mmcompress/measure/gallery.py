"""Examples that two models answer differently, and small copies of their pictures and recordings beside the report.

Shapes: M items that were judged.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from PIL import Image

from mmcompress.data.audio import Audio, resample
from mmcompress.data.examples import Examples
from mmcompress.data.traits import traits
from mmcompress.files import writing_folder
from mmcompress.report.schema_behaviour import Answer, Behaviour, GalleryEntry
from mmcompress.tasks._observed import Observed

MEDIA = Path("measurements") / "media"
"""Where in a run's folder the copies lie."""
OF_A_KIND = 12
THUMBNAIL = 128
"""Pixels of the longer side of a picture's copy."""
SMALL = 64 * 64
"""Pictures of no more pixels are kept without loss."""
CLIP_RATE, CLIP_SECONDS, CLIP_BYTES = 16_000, 5.0, 100_000
LONGEST_TEXT = 300

Kind = Literal["right to wrong", "wrong to right", "other answer"]


def gallery(
    before: Observed, after: Observed, other: np.ndarray | None, sure: np.ndarray, gain: np.ndarray | None, examples: Examples
) -> list[GalleryEntry]:
    """Up to twelve examples that became wrong and twelve that became right, one of each example.

    Half of each are those that the model is surest of (without confidences: whose score changed most), the others are drawn
    by a fixed seed, since the most striking ones are not typical. Where fewer than twelve became wrong, those with another
    wrong answer fill up.

    Args:
        before: the baseline's answers.
        after: this model's, to the same items.
        other: shape (M,), whether the answer is another one; None where answers have no names.
        sure: shape (2, M), the confidence of both models in their answers; NaN where there is none.
        gain: shape (M,), by how much the score of each item rose, if known.
    """
    weight = np.where(np.isfinite(sure[1]), sure[1], 0.0 if gain is None else np.abs(gain))
    found: list[GalleryEntry] = []
    lost, won = before.right & ~after.right, ~before.right & after.right
    kinds: list[tuple[Kind, np.ndarray]] = [("right to wrong", lost), ("wrong to right", won)]
    if other is not None:
        kinds.append(("other answer", ~before.right & ~after.right & other))
    for kind, members in kinds:
        room = OF_A_KIND if kind != "other answer" else max(0, OF_A_KIND - int(lost.sum()))
        for i in chosen(members, weight, before.index, room):
            index = int(before.index[i])
            found.append(
                GalleryEntry(
                    index=index,
                    kind=kind,
                    media=media_path(examples, index),
                    text=_asked(after, i, examples),
                    truth=_truth(after, i, examples),
                    before=_answer(before, i, sure[0, i]),
                    after=_answer(after, i, sure[1, i]),
                )
            )
    return found


def chosen(members: np.ndarray, weight: np.ndarray, index: np.ndarray, room: int) -> list[int]:
    """Up to ``room`` of the members, no two of one example: half by weight, largest first, half by a fixed seed.

    Args:
        members: shape (M,), bool.
        weight: shape (M,).
        index: shape (M,), the example of each item.
    """
    places = np.flatnonzero(members)
    by_weight = places[np.argsort(-weight[places], kind="stable")]
    drawn = np.random.default_rng(0).permutation(places)
    found: dict[int, int] = {}
    for order, most in ((by_weight, room // 2), (drawn, room)):
        for i in map(int, order):
            if len(found) >= most:
                break
            found.setdefault(int(index[i]), i)
    return list(found.values())


def media_path(examples: Examples, index: int) -> str:
    """Where the copy of an example's picture or recording lies, relative to the run's folder, once it was kept."""
    suffix = "flac"
    if examples.kind == "image":
        pixels = traits(examples, np.array([index])).get("pixels")
        suffix = "png" if pixels is not None and pixels[0] <= SMALL else "jpg"
    return (MEDIA / f"{index:07d}.{suffix}").as_posix()


def keep_media(behaviour: Behaviour | None, examples: Examples, folder: Path) -> None:
    """Copies the media of a row's gallery into the run's folder, small, and removes those of other rows.

    Pictures have at most 128 pixels a side; recordings are their first seconds, at 16 kHz or less, in at most 100 kB.

    Args:
        behaviour: of the row that the report is about; without one nothing is kept.
        folder: the run's folder.
    """
    wanted = {entry.media: entry.index for entry in behaviour.gallery if entry.media} if behaviour else {}
    place = folder / MEDIA
    there = {(MEDIA / path.name).as_posix() for path in place.iterdir()} if place.is_dir() else set()
    if there == set(wanted):
        return
    if not wanted:
        shutil.rmtree(place)
        return
    with writing_folder(place) as beside:
        for path, index in wanted.items():
            old = folder / path
            data = old.read_bytes() if path in there else small_copy(examples.media(index), Path(path).suffix)
            (beside / Path(path).name).write_bytes(data)


def small_copy(item: Image.Image | Audio, suffix: str) -> bytes:
    """A picture as PNG or JPEG, or a recording as FLAC, small enough for a page.

    Args:
        suffix: ``.png``, ``.jpg`` or ``.flac``.
    """
    buffer = io.BytesIO()
    if isinstance(item, Audio):
        audio = resample(item, CLIP_RATE) if item.rate > CLIP_RATE else item
        seconds = CLIP_SECONDS
        while True:
            buffer = io.BytesIO()
            samples = np.clip(audio.samples[: max(1, int(seconds * audio.rate))], -1, 1)
            soundfile.write(buffer, samples, audio.rate, format="FLAC", subtype="PCM_16")
            # Not where the writer stands: it went back to complete the header.
            if len(buffer.getvalue()) <= CLIP_BYTES or seconds < 0.5:
                return buffer.getvalue()
            seconds /= 1.5
    small = item.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    if suffix == ".png":
        small.save(buffer, format="PNG", optimize=True)
    else:
        small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _answer(seen: Observed, i: int, confidence: float) -> Answer:
    text = ""
    if seen.said is not None:
        text = seen.said[i]
    elif seen.answers is not None and seen.names is not None:
        text = seen.names[int(seen.answers[i])]
    sure = float(confidence) if np.isfinite(confidence) else None
    return Answer(text=_short(text), confidence=sure, right=bool(seen.right[i]))


def _asked(seen: Observed, i: int, examples: Examples) -> str:
    if seen.asked is not None:
        return _short(seen.asked[i])
    if "question" not in examples.columns:
        return ""
    question = examples.without_media(int(seen.index[i]))["question"]
    return _short(question if isinstance(question, str) else question[0])


def _truth(seen: Observed, i: int, examples: Examples) -> str:
    if seen.truth is not None and seen.names is not None:
        return _short(seen.names[int(seen.truth[i])])
    row = examples.without_media(int(seen.index[i]))
    found = row.get("answers", row.get("text", ""))
    return _short(found if isinstance(found, str) else " / ".join(dict.fromkeys(found)))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
