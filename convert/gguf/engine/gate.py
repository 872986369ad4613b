"""Whether llama.cpp computes of an unquantized file what Transformers computes of its original, before all long work.

Both run the same few random tokens in float32. A file of BF16 or F16 is copied in F32 for that (see ``widened``), a
large model cut to its first blocks (see ``first_blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.files.atomic import private_directory, write_json
from ....checkpoint.files.schemas import check_schema, read_json
from ....checkpoint.model.names import text_config
from ....checkpoint.model.positions import stated_rope
from ....checkpoint.source.checkpoint import Checkpoint
from ....errors import (
    BpwiseError,
    CheckpointError,
    ConfigError,
    NumericalError,
    VerificationError,
    WorkDirectoryError,
    install_command,
)
from ....measure.device import installed_memory
from ....version import __version__
from ..file.header import GgufHeader
from ..file.split import read_model_header
from ..llama_cpp.readers import require_llama_cpp
from .first_blocks import FirstBlocks, block_count, period
from .library import EngineModel, LlamaLibrary, load_library
from .reference import transformers_logits
from .widened import block_of, float32_bytes, is_float32, write_float32

__all__ = ["Gate", "gate_base", "gate_once"]

_ROWS, _ROW_TOKENS = 2, 96
_SEED = 0

_SAME_NATS = 1e-4
"""Below it the two compute the same: float32 makes some 1e-8, a wrong order of rows or a lost scale nats."""

_OTHER_MODEL_NATS = 0.05
"""Above it llama.cpp runs another model, and nothing that is measured on the original holds for it."""

_KNOWN_NATS = 1.0
"""The same where llama.cpp is known to compute something otherwise."""

_SMALL_BYTES = 2 << 30
"""Weights in float32 of a model that is compared whole."""

_MOST_BYTES = 16 << 30
"""Weights in float32 that are compared at all: minutes."""

_MEMORY_SHARE = 4
"""They are at most a fourth of the machine's memory: Transformers holds them twice for a moment."""


_TOLD_BY_BLOCKS = ("exaone4",)
"""Architectures that llama.cpp computes otherwise if they have another number of blocks: no cut of them shows how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Outcome of running an unquantized file in llama.cpp, beside its original in Transformers.

    Attributes:
        kl_nats: Mean KL divergence of llama.cpp from Transformers, nats per token; None if they were not compared.
        tokens: Number of tokens that they were compared on.
        cut_blocks: Number of first blocks that were compared; None for the whole model.
        reason: Why they were not compared or differ, as far as is known.
        refused: Whether llama.cpp refuses the file, or computes another model of it.
    """

    kl_nats: float | None = None
    tokens: int = 0
    cut_blocks: int | None = None
    reason: str = ""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """Whether the two were compared, and compute the same."""
        return self.kl_nats is not None and self.kl_nats < _SAME_NATS

    @property
    def sentence(self) -> str:
        """What came out, for reports."""
        if self.kl_nats is None:
            return f"not compared with Transformers: {self.reason}"
        where = "" if self.cut_blocks is None else f" of its first {self.cut_blocks} blocks"
        found = f"{self.kl_nats:.1e} nats per token from Transformers, on {self.tokens} tokens{where} in float32"
        return found if self.passed else f"{found}, where less than {_SAME_NATS:g} is usual: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: nothing if the two compute the same."""
        return () if self.passed else (f"The base in llama.cpp: {self.sentence}.",)

    def require(self) -> None:
        """Refuse a file that llama.cpp does not run as the model that it should be.

        Raises:
            VerificationError: It is one.
        """
        if self.refused:
            raise VerificationError(self.reason)


def gate_once(base: Path, checkpoint: Checkpoint, work: Path, *, kept: Path | None) -> Gate:
    """Return what ``gate_base`` finds, or has found before.

    Args:
        base: As for ``gate_base``.
        checkpoint: As for ``gate_base``.
        work: As for ``gate_base``.
        kept: File that keeps it for the next run; None for none.

    Raises:
        BpwiseError: As ``gate_base``.
    """
    library = _library()
    identity = {
        "base": read_model_header(base).sha256,
        "model": checkpoint.fingerprint,
        "engine": None if library is None else library.description,
        "version": __version__,
    }
    if kept is not None and kept.exists():
        found = read_json(kept, WorkDirectoryError)
        if found.get("of") == identity:
            return check_schema(found, Gate, WorkDirectoryError, where=str(kept))
    gate = gate_base(base, checkpoint, work)
    if kept is not None and gate.kl_nats is not None:  # what else came out may be for want of memory
        write_json(kept, {**asdict(gate), "of": identity})
    return gate


