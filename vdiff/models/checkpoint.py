"""The folder of a model: its weights, and everything that is needed to rebuild it. Each file is written whole.

    model.safetensors   the weights to sample with
    adapter.safetensors instead of model.safetensors: a LoRA; the other weights are those of its base
    config.json         `CheckpointConfig`
    components/         copies of the folder that `CheckpointConfig.components` names, if the import made them
    average.json        how `vdiff ema` computed the weights, if it did

Other rooms store more in the same folder (`state/`, `samples/`, `log/`, `run.toml`); nothing here depends on it.
Descriptions are read without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from msgspec import Meta
from safetensors import safe_open

import vdiff
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.grids import grid_of
from vdiff.diffusion.parameterisation import Parameterisation, Vp, build_parameterisation
from vdiff.diffusion.schedules import build_schedule
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import CHECKSUM, make_folder, read_json, write_json, write_whole
from vdiff.models.adapters import OWN_NAME, AdapterSettings, add_adapter, is_adapter_weight, merge_adapter
from vdiff.models.codec import CODECS, PIXEL_CODEC, Codec
from vdiff.models.components import check_components, load_text_encoders, resolved, written
from vdiff.models.condition import SECOND_TIME, Signature
from vdiff.models.kinds import TEXT, UNET, build_network, signature_of
from vdiff.models.reading import NO_CHECKSUM, add_checksum, check_tensors, file_fingerprint, read_shapes, reading
from vdiff.projects import check_checkpoint
from vdiff.records import AVERAGE as AVERAGE
from vdiff.records import CONFIG as CONFIG
from vdiff.records import record_of
from vdiff.replacing import Kind, holds_keys
from vdiff.text import cause_of, plural

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vdiff.models.backbone import Backbone
    from vdiff.models.denoiser import Denoiser

FORMAT_VERSION = 1
WEIGHTS, ADAPTER = "model.safetensors", "adapter.safetensors"
COPIED = "components"
FILES = rf"(model|adapter)\.safetensors|config\.json|average\.json|{COPIED}/[^/]+/[^/]+"
"""A regular expression of their names."""
WRAPPERS = r"(?:(?:module|_orig_mod)\.)*"
TEXT_ENCODERS = "network.text_encoders"
IMPORTED = "imported:"
MAX_IMAGE_SIZE = 2**13
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The description of a checkpoint, `config.json`.

    A file has either `unet` and `image_size`, for a UNet on square images, or `backbone` and `sample_shape`.

    Attributes:
        unet, backbone: the network, as a `UNetConfig`, or {kind, config} of another kind. A UNet is always in
            `unet` here, even if the file has it in `backbone`.
        schedule, prediction: the rest of the denoiser; `schedule` holds the timestep convention.
        parameterisation: name and parameters of a `Parameterisation` other than `Vp`, see `family`.
        num_timesteps: the default number of sampling steps; a distilled model was trained for this grid alone.
        image_size: pixels per side; 0 if samples are not square images.
        sample_shape: (C, H, W), (C, L), …; empty for square images of a UNet; see `shape`.
        codec: the conversion between samples and x, see `space`.
        sample_rate: samples per second of a model of sounds; 0: unknown, or of something else.
        method: "base", or the distillation method.
        teacher: the description of the teacher, which contains that of its own teacher, and so on.
        weights: "ema" or "raw".
        num_iters, target_iters: finished and requested optimiser updates; equal when the training is finished.
        num_images: images in these updates.
        train_seconds: the time of these updates.
        kept_start: whether the weights are the initial ones, because the training made them worse.
        class_names: of a class-conditional model; by default the numbers of the classes.
        guidance_range: the least and the largest guidance weight w that the network takes as an input; empty if it
            takes none.
        guidance_scale: the scale w + 1 of the classifier-free guidance that a student has learned; None: none.
        dataset, dataset_fingerprint: the training data; "imported:…" is the source of an imported model.
        approximated: a sentence for each thing that an import left out, or in which its source draws other samples.
        condition_images: how the condition images of the training data were made, {crop, resample, background}; None:
            the network takes none.
        components: {path, fingerprint} of the folder with the text encoders, tokenizers and autoencoder of a
            text-to-image model, see `vdiff.models.components`; a path in a file may be relative to the file's folder.
        adapter: the LoRA in `adapter.safetensors`, on the weights of `base`.
        base: {path, fingerprint} of the checkpoint that was fine-tuned.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] | None = None
    schedule: dict[str, Any]
    prediction: str
    parameterisation: dict[str, Any] | None = None
    num_timesteps: Annotated[int, Meta(ge=1, le=2**20)]
    image_size: Annotated[int, Meta(ge=1, le=MAX_IMAGE_SIZE)] = 0
    sample_shape: list[Annotated[int, Meta(ge=1, le=2**24)]] = field(default_factory=list)
    codec: str = PIXEL_CODEC.name
    sample_rate: Annotated[int, Meta(ge=0, le=2**20)] = 0
    method: str
    weights: str
    num_iters: Count
    target_iters: Count
    num_images: Count
    dataset: str
    dataset_fingerprint: str
    train_seconds: Annotated[float, Meta(ge=0, le=2.0**63)] = 0.0
    kept_start: bool = False
    class_names: list[str] = field(default_factory=list)
    guidance_range: list[float] = field(default_factory=list)
    guidance_scale: Annotated[float, Meta(gt=1, le=2**20)] | None = None
    approximated: list[str] = field(default_factory=list)
    condition_images: dict[str, str] | None = None
    components: dict[str, Any] | None = None
    adapter: AdapterSettings | None = None
    base: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    vdiff_version: str = vdiff.__version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.backbone is not None and self.kind == UNET:
            object.__setattr__(self, "unet", self.network_config)
            object.__setattr__(self, "backbone", None)
        if len(shape := self.sample_shape) == 3 and shape[1] == shape[2]:
            object.__setattr__(self, "image_size", shape[1])
            object.__setattr__(self, "sample_shape", [] if self.backbone is None else shape)

    @property
    def kind(self) -> str:
        """The kind of its network."""
        return UNET if self.backbone is None else str(self.backbone.get("kind"))

    @property
    def network_config(self) -> dict[str, Any]:
        """The configuration from which its kind builds the network."""
        return self.unet if self.backbone is None else self.backbone.get("config", {})

    @property
    def family(self) -> Parameterisation:
        """The parameterisation: the inputs of the network for z and t, and the meaning of its output.

        Raises:
            ValueError: there is no such parameterisation.
        """
        return build_parameterisation(self.parameterisation or {"name": Vp.name, "predicts": self.prediction})

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of its network.

        Raises:
            ValueError, TypeError, KeyError: values that describe no network.
        """
        return signature_of(self.kind, self.network_config)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), (C, L), …: the shape of a sample."""
        if self.sample_shape:
            return tuple(self.sample_shape)
        return (self.signature.channels, self.image_size, self.image_size)

    @property
    def space(self) -> Codec:
        """What x is: pixels or sounds in [−1, 1], or numbers without bounds."""
        return CODECS[self.codec]

    def network_id(self) -> str:
        """A text that two checkpoints share if their networks have the same shape.

        Dropout makes no difference, nor where the weights of text encoders are stored.
        """
        free = {"dropout": 0, "own_text_encoders": False}
        return json.dumps([self.kind, {**self.network_config, **free}], sort_keys=True)

    @property
    def is_imported(self) -> bool:
        """Whether another tool trained it."""
        return self.dataset.startswith(IMPORTED)

    @property
    def is_finished(self) -> bool:
        """Whether the training reached its last update."""
        return self.num_iters >= self.target_iters

    @property
    def levels(self) -> int | None:
        """The number of steps of the finest grid that the network was trained for; None: any t ∈ (0, 1].

        It is that of the schedule for a base model, that of the student for a student, and that of the teacher for a
        student that keeps the steps of its teacher.
        """
        method, teacher = self.method, self.teacher
        while method in METHODS and METHODS[method].keeps_steps and teacher:
            method, teacher = teacher.get("method", ""), teacher.get("teacher")
        return build_schedule(self.schedule).num_levels if method == "base" else self.num_timesteps

    @property
    def is_distilled(self) -> bool:
        """Whether the network was trained for fewer times than its schedule has."""
        return self.levels not in (None, build_schedule(self.schedule).num_levels)

    @property
    def takes_any_num_steps(self) -> bool:
        """Whether the model can be sampled in any number of steps, up to the levels of a table."""
        return not self.is_distilled

    @property
    def knows_every_time(self) -> bool:
        """Whether a student can be sampled in any number of steps, because it jumps from any time to the image, or to
        any earlier time."""
        method = METHODS.get(self.method)
        has_many = bool(method and (method.has_any_time or method.knows_teachers_times))
        return has_many and (self.num_timesteps == 1 or SECOND_TIME in self.signature.names)

    def build(self, module: nn.Module | None = None) -> Denoiser:
        """The denoiser with new weights and its LoRA; `module` is the network if its code is not part of vdiff.

        Raises:
            VdiffError: the code of the network is missing.
            ValueError: values that do not fit together.
        """
        from vdiff.models.denoiser import Denoiser

        network: Backbone = build_network(self.kind, self.network_config, module)
        if self.adapter is not None:
            add_adapter(network, self.adapter)
        return Denoiser(network, build_schedule(self.schedule), self.family)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`; a UNet on square images has the keys of earlier versions."""
        values = {**asdict(self), "adapter": self.adapter and self.adapter.to_dict()}
        if self.codec == PIXEL_CODEC.name:
            del values["codec"]
        for key in ("sample_rate", "approximated"):
            if not values[key]:
                del values[key]
        for key in ("condition_images", "components", "adapter", "base", "parameterisation", "guidance_scale"):
            if values[key] is None:
                del values[key]
        if self.backbone is not None or self.sample_shape:
            del values["unet"], values["image_size"]
            return {**values, "backbone": self.backbone or {"kind": UNET, "config": self.unet}}
        return {key: value for key, value in values.items() if key not in ("backbone", "sample_shape")}

    def stores(self, name: str) -> bool:
        """Whether the weights file has the weight `name` of the denoiser.

        Weights of text encoders may be in the components, and with a LoRA all other weights are in the base.
        """
        if self.adapter is not None:
            return is_adapter_weight(name)
        is_component = self.kind == TEXT and not self.network_config.get("own_text_encoders")
        return not (is_component and name.startswith(f"{TEXT_ENCODERS}."))

    @property
    def has_own_text_encoders(self) -> bool:
        """Whether its text encoders are others than those of its components."""
        is_adapted = self.adapter is not None and self.adapter.changes_text_encoders
        return is_adapted or bool(self.network_config.get("own_text_encoders"))

    def with_own_text_encoders(self) -> CheckpointConfig:
        """The description of a model that stores the weights of its text encoders."""
        network = {**self.network_config, "own_text_encoders": True}
        return replace(self, backbone={"kind": self.kind, "config": network})

    def shapes(self, module: nn.Module | None = None) -> dict[str, tuple[int, ...]]:
        """Name in the weights file → shape; nothing is allocated.

        Raises:
            VdiffError, ValueError: as in `build`.
        """
        import torch

        with torch.device("meta"):
            empty = self.build(module).state_dict()
        return {_plain_name(name): tuple(tensor.shape) for name, tensor in empty.items() if self.stores(name)}

    def check_num_steps(self, num_steps: int) -> None:
        """Refuse a number of sampling steps for which the network was never trained.

        Raises:
            ValueError: `num_steps` is less than 1, more than a table has levels, or does not divide the `num_timesteps`
                of a distilled model that does not know every time.
        """
        build_schedule(self.schedule).check_num_steps(num_steps)
        if self.is_distilled and self.num_timesteps % num_steps and not self.knows_every_time:
            raise ValueError(
                f"this model was made for {plural(self.num_timesteps, 'step')}, and {num_steps} does not divide them"
            )

    def check_grid(self, grid: str, num_steps: int) -> None:
        """Refuse times that the network was not trained for.

        Raises:
            ValueError: another grid than `uniform` for a distilled model, or a number of steps that the grid cannot
                have.
        """
        if grid == "uniform":
            self.check_num_steps(num_steps)
        elif self.is_distilled and not self.knows_every_time:
            raise ValueError(
                f"this model was distilled for {self.num_timesteps} uniform steps and supports no other times"
            )
        grid_of(grid, build_schedule(self.schedule), num_steps)


