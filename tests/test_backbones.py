"""Networks of others as backbones: trained, distilled, drawn, exported or refused, and resumed with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import vdiff
from tests.commands import done, error
from tests.oracles import condition, randn
from tests.toy import write_checkpoint
from vdiff.api import Model
from vdiff.diffusion.parameterisation import Flow
from vdiff.diffusion.samplers import Ddim
from vdiff.diffusion.schedules import FlowSchedule
from vdiff.errors import VdiffError
from vdiff.files import CHECKSUM
from vdiff.interop.graphs import check_exportable
from vdiff.models.checkpoint import CONFIG, WEIGHTS, read_config, read_tensors
from vdiff.models.condition import Signature
from vdiff.models.drawing import draw_from
from vdiff.models.kinds import BUILD, build_network
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.models.wrapped import DiffusersBackbone


class Mlp(nn.Module):
    """A user's own network, one of whose parts is called `module`, as a wrapper's is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.module = nn.Linear(17, 24), nn.Linear(24, 16)

    def forward(self, z: Tensor, timestep: Tensor, classes: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([z.flatten(1), timestep[:, None] / 1024], 1)).tanh()
        return self.module(h if classes is None else h + classes[:, None]).reshape(z.shape)


def unet_2d(**more: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **more,
    )  # fmt: skip


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip


