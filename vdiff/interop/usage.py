"""How to use an exported file: the example programs in its model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from vdiff.diffusion.parameterisation import Flow
from vdiff.interop.graphs import MAX_GRID, GraphOptions
from vdiff.interop.modelspec import LATENT_FACTOR, SDXL, SIDE, Family, family_of, guidance_hint, is_student
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.components import ENCODERS
from vdiff.models.condition import CLASSES, IMAGE
from vdiff.models.diffusers_names import DIT, FLUX, PIXART, SD3, diffusers_class, diffusers_part
from vdiff.models.kinds import DIFFUSERS, TEXT
from vdiff.text import plural

IMAGES = 16
TEMPLATES = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
DDIM = """\
{% if output == "v" %}
    x = step["alpha_t"] * z - step["sigma_t"] * v
{% elif output == "eps" %}
    x = (z - step["sigma_t"] * eps) / step["alpha_t"]
{% endif %}
    x = {{ clipped }}
    eps = (z - step["alpha_t"] * x) / step["sigma_t"]
    z = step["alpha_s"] * x + step["sigma_s"] * eps
# z is now {{ shape }}, images in [-1, 1]
"""
"""A DDIM step with x clipped to ±1, after the evaluation of the network."""
ONNX_SAMPLER = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({{ name }})
noise = np.random.default_rng(0).standard_normal({{ shape }}, dtype=np.float32)
images = session.run(None, { {{- inputs -}} })[0]  # {{ shape }} in [-1, 1]
"""
ONNX_EVALUATION = (
    """\
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({{ name }})
noise = np.random.default_rng(0).standard_normal({{ shape }}, dtype=np.float32)
steps = json.loads(session.get_modelmeta().custom_metadata_map["grid"])
z = noise
for step in steps:
    label = np.full({{ count }}, step["label"], np.float32)
    {{ output }} = session.run(None, { {{- inputs -}} })[0]
"""
    + DDIM
)
TORCH_SAMPLER = """\
import torch

sampler = torch.export.load({{ name }}).module()
noise = torch.randn({{ shape }}, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    images = sampler({{ inputs }})  # {{ shape }} in [-1, 1]
"""
TORCH_EVALUATION = (
    """\
import json

import torch

files = {"vdiff.json": ""}
evaluate = torch.export.load({{ name }}, extra_files=files).module()
steps = json.loads(json.loads(files["vdiff.json"])["grid"])
noise = torch.randn({{ shape }}, generator=torch.Generator().manual_seed(0))
z = noise
for step in steps:
    label = torch.full(({{ count }},), step["label"])
    with torch.no_grad():
        {{ output }} = evaluate({{ inputs }})
"""
    + DDIM
)
PIPELINE = """\
import torch
from diffusers import {{ pipeline }}

pipeline = {{ pipeline }}.from_pretrained("{{ name }}")
{% if arguments %}
images = pipeline(batch_size={{ count }}, generator=torch.manual_seed(0), {{ arguments }}).images
images[0].save("image.png")
{% else %}
unet, scheduler = pipeline.unet, pipeline.scheduler
classes = torch.arange({{ count }}) % {{ classes }}
z = torch.randn{{ shape }}, generator=torch.manual_seed(0))
scheduler.set_timesteps({{ steps }})
for t in scheduler.timesteps:
    with torch.no_grad():
        output = unet(z, t, class_labels=classes).sample
    z = scheduler.step(output, t, z{{ clipped }}).prev_sample
# z is now images in [-1, 1]
{% endif %}
"""
LORA = """\
{% if kind == "peft" %}
from peft import PeftModel
{% endif %}
from diffusers import {% if scheduler %}DDIMScheduler, {% endif %}DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("BASE")
{% if scheduler %}
{{ scheduler }}
{% endif %}
{% if kind == "peft" %}
{% for part, folder in parts %}
pipe.{{ part }} = PeftModel.from_pretrained(pipe.{{ part }}, "{{ name }}/{{ folder }}", adapter_name="default")
{% endfor %}
{% else %}
pipe.load_lora_weights("{{ name }}")
{% endif %}
pipe({{ subject }}{{ arguments }}).images[0].save("fox.png")
"""
SINGLE_FILE = """\
from diffusers import DDIMScheduler, {{ pipeline }}

pipe = {{ pipeline }}.from_single_file("{{ name }}", config="BASE")
{{ scheduler }}
pipe("a red fox"{{ arguments }}).images[0].save("fox.png")
"""
FOLDER = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{{ name }}")
pipe("a red fox"{{ arguments }}).images[0].save("fox.png")
"""
TRANSFORMER = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{{ name }}"{{ absent }})
pipe({{ subject }}{{ arguments }}).images[0].save("image.png")
"""
SETTINGS = """\
{% if steps %}
- Steps: {{ steps }}, no more and no fewer. CFG 1: {{ guidance }}, and negative prompts have no effect.
{% endif %}
- ComfyUI: sampler `euler`, scheduler `sgm_uniform`.
  {%- if node %} {{ node }} before the sampler: it says what this model predicts.{% endif %}

- A1111: sampler `Euler`, schedule type `SGM Uniform`.
  {%- if zero_snr %} Noise schedule for sampling: `Zero Terminal SNR`.{% endif %}

"""
"""How a text-to-image model is used in two programs whose steps, with these settings, are those of DDIM."""


