"""Makes the unquantized GGUF files of a checkpoint with llama.cpp's own converter, in a process of its own.

The converter knows over a hundred architectures and their tokenizers. It loads tokenizers with
``trust_remote_code=True``, so it never sees the model's directory itself but a private one beside the output, with
links to the weights and to the model's side files, no Python files, and JSON files without the
``auto_map`` that names code to run; and it is kept from the network.

It reads what Transformers makes of config.json, which lacks keys, or has other values for them, that it looks for in
some model types; in others it misses what only Transformers' classes fill in. So there are two ways to show it a model.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ....checkpoint.carry.program import last_line, run_program
from ....checkpoint.files.atomic import atomic_file, private_directory
from ....checkpoint.files.disk_errors import DISK_FULL
from ....checkpoint.files.operations import append, delete, make_directory, sync
from ....checkpoint.source.checkpoint import Checkpoint
from ....errors import BpwiseError, CheckpointError, FormatError, VerificationError, install_command
from ....progress import Progress, silent
from ..file.header import read_gguf_header
from . import child
from .fetch import SCRIPT, fetch_converter
from .staging import stage_model, stage_projector, stores_mtp, vision_tensors

__all__ = [
    "COMPLETED",
    "CONFIGS",
    "RAW",
    "base_type",
    "converter_digest",
    "find_converter",
    "make_base",
    "make_projector",
    "projector_type",
]

RAW = "config.json as it is"
COMPLETED = "config.json as Transformers completes it"
CONFIGS = (RAW, COMPLETED)
"""How the converter can be shown a model, in the order in which it is tried."""

_SOURCES = (SCRIPT, "conversion/*.py", "gguf-py/gguf/**/*.py")
"""What the converter is made of."""

_LEAST_SECONDS = 1800.0
_SLOWEST_BYTES_PER_SECOND = 2e6
"""Time after which the converter counts as stuck: it takes seconds for a GB, and minutes from the slowest disks."""

_PROBE_BYTES = 1 << 20


def find_converter(llama_cpp: Path | None = None, progress: Progress = silent) -> Path:
    """Return llama.cpp's conversion script.

    Args:
        llama_cpp: A checkout of llama.cpp; None for the one that was fetched, or is fetched now.
        progress: Wraps what is fetched.

    Raises:
        BpwiseError: It is not there, or cannot be fetched.
    """
    script = (fetch_converter(progress) if llama_cpp is None else Path(llama_cpp)) / SCRIPT
    if not script.is_file():
        raise BpwiseError(
            f"{script.parent}: llama.cpp's converter is not there. Expected {SCRIPT}. Give a checkout of llama.cpp "
            "with --llama-cpp, or leave that out."
        )
    return script


def converter_digest(llama_cpp: Path | None = None) -> str:
    """Return 32 hexadecimal digits that change with the converter's sources, wherever they lie.

    Args:
        llama_cpp: As for ``find_converter``.

    Raises:
        BpwiseError: There is no converter, or it cannot be read.
    """
    directory = find_converter(llama_cpp).parent
    digest = hashlib.sha256()
    try:
        for path in sorted({path for pattern in _SOURCES for path in directory.glob(pattern)}):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()} {len(content)}\n".encode() + content)
    except OSError as cause:
        raise BpwiseError(f"{directory}: the converter cannot be read ({cause.strerror}). Install it again.") from cause
    return digest.hexdigest()[:32]


def base_type(checkpoint: Checkpoint) -> str:
    """Return the smallest of ``bf16``, ``f16`` and ``f32`` that loses nothing of a model's matrices.

    Vectors become float32 in any case. llama-quantize makes everything float32 first, so a base in bf16 and one in
    f32 give the same tensors, but their files are only comparable byte for byte with what is made of the same base.
    """
    return _smallest_type(checkpoint, checkpoint.names)


def projector_type(checkpoint: Checkpoint) -> str | None:
    """Return the same of a model's vision part alone; None if there is none."""
    names = vision_tensors(checkpoint).values()
    return _smallest_type(checkpoint, names) if names else None


