"""Damaged recipes, model folders and data: each works properly or ends in one clear error, and nothing is left half-written.

The damage is drawn with fixed seeds, so that a case that fails fails again. ``-m slow`` draws many more.
"""

from __future__ import annotations

import copy
import datetime
import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import mmcompress as mm
from mmcompress.errors import DataError, ModelError, RecipeError, UserError
from mmcompress.recipe import load_recipe, make_recipe, resolved
from tests import tiny

Damage = Callable[[Path], object]
INTERNALS = ("Traceback", "pydantic", " object at 0x", "ignore_mismatched_sizes")


def check_message(error: UserError, *wheres: str) -> None:
    """What a person needs: not empty, not a flood, no innards, and the file or the key on every line."""
    message = str(error)
    assert message.strip()
    lines = message.splitlines()
    assert len(lines) <= 30
    for line in lines:
        assert len(line) < 600 + max(map(len, wheres)), line
        assert any(where in line for where in wheres), line
        assert not any(word in line for word in INTERNALS), line


# Recipes.

GOOD = """\
name: good
model: bundled:shapes-clip
task:
  type: zero-shot-image-classification
  templates: ["a photo of a {}."]
data:
  train: {path: "bundled:shapes", samples: 100, columns: {image: image}}
  calibration: {from: train, samples: 10}
  eval: {path: "bundled:shapes"}
passes:
  - {pass: prune, ratio: {vision: 0.5}}
  - pass: distill
    epochs: 1
    losses: {feature: 1.0}
  - {pass: quantize}
  - {pass: export}
gates:
  - {metric: accuracy, max_drop: 1.0}
report: {batch_sizes: [1, 8], threads: 2}
seed: 0
"""
VALUES: list[Any] = [
    *(None, True, [], [[]], {}, {"a": 1}, [None], 10**400, -1, 0, 0.5, -(10**30), 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "\u202ex", "💥" * 3, "é" * 5000, "a\nb\nc", "x" * 100_000, "null"),
    *({1: 2}, {None: None}, {True: 3}, {"a": {"b": {"c": {}}}}, {"a": float("nan")}, b"\xff\x00", {"pass": "prune"}),
    *(
        datetime.date(2020, 1, 1),
        datetime.datetime(2020, 1, 1),
        [1, "a", None, {}],
        "../../etc/passwd",
        "~",
        "..",
        ":",
        "bundled:",
    ),
]
SPLINTERS = [
    *(
        b"\t",
        b"&a ",
        b"*a",
        b"!!python/object:os.system ",
        b"? ",
        b": ",
        b"[",
        b"}",
        b"<<: ",
        b"!!set ",
        b"!!timestamp ",
        b"---\n",
    ),
    *(
        b"...\n",
        b"%YAML 9.9\n",
        b"\xef\xbb\xbf",
        b"!!binary ",
        b"!!int ",
        b"!!float ",
        b"2020-99-99",
        b"1:99:99 ",
        b"\r",
        b"\x85",
    ),
]


def key_paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from key_paths(inner, (*at, key))


def wrong_value(rng: random.Random) -> bytes:
    """One key of the recipe deleted, renamed, doubled in a list, or given a value it cannot have."""
    plain = yaml.safe_load(GOOD)
    at = rng.choice(list(key_paths(plain)))
    holder = plain
    for key in at[:-1]:
        holder = holder[key]
    how = rng.randrange(8)
    if how == 0:
        del holder[at[-1]]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "nmae", "x" * 90, "a.b", "💥", "a\nb"])] = holder.pop(at[-1])
    elif how == 2 and isinstance(holder, list):
        holder += copy.deepcopy(holder) * rng.choice([1, 30])
    elif how == 3:
        holder[at[-1]] = [holder[at[-1]]]
    else:
        holder[at[-1]] = rng.choice(VALUES)
    return yaml.dump(plain, allow_unicode=True, sort_keys=False).encode()


