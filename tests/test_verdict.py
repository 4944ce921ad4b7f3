"""Whether a student may teach: its images and its teacher's against a DDIM written out, and what is a failure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vdiff
from benchmarks.distances import PixelDistance
from tests.by_hand import distance, drawn, drawn_by
from tests.oracles import randn
from tests.toy import COUNT, SIZE, UNET, Watcher, distill_config, write_checkpoint, write_dataset
from vdiff.cli.distill import distance_to
from vdiff.data.batches import Batch
from vdiff.evaluation.features import mean_colours, pixel_vectors
from vdiff.files import parse
from vdiff.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from vdiff.models.codec import PIXEL_CODEC, UNBOUNDED, from_uint8
from vdiff.models.drawing import rmse
from vdiff.models.unet_config import UNetConfig
from vdiff.training.comparison import compare
from vdiff.training.dataset import TrainingData, no_images, open_images
from vdiff.training.engine import build_engine
from vdiff.training.stages import Stage
from vdiff.training.verdict import (
    HELD_OUT,
    VERDICT,
    Examiner,
    Verdict,
    plan_check,
    read_verdict,
    why_failed,
    write_verdict,
)

# What is a failure


def found(
    rmse: float = 0.2, before: float = 0.3, far: float | None = None, teachers: float | None = None, **more
) -> Verdict:
    return Verdict(before, rmse, far, teachers, 64, 1, "", **more)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (found(), ""),
        (found(0.3, 0.3), ""),
        (found(0.3001, 0.3), "training raised its RMSE to its teacher from 0.3000 to 0.3001"),
        (found(0.0178, 0.0109), "training raised its RMSE to its teacher from 0.0109 to 0.0178"),
        (found(0.4, 0.1), "training raised its RMSE to its teacher from 0.1000 to 0.4000"),
        (found(0.0713, 0.0712, rmse_limit=0.0714), ""),  # rounding, or the choice of noises
        (found(0.0715, 0.0712, rmse_limit=0.0714), "training raised its RMSE to its teacher from 0.0712 to 0.0715"),
        (found(math.inf, 0.3), "its samples are not finite"),
        (found(math.nan, 0.3), "its samples are not finite"),
        (found(far=1.0, teachers=0.5), ""),
        (found(far=1.5, teachers=0.5), ""),
        (found(far=1.51, teachers=0.5), "distance to the data is 1.51, its teacher's 0.5"),
        (found(far=math.nan, teachers=0.5), "distance to the data is nan, its teacher's 0.5"),
        (found(0.4, 0.1, 9.0, 0.5), "distance to the data is 9, its teacher's 0.5"),
        (found(0.4, 0.1, 0.5, 0.5, start_distance=9.0), ""),  # the start is no better
        (
            found(0.4, 0.1, 0.5, 0.5, start_distance=1.0),
            "training raised its RMSE to its teacher from 0.1000 to 0.4000",
        ),
        (found(far=9.0), ""),
        (found(teachers=9.0), ""),
    ],
)
def test_a_student_fails_where_training_made_it_worse(verdict, reason):
    """Farther from its teacher than before it was trained, or three times as far from the data."""
    assert why_failed(verdict, 3.0) == reason


def test_the_difference_is_that_of_clipped_pixels_over_the_images_that_both_have():
    a, b = randn(5, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    expected = distance(a[:3].clamp(-1, 1).numpy(), b.clamp(-1, 1).numpy())
    assert rmse(a, b, PIXEL_CODEC) == rmse(b, a, PIXEL_CODEC) == pytest.approx(expected)
    assert rmse(a, b, UNBOUNDED) == pytest.approx(distance(a[:3].numpy(), b.numpy()))


# What is kept


def test_a_verdict_is_kept_beside_the_student(tmp_path):
    scale = {"same": 0.1, "blurred": 6.4, "mean_image": 20.0, "noise": 50.0}
    for verdict in (found(), Verdict(0.5, math.inf, 1.5, 0.25, 7, 3, "why", 0.6, 2, 1.25, "it was worse", scale)):
        write_verdict(tmp_path, verdict)
        assert read_verdict(tmp_path) == verdict
        assert parse((tmp_path / VERDICT).read_text()) == {
            "rmse_before": verdict.rmse_before, "rmse": verdict.rmse, "distance": verdict.distance,
            "teacher_distance": verdict.teacher_distance, "num_images": verdict.num_images,
            "attempts": verdict.attempts, "reason": verdict.reason, "rmse_limit": verdict.rmse_limit,
            "every": verdict.every, "start_distance": verdict.start_distance, "kept_start": verdict.kept_start,
            "scale": verdict.scale,
        }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


def test_a_verdict_of_an_older_version_is_read(tmp_path):
    old = {"rmse_before": 0.3, "rmse": 0.4, "distance": None, "teacher_distance": None, "num_images": 64}
    (tmp_path / VERDICT).write_text(json.dumps({**old, "attempts": 2, "reason": "RMSE rose"}))
    assert read_verdict(tmp_path) == Verdict(0.3, 0.4, None, None, 64, 2, "RMSE rose")


@pytest.mark.parametrize("text", [None, "", "[", "[]", "3", "{}", '{"rmse": 1}', '{"other": 1}', "\udcff"])
def test_what_is_no_verdict_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / VERDICT).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_verdict(tmp_path) is None


# The distance to the data


def test_pictures_are_pooled_to_eight_by_eight():
    """The mean colour of each part; what is beyond ±1 is clipped first, small pictures are taken as they are."""
    images = 1.5 * randn(3, 2, 24, 16)
    expected = images.clamp(-1, 1).reshape(3, 2, 8, 3, 8, 2).mean((3, 5)).reshape(3, -1).numpy()
    np.testing.assert_allclose(pixel_vectors(images), expected, rtol=0, atol=1e-12)
    for shape in ((8, 8), (4, 4), (1, 1)):
        small = 1.5 * randn(3, 2, *shape)
        np.testing.assert_array_equal(pixel_vectors(small), small.clamp(-1, 1).reshape(3, -1).numpy())
    assert pixel_vectors(randn(2, 1, 9, 8)).shape == (2, 64)
    assert pixel_vectors(randn(2, 1, 8, 9)).shape == (2, 64)
    assert mean_colours(randn(2, 3, 9, 9), 3).shape == (2, 3, 3, 3)
    assert pixel_vectors(randn(2, 1, 2, 2, dtype=torch.float32)).dtype == np.float64


def test_the_distance_of_single_pixels_is_that_of_two_gaussians():
    """(μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    a, b = 0.1 * randn(50, 1, 1, 1) + 0.3, 0.2 * randn(80, 1, 1, 1, seed=1) - 0.1
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert PixelDistance(b)(a) == pytest.approx(expected.item(), rel=1e-9)
    assert PixelDistance(a)(a) == pytest.approx(0, abs=1e-12)


def test_the_data_are_as_many_images_as_there_are(tmp_path):
    """Each once, up to --distance_images; no distance where nothing is measured or compared."""
    data = write_dataset(tmp_path / "toy_4")
    images = open_images(str(data), SIZE)
    every = from_uint8(torch.cat([batch.images for batch in batches_of(images, COUNT)]))

    def far(images: TrainingData = images, **settings) -> PixelDistance | None:
        config = distill_config(data, tmp_path, **{"batch_size": 4, "flip": False, **settings})
        return distance_to(images, config, build_engine(config))

    def rows(vectors: np.ndarray) -> list[bytes]:
        return sorted(row.tobytes() for row in vectors)

    assert rows(far().reference) == rows(pixel_vectors(every))
    assert len(far(distance_images=7).reference) == 7
    assert set(rows(far(distance_images=7).reference)) < set(rows(pixel_vectors(every)))
    assert far(distance_every=0) is None
    assert far(check_images=0) is None
    assert far(no_images(read_config(pair(tmp_path)[0]))) is None
    assert far(open_images(str(write_dataset(tmp_path / "one_4", count=1)), SIZE)) is None


def batches_of(images: TrainingData, count: int) -> list[Batch]:
    """The first epoch, in one batch."""
    config = distill_config(Path(images.name), Path(), batch_size=count, flip=False)
    return [next(images.batches(config, build_engine(config)).start_at(0))]


# The examination


def pair(folder: Path, **changes) -> tuple[Path, Path]:
    """A teacher of 8 steps and a student of 4, of random weights."""
    base, student = folder / "original", folder / "base_0"
    write_checkpoint(base, seed=1, **changes)
    write_checkpoint(student, seed=30, num_timesteps=4, method="progressive", **changes)
    return base, student


def examiner(watcher: Watcher | None = None, *, images: int = 5, far: int = 7, distance=None) -> Examiner:
    return Examiner(
        seed=3,
        num_images=images,
        num_distance_images=far,
        distance=distance,
        device=torch.device("cpu"),
        reporter=watcher or Watcher(),
    )


def examine(of: Examiner, base: Path, folder: Path, **changes) -> Verdict:
    """With a start of its own, that nobody trained."""
    settings = {
        "start": lambda: start(folder), "guidance": (), "measure_distance": True, "max_regression": 1e9, "attempts": 2,
        "budget": 10**9,
    }  # fmt: skip
    stage = Stage(base, changes.pop("teacher_steps", 8), folder, changes.pop("num_steps", 4))
    return of.examine(stage, **{**settings, **changes})


def start(folder: Path):
    denoiser = load_checkpoint(folder)[0]
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=60 + i))
    return denoiser


