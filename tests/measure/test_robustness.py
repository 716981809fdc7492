"""Two models under conditions: a fault that is planted is found, cells are measured once, and every task can be measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mmcompress.data.examples import Examples
from mmcompress.measure import robustness
from mmcompress.measure.robustness import RobustnessMeter, Subject, model_side, same_media, some
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.report.schema_robustness import Robustness as Found
from mmcompress.robustness_settings import Robustness
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Task
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.visual_question_answering import VisualQuestionAnswering
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny, tiny_data
from tests.families import tiny_blip, tiny_siglip2

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])
BRIGHT_ENOUGH = 0.29


class SeesColours:
    """A model that names the colour of a picture; with ``fails_in_the_dark`` it says the opposite of what is dark."""

    runtime = "torch"
    components = ("vision_model", "text_model")

    def __init__(self, fails_in_the_dark: bool = False, blind: bool = False) -> None:
        self.fails_in_the_dark, self.blind = fails_in_the_dark, blind
        self.calls = 0
        stock = tiny.processor().image_processor
        self.mean, self.std = (np.array(v).reshape(1, -1, 1, 1) for v in (stock.image_mean, stock.image_std))

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if component == "text_model":
            known = {tiny.WORDS.index(name): np.array(colour) / 255 - 0.5 for name, colour in tiny.COLOURS.items()}
            none = np.ones(3)  # of a word that was mistyped
            found = [next((known[i] for i in row if i in known), none) for row in inputs["input_ids"].tolist()]
            return {"text_embeds": np.array(found)}
        self.calls += 1
        colours = (inputs["pixel_values"] * self.std + self.mean).mean(axis=(2, 3))
        found = colours - 0.5
        if self.fails_in_the_dark:
            found = np.where(colours.mean(axis=1, keepdims=True) < BRIGHT_ENOUGH, -found, found)
        if self.blind:
            found = np.ones_like(found)
        return {"image_embeds": found}

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        return {}


def examples(count: int = 60) -> Examples:
    found = tiny_data.examples(count)
    found.narrow(TASK.roles, TASK.type)
    return found


def meter(folder: Path, settings: Robustness | None, outside: Examples | None = None) -> RobustnessMeter:
    return RobustnessMeter(TASK, examples(), settings, outside, 0, folder, SILENT)


def subject(name: str, predict: SeesColours, model: CompressedModel | None = None) -> Subject:
    return Subject(name, lambda: model or tiny.clip(), lambda _: predict)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A compressed model that is as good as the baseline but in the dark."""
    settings = Robustness(severities=[1, 5], adversarial=None, text=False)
    folder = tmp_path_factory.mktemp("planted")
    return meter(folder, settings).measure(
        subject("baseline.torch", SeesColours()), subject("1-prune.torch", SeesColours(fails_in_the_dark=True))
    )


def test_a_model_that_fails_only_in_the_dark_is_found_out(planted: Found) -> None:
    assert planted.clean["baseline"].value == planted.clean["final"].value == 1
    worse = [c.name for c in planted.conditions if c.verdict == "loses more"]
    assert worse == ["darkness"]
    dark = next(c for c in planted.conditions if c.name == "darkness")
    assert dark.extra.low > 0
    assert dark.degrees[0].final.value == 1
    assert dark.degrees[-1].extra.value > 0.3
    assert dark.degrees[-1].baseline_drop.value == 0
    assert planted.n == 60


def test_shuffled_pictures_bring_both_models_down(planted: Found) -> None:
    shuffled = next(c for c in planted.conditions if c.name == "shuffled-media").degrees[0]
    assert shuffled.baseline_drop.low > 0.5
    assert shuffled.final.value == shuffled.baseline.value


