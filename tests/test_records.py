"""JSON objects become dataclasses, or one line says what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import msgspec
import pytest

from vdiff.errors import OptionError, VdiffError
from vdiff.records import check_same_settings, read_record, record_of


@dataclass(frozen=True)
class Inner:
    value: float
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    number: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=2.0**63)] = 0.0
    share: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.25
    text: str = ""
    names: list[str] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    table: dict[str, Any] | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    triples: tuple[tuple[int, int, float], ...] = ()


WHOLE = Outer(
    *(7, 1.5, 0.125, "x", ["a", "b"], (8, 16), {"deep": {"free": [1, None]}}, {"images": 3}),
    rows=(Inner(1.0), Inner(2.0, "n")),
    by_name={"fd": Inner(0.5)},
    triples=((1, 2, 0.5),),
)


def test_a_file_is_read_as_it_was_written(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(asdict(WHOLE)))
    assert read_record(tmp_path / "x.json", Outer, "advice") == WHOLE
    assert record_of(Outer, {"number": 3}, "x", "advice") == Outer(3)


def test_a_number_may_be_written_without_a_point():
    found = record_of(Outer, {"number": 3, "seconds": 2, "triples": [[1, 2, 3]]}, "x", "advice")
    assert (type(found.seconds), type(found.triples[0][2])) == (float, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": ...}, "x.json lacks the key 'number'; advice"),
        ({"nummer": 1}, "x.json has an unknown key 'nummer'; did you mean 'number'?"),
        ({"zzz": 1}, "x.json has an unknown key 'zzz'; advice"),
        ({"number": 0}, "x.json: 'number' must be at least 1, not 0; advice"),
        ({"number": 10**400}, "x.json: 'number' must be at most 1048576, not 1000"),
        ({"number": True}, "x.json: 'number' must be a whole number; advice"),
        ({"number": 1.0}, "x.json: 'number' must be a whole number; advice"),
        ({"number": "1"}, "x.json: 'number' must be a whole number; advice"),
        ({"number": None}, "x.json: 'number' must be a whole number; advice"),
        ({"seconds": math.nan}, "x.json: 'seconds' must be at least 0, not nan; advice"),
        ({"seconds": math.inf}, "x.json: 'seconds' must be at most 9223372036854775808, not inf; advice"),
        ({"seconds": 10**400}, "x.json: 'seconds'"),
        ({"share": 0}, "x.json: 'share' must be above 0, not 0; advice"),
        ({"share": 0.5}, "x.json: 'share' must be below 0.5, not 0.5; advice"),
        ({"text": 3}, "x.json: 'text' must be a string; advice"),
        ({"names": "ab"}, "x.json: 'names' must be a list; advice"),
        ({"names": ["a", 3]}, "x.json: 'names' must be a list of strings; advice"),
        ({"table": []}, "x.json: 'table' must be an object or null; advice"),
        ({"counts": 3}, "x.json: 'counts' must be an object; advice"),
        ({"rows": [3]}, "x.json: 'rows' must be a list of objects; advice"),
        ({"rows": [{}]}, "x.json: 'rows[0]': Object missing required field `value`; advice"),
        ({"rows": [{"value": 1}, {"value": "x"}]}, "x.json: 'rows[1].value' must be a number; advice"),
        ({"rows": [{"value": 1, "more": 2}]}, "x.json has an unknown key 'more'; advice"),
        ({"by_name": {"fd": {"value": 1, "more": 2}}}, "x.json has an unknown key 'more'; advice"),
        ({"triples": [[1, 2]]}, "x.json: 'triples[0]': Expected `array` of length 3, got 2; advice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changes, message):
    values = {key: value for key, value in {"number": 1, **changes}.items() if value is not ...}
    with pytest.raises(VdiffError) as error:
        record_of(Outer, values, "x.json", "advice")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [[], None, 3, "{}"])
def test_what_is_no_object(values):
    with pytest.raises(VdiffError, match="x is not a JSON object; advice"):
        record_of(Outer, values, "x", "advice")


def test_work_goes_on_with_the_settings_it_began_with_only():
    before = {"steps": 4, "seed": 1, "name": None, "gone": 3}
    hint = "leave --{} out".format
    for now in (before, {**before, "seed": 2}):
        check_same_settings(before, now, done="x was begun", hint=hint, but=["seed"])
    for change, message in [
        ({"steps": 8, "seed": 2}, "x was begun with steps 4, not 8; leave --steps out"),
        ({"name": "a"}, "x was begun with name none, not a; leave --name out"),
        ({"new": 5}, "x was begun with new none, not 5; leave --new out"),
    ]:
        with pytest.raises(OptionError) as error:
            check_same_settings(before, {**before, **change}, done="x was begun", hint=hint, error=OptionError)
        assert str(error.value) == message
    with pytest.raises(VdiffError, match="with gone 3, not none"):
        check_same_settings(before, {"steps": 4, "seed": 1, "name": ""}, done="x", hint=hint, but=["name"])
