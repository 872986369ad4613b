import json
from dataclasses import replace
from typing import Any

import pytest
from bpwise.checkpoint.model.structure import BlockStructure, InputGroup, LinearPlace, ModelStructure
from bpwise.checkpoint.model.structure_json import structure_from_json, structure_to_json
from bpwise.errors import FormatError

ATTENTION = BlockStructure(
    groups=(
        InputGroup(("attn.q", "attn.k"), reads_stream=True),
        InputGroup(("attn.o",), adds="norm", normed=True, scale=0.22),
    ),
    places={
        "attn.q": LinearPlace("attn.qk.weight", rows=(0, 8)),
        "attn.k": LinearPlace("attn.qk.weight", rows=(8, 12)),
        "attn.o": LinearPlace("attn.o.weight", turned=True),
    },
)


def with_experts(count: int) -> BlockStructure:
    groups, places = [*ATTENTION.groups], dict(ATTENTION.places)
    for number in range(count):
        first = (f"mlp.experts.{number}.w1", f"mlp.experts.{number}.w3")
        groups.append(InputGroup(first, expert=number, reads_stream=True))
        groups.append(InputGroup((f"mlp.experts.{number}.w2",), expert=number))
        for name, rows in zip(first, ((0, 4), (4, 8)), strict=True):
            places[name] = LinearPlace("mlp.experts.gate_up", expert=number, rows=rows, turned=True)
        places[f"mlp.experts.{number}.w2"] = LinearPlace("mlp.experts.down", expert=number)
    return BlockStructure(tuple(groups), places, routers=("mlp.gate",), experts=("mlp.experts",))


def model(*blocks: BlockStructure) -> ModelStructure:
    return ModelStructure("model.layers", "model.embed_tokens", "lm_head", blocks)


def read(value: Any) -> ModelStructure:
    return structure_from_json(json.loads(json.dumps(value)), FormatError, where="m: structure")


def test_round_trip() -> None:
    structure = model(ATTENTION, with_experts(3), ATTENTION, with_experts(3))
    back = read(structure_to_json(structure))
    assert back == structure
    assert [group.expert for group in back.structures[1].groups] == [None, None, 0, 0, 1, 1, 2, 2]
    first, second, third, fourth = back.structures
    assert first is third
    assert second is fourth


def test_experts_may_have_names_of_their_own() -> None:
    block = with_experts(3)
    renamed = {name: name.replace("mlp.experts.", "moe.experts.") for name in block.places}
    groups = tuple(replace(group, linears=tuple(renamed[x] for x in group.linears)) for group in block.groups)
    places = {renamed[name]: place for name, place in block.places.items()}
    structure = model(replace(block, groups=groups, places=places))
    assert read(structure_to_json(structure)) == structure


def test_kinds_are_written_once_and_experts_by_their_number() -> None:
    text = json.dumps(structure_to_json(model(*[with_experts(512)] * 61, ATTENTION)))
    assert len(text) < 2000
    written = json.loads(text)
    assert written["kind_of_block"] == [0] * 61 + [1]
    assert written["kinds"][0]["experts"][0]["count"] == 512


def test_experts_that_differ_are_not_written() -> None:
    block = with_experts(2)
    uneven = replace(block, places={**block.places, "mlp.experts.1.w2": LinearPlace("mlp.experts.other", expert=1)})
    with pytest.raises(AssertionError, match="experts differ"):
        structure_to_json(model(uneven))


MANY = {"module": "mlp", "count": 2**40, "groups": [{"linears": [{"name": "w", "parameter": "w"}]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"kind_of_block": [0, 1]}, "kind_of_block must hold indices into kinds", id="no such kind"),
        pytest.param({"kind_of_block": [-1]}, "not a valid value", id="negative"),
        pytest.param({"blocks": None}, "blocks: not a valid value", id="no name"),
        pytest.param({"kinds": [{"groups": [{"linears": []}]}]}, "not a valid value", id="no linears"),
        pytest.param({"kinds": [{"experts": [MANY]}]}, "at most 1048576 linears", id="too many experts"),
    ],
)
def test_damaged(change: dict[str, Any], message: str) -> None:
    written = structure_to_json(model(ATTENTION))
    with pytest.raises(FormatError, match=f"m: structure.*{message}"):
        read({**written, **change})
