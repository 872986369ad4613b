"""A complete format in 150 lines: 8 bits and one scale for every output channel, in a safetensors layout of its own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bpwise.checkpoint.carry.carried import copy_side_files
from bpwise.checkpoint.files.atomic import atomic_directory, write_json
from bpwise.checkpoint.files.schemas import check_schema
from bpwise.checkpoint.source.language import language_model
from bpwise.convert.conversion import Conversion
from bpwise.convert.format import Format
from bpwise.convert.model import QuantizedModel
from bpwise.convert.options import FormatOptions, option
from bpwise.convert.plan import LinearCost, Plan
from bpwise.convert.rounding import Rounder
from bpwise.errors import BudgetError, FormatError
from bpwise.linalg.knapsack import choose
from bpwise.measure.curves import CurveMaker, LinearCurves
from safetensors.torch import load_file, save_file
from torch import Tensor

BITS = (8, 16)


def rounded(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8)
    return {"codes": (weight / scale).round().to(torch.int8), "scale": scale}


def decoded(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["codes"] * parts["scale"]


@dataclass(frozen=True, kw_only=True)
class ToyOptions(FormatOptions):
    keep: str = option("--toy-keep", default="", help="Linears whose names end so stay in 16 bits.")


class ToyCurves(CurveMaker):
    name, version, header = "toy", 1, {"bits": list(BITS)}

    def linears(self, inputs: Any) -> list[LinearCurves]:
        def damage(weight: Tensor, fisher: Tensor) -> float:
            error = (decoded(rounded(weight.T)) - weight.T).float()
            return 0.5 * float((((error @ inputs.gram) * error).sum(dim=1)) @ fisher)

        found = [torch.tensor([damage(*pair), 0.0]) for pair in zip(inputs.weights, inputs.fishers, strict=True)]
        return [LinearCurves(tensors={"damage_nats": each}, damping=inputs.damping) for each in found]

    def table(self, inputs: Any) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, kw_only=True)
class ToyPlan(Plan):
    format = "toy"
    linears: tuple[LinearCost, ...]
    measurement: str

    def costs(self) -> tuple[LinearCost, ...]:
        return self.linears


class ToyRounder(Rounder):
    def __init__(self, plan: ToyPlan) -> None:
        self.names = tuple(cost.name for cost in plan.linears if cost.bpw == 8)
        self.unquantized, self.identity = frozenset(cost.name for cost in plan.linears) - set(self.names), {}

    def round_linear(self, measured: Any, target: Tensor, hessian: Any) -> dict[str, Tensor]:
        return rounded(target.T)

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        return decoded(artifact)


class ToyModel(QuantizedModel):
    format, path, config, names, file_bytes, fingerprint = "toy", *[None] * 5

    def __init__(self, path: Path) -> None:
        self.path, self.tensors = path, load_file(path / "toy.safetensors")
        self.config = json.loads((path / "config.json").read_text())
        self.origin = json.loads((path / "toy.json").read_text())
        self.names = frozenset(name.replace(".codes", ".weight") for name in self.tensors if ".scale" not in name)
        self.file_bytes = (path / "toy.safetensors").stat().st_size
        self.fingerprint = self.run = self.origin["run"]

    def tensor(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        parts = {part: self.tensors.get(f"{module}.{part}") for part in ("codes", "scale")}
        return self.tensors[name].clone() if parts["codes"] is None else decoded(parts)

    def stored_bpw(self) -> dict[str, float]:
        return self.origin["bpw"]


class ToyConversion(Conversion):
    def curves(self) -> ToyCurves:
        return ToyCurves()

    def rounder(self, plan: ToyPlan, measurement: Any) -> ToyRounder:
        return ToyRounder(plan)

    def write(self, rounded: Any, output: Path, plan: Any, measurement: Any, provenance: Any, progress: Any) -> Any:
        source = language_model(self.checkpoint)
        codes = {name: rounded.artifact(name) for name in rounded.names}
        tensors = {f"{name}.{part}": tensor for name, parts in codes.items() for part, tensor in parts.items()}
        tensors |= {name: source.tensor(name) for name in source.names - {f"{name}.weight" for name in codes}}
        with atomic_directory(output) as directory:
            save_file(tensors, directory / "toy.safetensors")
            write_json(directory / "config.json", source.config)
            write_json(directory / "toy.json", {"run": provenance.run, "bpw": {x.name: x.bpw for x in plan.linears}})
            copy_side_files(self.checkpoint.directory, directory)
            return FORMAT.verify(directory)


class ToyFormat(Format):
    name, title, Options = "toy", "Toy", ToyOptions

    def recognises(self, path: Path) -> bool:
        return (path / "toy.json").is_file()

    def open(self, path: Path) -> ToyModel:
        return ToyModel(path)

    def load_plan(self, raw: dict[str, Any], where: str) -> ToyPlan:
        return check_schema(raw, ToyPlan, FormatError, where=where, remedy="Make it again.")

    def plan(self, measurement: Any, options: ToyOptions, *, bpw: float | None, max_bytes: int | None) -> ToyPlan:
        linears, (_, tensors) = (*measurement.linears, measurement.head), measurement.curves_of(self.name, 1)
        weights = [linear.in_features * linear.out_features for linear in linears]
        damages = [tensors.take(f"{x.name}.damage_nats", np.float32, (2,)).astype(float) for x in linears]
        for damage in (d for x, d in zip(linears, damages, strict=True) if x.name.endswith(options.keep)):
            damage[0] = np.inf if options.keep else damage[0]
        if (budget := int(bpw * sum(weights)) if bpw is not None else 8 * (max_bytes or 0)) < 8 * sum(weights):
            raise BudgetError(f"{budget} bits: too few. Expected {8 * sum(weights)} or more. Ask for 8 bpw.")
        chosen = choose(damages, [np.array([8 * each, 16 * each]) for each in weights], budget).options
        costs = zip(linears, damages, weights, chosen, strict=True)
        found = tuple(LinearCost(x.name, float(BITS[o]), float(damage[o]), n) for x, damage, n, o in costs)
        return ToyPlan(linears=found, measurement=measurement.fingerprint)

    def conversion(self, checkpoint: Any, options: Any) -> ToyConversion:
        return ToyConversion(checkpoint, options)


FORMAT = ToyFormat()
