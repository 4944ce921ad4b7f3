"""The report: what it reads of a ladder, what it says of it, and a page that stands alone."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import PIL.Image
import pytest

from tests.commands import done, error
from tests.ladders import COLUMNS, DISTANCES, metrics, verdict, write_evaluation, write_ladder
from tests.toy import SIZE, write_checkpoint, write_dataset
from vdiff.errors import VdiffError
from vdiff.evaluation.results import Scale
from vdiff.files import parse, write_json
from vdiff.report import plots
from vdiff.report.content import (
    Distances,
    distances_of,
    evaluation_table,
    models,
    notes,
    recipes,
    stage_table,
    summary,
    time_curve,
)
from vdiff.report.formatting import figure, milliseconds_text, seconds_text, times_text
from vdiff.report.ladder import read_ladder
from vdiff.report.page import MAX_POINTS, inlined, page_values, read_losses, render, split_rows, thinned, write_report

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.text += " " if tag in ("td", "th", "tr", "p", "li", "dd", "dt") else ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, evaluated ladder of four models; nobody changes it."""
    folder = tmp_path_factory.mktemp("ladder")
    write_ladder(folder)
    write_evaluation(folder)
    return folder


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return render(read_ladder(root))


def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def without_logs(root: Path, tmp_path: Path) -> Path:
    """A copy that is rendered faster."""
    folder = copied(root, tmp_path)
    for log in folder.glob("*/log"):
        shutil.rmtree(log)
    return folder


# What is read


def test_the_ladder_is_read_in_its_order(root):
    ladder = read_ladder(root)
    assert [(model.name, model.steps) for model in ladder.models] == [
        ("original", 8), ("base_0", 4), ("base_1", 2), ("base_2", 1),
    ]  # fmt: skip
    assert ladder.others == ()
    assert [line.num_steps for line in ladder.compared] == [8, 4, 2, 1]


def test_distances_come_from_the_rows_of_these_weights_at_the_students_own_steps(root):
    found = distances_of(read_ladder(root))
    assert [(point.x, point.y) for point in found.student_curve.points] == list(DISTANCES.items())
    first = found.student_curve.points[0]
    assert (first.low, first.high) == pytest.approx((0.36, 0.44))
    assert {curve.label: [(p.x, p.y) for p in curve.points] for curve in found.samplers} == {
        "teacher, ddim": [(1, 4.0), (2, 3.0), (4, 2.5), (8, 0.2)],
        "teacher, heun": [(3, 5.0)],
    }
    assert found.teacher is not None
    assert (found.teacher.x, found.teacher.y) == (8, 0.2)
    assert found.left_out == 1
    assert found.name == "Fréchet distance on pixels"


def test_without_an_evaluation_the_verdicts_tell_the_distances(root, tmp_path):
    folder = copied(root, tmp_path)
    (folder / "evaluation.json").unlink()
    found = distances_of(read_ladder(folder))
    assert [(point.x, point.y) for point in found.student_curve.points] == list(DISTANCES.items())
    assert found.samplers == ()
    assert found.teacher == plots.Point(8, 0.2)
    assert "256 samples" in found.basis
    assert found.scale is None


@pytest.mark.parametrize("change", [{}, {"noise": "much"}, {"same": None}])
def test_the_scale_in_the_last_verdict_tells_whether_it_worked(root, tmp_path, change):
    folder = without_logs(root, tmp_path)
    (folder / "evaluation.json").unlink()
    path = read_ladder(folder).last.folder / "verdict.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"scale": dataclasses.asdict(SCALE) | change}))
    ladder = read_ladder(folder)
    found = distances_of(ladder)
    assert found.scale == (None if change else SCALE)
    assert summary(ladder, found)[0].startswith("A model of" if change else "It worked")


def test_times_are_those_of_the_comparison(root):
    assert [(point.x, point.y) for point in time_curve(read_ladder(root)).points] == [
        (1, 0.5), (2, 1.0), (4, 2.0), (8, 4.0),
    ]  # fmt: skip