def test_every_cell_is_measured_once_and_the_rest_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Robustness(corruptions=["jpeg", "darkness"], severities=[1, 5], text=False, adversarial=None)
    one, two = SeesColours(), SeesColours(fails_in_the_dark=True)
    left = 7
    save = RobustnessMeter._save

    def stops(self: RobustnessMeter, *given: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        save(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(RobustnessMeter, "_save", stops)
    with pytest.raises(KeyboardInterrupt):
        meter(tmp_path, settings).measure(subject("baseline.torch", one), subject("1-prune.torch", two))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 7
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr(RobustnessMeter, "_save", save)
    one, two = SeesColours(), SeesColours(fails_in_the_dark=True)
    found = meter(tmp_path, settings).measure(subject("baseline.torch", one), subject("1-prune.torch", two))
    # Clean, two corruptions at two severities, shuffled: 6 cells, of which 4 of the baseline and 3 of the other were there.
    assert (one.calls, two.calls) == (2, 3)
    assert before == {p: p.stat().st_mtime_ns for p in before}

    def never() -> CompressedModel:
        raise AssertionError("nothing is left to measure")

    last = meter(tmp_path, settings).measure(
        Subject("baseline.torch", never, lambda _: one), Subject("1-prune.torch", never, lambda _: two)
    )
    assert last == found


def test_both_models_are_given_the_same_tensors(tmp_path: Path) -> None:
    class Keeps(SeesColours):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bytes] = []

        def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if component == "vision_model":
                self.seen.append(inputs["pixel_values"].tobytes())
            return super().__call__(component, inputs)

    one, two = Keeps(), Keeps()
    meter(tmp_path, Robustness(severities=[2], adversarial=None)).measure(subject("baseline.torch", one), subject("x.torch", two))
    assert one.seen == two.seen
    assert len(set(one.seen)) == len(one.seen) - 3  # typos and casing change no picture


def test_a_model_with_another_processor_sees_the_pictures_through_its_own(tmp_path: Path) -> None:
    model, other = tiny.clip(), tiny.clip()
    other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert same_media(model.processor, tiny.processor())
    assert not same_media(model.processor, other.processor)
    one, two = SeesColours(), SeesColours()
    settings = Robustness(corruptions=["jpeg"], severities=[1], text=False, modality=False, adversarial=None)
    found = meter(tmp_path, settings).measure(subject("baseline.torch", one, model), subject("x.torch", two, other))
    # The fake model takes the usual mean off: through the other processor everything looks darker than it is.
    assert found.clean["final"].value < found.clean["baseline"].value


def test_shift_and_attacks_on_a_real_model(tmp_path: Path) -> None:
    noise = Examples(
        [{"image": tiny.png((int(r), int(g), int(b)), 9)} for r, g, b in np.random.default_rng(0).integers(0, 255, (30, 3))],
        "data.ood (noise)",
        {"image": "image"},
    )
    settings = Robustness.model_validate(
        {"corruptions": ["jpeg"], "severities": [1], "text": False, "adversarial": {"samples": 16, "eps": [4], "steps": 3}}
    )
    models = [tiny.clip(seed) for seed in (0, 1)]
    subjects = [Subject(f"{i}.torch", lambda m=m: m, TorchPredict) for i, m in enumerate(models)]  # type: ignore[misc]
    found = meter(tmp_path, settings, noise).measure(*subjects)
    assert found.shift is not None
    assert (found.shift.n_inside, found.shift.n_outside, found.shift.score) == (60, 30, "softmax")
    assert [(c.name, [d.severity for d in c.degrees]) for c in found.attacks] == [("fgsm", [4.0]), ("pgd", [4.0])]
    assert found.attack_n == 16
    assert found.notes == []
    assert meter(tmp_path, settings, noise).measure(*subjects) == found
    assert Found.model_validate_json(found.model_dump_json()) == found


def test_questions_are_mistyped_shuffled_and_left_out(tmp_path: Path) -> None:
    task: Task = VisualQuestionAnswering(type="visual-question-answering", max_new_tokens=2)
    own = tiny_data.examples(6)
    own.narrow(task.roles, task.type)
    settings = Robustness(corruptions=["jpeg"], severities=[5])
    model = tiny_blip.answers()
    found = RobustnessMeter(task, own, settings, own, 0, tmp_path, SILENT).measure(
        *(Subject(name, lambda: model, TorchPredict) for name in ("baseline.torch", "x.torch"))
    )
    assert {c.name for c in found.conditions if c.group == "modality"} == {
        "missing-media", "shuffled-media", "missing-text", "shuffled-text"
    }  # fmt: skip
    assert found.notes[0].startswith("Attacks were not measured: attacks follow the gradient of similarities")
    assert found.notes[1].startswith("data.ood was not measured: visual-question-answering compares no similarities")
    assert all(c.extra.value == 0 for c in found.conditions)


def test_retrieval_is_measured_under_typos(tmp_path: Path) -> None:
    task: Task = ImageTextRetrieval(type="image-text-retrieval")
    own = tiny_data.examples(12)
    own.narrow(task.roles, task.type)
    model = tiny.clip()
    found = RobustnessMeter(
        task, own, Robustness(corruptions=[], severities=[5], adversarial=None), own, 0, tmp_path, SILENT
    ).measure(*(Subject(name, lambda: model, TorchPredict) for name in ("baseline.torch", "x.torch")))
    assert [c.name for c in found.conditions] == ["typos", "upper-case", "lower-case", "shuffled-media"]
    assert found.shift is not None
    assert found.shift.score == "similarity"


def test_a_condition_that_a_model_cannot_be_scored_under_is_said(tmp_path: Path) -> None:
    class Breaks(SeesColours):
        def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = super().__call__(component, inputs)
            if component == "vision_model" and float(inputs["pixel_values"].mean()) < 0.0:
                found["image_embeds"] = found["image_embeds"] * np.nan
            return found

    settings = Robustness(corruptions=["jpeg", "darkness"], severities=[5], text=False, modality=False, adversarial=None)
    found = meter(tmp_path, settings).measure(subject("baseline.torch", SeesColours()), subject("x.torch", Breaks()))
    assert [c.name for c in found.conditions] == ["jpeg"]
    assert found.notes[0].startswith("darkness at severity 5: x.torch: the model gives embeddings that are zero or not finite")


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    own = examples(20)
    one, two = some(own, 5, 0), some(own, 5, 0)
    assert [one[i]["label"] for i in range(5)] == [two[i]["label"] for i in range(5)]
    assert some(own, 20, 0) is own
    assert model_side(tiny.processor()) == 16
    assert model_side(tiny_siglip2.siglip2().processor) == robustness.USUAL_SIDE
