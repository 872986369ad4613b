"""Plans as rules for names of tensors, which llama-quantize and ik_llama.cpp's program of that name both take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ....measure.measurement import Measurement
from ...conversion import Target
from ..ggml.types import ggml_type
from ..llama_cpp.mixtures import MIXTURES
from ..plan.making import make_gguf_plan
from ..plan.measured import gguf_curves
from ..plan.plan import GgufPlan, TypeOverride

__all__ = ["base_mixture", "planned", "tensor_rules"]

_USUAL = re.compile("IQ|Q[2-6]_K|Q8_0")
"""Mixtures that both programs know and publishers make today."""

_IN_BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)


def planned(measurement: Measurement, target: Target, overrides: Sequence[TypeOverride] = ()) -> GgufPlan:
    """Return a plan of a size: bits per weight over all tensors, or bytes of the file.

    Raises:
        BudgetError: No plan has this size; the message gives the range that there is.
        ConfigError: GGUF was not measured.
    """
    room = None if target.max_bytes is None else target.max_bytes - gguf_curves(measurement).layout.overhead_bytes
    return make_gguf_plan(measurement, bpw=target.bpw, tensor_bytes=room, overrides=overrides)


def tensor_rules(plan: GgufPlan) -> list[str]:
    r"""Return ``REGEX=TYPE`` for all tensors of a plan, one for those that differ in the block's number alone.

    Each tensor matches one of them, so their order does not matter: ``^blk\.(0|3)\.attn_q\.weight$=q4_K``. Both
    programs search with std::regex (ECMAScript), split at the first ``=`` and compare types by ggml's names;
    ik_llama.cpp splits rules at commas and tells capitals from small letters. Sources: ``quantize.cpp`` of both.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    rules = []
    for tensor in plan.tensors:
        inside = _IN_BLOCK.fullmatch(tensor.name)
        if inside is None:
            rules.append(f"^{_escaped(tensor.name)}$={_ggml_name(tensor.type)}")
        else:
            blocks.setdefault((inside[2], tensor.type), []).append(inside[1])
    for (name, kind), numbers in blocks.items():
        which = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        rules.append(rf"^blk\.{which}\.{_escaped(name)}$={_ggml_name(kind)}")
    return rules


def base_mixture(plan: GgufPlan) -> str:
    """Return the mixture to call a file by: that whose default type is nearest to the plan's bits per weight.

    No tensor gets its type of it, as a plan names them all.
    """
    usual = {name: ggml_type(each.default).bits_per_weight for name, each in MIXTURES.items() if _USUAL.match(name)}
    return min(usual, key=lambda name: abs(usual[name] - plan.bpw))


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _ggml_name(kind: str) -> str:
    return re.sub("_k$", "_K", kind.lower())
