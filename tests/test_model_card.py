"""The model card, and the folder of weights to be given away."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard

from tests.commands import done, error
from tests.toy import SIZE, UNET, contents, write_checkpoint
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.card import CARD, PICTURE, card_beside, last_name, new_card, public
from vdiff.interop.graphs import GraphOptions
from vdiff.interop.usage import onnx_usage, torch_usage
from vdiff.models.checkpoint import load_checkpoint, read_config, weights_fingerprint
from vdiff.models.codec import to_uint8
from vdiff.models.drawing import draw

USAGE = {"model.onnx": "Open it."}
ORIGINAL = {
    "path": "/home/me/checkpoints/original", "fingerprint": "c" * 64, "num_timesteps": 16, "method": "base",
    "num_iters": 2000, "dataset": "/home/me/data/digits_8", "teacher": None,
}  # fmt: skip
TEACHER = {**ORIGINAL, "path": "checkpoints/base_0", "fingerprint": "b" * 64, "num_timesteps": 8,
           "method": "progressive", "num_iters": 1140, "teacher": ORIGINAL}  # fmt: skip


def student(folder: Path, **changes: Any) -> Path:
    write_checkpoint(
        folder,
        **{"method": "progressive", "num_timesteps": 4, "num_iters": 560, "target_iters": 560, "num_images": 71680,
           "dataset": "/home/me/data/digits_8", "teacher": TEACHER, **changes},
    )  # fmt: skip
    return folder


def rows(text: str, heading: str = "") -> list[list[str]]:
    """The cells of the first table behind a heading."""
    lines = text.partition(heading)[2].splitlines() if heading else text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert set("".join(table[1])) <= {"-"}
    assert len({len(row) for row in table}) == 1
    return [table[0], *table[2:]]


def test_it_says_what_the_model_is_and_where_it_came_from(tmp_path):
    folder = student(tmp_path / "base_1")
    text = new_card(folder, usage=USAGE).text
    denoiser, _ = load_checkpoint(folder)
    facts = dict(rows(text)[1:])
    assert facts["steps"] == "4"
    assert facts["method"] == "progressive"
    assert facts["parameters"] == f"{sum(p.numel() for p in denoiser.parameters()):,}"
    assert facts["images"] == f"{SIZE} × {SIZE}, 1 channel"
    assert facts["weights"] == "raw, 560 updates, 71,680 images"
    assert facts["dataset"] == "digits\\_8"
    assert facts["weights' SHA-256"] == f"`{weights_fingerprint(folder)}`"
    assert rows(text, "## Lineage") == [
        ["model", "steps", "method", "updates", "weights"],
        ["base\\_1", "4", "progressive", "560", f"`{weights_fingerprint(folder)[:12]}`"],
        ["base\\_0", "8", "progressive", "1,140", "`bbbbbbbbbbbb`"],
        ["original", "16", "base", "2,000", "`cccccccccccc`"],
    ]
    assert "/home" not in text
    assert "## Distances" not in text
    assert text.endswith("## Use\n\n### `model.onnx`\n\nOpen it.\n")


def test_hubs_can_read_its_first_lines(tmp_path):
    card = new_card(student(tmp_path / "base_1"), usage=USAGE, license_name="MIT", library="diffusers", tags=["x"])
    card.write(tmp_path)
    assert ModelCard.load(tmp_path / CARD).data.to_dict() == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "v-diffusion", "distillation", "progressive-distillation", "x"],
    }
    assert "## Licence\n\nMIT\n" in (tmp_path / CARD).read_text()
    base = new_card(student(tmp_path / "base", method="base", teacher=None), usage=USAGE).text
    data = ModelCard(base).data.to_dict()
    assert (data["license"], data["library_name"]) == ("unknown", "vdiff")
    assert data["tags"] == ["diffusion", "v-diffusion"]
    assert "Ask the author of these weights how you may use them" in base


@pytest.mark.parametrize("name", ["", "as you like", "mit\ntags: [x]", "-", "1.0", "x" * 65])
def test_a_licence_is_an_identifier(name, tmp_path):
    with pytest.raises(OptionError, match="not an identifier"):
        new_card(student(tmp_path / "m"), usage=USAGE, license_name=name)


def test_distances_come_from_the_ladder_beside_the_checkpoint(tmp_path):
    folder = student(tmp_path / "base_1")
    told = {"seed": 0, "num_iters": 1, "train_seconds": 1.5, "ms_per_image": 3.25}
    ladder = [
        {"checkpoint": "/home/me/original", "num_steps": 16, "rmse_to_first": None, "distance": 0.25, **told},
        {"checkpoint": "checkpoints/base_1", "num_steps": 4, "rmse_to_first": 0.12345, "distance": 0.5, **told},
    ]
    (folder / "ladder.json").write_text(json.dumps(ladder))
    text = new_card(folder, usage=USAGE).text
    assert rows(text, "## Distances") == [
        ["model", "steps", "RMSE to first", "distance"],
        ["original", "16", "", "0.2500"],
        ["base\\_1", "4", "0.1235", "0.5000"],
    ]
    assert "/home" not in text
    found = ModelCard(text).data.eval_results
    assert [(each.metric_type, each.metric_name, each.metric_value, each.dataset_name) for each in found] == [
        ("rmse_to_first", "RMSE to first", 0.1235, "digits_8"),
        ("distance", "distance", 0.5, "digits_8"),
    ]


@pytest.mark.parametrize("lines", ["", "---\nlicense: [\n---\n", "---\nlicense: {a: b}\n---\n", "---\n- a\n---\n"])
def test_first_lines_that_people_have_spoilt_tell_no_licence(lines, tmp_path):
    beside(tmp_path / "out", student(tmp_path / "m"), "a.onnx", "mit")
    path = tmp_path / "out" / CARD
    path.write_text(lines + path.read_text().split("\n---\n", 1)[1])
    beside(tmp_path / "out", tmp_path / "m", "a.onnx", anew=True)
    assert "license: unknown\n" in path.read_text()


@pytest.mark.parametrize(
    "ladder",
    ["", "[]", "{}", "[1]", "null", "[[1]]", '[{"num_steps": 4}]', '[{"num_steps": 8, "checkpoint": "a", "d": 0.5}]'],
)
def test_a_ladder_of_something_else_is_passed_over(ladder, tmp_path):
    folder = student(tmp_path / "base_1")
    (folder / "ladder.json").write_text(ladder)
    assert "## Distances" not in new_card(folder, usage=USAGE).text


def test_texts_of_a_checkpoint_cannot_break_out_of_the_card(tmp_path):
    hostile = "a | b\n# Big <script>alert(1)</script> [click](http://x) `code`"
    unet = {**read_config(student(tmp_path / "first")).unet, "num_classes": 2}
    folder = student(
        tmp_path / "base_1", unet=unet, class_names=[hostile, "dog"], dataset=f"/data/{hostile}", method=hostile,
        dataset_fingerprint=hostile,
        teacher={**TEACHER, "path": hostile, "num_timesteps": hostile, "fingerprint": hostile, "method": 3},
    )  # fmt: skip
    text = new_card(folder, usage=USAGE).text
    assert "<script>" not in text
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"license", "library_name", "pipeline_tag", "tags"}
    assert all(re.fullmatch("[a-z0-9-]+", tag) for tag in data["tags"])
    assert "[click]" not in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# base\\_1"]
    assert len(rows(text, "## Lineage")) == 4
    facts = dict(rows(text)[1:])
    assert facts["classes"].startswith("2: a \\| b # Big")


def pixels(picture: PIL.Image.Image) -> torch.Tensor:
    """The grid's cells (16, H, W), one value for each enlarged pixel."""
    array = torch.from_numpy(np.array(picture))
    assert array.shape == (4 * 72 + 5 * 2, 4 * 72 + 5 * 2)
    cells = [array[2 + 74 * row : 74 + 74 * row, 2 + 74 * k : 74 + 74 * k] for row in range(4) for k in range(4)]
    return torch.stack([cell[9::18, 9::18] for cell in cells])


