"""A smaller student's first weights: against networks that are built so that the smaller one must answer as they do."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import randn
from vdiff.models import unet
from vdiff.models.backbone import parameter_count
from vdiff.models.inheriting import inherit
from vdiff.models.unet import Attention, Resample, ResBlock, UNet, UNetStage
from vdiff.models.unet_config import UNetConfig

BASE = {"channels": 8, "embedding_channels": 12, "multipliers": (1, 2), "num_blocks": 2, "attention_strides": (2,)}
SHAPES = {
    "base": {},
    "attention": {"attention_strides": (1, 2), "num_heads": 4},
    "conv": {"resample": "conv", "time_affine": False},
    "classes": {"num_classes": 3, "null_class": True, "guidance_input": True},
    "fold": {"fold": 2, "attention_strides": (4,), "out_channels": 6},
    "odd": {"channels": 7, "multipliers": (1,), "attention_strides": ()},
}


def network(seed: int = 0, **changes: object) -> UNet:
    """A network of random weights in float64, in evaluation mode."""
    built = UNet(UNetConfig(**BASE | changes)).double().eval()  # type: ignore[arg-type]
    for k, parameter in enumerate(built.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=1000 * seed + k) / parameter[0].numel() ** 0.5)
    return built


def fresh(**changes: object) -> UNet:
    return UNet(UNetConfig(**BASE | changes)).double().eval()  # type: ignore[arg-type]


def answer(of: UNet, **told: Tensor) -> Tensor:
    size = 4 * of.config.fold
    z, timestep = randn(3, 3, size, size, seed=5), torch.tensor([0.0, 400.5, 1023.0], dtype=torch.float64)
    with torch.no_grad():
        out: Tensor = of(z, timestep, **told)
    return out


def told(config: UNetConfig) -> dict[str, Tensor]:
    """Classes and guidance, where the network takes them."""
    classes = {"classes": torch.tensor([0, 2, 1])} if config.num_classes else {}
    return classes | ({"guidance": torch.tensor([0.0, 1.5, 4.0])} if config.guidance_input else {})


def same_state(one: UNet, two: UNet) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


# Equal shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_shapes_give_equal_networks(shape):
    teacher, student = network(**SHAPES[shape]), fresh(**SHAPES[shape])
    found = inherit(student, teacher)
    assert same_state(student, teacher)
    assert torch.equal(answer(student, **told(student.config)), answer(teacher, **told(teacher.config)))
    tensors, numbers = len(teacher.state_dict()), parameter_count(teacher)
    assert (found.whole, found.part, found.fresh) == (tensors, 0, 0)
    assert (found.copied, found.parameters) == (numbers, numbers)


# Fewer channels: a narrow network inside a wide one


def parts_of(modules: nn.ModuleList, width: int) -> Iterator[tuple[nn.Module, list[int]]]:
    """Each module, and the channels of h and of the skip that go into it, read off the shapes of the convolutions."""
    for module in modules:
        block = module.block
        first = module.conv if block is None else block.conv1
        yield module, [width, first.in_channels - width] if isinstance(module, UNetStage) else [width]
        width = first.out_channels


def put(wide: Tensor, narrow: Tensor, *axes: tuple[list[int], list[int]]) -> None:
    """Write `narrow` into `wide`, each piece of an axis to the beginning of the same piece of the wide one.

    What reads other channels is zero, and other channels hold anything.
    """
    places = []
    for theirs, mine in axes:
        starts = [sum(theirs[:k]) for k in range(len(theirs))]
        places.append(torch.tensor([start + i for start, size in zip(starts, mine, strict=True) for i in range(size)]))
    with torch.no_grad():
        if len(places) == 1:
            wide[places[0]] = narrow
        else:
            wide[places[0]] = 0
            wide[places[0][:, None], places[1]] = narrow


def put_layer(wide: nn.Module, narrow: nn.Module, rows: tuple[list[int], list[int]], *columns) -> None:
    put(wide.weight, narrow.weight, rows, *columns)
    put(wide.bias, narrow.bias, rows)


def put_block(wide: ResBlock, narrow: ResBlock, inputs: tuple[list[int], list[int]]) -> None:
    out = ([wide.conv1.out_channels], [narrow.conv1.out_channels])
    emb = ([wide.time.in_features], [narrow.time.in_features])
    time = (out[0] * 2, out[1] * 2) if wide.time_affine else out
    put_layer(wide.norm1, narrow.norm1, inputs)
    put_layer(wide.conv1, narrow.conv1, out, inputs)
    put_layer(wide.time, narrow.time, time, emb)
    put_layer(wide.norm2, narrow.norm2, out)
    put_layer(wide.conv2, narrow.conv2, out, out)
    if isinstance(narrow.skip, nn.Conv2d):
        put_layer(wide.skip, narrow.skip, out, inputs)


def put_attention(wide: Attention, narrow: Attention) -> None:
    c = ([wide.out.in_features], [narrow.out.in_features])
    by_head = tuple([module.out.in_features // module.num_heads] * module.num_heads for module in (wide, narrow))
    put_layer(wide.norm, narrow.norm, c)
    for queries in (wide.qkv.weight, wide.qkv.bias):
        nn.init.zeros_(queries[: wide.out.in_features])  # the other channels have no part in the scores
    put_layer(wide.qkv, narrow.qkv, tuple(sizes * 3 for sizes in by_head), c)
    put_layer(wide.out, narrow.out, c, by_head)


def put_inside(wide: UNet, narrow: UNet) -> None:
    """Make the leading channels of a wide network the narrow one (whose frequencies are every other of the wide's)."""
    c = ([wide.config.channels], [narrow.config.channels])
    emb = ([wide.config.embedding_channels], [narrow.config.embedding_channels])
    for name in ("embed", "embed_guidance"):
        theirs, mine = getattr(wide, name), getattr(narrow, name)
        if mine is None:
            continue
        with torch.no_grad():
            theirs[0].weight.zero_()
            rows, step = mine[0].weight.shape[0], c[0][0] // c[1][0]
            theirs[0].weight[:rows, ::step] = mine[0].weight
        put(theirs[0].bias, mine[0].bias, emb)
        put_layer(theirs[2], mine[2], emb, emb)
    if narrow.embed_class is not None:
        with torch.no_grad():
            wide.embed_class.weight[:, : emb[1][0]] = narrow.embed_class.weight
    put_layer(wide.conv_in, narrow.conv_in, c, ([wide.conv_in.in_channels], [narrow.conv_in.in_channels]))
    for modules in ("down", "middle", "up"):
        both = (parts_of(getattr(net, modules), width_before(net, modules)) for net in (wide, narrow))
        for (theirs, their_parts), (mine, my_parts) in zip(*both, strict=True):
            inputs = (their_parts, my_parts)
            if mine.block is None:
                put_layer(theirs.conv, mine.conv, inputs, inputs)
                continue
            put_block(theirs.block, mine.block, inputs)
            if isinstance(getattr(mine, "attention", None), Attention):
                put_attention(theirs.attention, mine.attention)
    last = ([wide.conv_out.in_channels], [narrow.conv_out.in_channels])
    put_layer(wide.norm_out, narrow.norm_out, last)
    out = [narrow.conv_out.out_channels]
    put_layer(wide.conv_out, narrow.conv_out, (out, out), last)


def width_before(net: UNet, modules: str) -> int:
    """Channels of h before the first of `down`, `middle` or `up`."""
    return net.conv_in.out_channels if modules == "down" else net.middle[0].block.conv1.out_channels


def scale_queries(net: UNet, factor: float) -> None:
    """Make up for heads being of another width, by whose root scores are divided."""
    for module in net.modules():
        if isinstance(module, Attention):
            with torch.no_grad():
                for parameter in (module.qkv.weight, module.qkv.bias):
                    parameter[: len(parameter) // 3] *= factor


NARROW = {
    "plain": {},
    "attention_everywhere": {"attention_strides": (1, 2), "num_heads": 2},
    "three_levels": {"multipliers": (2, 1, 3), "attention_strides": (2,), "num_blocks": 1},
    "conv": {"resample": "conv", "time_affine": False},
    "told": {"num_classes": 3, "null_class": True, "guidance_input": True},
    "fold": {"fold": 2, "attention_strides": (4,), "out_channels": 6},
}


@pytest.mark.parametrize("shape", NARROW)
def test_a_narrow_network_is_found_inside_a_wide_one(shape, monkeypatch):
    """Each channel has a norm of its own here, so that the other channels of the wide one change nothing."""
    monkeypatch.setattr(unet, "group_norm", lambda channels, *_: nn.GroupNorm(channels, channels))
    narrow = network(seed=1, **NARROW[shape])
    wide = network(seed=2, **NARROW[shape] | {"channels": 16, "embedding_channels": 20})
    put_inside(wide, narrow)
    scale_queries(wide, 2**0.5)
    expected = answer(narrow, **told(narrow.config))
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(wide, **told(wide.config)), expected, rtol=0, atol=1e-10)
    student = fresh(**NARROW[shape])
    found = inherit(student, wide)
    assert found.fresh == 0
    scale_queries(student, 2**-0.5)
    for name, tensor in narrow.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, rtol=1e-14, atol=0, msg=name)