def test_what_a_resumed_run_logged_again_counts_once(root):
    assert read_losses(root / "base_0") == [
        (10, pytest.approx(0.5)), (20, pytest.approx(0.4)), (30, pytest.approx(0.3)), (40, pytest.approx(0.25)),
    ]  # fmt: skip
    assert read_losses(root) == []


def test_long_logs_are_thinned_to_their_first_and_last():
    points = [(k, float(k)) for k in range(10 * MAX_POINTS + 7)]
    few = thinned(points)
    assert len(few) <= MAX_POINTS + 1
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert thinned(points[:5]) == points[:5]


def test_the_newest_of_several_ladders_is_meant_unless_another_is_named(root, tmp_path):
    folder = without_logs(root, tmp_path)
    teacher = json.loads((folder / "base_1" / "config.json").read_text())["teacher"]
    write_checkpoint(folder / "short", seed=7, num_timesteps=2, method="progressive", teacher=teacher)
    (folder / "base_2.failed_1").mkdir()
    shutil.copy(folder / "base_2" / "config.json", folder / "base_2.failed_1")
    ladder = read_ladder(folder)
    assert [model.name for model in ladder.models] == ["original", "base_0", "short"]
    assert [path.name for path in ladder.others] == ["base_2"]
    assert "vdiff report" in render(ladder)
    named = read_ladder(folder / "base_2")
    assert [model.name for model in named.models] == ["original", "base_0", "base_1", "base_2"]
    assert named.evaluation is not None, "it lies beside the checkpoint"
    assert read_ladder(folder, last=folder / "base_2").models == named.models


def test_a_teacher_that_was_trained_again_is_told_from_its_description(tmp_path):
    write_ladder(tmp_path)
    write_checkpoint(tmp_path / "original", seed=999)  # where the description says that it lies
    for folder in (tmp_path, tmp_path / "base_2"):
        ladder = read_ladder(folder)
        assert [model.name for model in ladder.models] == ["original", "base_0", "base_1", "base_2"]
        assert ladder.first.folder is None
        assert ladder.first.number("num_images") == 1000
    told = notes(ladder, distances_of(ladder))
    assert told == ["original is gone, or was trained again since: its losses are not shown."]


# What is said


def test_the_page_says_the_figures(html):
    page = Page(html)
    text = " ".join(page.text.split())
    assert "distilled in 3 stages into a model that generates an image in 1 step" in text
    assert "An image takes 0.5 ms instead of 4 ms: it is 8 times as fast" in text
    assert "distance to the data is 0.4, 2 times the teacher's 0.2 in 8 steps (Fréchet distance on pixels)" in text
    assert "In 1 step, the teacher itself reaches 4." in text
    assert "2,000 samples each against 1,797 images of data/toy" in text
    assert "Not shown: 1 row of the evaluation, measured with other weights than the current ones." in text
    assert "n is small." in text
    assert "vdiff evaluate --seed 3" in text
    assert "406 10,000 16 s" in text, "updates, images and seconds of all stages"


def test_a_page_in_the_browser_is_linked_from_where_the_report_lies(root, tmp_path):
    folder = without_logs(root, tmp_path)
    ladder = read_ladder(folder)
    assert "http.server" not in render(ladder)
    (folder / "web").mkdir()
    (folder / "web/index.html").write_text("")
    for out, address in ((None, "web/index.html"), (tmp_path / "my report" / "r.html", "../copy/web/index.html")):
        page = Page(write_report(ladder, out).read_text(encoding="utf-8"))
        assert address in [link["href"] for link in page.all("a")]
        assert f"python -m http.server --directory {folder}/web" in page.text


SCALE = Scale(same=0.1, blurred=6.4, mean_image=20.0, noise=50.0)