def test_the_picture_is_what_the_model_draws(tmp_path):
    new_card(student(tmp_path / "student"), usage=USAGE).write(tmp_path / "student")
    denoiser, _ = load_checkpoint(tmp_path / "student")
    due = draw(denoiser, Ddim(), indices=range(16), image_size=SIZE, num_steps=4)
    with PIL.Image.open(tmp_path / "student" / PICTURE) as picture:
        assert torch.equal(pixels(picture), to_uint8(due)[:, 0])
    text = (tmp_path / "student" / CARD).read_text()
    assert f"![16 images]({PICTURE})" in text
    assert "*DDIM, 4 steps, noise of seed 0.*" in text


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"method": "base", "num_timesteps": 1021}, 64),
        ({"method": "base", "num_timesteps": 1000, "schedule": {"name": "linear", "num_levels": 1000}}, 64),
        ({"num_timesteps": 1000}, 50),
        ({"num_timesteps": 67}, None),
        ({"num_timesteps": 1}, 1),
        ({"unet": {**UNET, "in_channels": 2, "out_channels": 2}}, None),
    ],
)
def test_the_picture_is_cheap(changes, steps, tmp_path):
    """64 steps at the most; where fewer would show nothing, or for two channels, there is none."""
    card = new_card(student(tmp_path / "m", **changes), usage=USAGE)
    assert (card.picture is not None) == (steps is not None)
    assert (f"({PICTURE})" in card.text) == (steps is not None)
    if steps is not None:
        assert f"*DDIM, {steps} step" in card.text