def unet_1d() -> nn.Module:
    return diffusers.UNet1DModel(
        in_channels=2, out_channels=2, block_out_channels=(32, 32), extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "unet": (lambda: UNet(UNetConfig(1, 1, 4, 8, (1, 1), 1, ())), (1, 4, 8), {}),
    "unet_2d": (unet_2d, (1, 4, 8), {}),
    "classes": (lambda: unet_2d(num_class_embeds=4), (1, 4, 4), {"classes": 3, "null_class": True}),
    "dit": (dit, (1, 4, 8), {"classes": 3, "null_class": True}),
    "unet_1d": (unet_1d, (2, 16), {}),
    "mlp": (Mlp, (1, 16), {"classes": 2}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
SETTINGS: dict[str, Any] = {"batch_size": 4, "device": "cpu", "ema_remainder": 0.0, "lr": 1e-2, "log_interval": 1}


def model_of(name: str) -> Model:
    """A wrapped network with weights of its own that are the same each time."""
    build, shape, options = NETWORKS[name]
    torch.manual_seed(0)
    network = build()
    for i, parameter in enumerate(network.parameters()):
        parameter.data.add_(0.1 * randn(*parameter.shape, seed=i, dtype=parameter.dtype))
    return vdiff.wrap(network, shape, num_timesteps=4, **options)


def data_of(name: str) -> list[Any]:
    """Twelve samples, with classes where the network takes them."""
    _, shape, options = NETWORKS[name]
    x = randn(12, *shape, dtype=torch.float32).tanh()
    return [(x, torch.arange(12) % options["classes"])] if "classes" in options else [x]


def loaded(folder: Path, name: str) -> Model:
    return vdiff.load(folder, network=NETWORKS[name][0]() if name == "mlp" else None)


def said_in(folder: Path) -> dict[str, Any]:
    """A checkpoint's description as it is written, without its checksum."""
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    del values[CHECKSUM]
    return values


@every_network
def test_training_cut_and_resumed_ends_with_the_same_bits_and_is_distilled(name, tmp_path):
    """From weights that learn, in a folder; then the student of half the steps draws, from memory and from its file."""
    run = {"out": tmp_path / "whole", "num_iters": 4, "ckpt_interval": 2, **SETTINGS}
    model = model_of(name)
    trained = vdiff.train(model, data_of(name), **run).finish()
    cut = vdiff.train(model_of(name), data_of(name), **{**run, "out": tmp_path / "cut"})
    for metrics in cut:
        if metrics["update"] == 2:
            break
    cut.close()
    again = vdiff.train(model_of(name), data_of(name), **{**run, "out": tmp_path / "cut"}).finish()
    first, second = (read_tensors(tmp_path / folder / WEIGHTS) for folder in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert again.config.num_iters == 4
    begun = model_of(name).denoiser.state_dict()
    assert any(not torch.equal(tensor, begun[key]) for key, tensor in first.items())

    out = tmp_path / "students"
    student = vdiff.distill(trained, data=data_of(name), out=out, to_steps=2, num_iters=2, **SETTINGS).finish()
    assert (student.config.num_timesteps, student.shape) == (2, NETWORKS[name][1])
    samples = student.sample(3, seed=1)
    assert samples.shape == (3, *NETWORKS[name][1])
    assert samples.isfinite().all()
    assert torch.equal(loaded(out / "base_0", name).sample(3, seed=1), samples)
    assert not torch.equal(trained.sample(3, steps=2, seed=1), samples)

    follower = vdiff.distill(trained, method="trajectory", to_steps=2, num_iters=2, **SETTINGS).finish()
    assert (follower.config.dataset, follower.config.num_timesteps) == ("no images", 2)
    assert follower.sample(3).isfinite().all()


@every_network
def test_a_folder_says_kind_and_shape_and_builds_the_network_again(name, tmp_path):
    model = model_of(name)
    model.save(tmp_path)
    said = said_in(tmp_path)
    assert (said["backbone"]["kind"], tuple(said["sample_shape"])) == (model.config.kind, NETWORKS[name][1])
    assert {"unet", "image_size"}.isdisjoint(said)
    found = loaded(tmp_path, name)
    assert found.config.shape == model.shape
    z = randn(2, *model.shape, dtype=torch.float32)
    assert torch.equal(found.denoise(z, 0.7).v, model.denoise(z, 0.7).v)


def test_a_unet_on_square_images_is_written_as_ever(tmp_path):
    """So that whoever reads these folders goes on reading them; in the other form it is read as the same."""
    write_checkpoint(tmp_path / "ours")
    said = said_in(tmp_path / "ours")
    assert {"backbone", "sample_shape", "codec"}.isdisjoint(said)
    config = read_config(tmp_path / "ours")
    other = {key: value for key, value in said.items() if key not in ("unet", "image_size")}
    other |= {"backbone": {"kind": "unet", "config": said["unet"]}, "sample_shape": [1, 4, 4]}
    (tmp_path / "ours" / CONFIG).write_text(json.dumps(other))
    assert read_config(tmp_path / "ours") == config


def test_the_answer_is_that_of_diffusers():
    """Their own call: a UNet, and a DiT on a square, where classes stay what they are in training too."""
    for name, shape, arguments in (
        ("unet_2d", (1, 4, 8), {}),
        ("dit", (1, 8, 8), {"class_labels": torch.arange(64) % 3}),
    ):
        backbone = model_of(name).network
        theirs = type(backbone.model).from_config(backbone.model.config)
        theirs.load_state_dict(backbone.model.state_dict())
        z, timestep = randn(64, *shape, dtype=torch.float32), torch.linspace(0, 1000, 64)
        expected = theirs.eval()(z, timestep, **arguments).sample
        told = {"classes": arguments["class_labels"]} if arguments else {}
        for mode in (False, True):
            torch.testing.assert_close(backbone.train(mode)(z, timestep, **told), expected, rtol=0, atol=0)


def test_a_dit_answers_on_other_shapes_than_squares():
    """diffusers puts 16 patches into a square of 4 × 4; here they are laid out one by one as 2 × 8."""
    backbone = model_of("dit").network.eval()
    theirs = type(backbone.model).from_config(backbone.model.config).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    z, timestep, classes = randn(2, 1, 4, 16, dtype=torch.float32), torch.tensor([3.0, 900.0]), torch.tensor([2, 0])
    square = theirs(z, timestep, classes).sample
    found = backbone(z, timestep, classes=classes)
    for n in range(16):
        (i, j), (row, column) = divmod(n, 4), divmod(n, 8)
        patch = found[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patch, square[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])


def test_a_learned_variance_is_left_out():
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip
    whole, half = DiffusersBackbone(network), DiffusersBackbone(network, drops_variance=True)
    assert (whole.signature.out_channels, half.signature.out_channels) == (4, 2)
    assert half.describe()["drops_variance"]


def test_text_goes_to_networks_that_attend_to_it(tmp_path):
    """UNet2DConditionModel and PixArt: embeddings by our name, guidance by the null that the condition brings."""
    attends = diffusers.UNet2DConditionModel(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pixart = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, cross_attention_dim=8, caption_channels=6, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    z, t = randn(2, 1, 4, 8, dtype=torch.float32), torch.tensor([0.3, 0.9], dtype=torch.float64)
    text = randn(2, 5, 6, dtype=torch.float32)
    for network in (attends, pixart):
        for i, parameter in enumerate(network.parameters()):
            parameter.data.add_(0.1 * randn(*parameter.shape, seed=i, dtype=torch.float32))
        model = vdiff.wrap(network, (1, 4, 8))
        denoiser = model.denoiser.eval()
        assert "text" in denoiser.network.signature.names
        told, other = (denoiser.condition(text=each) for each in (text, text.flip(0)))
        assert (denoiser(z, t, told).v - denoiser(z, t, other).v).abs().max() > 1e-4
        model.save(tmp_path / type(network).__name__)
        assert torch.equal(vdiff.load(tmp_path / type(network).__name__).denoiser(z, t, told).v, denoiser(z, t, told).v)
        with pytest.raises(VdiffError, match="graphs have no input for this network's text, text mask; draw with"):
            check_exportable(denoiser)


FLOW_TRANSFORMERS: dict[str, tuple[Any, float]] = {
    "sd3": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=2, out_channels=2, num_layers=1, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=8,
        ),
        1000.0,
    ),
    "flux": (
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
        ),
        1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOW_TRANSFORMERS)
def test_flow_transformers_sample_as_diffusers_samples_them(name, tmp_path):
    """With the packing, places and levels of diffusers' own pipelines."""
    torch.manual_seed(0)
    build, time_scale = FLOW_TRANSFORMERS[name]
    network = build()
    for i, parameter in enumerate(network.parameters()):
        parameter.data.add_(0.1 * randn(*parameter.shape, seed=i, dtype=torch.float32))
    text, pooled = randn(2, 5, 6, dtype=torch.float32), randn(2, 5, seed=1, dtype=torch.float32)
    noise = randn(2, 2, 4, 8, seed=2, dtype=torch.float32)
    model = vdiff.wrap(
        network, (2, 4, 8), parameterisation=Flow(time_scale), schedule=FlowSchedule(3.0), codec="unbounded"
    )
    model.save(tmp_path / name)
    denoiser = vdiff.load(tmp_path / name).denoiser
    told = denoiser.condition(text=text, text_pooled=pooled)
    weight = 2.5 if name == "flux" else 0.0
    ddim = Ddim(clipping_value=None)
    drawn = draw_from(denoiser, ddim, noise=lambda: noise, num_steps=4, condition=told, guidance=weight)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    flux, z = diffusers.FluxPipeline, noise
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "pooled_projections": pooled, "return_dict": False}
    if name == "flux":
        z = flux._pack_latents(noise, 2, 2, 4, 8)
        inputs["img_ids"] = flux._prepare_latent_image_ids(2, 2, 4, "cpu", torch.float32)
        inputs |= {"txt_ids": torch.zeros(5, 3), "guidance": torch.full((2,), 3.5)}
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = network(z, timestep=(t * time_scale / 1000).expand(2), **inputs)[0]
            z = scheduler.step(velocity, t, z).prev_sample
    theirs = flux._unpack_latents(z, 32, 64, 8) if name == "flux" else z
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-4)