@pytest.mark.parametrize(
    ("far", "teacher", "words"),
    [
        (0.79, 0.2, "It worked: the student of 1 step is good."),
        (0.81, 0.2, "It worked in part: the student of 1 step is usable."),
        (6.5, 0.2, "It did not work: the student of 1 step is not trained yet."),
        (6.5, 7.0, "It did not work, as the teacher is not trained yet: distance to the data 7 (other images 0.1"),
    ],
)
def test_the_first_sentence_tells_whether_it_worked(root, tmp_path, far, teacher, words):
    folder = without_logs(root, tmp_path)
    ladder = read_ladder(folder)
    found = distances_of(ladder)
    assert found.scale is None
    assert summary(ladder, found)[0].startswith("A model of")
    mine = {**found.students, ladder.last.key: plots.Point(1, far)}
    found = dataclasses.replace(found, scale=SCALE, teacher=plots.Point(8, teacher), students=mine)
    assert summary(ladder, found)[0].startswith(words)
    assert summary(ladder, found)[1].startswith("A model of")


def test_the_scale_is_on_the_page(root, tmp_path):
    folder = without_logs(root, tmp_path)
    evaluation = dataclasses.replace(read_ladder(folder).evaluation, scale=SCALE)
    evaluation.write(folder / "evaluation.json")
    page = render(read_ladder(folder))
    text = " ".join(Page(page).text.split())
    assert "It worked: the student of 1 step is good." in text
    assert f"For comparison, distances without a model: {SCALE}. Samples below 0.8 count as good" in text
    assert text.count("blurred") == 4, "in the sentence twice, and in both plots"
    assert "teacher 0.2, other images 0.1" in text


def test_a_teacher_alone_is_told_from_its_short_evaluation(tmp_path):
    write_ladder(tmp_path, steps=(8,))
    evaluation = write_evaluation(tmp_path, scale=SCALE)
    row = dataclasses.replace(evaluation.rows[0], metrics=metrics(3.0))
    dataclasses.replace(evaluation, rows=(row,)).write(tmp_path / "original" / "quality.json")
    ladder = read_ladder(tmp_path)
    assert summary(ladder, distances_of(ladder))[0] == f"original is usable: distance to the data 3 ({SCALE})."


def test_the_title_is_the_projects_name(tmp_path):
    for folder, name in ((tmp_path / "photos", "photos"), (tmp_path / "checkpoints", "toy")):
        write_ladder(folder, steps=(2, 1), data="data/toy_64_128")
        assert f"<h1>{name}</h1>" in render(read_ladder(folder))


def test_samples_over_the_training_are_shown(root, tmp_path):
    folder = without_logs(root, tmp_path)
    (folder / "original" / "samples").mkdir()
    for update in (5, 10, 20, 30, 40, 100):
        PIL.Image.new("L", (update, 9)).save(folder / "original" / "samples" / f"{update:07d}.png")
    (folder / "original" / "samples" / "mine.png").write_bytes(b"")
    shown = page_values(ladder := read_ladder(folder), distances_of(ladder))["progress"]
    assert [(text, picture.width) for text, picture in shown] == [
        ("5 updates", 5), ("10 updates", 10), ("30 updates", 30), ("100 updates", 100),
    ]  # fmt: skip


def test_two_points_are_no_plot(tmp_path):
    write_ladder(tmp_path, steps=(2, 1))
    write_evaluation(tmp_path)
    values = page_values(ladder := read_ladder(tmp_path), distances_of(ladder))
    assert values["time_plot"] == {}
    assert values["distance_plot"] != {}, "the teacher has more"
    (tmp_path / "evaluation.json").unlink()
    values = page_values(ladder := read_ladder(tmp_path), distances_of(ladder))
    assert values["distance_plot"] == {}
    assert "0.4" in Page(render(ladder)).text


