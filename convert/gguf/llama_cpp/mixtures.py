"""llama.cpp's fixed mixtures as data: what ``llama-quantize MODEL OUT Q4_K_M`` means.

A mixture is a default type, types for the output head and the token embedding, and exceptions for the roles of
tensors: the first whose condition holds decides. The facts are those of llama.cpp's ``src/llama-quant.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ....errors import ConfigError
from ..file.roles import Role

__all__ = ["MIXTURES", "Mixture", "Spot", "label_in", "mixture"]


@dataclass(frozen=True, slots=True)
class Spot:
    """What the conditions may ask about a tensor.

    Attributes:
        index: How many of its role came before; in a model of experts, the number of its layer.
        count: Number of layers; for V, number of V tensors.
        queries_per_kv: Query heads that share a key and value head, in the first layer.
        experts: Experts a layer, 0 if it has none.
        falcon: Whether the architecture is Falcon, which llama.cpp treats apart.
        importance: Whether an importance matrix was given.
    """

    index: int
    count: int
    queries_per_kv: int
    experts: int
    falcon: bool
    importance: bool


Condition = Callable[[Spot], bool]
Exceptions = tuple[tuple[Condition, str], ...]


def _always(_: Spot) -> bool:
    return True


def _shared(spot: Spot) -> bool:
    return spot.queries_per_kv >= 4


def _shared_or_experts(spot: Spot) -> bool:
    return spot.queries_per_kv >= 4 or spot.experts >= 4


def _eight_experts(spot: Spot) -> bool:
    return spot.experts == 8


def _first_eighth(spot: Spot) -> bool:
    return spot.index < spot.count // 8


def _first_sixteenth(spot: Spot) -> bool:
    return spot.index < spot.count // 16


def _middle(spot: Spot) -> bool:
    return spot.count // 8 <= spot.index < 7 * spot.count // 8


def _outer_and_every_third(spot: Spot) -> bool:
    eighth = spot.count // 8
    return spot.index < eighth or spot.index >= 7 * spot.count // 8 or (spot.index - eighth) % 3 == 2


def _before(number: int) -> Condition:
    return lambda spot: spot.index < number


def _blind(condition: Condition = _always) -> Condition:
    """Only without an importance matrix."""
    return lambda spot: not spot.importance and condition(spot)


def _informed(condition: Condition) -> Condition:
    """Only with an importance matrix."""
    return lambda spot: spot.importance and condition(spot)


def _falcon(condition: Condition = _always) -> Condition:
    return lambda spot: spot.falcon and condition(spot)


def _not_falcon(condition: Condition = _always) -> Condition:
    return lambda spot: not spot.falcon and condition(spot)


def _few_experts(spot: Spot) -> bool:
    return not spot.falcon and spot.experts != 8


def _many_experts(spot: Spot) -> bool:
    return not spot.falcon and spot.experts == 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One of llama.cpp's fixed mixtures.

    Attributes:
        name: As llama-quantize takes it: ``Q4_K_M``.
        file_type: Its number in ``general.file_type``.
        default: Type of what has no exception.
        output: Type of the output head, and of the token embedding that is one.
        embedding: Type of a token embedding that is not the head; None for the default.
        exceptions: By role, conditions with the type that they give.
        low: Whether it is one of the mixtures at two bits and below, which treat eight experts otherwise.
    """

    name: str
    file_type: int
    default: str
    output: str = "Q6_K"
    embedding: str | None = None
    exceptions: Mapping[Role, Exceptions] = field(default_factory=dict)
    low: bool = False


_V, _K, _Q, _O, _DOWN = Role.V, Role.K, Role.Q, Role.ATTENTION_OUTPUT, Role.DOWN
_UP, _GATE = Role.UP, Role.GATE

_EIGHT_EXPERTS_OUTPUT = ((_many_experts, "Q5_K"),)


def _low(name: str, file_type: int, default: str, *, rich: bool, output_projection: str | None) -> Mixture:
    """Return a mixture at two bits or below: the sensitive tensors get IQ3_S in a rich one, else Q2_K."""
    better = "IQ3_S" if rich else "Q2_K"
    projection: Exceptions = ((_eight_experts, "Q5_K"),)
    if output_projection:
        projection += ((_always, output_projection),)
    return Mixture(
        name=name,
        file_type=file_type,
        default=default,
        output="Q5_K",
        embedding=better,
        low=True,
        exceptions={
            _V: ((_shared_or_experts, "Q4_K"), (_always, better)),
            _K: ((_eight_experts, "Q4_K"),),
            _DOWN: ((_first_eighth, better),),
            _O: projection,
        },
    )


