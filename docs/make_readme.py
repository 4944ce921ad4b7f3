"""Update the figures of README.md and docs/benchmarks.md from checkpoints/: `python docs/make_readme.py` (`make docs`).

It writes the text between the two marks in both files, copies the ladder's picture, and, if Chromium is installed,
photographs the report.

    python docs/make_readme.py --hero checkpoints/emoji --teacher_steps 64 --guidance 2 --prompts prompts.txt

draws the first picture of README.md, docs/images/hero.png, from a teacher (`original`) and its students (`base_…`).
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

import vdiff
from vdiff.data.images import captioned_grid, save_png
from vdiff.evaluation.results import Metric
from vdiff.report.content import Distances, distances_of, milliseconds
from vdiff.report.formatting import figure
from vdiff.report.ladder import LadderRun, read_ladder
from vdiff.report.page import write_report
from vdiff.text import plural

ROOT = Path(__file__).parent.parent
README, BENCHMARKS, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
BEGIN, END = "<!-- figures: make docs -->", "<!-- /figures -->"
HERO_MARKS = "<!-- hero: docs/make_readme.py -->", "<!-- /hero -->"
HERO_STEPS = (8, 4, 2, 1)
TIMED = 3
"""How often a model is drawn from; the shortest time counts."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = (1280, 1660)
COLOURS = 96


def sentences(found: Distances) -> str:
    """The distances in short: the teacher in its most steps, then students beside the teacher in as few steps."""
    teacher, students = (
        {round(point.x): point.y for point in curve.points} for curve in (found.samplers[0], found.student_curve)
    )
    most = max(teacher)
    few = [steps for steps in (4, 1) if steps in students and steps in teacher]
    return "\n".join(
        [
            "Fréchet distance on pixels between the samples of these models and the data (lower is better):",
            f"{teacher[most]:.3f} for the teacher in {plural(most, 'step')};",
            *(
                f"{students[steps]:.3f} for the student of {plural(steps, 'step')} "
                f"(teacher in {plural(steps, 'step')}: {teacher[steps]:.3f}){'.' if steps == few[-1] else ';'}"
                for steps in few
            ),
        ]
    )


