"""The first weights of a smaller UNet of diffusers: against teachers of which it must answer the same."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.oracles import randn
from tests.pipelines import UNETS
from vdiff.models.backbone import parameter_count
from vdiff.models.inheriting import Inherited, inherit
from vdiff.models.wrapped import DiffusersBackbone


def network(kind: str, seed: int = 0, **changes: Any) -> DiffusersBackbone:
    """A UNet with random weights in float64."""
    model = diffusers.UNet2DConditionModel(**{**UNETS[kind], **changes}).double().eval()
    for k, weight in enumerate(model.parameters()):
        weight.data.copy_(randn(*weight.shape, seed=1000 * seed + k) / weight[0].numel() ** 0.5)
    return DiffusersBackbone(model)


def answer(of: DiffusersBackbone, **condition: Tensor) -> Tensor:
    config = model(of).config
    pooled = {"text_pooled": randn(2, 48, seed=3), "time_ids": torch.full((2, 6), 64.0).double()}
    z, timestep = randn(2, 4, 8, 8, seed=1), torch.tensor([7.0, 900.0]).double()
    text = randn(2, 5, config.cross_attention_dim, seed=2)
    with torch.no_grad():
        found: Tensor = of(z, timestep, text=text, **(pooled if config.addition_embed_type else {}), **condition)
    return found


def model(of: DiffusersBackbone) -> Any:
    """The module of diffusers."""
    return of.model


def silence(resnet: Any, attention: Any = None) -> None:
    """Let a block pass on what comes from the block before it, without the skip."""
    silent = [resnet.conv2, *([attention.proj_out] if attention is not None else [])]
    with torch.no_grad():
        for layer in silent:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if (shortcut := resnet.conv_shortcut) is not None:
            nn.init.zeros_(shortcut.bias)
            shortcut.weight[:] = torch.eye(*shortcut.weight.shape[:2])[:, :, None, None]


@pytest.mark.parametrize("kind", UNETS)
def test_equal_shapes_give_equal_networks(kind):
    teacher, student = network(kind), network(kind, seed=1)
    found = inherit(student, teacher)
    number = parameter_count(teacher)
    assert found == Inherited(len(list(teacher.parameters())), 0, 0, number, number)
    assert torch.equal(answer(student), answer(teacher))


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize(("blocks", "fewer", "kept_down", "kept_up"), [(2, 1, [0], [0, 2]), (3, 2, [0, 2], [0, 2, 3])])
def test_blocks_that_do_nothing_are_left_out(kind, blocks, fewer, kept_down, kept_up):
    """A block of the way up gets the skip of the block before the omitted one, which is what the omitted one passes on.

    With levels of equal width, so that the first block of a level may pass on what comes from below.
    """
    width = (16,) * len(UNETS[kind]["block_out_channels"])
    teacher = network(kind, layers_per_block=blocks, block_out_channels=width)
    student = network(kind, seed=1, layers_per_block=fewer, block_out_channels=width)
    for parts, kept in ((model(teacher).down_blocks, kept_down), (model(teacher).up_blocks, kept_up)):
        for part in parts:
            for k in set(range(len(part.resnets))) - set(kept):
                silence(part.resnets[k], getattr(part, "attentions", [None] * 9)[k])
    found = inherit(student, teacher)
    assert (found.part, found.fresh) == (0, 0)
    expected = answer(teacher)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(student), expected, rtol=0, atol=1e-12)


def test_layers_of_transformers_and_the_middle_are_left_out():
    teacher = network("sdxl")
    student = network("sdxl", seed=1, transformer_layers_per_block=(1, 1, 2), mid_block_type=None)
    middle = model(teacher).mid_block
    silence(middle.resnets[0], middle.attentions[0])
    silence(middle.resnets[1])
    for module in model(teacher).modules():
        layers = getattr(module, "transformer_blocks", [])
        for layer in layers[1:2]:  # of 3 the second, of 2 the last
            for last in (layer.attn1.to_out[0], layer.attn2.to_out[0], layer.ff.net[2]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    found = inherit(student, teacher)
    assert (found.part, found.fresh) == (0, 0)
    torch.testing.assert_close(answer(student), answer(teacher), rtol=0, atol=1e-12)


def test_a_level_less_keeps_those_next_to_the_picture():
    """Level k of the way down is level k of the way up, counted from the picture."""
    levels = {"block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
    }  # fmt: skip
    teacher, student = network("sdxl"), network("sdxl", seed=1, **levels)
    inherit(student, teacher)
    mine, theirs = model(student), model(teacher)
    for ours, other in ((mine.down_blocks[1], theirs.down_blocks[1]), (mine.up_blocks[1], theirs.up_blocks[2])):
        assert torch.equal(ours.resnets[0].conv2.weight, other.resnets[0].conv2.weight)
    assert torch.equal(mine.up_blocks[0].attentions[1].proj_in.weight, theirs.up_blocks[1].attentions[1].proj_in.weight)


def test_fewer_channels_are_the_leading_ones_of_each_piece():
    """Of h and of the skip, of each head, of the values and the gates; of the time, the cosines and the sines."""
    teacher = network("sd15", block_out_channels=(32, 32, 64, 64), attention_head_dim=4)
    student = network("sd15", seed=1, block_out_channels=(16, 16, 32, 32), attention_head_dim=2)
    assert inherit(student, teacher).fresh == 0
    mine, theirs = model(student), model(teacher)
    ours, other = mine.up_blocks[2].resnets[0], theirs.up_blocks[2].resnets[0]  # h of 64 and a skip of 32 channels
    kept = [*range(32), *range(64, 80)]
    for name in ("conv1", "conv_shortcut"):
        assert torch.equal(getattr(ours, name).weight, getattr(other, name).weight[:16, kept])
    assert torch.equal(ours.norm1.weight, other.norm1.weight[kept])
    one, two = (each.down_blocks[0].attentions[0].transformer_blocks[0] for each in (mine, theirs))
    heads = [*range(8), *range(16, 24)]  # four heads of 8 channels, of which two are kept
    assert torch.equal(one.attn2.to_k.weight, two.attn2.to_k.weight[heads])
    assert torch.equal(one.attn1.to_out[0].weight, two.attn1.to_out[0].weight[:16, heads])
    halves = [*range(64), *range(128, 192)]
    assert torch.equal(one.ff.net[0].proj.weight, two.ff.net[0].proj.weight[halves, :16])
    time, of_teacher = mine.time_embedding.linear_1.weight, theirs.time_embedding.linear_1.weight
    assert torch.equal(time[:, [0, 8]], of_teacher[:64, [0, 16]] + of_teacher[:64, [1, 17]] / 2)


def test_a_block_that_changes_its_width_begins_with_the_identity():
    teacher = network("sd15", block_out_channels=(16, 16, 16, 16))
    student = network("sd15", seed=1, block_out_channels=(16, 32, 32, 32))
    inherit(student, teacher)
    assert model(teacher).down_blocks[1].resnets[0].conv_shortcut is None
    shortcut = model(student).down_blocks[1].resnets[0].conv_shortcut
    assert torch.equal(shortcut.weight[:16, :, 0, 0], torch.eye(16).double())
    assert not shortcut.bias[:16].any()


@pytest.mark.parametrize("weight", [0.0, 6.5])
def test_guidance_as_a_new_input_changes_nothing(weight):
    teacher, student = network("sdxl"), network("sdxl", seed=1, time_cond_proj_dim=8)
    found = inherit(student, teacher)
    assert found.copied - parameter_count(teacher) == 16 * 8
    guidance = torch.full((2,), weight).double()
    assert torch.equal(answer(student, guidance=guidance), answer(teacher))
    again = network("sdxl", seed=2, time_cond_proj_dim=8)
    nn.init.normal_(model(student).time_embedding.cond_proj.weight)
    inherit(again, student)
    assert torch.equal(answer(again, guidance=guidance), answer(student, guidance=guidance))