def test_frequencies_between_two_are_shared_out():
    """A function of the timestep that is smooth in the frequency is kept, though only the first is common."""
    teacher, student = network(channels=96), fresh(channels=64)
    timestep = torch.linspace(-1, 5, 50, dtype=torch.float64)  # so small that all but the first frequencies are slow
    with torch.no_grad():
        ours, their = teacher.embed[0], student.embed[0]
        ours.weight[:] = torch.exp(-((torch.arange(96) % 48 - 24.0) ** 2) / 50)  # no weight at the fastest
        inherit(student, teacher)
        expected = ours(unet.timestep_embedding(timestep, 96).double())
        found = their(unet.timestep_embedding(timestep, 64).double())
    assert (found - expected).abs().max() < 0.02 * expected.std()
    with torch.no_grad():
        their.weight[:] = torch.cat([ours.weight[:, :32], ours.weight[:, 48:80]], dim=1)  # leading ones
        assert (their(unet.timestep_embedding(timestep, 64).double()) - expected).abs().max() > expected.std()


@pytest.mark.parametrize("shift", [0, 1])
def test_a_shift_of_the_frequencies_is_heeded(shift):
    """With half − 1 intervals instead of half, 9 frequencies are every other of 17, to the last."""
    teacher, student = network(channels=34, freq_shift=1), fresh(channels=18, freq_shift=shift)
    inherit(student, teacher)
    every_other = torch.cat([teacher.embed[0].weight[:, :17:2], teacher.embed[0].weight[:, 17::2]], dim=1)
    share = teacher.embed[0].weight[:, 1:16:2] / 2
    neighbours = every_other[:, :9].clone()
    neighbours[:, :8] += share
    neighbours[:, 1:] += share
    assert torch.allclose(student.embed[0].weight[:, :9], neighbours, rtol=1e-12) == (shift == 1)


