"""Making GGUF plans from a measurement alone."""

from __future__ import annotations

from collections.abc import Sequence

from ....measure.measurement import Measurement
from .layout import Layout
from .plan import EMBEDDINGS, HEAD, GgufPlan, TensorPlan, TypeOverride
from .problem import measured_problem

__all__ = ["bytes_for_vram", "make_gguf_plan"]


def make_gguf_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[TypeOverride] = (),
    layout: Layout | None = None,
) -> GgufPlan:
    """Choose a type for every tensor.

    Args:
        measurement: The measured damages.
        bpw: Bits per weight over all tensors of the file; met from below, never exceeded. Where it is more than all
            tensors can take they get their largest types.
        tensor_bytes: The same as a number of bytes; one of the two is given.
        overrides: Types that tensors must have; of several that match, the last.
        layout: The unquantized file that is at hand, as ``measured_problem`` takes it.

    Returns:
        The plan of least predicted damage.

    Raises:
        BudgetError: No plan is that small; the message gives the range that there is.
        ConfigError: No types were measured, or an override matches nothing or does not fit.
    """
    problem = measured_problem(measurement, overrides, layout)
    target = problem.target_bytes(bpw=bpw, tensor_bytes=tensor_bytes)
    chosen = problem.best(target)
    names = [list(candidate.damage_nats) for candidate in problem.candidates]
    tensors = tuple(
        TensorPlan(
            name=candidate.name,
            shape=candidate.shape,
            linears=candidate.linears,
            type=kinds[option],
            damage_nats=candidate.damage_nats[kinds[option]] if candidate.measured else None,
        )
        for candidate, kinds, option in zip(problem.candidates, names, chosen.options, strict=True)
    )
    return GgufPlan(
        tensors=tensors,
        other_weights=problem.other_weights,
        other_bytes=problem.other_bytes,
        target_bytes=target,
        lower_bound_nats=chosen.lower_bound,
        measurement=measurement.fingerprint,
    )


def bytes_for_vram(
    measurement: Measurement,
    room_bytes: int,
    overrides: Sequence[TypeOverride] = (),
    layout: Layout | None = None,
) -> int:
    """Return the most bytes of all tensors whose plan takes no more than a room in a GPU's memory.

    Args:
        measurement: The measured damages.
        room_bytes: Bytes of the GPU that are left for tensors.
        overrides: As ``make_gguf_plan`` takes them, and the next.
        layout: The unquantized file that is at hand.

    Raises:
        BudgetError: No plan is that small.
        ConfigError: As ``make_gguf_plan``.
    """
    sizes = {each.name: int(each.sizes.max()) for each in measured_problem(measurement, overrides, layout).candidates}
    beside = sizes.get(EMBEDDINGS, 0) if HEAD in sizes else 0
    while True:  # the less room, the smaller the table; once it is as large as was thought, all else fits
        plan = make_gguf_plan(measurement, tensor_bytes=room_bytes + beside, overrides=overrides, layout=layout)
        if plan.vram_bytes <= room_bytes:
            return room_bytes + beside
        beside = plan.stored_bytes - plan.vram_bytes
