"""What goes wrong is one line that names the flag or the file and says what to do; and nothing is lost by it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.commands import PROGRAMS, TINY, done, error, run, start, the_error, tree
from tests.toy import write_checkpoint, write_dataset
from vdiff.cli.main import COMMANDS
from vdiff.files import CHECKSUM
from vdiff.models.checkpoint import CONFIG, WEIGHTS

FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, checkpoints of many kinds, runs half done and done, samples; made once."""
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_dataset(Path("data/toy_4"))
        write_dataset(Path("other/colour"), channels=3)
        write_dataset(Path("other/classes"), classes=("cat", "dog"))
        write_dataset(Path("other/animals"), classes=("cow", "dog"))
        write_dataset(Path("other/more"), count=11)
        Path("file").write_text("text")
        Path("empty").mkdir()
        Path("photos").mkdir()
        Path("photos/notes.txt").write_text("text")
        Path("tiny.toml").write_text(TINY)
        write_checkpoint(Path("checkpoints/base_5"), num_timesteps=16, method="progressive")
        write_checkpoint(Path("checkpoints/base_9"), num_timesteps=1, method="progressive")
        write_checkpoint(Path("checkpoints/odd"), num_timesteps=15)
        write_checkpoint(Path("checkpoints/table"), num_timesteps=12, schedule={"name": "linear", "num_levels": 12})
        write_checkpoint(Path("checkpoints/eps"), prediction="eps")
        write_checkpoint(Path("checkpoints/classes"), classes=2, class_names=["cat", "dog"])
        write_checkpoint(Path("checkpoints/large"), image_size=64)
        done("train.py --config tiny.toml --out checkpoints/original")
        done("train.py --config tiny.toml --out checkpoints/linear --lr_schedule linear")
        done("distill.py --base checkpoints/original --config tiny.toml")
        done("sample.py --checkpoint checkpoints/base_5 --num 2 --out samples/mine")
        shutil.copytree("checkpoints/original", "checkpoints/half")
        describe("checkpoints/half", lambda text: text.replace('"num_iters": 4', '"num_iters": 2'))
        shutil.copytree("checkpoints/half", "checkpoints/stateless")
        shutil.rmtree("checkpoints/stateless/state")
        for name, change in DAMAGES.items():
            shutil.copytree("checkpoints/base_5", f"checkpoints/{name}")
            change(Path("checkpoints", name))
    return folder


def describe(folder: str | Path, change: Callable[[str], str]) -> None:
    """Change the text of a checkpoint's config.json, as somebody who deletes its checksum."""
    path = Path(folder, CONFIG)
    before = re.sub(rf'\s+"{CHECKSUM}": "\w+",', "", path.read_text())
    path.write_text(change(before))
    assert path.read_text() != before


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "hollow": lambda folder: (folder / WEIGHTS).unlink(),
    "void": lambda folder: cut(folder, WEIGHTS, 0),
    "beheaded": lambda folder: cut(folder, WEIGHTS, 100),
    "truncated": lambda folder: cut(folder, WEIGHTS, -8),
    "foreign": lambda folder: describe(folder, lambda text: text.replace('"channels": 4', '"channels": 8')),
    "torn": lambda folder: cut(folder, CONFIG, 100),
    "listed": lambda folder: (folder / CONFIG).write_text("[]"),
    "strange": lambda folder: describe(folder, lambda text: text.replace('"method"', '"methode"')),
    "lacking": lambda folder: describe(folder, lambda text: text.replace('"prediction": "v",', "")),
    "newer": lambda folder: describe(folder, lambda text: text.replace('_version": 1', '_version": 99')),
    "wordy": lambda folder: describe(folder, lambda text: text.replace('"image_size": 4', '"image_size": "4"')),
}


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `furnished`, the working folder."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"
TRAIN = "train.py --config tiny.toml --out new"
DISTILL = "distill.py --config tiny.toml --base checkpoints"
SAMPLE = "sample.py --num 2 --out new --checkpoint checkpoints"
HELP = "; see {} --help"

