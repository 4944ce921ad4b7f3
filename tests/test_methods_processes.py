"""Two processes distil as one does: by an average of their own making, with noise levels by importance."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.commands import done
from tests.programs import command, ends, launch
from tests.test_own_method import Adversarial
from tests.toy import distill_config, run_ladder, scalars, write_checkpoint, write_dataset
from vdiff.diffusion.distillation import METHODS
from vdiff.models.checkpoint import WEIGHTS, CheckpointConfig, load_checkpoint, read_config, read_tensors
from vdiff.training.config import DistillConfig
from vdiff.training.state import state_path
from vdiff.training.verdict import read_verdict

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo")
WORDS = (
    "--preset toy --method tract --phases 8,2,1 --times importance --num_iters 3 --batch_size 8 --lr 1e-3 "
    "--device cpu --num_workers 0 --check_images 6 --log_interval 1"
)


def test_a_ladder_of_tract_in_two_processes(tmp_path, monkeypatch):
    """The batch, the statistics of all its losses, the self-teacher and the verdict are those of one process."""
    monkeypatch.chdir(tmp_path)
    data = write_dataset(Path("toy_4"))
    for name in ("one", "two"):
        write_checkpoint(Path(name, "original"), seed=7, dataset=str(data))
    line = f"distill.py --base two/original {WORDS}"
    codes, stdout, stderr = ends(launch(command(line), tmp_path))
    assert codes == [0, 0], stdout + stderr
    assert "distilling on 2 processes, cpu, fp32, batch 8 = 2 processes × 4 samples" in stderr
    assert stderr.count("base_1: RMSE to its teacher") == 1
    done(f"distill.py --base one/original {WORDS}")
    z = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for student in ("base_0", "base_1"):
        one, two = Path("one", student), Path("two", student)
        t = torch.full((8,), 1.0 if student == "base_1" else 0.5, dtype=torch.float64)
        first, second = (load_checkpoint(folder)[0](z, t).v for folder in (one, two))
        assert (first - second).norm() < 1e-3 * first.norm()
        losses = [scalars(folder)["loss"] for folder in (one, two)]
        assert losses[0].keys() == losses[1].keys()
        assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), rel=1e-2)
        assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5)
        verdicts = [read_verdict(folder) for folder in (one, two)]
        assert verdicts[1].rmse == pytest.approx(verdicts[0].rmse, rel=1e-2)
        assert (read_config(two).method, verdicts[1].reason) == ("tract", "")


def run_adversarial_ladder(config: DistillConfig, teacher: CheckpointConfig) -> None:
    """A ladder in a program of its own, which does not know what the test has registered."""
    METHODS["adversarial"] = Adversarial
    run_ladder(config, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_networks_of_a_method_learn_alike_in_two_processes(tmp_path, monkeypatch, fsdp):
    """A critic takes the mean of all gradients, and the student that of what the critic adds to its loss.

    With FSDP the student is shared out; the critic is whole in every process.
    """
    monkeypatch.setitem(METHODS, "adversarial", Adversarial)
    data = write_dataset(tmp_path / "toy_4")
    changes = {"batch_size": 8, "num_iters": 2, "lr": 1e-2, "lr_schedule": "constant", "tracker": "none"}
    for name, count in (("one", 1), ("two", 2)):
        base = tmp_path / name / "original"
        write_checkpoint(base, seed=7, dataset=str(data))
        changes["fsdp"] = fsdp and count > 1
        config = distill_config(data, base, method="adversarial", phases="8,2", check_images=0, **changes)
        act = partial(run_adversarial_ladder, config, read_config(base))
        codes, stdout, stderr = ends(launch(act, tmp_path, count))
        assert codes == [0] * count, stdout + stderr
    one, two = (read_tensors(state_path(tmp_path / name / "base_0")) for name in ("one", "two"))
    start = read_tensors(tmp_path / "one" / "original" / WEIGHTS)
    for prefix, moved in (("method.weights.", None), ("raw.", start)):  # by gradient descent; by Adam, much of signs
        names = [name for name in one if name.startswith(prefix) and (moved is None or name[4:] in moved)]
        first, second = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (one, two))
        reference = first if moved is None else first - torch.cat([moved[name[4:]].flatten() for name in names])
        assert (first - second).norm() <= (1e-3 if moved is None else 0.1) * reference.norm()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_student_that_is_differentiated_learns_alike_in_two_processes(tmp_path, fsdp):
    """The derivative goes round the model that sums gradients, the student's loss does not."""
    data = write_dataset(tmp_path / "toy_4")
    changes = {"batch_size": 8, "num_iters": 2, "lr": 1e-3, "tracker": "none", "adaptive_weight": True}
    for name, count in (("one", 1), ("two", 2)):
        base = tmp_path / name / "original"
        write_checkpoint(base, seed=7, dataset=str(data))
        changes["fsdp"] = fsdp and count > 1
        config = distill_config(data, base, method="scm", phases="8,2", check_images=0, **changes)
        codes, stdout, stderr = ends(launch(partial(run_ladder, config, read_config(base)), tmp_path, count))
        assert codes == [0] * count, stdout + stderr
    one, two, start = (read_tensors(tmp_path / name / WEIGHTS) for name in ("one/base_0", "two/base_0", "one/original"))
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in start])
    assert moved.norm() > 0
    assert apart.norm() < 0.1 * moved.norm()  # by Adam, much of signs
