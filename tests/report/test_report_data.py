"""report.json against its published schema, and its rows as a pandas frame."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest

from mmcompress.report.frame import flat_row
from mmcompress.report.schema import Report, report_schema
from tests.report import examples


@pytest.mark.parametrize("name", examples.ALL)
def test_reports_are_what_the_schema_says(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    plain = json.loads(json.dumps(examples.ALL[name]().model_dump(mode="json"), allow_nan=False))
    jsonschema.validate(plain, report_schema(), cls=jsonschema.Draft202012Validator)
    plain["rows"] = [{"step": 1}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, report_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", examples.ALL)
def test_reports_read_back_to_themselves(name: str) -> None:
    report = examples.ALL[name]()
    text = json.dumps(report.model_dump(mode="json"), allow_nan=False)
    assert Report.model_validate_json(text) == report


def test_every_field_of_the_schema_is_closed_and_what_was_always_there_is_required() -> None:
    found = report_schema()
    objects = [found, *found["$defs"].values()]
    assert all(o["additionalProperties"] is False for o in objects if "properties" in o)
    assert {"name", "recipe", "environment", "totals"} <= set(found["required"])
    assert {"step", "runtime", "parameters", "disk_bytes"} == set(found["$defs"]["Row"]["required"])


def test_a_row_by_hand() -> None:
    row = {
        "step": "1-prune", "runtime": "torch", "parameters": 7, "flops": None, "rolled_back": False,
        "latency_ms": {"8": {"p50": 2.5, "n": 3}}, "quality": {"wer": {"value": 0.1, "low": 0.0}},
        "change": {"wer": {"difference": -0.1, "won": 2, "verdict": "better", "p_value": None}},
        "new": {"deep": {"ece": 0.02, "bins": [1, 2], "words": "for people"}}, "settings": {"ratio": 0.5}, "notes": ["x"],
    }  # fmt: skip
    assert flat_row(row) == {
        "step": "1-prune", "runtime": "torch", "parameters": 7, "flops": None, "rolled_back": False,
        "latency_ms.8.p50": 2.5, "latency_ms.8.n": 3, "quality.wer": 0.1, "quality.wer.low": 0.0,
        "change.wer": -0.1, "change.wer.won": 2, "change.wer.verdict": "better", "new.deep.ece": 0.02,
    }  # fmt: skip


def test_the_frame_has_all_numbers_of_all_rows() -> None:
    frame = examples.full().to_frame()
    assert len(frame) == 6
    last = frame.iloc[-1]
    assert last["latency_ms.1.p50"] == 8.4
    assert last["quality.accuracy"] == 0.862
    assert last["quality.accuracy.n"] == 2000
    assert last["change.accuracy"] == pytest.approx(-0.0068)
    assert last["change.accuracy.won"] == 32
    assert last["components.vision.parameters"] > 0
    assert not any(column.startswith(("settings", "classes")) for column in frame)
    assert frame["flops"].notna().all()


def test_the_command_prints_the_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "mmcompress", "schema", "--report"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(report_schema()))
