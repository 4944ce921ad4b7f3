"""vdiff in Python: load or wrap a model, sample from it, denoise with it and save it."""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import PIL.Image
import torch
from torch import Tensor, nn

from vdiff.data.images import cell_scale, make_grid, to_pil
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.parameterisation import Parameterisation, Vp
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import SAMPLERS, Sampler
from vdiff.diffusion.schedules import Schedule, build_schedule
from vdiff.diffusion.weighting import OUTPUT, WEIGHTINGS, weighting_of
from vdiff.distributed import memory_errors_named, pick_device
from vdiff.errors import VdiffError, suggestion
from vdiff.models import checks
from vdiff.models.backbone import Backbone
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from vdiff.models.codec import CODECS, PIXEL_CODEC, UNBOUNDED
from vdiff.models.condition import CLASSES, IMAGE, Condition, Signature
from vdiff.models.denoiser import Denoiser, GuidedDenoiser, device_of
from vdiff.models.drawing import EVERYWHERE, classes_in_turn, draw_from
from vdiff.models.kinds import PYTHON
from vdiff.models.prompting import Prompting, has_surroundings
from vdiff.models.speed import FastNetwork, ready_to_draw
from vdiff.models.wrapped import wrapped
from vdiff.training.objectives import DenoisingObjective, StudentState, TrainBatch, stratified, weighted_losses


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    network: nn.Module | None = None,
    components: str | Path | None = None,
    vae: str | Path | None = None,
) -> Model:
    """The model in the folder `checkpoint`, ready to sample.

    Args:
        components, vae: folders of the text encoders and of the autoencoder, instead of those that a text-to-image
            model names.
        network: your own network, if the model was made by `wrap`; it gets the weights in the folder.
        device: auto (a GPU if the machine has one), cpu, cuda or mps.
        precision: auto (fp32, on CUDA with products in TF32), fp32, bf16 or fp16.
        compiled: whether the network is compiled at its first evaluation of each shape.

    Raises:
        VdiffError: the checkpoint is missing or damaged, or this machine lacks the device or precision.
    """
    parts = None if components is None else Path(components)
    denoiser, config = load_checkpoint(checkpoint, pick_device(device), network, parts)
    fast = ready_to_draw(denoiser, precision=precision, compiled=compiled)
    return Model(fast, config, vae=None if vae is None else Path(vae))


def load_plain(folder: Path, like: Model | None = None) -> Model:
    """The model in a folder as it was trained: float32, in PyTorch's default memory layout.

    Args:
        like: a model with the same network; it is copied if its code is outside of vdiff.
    """
    module = copy.deepcopy(like.network) if like is not None and like.config.kind == PYTHON else None
    denoiser, config = load_checkpoint(folder, module=module)
    return Model(denoiser, config)


