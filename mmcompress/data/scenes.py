"""The pictures of `mmcompress.data.shapes` with four captions each, and with questions and answers of more kinds.

Everything here is synthetic, as in `mmcompress.data.shapes`; the pictures are the very same ones.

The questions ask for colours, shapes, sizes, positions and counts, and for yes or no. Answers are drawn so that the question
alone gives little away: who answers each question by the most frequent answer to it in 20,000 training rows is right in 33.8%
of 2,000 test rows, and who always gives the most frequent answer of all in 15.7%.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmcompress.data.shapes import CLASSES, COLOURS, INVERSE, RADII, SHAPES, Scene, Shapes, Thing, article, captions
from mmcompress.data.synthetic import Split, Synthetic

COUNTS = ("0", "1", "2")
YES_NO = ("no", "yes")
SCENE_ANSWERS: tuple[str, ...] = (*COLOURS, *SHAPES, *RADII, *INVERSE, *COUNTS, *YES_NO)
"""Every answer there is to the questions."""

_NAMES = ("the outlined object", "the object without an outline")


class Row(Mapping[str, Any]):
    """A row whose picture is rendered when it is asked for: questions and answers are read far more often."""

    def __init__(self, words: dict[str, Any], render: Callable[[], Any]) -> None:
        self._words, self._render = words, render

    def __getitem__(self, key: str) -> Any:
        return self._render() if key == "image" else self._words[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("image", *self._words))

    def __len__(self) -> int:
        return 1 + len(self._words)


class Scenes(Synthetic[Row]):
    """A split of the scenes; rows are rendered when they are asked for.

    A row has `image` and `label` as `Shapes` has them, `text` (a list of four captions), `question`, `answers` (a list with the
    one right answer, out of `SCENE_ANSWERS`) and `scene` (the scene's id).

    Args:
        split: `train`, `validation` or `test`; they share no scene.
        count: Number of rows, at least 1.
        seed: Another seed gives other rows from the same scenes.

    Raises:
        ValueError: For an unknown split or a count below 1.
    """

    def __init__(self, split: Split, count: int, seed: int = 0) -> None:
        super().__init__(split, count, seed)
        self._shapes = Shapes(split, count, seed)

    def _row(self, place: int) -> Row:
        return Row(self.words(place), lambda: self._shapes[place]["image"])

    def words(self, index: int, turn: int = 0) -> dict[str, Any]:
        """All of a row but its picture, without rendering; another turn asks another question."""
        scene = self._shapes.scene_of(index)
        # A generator of its own: the pictures are drawn from the one that `Shapes` uses.
        rng = random.Random(f"{self.seed}/{self.split}/{self._place(index)}/question {turn}")
        question, answer = ask(scene, rng)
        label = CLASSES.index(scene.main.kind)
        return {"label": label, "text": captions(scene), "question": question, "answers": [answer], "scene": scene.id}


def ask(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a scene, and its answer (one of `SCENE_ANSWERS`); each of the six kinds is as frequent."""
    kind = rng.choice((_property, _property_of_named, _position, _count, _is_it, _is_there))
    return kind(scene, rng)


def _property(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A property of the object with, or of the one without the outline."""
    which, asked = rng.randrange(2), rng.choice(("colour", "shape", "size"))
    return f"what {asked} is {_NAMES[which]}?", str(getattr((scene.main, scene.second)[which], asked))


def _property_of_named(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The colour of an object that is known by its shape, or the shape of one that is known by its colour."""
    thing, other = _shuffled(scene, rng)
    ways = []
    if thing.shape != other.shape:
        ways.append((f"what colour is the {thing.shape}?", thing.colour))
    if thing.colour != other.colour:
        ways.append((f"what shape is the {thing.colour} object?", thing.shape))
    return rng.choice(ways)  # never empty: colour and shape are never both the same


def _position(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Where one object is, seen from the other."""
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    if rng.random() < 0.5:
        return f"where is {_NAMES[0]}?", scene.relation
    return f"where is {_NAMES[1]}?", back[scene.relation]


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """How many objects have a property; the number is drawn before the property."""
    asked, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES), ("size", tuple(RADII))))
    have = [getattr(thing, asked) for thing in (scene.main, scene.second)]
    found = {number: [v for v in values if have.count(v) == number] for number in range(3)}
    numbers = [number for number in range(3) if found[number]]
    if asked != "size" and found[2]:
        numbers += [2] * 4  # one colour or shape for both is rare: where there is one, it is asked for
    number = rng.choice(numbers)
    value = rng.choice(found[number])
    plural = f"{value}es" if value == "cross" else f"{value}s"
    return f"how many {plural if asked == 'shape' else f'{value} objects'} are there?", str(number)


def _is_it(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Whether an object has a property; half of the answers are yes."""
    which, asked = rng.randrange(2), rng.choice(("colour", "shape"))
    true = getattr((scene.main, scene.second)[which], asked)
    yes = rng.random() < 0.5
    said = true if yes else rng.choice([v for v in (COLOURS if asked == "colour" else SHAPES) if v != true])
    return f"is {_NAMES[which]} {said if asked == 'colour' else f'a {said}'}?", YES_NO[yes]


def _is_there(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Whether there is an object of a colour and a shape; half of the answers are yes, and a no is wrong in one of the two."""
    thing, other = _shuffled(scene, rng)
    if rng.random() < 0.5:
        return f"is there {article(thing.kind)}?", "yes"
    near = [f"{colour} {thing.shape}" for colour in COLOURS if colour != thing.colour]
    near += [f"{thing.colour} {shape}" for shape in SHAPES if shape != thing.shape]
    return f"is there {article(rng.choice([kind for kind in near if kind != other.kind]))}?", "no"


def _shuffled(scene: Scene, rng: random.Random) -> tuple[Thing, Thing]:
    return (scene.main, scene.second) if rng.random() < 0.5 else (scene.second, scene.main)
