"""The condition: named tensors by row, and their null."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import randn
from vdiff.models.condition import Condition, Signature

TEXT, EMPTY = randn(4, 3, 2), randn(3, 2, seed=1)
CLASSES, WEIGHTS = torch.tensor([2, 0, 1, 2]), torch.tensor([0.0, 1.5, 4.0, 2.0])
WHOLE = Condition({"classes": CLASSES, "text": TEXT, "guidance": WEIGHTS}, {"classes": 3, "text": EMPTY})


def test_rows_are_taken_of_every_tensor():
    for rows, index in ((slice(1, 3), [1, 2]), (torch.tensor([3, 3, 0]), [3, 3, 0])):
        found = WHOLE[rows]
        assert found.null is WHOLE.null
        assert all(torch.equal(found.tensors[name], WHOLE.tensors[name][index]) for name in WHOLE.tensors)


def test_what_has_a_null_is_dropped_by_row_or_whole():
    """The null is a number, or a row of any shape; a weight of guidance has none and stays."""
    mask = torch.tensor([True, False, False, True])
    some, none = WHOLE.drop(mask), WHOLE.drop()
    assert some.tensors["classes"].tolist() == [3, 0, 1, 3]
    assert none.tensors["classes"].tolist() == [3, 3, 3, 3]
    assert torch.equal(some.tensors["text"], torch.stack([EMPTY, TEXT[1], TEXT[2], EMPTY]))
    assert torch.equal(none.tensors["text"], EMPTY.expand(4, 3, 2))
    assert some.tensors["guidance"] is none.tensors["guidance"] is WEIGHTS
    assert torch.equal(WHOLE.tensors["classes"], torch.tensor([2, 0, 1, 2])), "it is a copy"
    assert some.tensors["classes"].dtype == torch.int64


def test_a_condition_and_its_null_follow_each_other():
    pair = WHOLE.cat(WHOLE.drop())
    assert pair.tensors["classes"].tolist() == [2, 0, 1, 2, 3, 3, 3, 3]
    assert torch.equal(pair.tensors["guidance"], torch.cat([WEIGHTS, WEIGHTS]))


def test_only_what_has_a_null_can_be_dropped():
    assert WHOLE.can_drop
    assert not Condition({"guidance": WEIGHTS}, {"classes": 3}).can_drop
    assert not Condition({"classes": CLASSES}).can_drop
    assert WHOLE.with_tensors(classes=None, text=None).tensors.keys() == {"guidance"}


def test_real_numbers_change_their_type_and_everything_its_device():
    found = WHOLE.to("meta", torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in found.tensors.items()} == {
        "classes": torch.int64, "text": torch.bfloat16, "guidance": torch.bfloat16,
    }  # fmt: skip
    assert {tensor.device.type for tensor in found.drop().tensors.values()} == {"meta"}
    assert WHOLE.to("cpu").tensors["classes"] is CLASSES


def test_rows_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="conditions of different numbers of rows: classes 4, text 3"):
        Condition({"classes": CLASSES, "text": TEXT[:3]})


def test_a_network_is_told_what_it_takes():
    takes = Signature(3, 3, ("classes",), {"classes": 3}, 3)
    found = takes.condition(classes=CLASSES, guidance=WEIGHTS, text=None)
    assert (found.tensors.keys(), found.null, found.can_drop) == ({"classes"}, {"classes": 3}, True)
    assert not takes.takes_guidance
    assert Signature(3, 3, ("classes", "guidance")).takes_guidance
