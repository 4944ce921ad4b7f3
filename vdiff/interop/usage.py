"""How to use an exported file: the programs that stand in its model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vdiff.interop.graphs import MAX_GRID, GraphOptions
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.unet import UNetConfig
from vdiff.text import plural

IMAGES = 16


def weights_usage(name: str) -> str:
    """For a folder called `name` with weights and config.json."""
    words = "The weights, and in `config.json` the network they belong to. With vdiff installed:"
    return f"{words}\n\n    vdiff sample --checkpoint {shlex.quote(name)}\n"


def onnx_usage(name: str, config: CheckpointConfig, options: GraphOptions) -> str:
    """For `name`, an ONNX file."""
    words = f"ONNX, for any batch size: {_in_words(config, options)}"
    shape = _shape(config)
    opened = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f"session = onnxruntime.InferenceSession({json.dumps(name)})",
        f"noise = np.random.default_rng(0).standard_normal({shape}, dtype=np.float32)",
    ]
    told = _told(config, options, classes="np.arange({n}) % {c}", guidance="np.full({n}, {w}, np.float32)")
    if options.sampler:
        inputs = _dictionary('"noise": noise', *told)
        return _program(words, [*opened, f"images = session.run(None, {inputs})[0]  # {shape} in [-1, 1]"])
    if options.num_steps > MAX_GRID:
        return words
    inputs = _dictionary('"z": z', '"label": label', *told)
    code = [
        "import json",
        "",
        *opened,
        'steps = json.loads(session.get_modelmeta().custom_metadata_map["grid"])',
        "z = noise",
        "for step in steps:",
        f'    label = np.full({IMAGES}, step["label"], np.float32)',
        f"    {options.output} = session.run(None, {inputs})[0]",
        *_ddim(options.output, "np.clip(x, -1, 1)"),
        f"# z is now {shape}, images in [-1, 1]",
    ]
    return _program(words, code)


def torch_usage(name: str, config: CheckpointConfig, options: GraphOptions) -> str:
    """For `name`, a `torch.export` program."""
    words = f"A `torch.export` program, for any batch size: {_in_words(config, options)}"
    shape = _shape(config)
    noise = f"noise = torch.randn({shape}, generator=torch.Generator().manual_seed(0))"
    told = _told(config, options, classes="torch.arange({n}) % {c}", guidance="torch.full(({n},), {w})")
    if options.sampler:
        code = ["import torch", "", f"sampler = torch.export.load({json.dumps(name)}).module()", noise]
        inputs = ", ".join(["noise=noise", *(_keyword(entry) for entry in told)])
        return _program(
            words, [*code, "with torch.no_grad():", f"    images = sampler({inputs})  # {shape} in [-1, 1]"]
        )
    if options.num_steps > MAX_GRID:
        return words
    inputs = ", ".join(["z=z", "label=label", *(_keyword(entry) for entry in told)])
    code = [
        "import json",
        "",
        "import torch",
        "",
        'files = {"vdiff.json": ""}',
        f"evaluate = torch.export.load({json.dumps(name)}, extra_files=files).module()",
        'steps = json.loads(json.loads(files["vdiff.json"])["grid"])',
        noise,
        "z = noise",
        "for step in steps:",
        f'    label = torch.full(({IMAGES},), step["label"])',
        "    with torch.no_grad():",
        f"        {options.output} = evaluate({inputs})",
        *_ddim(options.output, "x.clamp(-1, 1)"),
        f"# z is now {shape}, images in [-1, 1]",
    ]
    return _program(words, code)


def diffusers_usage(name: str, config: CheckpointConfig, call: Mapping[str, Any], *, clip: bool) -> str:
    """How to draw with a pipeline folder called `name`, for its model card."""
    lines = [
        "import torch",
        "from diffusers import DDIMPipeline",
        "",
        f'pipeline = DDIMPipeline.from_pretrained("{name}")',
    ]
    if call:
        arguments = ", ".join(f"{key}={value}" for key, value in call.items())
        lines += [
            f"images = pipeline(batch_size=16, generator=torch.manual_seed(0), {arguments}).images",
            'images[0].save("image.png")',
        ]
    else:
        size, channels = config.image_size, config.unet["in_channels"]
        clipped = ", use_clipped_model_output=True" if clip else ""
        lines += [
            "unet, scheduler = pipeline.unet, pipeline.scheduler",
            f"classes = torch.arange(16) % {config.unet['num_classes'] + config.unet['null_class']}",
            f"z = torch.randn(16, {channels}, {size}, {size}, generator=torch.manual_seed(0))",
            f"scheduler.set_timesteps({config.num_timesteps})",
            "for t in scheduler.timesteps:",
            "    with torch.no_grad():",
            "        output = unet(z, t, class_labels=classes).sample",
            f"    z = scheduler.step(output, t, z{clipped}).prev_sample",
            "# z is now images in [-1, 1]",
        ]
    words = "With diffusers; vdiff is not needed. Any number of steps that divides the model's will do."
    return f"{words}\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _in_words(config: CheckpointConfig, options: GraphOptions) -> str:
    """What it is, and what goes in and out."""
    unet = UNetConfig.from_dict(config.unet)
    names = ["`noise` (B, C, H, W)"] if options.sampler else ["`z` (B, C, H, W)", "`label` (B,)"]
    if unet.num_classes:
        none = f", {unet.num_classes}: no class" if unet.null_class else ""
        names.append(f"`classes` (B,) int64, 0 to {unet.num_classes - 1}{none}")
    if unet.guidance_input or options.guided:
        limits = " from {:g} to {:g}".format(*config.guidance_range) if config.guidance_range else ""
        names.append(f"`guidance` (B,), weights w{limits}")
    steps = plural(options.num_steps, "step")
    what = f"the whole sampler, DDIM in {steps}" if options.sampler else "one evaluation of the network"
    if not options.sampler and options.num_steps <= MAX_GRID:
        what += f", with what a sampler of {steps} must know of each in its metadata, `grid`"
    return f"{what}. {'; '.join(names)} → `{options.results}` (B, C, H, W), float32."


def _shape(config: CheckpointConfig) -> str:
    return f"({IMAGES}, {config.unet['in_channels']}, {config.image_size}, {config.image_size})"


def _told(config: CheckpointConfig, options: GraphOptions, *, classes: str, guidance: str) -> list[str]:
    """Classes and guidance as entries of a dictionary."""
    unet, entries = UNetConfig.from_dict(config.unet), []
    if unet.num_classes:
        entries.append(f'"classes": {classes.format(n=IMAGES, c=unet.num_classes)}')
    if unet.guidance_input or options.guided:
        weight = float(config.guidance_range[0]) if config.guidance_range else 1.0
        entries.append(f'"guidance": {guidance.format(n=IMAGES, w=weight)}')
    return entries


def _dictionary(*entries: str) -> str:
    return "{" + ", ".join(entries) + "}"


def _keyword(entry: str) -> str:
    name, _, value = entry.partition(": ")
    return f"{name.strip(chr(34))}={value}"


def _ddim(output: str, clipped: str) -> list[str]:
    """The rest of a step of DDIM with x clipped to ±1, from what the network answers."""
    x = {"v": 'step["alpha_t"] * z - step["sigma_t"] * v', "eps": '(z - step["sigma_t"] * eps) / step["alpha_t"]'}
    return [
        *([f"    x = {x[output]}"] if output in x else []),
        f"    x = {clipped}",
        '    eps = (z - step["alpha_t"] * x) / step["sigma_t"]',
        '    z = step["alpha_s"] * x + step["sigma_s"] * eps',
    ]


def _program(words: str, lines: Sequence[str]) -> str:
    return f"{words}\n\n```python\n{chr(10).join(lines)}\n```\n"
