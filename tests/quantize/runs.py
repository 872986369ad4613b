"""Runs of the whole pipeline, as tests begin them: by command, and by options in Python."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpwise.cli import cli
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.gguf.options import GgufOptions
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.quantize.config import QuantizeConfig
from click.testing import CliRunner, Result

TEXT = ("--rows", "8", "--row-tokens", "32", "--device", "cpu")
"""Calibration text that takes next to no time."""
EVALUATION = ("--eval-rows", "2", "--eval-row-tokens", "32")


def bpwise(*arguments: object) -> Result:
    """Run a command; bugs keep their traceback."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def succeed(*arguments: object) -> str:
    result = bpwise(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    """Run a command that must fail as a user's mistake does: exit code 1, one sentence."""
    result = bpwise(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return last


def measurement_of(output: Path) -> Path:
    """Where a run kept its measurement."""
    return output.with_name(f"{output.name}.work") / "measurement.safetensors"


def arguments(config: QuantizeConfig) -> dict[str, Any]:
    """What ``quantize_model`` takes of options."""
    return {**series_arguments(config), **(asdict(config.target) if config.target else {})}


def series_arguments(config: QuantizeConfig) -> dict[str, Any]:
    """What ``quantize_series`` takes of options."""
    return {
        "options": config.options,
        "measure": config.measure,
        "evaluate": config.evaluate or False,
        "base_model": config.base_model,
    }


def exl2(
    bpw: float = 4.5, *, measure: MeasureConfig | None = None, evaluate: EvalConfig | None = None, **options: Any
) -> QuantizeConfig:
    """Options of a run to EXL2, by default without evaluation."""
    return QuantizeConfig(
        target=Target(bpw=bpw), options=Exl2Options(**options), measure=measure or MeasureConfig(), evaluate=evaluate
    )


def gguf(
    bpw: float | None = None,
    *,
    target: Target | None = None,
    measure: MeasureConfig | None = None,
    evaluate: EvalConfig | None = None,
    **options: Any,
) -> QuantizeConfig:
    """Options of a run to GGUF, by default without evaluation; without a target they name a mixture."""
    return QuantizeConfig(
        target=Target(bpw=bpw) if target is None and bpw is not None else target,
        options=GgufOptions(**options),
        measure=measure or MeasureConfig(),
        evaluate=evaluate,
    )