def test_commands_draw_and_export_what_a_folder_builds_and_refuse_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("unet_2d", "dit", "mlp"):
        model_of(name).save(Path(name))
    done("sample.py --checkpoint unet_2d --num 2 --num_timesteps 2 --out drawn")
    assert sorted(path.name for path in Path("drawn").glob("*.png")) == ["00000.png", "00001.png"]
    done("vdiff export torch dit dit.pt2 --num_timesteps 2")
    assert Path("dit.pt2").is_file()
    words = "torch cannot export this network: Constraints violated (batch)!"
    assert words in error("vdiff export torch unet_2d unet.pt2 --num_timesteps 2 --card False", 1)
    done("vdiff inspect unet_2d")
    refused = "these are the weights of a network in Python, tests.test_backbones.Mlp: its code is not in the folder"
    assert refused in error("sample.py --checkpoint mlp --out no", 1)
    assert "only vdiff's UNet can be exported to diffusers" in error("vdiff export diffusers unet_2d no", 1)


def test_datasets_have_no_samples_that_are_not_square(tmp_path, monkeypatch):
    """Only a method that needs none distils such a teacher by the command."""
    monkeypatch.chdir(tmp_path)
    model_of("unet_2d").save(Path("oblong"))
    words = "distill.py --base oblong --phases 4,2 --preset toy --num_iters 2 --device cpu --num_workers 0"
    line = error(words, 2)
    assert "oblong generates samples of 1 × 4 × 8, but datasets hold square images; distil it in Python" in line
    done(f"{words} --method trajectory")
    assert vdiff.load("base_0").sample(2).shape == (2, 1, 4, 8)