def scheduler_line(config: CheckpointConfig) -> str:
    """The line of Python that gives a pipeline of diffusers the steps and the prediction of a model."""
    words = {
        "prediction_type": json.dumps({"eps": "epsilon", "v": "v_prediction", "x": "sample"}[config.prediction]),
        "rescale_betas_zero_snr": bool(config.schedule.get("zero_snr")),
        "timestep_spacing": '"trailing"',
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    lines = "".join(f"    {key}={value},\n" for key, value in words.items())
    return f"pipe.scheduler = DDIMScheduler.from_config(\n    pipe.scheduler.config,\n{lines})"


def text_usage(words: str, program: str, config: CheckpointConfig, *, needs_node: bool, **values: Any) -> str:
    """A program for diffusers and the settings of ComfyUI and A1111.

    Args:
        needs_node: whether ComfyUI does not know what the model predicts.
    """
    values["subject"] = "class_labels=[0]" if diffusers_class(config.network_config) == DIT else '"a red fox"'
    if family_of(config) is None:
        line = "" if isinstance(config.family, Flow) else scheduler_line(config)
        return _fenced(words, program, {**values, "scheduler": line, "arguments": transformer_call(config)})
    zero_snr = bool(config.schedule.get("zero_snr"))
    call = f", num_inference_steps={config.num_timesteps}, guidance_scale=0" if is_student(config) else ""
    node = f"Node `ModelSamplingDiscrete` with `v_prediction` and zsnr {'on' if zero_snr else 'off'}"
    settings = {
        "steps": config.num_timesteps if is_student(config) else 0,
        "guidance": (
            f"it has learned the guidance scale {config.guidance_scale:g}"
            if config.guidance_scale
            else "it was distilled without guidance"
        ),
        "node": node if needs_node and config.prediction == "v" else "",
        "zero_snr": zero_snr,
    }
    values = {**values, "scheduler": scheduler_line(config), "arguments": call}
    shown = TEMPLATES.from_string(SETTINGS).render(**settings)
    return f"{_fenced(words, program, values)}\n{shown}"


def lora_usage(name: str, layout: str, config: CheckpointConfig) -> str:
    """For `name`, a LoRA in one of the layouts of `vdiff.interop.lora`."""
    words = {
        DIFFUSERS: "A LoRA with diffusers' tensor names. ComfyUI and A1111 need kohya's names (--format kohya).",
        "kohya": "A LoRA with the tensor names of kohya's sd-scripts, for ComfyUI, A1111 and diffusers.",
        "peft": "A LoRA as a peft folder.",
    }[layout]
    if family_of(config) is None:
        words = f"A LoRA in the layout of {layout}. BASE is the model that it was trained on."
    else:
        words += f" BASE is the model that it was trained on. Use it with {guidance_hint(config)}."
    changes_text = config.adapter is not None and config.adapter.changes_text_encoders
    network = diffusers_part(config.network_config)
    parts = [(network, network), *(encoder_names(config) if changes_text else [])]
    return text_usage(words, LORA, config, needs_node=True, name=name, kind=layout, parts=parts)


def encoder_names(config: CheckpointConfig) -> list[tuple[str, str]]:
    """What a pipeline of diffusers calls each text encoder, and its folder in the layout of peft."""
    count = len(config.network_config.get("text_encoders", []))
    folders = [f"text_encoder_{word}" for word in ("one", "two", "three")] if count > 1 else ["text_encoder"]
    return list(zip(ENCODERS[:count], folders, strict=False))


def single_file_usage(name: str, config: CheckpointConfig, family: Family) -> str:
    """For `name`, a single file of all weights."""
    words = (
        "All parts in one file, for ComfyUI, A1111 (with the `.yaml` beside it) and diffusers. BASE is a pipeline of "
        f"the same architecture, a folder or a name of the hub such as `{family.hub}`, which has the tokenizers. "
        f"Use it with {guidance_hint(config)}. Diffusers needs the line with the scheduler: it does not read the keys "
        "`v_pred` and `ztsnr`."
    )
    knows = family is SDXL  # ComfyUI reads the key v_pred for XL alone
    return text_usage(words, SINGLE_FILE, config, needs_node=not knows, name=name, pipeline=family.pipeline)


def folder_usage(name: str, config: CheckpointConfig) -> str:
    """For `name`, a pipeline folder of a text-to-image model."""
    words = f"With diffusers; vdiff is not needed. Use it with {guidance_hint(config)}."
    scale = sum(config.guidance_range) / 2 + 1 if config.guidance_range else 0
    call = f", num_inference_steps={config.num_timesteps}, guidance_scale={scale:g}" if is_student(config) else ""
    return _fenced(words, FOLDER, {"name": name, "arguments": call})


def transformer_usage(name: str, config: CheckpointConfig) -> str:
    """For `name`, a pipeline folder of a transformer on latents, which draws classes or prompts."""
    words = "With diffusers; vdiff is not needed."
    if is_student(config):
        without = "" if config.guidance_range else " and the guidance scale 1: none"
        words += f" Use exactly {plural(config.num_timesteps, 'step')}{without}."
    subject = '"a red fox"' if config.kind == TEXT else "class_labels=[0]"
    lacks_t5 = diffusers_class(config.network_config) == SD3 and len(encoder_names(config)) == 2
    absent = ", text_encoder_3=None, tokenizer_3=None" if lacks_t5 else ""
    values = {"name": name, "absent": absent, "subject": subject, "arguments": transformer_call(config)}
    return _fenced(words, TRANSFORMER, values)


def transformer_call(config: CheckpointConfig) -> str:
    """The further arguments with which the pipeline of a transformer draws vdiff's pictures; begins with a comma.

    SD3's pipeline spaces its noise levels in another way unless it gets them, and some pipelines draw pictures of 1024
    pixels unless they are told another size.
    """
    steps, name = config.num_timesteps, diffusers_class(config.network_config)
    found = f", num_inference_steps={steps}" if is_student(config) or name == SD3 else ""
    if name == SD3:
        found += f", sigmas=[k / {steps} for k in range({steps}, 0, -1)]"
    if is_student(config) and not config.guidance_range and name != FLUX:
        found += ", guidance_scale=1"
    usual = config.network_config.get("unet", {}).get("config", {}).get("sample_size", SIDE)
    if config.kind == TEXT and list(config.shape[1:]) != [usual, usual]:
        height, width = (LATENT_FACTOR * size for size in config.shape[1:])
        found += f", height={height}, width={width}"
    if name == PIXART:
        found += ", clean_caption=False, use_resolution_binning=False"
    return found


def weights_usage(name: str, config: CheckpointConfig) -> str:
    """For a folder called `name` with weights and config.json."""
    words, flags = "The weights, and `config.json`, which describes their network.", ""
    if config.kind == TEXT:
        words += " FOLDER is a pipeline of diffusers with the text encoders, tokenizers and autoencoder of the model."
        flags = ' --prompt "a red fox" --components FOLDER'
    if IMAGE in config.signature.names:
        words += " It generates an image from each condition image in FOLDER."
        flags = " --condition FOLDER"
    return f"{words} With vdiff installed:\n\n    vdiff sample --checkpoint {shlex.quote(name)}{flags}\n"


def onnx_usage(name: str, config: CheckpointConfig, options: GraphOptions) -> str:
    """For `name`, an ONNX file."""
    words = f"ONNX, for any batch size: {_in_words(config, options)}"
    given = _inputs(config, options, classes="np.arange({n}) % {c}", guidance="np.full({n}, {w}, np.float32)")
    inputs = ", ".join(f'"{key}": {value}' for key, value in given.items())
    program = ONNX_SAMPLER if options.sampler else ONNX_EVALUATION
    return _program(words, program, name, config, options, inputs=inputs, clipped="np.clip(x, -1, 1)")


def torch_usage(name: str, config: CheckpointConfig, options: GraphOptions) -> str:
    """For `name`, a `torch.export` program."""
    words = f"A `torch.export` program, for any batch size: {_in_words(config, options)}"
    given = _inputs(config, options, classes="torch.arange({n}) % {c}", guidance="torch.full(({n},), {w})")
    inputs = ", ".join(f"{key}={value}" for key, value in given.items())
    program = TORCH_SAMPLER if options.sampler else TORCH_EVALUATION
    return _program(words, program, name, config, options, inputs=inputs, clipped="x.clamp(-1, 1)")


def diffusers_usage(name: str, config: CheckpointConfig, call: Mapping[str, Any], *, pipeline: str, clip: bool) -> str:
    """For a pipeline folder called `name`, called with the arguments `call`; empty: it needs a class."""
    values = {
        "name": name,
        "pipeline": pipeline,
        "arguments": ", ".join(f"{key}={value}" for key, value in call.items()),
        "classes": config.signature.num_classes + bool(config.signature.null),
        "shape": _shape(config).rstrip(")"),
        "steps": config.num_timesteps,
        "clipped": ", use_clipped_model_output=True" if clip else "",
    }
    steps = "the model's number of steps" if config.parameterisation else "any number of steps that divides the model's"
    words = f"With diffusers; vdiff is not needed. Use {steps}."
    return _fenced(words, PIPELINE, values)


def _in_words(config: CheckpointConfig, options: GraphOptions) -> str:
    """What the file is, with its inputs and outputs."""
    takes = config.signature
    names = ["`noise` (B, C, H, W)"] if options.sampler else ["`z` (B, C, H, W)", "`label` (B,)"]
    if takes.num_classes:
        none = f", {takes.null[CLASSES]}: no class" if CLASSES in takes.null else ""
        names.append(f"`classes` (B,) int64, 0 to {takes.num_classes - 1}{none}")
    if takes.takes_guidance or options.guided:
        limits = " from {:g} to {:g}".format(*config.guidance_range) if config.guidance_range else ""
        names.append(f"`guidance` (B,), weights w{limits}")
    steps = plural(options.num_steps, "step")
    what = f"the whole sampler, DDIM in {steps}" if options.sampler else "one evaluation of the network"
    if not options.sampler and options.num_steps <= MAX_GRID:
        what += f"; its metadata `grid` holds the constants of each step for a sampler of {steps}"
    return f"{what}. {'; '.join(names)} → `{options.results}` (B, C, H, W), float32."


def _shape(config: CheckpointConfig) -> str:
    return f"({', '.join(map(str, (IMAGES, *config.shape)))})"


def _inputs(config: CheckpointConfig, options: GraphOptions, *, classes: str, guidance: str) -> dict[str, str]:
    """The graph's inputs by name, each as an expression of the program."""
    takes = config.signature
    found = {"noise": "noise"} if options.sampler else {"z": "z", "label": "label"}
    if takes.num_classes:
        found["classes"] = classes.format(n=IMAGES, c=takes.num_classes)
    if takes.takes_guidance or options.guided:
        found["guidance"] = guidance.format(
            n=IMAGES, w=float(config.guidance_range[0]) if config.guidance_range else 1.0
        )
    return found


def _program(
    words: str, template: str, name: str, config: CheckpointConfig, options: GraphOptions, **values: str
) -> str:
    """The text, and the program if the file contains all that it needs."""
    if not options.sampler and options.num_steps > MAX_GRID:
        return words
    return _fenced(
        words, template, {**values, "name": json.dumps(name), "shape": _shape(config), "output": options.output}
    )


def _fenced(words: str, template: str, values: Mapping[str, Any]) -> str:
    """The text, and below it the program in Markdown."""
    return f"{words}\n\n```python\n{TEMPLATES.from_string(template).render(count=IMAGES, **values).rstrip()}\n```\n"
