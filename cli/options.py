"""Options and types that commands share, and what they turn into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .types import DIRECTORY, EXISTING_DIRECTORY, LENGTHS, MODEL, NAMES

if TYPE_CHECKING:
    from ..checkpoint.source.original import Original
    from ..eval.config import EvalConfig
    from ..eval.tasks.benchmarks import LoadedTasks
    from ..eval.tasks.needle import NeedleConfig
    from ..measure.run import MeasureConfig
    from ..measure.text.calibration import CalibrationSet

__all__ = [
    "FORCE_OPTION",
    "NO_CACHE_OPTION",
    "OFFLOAD_OPTION",
    "ROW_TOKENS_DEFAULT",
    "EvaluationArguments",
    "MeasuringArguments",
    "OriginalArguments",
    "TaskArguments",
    "calibration_options",
    "evaluation_options",
    "extra_options",
    "grouped",
    "original_options",
]

ROW_TOKENS_DEFAULT = "[default: 1024, or the model's context if that is shorter]"

Command = TypeVar("Command", bound=Callable[..., Any])

FORCE_OPTION = click.option("--force", is_flag=True, help="Replace OUTPUT even if it is some other kind of file.")

NO_CACHE_OPTION = click.option(
    "--no-cache", is_flag=True, help="Run the original again instead of using cached results, and cache nothing."
)

OFFLOAD_OPTION = click.option(
    "--offload-dir", type=DIRECTORY, help="Keep hidden states in temporary files in this folder, not in memory."
)


@dataclass(frozen=True, slots=True)
class OriginalArguments:
    """What ``original_options`` were given.

    Attributes:
        lora: PEFT adapter to merge into the model while reading.
        revision: Branch, tag or commit of the model on the Hub.
    """

    lora: Path | str | None
    revision: str | None

    def open(self, model: str) -> Original:
        """Return a model with what is to be changed in it."""
        from ..checkpoint.model.hub_name import with_revision
        from ..checkpoint.source.original import open_model
        from ..convert.opening import locate_model

        source = click.get_current_context().get_parameter_source("revision")
        idle = Path(model).exists() or "@" in model  # a recipe's is of a model on the Hub, which this need not be
        if source is ParameterSource.COMMANDLINE or not idle:
            model = with_revision(model, self.revision)
        return model if self.lora is None else open_model(model, lora=locate_model(self.lora))


def original_options(command: Command) -> Command:
    """Give a command the options that change a model while it is read; it gets them as ``changes``."""
    declared = (
        click.option("--lora", type=MODEL, help="PEFT adapter to merge into the model."),
        click.option("--revision", help="Branch, tag or commit on the Hub; same as ORG/NAME@REVISION."),
    )
    return grouped(command, declared, "changes", ("lora", "revision"), OriginalArguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringArguments:
    """What ``calibration_options`` were given.

    Attributes:
        config: Options of measuring.
        saved: The calibration set that was named, or None.
        work_dir: Where finished blocks are kept; None for the usual place.
    """

    config: MeasureConfig
    saved: CalibrationSet | None
    work_dir: Path | None


def calibration_options(command: Command) -> Command:
    """Give a command the options that describe calibration and measuring; it gets them as ``measuring``."""
    declared = (
        click.option(
            "-c",
            "--calibration",
            metavar="SOURCES",
            help="Calibration text: a .txt, .jsonl, .parquet or .arrow file, a directory of them, a Hub data set "
            "NAME[:CONFIG][:SPLIT], built-in (text of many kinds), self (written by the model, which must fit into "
            "memory), or mix (prose, web pages, code and other languages from the Hub). Combine sources with commas "
            "and weights: self=2,built-in. Or a saved calibration set (.safetensors).  [default: built-in]",
        ),
        click.option("--column", help="Column of the data set that contains the text."),
        click.option(
            "--chat-template",
            is_flag=True,
            help="Format chats (OpenAI, ShareGPT or Alpaca style) with the model's own chat template.",
        ),
        click.option("-r", "--rows", type=click.IntRange(1), default=32, help="Number of calibration sequences."),
        click.option(
            "-l", "--row-tokens", type=click.IntRange(2), help=f"Tokens in each sequence.  {ROW_TOKENS_DEFAULT}"
        ),
        click.option("--seed", type=int, default=0, help="Random seed."),
        click.option("--damping", type=float, help="Damping of the Hessians.  [default: tuned on held-out sequences]"),
        click.option(
            "--moe-calibrate-all",
            is_flag=True,
            help="Run every token through every expert. By default only rarely chosen experts get all tokens.",
        ),
        click.option("--equalize", is_flag=True, help="First rescale input channels to weights of one size."),
        click.option("--device", default="auto", help="Device to compute on: cpu, cuda, cuda:N, mps or auto."),
        click.option(
            "--precision",
            type=click.Choice(["auto", "float32"]),
            default="auto",
            help="Precision of matrix products while measuring. auto uses bfloat16 or TF32 where available.",
        ),
        OFFLOAD_OPTION,
        click.option(
            "--work-dir",
            type=DIRECTORY,
            help="Folder for finished blocks, which make the run resumable.  [default: OUTPUT.work]",
        ),
    )
    return grouped(command, declared, "measuring", list(signature(_measuring).parameters), _measuring)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationArguments:
    """What ``evaluation_options`` were given; see ``EvalConfig``."""

    eval_text: str | None
    eval_rows: int
    eval_row_tokens: int | None
    eval_domains: bool
    no_eval: bool
    force_eval_text: bool
    no_cache: bool

    def config(self, measure: MeasureConfig) -> EvalConfig | None:
        """Return the options of the evaluation, which runs where measuring does; None if it is left out."""
        from ..eval.config import EvalConfig
        from ..measure.text.mixture import BUILT_IN

        evaluate = EvalConfig(
            text=self.eval_text,
            rows=self.eval_rows,
            row_tokens=self.eval_row_tokens,
            domains=BUILT_IN if self.eval_domains else None,
            device=measure.device,
            allow_calibration_text=self.force_eval_text,
            offload_dir=measure.offload_dir,
        )
        return None if self.no_eval else evaluate


def evaluation_options(command: Command) -> Command:
    """Give a command the options of an evaluation afterwards; it gets them as ``evaluation``."""
    declared = (
        click.option(
            "--eval-text",
            help="Evaluation text: a file, directory or Hub data set.  [default: a held-out part of the built-in text]",
        ),
        click.option("--eval-rows", type=click.IntRange(1), default=16, help="Number of evaluation sequences."),
        click.option(
            "--eval-row-tokens",
            type=click.IntRange(2),
            help=f"Tokens in each evaluation sequence.  {ROW_TOKENS_DEFAULT}",
        ),
        click.option(
            "--eval-domains", is_flag=True, help="Measure the damage by domain too, as bpwise eval --domains."
        ),
        click.option("--no-eval", is_flag=True, help="Do not compare the output with the original."),
        click.option("--force-eval-text", is_flag=True, help="Allow evaluation text that the model was calibrated on."),
        NO_CACHE_OPTION,
    )
    return grouped(
        command, declared, "evaluation", list(signature(EvaluationArguments).parameters), EvaluationArguments
    )


def grouped(
    command: Command, declared: Sequence[Any], name: str, parameters: Sequence[str], make: Callable[..., Any]
) -> Command:
    """Give a command a group of options; it gets what is made of them as one argument.

    Args:
        command: The command.
        declared: The options, in the order of the help.
        name: The argument.
        parameters: Names of the options' parameters.
        make: Makes the argument of them.
    """

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        group = {parameter: given.pop(parameter) for parameter in parameters}
        return command(**given, **{name: make(**group)})

    for option in reversed(declared):
        run = option(run)
    return run  # type: ignore[return-value]  # it takes what the command takes, from click


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArguments:
    """What ``extra_options`` were given: benchmarks, and needles in haystacks."""

    tasks: tuple[str, ...] | None
    num_fewshot: int | None
    limit: float | None
    include_path: Path | None
    batch_size: str
    apply_chat_template: bool
    needle: tuple[int, ...] | None
    needle_samples: int

    def benchmarks(self, config: EvalConfig) -> LoadedTasks | None:
        """Return the benchmarks, loaded; None if none are asked for.

        Raises:
            BpwiseError: lm-eval is not installed, or does not know one.
        """
        from ..eval.tasks.benchmarks import TaskConfig, load_tasks

        if not self.tasks:
            return None
        return load_tasks(
            TaskConfig(
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                include_path=self.include_path,
                batch_size=self.batch_size,
                apply_chat_template=self.apply_chat_template,
                dtype=config.dtype,
                device=config.device,
            )
        )

    def haystacks(self, config: EvalConfig) -> NeedleConfig | None:
        """Return the options of the search for needles; None if it is not asked for."""
        from ..eval.tasks.needle import NeedleConfig

        if not self.needle:
            return None
        return NeedleConfig(
            lengths=self.needle,
            samples=self.needle_samples,
            text=config.text,
            column=config.column,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
        )


def extra_options(command: Command) -> Command:
    """Give a command the options of benchmarks, named as in lm-eval, and of needles; it gets them as ``extra``."""
    declared = (
        click.option("--tasks", type=NAMES, help="Also run these lm-eval benchmarks: mmlu,arc_challenge,gsm8k."),
        click.option("--num-fewshot", type=click.IntRange(0), help="With --tasks: examples before each question."),
        click.option(
            "--limit", type=float, help="With --tasks: use only the first N questions of each, or a fraction below 1."
        ),
        click.option(
            "--include-path", type=EXISTING_DIRECTORY, help="With --tasks: folder with more task definitions."
        ),
        click.option("--batch-size", default="1", help="With --tasks: batch size, or auto."),
        click.option(
            "--apply-chat-template", is_flag=True, help="With --tasks: ask questions in the model's chat format."
        ),
        click.option(
            "--needle",
            type=LENGTHS,
            help="Also hide numbers in texts of these lengths and ask for them: 1k,4k,16k tokens.",
        ),
        click.option(
            "--needle-samples", type=click.IntRange(1), default=4, help="With --needle: texts of each length."
        ),
    )
    return grouped(command, declared, "extra", list(signature(TaskArguments).parameters), TaskArguments)


def _measuring(
    *,
    calibration: str | None,
    column: str | None,
    chat_template: bool,
    rows: int,
    row_tokens: int | None,
    seed: int,
    damping: float | None,
    moe_calibrate_all: bool,
    equalize: bool,
    device: str,
    precision: str,
    offload_dir: Path | None,
    work_dir: Path | None,
) -> MeasuringArguments:
    from ..measure.run import MeasureConfig
    from ..measure.text.calibration import CalibrationConfig, CalibrationSet

    is_saved = calibration is not None and calibration.endswith(".safetensors") and "," not in calibration
    saved = CalibrationSet.load(Path(calibration)) if calibration and is_saved else None
    text = CalibrationConfig(
        source=None if saved else calibration,
        column=column,
        chat_template=chat_template,
        rows=rows,
        row_tokens=row_tokens,
        seed=seed,
    )
    config = MeasureConfig(
        calibration=text,
        damping=damping,
        moe_calibrate_all=moe_calibrate_all,
        equalize=equalize,
        seed=seed,
        device=device,
        offload_dir=offload_dir,
        precision=precision,
    )
    return MeasuringArguments(config=config, saved=saved, work_dir=work_dir)