def broken_text(rng: random.Random) -> bytes:
    """The recipe's bytes cut short, flipped, with bytes missing or splinters of YAML driven in."""
    text = bytearray(GOOD.encode())
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(text))
        how = rng.randrange(4)
        if how == 0:
            text[at] = rng.randrange(256)
        elif how == 1:
            text = text[: at + 1]
        elif how == 2:
            text[at:at] = rng.choice(SPLINTERS)
        else:
            del text[at : min(at + rng.randrange(1, 20), len(text) - 1)]
    return bytes(text)


def aliases_of_aliases() -> str:
    """Eight lines of YAML that stand for nine to the eighth values."""
    names = "abcdefgh"
    lines = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in itertools.pairwise(names)]
    return "\n".join(["a: &a [x]", *lines, GOOD])


def swapped(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


BY_HAND: dict[str, str | bytes] = {
    "python object": swapped("name: good", "name: !!python/object/apply:os.system ['echo harm']"),
    "python name": swapped("name: good", "name: !!python/name:os.system"),
    "unknown tag": swapped("name: good", "name: !secret x"),
    "set": swapped("name: good", "name: !!set {a, b}"),
    "no base64": swapped("name: good", "name: !!binary 'éé'"),
    "aliases of aliases": aliases_of_aliases(),
    "alias that holds itself": "name: good\nmodel: &m {a: *m}\n",
    "passes that hold themselves": swapped("passes:", "passes: &p").replace("  - {pass: export}", "  - *p"),
    "unknown alias": swapped("name: good", "name: *nope"),
    "merge of a number": swapped("eval: {path", "eval: {<<: 5, path"),
    "deep": "name: " + "[" * 5000 + "]" * 5000,
    "less deep": swapped("seed: 0", "seed: " + "{a: " * 200 + "1" + "}" * 200),
    "a list as a key": GOOD + "? [1, 2]\n: 3\n",
    "a mapping as a key": GOOD + "? {a: 1}\n: 3\n",
    "number keys": GOOD + "1: 2\n2.5: 3\n",
    "null key": GOOD + "null: 4\n",
    "date key": GOOD + "2020-01-01: 6\n",
    "two documents": GOOD + "---\nname: b\n",
    "thirteenth month": swapped("seed: 0", "seed: 2020-13-45"),
    "61 o'clock": swapped("seed: 0", "seed: 2020-02-28 25:61:61"),
    "5000 digits": swapped("seed: 0", "seed: " + "9" * 5000),
    "int of letters": swapped("seed: 0", "seed: !!int 'abc'"),
    "int of nothing": swapped("seed: 0", "seed: !!int ''"),
    "float of nothing": swapped("seed: 0", "seed: !!float ''"),
    "bool of words": swapped("seed: 0", "seed: !!bool 'perhaps'"),
    "time of words": swapped("seed: 0", "seed: !!timestamp 'x'"),
    "tab": swapped("  type", "\ttype"),
    "NUL": GOOD + "\x00",
    "half a surrogate": swapped("shapes-clip", 'x"\n').replace("bundled:x", '"\\ud800'),
    "half a surrogate in a path": swapped('eval: {path: "bundled:shapes"', 'eval: {path: "a\\udc80"'),
    "half a surrogate as a key": GOOD + '"\\ud800": 1\n',
    "NUL in a path": swapped('eval: {path: "bundled:shapes"', 'eval: {path: "a\\0b"'),
    "endless path": swapped('eval: {path: "bundled:shapes"', f'eval: {{path: "{"a" * 5000}"'),
    "endless model": swapped("bundled:shapes-clip", "a" * 5000),
    "no path": swapped('eval: {path: "bundled:shapes"', 'eval: {path: ""'),
    "no paths": swapped('eval: {path: "bundled:shapes"', "eval: {path: []"),
    "classes twice": swapped('eval: {path: "bundled:shapes"', 'eval: {path: "bundled:shapes", classes: [a, a]'),
    "no classes": swapped('eval: {path: "bundled:shapes"', 'eval: {path: "bundled:shapes", classes: []'),
    "UTF-16": GOOD.encode("utf-16"),
    "endless key": GOOD + "k" * 900 + ": 1\n",
    "lines in a key": GOOD + '"a\\nb\\nc": 1\n',
    "1000 unknown keys": GOOD + "".join(f"k{i}: 1\n" for i in range(1000)),
    "300 wrong passes": swapped("  - {pass: export}\n", "  - {pass: prne, ratio: 0.1}\n" * 300),
    "empty sections": "name:\nmodel:\ntask:\ndata:\npasses:\n",
    "another YAML": "%YAML 2.0\n---\n" + GOOD,
    "a comment": "# nothing\n",
    "endless metric": swapped("accuracy", "a" * 3000),
    "endless criterion": swapped("ratio: {vision: 0.5}", "ratio: 0.5, criterion: " + "a" * 900),
    "endless template": swapped("a photo of a {}.", "a" * 3000),
    "pass is a list": swapped("pass: distill", "pass: [distill]"),
    "pass is a mapping": swapped("pass: distill", "pass: {distill: 1}"),
    "pass is null": swapped("pass: distill", "pass: null"),
    "loss is a number": swapped("{feature: 1.0}", "{1: 1.0}"),
    "ratio is not a number": swapped("{vision: 0.5}", ".nan"),
    "drop is infinite": swapped("max_drop: 1.0", "max_drop: .inf"),
    "learning rate is not a number": swapped("epochs: 1", "learning_rate: .nan"),
    "seconds are not a number": swapped("threads: 2", "seconds: .nan"),
}


def check_recipe(path: Path, text: bytes) -> RecipeError | None:
    path.write_bytes(text)
    try:
        recipe = load_recipe(path)
    except RecipeError as e:
        check_message(e, str(path))
        return e
    plain = resolved(recipe)
    assert make_recipe(yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True).encode())) == recipe
    return None


