"""What a run must know of its dataset before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vdiff.data.datasets import AnyStore, Batches, open_batches, open_dataset
from vdiff.data.store import find_dataset
from vdiff.errors import OptionError, VdiffError
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine


@dataclass(frozen=True)
class Images:
    """The images of a run; without a `store` they are only assumed, to see what a preset would cost."""

    image_size: int
    channels: int
    class_names: list[str] = field(default_factory=list)
    store: AnyStore | None = None

    @property
    def name(self) -> str:
        """The dataset's path, as the checkpoint records it."""
        if self.store is None:
            return "assumed"
        return self.store.path if isinstance(self.store.path, str) else self.store.path.as_posix()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the dataset's content."""
        return self.store.meta.fingerprint if self.store else ""

    def batches(self, config: LoopConfig, engine: Engine) -> Batches:
        """This process's share of the batches, in the order that the seed gives."""
        assert self.store is not None, "images that are only assumed cannot be read"
        return open_batches(
            self.store,
            image_size=self.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            flip=config.flip,
            num_workers=config.num_workers,
            rank=engine.rank,
            world_size=engine.world_size,
            pin_memory=engine.device.type == "cuda",
        )


def open_images(path: str, image_size: int | None) -> Images:
    """The dataset at `path` (empty: the only one under `data/`), at one of its sizes.

    Raises:
        VdiffError: no such dataset, or several to choose from.
        OptionError: it has several sizes and none was chosen, or not the one that was.
    """
    store = open_dataset(path or find_dataset())
    sizes = store.meta.sizes
    if image_size is None and len(sizes) > 1:
        raise OptionError(f"{store.path} has the sizes {', '.join(map(str, sizes))}", "choose one with --image_size")
    size = image_size or sizes[0]
    store.check_size(size)
    if not len(store):
        raise VdiffError(f"{store.path} holds no images", "prepare it again")
    return Images(size, store.meta.channels, list(store.meta.class_names), store)
