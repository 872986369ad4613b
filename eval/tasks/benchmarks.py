"""Benchmarks: the original beside quantized models in EleutherAI's lm-eval, decoded into memory by our own readers."""

from __future__ import annotations

import difflib
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.original import Original
from ...errors import BpwiseError, ConfigError, install_command, reason
from ...measure.device import resolve_device
from ...measure.model.whole import whole_model
from ...measure.text.calibration import require_ids_below
from ...measure.text.chat_template import ChatTemplate, RefusedChatError
from ...measure.text.tokenizer import LoadedTokenizer, chat_template, load_tokenizer
from ...progress import Progress, silent
from ..models import DTYPES, device_name, model_name, open_pair
from .scores import TaskScore, task_scores

__all__ = ["LoadedTasks", "TaskConfig", "TaskReport", "evaluate_tasks", "load_tasks"]

_SUGGESTIONS = 3

_PYTHON_SEED = 0
_SEED = 1234
"""lm-eval's own seeds, of Python's generator and of all others, so that its numbers are had again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """Which benchmarks, and how they are run; names and meanings are lm-eval's.

    Attributes:
        tasks: Names of tasks, groups and tags, or patterns such as ``mmlu_*``.
        num_fewshot: Examples before each question; None for what each task says.
        limit: Only the first so many questions of each task, or that share of them if below 1.
        include_path: Directory with more task definitions.
        batch_size: Requests that are run together, or ``auto``.
        apply_chat_template: Whether questions are put as turns of a chat.
        dtype: What models run in: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: Path | None = None
    batch_size: str = "1"
    apply_chat_template: bool = False
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if not self.tasks:
            raise ConfigError("tasks: none given. Expected names such as mmlu or arc_challenge. Name some.")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: not usable. Got {self.dtype!r}. Expected one of {', '.join(DTYPES)}. Choose another."
            )
        if self.limit is not None and self.limit <= 0:
            raise ConfigError(f"limit: not usable. Got {self.limit:g}. Expected above 0. Choose another.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot: not usable. Got {self.num_fewshot}. Expected 0 or more. Choose another.")
        if self.batch_size.partition(":")[0] != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ConfigError(
                f"batch_size: not usable. Got {self.batch_size!r}. Expected a positive number or auto. Choose another."
            )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedTasks:
    """Benchmarks whose questions are at hand.

    Attributes:
        config: How they are run.
        asked: Names of what was asked for, tags and patterns resolved.
        content: lm-eval's own dictionary of tasks and groups.
    """

    config: TaskConfig
    asked: tuple[str, ...]
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """What models score in benchmarks.

    Attributes:
        original: Name of the original.
        quantized: Names of the quantized models.
        scores: One a metric; groups before their parts.
        engine: What asked the questions, with its version.
        limit: As in ``TaskConfig``; None for all questions.
        num_fewshot: As in ``TaskConfig``.
        batch_size: As in ``TaskConfig``.
        apply_chat_template: As in ``TaskConfig``.
        dtype: What the models ran in.
        device: What they ran on.
        seconds: Wall time of all models.
    """

    original: str
    quantized: tuple[str, ...]
    scores: tuple[TaskScore, ...]
    engine: str
    limit: float | None
    num_fewshot: int | None
    batch_size: str
    apply_chat_template: bool
    dtype: str
    device: str
    seconds: float


def load_tasks(config: TaskConfig) -> LoadedTasks:
    """Find benchmarks and get their questions, from the Hub or from local files, before anything long is run.

    Args:
        config: Which.

    Raises:
        BpwiseError: lm-eval, or something that a task needs, is not installed.
        ConfigError: A task is unknown, its questions cannot be had, or it would run code that a model writes.
    """
    manager = _task_manager(config.include_path)
    names: list[str] = []
    for pattern in config.tasks:
        found = manager.match_tasks([pattern])
        if not found:
            near = difflib.get_close_matches(pattern, manager.all_tasks, _SUGGESTIONS)
            advice = f"Close to it are: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them."
            raise ConfigError(
                f"tasks: lm-eval does not know {pattern!r}. Expected the name of a task or group. {advice}"
            )
        names += [name for name in found if name not in names]
    objects: dict[str, Any] = {}
    for name in names:
        try:
            with _quiet():
                found = manager.load([name])
        except Exception as error:  # whatever data sets, their files and the tasks' own code raise
            raise ConfigError(
                f"tasks: {name} cannot be loaded ({reason(error)}). Expected its definition and its questions on "
                "the Hub or in local files. Check the network and the paths in its definition."
            ) from error
        objects.update({name: found["groups"][name]} if name in found["groups"] else found["tasks"])
    try:
        content = manager.load(list(objects.values()))
    except ValueError as error:
        raise ConfigError(f"tasks: {error}. Ask for one of them.") from error
    for name, task in content["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"tasks: {name} runs code that the model writes, which bpwise does not do. Choose another."
            )
        _set_fewshot(task, config.num_fewshot)
    return LoadedTasks(config=config, asked=tuple(objects), content=content)