def make_base(
    checkpoint: Checkpoint,
    output: Path,
    *,
    llama_cpp: Path | None = None,
    configs: Sequence[str] = CONFIGS,
    outtype: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> str:
    """Convert a checkpoint to an unquantized GGUF file; ``output`` appears only once it is whole.

    Args:
        checkpoint: The model. No code of it is run.
        output: File to make or replace.
        llama_cpp: Where the converter is, as for ``find_converter``.
        configs: Of ``CONFIGS`` those to show the model by, one after the other, until one converts and is not refused.
        outtype: Type of the matrices, as the converter calls it; None for ``base_type``.
        check: Called with each finished file; it refuses one by a VerificationError.

    Returns:
        The entry of ``configs`` that made the file.

    Raises:
        BpwiseError: There is no converter.
        CheckpointError: The converter cannot convert this model, or is stuck; or a file leads outside the model's
            directory.
        FormatError: What the converter wrote is no GGUF file.
        VerificationError: ``check`` refused all files.
        WorkDirectoryError: The file cannot be written.
    """
    return _convert(
        checkpoint,
        output,
        llama_cpp,
        stage_model,
        ["--outtype", outtype or base_type(checkpoint)],
        configs=configs,
        changes=[] if stores_mtp(checkpoint) else [child.NO_MTP],
        check=check,
    )


def make_projector(checkpoint: Checkpoint, output: Path, *, llama_cpp: Path | None = None) -> None:
    """Convert what a model sees images with to the file that llama.cpp takes as ``--mmproj``.

    Args:
        checkpoint: A model that has a ``projector_type``.
        output: File to make or replace.
        llama_cpp: Where the converter is, as for ``find_converter``.

    Raises:
        BpwiseError: As ``make_base``.
    """
    options = ["--mmproj", "--outtype", str(projector_type(checkpoint))]
    _convert(checkpoint, output, llama_cpp, stage_projector, options, configs=CONFIGS)


def _convert(
    checkpoint: Checkpoint,
    output: Path,
    llama_cpp: Path | None,
    stage: Callable[[Checkpoint, Path], None],
    options: Sequence[str],
    *,
    configs: Sequence[str],
    changes: Sequence[str] = (),
    check: Callable[[Path], object] | None = None,
) -> str:
    script = find_converter(llama_cpp).resolve()
    output = Path(output)
    reasons: dict[str, str] = {}
    refusal: FormatError | VerificationError | None = None
    with atomic_file(output) as temporary, private_directory(output) as private:
        # The converter derives the model's name from its directory's.
        staged = private / (checkpoint.directory.resolve().name or "model")
        make_directory(staged)
        stage(checkpoint, staged)
        for config in configs:
            asked = [*changes, child.RAW_CONFIG] if config == RAW else changes
            reason = _run(script, asked, options, temporary, staged, _most_seconds(checkpoint))
            if reason is not None:
                reasons[config] = reason
                continue
            try:
                read_gguf_header(temporary)
                if check is not None:
                    check(temporary)
            except (FormatError, VerificationError) as cause:
                refusal = cause
                delete(temporary)
            else:
                return config
        raise refusal or _failed(checkpoint, reasons)


def _run(
    script: Path, changes: Sequence[str], options: Sequence[str], output: Path, staged: Path, most_seconds: float
) -> str | None:
    # Returns why there is no output; None if there is one.
    command = [sys.executable, child.__file__, str(script), ",".join(changes), *options]
    command += ["--outfile", str(output.resolve()), str(staged.resolve())]
    status, said = run_program(command, staged, _environment(), most_seconds, "llama.cpp's converter")
    if status == 0 and output.is_file():
        return None
    if status == child.CANNOT_IMPORT:
        raise BpwiseError(
            f"{script.parent}: llama.cpp's converter lacks something of its own ({last_line(said)}). Run: "
            f"{install_command('gguf')}; or give a newer checkout of llama.cpp with --llama-cpp."
        )
    _refuse_full_disk(output)
    delete(output, missing_ok=True)
    if status < 0:
        return f"ended by signal {-status}, as where memory is short"
    return last_line(said)


def _most_seconds(checkpoint: Checkpoint) -> float:
    return _LEAST_SECONDS + checkpoint.total_bytes / _SLOWEST_BYTES_PER_SECOND


def _smallest_type(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    infos = map(checkpoint.info, names)
    dtypes = {info.dtype for info in infos if len(info.shape) > 1 and info.dtype.is_floating_point}
    return {frozenset({torch.bfloat16}): "bf16", frozenset({torch.float16}): "f16"}.get(frozenset(dtypes), "f32")


def _failed(checkpoint: Checkpoint, reasons: Mapping[str, str]) -> CheckpointError:
    said = {reason: f"{reason}, with {config}" for config, reason in reasons.items()}
    reason = "; ".join(said if len(said) == 1 else said.values())
    return CheckpointError(
        f"{checkpoint.directory}: llama.cpp's converter failed on this model of type "
        f"{checkpoint.config.get('model_type')!r} ({reason}). Look whether llama.cpp supports it, and give a newer "
        "checkout with --llama-cpp if so; code that comes with a model is not run."
    )


def _refuse_full_disk(unfinished: Path) -> None:
    # NumPy says of a full disk only that it wrote less than was asked, so the disk itself is asked.
    try:
        with append(unfinished) as file:
            file.write(bytes(_PROBE_BYTES))
        sync(unfinished)
    except OSError as cause:
        if cause.errno in DISK_FULL:
            raise  # explained by atomic_file, under the name of the output


def _environment() -> dict[str, str]:
    # The script's own folder must come first on the path, for its gguf-py to win over an installed gguf.
    dropped = ("PYTHONSAFEPATH", "NO_LOCAL_GGUF", "PYTHONSTARTUP")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
