"""A model run over windows by whatever can run it: logits of the positions that llama-perplexity counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import TensorSource
from ...convert.model import QuantizedModel
from ...convert.opening import open_any
from ...convert.registry import load_library
from ...errors import ConfigError
from ...linalg.products import float32_products
from ...measure.device import resolve_device
from ...measure.model.batches import TAIL_TOKENS, check_finite
from ...measure.model.stream import StreamedModel
from ...measure.text.context import context_tokens
from ...measure.text.tokenizer import LoadedTokenizer, load_tokenizer
from ...progress import Progress
from ..engines.engine import ENGINE, open_for_engine
from ..metrics.divergence import PIECE_ELEMENTS
from ..metrics.passes import last_hidden
from ..models import model_name, vocab_size_of
from .base_file import counted
from .windows import model_input

__all__ = ["PerplexityModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityModel:
    """A model, its tokenizer, and what runs it.

    Attributes:
        source: The model.
        tokenizer: Its own, or its original's.
        in_engine: Whether llama.cpp runs it, not Transformers.
        llama_cpp: A built llama.cpp; None for the one in the ``xllamacpp`` wheel.
        device: What Transformers runs it on, as ``EvalConfig.device``.
        offload_dir: Directory for files with the hidden states of all windows; None keeps them in memory.
    """

    source: TensorSource
    tokenizer: LoadedTokenizer
    in_engine: bool = False
    llama_cpp: Path | None = None
    device: str = "auto"
    offload_dir: Path | None = None

    @classmethod
    def open(
        cls,
        model: Path,
        *,
        original: Path | None = None,
        in_engine: bool = False,
        llama_cpp: Path | None = None,
        device: str = "auto",
        offload_dir: Path | None = None,
    ) -> PerplexityModel:
        """Open a model of any format.

        Args:
            model: Its directory or file.
            original: Its original's directory, which a model in one file needs for the tokenizer.
            in_engine: As the attribute.
            llama_cpp: As the attribute.
            device: As the attribute.
            offload_dir: As the attribute.

        Raises:
            BpwiseError: As ``open_any`` and ``load_tokenizer``.
            ConfigError: A model in one file comes without its original, or llama.cpp does not run the model.
        """
        source = open_for_engine(model) if in_engine else open_any(model)
        if isinstance(source, QuantizedModel):
            if in_engine and ENGINE not in source.engines:
                raise ConfigError(f"{model}: not a model that {ENGINE} runs. Leave --engine out.")
            if original is None and not source.path.is_dir():
                raise ConfigError(f"{model}: its tokenizer is that of its original. Name that with --original.")
            if original is not None and not in_engine:
                source = source.beside(open_any(original))
        elif in_engine:
            raise ConfigError(f"{model}: not a model that {ENGINE} runs. Leave --engine out, or convert it first.")
        return cls(
            source=source,
            tokenizer=load_tokenizer(original or source.directory),
            in_engine=in_engine,
            llama_cpp=llama_cpp,
            device=device,
            offload_dir=offload_dir,
        )

    @property
    def name(self) -> str:
        """Name of its file or directory."""
        return model_name(self.source)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of its vocabulary."""
        return vocab_size_of(self.source)

    def require_context(self, window_tokens: int) -> None:
        """Refuse windows that are longer than the model's context.

        Raises:
            ConfigError: They are.
        """
        context = context_tokens(self.source)
        if context is not None and window_tokens > context:
            raise ConfigError(
                f"{self.name}: has positions for {context} tokens. Got windows of {window_tokens}. Lower --ctx-size, "
                "and make a base file anew."
            )

    def predictions(self, tokens: Tensor, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
        """Run windows from their first token, each on its own.

        Args:
            tokens: Windows as the text has them, int64, shape (windows, window tokens).
            progress: Wraps the blocks, and the windows.

        Yields:
            Logits of positions that count, in their order, float32, shape (positions, vocabulary), on the CPU; and the
            ids of the tokens behind them, int64, shape (positions,).

        Raises:
            BpwiseError: As ``StreamedModel`` and ``LlamaLibrary.model``.
            NumericalError: NaN or infinity in hidden states or logits.
        """
        inputs = model_input(tokens, self.tokenizer.bos_token_id)
        targets = tokens[:, counted(tokens.shape[1]).start + 1 :].flatten()
        run, done = self._in_engine if self.in_engine else self._in_transformers, 0
        for logits in run(inputs, progress):
            for piece in logits.split(max(1, PIECE_ELEMENTS // logits.shape[1])):
                yield piece, targets[done : done + len(piece)]
                done += len(piece)

    def _in_transformers(self, inputs: Tensor, progress: Progress) -> Iterator[Tensor]:
        model = StreamedModel(
            self.source, device=resolve_device(self.device), dtype=torch.float32, offload_dir=self.offload_dir
        )
        with float32_products(model.device), torch.no_grad():
            hidden = last_hidden(model, inputs, self.name, progress)[:, counted(inputs.shape[1])]
            with model.tail():
                for window in progress(range(len(hidden)), "perplexity: logits"):
                    for piece in hidden[window].split(TAIL_TOKENS):
                        logits = model.logits(piece[None].to(model.device))[0]
                        check_finite(logits, self.name, "logits")
                        yield logits.float().cpu()

    def _in_engine(self, inputs: Tensor, progress: Progress) -> Iterator[Tensor]:
        wanted, threads = counted(inputs.shape[1]), torch.get_num_threads()
        library = load_library(self.llama_cpp)
        with library.model(self._file, row_tokens=inputs.shape[1], threads=threads) as model:
            for window in progress(range(len(inputs)), f"perplexity: {ENGINE}"):
                position = 0
                for logits in model.logits(inputs[window]):
                    found = logits[max(0, wanted.start - position) : max(0, wanted.stop - position)]
                    position += len(logits)
                    if len(found):
                        yield found

    @property
    def _file(self) -> Path:
        assert isinstance(self.source, QuantizedModel)
        return self.source.path
