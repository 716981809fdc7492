from __future__ import annotations

import re

import pytest
import yaml

from mmcompress.report.card import metadata, render_card, without_examples
from mmcompress.report.markdown import render_markdown
from mmcompress.report.text import bad_news, chips, render_text
from mmcompress.report.views import escape_markdown
from tests.report import examples


@pytest.mark.parametrize("name", examples.ALL)
def test_all_views_render_everything_and_are_deterministic(name: str) -> None:
    for view in (render_text, render_markdown, render_card):
        text = view(examples.ALL[name]())
        assert text == view(examples.ALL[name]())
        assert "None" not in text
        assert text.endswith("\n")


def test_text_holds_what_was_gained_and_lost_within_its_width() -> None:
    text = render_text(examples.full())
    assert max(map(len, text.splitlines())) <= 110
    for fact in [
        "3-quantize *",
        "openvino",
        "int8",
        "115 (19%)",
        "8.4 (4.9x)",
        "86.2 [84.7,87.7]",
        "-0.7 [-1.4,+0.02]",
        "not shown: accuracy may drop",
        "met: accuracy may drop",
        "calibrated on 256",
        "4.92x in all (264.3 → 53.8 ms)",
        "Left out for width: batch 8, ms",
    ]:
        assert fact in text, fact
    wide = render_text(examples.full(), width=140)
    assert "53.8 (4.9x)" in wide
    assert "Left out" not in wide


def test_text_says_bad_news() -> None:
    text = " ".join(render_text(examples.bad()).split())
    for fact in [
        "1-prune ~",
        "Rolled back",
        "! The final model is slower",
        "! The final model is not smaller",
        "missed: accuracy",
        "Synthetic",
    ]:
        assert fact in text, fact


def test_interval_that_excludes_zero_never_shows_zero() -> None:
    """-0.05 points rounds to 0.0, which would contradict the verdict "worse" beside it."""
    text = render_text(examples.full())
    assert "-0.8 [-1.4,-0.05]" in text


def test_chips_of_known_numbers() -> None:
    parameters, disk, speed, quality = chips(examples.full())
    assert (parameters.value, parameters.tone) == ("26% fewer", "good")
    assert (disk.value, disk.details) == ("81% smaller", ("605 → 115 MB",))
    assert speed.value == "4.92x faster"
    assert speed.details[0] == "batch 1: 41.3 → 8.4 ms"
    assert (quality.value, quality.tone) == ("-0.7 points", "neutral")
    assert [c.tone for c in chips(examples.bad())] == ["neutral", "bad", "bad", "bad"]
    assert [c.tone for c in chips(examples.half_finished())] == ["good", "good", "neutral", "neutral"]


def test_slower_at_one_batch_size_only_is_bad_news() -> None:
    report = examples.full()
    for row in report.rows[4:]:
        row.latency_ms["8"] = examples.latency(300.0)
    report.totals.speedup["8"].total = 264.32 / 300
    assert chips(report)[2].tone == "bad"
    assert [a.text for a in bad_news(report) if "slower" in a.text] == [
        "The final model is slower than the baseline at batch 8: 1.13x slower."
    ]


def test_speed_within_noise_is_neither_good_nor_bad() -> None:
    report = examples.torch_only()
    report.rows[2].latency_ms["1"] = examples.latency(41.0)
    report.totals.speedup["1"].total = 41.3 / 41.0
    assert chips(report)[2].value == "no clear difference (1.01x)"
    assert any("No clear difference in speed" in a.text for a in bad_news(report))


def test_baseline_that_guesses_is_pointed_out() -> None:
    """Seven classes: chance is 1/7 = 14.3%, and a tenth of the way to 100% is 22.9%."""
    report = examples.torch_only()
    report.rows[0].quality["accuracy"] = examples.quality(0.22)
    assert [
        "hardly better than guessing: 22.0%, and one of 7 classes at random gives 14.3%" in a.text for a in bad_news(report)
    ] == [True]
    report.rows[0].quality["accuracy"] = examples.quality(0.24)
    assert bad_news(report) == []


def test_unsteady_timing_is_pointed_out() -> None:
    report = examples.torch_only()
    report.rows[0].latency_ms["1"].p90 = 900.0
    assert ["The timing was unsteady: baseline in PyTorch at batch 1 (median 41.3 ms" in a.text for a in bad_news(report)] == [
        True
    ]
    report.rows[0].latency_ms["1"] = examples.latency(41.3)
    report.rows[1].latency_ms["1"].p90 = 900.0  # a step in between: nothing is quoted from it
    assert bad_news(report) == []


def test_classes_where_none_lost() -> None:
    report = examples.full()
    report.rows[4].classes = report.rows[0].classes
    assert "No class lost recall" in render_markdown(report)