_ALL = (
    Mixture(name="F32", file_type=0, default="F32"),
    Mixture(name="F16", file_type=1, default="F16"),
    Mixture(name="BF16", file_type=32, default="BF16"),
    Mixture(name="Q4_0", file_type=2, default="Q4_0", exceptions={_DOWN: ((_informed(_first_eighth), "Q4_1"),)}),
    Mixture(name="Q4_1", file_type=3, default="Q4_1"),
    Mixture(name="Q5_0", file_type=8, default="Q5_0", exceptions={_DOWN: ((_informed(_first_eighth), "Q5_1"),)}),
    Mixture(name="Q5_1", file_type=9, default="Q5_1"),
    Mixture(name="Q8_0", file_type=7, default="Q8_0", output="Q8_0"),
    Mixture(name="MXFP4_MOE", file_type=38, default="MXFP4", output="Q8_0"),
    Mixture(
        name="Q2_K",
        file_type=10,
        default="Q2_K",
        exceptions={
            _V: ((_shared, "Q4_K"), (_always, "Q3_K")),
            _DOWN: ((_always, "Q3_K"),),
            _O: (*_EIGHT_EXPERTS_OUTPUT, (_few_experts, "Q3_K")),
        },
    ),
    Mixture(
        name="Q2_K_S",
        file_type=21,
        default="Q2_K",
        exceptions={_V: ((_shared, "Q4_K"),), _DOWN: ((_first_eighth, "Q4_K"),)},
    ),
    Mixture(name="Q3_K_S", file_type=11, default="Q3_K", exceptions={_O: _EIGHT_EXPERTS_OUTPUT}),
    Mixture(
        name="Q3_K_M",
        file_type=12,
        default="Q3_K",
        exceptions={
            _V: ((_before(2), "Q5_K"), (_always, "Q4_K")),
            _DOWN: (
                (_first_sixteenth, "Q5_K"),
                (_not_falcon(), "Q4_K"),
                (_outer_and_every_third, "Q4_K"),
            ),
            _O: (*_EIGHT_EXPERTS_OUTPUT, (_few_experts, "Q4_K")),
        },
    ),
    Mixture(
        name="Q3_K_L",
        file_type=13,
        default="Q3_K",
        exceptions={
            _V: ((_always, "Q5_K"),),
            _DOWN: ((_falcon(), "Q4_K"), (_always, "Q5_K")),
            _O: ((_falcon(), "Q4_K"), (_few_experts, "Q5_K")),
        },
    ),
    Mixture(
        name="Q4_K_S",
        file_type=14,
        default="Q4_K",
        exceptions={
            _V: ((_before(4), "Q5_K"),),
            _DOWN: ((_not_falcon(_first_eighth), "Q5_K"),),
            _O: _EIGHT_EXPERTS_OUTPUT,
        },
    ),
    Mixture(
        name="Q4_K_M",
        file_type=15,
        default="Q4_K",
        exceptions={
            _V: ((_outer_and_every_third, "Q6_K"),),
            _DOWN: (
                (_falcon(_first_sixteenth), "Q6_K"),
                (_falcon(_outer_and_every_third), "Q5_K"),
                (_not_falcon(_outer_and_every_third), "Q6_K"),
            ),
            _O: _EIGHT_EXPERTS_OUTPUT,
        },
    ),
    Mixture(name="Q5_K_S", file_type=16, default="Q5_K"),
    Mixture(
        name="Q5_K_M",
        file_type=17,
        default="Q5_K",
        exceptions={_V: ((_outer_and_every_third, "Q6_K"),), _DOWN: ((_outer_and_every_third, "Q6_K"),)},
    ),
    Mixture(name="Q6_K", file_type=18, default="Q6_K"),
    Mixture(
        name="IQ4_NL",
        file_type=25,
        default="IQ4_NL",
        exceptions={
            _V: ((_shared, "Q5_K"),),
            _DOWN: ((_blind(_first_eighth), "Q5_K"),),
            _O: _EIGHT_EXPERTS_OUTPUT,
        },
    ),
    Mixture(
        name="IQ4_XS",
        file_type=30,
        default="IQ4_XS",
        exceptions={
            _V: ((_shared, "Q5_K"),),
            _DOWN: ((_blind(_first_eighth), "Q5_K"),),
            _O: _EIGHT_EXPERTS_OUTPUT,
        },
    ),
    Mixture(
        name="IQ3_XS",
        file_type=22,
        default="IQ3_S",
        exceptions={
            _V: ((_shared, "Q4_K"),),
            _K: ((_always, "IQ3_XXS"),),
            _Q: ((_always, "IQ3_XXS"),),
            _O: _EIGHT_EXPERTS_OUTPUT,
            _GATE: ((_middle, "IQ3_XXS"),),
            _UP: ((_middle, "IQ3_XXS"),),
        },
    ),
    Mixture(
        name="IQ3_XXS",
        file_type=23,
        default="IQ3_XXS",
        output="Q5_K",
        embedding="IQ3_S",
        exceptions={
            _V: ((_shared, "Q4_K"), (_blind(), "IQ3_S")),
            _K: ((_always, "IQ2_S"),),
            _Q: ((_always, "IQ2_S"),),
            _DOWN: ((_blind(_first_eighth), "Q4_K"), (_blind(), "Q3_K")),
            _O: (*_EIGHT_EXPERTS_OUTPUT, (_few_experts, "IQ3_S")),
        },
    ),
    Mixture(
        name="IQ3_S",
        file_type=26,
        default="IQ3_S",
        exceptions={_V: ((_shared, "Q4_K"),), _O: _EIGHT_EXPERTS_OUTPUT},
    ),
    Mixture(
        name="IQ3_M",
        file_type=27,
        default="IQ3_S",
        exceptions={
            _V: ((_always, "Q4_K"),),
            _DOWN: (
                (_first_eighth, "Q4_K"),
                (lambda spot: _eight_experts(spot) and _outer_and_every_third(spot), "Q4_K"),
            ),
            _O: (*_EIGHT_EXPERTS_OUTPUT, (_few_experts, "Q4_K")),
        },
    ),
    _low("IQ2_XXS", 19, "IQ2_XXS", rich=False, output_projection=None),
    _low("IQ2_XS", 20, "IQ2_XS", rich=False, output_projection=None),
    _low("IQ2_S", 28, "IQ2_XS", rich=True, output_projection="IQ3_S"),
    _low("IQ2_M", 29, "IQ2_S", rich=True, output_projection="IQ3_S"),
    _low("IQ1_S", 24, "IQ1_S", rich=False, output_projection="IQ2_XXS"),
    _low("IQ1_M", 31, "IQ1_M", rich=False, output_projection="IQ2_XXS"),
    Mixture(name="TQ1_0", file_type=36, default="TQ1_0", embedding="Q4_K"),
    Mixture(name="TQ2_0", file_type=37, default="TQ2_0", embedding="Q4_K"),
)

