"""What can be refused before long work, from config, headers, options and disk: one function for each kind of output.

They are called wherever a run begins: by the runs themselves, by series before the first output, and by ``--dry-run``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files.atomic import explained, require_room
from ..checkpoint.model.families import EMBEDDING
from ..checkpoint.model.names import text_config
from ..checkpoint.source.checkpoint import FLOAT_DTYPES, Checkpoint
from ..checkpoint.source.language import Exl2Names, language_model
from ..checkpoint.source.linears import Linear, model_linears
from ..convert.exl2.file.vision import require_side_files
from ..convert.exl2.file.writer import require_writable
from ..convert.exl2.readers import require_reader
from ..convert.gguf.file.names import gguf_name, known_model_types
from ..convert.gguf.ggml.curves import measured_types
from ..convert.gguf.ggml.kernels import require_kernels
from ..convert.gguf.ggml.types import TYPES
from ..convert.gguf.llama_cpp.assign import require_importance
from ..convert.gguf.llama_cpp.converter import find_converter
from ..convert.gguf.llama_cpp.imatrix import ImportanceMatrix, require_fitting
from ..convert.gguf.llama_cpp.mixtures import Mixture
from ..convert.gguf.llama_cpp.readers import require_llama_cpp
from ..convert.gguf.plan import require_type_plan
from ..convert.publishing.base_card import read_base_card
from ..convert.vram import room_for_weights
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..eval.config import EvalConfig
from ..measure.measurement import Measurement
from ..measure.run import MeasureConfig, require_measurable, resolve_device
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import CALIBRATION, check_rows, context_tokens, fit_row_tokens
from .forecast import Forecast
from .options import GgufConfig, QuantizeConfig

__all__ = [
    "exists",
    "largest_file_bytes",
    "require_exl2",
    "require_gguf",
    "require_gguf_tools",
    "require_mixture",
    "require_types",
]


def exists(output: Path) -> bool:
    """Return whether an output is there; an empty directory is still to be filled.

    Raises:
        WorkDirectoryError: It cannot be looked at.
    """
    with explained(output):
        return any(output.iterdir()) if output.is_dir() else output.exists()


def require_exl2(
    checkpoint: Checkpoint,
    outputs: Mapping[Path, QuantizeConfig],
    *,
    measured: Measurement | None = None,
    rows: CalibrationSet | None = None,
) -> dict[Path, Forecast]:
    """Refuse what cannot be quantized to EXL2.

    Reads headers and what is carried over: embeddings, norms, biases, parts beside the language model, side files. All
    of this is done once, however many outputs there are.

    Args:
        checkpoint: The original.
        outputs: Options of each directory to make, at least one; they may differ in their targets only.
        measured: A measurement to work from; None if there is none yet.
        rows: Calibration rows that are given; None if they are to be made.

    Returns:
        What the run will take for each output.

    Raises:
        BpwiseError: Whatever is wrong with the model, the options or the places of the outputs.
    """
    config = next(iter(outputs.values()))
    if not config.force:
        require_reader(checkpoint.config)
    _require_run(checkpoint, config.measure, config.evaluate, measured, rows)
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} cannot be carried over, got {str(info.dtype).removeprefix('torch.')}, "
                "expected float16, bfloat16 or float32. If it is not a weight (a mask, positions), load the model in "
                "Transformers and save it again: save_pretrained leaves it out."
            )
    forecasts = {output: each.known(measured, rows).forecast(checkpoint) for output, each in outputs.items()}
    written = Exl2Names(language_model(checkpoint))
    # Which linears are quantized does not depend on the target.
    require_writable(written, {written.prefix + name for name in forecasts[next(iter(outputs))].quantized})
    read_base_card(checkpoint.directory)
    require_side_files(checkpoint.directory)
    _require_room_for({output: forecast.output_bytes for output, forecast in forecasts.items() if not exists(output)})
    return forecasts


def require_gguf_tools(checkpoint: Checkpoint, config: GgufConfig, *, base: Path | None = None) -> None:
    """Refuse a model that GGUF files are not planned for, or what is not installed: it costs no time to look.

    Args:
        checkpoint: The original.
        config: Options.
        base: The model as an unquantized GGUF file; None if it is to be converted.

    Raises:
        BpwiseError: ggml's library or llama.cpp's converter is not installed.
        UnsupportedModelError: The family is unknown, or llama.cpp would compute another model.
    """
    require_llama_cpp(checkpoint.config)
    _require_known(
        checkpoint.config,
        "Give one of llama.cpp's mixtures with --type and --no-eval instead of a size.",
    )
    require_kernels()
    if base is None:
        find_converter(config.llama_cpp)


def require_gguf(
    checkpoint: Checkpoint,
    outputs: Mapping[Path, GgufConfig],
    *,
    base: Path | None,
    measured: Measurement | None = None,
    rows: CalibrationSet | None = None,
) -> None:
    """Refuse what cannot be planned and quantized to GGUF, before it is converted.

    Args:
        checkpoint: The original.
        outputs: Options of each file to make, at least one; they may differ in their targets only.
        base: About where the model will be converted to; None if it is converted already.
        measured: A measurement to work from; None if there is none yet.
        rows: Calibration rows that are given; None if they are to be made.

    Raises:
        BpwiseError: Whatever is wrong with the model, the options or the places of the outputs.
    """
    config = next(iter(outputs.values()))
    _require_run(checkpoint, config.measure, config.evaluate, measured, rows)
    sizes = {
        output: require_types(checkpoint, each, measured, largest_file_bytes(checkpoint, each))
        for output, each in outputs.items()
    }
    made = {output: size for output, size in sizes.items() if not exists(output)}
    _require_room_for(made if base is None else {**made, base: checkpoint.total_bytes})


def require_types(
    checkpoint: Checkpoint, config: GgufConfig, measured: Measurement | None, tensor_bytes: int | None
) -> int:
    """Refuse a size or overrides that no plan of a model's tensors can meet.

    Args:
        checkpoint: The original.
        config: Options.
        measured: Says which types are known; None for those that measuring will make known.
        tensor_bytes: Most bytes that tensors may take; None where bits per weight are asked for.

    Returns:
        About the bytes that tensors will take.

    Raises:
        BudgetError: The size is too small.
        ConfigError: No types are measured, or an override matches nothing or does not fit.
    """
    types = [kind.name for kind in measured_types()] if config.measure.types else []
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    tensors = [*linears, *([] if source.tied_embeddings else [head])]
    planned = {f"{linear.name}.weight" for linear in (*linears, head)} | {EMBEDDING}
    return require_type_plan(
        tensors,
        Linear(EMBEDDING.removesuffix(".weight"), head.in_features, head.out_features),
        sum(math.prod(source.shape(name)) for name in source.names - planned),
        types if measured is None else measured.types,
        bpw=config.bpw,
        tensor_bytes=tensor_bytes,
        overrides=config.overrides,
    )


def largest_file_bytes(checkpoint: Checkpoint, config: GgufConfig) -> int | None:
    """Return how large a GGUF file may be; None where bits per weight are asked for.

    Raises:
        BudgetError: The memory of the GPU leaves nothing for weights.
        ConfigError: The length of the context is neither given nor in config.json.
    """
    if config.vram_bytes is None:
        return config.max_bytes
    source = language_model(checkpoint)
    context = config.context_tokens or context_tokens(source)
    if context is None:
        raise ConfigError("config.json: max_position_embeddings is missing. Give the length of the context: --context.")
    return room_for_weights(config.vram_bytes, source.config, context)


def require_mixture(
    checkpoint: Checkpoint, chosen: Mixture, matrix: ImportanceMatrix | None, *, evaluated: bool
) -> None:
    """Refuse what cannot be converted to one of llama.cpp's mixtures, as far as it is known before it is converted.

    Args:
        checkpoint: The original.
        chosen: The mixture.
        matrix: Importances of the inputs; None if there are none.
        evaluated: Whether the file shall be compared with the original.

    Raises:
        BpwiseError: ggml's library is not installed.
        ConfigError: The mixture needs importances, or they are those of another model.
        UnsupportedModelError: The file could not be read back to be compared.
    """
    if TYPES[chosen.default].quantized:
        require_kernels()
    if evaluated:
        _require_known(text_config(checkpoint.config), "Leave the comparison out with --no-eval.")
        require_measurable(checkpoint)
    if checkpoint.config.get("model_type") not in known_model_types():
        return  # whether llama.cpp's converter knows it shows soon
    source = language_model(checkpoint)
    if matrix is None:
        require_importance(chosen, source.shape("model.layers.0.self_attn.q_proj.weight")[-1])
    else:
        require_fitting(matrix, {gguf_name(name) or name: source.shape(name) for name in source.names})


def _require_room_for(sizes: Mapping[Path, int]) -> None:
    # What is made on one disk must fit there together.
    disks: dict[int, dict[Path, int]] = {}
    for path, size in sizes.items():
        place = path / "*" if path.is_dir() else path
        with explained(path):
            existing = next(each for each in place.absolute().parents if each.exists())
            disks.setdefault(existing.stat().st_dev, {})[place] = size
    for made in disks.values():
        together = Path(os.path.commonpath([path.absolute().parent for path in made])) / "*"
        require_room(next(iter(made)) if len(made) == 1 else together, sum(made.values()))


def _require_known(config: Mapping[str, Any], hint: str) -> None:
    model_type = config.get("model_type")
    if model_type not in known_model_types():
        raise UnsupportedModelError(
            f"config.json: GGUF files of model_type {model_type!r} cannot be planned or read back, expected one of "
            f"{', '.join(known_model_types())}. {hint}"
        )


def _require_run(
    checkpoint: Checkpoint,
    measure: MeasureConfig,
    evaluate: EvalConfig | None,
    measured: Measurement | None,
    rows: CalibrationSet | None,
) -> None:
    # What does not depend on the format.
    require_measurable(checkpoint)
    if measured is not None and rows is not None:
        raise ConfigError("a measurement brings its own calibration rows, got others too. Leave one of the two out.")
    for device in {measure.device, *([] if evaluate is None else [evaluate.device])}:
        resolve_device(device)
    if evaluate is not None:
        evaluate.fitted(checkpoint)
    if rows is not None:
        check_rows(checkpoint, rows, CALIBRATION)
    elif measured is None:
        fit_row_tokens(measure.calibration.row_tokens, checkpoint, CALIBRATION)