# Fewer blocks: a network whose other blocks do nothing


def silence(stage: UNetStage) -> None:
    """Let a stage pass h on: no residual branch, no attention, no skip from the way down."""
    block = stage.block
    with torch.no_grad():
        block.conv2.weight.zero_(), block.conv2.bias.zero_()
        if isinstance(block.skip, nn.Conv2d):
            block.skip.weight.zero_(), block.skip.bias.zero_()
            block.skip.weight[:, : block.conv1.out_channels, 0, 0] = torch.eye(block.conv1.out_channels)
        if isinstance(stage.attention, Attention):
            stage.attention.out.weight.zero_(), stage.attention.out.bias.zero_()


def stages_by_level(modules: nn.ModuleList) -> list[list[UNetStage]]:
    levels: list[list[UNetStage]] = [[]]
    for module in modules:
        if isinstance(module, Resample):
            levels.append([])
        else:
            levels[-1].append(module)
    return levels


@pytest.mark.parametrize(
    ("blocks", "fewer", "kept_down", "kept_up"),
    [
        (3, 2, [0, 2], [0, 2, 3]),
        (3, 1, [0], [2, 3]),
        (2, 1, [0], [1, 2]),
        (5, 3, [0, 2, 4], [0, 2, 4, 5]),
    ],
)
def test_blocks_that_do_nothing_are_left_out(blocks, fewer, kept_down, kept_up):
    """With all levels alike, so that a block may pass on what comes from below."""
    options = {"multipliers": (1, 1), "attention_strides": (1, 2)}
    teacher, student = network(num_blocks=blocks, **options), fresh(num_blocks=fewer, **options)
    for stages in stages_by_level(teacher.down):
        for k in set(range(blocks)) - set(kept_down):
            silence(stages[k])
    for stages in stages_by_level(teacher.up):
        for k in set(range(blocks + 1)) - set(kept_up):
            silence(stages[k])
    found = inherit(student, teacher)
    assert (found.part, found.fresh) == (0, 0)
    expected = answer(teacher)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(student), expected, rtol=0, atol=1e-12)


def test_more_blocks_on_the_way_down_begin_as_nothing():
    """The blocks between the first and the last are fresh, so they pass on what they are given."""
    teacher, student = (
        network(multipliers=(1,), attention_strides=()),
        fresh(multipliers=(1,), attention_strides=(), num_blocks=3),
    )
    inherit(student, teacher)
    h, embedding = randn(2, 8, 4, 4), randn(2, 12)
    assert torch.equal(student.down[1](h, embedding), h)
    for mine, theirs in ((student.down[0], teacher.down[0]), (student.down[2], teacher.down[1])):
        assert torch.equal(mine(h, embedding), theirs(h, embedding))


# What changes no answer