def wrap(
    network: nn.Module,
    shape: Sequence[int],
    *,
    prediction: str = "v",
    parameterisation: Parameterisation | None = None,
    schedule: str | Schedule | None = None,
    num_timesteps: int = 1024,
    classes: int | Sequence[str] = 0,
    null_class: bool = False,
    drops_variance: bool = False,
    takes: Sequence[str] = (),
    size_multiple: int = 1,
    codec: str | None = None,
) -> Model:
    """A model from your own network(z, timestep, **condition) → output, with z (B, *shape), timestep (B,) = L·t − 1.

    A network of diffusers (UNet2DModel, UNet2DConditionModel, UNet1DModel, and the transformers of DiT, PixArt, Stable
    Diffusion 3 and FLUX) is used as it is, and `load` can rebuild it from a checkpoint. For any other module a
    checkpoint holds only the weights: pass the module to `load`. The commands cannot use such a folder.

    Args:
        shape: of a sample: (C, H, W), (C, L), ….
        prediction: what the network outputs: "v", "x", "eps" or "both".
        parameterisation: how the network is given z and the time, and how its output is read, if not by `prediction`:
            `Edm` or `Flow` of `vdiff.diffusion.parameterisation`. The shape of its output is that of z.
        schedule: a name in `vdiff.diffusion.schedules.SCHEDULES`, or a schedule; None: the parameterisation's, or
            "cosine".
        num_timesteps: default number of sampling steps.
        classes: the number of classes, or their names, for a network that takes `classes` (B,) int64.
        null_class: the network accepts the number after the last class as "no class", which guidance needs.
        drops_variance: the second half of the network's output channels is a learned variance; it is ignored.
        takes: names of further conditions, (B, …). `vdiff.distill(…, method="guided")` needs "guidance", the weight w.
            The network does not receive it when guidance is computed from two evaluations.
        size_multiple: the sizes of samples must be multiples of this number.
        codec: "pixels" (samples are clipped to [−1, 1], as usual for images) or "unbounded".

    Raises:
        ValueError: a value is invalid, or values do not fit together.
    """
    if not shape or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"shape = {tuple(shape)}; need whole numbers from 1, such as (3, 32, 32)")
    if type(size_multiple) is not int or size_multiple < 1:
        raise ValueError(f"size_multiple = {size_multiple!r}; need a whole number from 1")
    codec = codec or (PIXEL_CODEC if PIXEL_CODEC.are_pictures(shape) else UNBOUNDED).name
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}, choose from {', '.join(CODECS)}")
    if type(num_timesteps) is not int or num_timesteps < 1:
        raise ValueError(f"num_timesteps = {num_timesteps!r}; need a whole number from 1")
    names = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
    family = Vp(prediction) if parameterisation is None else parameterisation
    schedule = schedule or str(family.training.get("schedule", "cosine"))
    null = {CLASSES: len(names)} if null_class else {}
    takes = (*(CLASSES,) * bool(names), *takes)
    own = Signature(shape[0], shape[0] * family.channel_factor, takes, null, len(names), size_multiple)
    backbone = wrapped(network, own, null_class=null_class, drops_variance=drops_variance)
    backbone.signature.check_shape(shape)
    table = build_schedule({"name": schedule}) if isinstance(schedule, str) else schedule
    config = CheckpointConfig(
        backbone={"kind": backbone.kind, "config": backbone.describe()}, sample_shape=list(shape), codec=codec,
        schedule=table.to_dict(), **family.config_fields(), num_timesteps=num_timesteps, method="base", weights="raw",
        num_iters=0, target_iters=0, num_images=0, dataset="", dataset_fingerprint="",
        class_names=names or [str(k) for k in range(backbone.signature.num_classes)],
    )  # fmt: skip
    return Model(Denoiser(backbone, table, family), config)


