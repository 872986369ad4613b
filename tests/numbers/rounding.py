"""One linear measured and rounded as runs do it, by format; decoded, and rounded to nearest, without our code."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import WIDTHS, RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.rounding.feedback import round_linear
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.kernels import encode
from bpwise.convert.gguf.ggml.rounding import round_to_type
from bpwise.convert.gguf.ggml.types import GgmlType
from bpwise.convert.mlx.curves import MlxCurves
from bpwise.convert.mlx.file.layout import Layout
from bpwise.convert.mlx.grid.rounding import round_affine
from bpwise.convert.mlx.grid.schemes import SCHEMES, Scheme
from bpwise.convert.rounding import rounding_damping
from bpwise.linalg.hessian import Hessian, factor_hessian
from bpwise.measure.curves import CurveMaker
from bpwise.measure.input_group import FinishedLinear, finished_linears, measure_group
from bpwise.measure.statistics.heldout import DAMPINGS
from bpwise.measure.statistics.inputs import InputStatistics, WeightedGram
from gguf import quants
from torch import Tensor, nn

from ..measured import layout_of
from .cases import OUTPUTS, Case

_NAME = "l"
_ROW_TOKENS = 32


@dataclass(frozen=True)
class Rounded:
    """One linear in one width or type.

    Attributes:
        kind: Which.
        weight: As a reader decodes it, float64, shape (out, K).
        nearest: The original rounded to nearest, likewise.
        damage: As measured beforehand, infinite where it was not measured; nats per token.
        damping: That rounding took; infinite without feedback.
    """

    kind: str
    weight: Tensor
    nearest: Tensor
    damage: float
    damping: float


def measured(case: Case, maker: CurveMaker) -> tuple[FinishedLinear, Tensor]:
    """Measure a linear whose gradients are as large on all tokens; return it, and H."""
    tokens = len(case.inputs)
    linear = nn.Linear(*case.weight.T.shape, bias=False)
    linear.weight.data.copy_(case.weight)
    device = torch.device("cpu")
    sums = InputStatistics(case.inputs.shape[1], min(tokens, _ROW_TOKENS), device)
    sums.see_inputs(case.inputs)
    signs = torch.randint(0, 2, (tokens, len(case.weight)), generator=torch.Generator().manual_seed(2))
    sums.see_gradient(_NAME, (2.0 * signs - 1) * case.slopes)
    sums.end_batch()
    none = torch.empty(len(case.weight), 0)
    packed = measure_group({_NAME: linear}, sums, {_NAME: none}, [maker], DAMPINGS)
    gram = WeightedGram(case.inputs.shape[1], device)
    gram.add(case.inputs, torch.ones(tokens))
    return finished_linears(packed)[_NAME], gram.mean()


def exl2(case: Case) -> Iterator[Rounded]:
    """Round all groups at every width."""
    maker = Exl2Curves()
    finished, gram = measured(case, maker)
    curves = finished.curves[maker.name]
    order = torch.from_numpy(curves["order"]).long()
    factor = factor_hessian(gram, rounding_damping(finished.linear), order=order)
    for place, bits in enumerate(WIDTHS):
        groups = [RowGroup(bits, 32)] * (len(order) // 32)
        fisher = torch.from_numpy(finished.linear.fisher)
        linear, _ = round_linear(case.weight.T.contiguous(), factor.upper, groups, order, fisher)
        linear.validate(_NAME)
        weight, nearest = _read_exl2(linear, case.weight, bits)
        damage = float(curves["damage_nats"][:, place].astype(float).sum())
        yield Rounded(f"{bits} bits", weight, nearest, damage, factor.damping)


def _read_exl2(linear: QuantizedLinear, original: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    # As docs/formats say; and the nearest codes at the same scales.
    units = (linear.max_scales.float() / 256).half().double()
    scales = (units[:, None] * (linear.scale_codes.double() + 1) ** 2).half().double().repeat_interleave(32, dim=0)
    half = 2.0 ** (bits - 1)
    codes = linear.codes.double() - half
    wanted = original.T[linear.order].double()
    plain = (wanted / torch.where(scales > 0, scales, 1)).round().clamp(-half, half - 1)
    weight, nearest = (torch.empty_like(wanted) for _ in range(2))
    weight[linear.order], nearest[linear.order] = ((x * scales).half().double() for x in (codes, plain))
    return weight.T, nearest.T


def gguf(case: Case) -> Iterator[Rounded]:
    """Round to every type that fits."""
    kinds = [kind for kind in measured_types() if kind.fits(case.weight.shape[1])]
    maker = GgufCurves(kinds, layout_of({_NAME: tuple(case.weight.shape)}))
    finished, gram = measured(case, maker)
    factor = Hessian(gram).factor(rounding_damping(finished.linear))
    for kind, damage in zip(kinds, finished.curves[maker.name]["damage_nats"][0], strict=True):
        data = round_to_type(case.weight.T.contiguous(), factor.upper, kind)
        weight, nearest = (_read_gguf(each, kind) for each in (data, _nearest(case.weight, kind)))
        yield Rounded(kind.name, weight, nearest, float(damage), factor.damping)


def mlx(case: Case) -> Iterator[Rounded]:
    """Round to every scheme that fits; to nearest means equal steps between a group's least and largest weight."""
    schemes = [scheme for scheme in SCHEMES if scheme.fits(case.weight.shape[1])]
    maker = MlxCurves(Layout())
    finished, gram = measured(case, maker)
    factor = Hessian(gram).factor(rounding_damping(finished.linear))
    damages = dict(zip(SCHEMES, finished.curves[maker.name]["damage_nats"], strict=True))
    for scheme in schemes:
        found = round_affine(case.weight.T.contiguous(), factor.upper, scheme, torch.bfloat16)
        scales, biases = (x.double().repeat_interleave(scheme.group_size, dim=0) for x in (found.scales, found.biases))
        weight = (found.codes.double() * scales + biases).T
        nearest = _nearest_affine(case.weight, scheme)
        yield Rounded(scheme.name, weight, nearest, float(damages[scheme]), factor.damping)


def _nearest_affine(weight: Tensor, scheme: Scheme) -> Tensor:
    groups = weight.double().unflatten(1, (-1, scheme.group_size))
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    most = 2**scheme.bits - 1
    step, low = (x.bfloat16().double() for x in ((high - low) / most, low))
    codes = ((groups - low) / torch.where(step > 0, step, 1)).round().clamp(0, most)
    return (codes * step + low).flatten(1)


def _read_gguf(data: np.ndarray, kind: GgmlType) -> Tensor:
    return torch.from_numpy(quants.dequantize(data, quants.GGMLQuantizationType[kind.name])).double()


def _nearest(weight: Tensor, kind: GgmlType) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # scales that are subnormal
            return quants.quantize(weight.numpy(), quants.GGMLQuantizationType[kind.name])
    except NotImplementedError:  # gguf-py does not encode all types; ggml does
        return encode(weight, kind)


FORMATS: Mapping[str, Callable[[Case], Iterator[Rounded]]] = {"exl2": exl2, "gguf": gguf, "mlx": mlx}
"""By name of a registered format."""


def loss(case: Case, weight: Tensor) -> float:
    """Return ``0.5 sum_n (D H D^T)_nn``, D what rounding changes, of outputs that count, in float64 and without H."""
    counts = case.slopes != 0 if bool(case.slopes.any()) else torch.ones(OUTPUTS, dtype=torch.bool)
    missed = case.inputs.double() @ (weight - case.weight.double())[counts].T
    return 0.5 * float(missed.square().sum(dim=1).mean())