def beside(folder: Path, checkpoint: Path, name: str, license_name: str | None = None, *, anew: bool = False) -> None:
    """A file and its card."""
    folder.mkdir(exist_ok=True)
    card = card_beside(
        folder, checkpoint, usage={name: f"How to use {name}."}, license_name=license_name, anew=anew, tags=[]
    )
    (folder / name).write_text("")
    card.write(folder)


def test_a_card_serves_all_exports_of_the_same_weights(tmp_path):
    checkpoint, out = student(tmp_path / "base_1"), tmp_path / "out"
    beside(out, checkpoint, "a.onnx", "mit")
    written = (out / CARD).read_text().replace("## Lineage", "My own words.\n\n## Lineage")
    (out / CARD).write_text(written)
    beside(out, checkpoint, "b.pt2")
    text = (out / CARD).read_text()
    assert text.endswith("## Use\n\n### `a.onnx`\n\nHow to use a.onnx.\n\n### `b.pt2`\n\nHow to use b.pt2.\n")
    assert text.partition("\n## Use")[0] == written.partition("\n## Use")[0]
    (out / "a.onnx").unlink()
    beside(out, checkpoint, "c.pt2", anew=True)
    text = (out / CARD).read_text()
    assert "My own words" not in text
    assert "license: mit\n" in text  # it was said once
    assert re.findall("### `(.*)`", text) == ["b.pt2", "c.pt2"]
    beside(out, checkpoint, "c.pt2", "cc0-1.0")
    assert "license: cc0-1.0\n" in (out / CARD).read_text()


@pytest.mark.parametrize("content", [b"# My repository", b"\xff\xfe", b""])
def test_other_peoples_readme_stays(content, tmp_path):
    (tmp_path / CARD).write_bytes(content)
    with pytest.raises(VdiffError, match=r"is not the model card of .*; give a file in a separate folder"):
        beside(tmp_path, student(tmp_path / "m"), "a.onnx")
    assert (tmp_path / CARD).read_bytes() == content


def test_the_card_of_other_weights_stays(tmp_path):
    beside(tmp_path / "out", student(tmp_path / "a"), "a.onnx")
    before = contents(tmp_path / "out")
    other = student(tmp_path / "b", seed=99)
    with pytest.raises(VdiffError, match="is not the model card of"):
        beside(tmp_path / "out", other, "b.onnx", anew=True)
    assert contents(tmp_path / "out") == before