def gate_base(base: Path, checkpoint: Checkpoint, work: Path) -> Gate:
    """Load an unquantized file in llama.cpp, and compare what it computes with Transformers.

    Args:
        base: The file.
        checkpoint: The model that it was made from.
        work: Directory for a copy of the file in float32, which goes at the end.

    Returns:
        What came out; whoever calls decides what follows (``Gate.require``, ``Gate.notes``).

    Raises:
        FormatError: A file is damaged, or a part is missing.
        WorkDirectoryError: The copy cannot be written.
    """
    header = read_model_header(base)
    library = _library()
    if library is None:
        return Gate(reason=f"llama.cpp is not installed as an engine ({install_command('engine')})")
    try:
        with library.model(base, row_tokens=_ROW_TOKENS, threads=torch.get_num_threads()) as model:
            vocab_size = model.vocab_size
    except (CheckpointError, NumericalError) as error:
        return Gate(reason=str(error), refused=True)
    try:
        blocks = _first_blocks(header, checkpoint)
        source = checkpoint if blocks is None else FirstBlocks(checkpoint, blocks)
        tokens = _tokens(checkpoint, vocab_size)
        expected = transformers_logits(source, tokens)
    except (BpwiseError, MemoryError) as error:
        return Gate(reason=str(error) or "there is not enough memory")
    if not bool(expected.isfinite().all()):
        return Gate(reason="NaN or infinity in Transformers' logits")
    try:
        kl_nats = _kl_nats(header, blocks, tokens, expected, library, work)
    except (CheckpointError, NumericalError) as error:
        return Gate(reason=str(error), refused=blocks is None)
    return _judged(base, checkpoint, kl_nats, tokens.numel(), blocks)


def _library() -> LlamaLibrary | None:
    try:
        return load_library()
    except ConfigError:
        return None


def _first_blocks(header: GgufHeader, checkpoint: Checkpoint) -> int | None:
    # Blocks that are compared, None for the whole model.
    memory = installed_memory()
    most = _MOST_BYTES if memory is None else min(_MOST_BYTES, memory // _MEMORY_SHARE)
    if float32_bytes(header, None) <= min(most, _SMALL_BYTES):
        return None
    count, architecture = block_count(checkpoint), header.metadata["general.architecture"]
    if architecture in _TOLD_BY_BLOCKS:
        raise CheckpointError(
            f"{checkpoint.directory}: too large to be compared whole, and llama.cpp runs a cut {architecture} "
            "otherwise. Compare what was written with bpwise eval --engine llama.cpp."
        )
    contents: list[set[str]] = [set() for _ in range(count)]
    for name in header.tensors:
        block = block_of(name)
        if block is not None and block < count:
            contents[block].add(name.split(".", 2)[2])
    blocks = period(checkpoint, list(map(frozenset, contents)))
    size = float32_bytes(header, blocks)
    if size > most:
        raise CheckpointError(
            f"{checkpoint.directory}: too large to be compared. Got {size / 2**30:.1f} GiB in float32 for as few as "
            f"{blocks} blocks. Expected at most {most / 2**30:.1f} GiB on this machine. Use a larger one to be sure."
        )
    return None if blocks == count else blocks


def _tokens(checkpoint: Checkpoint, vocab_size: int) -> Tensor:
    text = text_config(checkpoint.config)
    known, length = (
        min(most, stated) if isinstance(stated, int) else most
        for most, stated in ((vocab_size, text.get("vocab_size")), (_ROW_TOKENS, text.get("max_position_embeddings")))
    )
    return torch.randint(known, (_ROWS, length), generator=torch.Generator().manual_seed(_SEED))


def _kl_nats(
    header: GgufHeader,
    blocks: int | None,
    tokens: Tensor,
    expected: Tensor,
    library: LlamaLibrary,
    work: Path,
) -> float:
    with private_directory(work / "float32.gguf") as directory:
        file = header.path
        if blocks is not None or not is_float32(header):
            file = directory / "float32.gguf"
            write_float32(header, file, blocks)
        try:
            with library.model(file, row_tokens=_ROW_TOKENS, threads=torch.get_num_threads()) as model:
                rows = zip(expected, tokens, strict=True)
                return sum(_row_nats(logits, model, ids) for logits, ids in rows) / tokens.numel()
        except (CheckpointError, NumericalError) as error:
            raise type(error)(str(error).replace(str(file), f"{header.path} in float32")) from error


def _row_nats(expected: Tensor, model: EngineModel, tokens: Tensor) -> float:
    # Summed over tokens. Either may know tokens beyond those of the other: rows of a table that was rounded up.
    got = torch.cat(list(model.logits(tokens)))
    known = min(expected.shape[-1], got.shape[-1])
    first, second = (each[:, :known].double().log_softmax(-1) for each in (expected, got))
    return float((first.exp() * (first - second)).sum())


def _judged(base: Path, checkpoint: Checkpoint, kl_nats: float, tokens: int, blocks: int | None) -> Gate:
    known = _known_difference(text_config(checkpoint.config))
    most = _OTHER_MODEL_NATS if known is None else _KNOWN_NATS
    reason, refused = "", not kl_nats < most
    if refused:
        reason = (
            f"{base}: llama.cpp runs another model than Transformers. Got {kl_nats:.3g} nats per token between them. "
            f"Expected less than {most}. Try another version of llama.cpp's converter (--llama-cpp)."
        )
    elif not kl_nats < _SAME_NATS:
        reason = known or "why is not known"
    return Gate(kl_nats=kl_nats, tokens=tokens, cut_blocks=blocks, reason=reason, refused=refused)


def _known_difference(config: Mapping[str, Any]) -> str | None:
    rope = stated_rope(config)
    if rope["rope_type"] == "yarn" and rope.get("truncate") is False:
        return "llama.cpp blends YaRN's frequencies between whole dimensions, the model between any (truncate: false)"
    if str(config.get("model_type")).startswith("gemma3n"):
        return (
            "of Gemma 3n llama.cpp estimates the spread of activations otherwise (n - 1 for n), and always shares keys "
            "and values from block 20 on"
        )
    window = config.get("sliding_window")
    if isinstance(window, int) and window < _ROW_TOKENS and require_llama_cpp(config):
        return f"llama.cpp leaves out sliding_window {window}"
    return None