@pytest.mark.parametrize("what", BY_HAND)
def test_recipes_that_are_wrong_by_hand_are_refused(tmp_path: Path, what: str) -> None:
    text = BY_HAND[what]
    assert check_recipe(tmp_path / "recipe.yaml", text if isinstance(text, bytes) else text.encode()) is not None


@pytest.mark.parametrize("make", [wrong_value, broken_text])
@pytest.mark.parametrize(("first", "count"), [(0, 100), pytest.param(1000, 2500, marks=pytest.mark.slow)], ids=["some", "many"])
def test_damaged_recipes_work_or_are_refused(
    tmp_path: Path, make: Callable[[random.Random], bytes], first: int, count: int
) -> None:
    refused = 0
    for seed in range(first, first + count):
        text = make(random.Random(seed))
        try:
            refused += check_recipe(tmp_path / "recipe.yaml", text) is not None
        except BaseException as e:
            e.add_note(f"seed {seed}: {text[:3000]!r}")
            raise
    assert refused > count / 2


# Model folders.

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain))

    return damage


def put(name: str, keys: str, value: Any) -> Damage:
    """Sets a value by dotted keys."""

    def change(plain: dict[str, Any]) -> None:
        *outer, last = keys.split(".")
        for key in outer:
            plain = plain[key]
        plain[last] = value

    return change_json(name, change)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[end:])

    return damage


def cut(name: str, share: float) -> Damage:
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[: int((f / name).stat().st_size * share)])


def flip(name: str, seed: int) -> Damage:
    """A few bits of a text file, or of the header of the weights."""

    def damage(folder: Path) -> None:
        rng = random.Random(seed)
        data = bytearray((folder / name).read_bytes())
        end = 8 + struct.unpack("<Q", data[:8])[0] if name.endswith(".safetensors") else len(data)
        for _ in range(rng.choice([1, 2, 3])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)

    return damage


def as_text(name: str, text: str) -> Damage:
    return lambda f: (f / name).write_text(text)


def as_folder(name: str) -> Damage:
    return lambda f: ((f / name).unlink(missing_ok=True), (f / name).mkdir())


def as_loop(name: str) -> Damage:
    return lambda f: ((f / name).unlink(missing_ok=True), (f / name).symlink_to(f / name))


def all_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return change_weights(lambda w: w.update({k: change(v) for k, v in w.items()}))


def several(*damages: Damage) -> Damage:
    return lambda f: [damage(f) for damage in damages]


def resized(name: str, *size: int) -> Damage:
    return change_weights(lambda w: w.update({name: torch.zeros(size)}))


