"""Measurements that tests make up, and what tests of measuring hand in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.convert.gguf.model.names import gguf_name
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.linalg.hessian import Hessian
from bpwise.measure.curves import CurveInputs, CurveMaker, LinearCurves
from bpwise.measure.measurement import FormatCurves, MeasuredLinear, MeasuredTable, Measurement
from bpwise.progress import Progress
from numpy.typing import NDArray

WIDTHS = (8, 6, 5, 4, 3, 2)
EXL2 = Exl2Curves.name
GGUF = GgufCurves.name

Damages = Mapping[str, NDArray[np.float32]]


def bare_linear(name: str, rows: int, columns: int) -> MeasuredLinear:
    """A linear of which nothing is known."""
    return MeasuredLinear(
        name=name,
        fisher=np.ones(columns, dtype=np.float32),
        input_power=np.ones(rows, dtype=np.float32),
        coupling=np.zeros((columns, 0), dtype=np.float16),
        token_weights=np.ones((1, 4), dtype=np.float16),
        damping=0.02,
    )


def bare_measurement(
    shapes: Mapping[str, tuple[int, int]], curves: Mapping[str, FormatCurves], **changes: Any
) -> Measurement:
    """A measurement of linears by name, (rows, columns) of each, the head last."""
    *linears, head = (bare_linear(name, *shape) for name, shape in shapes.items())
    table = MeasuredTable(
        name="model.embed_tokens", tokens=100, importance=np.ones(head.in_features, dtype=np.float32), tied=False
    )
    settings = {
        "linears": tuple(linears),
        "head": head,
        "embedding": table,
        "other_weights": 0,
        "tokens": np.zeros((1, 4), dtype=np.int32),
        "curves": curves,
        "provenance": {"model": "x"},
    }
    return Measurement(**{**settings, **changes})


def exl2_of(damages: Damages, orders: Mapping[str, NDArray[np.int32]], group_size: int) -> FormatCurves:
    """EXL2's curves."""
    linears = {name: {"damage_nats": damages[name].astype(np.float32), "order": orders[name]} for name in damages}
    return FormatCurves(version=1, header={"widths": list(WIDTHS), "group_size": group_size}, linears=linears, table={})


def in_place(linear: str, rows: int) -> TensorRows:
    """A tensor that is a linear as it is."""
    return TensorRows((linear,), np.zeros(rows, dtype=np.int64), np.arange(rows))


def layout_of(
    matrices: Mapping[str, tuple[int, int]], *, others: Mapping[str, tuple[int, ...]] | None = None, kind: str = "F16"
) -> Layout:
    """A file that holds every matrix, (rows, columns) of each by its name in Transformers, as one tensor in place."""
    names = {linear: gguf_name(f"{linear}.weight") or f"{linear}.weight" for linear in matrices}
    tensors = {names[linear]: StoredTensor(TYPES[kind], shape) for linear, shape in matrices.items()}
    tensors |= {name: StoredTensor(TYPES["F32"], shape) for name, shape in (others or {}).items()}
    return Layout(tensors, RowMap({names[x]: in_place(x, shape[0]) for x, shape in matrices.items()}, {}), 4096)


def gguf_curves_of(directory: Path) -> list[GgufCurves]:
    """GGUF's curves of a model, as if its converter changed no row; none where ggml's library is not installed."""
    return [GgufCurves(measured_types(), plain_file(directory))] if measured_types() else []


def plain_file(directory: Path) -> Layout:
    """What ``layout_of`` says of a whole model."""
    source = language_model(Checkpoint.open(directory))
    shapes = {name: source.shape(name) for name in sorted(source.names)}
    matrices = {name.removesuffix(".weight"): (x[0], x[1]) for name, x in shapes.items() if len(x) == 2}
    vectors = {gguf_name(name) or name: shape for name, shape in shapes.items() if len(shape) == 1}
    return layout_of(matrices, others=vectors)


@dataclass(frozen=True)
class Given:
    """A format whose curves need nothing to be prepared."""

    maker: CurveMaker

    def prepare(self, work: Path, progress: Progress, measurement: Path | None = None) -> tuple[()]:
        return ()

    def curves(self) -> CurveMaker:
        return self.maker


def gguf_of(
    types: tuple[str, ...],
    damages: Mapping[str, list[NDArray[np.float32]]],
    table: NDArray[np.float32],
    layout: Layout,
    gram: NDArray[np.float32] | None = None,
) -> FormatCurves:
    """GGUF's curves; of every linear the damages of its parts, and what errors in a table that is the head cost."""
    none = np.zeros((0, len(types)), dtype=np.float32)
    linears = {name: {"damage_nats": np.stack(parts) if parts else none} for name, parts in damages.items()}
    header = {"types": list(types), "file": layout.to_json()}
    of_table = {"damage_nats": table} if gram is None else {"damage_nats": table, "gram": gram}
    return FormatCurves(version=5, header=header, linears=linears, table=of_table)


def damage_of(measurement: Measurement, name: str, format_: str = EXL2) -> NDArray[np.float32]:
    """Damage of a linear, as a format measured it."""
    damage: NDArray[np.float32] = measurement.curves[format_].linears[name]["damage_nats"]
    return damage


def order_of(measurement: Measurement, name: str) -> NDArray[np.int32]:
    """Row order of a linear in EXL2."""
    order: NDArray[np.int32] = measurement.curves[EXL2].linears[name]["order"]
    return order


def with_tensor(measurement: Measurement, format_: str, name: str, field: str, values: NDArray[Any]) -> Measurement:
    """The same measurement with one tensor of a format's curves replaced."""
    curves = measurement.curves[format_]
    linears = {**curves.linears, name: {**curves.linears[name], field: values}}
    return replace(measurement, curves={**measurement.curves, format_: replace(curves, linears=linears)})


def group_of(
    weights: list[torch.Tensor], gram: torch.Tensor, fishers: list[torch.Tensor], **options: Any
) -> CurveInputs:
    """Linears of an input group for a format to measure."""
    names = tuple(f"l.{index}" for index in range(len(weights)))
    return CurveInputs(**{"names": names, "weights": weights, "hessian": Hessian(gram), "fishers": fishers, **options})


class SeenCurves(Exl2Curves):
    """EXL2's curves, and what they were measured on, in the order of the passes."""

    def __init__(self, group_size: int = 32) -> None:
        super().__init__(group_size)
        self.seen: list[CurveInputs] = []

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        self.seen.append(replace(inputs, hessian=Hessian(inputs.gram.clone())))
        return super().linears(inputs)
