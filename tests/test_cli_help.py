"""`--help` and `--help_all`: immediate, in 80 columns, the second complete and the same as docs/commands.md; choices
are the registries, and every option is used."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from tests.commands import PROGRAMS, ROOT, done, error, start
from tests.drawing import write_guided
from tests.toy import UNET, write_checkpoint, write_dataset
from vdiff.cli import main, prepare, sample
from vdiff.cli.options import GroupedOption, OneOf
from vdiff.data import conversion
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.grids import GRIDS
from vdiff.diffusion.parameterisation import PARAMETERISATIONS
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.diffusion.schedules import SCHEDULES
from vdiff.diffusion.weighting import LOSSES, OUTPUT, WEIGHTINGS
from vdiff.distributed import pick_device
from vdiff.errors import OptionError
from vdiff.files import parse
from vdiff.models.checkpoint import read_config
from vdiff.models.speed import DTYPES
from vdiff.sampling.outputs import FORMATS, SOUND_FORMATS
from vdiff.settings import parameters
from vdiff.training import config
from vdiff.training.config import DistillConfig, LoopConfig, TrainConfig, settings_of
from vdiff.training.engine import MIXED
from vdiff.training.presets import DISTILLING, FINE_TUNING, PRESETS, WRITTEN

SCRIPTS = {name: program for name, program in PROGRAMS.items() if name != "vdiff"}
SETTINGS: dict[str, type[LoopConfig]] = {"train.py": TrainConfig, "distill.py": DistillConfig}
HEAVY = ["torch", "torchvision", "numpy", "PIL", "rich", "accelerate", "safetensors", "lmdb", "sklearn", "tensorboard"]
every_script = pytest.mark.parametrize("name", SCRIPTS)


def options(name: str) -> list[click.Option]:
    return [param for param in SCRIPTS[name].params if isinstance(param, click.Option)]


# The text


COMMANDS = {"vdiff": main.main, **SCRIPTS}
for parent, name in [("vdiff", name) for name in main.COMMANDS]:
    COMMANDS[f"{parent} {name}"] = each = main.main.get_command(click.Context(main.main), name)
    COMMANDS |= {f"{parent} {name} {sub}": below for sub, below in getattr(each, "commands", {}).items()}
READ_ALL = """
import contextlib, io, json, runpy, sys
found = {}
for line in json.loads(sys.argv[1]):
    program, *words = line.split()
    sys.argv, code = line.split(), None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            if program == "vdiff":
                from vdiff.cli.main import main
                main()
            else:
                runpy.run_path(f"{ROOT}/{program}", {}, "__main__")
        except SystemExit as end:
            code = end.code
    found[line] = [code, sorted(HEAVY & {*sys.modules}), said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter prints as help of all commands: exit code, large libraries that are loaded, text."""
    lines = [f"{line} {flag}" for line in COMMANDS for flag in ("--help", "--help_all")]
    process = subprocess.run(
        [sys.executable, "-c", f"ROOT, HEAVY = {str(ROOT)!r}, {set(HEAVY)}\n{READ_ALL}", json.dumps(lines)],
        cwd=tmp_path_factory.mktemp("helps"), env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.stderr == ""
    return parse(process.stdout)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_help_is_immediate_and_fits(line, helps):
    """It is printed whole, with none of the large libraries, which take seconds, in lines of at most 80 columns."""
    for flag in ("--help", "--help_all"):
        code, heavy, text = helps[f"{line} {flag}"]
        assert (code, heavy) == (0, [])
        assert text.startswith(f"Usage: {line} [OPTIONS]")
        assert [row for row in text.splitlines() if len(row) > 80 or re.search(r"^  .*\w\.\.\.$", row)] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_the_first_view_is_short_and_the_second_has_all(line, helps):
    first, every = (listed(helps[f"{line} {flag}"][2]) for flag in ("--help", "--help_all"))
    assert len(first) <= 25
    assert first == [name for name in every if name in first]
    command = COMMANDS[line]
    shown = {param.opts[0] for param in command.params if isinstance(param, click.Option) and not param.hidden}
    names = {f"--{name}" for name in getattr(command, "first", ())}
    assert {*every} == shown | {"--help"} | ({"--help_all"} if names else set())
    assert {*first} == (names | {"--help", "--help_all"} if names else {*every})


def listed(text: str) -> list[str]:
    """The options of a help text, by their first long name."""
    options = re.split(r"^\w+:$", text, maxsplit=1, flags=re.MULTILINE)[1]  # after the first heading
    return re.findall(r"^  (?:-\w, )?(--\w+)", options, re.MULTILINE)


def test_the_scripts_are_thin(tmp_path):
    for name in SCRIPTS:
        assert len((ROOT / name).read_text().splitlines()) <= 6
    stdout, stderr = start("python -m vdiff sample --help", tmp_path).communicate(timeout=60)
    assert stderr == ""
    text = done("sample.py --help").stdout.replace("Usage: sample.py", "Usage: python -m vdiff sample")
    assert "".join(stdout.split()) == "".join(text.split())  # only the lines may be of another length


@every_script
def test_everything_is_said_in_the_help(name):
    text = done(f"{name} --help_all").stdout
    for option in options(name):
        for spelling in option.opts:  # whole: --num is not there because --num_timesteps is
            is_said = re.search(rf"^  (-.*, )?{spelling}[ ,]", text, re.MULTILINE) is not None
            assert is_said != (option.hidden or spelling in getattr(option, "old", ())), spelling
        assert option.help is not None
        assert option.help.endswith(".")
    assert done(f"{name} --help-all").stdout == text
    assert done(f"{name} -h").stdout == done(f"{name} --help").stdout
    examples = text.partition("\nExamples:\n")[2].splitlines()
    assert examples
    assert all(example.startswith(f"  python {name}") for example in examples)


@every_script
def test_the_examples_in_the_help_are_understood(name):
    """Every option in them exists and takes its value."""
    program: Any = SCRIPTS[name]
    for example in program.examples:
        words = example.partition("#")[0].split()
        assert words[:2] == ["python", name]
        program.make_context(name, words[2:]).close()


def test_the_documentation_is_what_the_commands_print(monkeypatch):
    for key in [key for key in os.environ if key.startswith("VDIFF_")]:
        monkeypatch.delenv(key)
    written = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(ROOT / "docs/make_commands.py"))["page"]()
    assert written == page, "run `python docs/make_commands.py`"
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## python prepare_data.py", "## python train.py", "## python distill.py", "## python sample.py",
        *(f"## vdiff {name}" for name in main.COMMANDS if name not in ("prepare", "train", "distill", "sample")),
    ]  # fmt: skip
    for name in SCRIPTS:
        section = page.partition(f"## python {name}\n")[2].partition("```text\n")[2].partition("\n```")[0]
        text = done(f"{name} --help_all").stdout.replace("Usage: ", "Usage: python ")
        assert "".join(section.split()) == "".join(text.split())  # only the lines are of another length


# Choices


def test_choices_are_the_registries():
    """They are spelled out where the registry would bring large libraries into the help."""
    assert conversion.FORMATS.keys() == set(prepare.FORMATS)
    assert conversion.CROPS.keys() == set(prepare.CROPS)
    assert conversion.RESAMPLES.keys() == set(prepare.RESAMPLES)
    assert tuple(sample.DEVICES) == config.DEVICES
    assert tuple(sample.PRECISIONS) == config.PRECISIONS == ("auto", *DTYPES)
    assert tuple(sample.SUFFIXES) == (*FORMATS, *SOUND_FORMATS)
    assert MIXED.keys() | {"auto"} == set(config.PRECISIONS)
    assert {path.stem for path in (ROOT / "vdiff/presets").glob("*.toml")} == {*WRITTEN, *FINE_TUNING, *DISTILLING}
    for device in config.DEVICES:
        with suppress(OptionError):  # another machine has it
            assert pick_device(device).type in ({device} if device != "auto" else set(config.DEVICES) - {"auto"})


@every_script
def test_every_choice_offered_is_a_registry(name):
    registries = {
        "prediction": PREDICTION_TYPES,
        "schedule": SCHEDULES,
        "weighting": (*WEIGHTINGS, OUTPUT),
        "parameterisation": PARAMETERISATIONS,
        "method": METHODS,
        "sampler": SAMPLERS,
        "preset": (*PRESETS, *(DISTILLING if name == "distill.py" else FINE_TUNING)),
        "lr_schedule": config.LR_SCHEDULES,
        "optimizer": config.FLOATS_PER_WEIGHT,
        "device": config.DEVICES,
        "precision": config.PRECISIONS,
        "tracker": config.TRACKERS,
        "then": [name for name in METHODS if name not in ("guided", "match")],
        "recipe": ("vdiff", "paper"),
        "flow": ("teacher", "data"),
        "gap_weight": ("angle", "sigma", "none"),
        "loss": LOSSES,
        "times": config.TIMES,
        "path_sampler": ["auto", *(name for name in SAMPLERS if name not in ("ddpm", "consistency", "clipped"))],
        "frame": ("v", "eps"),
        "image_format": conversion.FORMATS,
        "crop": conversion.CROPS,
        "resample": conversion.RESAMPLES,
        "channels": ("1", "2", "3"),
        "kind": ("image", "audio"),
        "grid": GRIDS,
        "image_store": (*FORMATS, *SOUND_FORMATS),
    }
    for option in options(name):
        if isinstance(option.type, click.Choice):
            assert isinstance(option.type, OneOf)
            assert list(option.type.choices) == list(registries[str(option.name)])


# Options


@every_script
def test_every_option_has_its_variable_in_the_environment(name):
    for option in options(name):
        assert option.opts[0].startswith("--")
        assert isinstance(option, GroupedOption)
        assert option.envvar == [f"VDIFF_{name[2:].upper()}" for name in (option.opts[0], *option.old)]


def read_names(function: Callable[..., Any]) -> Iterator[str]:
    """The names that the body of a function reads."""
    (tree,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(tree, ast.FunctionDef)
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield node.id


@every_script
def test_every_option_is_a_parameter_that_the_command_reads(name):
    callback = SCRIPTS[name].callback
    assert callback is not None
    read = set(inspect.signature(callback).parameters)
    of_settings = {key for key in settings_of(SETTINGS[name]) if key != "unet"} if name in SETTINGS else set()
    if name == "sample.py":
        of_settings = {key for kind in SAMPLERS.values() for key in parameters(kind)}
    names = {str(param.name) for param in SCRIPTS[name].params}
    assert names == (read - {"flags"}) | of_settings
    assert read <= set(read_names(callback))


def test_every_setting_is_read_somewhere():
    """As `config.lr`, in training or at the command line; `image_size` chooses the images before there is a config."""
    read = {"image_size"}
    read.add("recipe")  # chooses the method's settings before there is a config
    for path in [*(ROOT / "vdiff/training").glob("*.py"), *(ROOT / "vdiff/cli").glob("*.py")]:
        holder = "self" if path.name == "config.py" else "config"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == holder:
                read.add(node.attr)
    for kind in SETTINGS.values():
        unread = [item.name for item in fields(kind) if item.metadata and item.name not in read]
        assert not unread, f"settings of {kind.__name__} that are asked for and never used"


@pytest.mark.parametrize("registry", [METHODS, SAMPLERS])
def test_every_parameter_of_a_class_is_read_by_it(registry):
    """As `self.addim`, in the class or one that it is made of; two of methods by what trains a stage."""
    of_stages = {"self_ema": "method.self_ema", "then": 'method_settings["then"]'}
    training = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "vdiff/training").glob("*.py"))
    for kind in registry.values():
        source = "".join(inspect.getsource(base) for base in kind.__mro__ if base.__module__.startswith("vdiff."))
        for name in parameters(kind):
            is_read = of_stages[name] in training if name in of_stages else f"self.{name}" in source
            assert is_read, f"{kind.__name__}.{name} is asked for and never used"


# values that no default or preset gives
LOOP_VALUES = {
    "threads": "1",
    "num_iters": "2",
    "batch_size": "3",
    "grad_accum": "3",
    "lr": "0.125",
    "lr_schedule": "cosine",
    "warmup_iters": "9",
    "weight_decay": "0.25",
    "clip_norm": "0.5",
    "ema": "0.75",
    "ema_images": "8.0",
    "ema_more": "0.5,0.25",
    "ema_profiles": "True",
    "ema_interval": "19",
    "weighting": "min_snr",
    "snr_gamma": "2.5",
    "dropout": "0.625",
    "flip": "True",
    "log_interval": "11",
    "sample_interval": "17",
    "ckpt_interval": "13",
    "max_bad_steps": "7",
    "keep_last": "2",
    "keep_every": "15",
    "tracker": "none",
    "checkpointing": "True",
    "seed": "14",
    "device": "cpu",
    "precision": "bf16",
    "compile": "False",
    "num_workers": "5",
    "ema_remainder": "0.25",
    "loss": "huber",
    "times": "importance",
}
TRAIN_VALUES = {
    **LOOP_VALUES,
    "image_size": "72",
    "prediction": "x",
    "schedule": "linear",
    "zero_snr": "True",
    "num_timesteps": "64",
    "class_conditional": "False",
    "flip": "False",
    "fsdp": "True",
    "offset_noise": "0.125",
    "input_perturbation": "0.25",
}
FAMILY_VALUES = {
    "edm": {"sigma_data": "0.25", "noise_mean": "-1.0", "noise_std": "1.5"},
    "flow": {"flow_shift": "3.0", "noise_mean": "0.5", "noise_std": "0.75"},
}
"""Of train.py, where the parameterisation is another one."""
CAPTION_VALUES = {
    "caption_dropout": "0.25",
    "caption_shuffle": "True",
    "caption_keep_tokens": "1",
    "caption_prefix": "emoji",
}
BASE_VALUES = ("lora", "train_text_encoder", "text_encoder_lr", "random_crop", "vae", "sample_prompts")
"""Of fine-tunings: tests/test_text_training.py."""
DISTILL_VALUES = {
    **LOOP_VALUES,
    "phases": "4,2",
    "teacher_steps": "4",
    "method": "progressive",
    "recipe": "paper",
    "last_factor": "1.5",
    "class_dropout": "0.25",
    "check_images": "0",
    "distance_images": "4",
    "distance_every": "2",
    "max_regression": "20.0",
    "retries": "0",
}
OWN_VALUES = {
    "guided": {"then": "tract", "guidance_range": "0,2"},
    "tract": {"self_ema": "0.25"},
    "consistency": {"first_steps": "8", "addim": "0.5"},
    "trajectory": {"path_steps": "8", "path_sampler": "heun", "path_threshold": "0.9"},
    "scm": {"tangent_norm": "0.5", "adaptive_weight": "True", "flow": "data", "tangent_warmup": "0.25"},
    "ect": {"proposal": "-1.0,1.5", "gap_ratio": "4.0", "gap_stages": "3", "gap_weight": "none"},
    "meanflow": {"flow_share": "0.25", "loss_power": "1.0"},
}
"""Of distill.py, where a method reads them alone."""


def as_typed(values: dict[str, str], how: str) -> tuple[str, dict[str, str]]:
    """The values as flags, or as variables of the environment."""
    if how == "flags":
        return " ".join(f"--{key} {value}" for key, value in values.items()), {}
    return "", {f"VDIFF_{key.upper()}": value for key, value in values.items()}


@pytest.mark.parametrize("how", ["flags", "environment"])
def test_every_flag_of_train_reaches_the_run(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {item.name for item in fields(TrainConfig) if item.metadata} == {
        *TRAIN_VALUES, "data", "preset", "class_dropout", "base", "optimizer",
        *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), *CAPTION_VALUES, *BASE_VALUES,
        "parameterisation", *(key for values in FAMILY_VALUES.values() for key in values),
    }  # fmt: skip

    quick = "--preset imagenet64 --dry_run --all"

    def shown(words: str, env: dict[str, str]) -> dict[str, str]:
        result = done(f"train.py {quick} {words}", env)
        rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        rows["schedule"] = rows["schedule"].split()[1].rstrip(",")
        return {key: rows[key] for key in TRAIN_VALUES}

    usual = shown("", {})
    assert [key for key in TRAIN_VALUES if usual[key] == TRAIN_VALUES[key]] == []
    assert shown(*as_typed(TRAIN_VALUES, how)) == TRAIN_VALUES
    for family, values in FAMILY_VALUES.items():
        words, env = as_typed({"parameterisation": family, **values}, how)
        rows = dict(re.findall(r"^(\w+) +(\S+)$", done(f"train.py {quick} {words}", env).stdout, re.MULTILINE))
        assert {key: rows[key] for key in ("parameterisation", *values)} == {"parameterisation": family, **values}
    for key, value in {**CAPTION_VALUES, "sample_prompts": "prompts.txt"}.items():  # of networks that are told a text
        said = error(f"train.py --preset imagenet64 --dry_run --{key} {value}", 2)
        assert f"--{key} {value}: the network does not use captions" in said
    told = done("train.py --preset imagenet64 --dry_run --all --class_dropout 0.25").stdout  # which needs classes
    assert re.search(r"^class_dropout +0\.25$", told, re.MULTILINE)
    assert re.search(r"^unet\.null_class +True$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("old", "new", "recorded"),
    [
        ("--ema_images 5e5", "--ema 500000", {"ema": 0.9999, "ema_images": 5e5}),
        ("--ema_remainder 0.001", "--ema 0.1%", {"ema_remainder": 0.001}),
        ("--ema 0.5", "--ema 0.5", {"ema": 0.5, "ema_images": 0.0, "ema_remainder": 0.0}),
        ("--ema_profiles True", "--ema_more profiles", {"ema_profiles": True, "ema_more": ""}),
        ("--ema_profiles True --ema_more 0.5,0.6", "--ema_more 0.5,profiles,0.6", {"ema_more": "0.5,0.6"}),
    ],
)
def test_an_old_spelling_means_the_same(old, new, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [done(f"train.py --preset imagenet64 --dry_run --all {words}").stdout for words in (old, new)]
    assert texts[0] == texts[1]
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in texts[1].splitlines())
    assert {key: rows[key] for key in recorded} == {key: str(value) or "none" for key, value in recorded.items()}


@pytest.mark.parametrize("how", ["flags", "environment"])
def test_every_flag_of_distill_reaches_the_run(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = {"base", "data", "preset", "stages", "to_steps", "student_config", "fsdp", "optimizer"}
    of_lora = {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    of_text = {"prompts", "guidance_scale", "sample_prompts", *of_lora, *CAPTION_VALUES}
    own = {key for values in OWN_VALUES.values() for key in values}
    assert settings_of(DistillConfig).keys() == {*DISTILL_VALUES, *left, *of_text, *own}
    write_dataset(Path("data/toy_4"))
    write_checkpoint(Path("teacher"))
    words, env = as_typed(DISTILL_VALUES, how)
    done(f"distill.py --base teacher --out student {words}", env)
    recorded = tomllib.loads(Path("student/run.toml").read_text())["distill"]
    assert {key: str(recorded[key]) for key in DISTILL_VALUES} == DISTILL_VALUES
    assert read_config(Path("student")).num_iters == 3  # twice 1.5
    for key, value in {**CAPTION_VALUES, "sample_prompts": "prompts.txt"}.items():
        assert f"--{key}" in error(f"distill.py --base teacher --out other {words} --{key} {value}", 2, env)


@pytest.mark.parametrize("how", ["flags", pytest.param("environment", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", OWN_VALUES)
def test_every_flag_of_a_method_reaches_the_run(method, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy_4"), classes=("cat", "dog"))
    write_checkpoint(
        Path("teacher"),
        unet={**UNET, "in_channels": 1, "out_channels": 1, "num_classes": 2, "null_class": True},
        class_names=["cat", "dog"],
    )
    words, env = as_typed(OWN_VALUES[method], how)
    quick = "--num_iters 1 --batch_size 2 --check_images 0 --device cpu --tracker none --preset toy --report False"
    done(f"distill.py --base teacher --out student --method {method} {quick} {words}", env)
    recorded = tomllib.loads(Path("student/run.toml").read_text())["distill"]
    assert {key: str(recorded[key]) for key in OWN_VALUES[method]} == OWN_VALUES[method]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of classes and guidance, and in `usual` what it draws without a flag."""
    folder = tmp_path_factory.mktemp("flags")
    write_guided(folder / "checkpoints/model", class_names=["cat", "dog", "owl"])
    with chdir(folder):
        done("sample.py --num 3 --out usual")
    return folder


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--sampler ddpm", {"sampler": "ddpm"}),
        ("--clipped_sampling", {"sampler": "clipped"}),
        ("--clipped_sampling --clipping_value 0.5", {"sampler": "clipped", "options": {"clipping_value": 0.5}}),
        ("--clipping_value 0.5", {"options": {"clipping_value": 0.5}}),
        ("--no_clip", {"options": {"clipping_value": None}}),
        ("--eta 0.5", {"options": {"eta": 0.5}}),
        ("--sampler ddpm --large_variance 1", {"sampler": "ddpm", "options": {"large_variance": 1.0}}),
        ("--sampler consistency --renoise 0.5", {"sampler": "consistency", "options": {"renoise": 0.5}}),
        ("--sampler unipc --order 2", {"sampler": "unipc", "options": {"order": 2}}),
        ("--sampler ipndm --order 4", {"sampler": "ipndm", "options": {"order": 4}}),
        ("--sampler heun --frame eps", {"sampler": "heun", "options": {"frame": "eps"}}),
        ("--sampler dpmpp_3m --curvature 1", {"sampler": "dpmpp_3m", "options": {"curvature": 1.0}}),
        ("--seed 7", {"seed": 7}),
        ("--num_timesteps 4", {"num_steps": 4}),
        ("--time_scale 4", {"num_steps": 2}),
        ("--classes dog", {"classes": [1]}),
        ("--classes 1,cat", {"classes": [1, 0]}),
        ("--sampler dpmpp_2m --grid logsnr", {"sampler": "dpmpp_2m", "grid": "logsnr"}),
        ("--dynamic_threshold 0.5", {"options": {"threshold": 0.5}}),
        ("--guidance 1.5", {"guidance": 1.5}),
        ("--guidance 1.5 --guidance_interval 0.2,0.7", {"guidance": 1.5, "guidance_interval": [0.2, 0.7]}),
        ("--interpolate 4 1", {"path": [4, 1, 3]}),
        ("--precision bf16", {"precision": "bf16"}),
        ("--precision fp32", {}),
        ("--device cpu", {}),
        ("--batch_size 1", {}),
        ("--trajectory", {}),
        ("--format png", {}),
    ],
)
def test_every_flag_of_sample_reaches_the_images(words, changed, usual, tmp_path, monkeypatch):
    monkeypatch.chdir(usual)
    done(f"sample.py --num 3 --out {tmp_path}/other {words}")
    records, images = [], []
    for out in (usual / "usual", tmp_path / "other"):
        records.append(parse((out / "samples.json").read_text()))
        images.append([path.read_bytes() for path in sorted(out.glob("0*.png"))])
    assert records[1] == {**records[0], **changed}
    assert len(images[1]) == 3
    assert (images[0] != images[1]) == bool(changed)


def test_help_says_where_a_method_has_a_default_of_its_own():
    """The learning rate of tract is not the preset's; train.py has no methods."""
    student = " ".join(done("distill.py --help_all").stdout.split())
    for words in ("by preset, or by method]", "l2, or by method", "linear, or by method", "2.0, or by method"):
        assert words in student
    assert student.count("or by method") == 6
    assert "or by method" not in done("train.py --help_all").stdout