def history(**facts: Any) -> Damage:
    return as_text("mmcompress.json", json.dumps({"format_version": 1, "family": "clip", **facts}))


WRONG_FOLDERS: dict[str, Damage] = {
    **{f"{n} cut at {s}": cut(n, s) for n in FILES for s in (0, 0.3, 0.9) if not (n == "tokenizer_config.json" and s == 0)},
    **{f"{n} is a folder": as_folder(n) for n in (*FILES, "mmcompress.json")},
    **{f"{n} is a loop": as_loop(n) for n in (*FILES, "mmcompress.json")},
    **{f"{n} is deep": as_text(n, "[" * 100_000) for n in (*FILES, "mmcompress.json")},
    **{f"{n} is null": as_text(n, "null") for n in (*FILES, "mmcompress.json")},
    "the folder is empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "the folder is a file": lambda f: (shutil.rmtree(f), f.write_text("x")),
    "the folder is a loop": lambda f: (shutil.rmtree(f), f.symlink_to(f)),
    "a weight is missing": change_weights(lambda w: w.pop(WEIGHT)),
    "a weight is renamed": change_weights(lambda w: w.update(foo=w.pop(WEIGHT))),
    "a weight too many": change_weights(lambda w: w.update({"foo.weight": torch.zeros(3)})),
    "a weight of another shape": resized(WEIGHT, 3, 3),
    "an empty weight": resized(WEIGHT, 0),
    "no weights but one": change_weights(lambda w: [w.pop(k) for k in list(w) if k != WEIGHT]),
    **{
        f"a weight is {d}": change_weights(lambda w, d=d: w.update({WEIGHT: torch.ones(96, 48).to(d)}))  # type: ignore[misc]
        for d in (torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
    },
    "all weights are int8": all_weights(lambda v: v.to(torch.int8)),
    "all weights are NaN": all_weights(lambda v: torch.full_like(v, float("nan"))),
    "all weights are infinite": all_weights(lambda v: torch.full_like(v, float("inf"))),
    "a weight is NaN": change_weights(lambda w: w.update({WEIGHT: torch.full((96, 48), float("nan"))})),
    "offsets swapped": change_header(lambda h: h[WEIGHT].update(data_offsets=h[WEIGHT]["data_offsets"][::-1])),
    "offsets overlap": change_header(lambda h: h[WEIGHT].update(data_offsets=[0, 96 * 48 * 4])),
    "offsets beyond the end": change_header(lambda h: h[WEIGHT].update(data_offsets=[0, 10**15])),
    "a dtype that is none": change_header(lambda h: h[WEIGHT].update(dtype="Q7")),
    "a shape without end": change_header(lambda h: h[WEIGHT].update(shape=[10**12, 10**12])),
    "a header without end": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 2**63) + (f / "model.safetensors").read_bytes()[8:]
    ),
    **{
        f"{part}_config.{key} is {value!r}": put("config.json", f"{part}_config.{key}", value)
        for part, key in (
            *(("vision", k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")),
            *(("text", k) for k in ("vocab_size", "max_position_embeddings", "intermediate_size")),
        )
        for value in (0, -1, "x", 10**12, None)
        # Half of the grid: the other half would only repeat it.
        if (len(key) + len(str(value))) % 2
    },
    "layers without end": put("config.json", "vision_config.num_hidden_layers", 10**12),
    "labels without end": put("config.json", "num_labels", 10**12),
    "a width without end": put("config.json", "text_config.intermediate_size", 10**30),
    "width 0": put("config.json", "vision_config.hidden_size", 0),
    "fewer layers than weights": put("config.json", "vision_config.num_hidden_layers", 2),
    "more layers than weights": put("config.json", "vision_config.num_hidden_layers", 5),
    "heads do not divide the width": put("config.json", "vision_config.num_attention_heads", 5),
    "patch beyond the picture": put("config.json", "vision_config.patch_size", 17),
    "end of text out of range": put("config.json", "text_config.eos_token_id", 999),
    "end of text null": put("config.json", "text_config.eos_token_id", None),
    "no such activation": put("config.json", "vision_config.hidden_act", "gellu"),
    "no vision config": change_json("config.json", lambda c: c.pop("vision_config")),
    "vision config null": put("config.json", "vision_config", None),
    "text config a list": put("config.json", "text_config", [1]),
    "attention outputs": put("config.json", "output_attentions", True),
    "model type a number": put("config.json", "model_type", 3),
    "vocabulary smaller than the tokenizer's": several(
        put("config.json", "text_config.vocab_size", 8),
        put("config.json", "text_config.eos_token_id", 7),
        resized("text_model.embeddings.token_embedding.weight", 8, 32),
    ),
    "pictures larger than the processor's": several(
        put("config.json", "vision_config.image_size", 32),
        resized("vision_model.embeddings.position_embedding.weight", 17, 48),
    ),
    "one colour channel": several(
        put("config.json", "vision_config.num_channels", 1),
        resized("vision_model.embeddings.patch_embedding.weight", 48, 1, 8, 8),
    ),
    "tokenizer ids out of range": change_json("tokenizer.json", lambda t: t["model"]["vocab"].update(red=500)),
    "end token out of range": change_json(
        "tokenizer.json", lambda t: t["post_processor"]["special_tokens"]["<eos>"].update(ids=[900])
    ),
    "negative tokenizer id": change_json("tokenizer.json", lambda t: t["model"]["vocab"].update(red=-1)),
    "empty vocabulary": change_json("tokenizer.json", lambda t: t["model"].update(vocab={})),
    "no unknown token": change_json("tokenizer.json", lambda t: t["model"].update(unk_token="nope", vocab={"<eos>": 15})),
    "no tokenizer config": lambda f: (f / "tokenizer_config.json").unlink(),
    "limit is a word": put("tokenizer_config.json", "model_max_length", "x"),
    "limit is negative": put("tokenizer_config.json", "model_max_length", -5),
    "crop size is a word": put("preprocessor_config.json", "crop_size", "x"),
    "crop size zero": put("preprocessor_config.json", "crop_size", {"height": 0, "width": 0}),
    "crop size other than the model's": put("preprocessor_config.json", "crop_size", {"height": 8, "width": 8}),
    "crop size without end": put("preprocessor_config.json", "crop_size", {"height": 10**12, "width": 10**12}),
    "size zero": put("preprocessor_config.json", "size", {"shortest_edge": 0}),
    "four means": put("preprocessor_config.json", "image_mean", [0.1, 0.2, 0.3, 0.4]),
    "means of words": put("preprocessor_config.json", "image_mean", ["a", "b", "c"]),
    "means not a number": put("preprocessor_config.json", "image_mean", [float("nan")] * 3),
    "deviations zero": put("preprocessor_config.json", "image_std", [0, 0, 0]),
    "no such processor": put("preprocessor_config.json", "image_processor_type", "ClipXImageProcessor"),
    "preprocessor empty": as_text("preprocessor_config.json", "{}"),
    "history of words": history(history=["prune"]),
    "history without results": history(history=[{"pass": "prune"}]),
    "history null": history(history=None),
    "history with NaN": as_text("mmcompress.json", '{"history": [{"pass": "a", "settings": {"a": NaN}, "result": {}}]}'),
    "source a number": history(source=3),
    "custom with a shape of words": history(custom=True, shapes={"visual_projection.weight": ["a"]}),
    "custom with a negative shape": history(custom=True, shapes={"visual_projection.weight": [-1, 3]}),
    "custom with a shape without end": history(custom=True, shapes={"visual_projection.weight": [10**12, 10**12]}),
    "custom with another shape": history(custom=True, shapes={"visual_projection.weight": [3, 3]}),
}
RIGHT_FOLDERS: dict[str, Damage] = {
    "float16": all_weights(lambda v: v.half()),
    "float64": all_weights(lambda v: v.double()),
    "buffers of old checkpoints": change_weights(
        lambda w: w.update({"text_model.embeddings.position_ids": torch.arange(16)[None]})
    ),
    "no limit in the tokenizer": change_json("tokenizer_config.json", lambda t: t.pop("model_max_length")),
    "no architectures": change_json("config.json", lambda c: c.pop("architectures")),
    "a junk file beside": as_text("notes.txt", "{"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with little data, that the cases copy."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.clip_folder(folder / "model")
    for name, seed in (("train", 0), ("test", 1)):
        tiny.parquet(folder / f"{name}.parquet", 12, seed)
    return folder


def run_it(place: Path, **changes: Any) -> UserError | None:
    """A whole run, or the error that it ended in; what it leaves is checked."""
    recipe = {
        "name": "damaged",
        "model": str(place / "model"),
        "task": {"type": "zero-shot-image-classification"},
        "data": {"eval": {"path": str(place / "test.parquet")}},
        "passes": [{"pass": "prune", "ratio": 0.5}],
        "report": {"batch_sizes": [1], "threads": 1, "seconds": 0.01, "runtimes": ["torch"], "side_by_side": False},
        **changes,
    }
    error: UserError | None = None
    try:
        result = mm.run(recipe, place / "run")
        assert result.report.totals.finished
        assert all(0 <= q.value <= 1 for row in result.report.rows for q in row.quality.values())
        assert mm.load(place / "run" / "model").parameters() < tiny.clip().parameters()
    except UserError as e:
        error = e
    assert not list(place.rglob("*.partial"))
    if error is not None:
        assert not (place / "run" / "model").exists()
        assert not (place / "run").exists() or (place / "run" / "steps" / "00-baseline" / "step.json").exists()
    return error


def run_damaged(whole: Path, place: Path, damage: Damage) -> UserError | None:
    shutil.copytree(whole, place, dirs_exist_ok=True)
    model = place / "model"
    damage(model)
    first: UserError | None = None
    try:
        mm.load(model)
    except ModelError as e:
        check_message(e, str(model))
        first = e
    error = run_it(place)
    if error is not None:
        check_message(error, str(model), "the model gives embeddings")
    assert first is None or error is not None
    return error


@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_folders_that_are_wrong_by_hand_are_refused(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    assert run_damaged(whole, tmp_path, WRONG_FOLDERS[what]) is not None


@pytest.mark.parametrize("what", RIGHT_FOLDERS)
def test_folders_that_only_look_odd_work(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    assert run_damaged(whole, tmp_path, RIGHT_FOLDERS[what]) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 40))])
def test_flipped_bits_work_or_are_refused(whole: Path, tmp_path: Path, timed_here: None, name: str, seed: int) -> None:
    run_damaged(whole, tmp_path, flip(name, seed))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", FILES)
def test_files_that_may_not_be_read(whole: Path, tmp_path: Path, timed_here: None, name: str) -> None:
    assert run_damaged(whole, tmp_path, lambda f: (f / name).chmod(0)) is not None


# Data.

COUNT = 12
NAMES = list(tiny.COLOURS)
RED = Image.new("RGB", (20, 20), (220, 30, 30))


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


ODD_PICTURES = {
    "CMYK": encoded(RED.convert("CMYK"), "JPEG"),
    "16 bit": encoded(Image.new("I;16", (20, 20), 40_000)),
    "palette": encoded(RED.convert("P"), transparency=0),
    "grey with alpha": encoded(RED.convert("LA")),
    "1 bit": encoded(RED.convert("1")),
    "animated GIF": encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 20))]),
    "animated WebP": encoded(RED, "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20))]),
    "float TIFF": encoded(Image.new("F", (20, 20), 0.5), "TIFF"),
    "one pixel": encoded(Image.new("RGB", (1, 1))),
    "a line": encoded(Image.new("RGB", (1, 3000))),
}
BAD_PICTURES = {
    "bomb": png_that_says(60_000, 60_000),
    "larger bomb": png_that_says(2**31 - 1, 2**31 - 1),
    "no size": png_that_says(0, 0),
    "cut short": encoded(RED, "JPEG")[:200],
    "empty": b"",
    "a page": b"<html>404</html>",
}


