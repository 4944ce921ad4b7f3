"""examples/quickstart.ipynb runs from top to bottom, with tiny settings, and shows its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
nbformat = pytest.importorskip("nbformat")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("QUICKSTART_TINY", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 7
    written = {path.name for path in (tmp_path / "quickstart_files").iterdir() if path.is_dir()}
    assert {"digits_8", "original", "base_0", "base_1", "base_2"} <= written
    printed = "".join(output.get("text", "") for output in shown)
    assert "teacher in as many steps" in printed


def test_the_notebook_is_stored_without_outputs():
    """And names no place on the machine where it was written."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert "/home/" not in NOTEBOOK.read_text(encoding="utf-8")