def test_the_commands_make_everything_again_in_one_folder(tmp_path, monkeypatch):
    """From the images to the page; each as the dataset and the runs record it."""
    monkeypatch.chdir(tmp_path)
    write_ladder(Path("checkpoints"), steps=(4, 2), data="data/toy_4")
    write_dataset(Path("data/toy_4"))
    commands = [shlex.split(words) for _, words in recipes(read_ladder(Path("checkpoints")))]
    assert [words[1 if words[0] == "python" else 0] for words in commands] == [
        "prepare_data.py", "train.py", "distill.py", "sample.py", "vdiff",
    ]  # fmt: skip
    assert commands[0][2:5] == ["toy", "--size", "4"]
    made = ["again/data", "again/original", "again/base_0", "again/samples"]
    assert [words[words.index("--out") + 1] for words in commands[:4]] == made
    used = {word for words in commands[1:] for word in words if word.startswith("again/")}
    assert used == set(made)
    assert commands[4] == ["vdiff", "report", "again", "--evaluate"]


def test_each_model_as_plain_values(root):
    ladder = read_ladder(root)
    told = models(ladder, distances_of(ladder))
    assert [each["steps"] for each in told] == [8, 4, 2, 1]
    assert told[0]["distance"] == 0.2
    assert told[0]["rmse_to_teacher"] is None
    last = told[-1]
    assert (last["num_iters"], last["num_images"], last["train_seconds"]) == (103, 4000, 5.5)
    assert (last["distance"], last["rmse_to_teacher"], last["rmse_to_first"]) == (0.4, 0.031, pytest.approx(0.06))


def test_a_teacher_that_began_with_fewer_steps_has_two_lines(root, tmp_path):
    folder = without_logs(root, tmp_path)
    path = folder / "base_2" / "ladder.json"
    lines = json.loads(path.read_text())
    again = {**lines[0], "num_steps": 4, "ms_per_image": 2.5, "rmse_to_teacher": 0.07}
    path.write_text(json.dumps([lines[0], again, *lines[1:]]))
    ladder = read_ladder(folder)
    told = models(ladder, distances_of(ladder))
    keys = ("name", "steps", "is_again", "ms_per_image", "rmse_to_teacher", "distance")
    assert [tuple(each[key] for key in keys) for each in told[:3]] == [
        ("original", 8, False, 4.0, None, 0.2),
        ("original", 4, True, 2.5, 0.07, 2.5),
        ("base_0", 4, False, 2.0, 0.031, 0.25),
    ]
    assert "in 3 stages, starting at 4 steps, into a model" in " ".join(summary(ladder, distances_of(ladder)))
    assert "unknown" not in " ".join(summary(ladder, distances_of(ladder)))
    assert summary(ladder, Distances())[-1].startswith("Whether it worked is unknown")
    assert stage_table(ladder, distances_of(ladder)).rows[1][:3] == ["original", "in fewer steps", "4"]


def test_a_start_that_was_kept_is_marked_and_what_was_found_in_fewer_steps_is_not_shown(root, tmp_path):
    folder = without_logs(root, tmp_path)
    (folder / "evaluation.json").unlink(missing_ok=True)
    path = folder / "base_2" / "config.json"
    write_json(path, {**parse(path.read_text()), "kept_start": True})
    (folder / "base_1" / "verdict.json").write_text(json.dumps(verdict(2, every=2, rmse=0.7)))
    path = folder / "base_2" / "ladder.json"
    lines = json.loads(path.read_text())
    lines[0] |= {"ms_per_image": None}
    path.write_text(json.dumps(lines))
    ladder = read_ladder(folder)
    found = {each["name"]: each for each in models(ladder, distances_of(ladder))}
    assert [found[name]["kept_start"] for name in ("original", "base_1", "base_2")] == [False, False, True]
    assert (found["base_1"]["rmse_to_teacher"], found["base_1"]["distance"]) == (0.02, None)
    assert (found["base_0"]["rmse_to_teacher"], found["base_0"]["distance"]) == (0.031, 0.25)
    assert found["original"]["ms_per_image"] is None
    assert [row[1] for row in stage_table(ladder, distances_of(ladder)).rows] == [
        "base", "progressive", "progressive", "progressive, kept start"
    ]  # fmt: skip