def images(count: int = COUNT) -> list[Any]:
    return list(tiny.rows(count)["image"])


def labels(count: int = COUNT) -> list[int]:
    return list(tiny.rows(count)["label"])


def run_on(whole: Path, place: Path, table: dict[str, Any] | None = None, task: str = "", **source: Any) -> UserError | None:
    shutil.copytree(whole, place, dirs_exist_ok=True)
    if table is not None:
        pq.write_table(pa.table(table), place / "test.parquet")
    data = {"eval": {"path": str(place / "test.parquet"), **source}}
    error = run_it(place, data=data, task={"type": task or "zero-shot-image-classification"})
    if error is not None:
        check_message(error, "data.eval")
    return error


def test_odd_pictures_work(whole: Path, tmp_path: Path, timed_here: None) -> None:
    odd = [{"bytes": b, "path": None} for b in ODD_PICTURES.values()]
    assert run_on(whole, tmp_path, {"image": odd, "label": labels(len(odd))}, classes=NAMES) is None


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_pictures_that_do_not_decode_are_named(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    pictures = images()
    pictures[5] = {"bytes": BAD_PICTURES[what], "path": None}
    error = run_on(whole, tmp_path, {"image": pictures, "label": labels()}, classes=NAMES)
    assert "row 5, column 'image'" in str(error)


LABELS: dict[str, Any] = {
    "fractions": [v + 0.5 for v in labels()],
    "not a number": [float("nan"), *map(float, labels()[1:])],
    "infinite": [float("inf"), *map(float, labels()[1:])],
    "one missing": [None, *labels()[1:]],
    "all missing": pa.nulls(COUNT),
    "a text missing": [None, *["red"] * (COUNT - 1)],
    "negative": [-1, *labels()[1:]],
    "without end": [2**40, *labels()[1:]],
    "beyond int64": pa.array([2**64 - 1, *labels()[1:]], pa.uint64()),
    "lists": [[1]] * COUNT,
    "dates": [datetime.date(2020, 1, 1)] * COUNT,
    "bytes": [b"red"] * COUNT,
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_none_are_refused(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    assert isinstance(run_on(whole, tmp_path, {"image": images(), "label": LABELS[what]}), DataError)


PICTURES: dict[str, Any] = {
    "lists": [[1, 2]] * COUNT,
    "nested": [{"a": {"b": 1}}] * COUNT,
    "numbers": list(range(COUNT)),
    "all missing": pa.nulls(COUNT),
    "records of numbers": [{"bytes": 1, "path": 2}] * COUNT,
    "a folder": ["."] * COUNT,
    "NUL": ["a\0b"] * COUNT,
    "endless": ["a" * 5000] * COUNT,
}


@pytest.mark.parametrize("what", PICTURES)
def test_columns_that_hold_no_pictures_are_refused(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    assert isinstance(run_on(whole, tmp_path, {"image": PICTURES[what], "label": labels()}, classes=NAMES), DataError)


TEXTS: dict[str, Any] = {
    "empty": [""] * COUNT,
    "one blank": ["a", *[" "] * (COUNT - 1)],
    "missing": ["a", *[None] * (COUNT - 1)],
    "numbers": list(range(COUNT)),
    "empty lists": [[]] * COUNT,
    "nested": [[["a"]]] * COUNT,
    "bytes": [b"a\xff"] * COUNT,
}


@pytest.mark.parametrize("what", TEXTS)
def test_texts_that_are_none_are_refused(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    error = run_on(whole, tmp_path, {"image": images(), "text": TEXTS[what]}, "image-text-retrieval")
    assert "column 'text'" in str(error)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"image": images(1), "label": ["red"]}, ""),
        ({"image": images(), "label": ["red"] * COUNT}, ""),
        ({"image": images(), "text": ["red " * 50_000] * COUNT}, "image-text-retrieval"),
        ({"image": images(), "text": ["\u202e\u0000💥"] * COUNT}, "image-text-retrieval"),
    ],
    ids=["one example", "one class", "endless texts", "odd texts"],
)
def test_little_or_odd_data_works(whole: Path, tmp_path: Path, timed_here: None, columns: dict[str, Any], task: str) -> None:
    assert run_on(whole, tmp_path, columns, task) is None


def test_a_column_twice_and_a_role_that_is_none(whole: Path, tmp_path: Path, timed_here: None) -> None:
    error = run_on(whole, tmp_path / "a", columns={"image": "label", "label": "label"})
    assert "row 0, column 'label': int is no picture" in str(error)
    assert "did you mean 'image'" in str(run_on(whole, tmp_path / "b", columns={"imgae": "image"}))
    assert "unknown column 'nope'" in str(
        run_on(whole, tmp_path / "c", path="bundled:shapes", samples=4, columns={"label": "nope"})
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"image":"a.png","label":"r\xe9d"}\n'),
        ("a.jsonl", '{"image":"a.png","label":"red"}\n'.encode("utf-16")),
        ("a.jsonl", b'{"image":"a.png","label":"red"}\n{"image":3,"label":["x"]}\n'),
        ("a.jsonl", b"[1,2]\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"[" * 100_000),
        ("a.csv", b""),
        ("a.csv", bytes(range(256)) * 10),
        ("a.csv", b"image,label\na,r\xe9d\n"),
        ("a.tar", b"junk" * 1000),
        ("a.tar", b""),
        ("a.tar", b"\0" * 10_240),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
        ("a", b"x"),
    ],
)
def test_files_that_are_no_data_are_refused(whole: Path, tmp_path: Path, timed_here: None, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert isinstance(run_on(whole, tmp_path, path=str(tmp_path / name)), DataError)


@pytest.mark.parametrize("at", [0.01, 0.3, 0.5, 0.95, 0.98])
def test_flipped_bytes_of_parquet_work_or_are_refused(whole: Path, tmp_path: Path, timed_here: None, at: float) -> None:
    data = bytearray((whole / "test.parquet").read_bytes())
    for i in range(10):
        data[int(len(data) * at) + i] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(data)
    run_on(whole, tmp_path, path=str(tmp_path / "a.parquet"))


def write_pictures(folder: Path, data: bytes) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(data)


FOLDERS: dict[str, Damage] = {
    "nested empties": lambda f: (f / "a" / "b" / "c").mkdir(parents=True),
    "folders called pictures": lambda f: (f / "a" / "b.png").mkdir(parents=True),
    "junk pictures": lambda f: write_pictures(f, b"x"),
    "empty pictures": lambda f: write_pictures(f, b""),
    "a data set without data": lambda f: (f / "state.json").write_text("{}"),
    "a broken data set": lambda f: (f / "state.json").write_text("{"),
    "a folder called Parquet": lambda f: (f / "x.parquet").mkdir(),
    "dangling links": lambda f: ((f / "a").mkdir(), (f / "a" / "1.png").symlink_to("/nowhere")),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_no_data_are_refused(whole: Path, tmp_path: Path, timed_here: None, what: str) -> None:
    (tmp_path / "pictures").mkdir()
    FOLDERS[what](tmp_path / "pictures")
    assert isinstance(run_on(whole, tmp_path, path=str(tmp_path / "pictures")), DataError)


# The command line.


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmcompress.cli", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


def said(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in mmcompress" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["list", "--nope"], ["run"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    said(command(*arguments), 2)


def test_a_bad_recipe_is_exit_code_2_and_a_bad_model_1(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(swapped("seed: 0", "seed: no such"))
    assert "line 20: seed" in said(command("run", recipe, "-o", tmp_path / "run"), 2)
    recipe.write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    cut("model.safetensors", 0.5)(tmp_path / "model")
    assert "damaged or cut short" in said(command("run", recipe, "-o", tmp_path / "run"), 1)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_reports_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    assert "holds no report.json" in said(command("report", tmp_path / "nowhere"), 1)
    (tmp_path / "report.json").write_text('{"rows": [')
    assert "damaged" in said(command("compare", tmp_path, tmp_path), 1)


@pytest.mark.parametrize("name", ["inspect", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bench", "eval"))])
def test_commands_on_a_damaged_model(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    put("config.json", "vision_config.num_attention_heads", 5)(tmp_path / "model")
    given = [tmp_path / "recipe.yaml"] if name == "eval" else []
    assert "attention heads" in said(command(name, *given, tmp_path / "model"), 1)