def save_checkpoint(folder: Path, weights: Mapping[str, Tensor], config: CheckpointConfig) -> None:
    """Write the weights, then the config, each whole or not at all.

    Args:
        weights: the denoiser's state dict.
    """
    make_folder(folder)
    plain = {_plain_name(name): tensor for name, tensor in weights.items()}
    kept = {name: tensor for name, tensor in plain.items() if config.stores(name)}
    write_tensors(folder / (ADAPTER if config.adapter else WEIGHTS), kept, {"format": "pt"})
    values = config.to_dict()
    for name in ("components", "base"):
        if name in values:
            values[name] = written(values[name], folder)
    write_json(folder / CONFIG, values)


def read_config(folder: str | Path) -> CheckpointConfig:
    """The description of the checkpoint in `folder`.

    Raises:
        VdiffError: no checkpoint there, no JSON, or keys that are unknown, missing or of the wrong kind.
    """
    folder = Path(folder)
    path = folder / CONFIG
    check_checkpoint(folder)
    advice = "restore the file, or train again"
    values = read_json(path, advice)
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise VdiffError(f"{path} has format {version}, newer than {FORMAT_VERSION}", "update vdiff")
    needed = {old for old, new in (("unet", "backbone"), ("image_size", "sample_shape")) if new not in values}
    config = record_of(CheckpointConfig, values, str(path), advice, needed=needed)
    try:
        build_schedule(config.schedule)
        if config.parameterisation and config.family.prediction != config.prediction:
            raise ValueError(f"'prediction' is {config.prediction!r}, and not {config.family.prediction!r}")
        if config.codec not in CODECS:
            raise ValueError(f"unknown codec {config.codec!r}; {suggestion(config.codec, CODECS)}")
        num_classes = config.signature.num_classes
        config = replace(config, class_names=config.class_names or [str(k) for k in range(num_classes)])
        if config.components is not None:
            config = replace(config, components=resolved(config.components, folder))
        if config.base is not None:
            config = replace(config, base=resolved(config.base, folder))
        elif config.adapter is not None:
            raise ValueError("'adapter' needs a 'base'")
        if num_classes and len(config.class_names) != num_classes:
            raise ValueError(f"'class_names' names {len(config.class_names)} of {num_classes} classes")
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise VdiffError(f"{path} does not describe a model: {error}", advice) from None
    if not all(math.isfinite(weight) for weight in config.guidance_range):
        raise VdiffError(f"{path}: 'guidance_range' must be finite", advice)
    teacher = config.teacher
    while teacher is not None:
        if not isinstance(teacher, dict):
            raise VdiffError(f"{path}: 'teacher' must be an object or null, all the way back", advice)
        teacher = teacher.get("teacher")
    return config