class Samples(Tensor):
    """A tensor (num, C, …) on the CPU. Operations on it return plain tensors. A notebook shows it as images."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def are_images(self) -> bool:
        """Whether these are grey or colour images: (num, 1 or 3, H, W)."""
        return self.ndim == 4 and self.shape[1] in (1, 3)

    def to_pil(self) -> list[PIL.Image.Image]:
        """Each sample as a PIL image; −1 is black and 1 is white.

        Raises:
            ValueError: the samples are not images.
        """
        if not self.are_images:
            raise ValueError(f"samples of shape {tuple(self.shape)} are not images (num, 1 or 3, H, W)")
        return [to_pil(image) for image in self]

    def _repr_png_(self) -> bytes | None:
        """The images as one PNG file, for a notebook; None if the samples are not images: it then shows the numbers."""
        if not self.are_images:
            return None
        file = io.BytesIO()
        grid = make_grid(self, columns=round(len(self) ** 0.5), scale=cell_scale(self))
        to_pil(grid).save(file, format="PNG")
        return file.getvalue()

    def __deepcopy__(self, memo: dict[int, Any]) -> Samples:
        return self.clone().as_subclass(Samples)


class Model:
    """A denoiser and the description in its checkpoint.

    Attributes:
        denoiser: the network, its schedule and its prediction type.
        config: the checkpoint's description: `num_timesteps`, `image_size`, `class_names`, `method`, `teacher`, ….
    """

    def __init__(self, denoiser: Denoiser, config: CheckpointConfig, *, vae: Path | None = None) -> None:
        self.denoiser, self.config, self._vae = denoiser, config, vae

    def __repr__(self) -> str:
        config = self.config
        return f"<vdiff model: {config.method}, {config.num_timesteps} steps, {self.shape}, on {self.device}>"

    @property
    def device(self) -> torch.device:
        """The network's device; the CPU if it has no weights."""
        return device_of(self.denoiser)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), (C, L), …: the shape of a sample."""
        return self.config.shape

    @property
    def network(self) -> nn.Module:
        """The network itself: (z, timestep, **condition) → output."""
        network: nn.Module = self.denoiser.network
        return network.network if isinstance(network, FastNetwork) else network

    @cached_property
    def prompting(self) -> Prompting:
        """The tokenizers and the autoencoder of a model of text or latents.

        Raises:
            VdiffError: the model has none, or they cannot be read.
        """
        return Prompting.read(self.config, self.device, vae=self._vae)

    def plain(self) -> Denoiser:
        """The denoiser, to train, distil or save it.

        Raises:
            VdiffError: the model was loaded in half precision.
        """
        if any(weight.dtype in (torch.bfloat16, torch.float16) for weight in self.network.parameters()):
            raise VdiffError("a model in half precision can only sample", "load it with precision fp32")
        if not isinstance(self.denoiser.network, FastNetwork):
            return self.denoiser
        return Denoiser(cast(Backbone, self.network), self.denoiser.schedule, self.denoiser.parameterisation)

    def loss(
        self,
        x: Tensor,
        *,
        classes: Tensor | Sequence[int] | None = None,
        condition: Tensor | None = None,
        weighting: str = "truncated_snr",
    ) -> Tensor:
        """The training loss of a batch (B, C, …), a scalar with a gradient; torch's generator gives noise and times.

        E w(λ_t) ‖x − x̂(α x + σ ε, t)‖² with t uniform: one t in each of B equal parts of [0, 1).

        Args:
            classes: B class numbers, for a class-conditional network.
            condition: B condition images, for a network that takes them.
            weighting: a name in `vdiff.diffusion.weighting.WEIGHTINGS`, or `OUTPUT`.

        Raises:
            VdiffError: the weighting is unknown.
            ValueError: the classes are not B integers, or the network does not have them.
        """
        if weighting not in (choices := (*WEIGHTINGS, OUTPUT)):
            raise VdiffError(f"unknown weighting {weighting!r}", suggestion(str(weighting), choices))
        takes, schedule = self.denoiser.network.signature, self.denoiser.schedule
        numbers = None if classes is None else torch.as_tensor(classes, device=x.device)
        if numbers is not None and takes.num_classes:
            count = takes.num_classes + (CLASSES in takes.null)
            if numbers.is_floating_point() or not ((numbers >= 0) & (numbers < count)).all():
                raise ValueError(f"classes are integers from 0 to {count - 1}, got {numbers.unique().tolist()}")
            if numbers.shape != x.shape[:1]:
                raise ValueError(f"classes of shape {tuple(numbers.shape)}; need one for each of {len(x)} samples")
        given = takes.condition(**{CLASSES: numbers, IMAGE: self._condition_images(condition, len(x))}).to(x.device)
        batch = TrainBatch(x, torch.randn_like(x), stratified(len(x), x.device), given)
        target = DenoisingObjective(schedule)(batch, StudentState(self.denoiser, self.denoiser, 0.0))
        prediction = self.denoiser(target.z, target.t, given)
        weight = weighting_of(weighting, self.denoiser.parameterisation.output_weight, zero_snr=schedule.zero_snr)
        return weighted_losses(prediction, target, schedule.logsnr(target.t), weight).mean()

    def save(self, folder: str | Path) -> None:
        """Save the model in a folder that `vdiff.load` and the commands can read.

        Raises:
            VdiffError: the file system refuses, or the model was loaded in half precision.
        """
        save_checkpoint(Path(folder), self.plain().state_dict(), self.config)

    def fingerprint(self) -> str:
        """SHA-256 of the names and bits of the weights; different models have different ones."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.plain().state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def sample(
        self,
        num: int | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | Sampler = "ddim",
        grid: str = checks.UNIFORM,
        classes: Sequence[str | int] | None = None,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        condition: Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        noise: Tensor | None = None,
        batch_size: int = 64,
        on_step: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Samples:
        """Generate samples: (num, *shape) float32 on the CPU, pixels in [−1, 1]; `to_pil()` turns them into PIL images.

        A model with an autoencoder returns decoded images (num, 3, H, W), not latents.

        Args:
            num: number of samples; by default as many as `noise`, `prompts` or `condition` has, else 16.
            steps: sampling steps; by default the model's own.
            seed: for equal seeds, image k is the same as that of `sample.py`.
            sampler: a name in `vdiff.diffusion.samplers.SAMPLERS`, or a sampler.
            grid: a name in `vdiff.diffusion.grids.GRIDS`; a distilled model supports only `uniform`.
            classes: names or numbers, assigned to the images in turn; by default all.
            prompts: of a text-to-image model, assigned to the images in turn.
            negative_prompt: what guidance moves away from.
            condition: condition images (N, C, H, W) of the size of the samples, in [−1, 1] or uint8; the samples take
                them in turn.
            guidance, guidance_interval: the weight w of classifier-free guidance, and the times at which it applies; by
                default that of diffusers' pipelines for a base model of text and latents, else 0.
            noise: (num, C, H, W), z at t = 1 instead of the seed's. The noise that a stochastic sampler adds still
            depends on the seed.
            batch_size: images per batch; the images do not depend on it.
            on_step: called after each step of a batch with the number of its finished steps; an exception stops the
                sampling.
            options: settings of the named sampler: `clipping_value`, `threshold`, `eta`.

        Raises:
            VdiffError: this model or sampler cannot do what is asked, or an image is not finite.
            ValueError: the noise has another shape, or a number of images is invalid.
        """
        if noise is not None and not isinstance(noise, Tensor):
            raise ValueError(
                f"noise is a {type(noise).__name__}; need a tensor (num, {', '.join(map(str, self.shape))})"
            )
        if isinstance(prompts, str):
            prompts = [prompts]
        images = self._condition_images(condition)
        usual = len(prompts) or (16 if images is None else len(images))
        num = num if num is not None else len(noise) if noise is not None else usual
        if num < 1 or batch_size < 1:
            raise ValueError(f"need at least one image, and one in a batch, got {num} and {batch_size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed = {seed}; need a whole number from 0 to 2**64 - 1")
        if noise is not None and noise.shape != (num, *self.shape):
            raise ValueError(f"noise of shape {tuple(noise.shape)}; need {(num, *self.shape)}")
        steps = self.config.num_timesteps if steps is None else steps
        rule = self._sampler(sampler, options)
        checks.check_grid(self.config, grid, steps)
        checks.check_prompts(self.config, prompts, negative_prompt)
        guidance = checks.default_guidance(self.config) if guidance is None else guidance
        checks.check_guidance(self.config, guidance)
        checks.check_negative_prompt(self.config, negative_prompt, guidance)
        checks.check_interval(self.config, guidance, guidance_interval)
        numbers = checks.class_numbers(self.config, classes)
        for note in self.prompting.notes([*prompts, negative_prompt]) if prompts else ():
            warnings.warn(note, stacklevel=2)
        drawn = []
        for first in range(0, num, batch_size):
            indices = range(first, min(first + batch_size, num))
            with memory_errors_named():
                found = draw_from(
                    self.denoiser,
                    rule,
                    noise=ImageNoise(seed=seed, indices=indices, shape=self.shape, device=self.device),
                    start=None if noise is None else noise[first : first + batch_size],
                    condition=self._condition(indices, numbers, prompts, negative_prompt, images),
                    num_steps=steps,
                    guidance=guidance,
                    guidance_interval=guidance_interval or EVERYWHERE,
                    grid=grid,
                    on_step=on_step,
                )
            drawn.append(self.prompting.decode(found) if has_surroundings(self.config) else found)
        return self.config.space.clip(torch.cat(drawn)).as_subclass(Samples)

    def _condition_images(self, condition: Tensor | None, count: int | None = None) -> Tensor | None:
        """Condition images in [−1, 1], of the shape of samples.

        Raises:
            VdiffError: the model takes none, or needs some.
            ValueError: they have another shape, or are not `count`.
        """
        checks.check_condition(self.config, is_given=condition is not None)
        if condition is None:
            return None
        if tuple(condition.shape[1:]) != self.shape or not len(condition) or count not in (None, len(condition)):
            need = f"({'N' if count is None else count}, {', '.join(map(str, self.shape))})"
            raise ValueError(f"condition images of shape {tuple(condition.shape)}; need {need}")
        return PIXEL_CODEC.encode(condition)

    def _condition(
        self,
        indices: Sequence[int],
        classes: Sequence[int],
        prompts: Sequence[str],
        negative_prompt: str,
        images: Tensor | None,
    ) -> Condition:
        """The condition of samples `indices`, which have the classes, prompts or condition images in turn."""
        if not prompts:
            own = None if images is None else images[[k % len(images) for k in indices]]
            return classes_in_turn(self.denoiser, indices, classes).with_tensors(**{IMAGE: own})
        texts = [prompts[k % len(prompts)] for k in indices]
        return self.prompting.condition(self.config.signature.names, texts, negative_prompt)

    def denoise(
        self,
        z: Tensor,
        t: Tensor | float,
        *,
        classes: Sequence[str | int] | None = None,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        condition: Tensor | None = None,
        guidance: float = 0.0,
    ) -> Prediction:
        """The model's prediction for noisy images: x̂, ε̂ and v̂ of z = α x + σ ε, on the model's device.

        Args:
            z: (B, C, H, W).
            t: the time in (0, 1], one number or (B,); 1 is pure noise.
            classes: names or numbers, assigned to the images in turn; by default all.
            prompts, negative_prompt: of a text-to-image model.
            condition: condition images, which the images take in turn.
            guidance: the weight w of classifier-free guidance.

        Raises:
            VdiffError: this model does not have the classes, or cannot be guided.
            ValueError: z or t has another shape, or a time is outside (0, 1].
        """
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"z of shape {tuple(z.shape)}; need (B, {', '.join(map(str, self.shape))})")
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        if times.ndim > 1 or (times.ndim == 1 and len(times) != len(z)):
            raise ValueError(f"t of shape {tuple(times.shape)}; need one number or {len(z)}")
        if not ((times > 0) & (times <= 1)).all():
            raise ValueError(f"times lie in (0, 1], got {t}")
        checks.check_guidance(self.config, guidance)
        numbers = checks.class_numbers(self.config, classes)
        checks.check_prompts(self.config, prompts, negative_prompt)
        checks.check_negative_prompt(self.config, negative_prompt, guidance)
        images = self._condition_images(condition)
        given = self._condition(range(len(z)), numbers, prompts, negative_prompt, images).to(self.device)
        takes_guidance = self.denoiser.network.signature.takes_guidance
        if takes_guidance:
            given = given.with_tensors(guidance=torch.full((len(z),), guidance))
        denoiser = GuidedDenoiser(self.denoiser, guidance) if guidance and not takes_guidance else self.denoiser
        is_double = any(weight.dtype == torch.float64 for weight in self.network.parameters())
        z = z.to(self.device, torch.float64 if is_double else torch.float32)
        with torch.no_grad(), memory_errors_named():
            prediction: Prediction = denoiser(z, times.expand(len(z)), given)
        return prediction

    def _sampler(self, sampler: str | Sampler, options: Mapping[str, Any]) -> Sampler:
        if not isinstance(sampler, str):
            if not isinstance(sampler, Sampler):
                raise VdiffError(f"{sampler!r} is not a sampler", suggestion("", SAMPLERS))
            if options:
                raise ValueError(f"set {', '.join(options)} in the sampler itself: {sampler}")
            return sampler
        if sampler in SAMPLERS:
            options = checks.without_limits(self.config, sampler, options)
        checks.check_limits(self.config, options)
        return checks.build_sampler(sampler, options)
