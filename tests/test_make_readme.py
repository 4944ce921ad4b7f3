"""The first picture of README: a teacher and its students from the same noise, with their times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from docs import make_readme
from docs.make_readme import HERO_MARKS, README, hero, write_hero
from tests.toy import write_checkpoint
from vdiff.models.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A class-conditional teacher and students of 16 to 1 steps."""
    write_checkpoint(tmp_path / "original", num_timesteps=16, classes=3)
    denoiser, config = load_checkpoint(tmp_path / "original")
    for k, steps in enumerate((8, 4, 2, 1)):
        student = replace(config, num_timesteps=steps, method="progressive")
        save_checkpoint(tmp_path / f"base_{k}", denoiser.state_dict(), student)
    return tmp_path


def test_a_row_has_the_samples_of_its_model(project, monkeypatch):
    shown: list[list[torch.Tensor]] = []

    def grid(rows, columns, titles):
        shown.extend(rows)
        assert [title.partition("\n")[0] for title in titles] == [
            "teacher, 16 steps", "student, 8 steps", "student, 4 steps", "student, 2 steps", "student, 1 step",
        ]  # fmt: skip
        assert all(title.endswith(" ms per image") for title in titles)
        return PIL.Image.new("RGB", (len(columns), len(rows)))

    monkeypatch.setattr(make_readme, "captioned_grid", grid)
    picture, times = hero(project, teacher_steps=16, num=4, seed=3)
    assert picture.size == (4, 5)
    assert [steps for steps, _ in times] == [16, 8, 4, 2, 1]
    assert all(ms > 0 for _, ms in times)
    student = make_readme.vdiff.load(project / "base_3").sample(4, steps=1, seed=3)
    torch.testing.assert_close(torch.stack(shown[4]), torch.as_tensor(student))
    assert not torch.equal(shown[0][0], shown[4][0])


def test_the_page_shows_it(project, tmp_path):
    page, begin = tmp_path / "README.md", "before\n" + "\n".join(HERO_MARKS) + "\nafter\n"
    page.write_text(begin)
    for _ in range(2):  # the second time the block is replaced
        write_hero(project, page, tmp_path / "hero.png", teacher_steps=16, num=2)
    text = page.read_text()
    assert text.startswith(f"before\n{HERO_MARKS[0]}\n![Five rows")
    assert "](hero.png)" in text
    assert "The teacher takes 16 steps and " in text
    assert text.endswith(f"{HERO_MARKS[1]}\nafter\n")
    with PIL.Image.open(tmp_path / "hero.png") as picture:
        assert picture.height > 5 * 4
    assert all(mark in README.read_text(encoding="utf-8") for mark in HERO_MARKS)


def test_a_text_to_image_model_draws_prompts_and_guides_the_teacher_alone(tmp_path, monkeypatch):
    from tests.text_training import write_text_checkpoint

    write_text_checkpoint(tmp_path / "original", "sd2")
    denoiser, config = load_checkpoint(tmp_path / "original")
    for steps in (8, 4, 2, 1):
        student = replace(config, num_timesteps=steps, method="guided", guidance_scale=3.0)
        save_checkpoint(tmp_path / f"base_{steps}", denoiser.state_dict(), student)
    weights, sample = [], make_readme.vdiff.Model.sample

    def watched(model, *args, guidance=None, prompts=(), **options):
        weights.append(guidance)
        assert list(prompts) == ["a fox", "a cat"][: len(prompts)]
        return sample(model, *args, guidance=guidance, prompts=prompts, **options)

    monkeypatch.setattr(make_readme.vdiff.Model, "sample", watched)
    monkeypatch.setattr(make_readme, "TIMED", 1)
    page = tmp_path / "README.md"
    page.write_text("\n".join(HERO_MARKS))
    prompts = ["a fox", "a cat"]
    write_hero(tmp_path, page, tmp_path / "hero.png", teacher_steps=10, num=2, guidance=2.0, prompts=prompts)
    assert weights[:5] == [2.0, None, None, None, None]
    assert "*Prompts: a fox, a cat. Images of 64 × 64 pixels." in page.read_text()


def test_missing_students_are_named(project):
    (project / "base_1" / "config.json").unlink()
    with pytest.raises(AssertionError, match=r"no students of \[4\] steps"):
        hero(project, teacher_steps=16, num=1)