def is_checkpoint(folder: Path) -> bool:
    """Whether vdiff, in any version, wrote the `config.json` in `folder`; other programs use this name too."""
    kinds = ("unet", "backbone")
    return any(holds_keys(folder / CONFIG, kind, "schedule", "prediction", "num_timesteps") for kind in kinds)


AVERAGED = Kind(
    "average of a run",
    lambda path: FILES if is_checkpoint(path) and holds_keys(path / AVERAGE, "run", "update", "profile") else "",
)


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device = "cpu",
    module: nn.Module | None = None,
    components: Path | None = None,
) -> tuple[Denoiser, CheckpointConfig]:
    """The denoiser in `folder`, in evaluation mode on `device`, and its description.

    Args:
        module: the network that gets the weights, if its code is not part of vdiff.
        components: a folder of components to use instead of the one that a text-to-image model names.

    Raises:
        VdiffError: the folder, its config or its weights cannot be used; the message says which and why.
    """

    folder = Path(folder)
    config, advice = read_config(folder), "restore the file, or train again"
    if (adapter := config.adapter) is not None:
        if components is not None:
            config = replace(config, components=check_components(config.components, components))
        denoiser = load_adapted(config, folder / ADAPTER, read_tensors(folder / ADAPTER), module, components)
        plain = config.with_own_text_encoders() if adapter.changes_text_encoders else config
        return denoiser.to(device).eval(), replace(plain, adapter=None)
    path, needs_components = folder / WEIGHTS, not config.stores(f"{TEXT_ENCODERS}.")
    if needs_components or components is not None:
        config = replace(config, components=check_components(config.components, components))
    found = {_plain_name(name): shape for name, shape in read_shapes(path).items()}
    mismatch = f"{path} does not fit {CONFIG}"
    if min_blocks(config.network_config) > len(found):
        raise VdiffError(f"{mismatch}: {len(found)} tensors are too few", "restore the two files together")
    try:
        expected = config.shapes(module)  # nothing is allocated before the two files are known to fit
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise VdiffError(f"{folder / CONFIG} does not describe a model: {cause_of(error)}", advice) from None
    if difference := _difference(expected, found):
        raise VdiffError(f"{mismatch}: {difference}", "restore the two files together")
    multiple = config.signature.size_multiple
    if config.image_size and config.image_size % multiple:
        raise VdiffError(f"{folder / CONFIG}: 'image_size' must be a multiple of {multiple}", advice)
    try:
        config.signature.check_shape(config.shape)
    except ValueError as error:
        raise VdiffError(f"{folder / CONFIG}: {error}", advice) from None
    denoiser = config.build(module)
    load_stored(denoiser, config, read_tensors(path))
    if needs_components:
        encoders = cast("nn.ModuleList", denoiser.network.text_encoders)
        load_text_encoders(encoders, Path((config.components or {})["path"]))
    return denoiser.to(device).eval(), config


