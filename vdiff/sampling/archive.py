"""One whole thing, a zip, an npz or an LMDB: images wait in `OUT.partial` until all are there.

The same command fills it up; then it is packed, and put in the place of OUT in one move.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdiff.data.images import from_uint8
from vdiff.errors import VdiffError
from vdiff.files import make_folder, refusal, remove, write_text
from vdiff.replacing import check_free, check_ours, discard, is_free, sweep_inside, take_place
from vdiff.sampling.codecs import from_png, pixels, png
from vdiff.sampling.outputs import PICTURES, ImageKind, Output, State, check_form, is_ours
from vdiff.sampling.packing import PACKERS, SAMPLES, Contents, check_record, read_packed_record, write_packed
from vdiff.sampling.record_log import RecordLog, RecordReader
from vdiff.sampling.spec import RECORD, SampleSpec


class Archive(Output):
    """One file, or one LMDB folder, packed from the images that wait in `OUT.partial`."""

    def __init__(self, path: Path, kind: ImageKind, form: str, process: int = 0) -> None:
        super().__init__(path, kind)
        self.form, self.packer = form, PACKERS[form]
        self.log = RecordLog(self.place, process)
        self.reader: RecordReader | None = None

    @property
    def place(self) -> Path:
        """`OUT.partial`."""
        return self.path.with_name(f"{self.path.name}.partial")

    def check(self, spec: SampleSpec, num: int, *, overwrite: bool) -> State:
        """Finished: the whole is in its place, with as many images."""
        check_record(self.form, spec.to_json(format=self.form, num=num))
        if not is_free(self.path):
            check_ours(self.path, SAMPLES)
            if overwrite:
                check_free(self.path, SAMPLES, overwrite=True)
            else:
                record = read_packed_record(self.path) or {}
                check_form(record, self.form, self.path)
                spec.check_same(record, self.path)
                if record.get("num") == num:
                    return "finished"
                raise VdiffError(
                    f"{self.path} holds {record.get('num')} images, not {num}", "give --overwrite, or another --out"
                )
        return "going on" if is_ours(self.place, spec, self.form, overwrite=overwrite) else "anew"

    def begin(self, spec: SampleSpec, state: State) -> None:
        """Make the partial folder; what is at OUT stays until it is replaced."""
        if state != "going on":
            discard(self.place)
        if state == "anew":
            write_text(make_folder(self.place) / RECORD, spec.to_json(format=self.form))
        sweep_inside(self.place, SAMPLES)

    def held(self, num: int) -> np.ndarray:
        """What lies in the partial folder: all of it is read, and where each image is, is kept in mind."""
        self.reader = RecordReader(self.place, num)
        return self.reader.held

    def encode(self, index: int, image: Tensor) -> bytes:
        """PNG, or plain pixels, as the packer wants them."""
        del index
        return png(image) if self.packer.takes_png else pixels(image).tobytes()

    def commit(self, images: Sequence[tuple[int, bytes]]) -> None:
        """Append them to this process's file."""
        self.log.append(images)

    def images(self, indices: Sequence[int]) -> Tensor:
        """From the partial folder."""
        reader = self.reader or RecordReader(self.place, max(indices) + 1)
        return torch.stack([self._image(data) for data in reader.read(indices)])

    def _image(self, data: bytes) -> Tensor:
        if self.packer.takes_png:
            return from_png(data)
        shape = (self.kind.size, self.kind.size, self.kind.channels)
        return from_uint8(torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape).permute(2, 0, 1))

    def finish(self, spec: SampleSpec, num: int) -> None:
        """Pack, then move the pictures and the whole to their places, and take the partial folder away."""
        packed = self.place / f"packed.{self.form}"
        reader = self.reader or RecordReader(self.place, num)
        contents = Contents(
            name=self.path.stem,
            num=num,
            size=self.kind.size,
            channels=self.kind.channels,
            class_names=self.kind.class_names,
            labels=spec.labels,
            images=lambda: reader.read(range(num)),
            record=spec.to_json(format=self.form, num=num),
        )
        try:
            remove(packed)
            write_packed(self.form, contents, packed)
            for name in PICTURES:
                remove(self.picture(name))  # also that of an earlier output, which this one need not have
                if (self.place / name).exists():
                    shutil.move(self.place / name, self.picture(name))
            take_place(packed, self.path)
            discard(self.place)
        except OSError as error:
            raise refusal(self.path, error) from None

    def picture_in_work(self, name: str) -> Path:
        """In the partial folder; beside OUT where all else is done."""
        return self.place / name if self.place.exists() else self.picture(name)
