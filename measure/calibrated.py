"""Calibration rows for a model: made from text, written by the model, given, or those of a measurement."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.disk_errors import shown
from ..checkpoint.files.schemas import check_schema
from ..checkpoint.files.side_files import is_side_file
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import language_config
from ..errors import BpwiseError, BpwiseWarning, CalibrationError, FormatError, UnreachableTextError, reason
from ..progress import Progress, silent
from ..version import __version__
from .device import resolve_device
from .measurement import Measurement
from .text.calibration import CalibrationConfig, CalibrationSet, build_calibration
from .text.context import CALIBRATION, check_rows, fit_row_tokens, require_tokens
from .text.generation import write_rows
from .text.mixture import BUILT_IN, NAMES, SELF, Share, TextOptions, rows_of, spread_places
from .text.sources import is_data_set, read_texts, text_files
from .text.tokenizer import Tokenizer, load_tokenizer, token_fingerprint

__all__ = [
    "CALIBRATION_FILE",
    "calibration_rows",
    "finished_rows",
    "joined_rows",
    "kept_rows",
    "load_or_make_rows",
    "measured_rows",
    "require_text",
]

_log = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.safetensors"
"""Where a run keeps its calibration rows in the work directory."""


def load_or_make_rows(
    checkpoint: Checkpoint,
    config: CalibrationConfig,
    kept: Path,
    *,
    device: str = "auto",
    given: CalibrationSet | None = None,
    progress: Progress = silent,
) -> CalibrationSet:
    """Return the calibration rows of a run, which are kept in a file before its long work.

    A run that goes on takes those that it began with: a model that wrote them, or the Hub, might give others now.

    Args:
        checkpoint: The model.
        config: Which rows.
        kept: The file: read if it holds rows that were made from all the same, else replaced.
        device: As for ``calibration_rows``.
        given: As for ``calibration_rows``; they are saved as they are.
        progress: As for ``calibration_rows``; wraps what is read of the model to know it, too.

    Raises:
        BpwiseError: As ``calibration_rows``; or the file cannot be written.

    Warns:
        BpwiseWarning: As ``calibration_rows``; the file is damaged; or its rows lack a data set that was out of reach.
    """
    if given is None and kept.is_file():
        checkpoint.prepare_fingerprint(progress)
        try:
            rows = kept_rows(checkpoint, config, kept, device=device)
        except CalibrationError as error:
            warnings.warn(f"{error} They are made again now.", BpwiseWarning, stacklevel=2)
            rows = None
        if rows is not None:
            if rows.unreached:
                warnings.warn(
                    f"{shown(kept)}: rows of the run that goes on. Got the built-in text in place of "
                    f"{', '.join(rows.unreached)}. Expected data sets that can be reached. Delete the file to have the "
                    "rows made again.",
                    BpwiseWarning,
                    stacklevel=2,
                )
            _log.debug("calibration text, from %s: %s", shown(kept), rows.description)
            return rows
    made = calibration_rows(checkpoint, config, device=device, given=given, progress=progress)
    checkpoint.prepare_fingerprint(progress)
    if given is None:
        made = replace(made, made_from=_made_from(checkpoint, config, device))
    made.save(kept)
    _log.debug("calibration text: %s", made.description)
    return made


def kept_rows(
    checkpoint: Checkpoint, config: CalibrationConfig, kept: Path, *, device: str = "auto"
) -> CalibrationSet | None:
    """Return the rows of a file if they were made as a config describes, of the same model and text; else None.

    Args:
        checkpoint: The model; its fingerprint is looked at only where there is a file.
        config: Which rows.
        kept: The file; it need not exist.
        device: As for ``calibration_rows``.

    Raises:
        CalibrationError: The file is damaged, or text cannot be read.
        CheckpointError: The model cannot be read.
    """
    if not kept.is_file():
        return None
    rows = CalibrationSet.load(kept)
    return rows if rows.made_from == _made_from(checkpoint, config, device) else None


def finished_rows(checkpoint: Checkpoint, config: CalibrationConfig, kept: Path, *, device: str = "auto") -> bool:
    """Return whether the rows of a run are made; arguments as for ``kept_rows``."""
    try:
        return kept_rows(checkpoint, config, kept, device=device) is not None
    except BpwiseError:  # damaged: they are made again
        return False


def require_text(
    checkpoint: Checkpoint, config: CalibrationConfig, kept: Sequence[Path], *, device: str = "auto"
) -> None:
    """Refuse calibration text that cannot be opened: files, folders, and data sets of the Hub.

    Those of ``mix`` may be out of reach: the built-in text takes their place. No data set is looked for where a run
    that goes on has its rows.

    Args:
        checkpoint: The model; its fingerprint is looked at only where rows are kept.
        config: Which rows.
        kept: Files that a run may keep them in.
        device: As for ``calibration_rows``.

    Raises:
        CalibrationError: What is wrong with the text.
    """
    sources = [share.source for share in config.shares if share.source not in NAMES and share.license is None]
    on_hub = {source for source in sources if is_data_set(source) and not text_files(source)}
    if on_hub and any(finished_rows(checkpoint, config, each, device=device) for each in kept):
        sources = [source for source in sources if source not in on_hub]
    for source in sources:
        read_texts(source, column=config.column)


def _made_from(checkpoint: Checkpoint, config: CalibrationConfig, device: str) -> str:
    # Not the number of threads, nor what the Hub has today: a run keeps the rows that it began with.
    fitted = replace(config, row_tokens=fit_row_tokens(config.row_tokens, checkpoint, CALIBRATION))
    sources = [share.source for share in config.shares]
    texts = [file for source in sources if source not in NAMES for file in text_files(source)]
    settings = sorted(file for file in checkpoint.directory.iterdir() if is_side_file(file.name))
    parts = {
        "bpwise": __version__,
        "model": checkpoint.fingerprint,
        "changes": checkpoint.changes,
        "options": asdict(fitted),
        "device": resolve_device(device).type if SELF in sources else None,
        "texts": file_digests(texts, CalibrationError),
        "tokenizer": [[file.name for file in settings], file_digests(settings, CalibrationError)],
    }
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def calibration_rows(
    checkpoint: Checkpoint,
    config: CalibrationConfig,
    *,
    device: str = "auto",
    given: CalibrationSet | None = None,
    progress: Progress = silent,
) -> CalibrationSet:
    """Return rows in the tokens of a model: those that are given, or those that a config describes.

    Args:
        checkpoint: The model.
        config: Which rows.
        device: Where the model runs if it writes them itself, as ``MeasureConfig.device``.
        given: Rows to use instead; they are checked against the model.
        progress: Shows how far the model is, if it writes them.

    Raises:
        CalibrationError: The text or the tokenizer cannot be read, there is too little text, the model cannot be
            loaded to write it, or rows that are given were made with another vocabulary.
        ConfigError: Rows are longer than the model's context, or there is no such device.

    Warns:
        BpwiseWarning: A data set of ``mix`` cannot be reached; the built-in text takes its place.
    """
    if given is not None:
        check_rows(checkpoint, given, CALIBRATION)
        if given.vocabulary is not None:
            require_tokens(given, load_tokenizer(checkpoint.directory))
        return given
    asked = config.options
    config = replace(config, row_tokens=fit_row_tokens(config.row_tokens, checkpoint, CALIBRATION))
    maker = _RowMaker(checkpoint, load_tokenizer(checkpoint.directory), config, device, progress)
    counts = dict(zip(config.shares, rows_of(config.shares, config.rows), strict=True))
    built_in = sum(count for share, count in counts.items() if share.source == BUILT_IN)
    sets, unreached = [], []
    for share, count in counts.items():
        if not count or share.source == BUILT_IN:
            continue
        try:
            sets.append(maker.rows(share, count))
        except UnreachableTextError as error:
            if share.license is None:
                raise
            warnings.warn(
                f"{share.source}: cannot be reached. Got {reason(error.__cause__ or error)!r}. Expected a data set "
                "of the Hub. The built-in text takes its place.",
                BpwiseWarning,
                stacklevel=2,
            )
            built_in += count
            unreached.append(share.source)
    if built_in:
        sets.append(maker.rows(Share(BUILT_IN, 1.0), built_in))
    rows = sets[0] if len(sets) == 1 else joined_rows(sets, maker.tokenizer)
    return replace(rows, unreached=tuple(unreached), options=asked)


@dataclass(frozen=True, slots=True)
class _RowMaker:
    """Makes rows of single sources."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    config: CalibrationConfig
    device: str
    progress: Progress

    def rows(self, share: Share, count: int) -> CalibrationSet:
        of_user = share.source not in NAMES and share.license is None
        config = replace(
            self.config,
            source=share.source,
            rows=count,
            column=self.config.column if of_user else None,
            chat_template=self.config.chat_template and of_user,
        )
        vocab_size = int(language_config(self.checkpoint)["vocab_size"])
        if share.source == SELF:
            device = resolve_device(self.device)
            return write_rows(
                self.checkpoint, self.tokenizer, config, vocab_size=vocab_size, device=device, progress=self.progress
            )
        rows = build_calibration(self.tokenizer, config, vocab_size=vocab_size)
        if share.license is None:
            return rows
        return replace(rows, description=f"{rows.description} (license: {share.license})")