@pytest.mark.parametrize(("name", "form"), [("unet_1d", "png"), ("unet_2d", "npz"), ("unet_2d", "lmdb")])
def test_samples_that_fit_no_format_are_one_line(name, form, tmp_path):
    """A folder or a zip holds images of any sides; arrays and datasets hold squares."""
    model_of(name).save(tmp_path / name)
    line = error(f"sample.py --checkpoint {tmp_path / name} --num 2 --format {form} --out {tmp_path / 'out'}", 1)
    assert f"not images for {form}; vdiff.load generates tensors" in line
    assert not (tmp_path / "out").exists()


def test_exported_weights_are_described_as_in_the_checkpoint(tmp_path):
    """Also by what readers of an earlier version know."""
    write_checkpoint(tmp_path / "square")
    model_of("unet_2d").save(tmp_path / "oblong")
    for name in ("square", "oblong"):
        done(f"vdiff export weights {tmp_path / name} {tmp_path / 'out' / name}")
        assert said_in(tmp_path / "out" / name).keys() == said_in(tmp_path / name).keys()
        assert vdiff.load(tmp_path / "out" / name).shape == vdiff.load(tmp_path / name).shape


def test_descriptions_that_build_nothing_are_refused(tmp_path):
    model_of("unet_2d").save(tmp_path)
    said = said_in(tmp_path)
    huge = {**said["backbone"]["config"], "config": {**said["backbone"]["config"]["config"], "layers_per_block": 10**6}}
    for change, words in (
        ({"backbone": {"kind": "magic", "config": {}}}, "unknown kind of network 'magic'"),
        (
            {"backbone": {"kind": "diffusers", "config": {"class": "Flux", "config": {}}}},
            "'Flux' of diffusers cannot be",
        ),
        ({"backbone": {"kind": "diffusers", "config": huge}}, "tensors are too few"),
        ({"sample_shape": [1, 5, 8]}, "samples of 5 × 8 need a network for multiples of 2"),
        ({"sample_shape": [3, 4, 8]}, "samples of 3 channels do not fit a network of 1"),
        ({"codec": "mp3"}, "unknown codec 'mp3'"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**said, **change}))
        with pytest.raises(VdiffError, match=words):
            vdiff.load(tmp_path)


def test_a_missing_library_is_named_in_one_line(monkeypatch):
    config = model_of("unet_2d").network.describe()
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(VdiffError, match="one of diffusers, which is not installed; pip install diffusers"):
        build_network("diffusers", config)
    assert set(BUILD) == {"unet", "song", "edm2", "lucidrains", "image_v1", "diffusers", "text", "python"}


def test_samples_that_are_no_pictures_have_no_bounds():
    """A network that answers v̂ = −σ-scaled large values draws numbers beyond ±1, unless they are pixels."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(5.0))

        def forward(self, z: Tensor, timestep: Tensor) -> Tensor:
            del timestep
            return self.scale * torch.ones_like(z)

    free = vdiff.wrap(Far(), (1, 6), prediction="x", num_timesteps=2)
    bound = vdiff.wrap(Far(), (1, 6), prediction="x", num_timesteps=2, codec="pixels")
    assert torch.allclose(free.sample(1), torch.full((1, 1, 6), 5.0))
    assert torch.allclose(bound.sample(1), torch.ones(1, 1, 6))


def test_shapes_are_checked_where_a_network_is_wrapped():
    assert Signature(1, 1, size_multiple=4).size_multiple == 4
    with pytest.raises(ValueError, match="samples of 5 × 8 need a network for multiples of 2"):
        vdiff.wrap(unet_2d(), (1, 5, 8))
    for options, words in (({"codec": "mp3"}, "unknown codec 'mp3'"), ({"num_timesteps": 0}, "a whole number from 1")):
        with pytest.raises(ValueError, match=words):
            vdiff.wrap(unet_2d(), (1, 4, 8), **options)
    with pytest.raises(ValueError, match="v prediction needs 2 output channels"):
        vdiff.wrap(diffusers.UNet1DModel(in_channels=2, out_channels=1), (2, 16))


def test_classes_reach_a_wrapped_network_and_its_null():
    model = model_of("classes")
    z, t = randn(2, 1, 4, 4, dtype=torch.float32), torch.full((2,), 0.5, dtype=torch.float64)
    said = [model.denoiser.eval()(z, t, condition(torch.tensor(each))).v for each in ([0, 1], [3, 3])]
    guided = model.denoise(z, 0.5, classes=[0, 1], guidance=2.0).v
    torch.testing.assert_close(guided, 3 * said[0] - 2 * said[1], rtol=1e-4, atol=1e-5)