def test_a_student_with_the_weights_of_its_teacher_is_another_model(root, tmp_path):
    """One whose start was kept: known by its steps."""
    folder = without_logs(root, tmp_path)
    shutil.copyfile(folder / "base_1" / "model.safetensors", folder / "base_2" / "model.safetensors")
    ladder = read_ladder(folder)
    names = ["original", "base_0", "base_1", "base_2"]
    assert [(model.name, model.folder) for model in ladder.models] == [(name, folder / name) for name in names]
    assert ladder.models[-1].fingerprint == ladder.models[-2].fingerprint
    assert not ladder.others
    before, found = distances_of(read_ladder(root)), distances_of(ladder)
    assert found.students[ladder.models[2].key] == before.students[ladder.models[2].key]
    assert found.students[ladder.models[-1].key].x == 1


def test_times_that_cannot_be_are_named_and_marked(root, tmp_path):
    folder = without_logs(root, tmp_path)
    path = folder / "base_2" / "ladder.json"
    lines = json.loads(path.read_text())
    path.write_text(json.dumps([lines[0], {**lines[1], "is_time_doubtful": True}, *lines[2:]]))
    values = json.loads((folder / "evaluation.json").read_text())
    values["rows"][0]["is_time_doubtful"] = True
    (folder / "evaluation.json").write_text(json.dumps(values))
    ladder = read_ladder(folder)
    told = " ".join(notes(ladder, distances_of(ladder)))
    assert "The times of base_0 in 4 steps are unreliable: more evaluations took less time, twice." in told
    times = [row[8] for row in evaluation_table(ladder).rows]
    assert [text.endswith(" ?") for text in times] == [True] + [False] * (len(times) - 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attempts": 3}, "The stage of base_1 was tried 3 times"),
        ({"kept_start": "it rose"}, "base_1 has its initial weights, as training made it worse: it rose."),
        ({"reason": "it is worse"}, "base_1 failed its check: it is worse"),
        ({"rmse": None}, "base_1 draws values that are not finite"),
    ],
)
def test_what_a_reader_must_know_is_said(root, tmp_path, changes, words):
    folder = without_logs(root, tmp_path)
    (folder / "base_1" / "verdict.json").write_text(json.dumps(verdict(2, **changes)))
    ladder = read_ladder(folder)
    assert words in " ".join(notes(ladder, distances_of(ladder)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.36249, "0.362"), (16.04, "16"), (0.000123, "0.000123"), (1150.4, "1,150"), (999.6, "1,000"),
        (-2.5, "−2.5"), (None, "–"), (float("inf"), "∞"), (float("nan"), "–"), (100.0, "100"), (1e12, "1e+12"),
    ],
)  # fmt: skip
def test_figures_are_written_as_people_read_them(value, text):
    assert figure(value) == text


def test_times_are_written_as_people_read_them():
    assert [seconds_text(value) for value in (13.44, 59.96, 159, 3600 * 5 + 421)] == [
        "13.4 s", "1 min 00 s", "2 min 39 s", "5 h 07 min",
    ]  # fmt: skip
    assert [milliseconds_text(value) for value in (0.61, 692.4, 12345)] == ["0.61 ms", "692 ms", "12.3 s"]
    assert [times_text(value) for value in (1.9, 1152.3)] == ["1.9 times", "1,150 times"]


# A page that stands alone


def test_nothing_on_the_page_asks_the_network(html):
    page = Page(html)
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"):
            if key in attributes:
                assert attributes[key].startswith(("data:", "#")), (tag, attributes[key])
        assert not re.search(r"url\((?!#)", attributes.get("style", ""))
        assert not [key for key in attributes if key.startswith("on")], "scripts are in the one script"
    assert not re.search(r"url\((?!#)|@import", "".join(re.findall(r"<style>(.*?)</style>", html, re.S)))
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "https://" not in html