def table(ladder: LadderRun, found: Distances) -> str:
    """Markdown: the distances of students and of the teacher's samplers by the network evaluations of an image."""
    curves = [*found.samplers, found.student_curve]
    times = {
        model.steps: ms for model in ladder.students if (ms := milliseconds(ladder).get((model.name, model.steps)))
    }
    rows = [["evaluations", *(curve.label for curve in curves), "student, ms per image"]]
    rows.append(["---"] * len(rows[0]))
    for x in sorted({point.x for curve in curves for point in curve.points}, reverse=True):
        cells = [next((point for point in curve.points if point.x == x), None) for curve in curves]
        texts = ["" if point is None else str(Metric(point.y, point.low, point.high)) for point in cells]
        rows.append([figure(x), *texts, figure(times[round(x)], 2) if x in times else ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    heading = [
        f"The models of `make quickstart`; {found.name}: {found.basis.partition(';')[0]};",
        "± is half of a 95 % interval.",
    ]
    return "\n".join([*heading, "", *lines])


def photograph(page: Path, picture: Path) -> None:
    """The top of the page as a browser shows it; nothing where there is no browser."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        print(f"no Chromium here: {picture} stays as it was", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "page.png"
        size = ",".join(map(str, WINDOW))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/own"]
        command = [program, *options, f"--window-size={size}", f"--screenshot={large}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with PIL.Image.open(large) as shown:
            shown.convert("RGB").quantize(COLOURS, dither=PIL.Image.Dither.NONE).save(picture, optimize=True)


def replace_block(page: Path, new: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace the text between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, mark, after = rest.partition(end)
    assert mark, f"{page} lacks {begin} or {end}"
    page.write_text(f"{before}{begin}\n{new}\n{end}{after}", encoding="utf-8")


def hero(
    folder: Path, *, teacher_steps: int, num: int, seed: int = 0, guidance: float = 0.0, prompts: Sequence[str] = ()
) -> tuple[PIL.Image.Image, list[tuple[int, float]]]:
    """The picture of a teacher beside its students of 8, 4, 2 and 1 steps, and (steps, ms per image) of each.

    Each row is a model, and each column has the same noise and class or prompt. A time is the shortest of `TIMED`
    drawings.

    Args:
        folder: has the checkpoints `original` and `base_…`.
        guidance: the weight of classifier-free guidance, for all models that have not learned it.
        prompts: of a text-to-image model.
    """
    students = [(vdiff.load(path), path) for path in folder.glob("base_*") if (path / "config.json").is_file()]
    by_steps = {model.config.num_timesteps: model for model, _ in students}
    missing = [steps for steps in HERO_STEPS if steps not in by_steps]
    assert not missing, f"{folder} has no students of {missing} steps"
    models = [(vdiff.load(folder / "original"), teacher_steps), *((by_steps[steps], steps) for steps in HERO_STEPS)]
    rows, times = [], []
    for model, steps in models:
        shortest = math.inf
        for _ in range(TIMED if steps <= max(HERO_STEPS) else 1):  # the teacher takes long, and needs no warm-up
            began = time.monotonic()
            weight = None if model.config.guidance_scale else guidance
            images = model.sample(num, steps=steps, seed=seed, guidance=weight, prompts=prompts)
            shortest = min(shortest, 1000 * (time.monotonic() - began) / num)
        rows.append(list(images))
        times.append((steps, shortest))
    titles = [
        f"{'student' if row else 'teacher'}, {plural(steps, 'step')}\n{figure(ms)} ms per image"
        for row, (steps, ms) in enumerate(times)
    ]
    return captioned_grid(rows, [""] * num, titles), times


def write_hero(folder: Path, page: Path, picture: Path, *, prompts: Sequence[str] = (), **options: Any) -> None:
    """Save the picture of `hero`, and show it in a page with its times."""
    drawn, times = hero(folder, prompts=prompts, **options)
    save_png(drawn, picture)
    (teacher_steps, teacher_ms), *students = times
    last_steps, last_ms = students[-1]
    size = vdiff.load(folder / "original").sample(1, steps=1, prompts=prompts[:1]).shape[-1]
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else plural(torch.get_num_threads(), "CPU thread")
    named = f"Prompts: {', '.join(prompts)}. " if prompts else ""
    caption = (
        f"*{named}Images of {size} × {size} pixels. "
        "Each column starts from the same noise. The teacher takes "
        f"{plural(teacher_steps, 'step')} and {figure(teacher_ms)} ms per image, the last student "
        f"{plural(last_steps, 'step')} and {figure(last_ms)} ms (on {place}).*"
    )
    alternative = f"Five rows of pictures: the teacher in {teacher_steps} steps and its students in 8, 4, 2 and 1 steps"
    shown = picture.relative_to(page.parent).as_posix()
    replace_block(page, f"![{alternative}]({shown})\n\n{caption}", *HERO_MARKS)


def main(folder: Path) -> None:
    """Rewrite what README.md and docs/benchmarks.md show of the ladder in `folder`."""
    ladder = read_ladder(folder)
    found = distances_of(ladder)
    replace_block(README, sentences(found))
    replace_block(BENCHMARKS, table(ladder, found))
    if ladder.picture:
        shutil.copy(ladder.picture, IMAGES / "ladder.png")
    photograph(write_report(ladder), IMAGES / "report.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("checkpoints"))
    parser.add_argument("--hero", action="store_true", help="Only draw the first picture, from this folder.")
    parser.add_argument("--teacher_steps", type=int, default=128)
    parser.add_argument("--num", type=int, default=12, help="Images per row.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument(
        "--prompts", type=Path, help="Of a text-to-image model, a line each; then --num is their number."
    )
    asked = vars(parser.parse_args())
    place, is_hero = asked.pop("folder"), asked.pop("hero")
    if path := asked.pop("prompts"):
        asked["prompts"] = path.read_text(encoding="utf-8").splitlines()
        asked["num"] = len(asked["prompts"])
    if is_hero:
        write_hero(place, README, IMAGES / "hero.png", **asked)
    else:
        main(place)