# Weights to be given away


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/data/photos_64", "photos_64"),
        ("data/photos_64/", "photos_64"),
        ("C:\\Users\\me\\photos_64", "photos_64"),
        ("https://me:word@host/sets/x-{000..009}.tar?key=1#2", "x-{000..009}.tar"),
        ("imported:/home/me/checkpoint.pt", "imported:checkpoint.pt"),
        ("imported:reference", "imported:reference"),
        ("toy", "toy"),
        ("", ""),
    ],
)
def test_paths_are_cut_down_to_their_last_part(path, name):
    assert last_name(path) == name


def test_a_public_description_has_no_paths_and_everything_else():
    base = {"path": "/home/me/base_1", "fingerprint": "f"}
    values = {"dataset": "/a/b", "unet": {"path": 1}, "teacher": {**TEACHER}, "base": base, "num_images": 3}
    shown = public(values)
    assert "/home" not in json.dumps(shown)
    assert shown.pop("base") == {"path": "base_1", "fingerprint": values.pop("base")["fingerprint"]}
    assert shown["teacher"]["teacher"]["path"] == "original"
    assert shown["teacher"]["teacher"]["dataset"] == "digits_8"
    assert {**shown, "dataset": 0, "teacher": 0} == {**values, "dataset": 0, "teacher": 0}
    assert {k: v for k, v in shown["teacher"].items() if k not in ("path", "dataset", "teacher")} == {
        k: v for k, v in TEACHER.items() if k not in ("path", "dataset", "teacher")
    }


def test_exported_weights_are_a_checkpoint_without_paths(tmp_path):
    folder, out = student(tmp_path / "base_1"), tmp_path / "given/base_1"
    (folder / "run.toml").write_text('data = "/home/me"')
    (folder / "state").mkdir()
    result = done(f"vdiff export weights {folder} {out} --license mit")
    assert result.stdout.splitlines()[0] == str(out)
    assert set(contents(out)) == {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert b"/home" not in b"".join(contents(out).values())
    assert weights_fingerprint(out) == weights_fingerprint(folder)
    described = read_config(out)
    assert described.dataset == "digits_8"
    assert replace(described, dataset="", teacher=None) == replace(read_config(folder), dataset="", teacher=None)
    assert "vdiff sample --checkpoint base_1" in (out / CARD).read_text()
    done(f"sample.py --checkpoint {out} --num 1 --out {tmp_path / 'drawn'}")
    assert "exists already; give another " in error(f"vdiff export weights {folder} {out}", 1)
    done(f"vdiff export weights {folder} {out} --overwrite")
    assert "license: unknown" in (out / CARD).read_text()


def test_only_earlier_exports_are_replaced(tmp_path):
    folder = student(tmp_path / "base_1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    before = contents(tmp_path)
    for out in ("base_1", "mine"):
        line = error(f"vdiff export weights {folder} {tmp_path / out} --overwrite --license mit", 1)
        assert line.endswith(("is the checkpoint itself; give another folder", "vdiff wrote; choose another folder"))
    (folder / "model.safetensors").write_bytes(b"damaged")
    error(f"vdiff export weights {folder} {tmp_path / 'new'}", 1)
    assert set(contents(tmp_path)) == set(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base_1", "mine"]


def test_a_description_may_leave_out_what_is_usual(tmp_path):
    """Channels of the images are 3 where config.json does not say."""
    checkpoint = student(tmp_path / "m", unet={**UNET, "num_groups": 4}, channels=3)
    config = read_config(checkpoint)
    assert "in_channels" not in config.unet
    options = GraphOptions(sampler=True, output="v", num_steps=4)
    shape = f"(16, 3, {SIZE}, {SIZE})"
    assert f"torch.randn({shape}" in torch_usage("m.pt2", config, options)
    assert f"standard_normal({shape}" in onnx_usage("m.onnx", config, options)