# a command line, its exit code, how its error begins, and (after "…") what else it says
CASES = [
    # paths
    ("prepare_data.py photo", FAILED, "photo: no such file or folder; did you mean photos?"),
    ("prepare_data.py empty", FAILED, "no images in empty; give a folder or an archive with image files"),
    ("prepare_data.py photos", FAILED, "no images in photos; it holds 1 .txt; give a folder or an archive"),
    ("prepare_data.py file", FAILED, "file is not a folder, zip, tar or dataset; give a folder of images"),
    ("prepare_data.py --out file", FAILED, "file exists and is not a dataset that vdiff wrote; choose another --name"),
    ("prepare_data.py --out file/set --num_workers 0", FAILED, "cannot write file/set: Not a directory; "),
    ("prepare_data.py --out data/toy_4", FAILED, "data/toy_4 exists already; give another --name or --out to keep b"),
    ("prepare_data.py --out photos --overwrite", FAILED, "photos exists and is not a dataset that vdiff wrote; "),
    (f"{TRAIN} --data nowhere", FAILED, "nowhere: no such dataset; give the folder that prepare_data.py wrote"),
    (f"{TRAIN} --data empty", FAILED, "empty is not a dataset: it holds no data.mdb; make one of your images: python"),
    (f"{TRAIN} --data file", FAILED, "file is not a dataset: it holds no data.mdb; "),
    ("train.py --config nowhere.toml", USAGE, "nowhere.toml cannot be read: No such file or directory; give --config"),
    ("train.py --config photos", USAGE, "photos cannot be read: Is a directory; give --config a TOML file"),
    ("train.py --config file", USAGE, "file is not TOML: …; correct the file"),
    (f"{TRAIN}/x --out file", FAILED, "file exists and is not a run that vdiff wrote; choose another --out"),
    (f"{TRAIN} --out file/x", FAILED, "cannot write file/x: Not a directory; "),
    (f"{TRAIN} --out photos", FAILED, "photos exists and is not a run that vdiff wrote; choose another --out"),
    (
        f"{TRAIN} --out photos --overwrite", FAILED,
        "photos exists and is not a run that vdiff wrote; choose another --out",
    ),
    (f"{DISTILL}/nowhere", FAILED, "checkpoints/nowhere: no such checkpoint; checkpoints holds base_0, base_5, "),
    ("distill.py --base nowhere/x", FAILED, "nowhere/x: no such checkpoint; run `python train.py` first"),
    ("distill.py --base empty", FAILED, "empty holds no config.json; give a folder that train.py or distill.py wrote"),
    ("distill.py --base file", FAILED, "file is a file; give the checkpoint's folder, the one that holds config.json"),
    (f"{DISTILL}/base_5 --out file", FAILED, "file exists and is not a run that vdiff wrote; choose another --out"),
    (f"{DISTILL}/base_5 --out file/x", FAILED, "cannot write file/x: Not a directory; "),
    (f"{DISTILL}/base_5 --out photos", FAILED, "photos exists and is not a run that vdiff wrote; choose another --out"),
    (f"{DISTILL}/base_5 --data nowhere", FAILED, "nowhere: no such dataset; "),
    (f"{SAMPLE}/nowhere", FAILED, "checkpoints/nowhere: no such checkpoint; checkpoints holds base_0, "),
    ("sample.py --checkpoint empty", FAILED, "empty holds no config.json; give a folder that train.py or distill.py"),
    ("sample.py --checkpoint file", FAILED, "file is a file; give the checkpoint's folder"),
    ("sample.py --checkpoint checkpoints", FAILED, "checkpoints holds no config.json; give one of the checkpoints"),
    ("vdiff inspect checkpoints", FAILED, "checkpoints holds no config.json; give one of the checkpoints"),
    (f"{SAMPLE}/base_5 --out file", FAILED, "file exists and is not a set of samples that vdiff wrote; "),
    (f"{SAMPLE}/base_5 --out file/x", FAILED, "cannot write file/x: Not a directory; "),
    (
        f"{SAMPLE}/base_5 --out photos --overwrite", FAILED,
        "photos exists and is not a set of samples that vdiff wrote; ",
    ),
    # existing output
    ("train.py --config tiny.toml", FAILED, "checkpoints/original exists already (4 of 4 updates); give another --na"),
    (f"{TRAIN} --out checkpoints/half", FAILED, "checkpoints/half exists already (2 of 4 updates); give --resume to "),
    (f"{DISTILL}/odd --teacher_steps 16 --out checkpoints/base_5", FAILED,
     "checkpoints/base_5 holds a model of 16 steps, not 8; give another --name or --out to keep both, or"),
    (f"{DISTILL}/odd --teacher_steps 16 --out checkpoints/base_0", FAILED,
     "checkpoints/base_0 was distilled from another teacher than checkpoints/odd is now; give another --name"),
    (f"{SAMPLE}/original --out samples/mine", FAILED, "samples/mine holds images drawn with other weights; give anoth"),
    (f"{SAMPLE}/base_5 --seed 1 --out samples/mine", FAILED, "samples/mine holds images drawn with seed 0, not 1; giv"),
    (f"{SAMPLE}/base_5 --time_scale 2 --out samples/mine", FAILED, "samples/mine holds images drawn with num_steps 16"),
    (f"{SAMPLE}/base_5 --clipped_sampling --out samples/mine", FAILED, "samples/mine holds images drawn with sampler "),
    # damaged checkpoints
    (f"{SAMPLE}/hollow", FAILED, "checkpoints/hollow/model.safetensors…; "),
    (f"{SAMPLE}/void", FAILED, "checkpoints/void/model.safetensors cannot be read …truncated or damaged; restore the"),
    (f"{SAMPLE}/beheaded", FAILED, "checkpoints/beheaded/model.safetensors cannot be read …truncated or damaged; "),
    (f"{SAMPLE}/truncated", FAILED, "checkpoints/truncated/model.safetensors cannot be read …truncated or damaged; "),
    (f"{SAMPLE}/foreign", FAILED, "checkpoints/foreign/model.safetensors does not fit config.json: …; restore the two"),
    (f"{SAMPLE}/torn", FAILED, "checkpoints/torn/config.json cannot be read: …; restore the file, or train again"),
    (f"{SAMPLE}/listed", FAILED, "checkpoints/listed/config.json cannot be read: it is not a JSON object; restore the"),
    (f"{SAMPLE}/strange", FAILED, "checkpoints/strange/config.json has an unknown key 'methode'; did you mean 'method"),
    (f"{SAMPLE}/lacking", FAILED, "checkpoints/lacking/config.json lacks the key 'prediction'; restore the file, or"),
    (f"{SAMPLE}/newer", FAILED, "checkpoints/newer/config.json has format 99, newer than 1; update vdiff"),
    (f"{SAMPLE}/wordy", FAILED, "checkpoints/wordy/config.json: 'image_size' must be a whole number; restore the file"),
    *[(f"{DISTILL}/{name} --out new", FAILED, f"checkpoints/{name}/…; ") for name in DAMAGES],
    # sizes and data
    ("prepare_data.py --size 0", USAGE, "Invalid value for '--size': 0 is not in the range 1<=x<=4096; see prepare_"),
    ("prepare_data.py --size 5000", USAGE, "Invalid value for '--size': 5000 is not in the range 1<=x<=4096; see "),
    ("prepare_data.py --size 8,x", USAGE, "Invalid value for '--size': 'x' is not a whole number"),
    ("prepare_data.py --size 64x64", USAGE, "Invalid value for '--size': '64x64' …; did you mean 64?; see prepare_da"),
    (f"{TRAIN} --image_size 8x8", USAGE, "Invalid value for '--image_size': '8x8' …; did you mean 8?; see train.py"),
    ("prepare_data.py --quality 90", USAGE, "--quality 90 does not apply to png images; leave it out or give --forma"),
    (
        "prepare_data.py --background whitish", USAGE,
        "--background 'whitish' is not a colour; give a name such as black,",
    ),
    ("prepare_data.py --size", USAGE, "Option '--size' requires an argument; see prepare_data.py --help"),
    (f"{TRAIN} --image_size 8", FAILED, "data/toy_4 has no images of size 8; it has 4; choose one of them or prepare"),
    (f"{TRAIN} --preset lsun128 --config lsun.toml", USAGE,
     "images of 4 pixels do not fit a network of 5 levels: it needs a multiple of 16; prepare another --size, or "),
    (f"{TRAIN} --class_conditional True", USAGE, "--class_conditional: data/toy_4 has no classes; give --class_cond"),
    (f"{DISTILL}/base_5 --data other/colour", USAGE,
     "other/colour has 3 channels, the teacher 1; give --data the dataset that it was trained on"),
    (f"{DISTILL}/classes --data other/animals", USAGE,
     "other/animals has other classes than the teacher; give --data the dataset that it was trained on"),
    (f"{DISTILL}/classes", USAGE, "data/toy_4 has other classes than the teacher; give --data the dataset that it was"),
    (f"{DISTILL}/large", FAILED, "data/toy_4 has no images of size 64; it has 4; choose one of them or prepare again "),
    # steps
    (f"{SAMPLE}/base_5 --time_scale 3", USAGE, "--time_scale 3 does not divide the model's 16 steps; give one that do"),
    (f"{SAMPLE}/base_5 --num_timesteps 5", USAGE,
     "--num_timesteps 5: this model was made for 16 steps, and 5 does not divide them; give a number that does"),
    (f"{SAMPLE}/table --num_timesteps 24", USAGE, "--num_timesteps 24: the linear schedule has 12 levels, too few for"),
    (f"{SAMPLE}/table --time_scale 5", USAGE, "--time_scale 5 does not …; give one that does, or --num_timesteps 2"),
    (f"{SAMPLE}/base_5 --num_timesteps 8 --time_scale 2", USAGE, "--num_timesteps and --time_scale both set the numb"),
    (f"{DISTILL}/odd", USAGE, "15 steps cannot be halved; give --to_steps or --phases"),
    (f"{DISTILL}/base_9", USAGE, "checkpoints/base_9 already needs only 1 step; distil another "),
    (f"{DISTILL}/base_5 --to_steps 16", USAGE, "--to_steps 16: the teacher already takes 16; give less than 16"),
    (f"{DISTILL}/base_5 --to_steps 3", USAGE, "16 steps cannot become 3: only a smaller divisor can follow"),
    (f"{DISTILL}/base_5 --stages 5", USAGE, "--stages 5: 16 steps cannot be halved so often; give --to_steps"),
    (f"{DISTILL}/table --phases 10,4,1", USAGE,
     "--phases 10,4,1: 10 steps cannot become 4: …; the nearest that fits is --phases 10,5,1"),
    (f"{DISTILL}/base_5 --stages 0", USAGE, "Invalid value for '--stages': 0 is not in the range x>=1; see distill.py"),
    (f"{DISTILL}/base_5 --stages 1 --to_steps 8", USAGE, "--to_steps and --stages set the same thing; give one"),
    (f"{DISTILL}/base_5 --stages 2 --out new", USAGE, "--out names one student, but this ladder has 2; leave --out ou"),
    (f"{DISTILL}/base_5 --teacher_steps 8", USAGE, "--teacher_steps 8: checkpoints/base_5 was distilled for 16 steps;"),
    (f"{DISTILL}/table --teacher_steps 16", USAGE, "--teacher_steps 16: the linear schedule has 12 levels, too few "),
    (f"{DISTILL}/base_5 --out checkpoints/../checkpoints/base_5 --overwrite", USAGE,
     "--out checkpoints/../checkpoints/base_5 is the teacher itself; choose another --out"),
    # the eps-prediction
    (f"{DISTILL}/eps --method guided", USAGE, "--method guided: checkpoints/eps was trained only with classes …;"),
    (f"{SAMPLE}/eps --no_clip", USAGE, "--no_clip: an eps-prediction at zero signal …; leave --no_clip out"),
    (f"{TRAIN} --prediction eps --weighting truncated_snr", USAGE, "truncated_snr cannot weight an eps-prediction: …;"),
    # options, choices, commands
    ("train.py --num_itres 3", USAGE, "unknown option --num_itres; did you mean '--num_iters'?; see train.py --help"),
    ("train.py --epochs 3", USAGE, "unknown option --epochs; did you mean '--num_iters'?; see train.py --help"),
    ("train.py --learning-rate 3", USAGE, "unknown option --learning_rate; did you mean '--lr'?; see train.py --help"),
    ("sample.py --steps 3", USAGE, "unknown option --steps; did you mean '--num_timesteps'?; see sample.py --help"),
    ("prepare_data.py --resolution 3", USAGE, "unknown option --resolution; did you mean '--size'?; see prepare_data"),
    ("distill.py --teacher x", USAGE, "unknown option --teacher; did you mean '--base'?; see distill.py --help"),
    ("vdiff distill --to-step 3", USAGE, "unknown option --to_step; did you mean '--to_steps'?; see vdiff distill --h"),
    ("vdiff destill", USAGE, "unknown command 'destill'; did you mean 'distill'?; see vdiff --help"),
    ("train.py more", USAGE, "Got unexpected extra argument (more); see train.py --help"),
    (f"{TRAIN} --preset digit", USAGE, "Invalid value for '--preset': 'digit' is unknown; did you mean 'digits'?; see"),
    (f"{TRAIN} --preset zzz", USAGE, "Invalid value for '--preset': 'zzz' is unknown; choose from toy, digits, cifar1"),
    (f"{TRAIN} --schedule cosin", USAGE, "Invalid value for '--schedule': 'cosin' is unknown; did you mean 'cosine'?"),
    (f"{SAMPLE}/base_5 --sampler dimm", USAGE, "Invalid value for '--sampler': 'dimm' is unknown; did you mean 'ddim'"),
    ("prepare_data.py --format jpg", USAGE, "Invalid value for '--format': 'jpg' is unknown; did you mean 'jpeg'?; se"),
    (f"{TRAIN} --flip perhaps", USAGE, "Invalid value for '--flip': it accepts True, False or no value, not 'pe"),
    (f"{SAMPLE}/classes --classes cow", USAGE, "--classes: unknown class 'cow'; …cat"),
    (f"{SAMPLE}/classes --classes cats,dog", USAGE, "--classes: unknown class 'cats'; did you mean 'cat'?"),
    (f"{SAMPLE}/classes --classes 2", USAGE, "--classes: unknown class '2'; choose from cat, dog"),
    (f"{SAMPLE}/base_5 --classes 0", USAGE, "--classes: this model has no classes; leave it out"),
    *[(f"{SAMPLE}/base_5 --{option} {value}", USAGE, f"Invalid value for '--{option}': {value}…; see sample.py --help")
      for option, value in [("num", 0), ("batch_size", 0), ("seed", -1), ("num_timesteps", 0), ("time_scale", 0),
                            ("clipping_value", 0.0), ("eta", 1.5)]],
    *[(f"{TRAIN} --{option} {value}", USAGE, f"Invalid value for '--{option}': {value}…; see train.py --help")
      for option, value in [("batch_size", 0), ("num_iters", 0), ("lr", 0.0), ("ema", 1.5), ("dropout", -0.1),
                            ("num_timesteps", 0), ("warmup_iters", -1), ("image_size", 0), ("seed", -1)]],
    # flags that do not go together
    (f"{SAMPLE}/base_5 --clipped_sampling --sampler ddpm", USAGE, "--clipped_sampling and --sampler ddpm exclude each"),
    (f"{SAMPLE}/base_5 --sampler ddpm --eta 1", USAGE, "the sampler ddpm does not use --eta; leave it out, or "),
    (f"{SAMPLE}/base_5 --no_clip --clipping_value 1", USAGE, "--no_clip and --clipping_value exclude each other; give"),
    (f"{SAMPLE}/base_5 --no_clip --clipped_sampling", USAGE, "--no_clip: the clipped sampler always clips; give"),
    ("train.py --resume --overwrite", USAGE, "--resume and --overwrite exclude each other; give one of them"),
    # the machine
    (f"{TRAIN} --device {ABSENT}", USAGE, f"--device {ABSENT}: this machine has no {ABSENT} device; give"),
    (f"{DISTILL}/base_5 --device {ABSENT}", USAGE, f"--device {ABSENT}: this machine has no {ABSENT} device; give"),
    (f"{SAMPLE}/base_5 --device {ABSENT}", USAGE, f"--device {ABSENT}: this machine has no {ABSENT} device; give"),
    # resuming
    ("train.py --resume --out new", FAILED, "new holds no run to resume: it has no run.toml; start it without --resum"),
    ("train.py --resume --out checkpoints/base_0", FAILED, "checkpoints/base_0 holds a student, not a base model; giv"),
    ("train.py --resume --lr 0.5", USAGE, "checkpoints/original was begun with lr 0.001, not 0.5; leave --lr out to r"),
    ("train.py --resume --out checkpoints/half --seed 1", USAGE, "checkpoints/half was begun with seed 0, not 1; leav"),
    ("train.py --resume --out checkpoints/half --preset digits", USAGE, "checkpoints/half was begun with preset toy, "),
    ("train.py --resume --out checkpoints/linear --num_iters 9", USAGE, "checkpoints/linear was begun with num_iters"),
    ("train.py --resume --out checkpoints/half --data other/more", FAILED,
     "checkpoints/half was begun with other images than other/more holds; give --data data/toy_4 as it was"),
    ("train.py --resume --out checkpoints/stateless", FAILED,
     "checkpoints/stateless cannot be resumed: checkpoints/stateless/state/state.safetensors is missing; give anoth"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), CASES, ids=[line for line, _, _ in CASES])