def load_stored(denoiser: Denoiser, config: CheckpointConfig, tensors: Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint into a denoiser; the other weights do not change.

    Raises:
        ValueError: the tensors are not those weights.
    """
    state = denoiser.state_dict()
    names = {_plain_name(name): name for name in state if config.stores(name)}
    weights = {_plain_name(name): tensor for name, tensor in tensors.items()}
    shapes = {plain: tuple(state[name].shape) for plain, name in names.items()}
    if difference := _difference(shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise ValueError(difference)
    denoiser.load_state_dict({names[plain]: tensor for plain, tensor in weights.items()}, strict=False)


def load_base(config: CheckpointConfig, module: nn.Module | None = None, components: Path | None = None) -> Denoiser:
    """The denoiser of a fine-tuned model before its training: with the weights of its base, and without a LoRA.

    Args:
        module, components: as in `load_checkpoint`.

    Raises:
        VdiffError: the base is missing, is another model, or its network does not fit.
    """
    base, advice = config.base or {}, "put the base back there"
    folder = Path(str(base.get("path")))
    if not folder.is_dir():
        raise VdiffError(f"{folder}, the base of this model: no such checkpoint", advice)
    if base.get("fingerprint") != weights_fingerprint(folder):
        raise VdiffError(f"{folder} has other weights than the base of this model had", advice)
    loaded, found = load_checkpoint(folder, module=module, components=components)
    if config.network_id() != found.network_id():
        raise VdiffError(f"{folder}: its network is not that of this model", advice)
    network, schedule = loaded.network, build_schedule(config.schedule)
    if config.network_config != found.network_config:  # another dropout
        network = build_network(config.kind, config.network_config, module)
        network.load_state_dict(loaded.network.state_dict(), assign=True)
    return type(loaded)(network, schedule, config.family)


def load_adapted(
    config: CheckpointConfig,
    path: Path,
    tensors: Mapping[str, Tensor],
    module: nn.Module | None = None,
    components: Path | None = None,
) -> Denoiser:
    """The denoiser whose LoRA has the weights `tensors` of the file `path`, merged into those of its base.

    Args:
        module, components: as in `load_checkpoint`.

    Raises:
        VdiffError: as in `load_base`, or the tensors are not those of the LoRA.
    """
    denoiser = load_base(config, module, components)
    try:
        add_adapter(denoiser.network, cast("AdapterSettings", config.adapter))
        load_stored(denoiser, config, tensors)
    except (ValueError, OptionError) as error:
        raise VdiffError(f"{path} does not fit {CONFIG}: {error}", "restore the two files together") from None
    merge_adapter(denoiser.network)
    return denoiser


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with its checksum, whole or not at all.

    Raises:
        VdiffError: the file system refuses (no space, no permission).
    """
    from safetensors.torch import save_file

    on_cpu: dict[str, Tensor] = {}
    memories = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        memory = own.untyped_storage().data_ptr()
        on_cpu[name] = own.clone() if memory in memories else own  # safetensors takes no tensors that share memory
        memories.add(memory)

    def write(temporary: Path) -> None:
        save_file(on_cpu, temporary, {**metadata, CHECKSUM: NO_CHECKSUM})
        add_checksum(temporary)

    write_whole(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        VdiffError: the file is missing, truncated, damaged or of another format.
    """
    from safetensors.torch import load_file

    with reading(path):
        check_tensors(path)
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; its tensors are not read.

    Raises:
        VdiffError: the file is missing, truncated or of another format.
    """
    with reading(path):
        check_tensors(path, header_only=True)
        with safe_open(path, framework="np") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != CHECKSUM}


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of the weights file, for a LoRA also of that of the base; it identifies the model.

    Raises:
        VdiffError: there is none, or it cannot be read.
    """
    if (path := weights_path(folder)).name == WEIGHTS:
        return file_fingerprint(path)
    base = (read_config(folder).base or {}).get("fingerprint")
    return hashlib.sha256(f"{file_fingerprint(path)} {base}".encode()).hexdigest()


def weights_path(folder: Path) -> Path:
    """The weights file of the checkpoint in `folder`: `ADAPTER` if it is there, else `WEIGHTS`."""
    return folder / ADAPTER if (folder / ADAPTER).is_file() else folder / WEIGHTS


def min_blocks(config: Mapping[str, Any]) -> int:
    """A lower bound on the number of tensors of the network, so that one of a million blocks is refused unbuilt."""
    counts = [config.get("num_blocks", 1), config.get("num_layers", 1), config.get("layers_per_block", 1)]
    levels = [config.get(key, ()) for key in ("multipliers", "block_out_channels")]
    flat = [each for count in counts for each in (count if isinstance(count, list | tuple) else [count])]
    deepest = max((count for count in flat if isinstance(count, int)), default=1)
    found = deepest * max(len(level) if isinstance(level, list | tuple) else 1 for level in (*levels, (1,)))
    inner = (config.get(key) for key in ("config", "unet"))
    return max(found, *(min_blocks(part) if isinstance(part, dict) else 0 for part in inner))


def _plain_name(name: str) -> str:
    """A parameter's name without prefixes of wrappers (DDP, torch.compile), equal for all versions of transformers."""
    name = re.sub(rf"^{WRAPPERS}(network\.)?{WRAPPERS}", r"\1", name)
    name = re.sub(rf"^({TEXT_ENCODERS}\.\d+\.)text_model\.", r"\1", name)
    return OWN_NAME.sub("", name)


def _difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Why the shapes `found` do not fit, in a few words; empty if they fit."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(missing)} missing ({missing[0]}, …)"] if missing else []
        parts += [f"{len(extra)} unexpected ({extra[0]}, …)"] if extra else []
        return ", ".join(parts)
    for name, shape in expected.items():
        if shape != found[name]:
            return f"{name} is {found[name]}, not {shape}"
    return ""
