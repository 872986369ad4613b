"""Needle in a haystack: whether a model finds a number again that stood somewhere in a long text.

A made-up sentence, "The secret number of Lima is 4839201.", stands at a depth of the text, and the prompt ends with its
beginning: "The secret number of Lima is". No model can know the number, and base models go on from that as chat models
do, so both are scored alike: found is a number whose every token is the model's most likely one, which is what greedy
decoding gives; and the number's negative log-likelihood tells models apart that both find it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.original import Original
from ...errors import ConfigError
from ...measure.device import resolve_device
from ...measure.model.stream import StreamedModel
from ...measure.text.calibration import CalibrationConfig, CalibrationSet, build_calibration, require_ids_below
from ...measure.text.context import context_tokens
from ...measure.text.tokenizer import Tokenizer, leading_ids, load_tokenizer
from ...progress import Progress, silent
from ..metrics.estimate import Estimate, mean_over_rows
from ..metrics.passes import last_hidden
from ..models import DTYPES, device_name, model_name, open_pair, vocab_size_of

__all__ = [
    "DEPTHS",
    "NeedleCell",
    "NeedleConfig",
    "NeedleLength",
    "NeedleModel",
    "NeedleReport",
    "check_needle",
    "evaluate_needle",
    "needle_prompts",
]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle stands: the share of the text that is before it."""

_PASS_TOKENS = 65536
"""Tokens whose hidden states are held at once: 1 GiB in float32 for a hidden size of 4096."""

_PLACES = ("Lima", "Oslo", "Cairo", "Dublin", "Madrid", "Vienna", "Lagos", "Delhi", "Paris", "Boston")
_DIGITS = 7
"""Of a secret number: guessing does not find it, and a text seldom holds one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleConfig:
    """Options of the search.

    Attributes:
        lengths: Lengths of the prompts in tokens: BOS, text, needle, question and answer.
        samples: Texts with a needle of their own for each length; each is asked at all depths.
        text: As in ``EvalConfig``.
        column: As in ``EvalConfig``.
        seed: Chooses numbers, and the places that rows of the built-in text are taken from.
        dtype: As in ``EvalConfig``.
        device: As in ``EvalConfig``.
    """

    lengths: tuple[int, ...]
    samples: int = 4
    text: str | None = None
    column: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"needle: lengths must be numbers of tokens. Got {self.lengths}. Choose another.")
        if self.samples < 1:
            raise ConfigError(f"needle: samples must be at least 1. Got {self.samples}. Choose another.")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: not usable. Got {self.dtype!r}. Expected one of {', '.join(DTYPES)}. Choose another."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleCell:
    """What a model finds at one length and depth, averaged over the samples.

    Attributes:
        length: Of the prompts, in tokens.
        depth: Share of the text that is before the needle, 0 to 1.
        found: Share of the numbers that greedy decoding finds, 0 to 1.
        nats: Negative log-likelihood of a whole number.
    """

    length: int
    depth: float
    found: float
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleLength:
    """What a model finds at one length, averaged over depths; standard errors take the samples as independent.

    Attributes:
        length: Of the prompts, in tokens.
        found: Share of the numbers that greedy decoding finds, 0 to 1.
        nats: Negative log-likelihood of a whole number.
        found_change: ``found`` minus the original's on the same prompts; of the original None.
        nats_change: ``nats`` minus the original's on the same prompts; of the original None.
    """

    length: int
    found: Estimate
    nats: Estimate
    found_change: Estimate | None
    nats_change: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleModel:
    """What a model finds.

    Attributes:
        name: The model's.
        cells: For every length, from the shortest, all depths from the start of the text.
        lengths: For every length.
    """

    name: str
    cells: tuple[NeedleCell, ...]
    lengths: tuple[NeedleLength, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleReport:
    """What models find.

    Attributes:
        models: The original first.
        samples: As in ``NeedleConfig``.
        text: What the text is, and how rows were taken from it.
        dtype: What the models ran in.
        device: What they ran on.
        seconds: Wall time of all models.
    """

    models: tuple[NeedleModel, ...]
    samples: int
    text: str
    dtype: str
    device: str
    seconds: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NeedlePrompts:
    """Prompts of one length, with their answers.

    Attributes:
        tokens: Token ids, int64, shape (samples * depths, length); all depths of a sample follow each other.
        answer_tokens: For each prompt how many of its last tokens are the number.
    """

    tokens: Tensor
    answer_tokens: tuple[int, ...]


def evaluate_needle(
    original: Original | TensorSource,
    quantized: Sequence[str | Path],
    config: NeedleConfig,
    progress: Progress = silent,
) -> NeedleReport:
    """Hide the same needles from an original and from quantized models.

    Models are streamed block by block. In memory are hidden states of 65536 tokens (of one prompt if that is longer)
    and logits at the positions of the answers.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for all.
        quantized: Directories, files or Hub ids of the quantized models.
        config: Options.
        progress: Wraps the blocks of each pass.

    Raises:
        BpwiseError: As ``open_pair`` and ``build_calibration``.
        ConfigError: A length is beyond a model's context, or too short for needle and question.
        NumericalError: NaN or infinity in hidden states or logits.
    """
    start = time.monotonic()
    source, others = open_pair(original, quantized)
    lengths = sorted(set(config.lengths))
    prompts, description = _all_prompts([source, *others], config)
    device = resolve_device(config.device)
    base: list[tuple[Tensor, Tensor]] = []
    models = []
    for number, model in enumerate((source, *others)):
        streamed = StreamedModel(model, device=device, dtype=DTYPES[config.dtype])
        role = "quantized model" if number else "original model"
        outcomes = [_ask(streamed, each, role, config.samples, progress) for each in prompts]
        base = base or outcomes
        models.append(_model(model, lengths, outcomes, base if number else None))
    return NeedleReport(
        models=tuple(models),
        samples=config.samples,
        text=description,
        dtype=config.dtype,
        device=device_name(device),
        seconds=time.monotonic() - start,
    )


def check_needle(original: Original | TensorSource, quantized: Sequence[str | Path], config: NeedleConfig) -> None:
    """Refuse what ``evaluate_needle`` would refuse before it runs a model, for callers with other work before it.

    Raises:
        BpwiseError: As ``evaluate_needle``.
    """
    source, others = open_pair(original, quantized)
    _all_prompts([source, *others], config)


def _all_prompts(models: Sequence[TensorSource], config: NeedleConfig) -> tuple[list[NeedlePrompts], str]:
    # Prompts of every length, the shortest first, with the first model's tokenizer; and what the text is.
    source, lengths = models[0], sorted(set(config.lengths))
    for model in models:
        context = context_tokens(model)
        if context is not None and lengths[-1] > context:
            raise ConfigError(
                f"needle: length {lengths[-1]}, but {model_name(model)} has positions for {context}. Ask for less."
            )
    tokenizer = load_tokenizer(source.directory)
    prompts, description = [], ""
    for length in lengths:
        rows = build_calibration(
            tokenizer,
            CalibrationConfig(
                source=config.text, column=config.column, rows=config.samples, row_tokens=length, seed=config.seed
            ),
            vocab_size=vocab_size_of(source),
            part="evaluation",
        )
        prompts.append(needle_prompts(tokenizer, rows, seed=config.seed))
        require_ids_below(prompts[-1].tokens, vocab_size_of(source), tokenizer)
        description = rows.description
    return prompts, description


def needle_prompts(tokenizer: Tokenizer, rows: CalibrationSet, *, seed: int) -> NeedlePrompts:
    """Hide a number in each row of a text, at all depths, and ask for it.

    Between the ends the needle stands after the last line that ends before its depth, if there is one.

    Args:
        tokenizer: Makes the ids.
        rows: The text; what needle, question and answer take is cut from the end of each row.
        seed: Chooses the numbers.

    Raises:
        ConfigError: Rows are too short.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = leading_ids(tokenizer)
    length = rows.tokens.shape[1]
    prompts, answers = [], []

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for sample, row in enumerate(rows.tokens.tolist()):
        number = int(torch.randint(10 ** (_DIGITS - 1), 10**_DIGITS, (), generator=generator))
        question = f"The secret number of {_PLACES[sample % len(_PLACES)]} is"
        needle, asked, ending = ids(f"\n{question} {number}.\n"), ids(f"\n{question}"), ids(f"\n{question} {number}")
        room = length - len(lead) - len(needle) - len(ending)
        if room < len(needle):
            raise ConfigError(
                f"needle: {length} tokens are too few for a text with needle, question and answer. Expected at least "
                f"{length - room + len(needle)}. Ask for longer prompts."
            )
        # Tokenizers may join the number's beginning with what is before it: the answer is what is not the question's.
        shared = next(i for i, id_ in enumerate(ending) if i >= len(asked) or asked[i] != id_)
        text = row[len(lead) :][:room]
        for depth in DEPTHS:
            place = int(depth * room)
            lines = (i for i in range(place, 0, -1) if "\n" in tokenizer.decode([text[i - 1]]))
            place = next(lines, place) if depth < 1 else place
            prompts.append(lead + text[:place] + needle + text[place:] + ending)
            answers.append(len(ending) - shared)
    return NeedlePrompts(tokens=torch.tensor(prompts, dtype=torch.int64), answer_tokens=tuple(answers))