def test_one_line_says_what_is_wrong_and_what_to_do(line, code, words, place):
    Path("lsun.toml").write_text("lr = 0.1\n")
    before = tree(place)
    message = error(line, code)
    beginning, _, rest = words.partition("…")
    assert message.startswith(beginning)
    assert rest in message
    assert tree(place) == before


# text of a configuration file, and how the error goes on after its name
FILES = [
    ("lrr = 1", ": unknown setting 'lrr'; did you mean 'lr'?"),
    ("[train]\nlr = 1", ": unknown setting 'train'; choose from data, preset"),
    ('lr = "fast"', ": lr = 'fast' is not a number; give a number"),
    ("lr = -1", ": lr = -1.0 is too small; it must be above 0"),
    ("num_iters = 1.5", ": num_iters = 1.5 is not a whole number; give a whole number"),
    ("flip = 1", ": flip = 1 is not true or false; give true or false"),
    ("preset = 5", ": preset = 5 is not a string; give a string"),
    ('image_size = "4"', ": image_size = '4' is not a whole number; "),
    ('weighting = "snrr"', ": weighting = 'snrr' is unknown; did you mean 'snr'?"),
    ("unet = 5", ": unet = 5 is not a table; give a table"),
    ("distill = 5", " [distill]: 5 is not a table; correct the file"),
    ("[distill]\nbase = 5", " [distill]: base = 5 is not a string; give a string"),
    ("[distill]\nto_step = 5", " [distill]: unknown setting 'to_step'; did you mean 'to_steps'?"),
    ("lr = ", " is not TOML: "),
    ("lr = 1\nlr = 2", " is not TOML: "),
]