def mean_of(images: Tensor) -> float:
    """A distance that can be told by hand."""
    return float(images.double().mean()) + 10


def test_teacher_and_student_draw_from_the_same_noise(tmp_path):
    """Noise number 2⁶³ + seed; the difference over `images`, the distance over `far` of them."""
    base, student = pair(tmp_path)
    watcher = Watcher()
    verdict = examine(examiner(watcher, distance=mean_of), base, student)
    seed = 2**63 + 3
    assert seed == HELD_OUT + 3
    theirs, mine = (drawn(path, steps, count=7, seed=seed) for path, steps in ((base, 8), (student, 4)))
    before = drawn_by(start(student), 4, count=5, seed=seed)
    assert verdict.rmse_before == pytest.approx(distance(before, theirs[:5]), rel=1e-4)
    assert verdict.rmse == pytest.approx(distance(mine[:5], theirs[:5]), rel=1e-4)
    assert abs(distance(mine, theirs) - verdict.rmse) > 1e-3
    assert verdict.distance == pytest.approx(mine.mean() + 10, abs=1e-4)
    assert verdict.teacher_distance == pytest.approx(theirs.mean() + 10, abs=1e-4)
    assert (verdict.num_images, verdict.attempts) == (7, 2)
    assert verdict.reason == why_failed(verdict, 1e9)
    assert verdict.start_distance == pytest.approx(
        drawn_by(start(student), 4, count=7, seed=seed).mean() + 10, abs=1e-4
    )
    assert watcher.bars == [
        ("checking original", 8, 0), ("checking before training", 4, 0), ("checking base_0", 4, 0),
        ("checking before training", 4, 0),  # which is nearer to the teacher
    ]  # fmt: skip
    assert [done for name, done in watcher.seen if name == "checking original"] == list(range(1, 9))


