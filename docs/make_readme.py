"""Update the figures of README.md and docs/benchmarks.md from checkpoints/: `python docs/make_readme.py` (`make docs`).

It writes the text between the two marks in both files, copies the ladder's picture, and, if Chromium is installed,
photographs the report.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image

from vdiff.evaluation.results import Metric
from vdiff.report.content import Distances, distances_of, milliseconds
from vdiff.report.formatting import figure
from vdiff.report.ladder import LadderRun, read_ladder
from vdiff.report.page import write_report
from vdiff.text import plural

ROOT = Path(__file__).parent.parent
README, BENCHMARKS, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
BEGIN, END = "<!-- figures: make docs -->", "<!-- /figures -->"
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
            "Fréchet distance of these digits to the data, lower is better:",
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


def replace_block(page: Path, new: str) -> None:
    """Replace the text between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page} lacks {BEGIN} or {END}"
    page.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}", encoding="utf-8")


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
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("checkpoints"))