def test_less_attention_is_attention_that_does_nothing():
    teacher, student = network(attention_strides=(1, 2)), fresh(attention_strides=(2,))
    found = inherit(student, teacher)
    assert (found.part, found.fresh) == (0, 0)
    assert not torch.equal(answer(student), answer(teacher))
    for module in [*stages_by_level(teacher.down)[0], *stages_by_level(teacher.up)[-1]]:
        nn.init.zeros_(module.attention.out.weight)
        nn.init.zeros_(module.attention.out.bias)
    assert torch.equal(answer(student), answer(teacher))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_input": True},
        {"attention_strides": (1, 2)},
        {"dropout": 0.3},
        {"guidance_input": True, "dropout": 0.1},
    ],
)
def test_what_is_new_and_does_nothing_changes_no_answer(changes):
    teacher, student = network(), fresh(**changes)
    found = inherit(student, teacher)
    assert found.copied == parameter_count(teacher)
    told_too = {"guidance": torch.tensor([0.0, 1.0, 4.0])} if "guidance_input" in changes else {}
    assert torch.equal(answer(student, **told_too), answer(teacher))


@pytest.mark.parametrize(("mine", "theirs"), [(True, False), (False, True)])
def test_no_class_is_the_last_row_or_none(mine, theirs):
    teacher, student = network(num_classes=3, null_class=theirs), fresh(num_classes=3, null_class=mine)
    found = inherit(student, teacher)
    assert (found.whole, found.part, found.fresh) == (len(student.state_dict()) - 1, 1, 0)
    classes = torch.tensor([0, 2, 1])
    assert torch.equal(answer(student, classes=classes), answer(teacher, classes=classes))


def test_heads_put_together_keep_their_channels():
    """Two heads in place of four: each reads and answers what two of the teacher's did."""
    teacher, student = network(num_heads=4), fresh(num_heads=2)
    assert inherit(student, teacher).part == 0
    assert same_state(student, teacher)


def test_fewer_heads_of_the_same_width_are_whole_heads():
    """Of four heads the first of each two, with what they wrote to the leading channels."""
    options = {"multipliers": (1,), "attention_strides": ()}
    teacher = network(channels=32, head_channels=8, **options)
    student = fresh(channels=16, head_channels=8, **options)
    inherit(student, teacher)
    mine, theirs = student.middle[0].attention, teacher.middle[0].attention
    rows = [*range(8), *range(16, 24)]
    for third in range(3):
        part = theirs.qkv.weight[32 * third : 32 * third + 32]
        assert torch.equal(mine.qkv.weight[16 * third : 16 * third + 16], part[rows, :16])
    assert torch.equal(mine.out.weight, theirs.out.weight[:16, rows])


def test_a_block_that_changes_its_width_begins_with_the_identity():
    teacher, student = network(multipliers=(1, 1)), fresh(multipliers=(1, 2))
    nn.init.constant_(student.down[3].block.skip.weight, 7.0)
    inherit(student, teacher)
    skip = student.down[3].block.skip
    assert torch.equal(skip.weight[:8, :, 0, 0], torch.eye(8).double())
    assert skip.weight[8:].eq(7).all()
    assert not skip.bias[:8].any()


# What does not fit


def test_what_does_not_fit_stays_as_it_was():
    teacher, student = (
        network(out_channels=6),
        fresh(fold=2, attention_strides=(4,), resample="conv", time_affine=False),
    )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = inherit(student, teacher)
    kept = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])}
    always = {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}
    assert always <= kept
    assert {name for name in kept if ".time." in name} == {name for name in before if ".time." in name}
    assert {name for name in kept if re.fullmatch(r"\w+\.\d+\.conv\.\w+", name)} != set()
    assert found.fresh == len(kept)
    assert found.whole + found.part + found.fresh == len(before)
    assert found.copied < found.parameters == parameter_count(student)


def test_both_answers_become_one_that_begins_at_nothing():
    teacher, student = network(out_channels=6), fresh()
    found = inherit(student, teacher)
    assert found.fresh == 2
    assert not answer(student).any()


def test_it_says_how_much_was_inherited():
    student = fresh(guidance_input=True)
    found = inherit(student, network())
    share = found.copied / found.parameters
    assert str(found) == (
        f"{share:.0%} of {parameter_count(student):,} parameters from the teacher ({found.whole} tensors whole, "
        "0 in part, 4 fresh)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 1}, "the student's in_channels is 1, the teacher's 3"),
        ({"num_classes": 4}, "the student's num_classes is 4, the teacher's 0"),
    ],
)
def test_other_images_and_other_classes_are_refused(changes, message):
    student = fresh(**changes)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inherit(student, network())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_the_teacher_is_left_alone_and_shares_nothing():
    teacher = network()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = fresh(channels=4)
    inherit(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_precision_and_training_are_the_students_own():
    teacher, student = network(), UNet(UNetConfig(**BASE))
    inherit(student, teacher)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in student.parameters())
    torch.testing.assert_close(student.conv_in.weight, teacher.conv_in.weight.float(), rtol=0, atol=0)
