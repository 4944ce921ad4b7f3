"""The settings of a run, and how they are resolved: flags > environment > configuration file > preset > defaults.

A setting is written once: as a field of the dataclasses below, or of the method that it is a parameter of. Nothing here
imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Any, TypeVar

from vdiff.data.captions import CaptionSettings
from vdiff.diffusion.distillation import METHODS, Method, build_method
from vdiff.diffusion.parameterisation import PARAMETERISATIONS, Edm, Flow, Parameterisation, Vp
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.schedules import SCHEDULES, TableSchedule
from vdiff.diffusion.weighting import LOSSES, MIN_SNR_GAMMA, OUTPUT, WEIGHTINGS
from vdiff.errors import OptionError
from vdiff.models.adapters import ATTENTION, MAX_RANK
from vdiff.settings import (
    DATA,
    MACHINE,
    MODEL,
    OPTIMISATION,
    RECORDS,
    check_values,
    parameters,
    parameters_of_all,
    setting,
)

LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Progress n/N ∈ [0, 1) → the part of the learning rate that is left."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb", "mlflow", "none")
DEVICES = ("auto", "cpu", "cuda", "mps")
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "vdiff[optimizers]"),
    "adafactor": ("transformers", "vdiff[text]"),
    "prodigy": ("prodigyopt", "vdiff[optimizers]"),
    "wandb": ("wandb", "vdiff[wandb]"),
    "mlflow": ("mlflow", "vdiff[mlflow]"),
}
"""An optimiser or a tracker → the package that has it, and what installs that."""
TIMES = ("uniform", "importance")
ADAMW = "adamw"
FLOATS_PER_WEIGHT = {ADAMW: 2.0, "adamw8bit": 0.5, "adafactor": 0.0, "prodigy": 4.0}
"""Name of an optimiser → the size of its state in numbers of 32 bits for each weight."""
UNCHOSEN = ("preset ", "usual settings")
"""Prefixes of the names of setting layers that the user did not write for this run."""
EVALUATIONS = 3
"""The cost of an update per image, in network evaluations: the backward pass costs as much as two."""
EDM_NOISE_SCALE = 250.0
"""A new EDM network receives 250 ln σ, as in consistency_models, whose time embedding is the same as vdiff's."""
FAMILY_SETTINGS = (
    ("prediction", "v", ("parameterisation", Vp.name)),
    ("sigma_data", 0.5, ("parameterisation", Edm.name)),
    ("flow_shift", 1.0, ("schedule", Flow.name)),
)
"""Settings that have a meaning with one parameterisation or schedule alone, and their defaults."""
AVERAGE = (
    "EMA (moving average) of the weights, which is saved instead of the raw weights: its decay per update (0.9999), "
    "its half-life in images (500000), or the weight of the first update relative to the last one (0.1%); 0 = no EMA."
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What training and distillation share."""

    data: str = setting(
        "The dataset, a folder that prepare_data.py wrote.",
        group=DATA, default="", unit="FOLDER", shown="the only one under data/", free=True,
    )  # fmt: skip
    preset: str = setting("Preset that gives the other settings.", group=DATA, default="", shown="what fits the data")
    num_iters: int = setting("Optimiser updates.", group=OPTIMISATION, low=1, unit="UPDATES")
    batch_size: int = setting(
        "Images per update, over all processes and parts.", group=OPTIMISATION, low=1, unit="IMAGES"
    )
    grad_accum: int = setting(
        "Compute each process's share of a batch in this many parts, in sequence, to save memory.",
        group=OPTIMISATION, default=1, low=1, unit="PARTS",
    )  # fmt: skip
    optimizer: str = setting(
        "AdamW; AdamW with 8-bit moments (needs bitsandbytes); Adafactor, with a small state (needs transformers); or "
        "Prodigy, which estimates the step size (needs prodigyopt): --lr is then a factor, by default 1.",
        group=OPTIMISATION, default=ADAMW, choices=FLOATS_PER_WEIGHT,
    )  # fmt: skip
    lr: float = setting("Learning rate.", group=OPTIMISATION, low=0, open_low=True)
    lr_schedule: str = setting(
        "Linear and cosine fall to 0 at the last update.", group=OPTIMISATION, default="constant", choices=LR_SCHEDULES
    )
    warmup_iters: int = setting(
        "Updates over which the learning rate rises from 0.", group=OPTIMISATION, default=0, low=0, unit="UPDATES"
    )
    weight_decay: float = setting("Decoupled weight decay.", group=OPTIMISATION, default=0.0, low=0)
    clip_norm: float = setting(
        "Clip the norm of the gradient to this.", group=OPTIMISATION, default=1.0, low=0, open_low=True
    )
    max_bad_steps: int = setting(
        "Stop after this many updates in a row with a gradient that is not finite; such updates are skipped.",
        group=OPTIMISATION, default=20, low=0, unit="UPDATES", free=True,
    )  # fmt: skip
    ema: float = setting(
        AVERAGE,
        group=OPTIMISATION, default=0.9999, low=0, high=1,
    )  # fmt: skip
    ema_images: float = setting(
        "Half-life of the average in images seen, instead of --ema; 0 = use --ema.",
        group=OPTIMISATION, default=0.0, low=0, hidden=True,
    )  # fmt: skip
    ema_remainder: float = setting(
        "Weight of the first update in the average, relative to the last, instead of --ema: decay = this^(1/updates); "
        "0 = use --ema.",
        group=OPTIMISATION, default=0.0, low=0, high=0.99, hidden=True,
    )  # fmt: skip
    ema_more: str = setting(
        "Store more EMAs for vdiff ema: decays such as 0.999,0.9995, or profiles, from which post-hoc EMA of any "
        "length is computed (Karras et al. 2024).",
        group=OPTIMISATION, default="", shown="none",
    )  # fmt: skip
    ema_profiles: bool = setting(
        "The same as --ema_more profiles.", group=OPTIMISATION, default=False, hidden=True
    )  # fmt: skip
    ema_interval: int | None = setting(
        "Updates between snapshots of the EMAs of --ema_more.",
        group=RECORDS, default=None, low=1, unit="UPDATES", shown="40 snapshots in all", free=True,
    )  # fmt: skip
    weighting: str = setting(
        "Weight of the squared error of x̂ at each noise level; output = the plain error of the network's output.",
        group=OPTIMISATION, default="truncated_snr", choices=(*WEIGHTINGS, OUTPUT),
    )  # fmt: skip
    snr_gamma: float = setting(
        "Bound γ of --weighting min_snr, min(SNR, γ).", group=OPTIMISATION, default=MIN_SNR_GAMMA, low=1e-3, high=1e6
    )
    loss: str = setting(
        "Loss of the weighted pixel errors: squared, absolute, or pseudo-Huber.",
        group=OPTIMISATION, default="l2", choices=LOSSES,
    )  # fmt: skip
    times: str = setting(
        "How noise levels are sampled: uniformly, or more often where losses are large (with smaller weights).",
        group=OPTIMISATION, default="uniform", choices=TIMES,
    )  # fmt: skip
    dropout: float = setting("Dropout rate in the residual blocks.", group=OPTIMISATION, default=0.0, low=0, high=0.99)
    class_dropout: float = setting(
        "Fraction of the images whose class is dropped, for classifier-free guidance.",
        group=OPTIMISATION, default=0.0, low=0, high=0.99,
    )  # fmt: skip
    lora_rank: int = setting(
        "Train a LoRA of this rank on --base, and store only the LoRA; 0 = train all weights.",
        group=MODEL, default=0, low=0, high=MAX_RANK, unit="RANK",
    )  # fmt: skip
    lora_alpha: float | None = setting(
        "The LoRA is scaled by alpha/rank.",
        group=MODEL, default=None, low=0, high=2**20, open_low=True, shown="the rank",
    )  # fmt: skip
    lora_dropout: float = setting("Dropout rate of the LoRA's input.", group=MODEL, default=0.0, low=0, high=0.99)
    lora_targets: str = setting(
        "Layers with a LoRA: attention, linear, conv, or suffixes of their names, such as to_q,to_v.",
        group=MODEL, default=ATTENTION, unit="LAYERS",
    )  # fmt: skip
    caption_dropout: float = setting(
        "Fraction of the captions that are dropped, for classifier-free guidance.",
        group=OPTIMISATION, default=0.0, low=0, high=0.99,
    )  # fmt: skip
    caption_shuffle: bool = setting(
        "Put the comma-separated tags of a caption in random order.", group=OPTIMISATION, default=False
    )
    caption_keep_tokens: int = setting(
        "The first tags of a caption that --caption_shuffle leaves in place.",
        group=OPTIMISATION, default=0, low=0, unit="TAGS",
    )  # fmt: skip
    caption_prefix: str = setting(
        "Text before every caption that is not dropped.", group=OPTIMISATION, default="", unit="TEXT", shown="none"
    )
    flip: bool = setting("Flip half of the images left to right.", group=OPTIMISATION, default=True)
    log_interval: int = setting(
        "Updates between log entries.", group=RECORDS, default=100, low=1, unit="UPDATES", free=True
    )
    sample_interval: int = setting(
        "Updates between grids of samples from fixed noise.",
        group=RECORDS, default=5000, low=1, unit="UPDATES", free=True,
    )  # fmt: skip
    sample_prompts: str = setting(
        "Prompts of the samples during training, one per line; distill.py also compares students on them.",
        group=RECORDS, default="", unit="FILE", shown="captions of the dataset", free=True,
    )  # fmt: skip
    ckpt_interval: int = setting(
        "Updates between checkpoints.",
        group=RECORDS, default=5000, low=1, unit="UPDATES", free=True,
    )  # fmt: skip
    keep_last: int = setting(
        "Older checkpoints to keep in history/; the newest is the run's folder itself.",
        group=RECORDS, default=0, low=0, unit="CHECKPOINTS", free=True,
    )  # fmt: skip
    keep_every: int = setting(
        "Keep a checkpoint in history/ once per this many updates; 0 = none.",
        group=RECORDS, default=0, low=0, unit="UPDATES", free=True,
    )  # fmt: skip
    tracker: str = setting(
        "Where scalars and samples are logged.", group=RECORDS, default="tensorboard", choices=TRACKERS, free=True
    )
    seed: int = setting("Seed of weights, data order and noise.", group=MACHINE, default=0, low=0, high=2**32 - 1)
    device: str = setting(
        "Auto takes a GPU if there is one.", group=MACHINE, default="auto", choices=DEVICES, free=True
    )
    precision: str = setting(
        "Precision of the network; auto is bf16 on CUDA, else fp32; fp16 uses loss scaling.",
        group=MACHINE, default="auto", choices=PRECISIONS,
    )  # fmt: skip
    compile: bool | None = setting(
        "Compile the network. This changes rounding errors, so a resumed run keeps the choice.",
        group=MACHINE, default=None, shown="on CUDA; on CPUs if a long run gets faster", free=True,
    )  # fmt: skip
    threads: int | None = setting(
        "CPU threads. Their number changes rounding errors, so a resumed run keeps it.",
        group=MACHINE, default=None, low=1, high=1024, unit="THREADS", shown="timed at the start", free=True,
    )  # fmt: skip
    fsdp: bool = setting(
        "Shard trained weights, moments and EMA over the processes, for networks too large for one device.",
        group=MACHINE, default=False, free=True,
    )  # fmt: skip
    checkpointing: bool = setting(
        "Gradient checkpointing: recompute activations instead of storing them. It takes less memory and more time.",
        group=MACHINE, default=False, free=True,
    )  # fmt: skip
    num_workers: int = setting(
        "Processes that decode images: until all are in memory, or always if they do not fit.",
        group=MACHINE, default=2, low=0, unit="PROCESSES", free=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.further_decays()
        of_lora = {"alpha": self.lora_alpha, "dropout": self.lora_dropout, "targets": self.lora_targets != ATTENTION}
        starts_from_lora = bool(vars(self).get("lora"))
        useless = [] if self.lora_rank or starts_from_lora else [name for name, value in of_lora.items() if value]
        if useless:
            raise OptionError(f"--lora_{useless[0]}: all weights are to learn", "give --lora_rank, or leave it out")
        if self.snr_gamma != MIN_SNR_GAMMA and self.weighting != "min_snr":
            raise OptionError(f"--snr_gamma: the weighting {self.weighting} has no γ", "give --weighting min_snr too")
        if self.fsdp and self.optimizer != ADAMW:
            raise OptionError(f"--fsdp shards the moments of {ADAMW} alone", "leave --optimizer or --fsdp out")

    @property
    def captions(self) -> CaptionSettings:
        """How training changes captions."""
        return CaptionSettings(
            self.caption_dropout, self.caption_shuffle, self.caption_keep_tokens, self.caption_prefix
        )

    @property
    def weights(self) -> str:
        """Which weights are saved as the model: "ema" or "raw"."""
        return "ema" if self.average_decay else "raw"

    @property
    def average_decay(self) -> float:
        """Decay per update of the model's EMA; 0 if there is none."""
        if self.ema_remainder:
            return float(self.ema_remainder ** (1 / self.num_iters))
        return float(0.5 ** (self.batch_size / self.ema_images)) if self.ema_images else self.ema

    def further_decays(self) -> list[float]:
        """`ema_more` as numbers.

        Raises:
            OptionError: one of them is not a decay.
        """
        words = [word.strip() for word in self.ema_more.split(",")] if self.ema_more else []
        try:
            decays = [float(word) for word in words]
        except ValueError:
            decays = [math.nan]
        if not all(0 < decay < 1 for decay in decays) or len(set(decays)) < len(decays):
            raise OptionError(f"--ema_more {self.ema_more}: not a list of decays", "give numbers below 1: 0.999,0.9995")
        return decays


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A base model: `train.py`."""

    image_size: int | None = setting(
        "Which size, if the dataset has several.",
        group=DATA, default=None, low=1, unit="PIXELS", shown="the dataset's",
    )  # fmt: skip
    base: str = setting(
        "Fine-tune this checkpoint instead of training a new network.",
        group=MODEL, default="", unit="FOLDER", shown="none", free=True,
    )  # fmt: skip
    lora: str = setting(
        "Start from this LoRA of the base, with its rank, alpha and layers: a .safetensors file of diffusers or "
        "kohya, a peft folder, or a checkpoint.",
        group=MODEL, default="", unit="FILE", shown="none", free=True,
    )  # fmt: skip
    train_text_encoder: bool = setting(
        "Train the text encoders too: with --lora_rank a LoRA on their attention projections, else all their weights.",
        group=MODEL, default=False,
    )  # fmt: skip
    text_encoder_lr: float | None = setting(
        "Learning rate of the text encoders.", group=OPTIMISATION, default=None, low=0, open_low=True, shown="--lr"
    )
    parameterisation: str = setting(
        "Input and output of the network: variance preserving with --prediction, EDM, or rectified flow. The last two "
        "have their own schedule, noise levels and weighting.",
        group=MODEL, default=Vp.name, choices=PARAMETERISATIONS,
    )  # fmt: skip
    prediction: str = setting(
        "What the network predicts, with --parameterisation vp.", group=MODEL, default="v", choices=PREDICTION_TYPES
    )
    sigma_data: float = setting(
        "Standard deviation of the data, with --parameterisation edm.", group=MODEL, default=0.5, low=0, open_low=True
    )
    schedule: str = setting(
        "Noise schedule.",
        group=MODEL,
        default="cosine",
        choices=SCHEDULES,
        shown="that of --parameterisation, or cosine",
    )
    flow_shift: float = setting(
        "Time shift of the schedule flow: above 1, more of the steps are at high noise.",
        group=MODEL, default=1.0, low=0, open_low=True,
    )  # fmt: skip
    noise_mean: float | None = setting(
        "Mean of ln(sigma/alpha), which is normally distributed in training.",
        group=OPTIMISATION, default=None, shown="-1.2 with edm, 0 with flow; else times are uniform",
    )  # fmt: skip
    noise_std: float | None = setting(
        "Standard deviation of ln(sigma/alpha) in training.",
        group=OPTIMISATION, default=None, low=0, open_low=True, shown="1.2 with edm, 1 with flow",
    )  # fmt: skip
    zero_snr: bool = setting(
        "Rescale the betas of a table schedule to zero terminal SNR: its last level is pure noise. For v, x or both.",
        group=MODEL, default=False,
    )  # fmt: skip
    num_timesteps: int = setting(
        "Sampling steps of the model; for a table schedule, its number of levels.",
        group=MODEL, default=1024, low=1, high=2**16, unit="STEPS",
    )  # fmt: skip
    class_conditional: bool | None = setting(
        "Condition the network on the class.",
        group=MODEL,
        default=None,
        shown="if the data have classes, but not with the presets digits, cifar10, lsun128, celebahq256",
    )
    random_crop: int = setting(
        "Train a text-to-image model on random square crops of the images; 0 = on whole images.",
        group=DATA, default=0, low=0, high=2**13, unit="PIXELS",
    )  # fmt: skip
    vae: str = setting(
        "Another autoencoder for the base: a pipeline folder, or its subfolder vae.",
        group=MODEL, default="", unit="FOLDER", shown="the base's own",
    )  # fmt: skip
    offset_noise: float = setting(
        "Add noise of this strength that is equal in all pixels of a channel, so that the model learns dark and "
        "bright images; 0.1 is usual.",
        group=OPTIMISATION, default=0.0, low=0, high=10,
    )  # fmt: skip
    input_perturbation: float = setting(
        "Add noise of this strength to the network's input and not to its target; 0.1 is usual.",
        group=OPTIMISATION, default=0.0, low=0, high=10,
    )  # fmt: skip
    unet: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Parameterisation:
        """The parameterisation of the network: a UNet's embedding of times is made for numbers up to about 1000."""
        if self.parameterisation == Edm.name:
            return Edm(self.sigma_data, noise_scale=EDM_NOISE_SCALE)
        return Flow() if self.parameterisation == Flow.name else Vp(self.prediction)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.lora_rank or self.lora) and not self.base:
            flag = "--lora" if self.lora else "--lora_rank"
            raise OptionError(f"{flag}: a LoRA needs a model", "give it with --base CHECKPOINT")
        if self.text_encoder_lr and not self.train_text_encoder:
            raise OptionError("--text_encoder_lr: the text encoders do not learn", "give --train_text_encoder")
        if self.text_encoder_lr and self.optimizer == "prodigy":
            raise OptionError("--text_encoder_lr: prodigy has one step for all weights", "leave it out")
        if self.train_text_encoder and not self.base:
            raise OptionError("--train_text_encoder: a new network has none", "give it with --base CHECKPOINT")
        if self.input_perturbation and (self.parameterisation != Vp.name or self.prediction == "both"):
            what = self.parameterisation if self.parameterisation != Vp.name else "both"
            raise OptionError(f"--input_perturbation is for predictions of v, x or eps, not {what}", "leave it out")
        for name, usual, only in FAMILY_SETTINGS:
            if getattr(self, name) != usual and getattr(self, only[0]) != only[1]:
                raise OptionError(f"--{name} is only for --{only[0]} {only[1]}", "leave it out")
        if (self.noise_mean is None) != (self.noise_std is None):
            raise OptionError("--noise_mean and --noise_std describe one distribution", "give both")
        if self.prediction == "eps" and self.weighting == "truncated_snr":
            raise OptionError(
                "truncated_snr cannot weight an eps-prediction: at zero signal its x̂ = (z − σ ε̂)/α has no bound",
                "give --weighting snr, or --prediction v",
            )
        if (self.zero_snr or SCHEDULES[self.schedule].zero_snr) and self.prediction == "eps":
            where = "--zero_snr" if self.zero_snr else f"--schedule {self.schedule}"
            raise OptionError(
                f"{where}: at zero SNR an eps-prediction carries no information about the image", "give --prediction v"
            )
        if self.zero_snr and not self.base and not issubclass(SCHEDULES[self.schedule], TableSchedule):
            tables = [name for name, kind in SCHEDULES.items() if issubclass(kind, TableSchedule)]
            raise OptionError(
                f"--zero_snr: the {self.schedule} schedule has no betas", f"give --schedule {' or '.join(tables)}"
            )
        if self.zero_snr and self.num_timesteps < 2:
            raise OptionError("--zero_snr needs at least two levels", "give --num_timesteps 1000")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(LoopConfig):
    """A student: `distill.py`. By default the learning rate falls to 0 in each stage, and there is no EMA."""

    data: str = setting(
        "The dataset, a folder that prepare_data.py wrote.",
        group=DATA, default="", unit="FOLDER", shown="the teacher's, else the only one under data/", free=True,
    )  # fmt: skip
    preset: str = setting(
        "Preset that gives the other settings.",
        group=DATA,
        default="",
        shown="the teacher's, else what fits",
    )
    num_iters: int = setting(
        "Optimiser updates per halving of the steps.",
        group=OPTIMISATION, low=1, unit="UPDATES",
    )  # fmt: skip
    base: str = setting(
        "The teacher, a checkpoint.", group=MODEL, default="", unit="FOLDER", shown="checkpoints/original", free=True
    )
    to_steps: int | None = setting(
        "Distil stage by stage until the student takes this many steps.",
        group=MODEL, default=None, low=1, unit="STEPS", shown="one stage",
    )  # fmt: skip
    stages: int | None = setting(
        "Number of stages, instead of --to_steps.", group=MODEL, default=None, low=1, hidden=True
    )
    prompts: str = setting(
        "Train on these prompts, one per line, instead of a dataset; for methods that need no images.",
        group=DATA, default="", unit="FILE", shown="none", free=True,
    )  # fmt: skip
    teacher_steps: int | None = setting(
        "Steps that the teacher takes; the first student takes half of them.",
        group=MODEL, default=None, low=2, unit="STEPS", shown="its own, or fewer to reach --to_steps",
    )  # fmt: skip
    phases: str = setting(
        "Steps of the teacher and of each student, such as 1024,32,1, instead of --to_steps.",
        group=MODEL, default="", unit="STEPS", shown="by method",
    )  # fmt: skip
    method: str = setting(
        "Distillation method. progressive gives a student of each number of steps. For one step alone, trajectory was "
        "nearest to the data in a comparison (docs/distillation.md), and it needs no images.",
        group=MODEL, default="progressive", choices=METHODS,
    )  # fmt: skip
    guidance_scale: float | None = setting(
        "Scale of the teacher's classifier-free guidance, w + 1. The first student with fewer steps learns the guided "
        "prediction, so the students need no guidance.",
        group=MODEL, default=None, low=1, high=2**20, open_low=True, unit="SCALE", shown="none",
    )  # fmt: skip
    recipe: str = setting(
        "Settings of the method: those that worked best in vdiff, or those of its paper. Other settings override "
        "both.",
        group=MODEL, default="vdiff", choices=("vdiff", "paper"), free=True,
    )  # fmt: skip
    student_config: str = setting(
        "TOML file with a table [unet]: how the first student's network differs from its teacher's.",
        group=MODEL, default="", unit="FILE.toml", shown="the teacher's network",
    )  # fmt: skip
    lr_schedule: str = setting(
        "Linear and cosine fall to 0 at the end of each stage.",
        group=OPTIMISATION, default="linear", choices=LR_SCHEDULES,
    )  # fmt: skip
    ema: float = setting(
        AVERAGE,
        group=OPTIMISATION, default=0.0, low=0, high=1,
    )  # fmt: skip
    precision: str = setting(
        "Precision of the network; auto is bf16 on CUDA if the teacher takes at most 64 steps, else fp32; fp16 uses "
        "loss scaling.",
        group=MACHINE, default="auto", choices=PRECISIONS,
    )  # fmt: skip
    class_dropout: float = setting(
        "Fraction of the images whose class is dropped, if the teacher was trained that way.",
        group=OPTIMISATION, default=0.1, low=0, high=0.99,
    )  # fmt: skip
    last_factor: float = setting(
        "Factor on the number of updates of the students of 2 and 1 steps.",
        group=OPTIMISATION, default=2.0, low=0, open_low=True,
    )  # fmt: skip

    check_images: int = setting(
        "Images for comparing each student with its teacher, from noise that training never saw: at least 64, and only "
        "64 after a short training; 0 = no comparison.",
        group=RECORDS, default=64, low=0, unit="IMAGES", free=True,
    )  # fmt: skip
    distance_images: int = setting(
        "Images for a student's distance to the data; fewer after a short training.",
        group=RECORDS, default=500, low=2, unit="IMAGES", free=True,
    )  # fmt: skip
    distance_every: int = setting(
        "Stages between measurements of the distance to the data; 0 = never.",
        group=RECORDS, default=1, low=0, unit="STAGES", free=True,
    )  # fmt: skip
    max_regression: float = setting(
        "A student has failed if its distance to the data exceeds this multiple of its teacher's.",
        group=RECORDS, default=10.0, low=1, free=True,
    )  # fmt: skip
    retries: int = setting(
        "How often to repeat a stage with a collapsed student, each time with half the learning rate.",
        group=OPTIMISATION, default=1, low=0, unit="TIMES", free=True,
    )  # fmt: skip

    method_settings: Mapping[str, Any] = field(default_factory=dict)
    """The parameters of all methods; flags and files have them beside the other settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {name: item.default for name, item in method_parameters().items()}
        object.__setattr__(self, "method_settings", {**defaults, **self.method_settings})
        for name in METHODS:
            self.build_method(name)
        self.phase_steps()
        ways = {"--phases": self.phases, "--to_steps": self.to_steps, "--stages": self.stages}
        if len(given := [name for name, value in ways.items() if value]) > 1:
            raise OptionError(f"{given[0]} and {given[1]} set the same thing", "give one of them")
        if self.guidance_scale and self.method == "guided":
            raise OptionError(
                f"--guidance_scale {self.guidance_scale:g}: the students of --method guided take guidance as an input",
                "leave one of the two out",
            )
        if self.guidance_scale and not self.build_method().asks_teacher:
            raise OptionError(
                f"--guidance_scale {self.guidance_scale:g}: {self.method} does not learn what its teacher predicts",
                "leave it out, or give --method progressive",
            )
        if self.times == "importance" and not METHODS[self.shortening].needs_images:
            raise OptionError(
                f"--times importance: {self.shortening} learns from whole paths, which contain every step",
                "leave it out",
            )

    def build_method(self, name: str = "") -> Method:
        """The method `name`, or else the selected one, with its parameters."""
        return build_method(name or self.method, self.method_settings)

    @property
    def shortening(self) -> str:
        """The method that reduces the steps: the selected one, or `then` with --method guided."""
        return str(self.method_settings["then"]) if self.method == "guided" else self.method

    def phase_steps(self) -> list[int]:
        """`phases` as numbers; empty where there are none.

        Raises:
            OptionError: one of them is not a number of steps.
        """
        words = self.phases.split(",") if self.phases else []
        if not all(word.strip().isdecimal() and len(word) < 10 and int(word) > 0 for word in words) or len(words) == 1:
            raise OptionError(
                f"--phases {self.phases}: not a list of steps", "give them from the teacher's down: 64,8,1"
            )
        return [int(word) for word in words]


Config = TypeVar("Config", TrainConfig, DistillConfig)


def method_parameters() -> dict[str, Field[Any]]:
    """Name → field of the parameters of all methods, which are settings of `distill.py`."""
    return parameters_of_all(METHODS, taken=parameters(DistillConfig))


def settings_of(kind: type[LoopConfig]) -> dict[str, Field[Any]]:
    """Name → field of all settings of `kind` that a configuration file may have."""
    if issubclass(kind, DistillConfig):
        return parameters(kind) | method_parameters()
    return {item.name: item for item in fields(kind)}


def values_of(config: LoopConfig) -> dict[str, Any]:
    """The settings by name, as `settings_of` has them."""
    values = asdict(config)
    return values | values.pop("method_settings", {})


def check_packages(config: LoopConfig) -> None:
    """Refuse an optimiser or a tracker whose package is not installed.

    Raises:
        OptionError: it names the command that installs it.
    """
    for flag, value in [("optimizer", config.optimizer), ("tracker", config.tracker)]:
        package, extra = PACKAGES.get(value, ("", ""))
        if package and find_spec(package) is None:
            raise OptionError(f"--{flag} {value} needs {package}, which is not installed", f"pip install '{extra}'")


def resolve(kind: type[Config], layers: Mapping[str, Mapping[str, Any]]) -> Config:
    """The settings of `layers`, later ones over earlier ones, as a `kind`.

    Args:
        layers: where the settings come from ("preset toy", "my.toml", `COMMAND_LINE`) → key → value.

    Raises:
        OptionError: an unknown key, a value of the wrong type or outside its range, a missing one; it names the layer.
    """
    known = settings_of(kind)
    merged: dict[str, Any] = {}
    is_chosen = False
    for origin, values in layers.items():
        for key, stronger in (("ema", ("ema_images", "ema_remainder")), ("ema_images", ("ema_remainder",))):
            if key in values:  # a later layer overrides the stronger settings of earlier ones
                merged = {name: value for name, value in merged.items() if name not in stronger}
        checked = check_values(known, values, origin)
        if "parameterisation" in checked:  # brings settings that suit it, over those of a preset
            family = PARAMETERISATIONS[checked["parameterisation"]]
            merged = {key: value for key, value in merged.items() if key != "prediction"} | dict(family.training)
        if "lr" in checked:
            is_chosen = not origin.startswith(UNCHOSEN)
        for key, value in checked.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    if merged.get("optimizer") == "prodigy" and not is_chosen:
        merged["lr"] = 1.0
    if "weighting" not in merged:
        if merged.get("prediction") == "eps":
            merged["weighting"] = "snr"
        elif merged.get("zero_snr"):
            merged["weighting"] = "snr_plus_one"
    missing = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in missing if name not in merged]:
        raise OptionError(f"missing setting: {', '.join(missing)}", f"give --{missing[0]}, or a --preset")
    if kind is DistillConfig:
        merged["method_settings"] = {name: merged.pop(name) for name in method_parameters() if name in merged}
    return kind(**merged)