def joined_rows(sets: Sequence[CalibrationSet], tokenizer: Tokenizer) -> CalibrationSet:
    """Return rows of several sources as one set, the rows of each spread evenly over all.

    Args:
        sets: At least one, with rows of the same length.
        tokenizer: What made their tokens.

    Returns:
        As many rows as all have together.
    """
    places = spread_places([len(rows.tokens) for rows in sets])
    tokens = torch.stack([sets[source].tokens[row] for source, row in places])
    return CalibrationSet(
        tokens=tokens,
        origins=tuple(sets[source].origins[row] for source, row in places),
        description="; ".join(rows.description for rows in sets),
        adds_bos=sets[0].adds_bos,
        vocabulary=token_fingerprint(tokenizer, tokens),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowsProvenance:
    """What ``measurement_provenance`` says of the calibration rows."""

    calibration_text: str
    calibration_origins: tuple[str, ...]
    calibration_adds_bos: bool
    calibration_options: TextOptions | None = None


def measured_rows(measurement: Measurement) -> CalibrationSet:
    """Return the calibration rows that a measurement was made with.

    Raises:
        FormatError: The measurement's provenance does not describe them.
        ShapeError: It describes others.
    """
    known = check_schema(
        measurement.provenance,
        _RowsProvenance,
        FormatError,
        where="measurement: provenance",
        remedy="The measurement is damaged: measure the model again.",
    )
    return CalibrationSet(
        tokens=torch.from_numpy(measurement.tokens).long(),
        origins=known.calibration_origins,
        description=known.calibration_text,
        adds_bos=known.calibration_adds_bos,
        options=known.calibration_options,
    )