def test_samples_without_bounds_are_compared_as_they_are(tmp_path):
    """By the check of a student and by the comparison of a ladder: nothing is clipped to ±1."""
    base, student = pair(tmp_path, codec="unbounded")
    checked = examine(examiner(), base, student, measure_distance=False)
    stages, device = [Stage(base, 8, student, 4)], torch.device("cpu")
    row = compare(stages, seed=3, device=device, reporter=Watcher(), budget=10**9)[1]
    for error, seed, count in (
        (checked.rmse, HELD_OUT + 3, 5),
        (row.rmse_to_first, 3, 24),
        (row.rmse_to_teacher, 3, 24),
    ):
        theirs, mine = (vdiff.load(path).sample(count, seed=seed).numpy() for path in (base, student))
        assert np.abs(theirs).max() > 1.2
        assert error == pytest.approx(distance(mine, theirs), rel=1e-4)


def test_what_rounding_and_the_noises_explain_is_no_harm(tmp_path):
    """The limit: twice the standard error of the mean difference of squared errors, and 1 % or 1e-4 for rounding."""
    base, student = pair(tmp_path)
    verdict = examine(examiner(images=64), base, student, measure_distance=False)
    theirs, mine = (drawn(path, steps, count=64, seed=2**63 + 3) for path, steps in ((base, 8), (student, 4)))
    before = drawn_by(start(student), 4, count=64, seed=2**63 + 3)
    errors, earlier = (((images - theirs) ** 2).reshape(64, -1).mean(1) for images in (mine, before))
    margin = 2 * np.std(errors - earlier, ddof=1) / 8
    assert verdict.rmse_limit == pytest.approx((earlier.mean() + margin) ** 0.5, rel=1e-3)
    nudged, described = load_checkpoint(student)
    for parameter in nudged.parameters():
        parameter.data.mul_(1 + 1e-6)
    unchanged = load_checkpoint(student)[0]
    save_checkpoint(student, nudged.state_dict(), described)
    same = examine(examiner(images=64), base, student, start=lambda: unchanged, measure_distance=False)
    assert (same.reason, same.rmse != same.rmse_before) == ("", True)
    assert same.rmse_limit >= 1.01 * same.rmse_before