MIXTURES: Mapping[str, Mixture] = {entry.name: entry for entry in _ALL}
"""Every mixture of llama-quantize whose types ``encode`` can make, by name."""

_LABELLED = re.compile(r"(?ai)(.+?)[-.]((?:UD-)?(?:[IT]?Q\d_\w+|B?F16|F32|MXFP4\w*|NVFP4))")

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def label_in(name: str) -> tuple[str, str] | None:
    """Return the rest of a name, and the label that it ends in for the Hub, Ollama and llama.cpp; None of others.

    Args:
        name: Of a file, suffix excluded: ``Llama-3.2-1B-4.5bpw-Q4_K_M``, ``Llama-3.2-1B.Q4_K_M``.
    """
    found = _LABELLED.fullmatch(name)
    return None if found is None else (found[1], found[2])


def mixture(name: str) -> Mixture:
    """Return the mixture of that name; upper and lower case are the same, and ``Q4_K`` is ``Q4_K_M``.

    Raises:
        ConfigError: There is no such mixture.
    """
    key = name.upper()
    found = MIXTURES.get(_ALIASES.get(key, key))
    if found is None:
        raise ConfigError(
            f"mixture: unknown name. Got {name!r}. Expected one of {', '.join(MIXTURES)}. Choose another."
        )
    return found
