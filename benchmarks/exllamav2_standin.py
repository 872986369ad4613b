"""What ExLlamaV2 needs of CUDA, in PyTorch on the CPU, and the process that runs its converter on it.

    python benchmarks/exllamav2_standin.py PACKAGE_PARENT SEED [ARGUMENTS OF ExLlamaV2's CONVERTER ...]

ExLlamaV2 comes with a compiled extension that takes an NVIDIA card to build and to run. :class:`Extension` has the
functions of it that converting (``exllamav2_rounding.py``) and running (``exllamav2_forward.py``) call. All else that
runs is ExLlamaV2's own Python, unchanged, from the directory that holds the package. Stand-ins are put where other code
would trip over them: in a process of its own, which ``exllamav2_peer.py`` starts, or after all else is imported, as in
``exllamav2_reads.py``.

Without flash-attn, ExLlamaV2's measuring and converting lack a causal mask. A stand-in for flash-attn has them take
the path that they take on a card.
"""

from __future__ import annotations

import importlib
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from exllamav2_forward import ReaderFunctions
from exllamav2_rounding import ConverterFunctions
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["CpuForCuda", "Extension", "causal_attention", "install", "main", "spread_rows"]
# Not installed everywhere, and needed by nothing that is called here: data frames, progress bars, images, servers.
_OPTIONAL_MODULES = (
    "pandas",
    "fastparquet",
    "rich",
    "rich.progress",
    "PIL",
    "PIL.Image",
    "websockets",
    "pygments",
    "ninja",
)


class Extension(ConverterFunctions, ReaderFunctions, ModuleType):
    """Stands for the module ``exllamav2_ext``."""

    def __init__(self, seed: int) -> None:
        """Start without matrices.

        Args:
            seed: Seed of the annealer.
        """
        ModuleType.__init__(self, "exllamav2_ext")
        ConverterFunctions.__init__(self, seed)
        ReaderFunctions.__init__(self)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """Stand for ``flash_attn_func``, computed in float32.

    Args:
        query: Float16, shape (batch, tokens, heads, features).
        key: Shape (batch, tokens, key heads, features).
        value: Shape of ``key``.
        causal: Whether tokens see only themselves and those before.
        softmax_scale: Factor of the scores; None for one over the root of the features.

    Returns:
        Shape and dtype of ``query``.
    """
    groups = query.shape[2] // key.shape[2]
    heads = [part.float().transpose(1, 2) for part in (query, key, value)]
    heads[1:] = [part.repeat_interleave(groups, dim=1) for part in heads[1:]]
    output = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=causal, scale=softmax_scale)
    return output.transpose(1, 2).to(query.dtype)


class CpuForCuda(TorchFunctionMode):
    """Reads every CUDA device as the CPU, and multiplies float16 matrices in float32.

    Moving a tensor to a CUDA device makes a copy even so: ExLlamaV2 goes on to change what it moved and expects the
    original to stay. CPUs without float16 arithmetic are over a hundred times slower at float16 products; results
    are rounded to float16, as a card does that adds up in float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with other arguments where a device or the dtype asks for it."""
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS and args[0].dtype == args[1].dtype == torch.half and not kwargs:
            return _PRODUCTS[func](*(arg.float() for arg in args)).half()
        if func is torch.device:
            # A bare number means an accelerator, and there is none to ask for.
            return torch.device(f"cuda:{args[0]}") if isinstance(args[0], int) else torch.device(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0].clone()
        if func is Tensor.to and any(map(_is_cuda, [*args[1:], kwargs.get("device")])):
            args = [args[0], *("cpu" if _is_cuda(arg) else arg for arg in args[1:])]
            kwargs["copy"] = True
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.matmul: torch.matmul,
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Absent(ModuleType):
    # A module that is not installed: whatever is imported from it is an empty class.
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def spread_rows(tokens: Tensor, rows: int) -> Tensor:
    """Return some of the rows, evenly spread from the first to the last, so that all kinds of text are in them."""
    return tokens[torch.linspace(0, len(tokens) - 1, rows).round().long()]


def install(package_parent: Path, seed: int) -> None:
    """Put the stand-ins in place and import what the converter is made of.

    Args:
        package_parent: The directory that holds the package.
        seed: Seed of the annealer.
    """
    for name in _OPTIONAL_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _Absent(name)
    flash_attn = ModuleType("flash_attn")
    vars(flash_attn).update(
        __version__="2.7.4",
        flash_attn_func=causal_attention,
        flash_attn_varlen_func=None,
        flash_attn_with_kvcache=None,
    )
    sys.modules["flash_attn"] = flash_attn
    sys.modules["flash_attn_2_cuda"] = ModuleType("flash_attn_2_cuda")
    sys.modules["exllamav2_ext"] = Extension(seed)

    for name in ("Stream", "device", "set_device", "set_stream", "stream", "synchronize", "empty_cache"):
        # One function for each: PyTorch keeps a table of its functions, and none may stand in it twice.
        setattr(torch.cuda, name, lambda *_arguments, **_options: nullcontext())
    sys.path.insert(0, str(package_parent))
    threads = torch.get_num_threads()
    tokenize: Any = importlib.import_module("exllamav2.conversion.tokenize")
    importlib.import_module("exllamav2.conversion.measure")
    # Importing these limits PyTorch to one thread, and has Ctrl-C ask a question.
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenize.get_tokens = _calibration_rows


def _calibration_rows(rows: int, row_tokens: int, path: str, _tokenizer: Any) -> Tensor:
    # Stands for the function that cuts rows of a Parquet file's text.
    tokens = load_file(path)["input_ids"]
    if rows > len(tokens) or row_tokens != tokens.shape[1]:
        raise ValueError(f"{path}: holds {tuple(tokens.shape)} tokens, asked for {rows} rows of {row_tokens}")
    return spread_rows(tokens, rows)


def main(arguments: Sequence[str]) -> None:
    """Run ExLlamaV2's converter.

    Args:
        arguments: The directory that holds the package, a seed, and the converter's own options.
    """
    package_parent, seed, *options = arguments
    install(Path(package_parent), int(seed))
    sys.argv = ["convert_exl2", *options]
    with CpuForCuda():
        runpy.run_module("exllamav2.conversion.convert_exl2", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
