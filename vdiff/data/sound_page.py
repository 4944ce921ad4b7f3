"""A page of sounds: a table of players with their spectrograms, in one file that works offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from vdiff.data.audio import encode
from vdiff.data.images import to_pil
from vdiff.files import read_text, write_text
from vdiff.models.codec import spectrograms
from vdiff.replacing import Kind

MARK = '<meta name="generator" content="vdiff sounds">'
STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;color:#1c1c20;background:#fff}"
    "table{border-collapse:collapse}th,td{padding:.4rem .6rem;text-align:center;font-weight:400;vertical-align:bottom}"
    "th[scope=row]{text-align:right;vertical-align:middle;color:#606068}"
    "img{display:block;width:176px;height:128px;margin:0 auto .3rem}audio{width:176px;height:36px}p{color:#606068}"
)
NOTE = "Spectrograms: time to the right, frequency upwards to half the rate, −80 to 0 dB from black to yellow."
PAGE = Kind("page of sounds", lambda path: path.name if MARK in read_text(path)[:200] else "")


def write_page(
    path: Path, title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]], rate: int
) -> None:
    """Write a page: under the titles of its columns, rows of a title and of sounds (C, L) in [−1, 1], each with a name.

    Args:
        rate: samples per second.
    """
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for name, sounds in rows:
        cells = "".join(f"<td>{_player(sound, label, rate)}</td>" for label, sound in sounds)
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{MARK}<title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{rate:,} samples per second. {NOTE}</p>"
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></body></html>\n"
    )
    write_text(path, text)


def _player(sound: Tensor, label: str, rate: int) -> str:
    picture = io.BytesIO()
    to_pil(spectrograms(sound[None])[0]).save(picture, format="PNG")
    sound = sound.detach().float().cpu().nan_to_num().clamp(-1, 1)
    flac, png = (base64.b64encode(data).decode() for data in (encode(sound.T.numpy(), rate), picture.getvalue()))
    shown = f"<small>{escape(label)}</small><br>" if label else ""
    return (
        f'<img alt="spectrogram {escape(label)}" src="data:image/png;base64,{png}">{shown}'
        f'<audio controls preload="none" src="data:audio/flac;base64,{flac}"></audio>'
    )
