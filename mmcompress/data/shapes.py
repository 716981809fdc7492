"""Synthetic pictures of coloured shapes with captions, labels, questions and answers.

Everything here is made up by this file: no photograph, no person's caption and no downloaded data is involved. A score
on this data says whether a compression step works, and nothing about how a model does on real pictures.

A scene holds two objects, each with a size, a colour and a shape, and the relation between them. The **main object** is
the one with the thin black outline, drawn on top; it is the one named first in the caption and the one that `label`
names. The second object has no outline and never has the main object's colour and shape at once. Place, rotation, exact
colour, background and noise differ from row to row.

The scenes (not the rows) are split 80/10/10 by a hash of their id, so no scene of one split is ever seen in another,
while every word, class and relation occurs in all three.
"""

import itertools
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmcompress.data.synthetic import SPLIT_ENDS, Split, Synthetic, split_of

Point = tuple[float, float]

IMAGE_SIZE = 48
"""Side of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 158, 64),
    "blue": (44, 84, 214),
    "yellow": (238, 214, 48),
    "purple": (142, 58, 172),
    "orange": (242, 134, 34),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "hexagon")
RADII: dict[str, tuple[float, float]] = {"small": (4.8, 6.2), "large": (8.5, 10.5)}
"""Smallest and largest circumscribed radius in pixels."""

INVERSE = {"left of": "on its right", "right of": "on its left", "above": "below it", "below": "above it"}
"""Relation of the main object to the second one -> where the second one is, seen from the main one."""

CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Names of the labels: the main object's colour and shape."""

ANSWERS: tuple[str, ...] = (*COLOURS, *SHAPES, *RADII, *INVERSE)
"""Every answer there is to the questions."""

_OFFSETS: dict[str, Point] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_SUPERSAMPLING = 4
_OUTLINE_PX = 1.25


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def kind(self) -> str:
        """Colour and shape, as in `CLASSES`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows, without the nuisance (place, rotation, noise)."""

    main: Thing
    relation: str
    second: Thing

    @property
    def id(self) -> str:
        """Canonical name, e.g. `small red circle left of large blue square`."""
        return f"{self.main} {self.relation} {self.second}"

    @property
    def split(self) -> str:
        """The split that owns this scene: a stable hash of the id, 80/10/10."""
        return split_of(self.id)


@lru_cache(maxsize=1)
def _scenes_by_split() -> dict[str, tuple[Scene, ...]]:
    """All 27,552 scenes in a fixed order, by the split that owns them."""
    things = [Thing(*parts) for parts in itertools.product(RADII, COLOURS, SHAPES)]
    scenes: dict[str, list[Scene]] = {name: [] for name in SPLIT_ENDS}
    for main, relation, second in itertools.product(things, INVERSE, things):
        if main.kind != second.kind:
            scene = Scene(main, relation, second)
            scenes[scene.split].append(scene)
    return {name: tuple(found) for name, found in scenes.items()}


class Shapes(Synthetic[dict[str, Any]]):
    """A split of the synthetic shapes data; rows are rendered when they are asked for.

    Row `i` depends on `(seed, split, i)` alone: it is the same whatever `count` is and in whatever order rows are read.

    A row has `image` (48x48 RGB PIL picture), `text` (caption), `label` (index into `CLASSES`), `question`, `answer`
    (one of `ANSWERS`) and `scene` (the scene's id).

    Args:
        split: `train`, `validation` or `test`; they share no scene.
        count: Number of rows, at least 1.
        seed: Another seed gives other rows from the same scenes.

    Raises:
        ValueError: For an unknown split or a count below 1.
    """

    def __init__(self, split: Split, count: int, seed: int = 0) -> None:
        super().__init__(split, count, seed)
        self._scenes = _scenes_by_split()[split]

    def _row(self, place: int) -> dict[str, Any]:
        scene, rng = self._draw(place)
        text = _caption(scene, rng)
        question, answer = _question(scene, rng)
        return {
            "image": _render(scene, rng),
            "text": text,
            "label": CLASSES.index(scene.main.kind),
            "question": question,
            "answer": answer,
            "scene": scene.id,
        }

    def scene(self, index: int) -> str:
        """The scene id of a row, without rendering its picture."""
        return self.scene_of(index).id

    def scene_of(self, index: int) -> Scene:
        """The scene of a row, without rendering its picture."""
        return self._draw(self._place(index))[0]

    def _draw(self, place: int) -> tuple[Scene, random.Random]:
        """The row's scene, and the generator that everything else about the row is drawn from."""
        # Seeding with a string goes through SHA-512, so rows are the same in every process and Python version.
        rng = random.Random(f"{self.seed}/{self.split}/{place}")
        return self._scenes[int(rng.random() * len(self._scenes))], rng