def test_the_policy_allows_this_script_and_nothing_else(html):
    page = Page(html)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    script = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(script) == html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    first = next(k for k, (tag, attributes) in enumerate(page.elements) if "http-equiv" in attributes)
    assert not [tag for tag, _ in page.elements[:first] if tag in ("script", "style", "link", "img")]


def test_pictures_and_plots_have_words_and_names_are_given_once(html):
    page = Page(html)
    assert len(page.all("img")) == 4 + 1, "a strip for each model, and the pairs"
    assert all(image["alt"] for image in page.all("img"))
    drawings = page.all("svg")
    assert len(drawings) == 2 + 2 + 4, "distance and time for two widths, four losses"
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert all(name in names for name in drawing["aria-labelledby"].split())
    for _, attributes in page.elements:
        for target in re.findall(r"url\(#([^)]+)\)", " ".join(attributes.values())):
            assert target in names
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in names
    assert [tag for tag, _ in page.elements if tag == "h1"] == ["h1"]
    assert html.startswith("<!DOCTYPE html>")
    assert page.elements[0] == ("html", {"lang": "en"})


def test_plots_keep_text_as_text_and_take_the_pages_colours(html):
    for drawing in re.findall(r"<svg.*?</svg>", html, re.S):
        root = ElementTree.fromstring(drawing)
        assert root.findall(".//{*}text"), "letters are not drawn as outlines"
        assert "DejaVu" not in drawing
        assert not re.search(r"#0102[0-9a-f]{2}", drawing)
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawing)) <= {"#000000"}
        assert "var(--s0)" in drawing
    told = "".join(re.findall(r"<title>(.*?)</title>", html))
    assert "students: 0.4 (0.36 to 0.44) at 1 network evaluations per image" in told


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b \"c\" 'd'", "{{ 7 * 7 }}"])
def test_hostile_names_are_only_text(tmp_path, name):
    safe = name.replace("/", "")
    write_ladder(tmp_path, steps=(4, 2), name=safe, data=name)
    write_evaluation(tmp_path, features=name, command=f"vdiff {name}", device=name, notes=(name,))
    html = render(read_ladder(tmp_path))
    page = Page(html)
    assert html.count("<script") == 1
    assert name in page.text
    assert safe in page.text
    assert "49" not in re.sub(r"\d{2,}", "", page.text)


# What is missing


def test_a_base_model_alone_gets_a_page(tmp_path):
    write_checkpoint(tmp_path / "original")
    page = Page(render(read_ladder(tmp_path)))
    assert "Nothing has been distilled from it yet." in page.text
    assert "There are no samples yet" in page.text
    assert f"python sample.py --checkpoint {tmp_path / 'original'}" in page.text
    assert page.all("svg") == []


def test_a_ladder_without_its_records_gets_a_page_and_the_commands_that_make_them(root, tmp_path):
    folder = without_logs(root, tmp_path)
    for name in ("evaluation.json", "evaluation-nearest.png"):
        (folder / name).unlink()
    for name in ("verdict.json", "ladder.json", "ladder.png", "ladder_images.png", "run.toml"):
        for path in folder.glob(f"*/{name}"):
            path.unlink()
    page = Page(render(read_ladder(folder)))
    assert page.text.count(f"vdiff report {folder} --evaluate") == 3
    assert "No losses were logged" in page.text
    assert "No settings were recorded" in page.text


def test_without_the_images_the_ladders_picture_is_shown(root, tmp_path):
    folder = without_logs(root, tmp_path)
    (folder / "base_2" / "ladder_images.png").unlink()
    told = page_values(ladder := read_ladder(folder), distances_of(ladder))
    assert told["rungs"] == []
    assert (told["picture"].width, told["picture"].height) == (50, 40)


def test_images_of_another_comparison_are_not_shown(root, tmp_path):
    folder = without_logs(root, tmp_path)
    PIL.Image.new("L", (8, 18)).save(folder / "base_2" / "ladder_images.png")
    told = page_values(ladder := read_ladder(folder), distances_of(ladder))
    assert told["rungs"] == []