def test_error_rates_are_read_the_right_way_round() -> None:
    report = examples.speech()
    quality = chips(report)[3]
    assert (quality.label, quality.value, quality.tone) == ("Quality: wer (lower is better)", "+1.2 points", "bad")
    assert quality.details == ("5.0% → 6.2%", "95% interval +0.8 to +1.6", "worse, n = 500")
    assert any("wer is clearly worse than the baseline's: +1.2 points" in a.text for a in bad_news(report))
    text = " ".join(render_text(report).split())
    assert "Of wer, lower is better: a change below zero is an improvement." in text
    assert "wer, %" in text
    assert "123.0 [110.7,135.3]" in text
    markdown = render_markdown(report)
    assert "wer (lower is better), difference to baseline" in markdown
    assert "-0.9 points (-1.3 to -0.5; 30 won, 12 lost; better)" in markdown
    assert "123.0%" in markdown
    assert "| 115.0 (110.0 to 120.0; n = 500)" in markdown  # CIDEr of the baseline, without a percent sign
    assert "exact_match (lower is better)" not in markdown
    assert "lower is better" not in render_markdown(examples.full())


def test_no_report_speaks_of_pictures_that_there_are_not() -> None:
    report = examples.speech()
    report.totals.synthetic = True
    for view in (render_text, render_markdown, render_card):
        assert "picture" not in view(report)


def test_card_of_a_speech_model() -> None:
    found = _header(render_card(examples.speech()))
    assert found["pipeline_tag"] == "automatic-speech-recognition"
    metrics = found["model-index"][0]["results"][0]["metrics"]  # type: ignore[index]
    assert (metrics[0]["type"], metrics[0]["value"]) == ("wer", 0.062)
    assert metrics[0]["name"] == "wer (ONNX Runtime, float32, n = 500)"


def test_nothing_bad_nothing_said() -> None:
    assert bad_news(examples.torch_only()) == []


def test_markdown_holds_the_facts_and_escapes_cells() -> None:
    text = render_markdown(examples.full())
    for fact in [
        "-0.7 points (-1.4 to +0.02; 32 won, 46 lost; no clear difference)",
        "8.4 (p90 9.1; p99 11.0; 4.92x faster)",
        "**final**",
        "| tram | -12.0 points |",
        "(56 of 61)",
        "Right after the cut",
        "criterion: taylor",
        "onnxruntime",
    ]:
        assert fact in text, fact
    hostile = render_markdown(examples.hostile())
    outside = hostile.split("````yaml")[0] + hostile.split("````\n")[-1]
    assert "<script" not in outside
    for block in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_escape_markdown_by_hand() -> None:
    assert escape_markdown("a|b *c* `d` [e](f) <g>\n_h_ i_j") == r"a\|b \*c\* \`d\` \[e\](f) &lt;g&gt; \_h\_ i_j"


def _header(card: str) -> dict[str, object]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_card_header_is_what_the_hub_reads() -> None:
    found = _header(render_card(examples.full()))
    assert found["base_model"] == "openai/clip-vit-base-patch32"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    assert found["license"] == "unknown"
    assert found["tags"] == ["mmcompress", "prune", "distill", "quantize", "onnx", "openvino"]
    result = found["model-index"][0]["results"][0]  # type: ignore[index]
    first = result["metrics"][0]
    assert (first["type"], first["value"], first["name"]) == ("accuracy", 0.862, "accuracy (OpenVINO, int8, n = 2000)")
    assert first["args"] == {"low": 0.846884, "high": 0.877116, "n": 2000}
    assert result["dataset"]["name"] == "data/test.parquet"


def test_card_of_a_local_model_names_no_hub_model() -> None:
    report = examples.full()
    report.recipe["model"] = "bundled:shapes-clip"
    assert "base_model" not in _header(render_card(report))
    assert "Model: bundled:shapes-clip" in render_card(report)


def test_card_leaves_out_passes_that_were_rolled_back() -> None:
    assert metadata(examples.bad())["tags"] == ["mmcompress", "quantize", "onnx", "synthetic"]


def test_card_says_how_to_load() -> None:
    report = examples.full()
    assert 'CLIPModel.from_pretrained("model")' in render_card(report)
    for row in report.rows:
        row.loads_with = "mmcompress"
    card = render_card(report)
    assert 'mm.load("model")' in card
    assert "CLIPModel.from_pretrained" not in card
    assert "library_name" not in _header(card)


def test_card_sums_up_first_and_holds_no_examples_of_the_data() -> None:
    card = render_card(examples.full())
    assert card.index("| Size on disk | 605 MB | 115 MB | 81% less |") < card.index("<details>")
    listed = "said\n\n#### Right before, wrong now: examples\n\n- row 3, true 'my secret'\n\n#### Slices\n\n| a |\n"
    assert without_examples(listed) == "said\n\n\n#### Slices\n\n| a |\n"
    assert without_examples("#### Both: examples\n\n- row 3") == ""