@pytest.mark.parametrize(
    ("teacher_steps", "num_steps"), [(1024, 512), (64, 32), (48, 16), (8, 8), (32, 1), (9, 3), (2, 1)]
)
@pytest.mark.parametrize("budget", [0, 300, 3_000, 30_000, 10**7])
@pytest.mark.parametrize("wanted", [(64, 64), (64, 500), (300, 500), (64, 2)])
def test_a_check_costs_what_it_may(teacher_steps, num_steps, budget, wanted):
    """At most the budget, unless 64 images in the fewest steps cost more; everything where it is enough."""
    every, images, more = plan_check(teacher_steps, num_steps, *wanted, budget)
    assert num_steps % every == teacher_steps % every == 0
    assert 64 <= images <= more
    assert images <= max(wanted[0], 64)
    assert more <= max(*wanted, 64)

    def cost(every: int, images: int, more: int) -> int:
        return (images * (teacher_steps + 2 * num_steps) + (more - images) * (teacher_steps + num_steps)) // every

    common = [k for k in range(1, num_steps + 1) if num_steps % k == teacher_steps % k == 0]
    assert cost(every, images, more) <= max(budget, cost(common[-1], 64, 64))
    assert all(cost(k, 64, 64) > budget for k in common if k < every)
    if cost(1, wanted[0], max(wanted)) <= budget:
        assert (every, images, more) == (1, wanted[0], max(wanted))


def test_a_short_stage_is_checked_in_fewer_steps(tmp_path):
    """By as few evaluations as it may cost, said in one line; teacher and students skip the same steps."""
    base, student = pair(tmp_path)
    watcher = Watcher()
    verdict = examine(examiner(watcher, images=64, far=90, distance=mean_of), base, student, budget=64 * 8)
    assert (verdict.every, verdict.num_images) == (2, 64)
    theirs, mine = (drawn(path, steps, count=64, seed=2**63 + 3) for path, steps in ((base, 4), (student, 2)))
    assert verdict.rmse == pytest.approx(distance(mine, theirs), rel=1e-3)
    assert watcher.lines == ["base_0 is checked with 64 images in 2 of 4 steps, as its training was short"]
    watcher = Watcher()
    assert examine(examiner(watcher, images=64, far=64, distance=mean_of), base, student).every == 1
    assert watcher.lines == []


def test_the_reason_is_that_of_the_numbers(tmp_path):
    """A student that nothing was done to is no failure; one that is far from the data is."""
    base, student = pair(tmp_path)
    unchanged = load_checkpoint(student)[0]
    fair = examine(examiner(images=5, far=7, distance=mean_of), base, student, start=lambda: unchanged)
    assert fair.rmse == pytest.approx(fair.rmse_before, rel=1e-5)  # which were drawn in batches of another size
    assert fair.reason == ""
    far = examine(examiner(distance=mean_of), base, student, start=lambda: unchanged, max_regression=0.5)
    assert far.reason == why_failed(far, 0.5)
    assert "distance to the data is" in far.reason


@pytest.mark.parametrize(("measure", "has_data"), [(False, True), (True, False), (False, False)])
def test_the_distance_is_measured_only_where_it_is_due(tmp_path, measure, has_data):
    base, student = pair(tmp_path)
    asked = []
    of = examiner(distance=(lambda images: asked.append(images) or 1.0) if has_data else None)
    verdict = examine(of, base, student, measure_distance=measure)
    assert (verdict.distance, verdict.teacher_distance, verdict.num_images) == (None, None, 5)
    assert asked == []


def test_more_images_than_fit_one_batch(tmp_path):
    base, student = pair(tmp_path)
    watcher = Watcher()
    verdict = examine(examiner(watcher, images=67), base, student, measure_distance=False)
    theirs, mine = (drawn(path, steps, count=67, seed=2**63 + 3) for path, steps in ((base, 8), (student, 4)))
    assert verdict.rmse == pytest.approx(distance(mine, theirs), rel=1e-4)
    assert watcher.bars[0] == ("checking original", 16, 0)
    assert [done for name, done in watcher.seen if name == "checking base_0"] == list(range(1, 9))