@pytest.mark.parametrize("command", ["train.py", "distill.py --base checkpoints/base_5"])
@pytest.mark.parametrize(("text", "words"), FILES)
def test_a_configuration_file_is_looked_at_as_a_whole(text, words, command, place):
    Path("my.toml").write_text(text)
    before = tree(place)
    assert error(f"{command} --out new --config my.toml", USAGE).startswith(f"my.toml{words}")
    assert tree(place) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chanels = 8", "[unet] unknown UNet option chanels; did you mean 'channels'?"),
        ("num_classes = 8", "[unet] num_classes follows from data and other settings; take it out of the file"),
        ("channels = 8.0", "[unet] channels = 8.0 is of another type; give something like 64"),
        ("num_blocks = true", "[unet] num_blocks = True is of another type; give something like 2"),
        ("multipliers = 2", "[unet] multipliers = 2 is of another type; give something like [1, 2, 2]"),
        ("multipliers = [1.0]", "[unet] multipliers = [1.0] is of another type; "),
        ("multipliers = []", "[unet] multipliers must be whole numbers from 1 up, got (); fix the configuration"),
        ("channels = 0", "[unet] channels must be at least 1, got 0; fix the configuration"),
        (
            "attention_strides = [64]",
            "[unet] attention_strides must be among [1, 2], got [64]; fix the configuration",
        ),
        ('resample = "bock"', "[unet] resample must be block or conv, got 'bock'; fix the configuration"),
    ],
)
def test_a_network_that_cannot_be_built(text, words, place):
    Path("my.toml").write_text(f"[unet]\n{text}\n")
    before = tree(place)
    assert error("train.py --out new --config my.toml", USAGE).startswith(words)
    assert tree(place) == before


