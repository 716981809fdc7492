"""Recipes: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmcompress.errors import RecipeError
from mmcompress.recipe import json_schema, load_recipe, make_recipe, resolved
from tests import tiny

GOOD = """\
name: good
model: bundled:shapes-clip
task:
  type: zero-shot-image-classification
data:
  train: {path: "bundled:shapes", samples: 100}
  eval: {path: "bundled:shapes"}
passes:
  - {pass: prune, ratio: 0.5}
  - pass: distill
    epochs: 1
  - {pass: quantize}
  - {pass: export}
gates:
  - {metric: accuracy, max_drop: 1.0}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as found:
        load_recipe(write(folder, text), overrides)
    return str(found.value).replace(str(folder) + "/", "")


def test_a_good_recipe_is_resolved_with_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    plain = resolved(recipe)
    assert [step["pass"] for step in plain["passes"]] == ["prune", "distill", "quantize", "export"]
    assert plain["passes"][0]["criterion"] == "magnitude"
    assert plain["task"]["templates"] == ["a photo of a {}."]
    assert plain["report"]["batch_sizes"] == [1, 8]
    assert make_recipe(yaml.safe_load(yaml.safe_dump(plain))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ratio: 0.5", "ratioo: 0.5", "recipe.yaml, line 9: passes.0.ratioo: unknown key 'ratioo'"),
        ("ratio: 0.5", "ratioo: 0.5", "did you mean 'ratio'?"),
        ("ratio: 0.5", "ratio: 1.5", "line 9: passes.0.ratio"),
        ("epochs: 1", "epochs: -1", "line 11: passes.1.epochs: found -1"),
        ("epochs: 1", "epochs: many", "line 11: passes.1.epochs: found 'many'"),
        ("pass: distill", "pass: distil", "line 10: passes.1.pass: unknown pass 'distil'"),
        ("pass: distill", "pass: distil", "did you mean 'distill'?"),
        ("{pass: prune, ratio: 0.5}", "{ratio: 0.5}", "line 9: passes.0: needs the key 'pass'"),
        ("{pass: quantize}", "{pass: quantize, scheme: int8-statik}", "did you mean 'int8-static'?"),
        ("type: zero-shot-image-classification", "type: zero-shot", "line 4: task.type: unknown task type 'zero-shot'"),
        ("metric: accuracy", "metric: acuracy", "line 15: gates.0.metric: unknown metric 'acuracy'"),
        ("max_drop: 1.0", "max_drop: -3", "line 15: gates.0.max_drop: found -3"),
        (", max_drop: 1.0", "", "line 15: gates.0: needs exactly one of `max_drop`, `min_value` and `max_value`"),
        ("model: bundled:shapes-clip\n", "", "model: this key is missing"),
        ("name: good", "name: good\nnmae: x", "line 2: nmae: unknown key 'nmae'"),
        ("name: good", "name: a/b", "line 1: name: found 'a/b'"),
        ("name: good", "name: good\nname: again", "line 2: the key 'name' stands twice"),
        ("samples: 100", "samples: 0", "line 6: data.train.samples: found 0"),
        ("samples: 100", "sample: 100", "did you mean 'samples'?"),
        ("{pass: quantize}", "{pass: quantize}\n  - {pass: finetune}", "line 13: passes.3: finetune after quantize"),
        ('  train: {path: "bundled:shapes", samples: 100}\n', "", "passes.1: distill reads data.train"),
        ("ratio: 0.5", "ratio: 0.5, criterion: tailor", "did you mean 'taylor'?"),
    ],
)
def test_mistakes_are_named_with_line_key_and_what_is_allowed(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    message = refusal(tmp_path, GOOD.replace(old, new, 1))
    assert said in message
    assert "pydantic" not in message
    assert "Traceback" not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD.replace("ratio: 0.5", "ratio: 7").replace("epochs: 1", "epoch: 1"))
    assert len(message.splitlines()) == 2
    assert message.index("line 9") < message.index("line 11")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [", "name: 'x", "a: &a [*a]\n", "\x00", "name: good\n\tmodel: x"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "recipe.yaml" in refusal(tmp_path, text)


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("passes.0.ratio=0.25", lambda r: r.passes[0].ratio == 0.25),
        ("passes[0].ratio={vision: 0.5}", lambda r: r.passes[0].ratio == {"vision": 0.5}),
        ("seed=7", lambda r: r.seed == 7),
        ("report.threads=1", lambda r: r.report.threads == 1),
        ("data.eval.path=bundled:other", lambda r: r.data.eval.path == "bundled:other"),
        ("gates=[]", lambda r: r.gates == []),
    ],
)
def test_set_overrides_a_value(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load_recipe(write(tmp_path, GOOD), [override]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "--set seed: allowed: key.path=value"),
        ("sead=3", "--set sead=3: sead: unknown key 'sead'"),
        ("passes.9.ratio=0.5", "no item of the list"),
        ("name.x=1", "holds 'good', which has no keys"),
        ("passes.0.ratio=2", "--set passes.0.ratio=2: passes.0.ratio"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, GOOD, override)


def test_relative_paths_are_found_beside_the_recipe(tmp_path: Path) -> None:
    tiny.parquet(tmp_path / "test.parquet", 6)
    text = GOOD.replace('eval: {path: "bundled:shapes"}', "eval: {path: test.parquet}")
    assert load_recipe(write(tmp_path, text)).data.eval.path == str(tmp_path / "test.parquet")


def test_test_data_never_trains(tmp_path: Path) -> None:
    text = GOOD.replace('train: {path: "bundled:shapes", samples: 100}', "train: {from: eval}")
    assert "would read the test data" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("fields", "split"),
    [
        ({}, "calibration"),
        ({"scheme": {"vision": "float32", "text": "int8-static"}}, "calibration"),
        ({"scheme": "int4-weight-only", "algorithm": "gptq"}, "calibration"),
        ({"scheme": "int8-dynamic", "placement": "measure"}, "calibration"),
        ({"max_drop": 0.5}, "train"),
        ({"scheme": "int8-dynamic"}, None),
        ({"scheme": "int4-weight-only"}, None),
        ({"scheme": "float16", "placement": "measure"}, None),
        ({"scheme": {"vision": "float16", "text": "int8-dynamic"}}, None),
    ],
)
def test_quantizing_with_data_that_the_recipe_lacks_is_refused_at_once(fields: dict[str, Any], split: str | None) -> None:
    recipe = {**yaml.safe_load(GOOD), "passes": [{"pass": "quantize", **fields}]}
    given = dict(recipe["data"])
    recipe["data"] = {"eval": given["eval"]}
    if split == "train":  # ranges are there, examples to hold back are not
        recipe["data"]["calibration"] = given["train"]
    if split is None:
        make_recipe(recipe)
    else:
        with pytest.raises(RecipeError, match=rf"passes.0: quantize reads data.{split}, which the recipe does not have"):
            make_recipe(recipe)
    recipe["data"]["train"] = given["train"]
    make_recipe(recipe)


def test_the_json_schema_knows_every_pass_and_describes_every_key() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    for name in ("prune", "distill", "finetune", "quantize", "qat", "export"):
        assert f'"const": "{name}"' in text
    for name, part in schema["$defs"].items():
        for key, value in part.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key} has no description"
    assert all(v.get("description") or "$ref" in v for k, v in schema["properties"].items() if k != "data")


def test_a_wrong_sixth_pass_is_refused_without_loading_torch(tmp_path: Path) -> None:
    text = GOOD.replace("  - {pass: export}\n", "  - {pass: export}\n  - {pass: export}\n  - {pass: export, opset: 3}\n")
    path = write(tmp_path, text)
    code = (
        "import sys\nfrom mmcompress.recipe import load_recipe\nfrom mmcompress.errors import RecipeError\n"
        f"try: load_recipe({str(path)!r})\nexcept RecipeError as e: print(e)\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "passes.5.opset: found 3" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
