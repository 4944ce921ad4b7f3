"""Milliseconds an image in the browser (WASM, no GPU) beside PyTorch, and the first picture from a warm cache.

    python benchmarks/web.py checkpoints/base_4 checkpoints/base_5 checkpoints/base_6    # after `make quickstart`

Each checkpoint gets a page of its own, served by vdiff, in Chromium without a window. "First picture" is the time from
the navigation to the first images on the screen, after the page was open before: runtime and model come from the
browser's cache. Then the page and PyTorch draw the same images in turns, both with as many threads as there are cores,
four at once. Both start from noise that is there already. Medians and minima: other programs on the machine make the
medians larger, and hardly the minima.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.report import machine, write_report
from tests.browser import Tab, browser
from tests.servers import running
from vdiff.diffusion.noise import ImageNoise
from vdiff.web.export import export_web
from vdiff.web.server import folder_app

COUNT = 4
DRAWN = """new Promise((done, fail) => {
    const status = document.getElementById("status");
    const look = () => status.matches(".failed") ? fail(Error(status.textContent)) : self.vdiff?.drawn ? done(1) : 0;
    const again = () => { look(); setTimeout(again, 5); };
    again();
})"""


def page_times(tab: Tab, address: str, openings: int) -> list[float]:
    """Seconds from navigation to first picture, for each opening after the first."""
    found = []
    for _ in range(openings + 1):
        tab.open("about:blank", width=1280)
        tab.open(address, width=1280)
        tab.run(DRAWN)
        found.append(tab.run("performance.getEntriesByName('drawn')[0].startTime") / 1000)
    return found[1:]


def page_draws(tab: Tab, name: str, seed: int) -> float:
    """Milliseconds an image that the page takes for a seed."""
    tab.run(
        f"self.vdiff.drawn = 0; document.getElementById('seed').value = '{seed}';"
        "document.getElementById('seed').dispatchEvent(new Event('input', { bubbles: true })); " + DRAWN
    )
    return float(tab.run(f"self.vdiff.milliseconds['{name}']"))


def torch_draws(model: vdiff.Model, seed: int) -> float:
    """Milliseconds an image that PyTorch takes for a seed."""
    noise = ImageNoise(seed=seed, indices=range(COUNT), shape=model.shape)()
    began = time.perf_counter()
    model.sample(noise=noise)
    return 1000 * (time.perf_counter() - began) / COUNT


def shown(values: list[float]) -> list[str]:
    """Median and minimum."""
    return [f"{statistics.median(values):.3g}", f"{min(values):.3g}"]


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--runtime", help="The npm package onnxruntime-web; by default npm downloads it.")
@click.option("--repeats", default=20, type=click.IntRange(3), help="Drawings of each, and a quarter as many openings.")
@click.option("--name", default="web", help="Name of the table in benchmarks/results.")
def main(checkpoints: tuple[Path, ...], runtime: str | None, repeats: int, name: str) -> None:
    """Measure each checkpoint."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows, load = [], os.getloadavg()[0]
    for checkpoint in checkpoints:
        model = vdiff.load(checkpoint, device="cpu")
        with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "browser") as tab:
            page = Path(folder) / "page"
            [made] = export_web([checkpoint], page, runtime=runtime)
            with running(folder_app(page)) as port:
                first = page_times(tab, f"http://127.0.0.1:{port}/", repeats // 4 + 1)
                wasm, ours = [], []
                for seed in range(1, repeats + 1):
                    wasm.append(page_draws(tab, Path(made.file).stem, seed))
                    ours.append(torch_draws(model, seed))
        steps, size = str(model.config.num_timesteps), f"{made.bytes / 2**20:.1f}"
        rows.append([checkpoint.name, steps, size, *shown(wasm), *shown(ours), *shown(first)])
    columns = ["model", "steps", "MiB", "WASM ms an image", "least", "PyTorch ms an image", "least"]
    columns += ["first picture, s", "least"]
    where = f"{machine()}; load at the beginning {load:.1f}"
    write_report(name, f"In the browser, {COUNT} images at once", columns, rows, where)


if __name__ == "__main__":
    main()
