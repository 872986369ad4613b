"""What is in a file or directory that bpwise reads or writes, as a table of facts."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.files.safetensors_file import load_metadata
from ..checkpoint.files.schemas import read_json
from ..checkpoint.source.original import open_model
from ..convert.exl2.file.describe import width_shares
from ..convert.exl2.plan.plan import LinearPlan, Plan
from ..convert.exl2.plan.unquantized import unquantized_lines
from ..convert.format import Description
from ..convert.gguf.plan import TYPE_PLAN_KEY, TypePlan
from ..convert.registry import format_of, formats
from ..errors import FormatError
from ..measure.measurement import HEADER_KEY, Measurement
from ..measure.text.calibration import CalibrationSet
from ..tables import Table

__all__ = ["inspect_path"]


def inspect_path(path: Path) -> Description:
    """Describe a quantized model of any format, a checkpoint directory, a measurement, a calibration set or a plan.

    Raises:
        BpwiseError: It is none of these, or damaged.
    """
    format_ = format_of(path)
    if format_ is not None:
        return format_.describe(path)
    if path.is_dir():
        return _checkpoint(path)
    if path.suffix == ".json":
        return _type_plan(path) if TYPE_PLAN_KEY in read_json(path, FormatError) else _plan(path)
    if path.suffix == ".safetensors":
        return _measurement(path) if HEADER_KEY in load_metadata(path) else _calibration(path)
    titles = ", ".join(each.title for each in formats().values())
    raise FormatError(
        f"{path}: cannot be inspected. Expected a model ({titles}, or a checkpoint directory), a .safetensors "
        "measurement or calibration set, or a plan.json. Check the path."
    )


def _checkpoint(path: Path) -> Description:
    checkpoint = open_model(path)
    rows = []
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        rows.append((name, " x ".join(map(str, info.shape)), str(info.dtype).removeprefix("torch."), info.file.name))
    return Description(
        kind="checkpoint",
        facts=(
            f"model_type {checkpoint.config.get('model_type')}, "
            f"{checkpoint.parameter_count / 1e6:.1f} million stored parameters, "
            f"{checkpoint.total_bytes / 2**20:.1f} MiB",
            f"tied embeddings: {'yes' if checkpoint.tied_embeddings else 'no'}",
        ),
        table=Table(("tensor", "shape", "dtype", "file"), tuple(rows)),
    )


def _measurement(path: Path) -> Description:
    measurement = Measurement.load(path)
    rows = [
        (
            linear.name,
            f"{linear.in_features} x {linear.out_features}",
            *(f"{damage:.2e}" for damage in linear.damage_nats.sum(axis=0)),
        )
        for linear in (*measurement.linears, measurement.head)
    ]
    facts = {key: value for key, value in measurement.provenance.items() if not isinstance(value, list)}
    if measurement.experts_sentence is not None:
        facts["experts"] = measurement.experts_sentence
    return Description(
        kind="measurement",
        facts=tuple(f"{key}: {value}" for key, value in facts.items()),
        table=Table(
            ("linear, damage in nats/token", "in x out", *(f"{bits} bits" for bits in measurement.widths)), tuple(rows)
        ),
    )


def _calibration(path: Path) -> Description:
    rows = CalibrationSet.load(path)
    count, length = rows.tokens.shape
    return Description(
        kind="calibration set",
        facts=(rows.description, f"{count} rows of {length} tokens", f"fingerprint {rows.fingerprint}"),
        table=Table(
            ("kind of text", "rows"), tuple((kind, str(number)) for kind, number in rows.rows_per_kind.items())
        ),
    )


def _plan(path: Path) -> Description:
    plan = Plan.load(path)

    def row(linear: LinearPlan) -> tuple[str, ...]:
        return (
            linear.name,
            f"{linear.in_features} x {linear.out_features}",
            f"{linear.bpw:.3f}",
            f"{linear.damage_nats:.2e}",
            width_shares(linear.group_bits, linear.group_rows),
        )

    return Description(
        kind="plan",
        facts=(
            f"decoder {plan.bpw:.4f} bits per weight, head {plan.head.bpw if plan.head else 16:.4f} "
            f"(asked {plan.target_bpw:g}, head {plan.head_bits})",
            f"predicted damage {plan.damage_nats:.6f} nats/token, of it {plan.decoder_damage_nats:.6f} in the decoder "
            f"(no plan of this size can go below {plan.lower_bound_nats:.6f})",
            *(f"in float16: {line}" for line in unquantized_lines(plan.kept, plan.head_reason)),
        ),
        table=Table(
            ("linear", "in x out", "bpw", "damage", "share of rows at each width"),
            tuple(row(p) for p in (*plan.linears, *([plan.head] if plan.head else []))),
        ),
    )


def _type_plan(path: Path) -> Description:
    plan = TypePlan.load(path)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in plan.weights_per_type().items())
    return Description(
        kind="GGUF plan",
        facts=(
            f"{plan.bpw:.4f} bits per weight over all tensors, {plan.stored_bytes / 2**20:.1f} MiB (at most "
            f"{plan.target_bytes / 2**20:.1f} MiB asked)",
            f"predicted damage {plan.damage_nats:.6f} nats/token (no plan of this size can go below "
            f"{plan.lower_bound_nats:.6f})",
            f"weights: {shares}",
        ),
        table=Table(
            ("tensor", "in x out", "type", "bpw", "damage"),
            tuple(
                (
                    tensor.name,
                    f"{tensor.row_weights} x {tensor.rows}",
                    tensor.type,
                    f"{tensor.kind.bits_per_weight:.3f}",
                    f"{tensor.damage_nats:.2e}",
                )
                for tensor in plan.tensors
            ),
        ),
    )