@pytest.mark.usefixtures("place")
def test_the_environment_is_refused_as_a_flag_is():
    assert error(TRAIN, USAGE, {"VDIFF_LR": "fast"}).startswith("Invalid value for '--lr'")
    assert error(TRAIN, USAGE, {"VDIFF_PRESET": "digit"}).endswith("did you mean 'digits'?; see train.py --help")
    assert error("vdiff train", USAGE, {"VDIFF_CONFIG": "nowhere.toml"}).startswith("nowhere.toml cannot be read")


def test_without_a_dataset_or_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error("train.py", FAILED) == (
        "no dataset under data/; make one: python prepare_data.py, or python prepare_data.py FOLDER_OF_IMAGES"
    )
    assert error("distill.py", FAILED) == "checkpoints/original: no such checkpoint; run `python train.py` first"
    assert error("sample.py", FAILED).startswith("no checkpoint under checkpoints/; run `python train.py` first, or ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("place")
def test_several_datasets_to_choose_from():
    shutil.copytree("other/more", "data/more")
    for line in (TRAIN, f"{DISTILL}/base_5"):
        assert error(line, FAILED) == "data/ holds several datasets; choose with --data: data/more, data/toy_4"
    write_dataset(Path("data/.unfinished"))
    shutil.rmtree("data/more")
    done(TRAIN)


# What --overwrite would replace stays until it can be replaced


@pytest.mark.parametrize("name", ["void", "foreign", "hollow"])
def test_a_damaged_checkpoint_replaces_nothing(name, place):
    done(f"{DISTILL}/base_5 --out student")
    before = tree(place)
    assert error(f"{DISTILL}/{name} --out student --overwrite", FAILED).startswith(f"checkpoints/{name}/")
    assert error(f"{SAMPLE}/{name} --out samples/mine --overwrite", FAILED).startswith(f"checkpoints/{name}/")
    assert tree(place) == before


@pytest.mark.usefixtures("place")
def test_overwrite_replaces_and_leaves_the_neighbours():
    outside = {name: data for name, data in tree(Path.cwd()).items() if not name.startswith("checkpoints/original")}
    before = Path("checkpoints/original", WEIGHTS).read_bytes()
    done("train.py --config tiny.toml --seed 1 --overwrite")
    assert Path("checkpoints/original", WEIGHTS).read_bytes() != before
    assert {name: data for name, data in tree(Path.cwd()).items() if name in outside} == outside
    done(f"{SAMPLE}/odd --out samples/mine --num 1 --overwrite")
    assert sorted(path.name for path in Path("samples/mine").iterdir()) == ["00000.png", "samples.json"]


@pytest.mark.parametrize("setting", ["--lr 0.5", "--weighting snr", "--num_iters 9"])
def test_a_stage_cut_short_goes_on_with_its_own_settings_alone(setting, place):
    done(f"{DISTILL}/base_5 --ckpt_interval 1")
    student = Path("checkpoints/base_6")
    describe(student, lambda text: text.replace('"num_iters": 3', '"num_iters": 2'))
    before = tree(place)
    name = setting.split()[0].removeprefix("--")
    assert error(f"{DISTILL}/base_5 {setting}", USAGE).startswith(f"checkpoints/base_6 was begun with {name} ")
    assert error(f"{DISTILL}/base_5", FAILED).startswith("checkpoints/base_6 cannot be resumed: checkpoints/base_6/st")
    assert tree(place) == before


@pytest.mark.usefixtures("place")
def test_a_base_run_in_the_place_of_a_student():
    shutil.copytree("checkpoints/half", "checkpoints/base_6")
    Path("checkpoints/base_6", CONFIG).unlink()
    assert error(f"{DISTILL}/base_5", FAILED).startswith(
        "checkpoints/base_6 was begun by train.py; give another --name or"
    )


@pytest.mark.usefixtures("place")
def test_damaged_leftovers():
    Path("samples/mine/00001.png").write_bytes(b"text")
    again = f"{SAMPLE}/base_5 --out samples/mine --num 3"
    assert error(again, FAILED) == "samples/mine/00001.png is damaged; delete it, then run the same command again"
    Path("samples/mine/00001.png").unlink()
    done(again)
    Path("samples/mine/samples.json").write_text("{")
    assert error(again, FAILED) == (
        "samples/mine exists and is not a set of samples that vdiff wrote; choose another --out"
    )
    state = Path("checkpoints/half/state/state.safetensors")
    state.write_bytes(state.read_bytes()[:-9])
    resume = "train.py --resume --out checkpoints/half"
    assert error(resume, FAILED).startswith(f"{state} cannot be read ")
    Path("checkpoints/half/run.toml").write_text("lr = ")
    assert error(resume, USAGE).startswith("checkpoints/half/run.toml is not TOML: ")


# The disk


@pytest.mark.parametrize("line", [TRAIN, f"{DISTILL}/base_5 --out new", f"{SAMPLE}/base_5"])
@pytest.mark.usefixtures("place")
def test_a_disk_without_room(line, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        message = error(line, FAILED)
    assert message.startswith("cannot write new/")
    assert "No space left on device; free space, fix the permissions or choose another --out" in message
    assert tree(Path("new")) == {}
    done(line)


@pytest.mark.usefixtures("place")
def test_what_the_file_system_refuses_elsewhere_is_one_line_too(monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert error("train.py --config tiny.toml --overwrite", FAILED) == (
        "cannot write checkpoints/original: Permission denied; free space, fix the permissions or choose another --out"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_that_cannot_be_written_down(tmp_path):
    with open("/dev/full", "w") as full:
        process = start("python sample.py --help", tmp_path, stdout=full.fileno())
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert the_error("", stderr) == "No space left on device; fix this, then run the same command again"


@pytest.mark.usefixtures("place")
def test_letters_that_the_terminal_lacks():
    words = ["--base", "checkpoints/base_5", "--config", "tiny.toml", "--dry_run"]
    result = CliRunner(charset="ascii").invoke(PROGRAMS["distill.py"], words, prog_name="distill.py")
    assert result.exit_code == 0
    assert "  16 ? 8  " in result.stdout


# The group


def test_the_group_alone_shows_its_help():
    result = run("vdiff")
    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert result.stderr == run("vdiff --help").stdout
    assert all(f"  {name} " in result.stderr for name in COMMANDS)


@pytest.mark.usefixtures("place")
def test_the_first_line_still_says_which_preset_was_taken():
    """Progress before an error is on stderr too; the error is the last line."""
    result = run(f"{TRAIN} --out new --grad_accum 3")
    assert result.stderr.splitlines()[0] == "preset toy, data/toy_4: 4×4×1"
    assert json.loads(Path("checkpoints/original", CONFIG).read_text())["num_iters"] == 4