def article(words: str) -> str:
    """The words with the indefinite article that fits."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _caption(scene: Scene, rng: random.Random) -> str:
    """One of six forms; about one caption in six names the main object only."""
    main, second = article(str(scene.main)), article(str(scene.second))
    draw = rng.random()
    if draw < 0.40:
        return f"{main} {scene.relation} {second}"
    if draw < 0.55:
        return f"a picture of {main} {scene.relation} {second}"
    if draw < 0.75:
        return f"{main} with {second} {INVERSE[scene.relation]}"
    if draw < 0.85:
        return f"{article(scene.main.kind)} {scene.relation} {article(scene.second.kind)}"
    return main if draw < 0.93 else f"{article(scene.main.kind)} with a black outline"


def captions(scene: Scene) -> list[str]:
    """All forms that a caption of both objects takes."""
    main, second = article(str(scene.main)), article(str(scene.second))
    return [
        f"{main} {scene.relation} {second}",
        f"a picture of {main} {scene.relation} {second}",
        f"{main} with {second} {INVERSE[scene.relation]}",
        f"{article(scene.main.kind)} {scene.relation} {article(scene.second.kind)}",
    ]


def _question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about one property of the scene, and its answer (one of `ANSWERS`)."""
    draw = int(rng.random() * 7)
    if draw == 6:
        return "where is the outlined object, seen from the other one?", scene.relation
    thing, name = (scene.main, "the outlined object") if draw < 3 else (scene.second, "the object without an outline")
    asked = ("colour", "shape", "size")[draw % 3]
    return f"what {asked} is {name}?", str(getattr(thing, asked))


def _outline(shape: str, centre: Point, radius: float, angle: float) -> list[Point]:
    """Corner points of a shape.

    Args:
        shape: One of `SHAPES`.
        centre: Middle of the shape in pixels.
        radius: Circumscribed radius in pixels.
        angle: Rotation in radians.
    """
    polar: list[Point]  # (radius, angle) pairs, where angle 0 points up
    if shape == "cross":
        arm = 0.34
        far, near = math.hypot(1, arm), math.hypot(arm, arm)
        tip = math.atan2(arm, 1)
        turns = [quarter * math.pi / 2 for quarter in range(4)]
        polar = [p for t in turns for p in ((far, t - tip), (far, t + tip), (near, t + math.pi / 4))]
    elif shape == "star":
        polar = [(1.1 if k % 2 == 0 else 0.48, k * math.pi / 5) for k in range(10)]
    elif shape == "diamond":
        polar = [(1.1 if k % 2 == 0 else 0.72, k * math.pi / 2) for k in range(4)]
    else:
        corners, start = {"circle": (40, 0.0), "square": (4, 0.5), "triangle": (3, 0.0), "hexagon": (6, 0.5)}[shape]
        polar = [(1.0, (k + start) * math.tau / corners) for k in range(corners)]
    x, y = centre
    return [(x + radius * r * math.sin(a + angle), y - radius * r * math.cos(a + angle)) for r, a in polar]


def _render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draws the scene at four times the size, shrinks it and adds noise."""
    scale = _SUPERSAMPLING
    shade = rng.uniform(150, 235)
    background = tuple(round(shade + rng.uniform(-10, 10)) for _ in range(3))
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), background)
    pen = ImageDraw.Draw(canvas)
    dx, dy = _OFFSETS[scene.relation]
    for thing, sign in ((scene.second, -1), (scene.main, 1)):  # the main object last, so that it lies on top
        along, across = sign * rng.uniform(10.5, 12.5), rng.uniform(-5, 5)
        middle = IMAGE_SIZE / 2
        centre = ((middle + dx * along + dy * across) * scale, (middle + dy * along + dx * across) * scale)
        radius = rng.uniform(*RADII[thing.size]) * scale
        angle = math.radians(rng.uniform(-15, 15)) if rng.random() < 0.3 else 0.0
        fill = tuple(min(255, max(0, round(c + rng.gauss(0, 12)))) for c in COLOURS[thing.colour])
        points = _outline(thing.shape, centre, radius, angle)
        pen.polygon(points, fill=fill)
        if thing is scene.main:
            pen.line([*points, *points[:2]], fill=(12, 12, 12), width=round(_OUTLINE_PX * scale), joint="curve")
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), (IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = np.asarray(small, dtype=np.float64) + noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