def _ask(
    model: StreamedModel, prompts: NeedlePrompts, role: str, samples: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    # Whether each number is found, and its negative log-likelihood: two of (samples, depths), float64.
    found, nats = [], []
    count, length = prompts.tokens.shape
    step = max(1, _PASS_TOKENS // length)
    for first in range(0, count, step):
        tokens = prompts.tokens[first : first + step]
        hidden = last_hidden(model, tokens, role, progress)
        with torch.no_grad(), model.tail():
            for row, answer in enumerate(prompts.answer_tokens[first : first + step]):
                logits = model.logits(hidden[row : row + 1, -answer - 1 : -1].to(model.device))[0].cpu().double()
                targets = tokens[row, -answer:]
                found.append(float((logits.argmax(dim=-1) == targets).all()))
                nats.append(-float(logits.log_softmax(dim=-1).gather(-1, targets[:, None]).sum()))
    return tuple(torch.tensor(each, dtype=torch.float64).view(samples, -1) for each in (found, nats))  # type: ignore[return-value]


def _model(
    source: TensorSource,
    lengths: Sequence[int],
    outcomes: Sequence[tuple[Tensor, Tensor]],
    base: Sequence[tuple[Tensor, Tensor]] | None,
) -> NeedleModel:
    cells, summaries = [], []
    for number, (length, (found, nats)) in enumerate(zip(lengths, outcomes, strict=True)):
        cells += [
            NeedleCell(length=length, depth=depth, found=float(found[:, i].mean()), nats=float(nats[:, i].mean()))
            for i, depth in enumerate(DEPTHS)
        ]
        summaries.append(
            NeedleLength(
                length=length,
                found=mean_over_rows(found),
                nats=mean_over_rows(nats),
                found_change=None if base is None else mean_over_rows(found - base[number][0]),
                nats_change=None if base is None else mean_over_rows(nats - base[number][1]),
            )
        )
    return NeedleModel(name=model_name(source), cells=tuple(cells), lengths=tuple(summaries))
