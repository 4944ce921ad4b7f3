"""The benchmark of parameterisations: the same network under each, and a table of what was measured."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from benchmarks import parameterisations, plane
from benchmarks.parameterisations import HEAD, ROWS, STEPS, Values, families, figures, lines, measured

TINY = plane.Scale(seeds=1, data=4096, batch_size=64, teacher=60, part=2, points=128, directions=8)


def test_teachers_learn_and_students_are_near_them():
    values = {row: figures("ring", 0, row, TINY) for row in ROWS}
    noise = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    data = plane.shadows(plane.ring(128, torch.Generator().manual_seed(1))[0], 8)
    far = plane.rms(plane.shadows(noise, 8) - data)
    for found in values.values():
        assert list(found) == [column for _, column in sorted(zip([0, 1, 3, 5, 2, 4, 6], HEAD[2:], strict=True))]
        assert found["W, teacher"] < 0.6 * far


def test_a_stopped_run_continues_with_the_next_row(monkeypatch, tmp_path):
    asked = []

    def fake(*row: object) -> dict[str, float]:
        asked.append(row)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return {"W, teacher": float(len(asked))}

    monkeypatch.setattr(parameterisations, "figures", fake)
    with pytest.raises(KeyboardInterrupt):
        measured(TINY, tmp_path / "rows")
    values = measured(TINY, tmp_path / "rows")
    assert asked[4] == asked[5]
    assert len(asked) == 1 + len(ROWS) * len(plane.DATA)
    assert values["ring", "vp, v", "W, teacher"] == [1.0]
    measured(replace(TINY, teacher=61), tmp_path / "rows")  # of another scale: nothing is known
    assert len(asked) == 1 + 2 * len(ROWS) * len(plane.DATA)


def test_the_table_has_the_means_over_data_and_seeds():
    values = Values(list)
    for k, name in enumerate(plane.DATA):
        for column in HEAD[2:]:
            values[name, "edm", column] = [float(k), float(k + 2)]
    table = lines(values)
    assert [row[0] for row in table] == [*plane.DATA, "mean"]
    assert table[0][2] == "1.000 ± 1.414"
    assert table[-1][2:] == [f"{fmean([1, 3]):.3f} ± 1.414"] * (1 + 2 * len(STEPS))


@pytest.mark.parametrize("name", plane.DATA)
def test_edm_knows_the_deviation_of_the_data(name):
    data = plane.DATA[name](4096, torch.Generator().manual_seed(0))
    assert families(data)["edm"].sigma_data == pytest.approx(float(data[0].std()), abs=1e-3)  # type: ignore[attr-defined]