def test_a_student_s_images_are_kept_for_the_next_stage(tmp_path, monkeypatch):
    """Where they are enough, and of as many steps."""
    monkeypatch.setattr("vdiff.training.verdict.worsening", lambda *_: "")
    base, student = pair(tmp_path)
    write_checkpoint(tmp_path / "base_1", seed=60, num_timesteps=2, method="progressive")
    next_stage = {"base": student, "teacher_steps": 4, "num_steps": 2, "start": lambda: start(tmp_path / "base_1")}
    for measured, again in (((True, True), False), ((True, False), False), ((False, True), True)):
        watcher = Watcher()
        of = examiner(watcher, images=64, far=70, distance=mean_of)
        first = examine(of, base, student, measure_distance=measured[0])
        del watcher.bars[:]
        folder = tmp_path / "base_1"
        kept = examine(of, **{**next_stage, "folder": folder, "measure_distance": measured[1]})
        assert any(name == "checking base_0" for name, *_ in watcher.bars) == again
        fresh = examine(
            examiner(images=64, far=70, distance=mean_of),
            **{**next_stage, "folder": folder, "measure_distance": measured[1]},
        )
        assert kept == fresh
        if measured == (True, True):
            assert kept.teacher_distance == first.distance
    watcher = Watcher()
    of = examiner(watcher)
    examine(of, base, student)
    examine(of, **{**next_stage, "folder": tmp_path / "base_1", "teacher_steps": 2})
    assert ("checking base_0", 2, 0) in watcher.bars


def test_a_student_that_draws_no_image_has_failed(tmp_path):
    base, student = pair(tmp_path)
    unchanged = load_checkpoint(student)[0]
    write_checkpoint(student, seed=30, num_timesteps=4, method="progressive")
    broken, described = load_checkpoint(student)
    broken.network.conv_out.bias.data.fill_(math.nan)
    save_checkpoint(student, broken.state_dict(), described)
    verdict = examine(examiner(distance=mean_of), base, student, start=lambda: unchanged)
    assert verdict.reason == "the model draws no sample: step 1 of 4 produced non-finite values in torch.float32"
    assert (verdict.rmse, verdict.distance, verdict.teacher_distance) == (math.inf, None, None)
    assert verdict.rmse_before < math.inf
    assert (verdict.num_images, verdict.attempts) == (7, 2)
    write_verdict(student, verdict)
    assert read_verdict(student) == verdict


def classed(**more) -> dict[str, object]:
    unet = {**UNET, "in_channels": 1, "out_channels": 1, "num_classes": 3, "null_class": True, **more}
    return {"unet": UNetConfig.from_dict(unet).to_dict(), "class_names": ["a", "b", "c"]}


def test_guidance_is_tried_in_the_middle_of_its_range(tmp_path):
    """A teacher of two answers against a student that is told the weight; and a teacher that is told it."""
    base, student = tmp_path / "original", tmp_path / "base_0"
    write_checkpoint(base, seed=1, **classed())
    write_checkpoint(
        student, seed=30, num_timesteps=8, method="guided", guidance_range=[0.5, 3.0], **classed(guidance_input=True)
    )
    of = examiner()
    verdict = examine(of, base, student, num_steps=8, guidance=[0.5, 3.0], measure_distance=False)
    theirs, mine = (drawn(path, 8, count=5, seed=2**63 + 3, weight=1.75) for path in (base, student))
    assert verdict.rmse == pytest.approx(distance(mine, theirs), rel=1e-3)
    plain = drawn(base, 8, count=5, seed=2**63 + 3)
    assert abs(distance(mine, plain) - verdict.rmse) > 1e-3
    assert distance(drawn(student, 8, count=5, seed=2**63 + 3), mine) > 1e-3


def test_without_a_range_nobody_is_guided(tmp_path):
    base, student = tmp_path / "original", tmp_path / "base_0"
    write_checkpoint(base, seed=1, **classed())
    write_checkpoint(student, seed=30, num_timesteps=4, method="progressive", **classed())
    verdict = examine(examiner(), base, student, measure_distance=False)
    theirs, mine = (drawn(path, steps, count=5, seed=2**63 + 3) for path, steps in ((base, 8), (student, 4)))
    assert verdict.rmse == pytest.approx(distance(mine, theirs), rel=1e-3)
