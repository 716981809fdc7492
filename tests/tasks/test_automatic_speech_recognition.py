"""Word error rates against a textbook edit distance and by hand; normalisation, speakers, gates."""

from __future__ import annotations

import json
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

from mmcompress.data.sources import load_source
from mmcompress.errors import DataError, RecipeError
from mmcompress.measure.quality import changes, qualities
from mmcompress.model import load
from mmcompress.progress import SILENT
from mmcompress.recipe import Source, make_recipe
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.automatic_speech_recognition import AutomaticSpeechRecognition, edits, normaliser
from tests.families.tiny_whisper import whisper
from tests.tiny_audio import Parrot, Silent, parrot, recordings

TYPE = "automatic-speech-recognition"


def task(**settings: Any) -> AutomaticSpeechRecognition:
    return AutomaticSpeechRecognition.model_validate({"type": TYPE, **settings})


def scored(wanted: list[Any], said: list[str], speakers: list[Any] | None = None, **settings: Any) -> Any:
    return task(**settings).evaluate(Silent(), parrot(said), recordings(wanted, speakers), SILENT)  # type: ignore[arg-type]


def textbook_distance(a: list[str], b: list[str]) -> int:
    """Wagner and Fischer 1974."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0, :] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


def test_edits_by_hand() -> None:
    # "the cat sat" / "the cap sat down": cat is wrong, down is put in; letters: t -> p and " down". Then all three are missing.
    word_errors, words, letter_errors, letters = edits(["the cat sat", "a b c"], ["the cap sat down", ""])
    assert (word_errors.tolist(), words.tolist()) == ([2, 3], [3, 3])
    assert (letter_errors.tolist(), letters.tolist()) == ([6, 5], [11, 5])


def test_edits_agree_with_the_textbook() -> None:
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(60)] for _ in range(2)]
    word_errors, words, letter_errors, letters = edits(*texts)
    for i, (right, guess) in enumerate(zip(*texts, strict=True)):
        assert word_errors[i] == textbook_distance(right.split(), guess.split())
        assert letter_errors[i] == textbook_distance(list(right), list(guess))
        assert (words[i], letters[i]) == (len(right.split()), len(right))
    assert word_errors.sum() / words.sum() == pytest.approx(jiwer.wer(*texts))
    assert letter_errors.sum() / letters.sum() == pytest.approx(jiwer.cer(*texts))


def test_the_rate_is_of_all_words_together() -> None:
    # 1 error in 1 word, 0 in 4, 2 put in behind 1 word: 3 errors in 6 words; the mean of the rates would be 1.
    scores = scored(["red", "a b c d", "blue"], ["green", "a b c d", "blue blue blue"])
    found = qualities(scores)
    assert found["wer"].value == pytest.approx(0.5)
    assert found["exact_match"].value == pytest.approx(1 / 3)
    assert list(scores.per_example) == list(task().metrics)
    assert task().lower_is_better == {"wer", "cer"}


def test_both_texts_are_normalised() -> None:
    wanted, said = ["Twenty-one COLOURS, um, won't do!"], ["21 colors will not do"]
    spelling = json.dumps({"colours": "colors"})
    family = parrot(said, **{"normalizer.json": spelling})
    english = task().evaluate(Silent(), family, recordings(wanted), SILENT)  # type: ignore[arg-type]
    assert qualities(english)["wer"].value == 0
    # Without the model's spelling table one of the five words differs.
    assert qualities(scored(wanted, said))["wer"].value == pytest.approx(1 / 5)
    assert qualities(scored(["A, b!"], ["a b"], normalizer="basic"))["wer"].value == 0
    assert qualities(scored(["A, b!"], ["a b"], normalizer="none"))["wer"].value == 1


def test_spelled_out_numbers_are_one_word_to_the_english_normaliser() -> None:
    """One wrong digit of four is one wrong number; by the basic normaliser it is one word of four."""
    wanted, said = ["one two three four"], ["one two nine four"]
    assert qualities(scored(wanted, said))["wer"].value == 1.0
    assert qualities(scored(wanted, said, normalizer="basic"))["wer"].value == 0.25


def test_unspaced_languages_are_counted_by_letter() -> None:
    chinese = normaliser("basic", "zh", parrot([]))
    german = normaliser("basic", "de", parrot([]))
    assert chinese("你好。") == "你 好"
    assert german("Guten Tag,  Ära!") == "guten tag ära"


def test_recordings_without_words_are_not_scored_and_the_rest_keeps_its_place() -> None:
    scores = scored(["[laughs]", "red green", "um", "blue"], ["nonsense", "red", "well", "blue"])
    assert scores.kept.tolist() == [1, 3]
    assert qualities(scores)["wer"].value == pytest.approx(1 / 3)
    assert scores.skipped == 0
    with pytest.raises(DataError, match="no transcript has words left after the normalizer 'english'"):
        scored(["[laughs]"], ["ha"])


def test_several_transcripts_of_one_recording_are_refused() -> None:
    assert qualities(scored([["one"]], ["one"]))["wer"].value == 0
    with pytest.raises(DataError, match="row 1, column 'text': 2 transcripts of one recording"):
        scored(["one", ["one", "won"]], ["one", "one"])


def test_clusters_are_speakers_where_there_are_enough() -> None:
    texts = ["one two"] * 60
    many = scored(texts, texts, [f"s{i % 20}" for i in range(60)])
    assert len(set(many.clusters.tolist())) == 20
    assert many.clusters[0] == many.clusters[20]
    assert scored(texts, texts, [i % 9 for i in range(60)]).clusters is None
    assert scored(texts, texts).clusters is None
    assert scored(texts, texts, ["a", None] * 30).clusters is None


def test_the_language_is_asked_for_and_the_limit_is_passed_on() -> None:
    for settings, asked in (({}, (None, 128)), ({"language": "en", "max_new_tokens": 9}, (["en"] * 2, 9))):
        processor = parrot(["one", "two"])
        task(**settings).evaluate(Silent(), processor, recordings(["one", "two"]), SILENT)  # type: ignore[arg-type]
        assert isinstance(processor.family, Parrot)
        assert processor.family.asked == [asked]


@pytest.mark.parametrize(
    "settings", [{"language": "de"}, {"language": "German", "normalizer": "basic"}, {"max_new_tokens": 0}, {"normalizer": "x"}]
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"normalizer|language|max_new_tokens"):
        task(**settings)


def test_a_step_that_makes_more_errors_is_worse() -> None:
    wanted = [f"{a} {b}" for a in ("one", "two", "three", "four", "five") * 8 for b in ("six", "seven", "eight")]
    good = scored(wanted, wanted)
    bad = scored(wanted, [text if i % 4 else "nine nine" for i, text in enumerate(wanted)])
    change = changes(bad, good, task().lower_is_better)
    assert change["wer"].difference == pytest.approx(0.25)
    assert {name: c.verdict for name, c in change.items()} == {"wer": "worse", "cer": "worse", "exact_match": "worse"}
    assert change["wer"].lost == 30
    assert changes(good, bad, task().lower_is_better)["wer"].verdict == "better"


def recipe(gate: dict[str, Any]) -> dict[str, Any]:
    data = {"eval": {"path": "test.parquet"}}
    return {"name": "x", "model": "openai/whisper-tiny", "task": {"type": TYPE}, "data": data, "gates": [gate]}


def test_gates_on_error_rates() -> None:
    assert make_recipe(recipe({"metric": "wer", "max_value": 130})).gates[0].max_value == 130
    assert make_recipe(recipe({"metric": "wer", "max_drop": 1})).gates[0].max_drop == 1
    with pytest.raises(RecipeError, match=r"gates.0.min_value: lower values of wer are better; give `max_value` or `max_drop`"):
        make_recipe(recipe({"metric": "wer", "min_value": 90}))
    with pytest.raises(RecipeError, match=r"gates.0.max_value: higher values of exact_match are better; give `min_value`"):
        make_recipe(recipe({"metric": "exact_match", "max_value": 90}))
    with pytest.raises(RecipeError, match="exactly one of `max_drop`, `min_value` and `max_value`"):
        make_recipe(recipe({"metric": "wer", "max_value": 90, "max_drop": 1}))


def test_a_real_model_is_scored_like_stock_generate() -> None:
    model = whisper()
    examples = recordings(["zero one", "two", "three four five", "six"])
    scores = task(max_new_tokens=8).evaluate(TorchPredict(model), model.processor, examples, SILENT)
    features = model.processor.stack(model.processor.media("audio", [examples.media(i) for i in range(4)]))
    with torch.no_grad():
        ids = model.module.generate(**features, do_sample=False, num_beams=1, max_new_tokens=8)
    said = model.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    clean = normaliser("english", None, model.processor)
    wanted = [examples[i]["text"] for i in range(4)]
    expected = jiwer.wer([clean(text) for text in wanted], [clean(text) for text in said])
    assert qualities(scores)["wer"].value == pytest.approx(expected)


def test_a_training_batch_teaches_the_transcripts() -> None:
    model = whisper()
    examples = recordings(["one three", "two"])
    batch = task().collate([examples[0], examples[1]], model.processor, examples, 0)
    tokenizer = model.processor.tokenizer
    taught = [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True) for row in batch["labels"].tolist()]
    assert taught == ["one three", "two"]
    assert (batch["labels"][1] == -100).sum() == 1
    outputs = model.family.forward(model.module, batch)
    with torch.no_grad():
        stock = model.module(input_features=batch["input_features"], labels=batch["labels"]).loss
    assert float(task().loss(outputs, batch)) == pytest.approx(float(stock), rel=1e-4)


def test_the_bundled_model_understands_the_bundled_data() -> None:
    """Its card says a word error rate of 0.6% on 2,000 rows; the first 60 have about 180 words."""
    examples = load_source(Source(path="bundled:tones", samples=60), "eval", 0)
    model = load("bundled:tones-whisper")
    scores = task(max_new_tokens=8).evaluate(TorchPredict(model), model.processor, examples, SILENT)
    assert qualities(scores)["wer"].value < 0.03
    assert scores.kept is not None
    assert len(scores.kept) == 60
    assert model.parameters() < 1_000_000