def test_strips_hold_the_very_pixels(root):
    picture = PIL.Image.open(root / "base_2" / "ladder_images.png").convert("RGB")
    told = page_values(ladder := read_ladder(root), distances_of(ladder))
    for k, rung in enumerate(told["rungs"]):
        data = base64.b64decode(rung.strip.address.partition(",")[2])
        strip = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        for column in range(COLUMNS):
            box = (column * SIZE, k * SIZE, (column + 1) * SIZE, (k + 1) * SIZE)
            left = column * (SIZE + 1)
            assert strip.crop((left, 0, left + SIZE, SIZE)).tobytes() == picture.crop(box).tobytes()
    assert split_rows(picture, 5) == []


def test_large_pictures_become_small():
    noise = PIL.Image.effect_noise((5000, 300), 40).convert("RGB")
    small = inlined(noise)
    assert (small.width, small.height) == (4096, 246)


# The command


def test_the_command_writes_the_page_and_replaces_it(root, tmp_path):
    folder = without_logs(root, tmp_path)
    result = done(f"vdiff report {folder}")
    page = folder / "report.html"
    assert result.stdout == f"report     {page}\n"
    page.write_text(old := page.read_text(encoding="utf-8").replace("</body>", "<!-- old --></body>"), encoding="utf-8")
    told = json.loads(done(f"vdiff report {folder / 'base_2'} --out {tmp_path / 'deep' / 'x.html'} --json").stdout)
    assert told["path"] == (tmp_path / "deep" / "x.html").as_posix()
    assert [each["name"] for each in told["models"]] == ["original", "base_0", "base_1", "base_2"]
    assert page.read_text(encoding="utf-8") == old
    done(f"vdiff report {folder}")
    assert "<!-- old -->" not in page.read_text(encoding="utf-8")
    assert not list(folder.glob(".report*"))


def test_the_page_is_opened_where_there_is_a_browser(root, tmp_path, monkeypatch):
    folder, opened = without_logs(root, tmp_path), []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)) or len(opened) == 1)
    done(f"vdiff report {folder} --open")
    assert opened == [(folder / "report.html").resolve().as_uri()]
    assert "no browser was found" in done(f"vdiff report {folder} --open").stderr


def test_wrong_folders_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "no such folder" in error(f"vdiff report {tmp_path / 'none'}", 1)
    assert "is a file" in error(f"vdiff report {tmp_path / 'file'}", 1)
    assert "holds no checkpoint" in error(f"vdiff report {tmp_path / 'empty'}", 1)
    assert "is a folder" in error(f"vdiff report {tmp_path} --out {tmp_path}", 2)
    assert "--evaluate" in error(f"vdiff report {tmp_path} --data x", 2)


@pytest.mark.parametrize(
    "name",
    ["base_1/config.json", "base_1/verdict.json", "base_2/ladder.json", "base_2/ladder_images.png",
     "evaluation.json", "evaluation-nearest.png"],
)  # fmt: skip
def test_a_damaged_file_is_named(root, tmp_path, name):
    folder = without_logs(root, tmp_path)
    (folder / name).write_bytes(b'{"a": ')
    assert str(folder / name) in error(f"vdiff report {folder}", 1)
    assert not (folder / "report.html").exists()


def test_a_pairs_picture_elsewhere_is_not_fetched(root, tmp_path):
    folder = without_logs(root, tmp_path)
    PIL.Image.new("L", (3, 3)).save(tmp_path / "secret.png")
    write_evaluation(folder, pairs=False)
    text = (folder / "evaluation.json").read_text().replace('"pairs": null', '"pairs": "../secret.png"')
    (folder / "evaluation.json").write_text(text)
    assert read_ladder(folder).pairs is None


def test_a_page_that_cannot_be_written_is_one_line(root, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(VdiffError, match="x"):
        write_report(read_ladder(root), tmp_path / "x" / "page.html")
