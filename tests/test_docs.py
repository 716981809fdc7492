"""The documents: the reference is up to date, links lead somewhere, recipes are valid, and the examples of how-to.md work."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import ChineseCLIPConfig, ChineseCLIPModel

import mmcompress as mm
from mmcompress import registry
from mmcompress.config import family_of
from mmcompress.recipe import make_recipe, recipe_model
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
ADDED = {"passes": "round_weights", "losses": "cosine", "criteria": "sum_abs", "families": "chinese_clip"}
MARKS = {
    "passes": "PASS = RoundWeights",
    "losses": "LOSS = Cosine",
    "criteria": "CRITERION = SumAbs",
    "families": "FAMILY = ChineseClip()",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def recipes() -> list[Any]:
    """All blocks that are whole recipes."""
    found = []
    for page in PAGES:
        for i, text in enumerate(blocks(page, "yaml")):
            raw = yaml.safe_load(text)
            if isinstance(raw, dict) and {"name", "model"} <= raw.keys():
                found.append(pytest.param(raw, id=f"{page.name}-{i}"))
    return found


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_lines_of_prose_are_short(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if page.name == "reference.md":
        pytest.skip("is generated")
    long = [line for line in text.splitlines() if len(line) > 130 and not line.startswith("|")]
    assert not long


def test_there_are_recipes() -> None:
    assert len(recipes()) >= 5


@pytest.mark.parametrize("raw", recipes())
def test_recipes_are_valid(raw: dict[str, Any]) -> None:
    assert make_recipe(raw).name == raw["name"]


def test_the_table_in_the_readme_is_one_that_a_run_printed() -> None:
    table = next(b for b in blocks(ROOT / "README.md", "") if b.startswith("quickstart: "))
    assert "Where the speed came from" in table
    assert "Synthetic" in table


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the examples of how-to.md, found as if an installed package named them."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = blocks(ROOT / "docs" / "how-to.md", "python")
    for kind, name in ADDED.items():
        (package / f"{name}.py").write_text(next(b for b in code if MARKS[kind] in b))
    monkeypatch.syspath_prepend(str(tmp_path))

    def named(kind: str) -> dict[str, EntryPoint]:
        if kind not in ADDED:
            return {}
        name = ADDED[kind].replace("_", "-")
        return {name: EntryPoint(name, f"mypackage.{ADDED[kind]}", f"mmcompress.{kind}")}

    monkeypatch.setattr(registry, "_added", named)
    recipe_model.cache_clear()
    yield tmp_path
    recipe_model.cache_clear()
    for module in [m for m in sys.modules if m.split(".")[0] == "mypackage"]:
        del sys.modules[module]


def test_the_entry_points_are_those_of_the_text() -> None:
    told = "\n".join(blocks(ROOT / "docs" / "how-to.md", "toml"))
    for kind, name in ADDED.items():
        assert f'[project.entry-points."mmcompress.{kind}"]\n{name.replace("_", "-")} = "mypackage.{name}"' in told


def test_an_added_family_may_work_out_what_it_handles(added: Path) -> None:
    file = added / "mypackage" / "chinese_clip.py"
    told = 'model_types = ("chinese_clip",)'
    assert told in file.read_text()
    file.write_text(file.read_text().replace(told, 'model_types = ("_".join(["chinese", "clip"]),)'))
    assert family_of(ChineseCLIPConfig(), "here").name == "chinese-clip"


def test_what_is_added_is_listed(added: Path) -> None:
    assert registry.describe("passes", "round-weights").startswith("Rounds every weight")
    assert registry.describe("losses", "cosine").startswith("One minus the cosine")
    assert "sum-abs" in registry.names("criteria")


def test_the_example_pass_rounds(added: Path) -> None:
    model = tiny.clip()
    rounded = mm.passes.RoundWeights(bits=4).apply(model)
    weight = next(rounded.module.parameters())
    mantissas = torch.frexp(weight).mantissa * 2**4
    assert torch.equal(mantissas, mantissas.round())
    assert 0 < rounded.history[-1]["result"]["largest_change"] < 1
    assert not torch.equal(weight, next(model.module.parameters()))


def test_the_example_criterion_cuts_the_smallest(added: Path) -> None:
    model = tiny.clip()
    layer = model.module.vision_model.encoder.layers[0].mlp
    with torch.no_grad():
        for values in (layer.fc1.weight[::2], layer.fc1.bias[::2], layer.fc2.weight[:, ::2]):
            values.mul_(1e-3)
    cut = mm.passes.Prune(axis="ffn", ratio={"vision": 0.5}, criterion="sum-abs").apply(model)
    assert torch.equal(cut.module.vision_model.encoder.layers[0].mlp.fc1.weight, layer.fc1.weight[1::2])
    shorter = mm.passes.Prune(axis="depth", ratio={"text": 0.5}, criterion="sum-abs").apply(model)
    assert len(shorter.module.text_model.encoder.layers) == 1


@pytest.mark.usefixtures("timed_here")
def test_the_example_family_runs_a_recipe(added: Path, tmp_path: Path) -> None:
    text = {"vocab_size": len(tiny.WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    vision = tiny.clip_config().vision_config.to_dict()
    sizes = {"intermediate_size": 64, "max_position_embeddings": 16}
    config = ChineseCLIPConfig(text_config={**text, **sizes}, vision_config=vision, projection_dim=24)
    ChineseCLIPModel(config).save_pretrained(tmp_path / "chinese")
    tiny.processor().save(tmp_path / "chinese")
    model = mm.load(tmp_path / "chinese")
    batch = model.family.example_batch(config, 2)
    with torch.no_grad():
        ours, stock = model.family.forward(model.module, batch), model.module(**batch)
    assert torch.allclose(F.normalize(ours.embeds["vision"], dim=-1), stock.image_embeds, atol=1e-6)
    assert torch.allclose(F.normalize(ours.embeds["text"], dim=-1), stock.text_embeds, atol=1e-6)
    passes = [*({"pass": "prune", "axis": axis, "ratio": 0.5} for axis in ("ffn", "depth", "width")), {"pass": "export"}]
    result = mm.run(tiny.recipe(tmp_path, model=str(tmp_path / "chinese"), passes=passes), tmp_path / "run")
    smaller = ChineseCLIPModel.from_pretrained(tmp_path / "run" / "model").config
    assert (smaller.text_config.hidden_size, smaller.vision_config.num_attention_heads) == (16, 2)
    assert {row.runtime for row in result.report.rows} == {"torch", "onnxruntime"}


@pytest.mark.usefixtures("timed_here")
def test_a_recipe_with_an_added_pass_loss_and_criterion_runs(added: Path, tmp_path: Path) -> None:
    passes = [
        {"pass": "prune", "axis": "ffn", "ratio": 0.5, "criterion": "sum-abs"},
        {"pass": "distill", "max_steps": 2, "batch_size": 16, "losses": {"task": 0, "cosine": 1.0}},
        {"pass": "round-weights", "bits": 6},
    ]
    result = mm.run(tiny.recipe(tmp_path, passes=passes), tmp_path / "run")
    assert [row.step for row in result.report.rows] == ["baseline", "1-prune", "2-distill", "3-round-weights"]
    assert set(result.report.rows[2].result["final_losses"]) == {"cosine"}
    assert 0 < result.report.rows[2].result["first_loss"] < 2


def test_the_pandas_example_reads_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_here: None) -> None:
    mm.run(tiny.recipe(tmp_path), tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    code = next(b for b in blocks(ROOT / "docs" / "how-to.md", "python") if "to_frame" in b)
    frame = run_code(code.replace("print(frame", "shown = (frame"), tmp_path)["shown"]
    assert list(frame["step"]) == ["baseline", "1-prune"]


def run_code(code: str, folder: Path) -> dict[str, Any]:
    """The names that a script leaves."""
    path = folder / "script_of_the_page.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("script_of_the_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