def _set_fewshot(task: Any, number: int | None) -> None:
    # The rules of lm_eval.simple_evaluate: a task that says 0 keeps it, one that says nothing has 0.
    said = task.get_config("num_fewshot")
    if said != 0:
        task.set_config(key="num_fewshot", value=(said or 0) if number is None else number)


def evaluate_tasks(
    original: Original | TensorSource, quantized: Sequence[str | Path], loaded: LoadedTasks, progress: Progress = silent
) -> TaskReport:
    """Ask an original and quantized models the same questions, and compare their answers question by question.

    One model after the other is held in memory whole, in ``config.dtype``; quantized ones are decoded by bpwise. All
    use the original's tokenizer, chat template and ``generation_config.json``.

    Args:
        original: Directory or Hub id of the original, or what ``open_model`` made of it.
        quantized: Directories, files or Hub ids of the quantized models.
        loaded: The questions.
        progress: Wraps the models; lm-eval shows its own progress within each.

    Raises:
        BpwiseError: As ``open_pair``, ``load_tokenizer`` and ``whole_model``.
        ConfigError: A chat template is asked for, and there is none; or the device is not there.
    """
    start = time.monotonic()
    config = loaded.config
    source, others = open_pair(original, quantized)
    tokenizer = load_tokenizer(source.directory)
    if config.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(f"{source.directory}: the tokenizer has no chat template. Leave --apply-chat-template out.")
    device = resolve_device(config.device)
    with ExitStack() as opened:
        template = opened.enter_context(chat_template(tokenizer)) if config.apply_chat_template else None
        results = [
            _run(model, source.directory, tokenizer, template, loaded, device)
            for model in progress([source, *others], "tasks")
        ]
    return TaskReport(
        original=model_name(source),
        quantized=tuple(map(model_name, others)),
        scores=task_scores(loaded.asked, results[0], results[1:]),
        engine=f"lm-eval {version('lm-eval')}",
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        apply_chat_template=config.apply_chat_template,
        dtype=config.dtype,
        device=device_name(device),
        seconds=time.monotonic() - start,
    )


def _run(
    source: TensorSource,
    directory: Path,
    tokenizer: LoadedTokenizer,
    template: ChatTemplate | None,
    loaded: LoadedTasks,
    device: torch.device,
) -> Any:
    from lm_eval import evaluate  # noqa: PLC0415 - an extra, and seconds to import
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from transformers import GenerationConfig  # noqa: PLC0415

    config = loaded.config
    model = whole_model(source, device=device, dtype=DTYPES[config.dtype])
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    model.get_input_embeddings().register_forward_pre_hook(partial(_require_rows, tokenizer))
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer.transformers, batch_size=config.batch_size)
    if template is not None:
        # lm-eval would run the template in this process, without limits.
        evaluated.apply_chat_template = partial(_rendered, template, f"{directory}: chat of a benchmark")
    with _quiet(), _seeded():
        for task in loaded.content["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        return evaluate(
            lm=evaluated,
            task_dict=loaded.content,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
            bootstrap_iters=0,  # standard errors come from the questions, see task_scores
        )


def _require_rows(tokenizer: LoadedTokenizer, embedding: torch.nn.Embedding, inputs: tuple[torch.Tensor]) -> None:
    require_ids_below(inputs[0], embedding.num_embeddings, tokenizer)


def _rendered(
    template: ChatTemplate, where: str, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> str:
    # As lm-eval does it: what answers is continued, and a template that refuses system turns goes without them.
    render = partial(
        template.render,
        where=where,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    try:
        return render(chat_history)
    except RefusedChatError:
        return render([turn for turn in chat_history if turn["role"] != "system"])


@contextmanager
def _seeded() -> Iterator[None]:
    # Some tasks shuffle answers, some let the model sample: both the same for every model, and in every run.
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _task_manager(include_path: Path | None) -> Any:
    try:
        import lm_eval.models.huggingface  # noqa: F401, PLC0415 - an extra, and seconds to import
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise BpwiseError(
            f"Benchmarks are run by lm-eval, which is not installed ({error}). Run: {install_command('tasks')}."
        ) from error
    with _quiet():
        return TaskManager(include_path=None if include_path is None else str(include_path))


@contextmanager
def _quiet() -> Iterator[None]:
    # lm-eval warns of what is meant here: a model that it is handed, few-shot numbers that differ from a task's own.
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
