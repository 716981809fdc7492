"""Loading and saving: what comes back, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from mmcompress import model as models
from mmcompress.errors import ModelError
from mmcompress.model import CompressedModel, align, load
from tests import tiny


def outputs(module: torch.nn.Module) -> torch.Tensor:
    batch = tiny.FAMILY.example_batch(module.config, 3)
    with torch.no_grad():
        found: torch.Tensor = module(**batch).logits_per_image
    return found


def test_a_saved_folder_is_stock_and_bit_equal(model: CompressedModel, tmp_path: Path) -> None:
    model.history = [{"pass": "prune", "settings": {}, "result": {}}]
    folder = model.save(tmp_path / "out")
    again = CLIPModel.from_pretrained(folder)
    align(again)
    assert torch.equal(outputs(again), outputs(model.module))
    loaded = load(folder)
    assert loaded.history == model.history
    assert loaded.source == "tiny"
    assert not list(tmp_path.glob("*.partial"))


def test_a_saved_folder_needs_nothing_of_ours(model: CompressedModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "out")
    code = (
        "import sys; sys.modules['mmcompress'] = None\n"
        "from transformers import CLIPModel, AutoTokenizer, AutoImageProcessor\n"
        f"p = {str(folder)!r}\n"
        "m = CLIPModel.from_pretrained(p); t = AutoTokenizer.from_pretrained(p); AutoImageProcessor.from_pretrained(p)\n"
        "print(sum(x.numel() for x in m.parameters()), t('a red square')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[0] == str(model.parameters())


def test_a_save_that_would_not_reload_is_an_error_and_leaves_nothing(model: CompressedModel, tmp_path: Path) -> None:
    layer = model.module.vision_model.encoder.layers[0].mlp
    layer.fc1 = torch.nn.Linear(48, 40)
    layer.fc2 = torch.nn.Linear(40, 48)
    with pytest.raises(ModelError, match=r"do not fit|cannot be loaded"):
        model.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_custom_model_reloads_with_its_recorded_shapes(model: CompressedModel, tmp_path: Path) -> None:
    layer = model.module.vision_model.encoder.layers[0].mlp
    layer.fc1 = torch.nn.Linear(48, 40)
    layer.fc2 = torch.nn.Linear(40, 48)
    model.custom = True
    folder = model.save(tmp_path / "out")
    again = load(folder)
    assert again.custom
    assert again.module.vision_model.encoder.layers[0].mlp.fc1.out_features == 40
    assert torch.equal(outputs(again.module), outputs(model.module))


def test_outputs_that_differ_after_reload_are_an_error(
    model: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.clip(seed=5).module
    monkeypatch.setattr(models, "_load_stock", lambda *_: (other, "float32"))
    with pytest.raises(ModelError, match=r"vision_model.image_embeds differs by"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_not_replaced(model: CompressedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="is not empty"):
        model.save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_saving_again_replaces_the_folder(model: CompressedModel, tmp_path: Path) -> None:
    model.save(tmp_path / "out")
    model.history = [{"pass": "prune", "settings": {}, "result": {}}]
    model.save(tmp_path / "out")
    assert len(load(tmp_path / "out").history) == 1


def test_a_clone_is_independent(model: CompressedModel) -> None:
    twin = model.clone()
    with torch.no_grad():
        next(twin.module.parameters()).zero_()
    assert next(model.module.parameters()).abs().sum() > 0


def test_half_precision_weights_are_loaded_as_float32(model: CompressedModel, tmp_path: Path) -> None:
    model.module.half().save_pretrained(tmp_path)
    model.processor.save(tmp_path)
    again = load(tmp_path)
    assert again.stored_dtype == "float16"
    assert {p.dtype for p in again.module.parameters()} == {torch.float32}


def test_buffers_of_old_checkpoints_are_no_mistake(tmp_path: Path) -> None:
    folder = tiny.clip_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for tower, size in (("vision", 5), ("text", 16)):
        weights[f"{tower}_model.embeddings.position_ids"] = torch.arange(size)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).parameters() == tiny.clip().parameters()


def test_texts_are_cut_at_the_models_limit_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    folder = tiny.clip_folder(tmp_path / "model")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert load(folder).processor.tokens(["a red square " * 30])["input_ids"].shape == (1, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.clip_folder(tmp_path / "model")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "weights cut short": (cut_short, "damaged or cut short"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or cut short"),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("hello " * 50), "damaged or cut short"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "only a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a pickle, which is not read"),
    "config missing": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config cannot be read"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "config cannot be read"),
    "another family": (
        lambda f: edit_config(f, model_type="bert"),
        "unknown model_type 'bert'; allowed: .*clip, .*its config.json says CLIPModel",
    ),
    "no such family": (lambda f: edit_config(f, model_type="clipp"), "config cannot be read"),
    "other sizes": (lambda f: edit_config(f, projection_dim=8), "do not fit|cannot be loaded"),
    "sizes of a wrong type": (lambda f: edit_config(f, vision_config={"hidden_size": "big"}), "config cannot be read"),
    "tokenizer missing": (lambda f: [p.unlink() for p in f.glob("token*")], "tokenizer or image processor cannot be read"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer or image processor cannot be read"),
    "processor missing": (lambda f: (f / "preprocessor_config.json").unlink(), "tokenizer or image processor cannot be read"),
    "history damaged": (lambda f: (f / "mmcompress.json").write_text("{"), "is not JSON"),
    "history a list": (lambda f: (f / "mmcompress.json").write_text("[]"), "is not a history"),
    "custom without shapes": (lambda f: (f / "mmcompress.json").write_text('{"custom": true}'), "holds no shapes"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_named_in_one_clear_error(folder: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    damage(folder)
    with pytest.raises(ModelError, match=said) as found:
        load(folder)
    assert str(folder) in str(found.value)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("bundled:shapes-clipp", "did you mean 'shapes-clip'"),
        ("./nowhere", "no such folder"),
        ("/no/where/at/all", "no such folder"),
        ("owner/no-such-model-at-all", "config cannot be read"),
    ],
)
def test_models_that_are_not_there(source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(source)


def test_loaded_weights_lie_where_torch_puts_its_own(tmp_path: Path) -> None:
    """Products of matrices at odd places differ in the last bit on some processors, and then a saved model from its original."""
    module = tiny.clip().module
    for extra in range(0, 64, 8):
        # The weights begin behind the file's header, whose length this varies.
        save_file(module.state_dict(), tmp_path / "model.safetensors", {"format": "pt", "filler": "x" * extra})
        align(found := CLIPModel.from_pretrained(tmp_path, config=module.config))
        assert all(p.data_ptr() % 64 == 0 for p in found.parameters())
