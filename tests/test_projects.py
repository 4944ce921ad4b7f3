"""Where the files of a project lie, and what is taken where nothing is named."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest

from tests.toy import write_checkpoint, write_dataset
from vdiff.errors import OptionError, VdiffError
from vdiff.models.checkpoint import AVERAGE, CONFIG
from vdiff.projects import Project, check_checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str, act: object) -> None:
    with pytest.raises(VdiffError, match=re.escape(text)):
        act()  # type: ignore[operator]


def aged(folder: str, age: int) -> None:
    if not Path(folder).exists():
        write_checkpoint(Path(folder))
    os.utime(Path(folder, CONFIG), ns=(0, 10**18 + age))


def test_a_name_keeps_everything_apart():
    photos, plain = Project("photos"), Project()
    assert [str(path) for path in (photos.original, photos.checkpoints, photos.samples)] == [
        "checkpoints/photos/original", "checkpoints/photos", "samples/photos",
    ]  # fmt: skip
    assert [str(path) for path in (plain.original, plain.checkpoints, plain.samples)] == [
        "checkpoints/original", "checkpoints", "samples",
    ]  # fmt: skip
    assert photos.new_dataset("folder", (64, 128)) == Path("data/photos_64_128")
    assert plain.new_dataset("folder", (64,)) == Path("data/folder_64")
    assert Project.of_model(Path("checkpoints/photos/base_5")) == photos
    assert Project.of_model(Path("checkpoints/base_5")) == Project.of_model(Path("elsewhere/runs/base_5")) == plain


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "my photos", "original", "base_3", "imported"])
def test_a_name_that_no_project_can_have(name):
    write_checkpoint(Path("checkpoints/imported"))
    with pytest.raises(OptionError, match=r"^--name "):
        Project(name)


def test_the_only_dataset():
    refused("no dataset under data/; make one: python prepare_data.py", Project().dataset)
    write_dataset(Path("data/b_4"))
    write_dataset(Path("data/.c.tmp"))
    Path("data/photos").mkdir()
    assert Project().dataset() == Project("b").dataset() == Path("data/b_4")
    refused(
        "data/ holds no dataset of the project photos; make one: python prepare_data.py FOLDER_OF_IMAGES --name "
        "photos, or choose with --data: data/b_4",
        Project("photos").dataset,
    )
    write_dataset(Path("photos_4"))  # the v-diffusion repositories say: move it to data/
    refused("choose with --data: photos_4, data/b_4", Project("photos").dataset)
    write_dataset(Path("data/photos_4"))
    write_dataset(Path("data/photos_of_cats_4"))
    assert Project("photos").dataset() == Path("data/photos_4")
    refused("several datasets; choose with --data: data/b_4, data/photos_4, data/photos_of_cats_4", Project().dataset)
    write_dataset(Path("data/photos_8"))
    refused("several datasets; choose with --data: data/photos_4, data/photos_8", Project("photos").dataset)


def test_the_dataset_of_a_model():
    write_dataset(Path("data/b_4"))
    assert Project().dataset_of("data") == "data"  # it is there: opening it says what is wrong with it
    assert Project().dataset_of("https://host/x.tar") == "https://host/x.tar"
    assert Project().dataset_of("gone") == Project().dataset_of("") == "data/b_4"


def test_the_newest_checkpoint_is_the_one_written_last():
    refused("no checkpoint under checkpoints/; run `python train.py` first", partial(Project().newest, print))
    aged("checkpoints/photos/base_7", 9)
    refused("no checkpoint under checkpoints/; give --name photos", partial(Project().newest, print))
    refused(
        "no checkpoint under checkpoints/cats/; run `python train.py --name", partial(Project("cats").newest, print)
    )
    for age, name in enumerate(("original", "base_1", "base_0")):
        aged(f"checkpoints/{name}", age)
    aged("checkpoints/base_1.failed_1", 10)
    assert Project().newest(print) == Path("checkpoints/base_0")
    aged("checkpoints/original", 5)
    Path("checkpoints/no_checkpoint").mkdir()
    assert Project().newest(print) == Path("checkpoints/original")
    assert Project("photos").newest(print) == Path("checkpoints/photos/base_7")


def test_an_average_is_the_newest_only_where_there_is_nothing_else():
    aged("checkpoints/original_ema0.100", 9)
    Path("checkpoints/original_ema0.100", AVERAGE).write_text("{}")
    assert Project().newest(print) == Path("checkpoints/original_ema0.100")
    aged("checkpoints/original", 0)
    assert Project().newest(print) == Path("checkpoints/original")


def test_a_checkpoint_by_its_name_in_the_project():
    write_checkpoint(Path("checkpoints/photos/base_5"))
    write_checkpoint(Path("base_6"))
    write_checkpoint(Path("checkpoints/photos/base_6"))
    photos = Project("photos")
    assert photos.inside(Path("base_5")) == Path("checkpoints/photos/base_5")
    assert photos.inside(Path("base_6")) == Path("base_6")  # what is typed is there
    assert photos.inside(Path("checkpoints/base_5")) == Path("checkpoints/base_5")
    refused(
        "checkpoints/photoz/base_5: no such checkpoint; run `python train.py --name photoz` first, or choose with "
        "--name: photos",
        lambda: check_checkpoint(Project("photoz").inside(Path("base_5")), Project("photoz")),
    )


def test_what_is_no_checkpoint():
    write_checkpoint(Path("checkpoints/base_9"))
    write_checkpoint(Path("checkpoints/base_10"))
    aged("checkpoints/photos/base_7", 0)
    Path("inside").mkdir()
    Path("inside/model.safetensors").touch()
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").touch()
    Path("pipeline/unet").mkdir()
    Path("pipeline/unet/config.json").touch()
    for path, words in (
        ("checkpoints/base_5", "checkpoints/base_5: no such checkpoint; checkpoints holds base_9, base_10"),
        ("runs/base_5", "runs/base_5: no such checkpoint; run `python train.py` first"),
        ("checkpoints\\base_9", "no such checkpoint; did you mean checkpoints/base_9?"),
        ("checkpoints/base_9/config.json", "is a file; give the checkpoint's folder, checkpoints/base_9"),
        (
            "checkpoints/photos",
            "holds no config.json; give one of the checkpoints in it: base_7",
        ),
        ("pipeline", "is a pipeline of diffusers; import it: vdiff import diffusers pipeline --out checkpoints/NAME"),
        ("pipeline/unet", "is a part of a pipeline of diffusers; import it: vdiff import diffusers pipeline --out"),
        (
            "inside/model.safetensors",
            "is a file of weights; import it: vdiff import diffusers inside/",
        ),
        ("inside", "inside holds no config.json; give a folder that train.py or distill.py wrote"),
    ):
        refused(words, lambda path=path: check_checkpoint(Path(path)))
    os.chdir("inside")
    refused("did you mean ../checkpoints/base_9?", lambda: check_checkpoint(Path("checkpoints/base_9")))


def test_what_is_chosen_among_several_is_said():
    said: list[str] = []
    aged("checkpoints/base_9", 1)
    assert (Project().newest(said.append), said) == (Path("checkpoints/base_9"), [])
    aged("checkpoints/base_10", 0)
    aged("checkpoints/celebahq", 0)
    Project().newest(said.append)
    assert said == ["checkpoints/base_9 is the newest model in checkpoints/", "others: base_10, celebahq"]
    refused(
        "original: no such checkpoint; choose the teacher with --base: checkpoints/base_9,",
        partial(Project().teacher, print),
    )
    aged("checkpoints/original", 0)
    aged("checkpoints/photos/original", 0)
    refused(
        "original: no such checkpoint; run `python train.py --name photoz` first, or choose with --name: photos",
        partial(Project("photoz").teacher, print),
    )
    assert Project().teacher(said.append) == Path("checkpoints/original")
    assert said[2:] == [
        "the teacher is checkpoints/original; --base chooses another: checkpoints/celebahq, checkpoints/photos/original"
    ]
    assert Project("photos").teacher(said.append) == Path("checkpoints/photos/original")
    assert len(said) == 3


def test_students_lie_in_the_project():
    base = Path("runs/base_3")
    assert (Project().students_beside(base), Project("x").students_beside(base)) == (base, Path("checkpoints/x/base_3"))


def test_the_next_line_after_preparing_keeps_models_apart():
    photos = Path("data/photos_64_128")
    assert (Project().name_beside(photos), Project("cats").name_beside(photos)) == ("", "cats")
    aged("checkpoints/original", 0)
    assert (Project().name_beside(photos), Project().name_beside(Path("data/my photos_64"))) == ("photos", "")
