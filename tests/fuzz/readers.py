"""What reads files that people bring, and small files that each takes as they are: mutants of these are tried on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.cli import cli
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder, rounded_linear
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.file.emit import Planned, entry, header_bytes, padding
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.writer import write_gguf
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.imatrix import imatrix_metadata, read_imatrix
from bpwise.convert.gguf.plan.plan import GgufPlan
from bpwise.convert.opening import open_any, verify_model
from bpwise.convert.publishing.cards import write_card
from bpwise.convert.registry import load_plan, require_format
from bpwise.convert.rounding import RoundedModel
from bpwise.errors import BpwiseError
from bpwise.eval.cache import OriginalCache, OriginalState
from bpwise.eval.metrics.overlap import stored_spans
from bpwise.eval.report.layers import linear_costs
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.curves import CurveMaker
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet, build_calibration
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.checks import output_of
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.rounding.model import RoundConfig, round_model
from bpwise.quantize.run import quantize_model
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..measured import gguf_curves_of
from . import mutations
from .pool import Outcome, run_all

__all__ = ["READERS", "Reader", "build_seeds", "fuzz", "targets_of"]

_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"

_TO_4_5_BPW = QuantizeConfig(target=Target(bpw=4.5), evaluate=None, measure=MeasureConfig(device="cpu"))

MOST_CHARACTERS = 4000
"""Longest message that is still one for people."""


class _Refused(Exception):
    """The command line ended with exit code 1 and a sentence."""


class _Raw(Exception):
    """Something for a terminal holds control characters, or has no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Something that reads files.

    Attributes:
        seeds: Folder of the files that it takes.
        targets: Patterns of the files that are changed, and how.
        read: Reads what lies in a folder that is its own; the second path is that of the changed file in it.
    """

    seeds: str
    targets: dict[str, Callable[[bytes, Random], bytes]]
    read: Callable[[Path, Path], None]


def targets_of(reader: str, seeds: Path) -> list[tuple[Path, Callable[[bytes, Random], bytes]]]:
    """Return the files that a reader's mutants are made of, relative to its folder, and what changes each."""
    folder = seeds / READERS[reader].seeds
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = [(path, how) for pattern, how in READERS[reader].targets.items() for path in files if path.match(pattern)]
    assert found, f"{reader}: nothing in {folder} is to be changed"
    return found


def fuzz(
    reader: str, seeds: Path, scratch: Path, *, mutants: int, seed: int = 0, first: int = 0, workers: int = 1
) -> list[Outcome]:
    """Try mutants on a reader.

    Args:
        reader: A key of ``READERS``.
        seeds: What ``build_seeds`` made.
        scratch: Folder for the mutants.
        mutants: How many.
        seed: The same seed gives the same mutants.
        first: Number of the first mutant.
        workers: Processes at a time.
    """
    tried = READERS[reader]
    folder = seeds / tried.seeds
    targets = targets_of(reader, seeds)

    def run(number: int) -> tuple[str, str]:
        rng = Random(f"{seed}/{reader}/{number}")
        # Every kind of file gets as many mutants, however many files there are of it.
        how = rng.choice(list(tried.targets.values()))
        path = rng.choice([path for path, each in targets if each is how] or [path for path, _ in targets])
        own = scratch / f"{reader}-{number}"
        shutil.copytree(folder, own)
        try:
            (own / path).write_bytes(how((own / path).read_bytes(), rng))
            kind, detail = _read(tried.read, own, path)
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return kind, f"{path}: {detail}"

    return run_all(run, mutants, first=first, workers=workers)


def _read(read: Callable[[Path, Path], None], folder: Path, changed: Path) -> tuple[str, str]:
    try:
        read(folder, changed)
    except _Raw as error:
        return "raw", str(error)
    except (BpwiseError, _Refused) as error:
        message = str(error)
        if not _is_printable(message, lines=isinstance(error, _Refused)):
            return "raw", f"{type(error).__name__}: {message[:200]}"
        return "refused", message.replace(str(folder), "")[:200]
    return "ok", ""


def _is_printable(text: str, *, lines: bool = False) -> bool:
    kept = text.replace("\n", "") if lines else text
    return kept.isprintable() and len(text) <= MOST_CHARACTERS


def _run_cli(*arguments: object) -> None:
    result = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    for line in result.stdout.split("\n"):
        if not line.isprintable() or len(line) > 100 * MOST_CHARACTERS:
            raise _Raw(f"printed {line[:200]!r}")
    if result.exit_code == 1:
        raise _Refused(result.stderr[result.stderr.rfind("Error:") :].rstrip("\n"))
    assert result.exit_code == 0, result.stderr


# The files that are taken


def build_seeds(folder: Path, names: Iterable[str]) -> None:
    """Make what readers of these names take, each in a folder of its own."""
    torch.set_num_threads(1)
    made = {READERS[name].seeds for name in names}
    work = folder / "made"
    model = _save_model(work / "model")
    original = Checkpoint.open(model)
    rows = CalibrationSet(
        tokens=torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1)),
        origins=tuple(f"random: {number}" for number in range(4)),
        description="random ids",
        adds_bos=False,
    )
    builders: dict[str, Callable[[Path], None]] = {
        "tokenizer": lambda to: _tokenizer_seeds(to, model),
        "text": lambda to: _text_seeds(to, model),
        "calibration": lambda to: rows.save(to / "rows.safetensors"),
        "model": lambda to: (_copy(model, to / "model"), rows.save(to / "rows.safetensors"))[0],
        "sharded": lambda to: _shard(model, to / "model"),
        "adapter": lambda to: _adapter_seeds(to, model),
        "cache": lambda to: OriginalCache(to).save("key", _state()),
        "gguf": lambda to: _write_gguf(to / "model.gguf"),
        "imatrix": lambda to: None,
        "plan": lambda to: None,
        "measurement": lambda to: None,
        "exl2": lambda to: None,
        "pieces": lambda to: None,
    }
    for name in sorted(made):
        (folder / name).mkdir(parents=True)
        builders[name](folder / name)
    if made & {"imatrix", "plan", "measurement", "exl2", "pieces"}:
        _quantized_seeds(folder, made, work, original, rows)
    shutil.rmtree(work)


def _state() -> OriginalState:
    hidden = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    return OriginalState(hidden=hidden, trace=hidden[None, :, :2], floor_nats=1e-9, bfloat16_nats=1e-4, floor_tokens=8)


def _quantized_seeds(folder: Path, made: set[str], work: Path, original: Checkpoint, rows: CalibrationSet) -> None:
    config = MeasureConfig(device="cpu")
    measurement = measure_checkpoint(original, rows, config, _makers(original), work / "measuring")
    path = work / "measurement.safetensors"
    measurement.save(path)
    if "measurement" in made:
        _copy(path, folder / "measurement" / path.name)
        _copy(original.directory, folder / "measurement" / "model")
    if "imatrix" in made:
        for suffix in ("gguf", "dat"):
            _run_cli("imatrix", path, "-o", folder / "imatrix" / f"imatrix.{suffix}")
        _write_gguf(folder / "imatrix" / "base.gguf")
    if "plan" in made:
        _run_cli("plan", path, "--bpw", "4.5", "-o", folder / "plan" / "plan.json")
        if GgufCurves.name in measurement.curves:
            _run_cli("plan", path, "--bpw", "8", "--format", "gguf", "-o", folder / "plan" / "types.json")
    if made & {"exl2", "plan"}:
        output = work / "exl2"
        quantize_model(original.directory, output, _TO_4_5_BPW, measurement=path)
        manifest = json.loads((output / "bpwise.json").read_text())
        del manifest["sha256"]  # which files without a checksum of their own lack
        manifest["provenance"]["changes"] = {"adapters": [{"name": "a", "sha256": "0"}]}
        (output / "bpwise.json").write_text(json.dumps(manifest))
        for name in made & {"exl2", "plan"}:
            _copy(output, folder / name / "exl2")
            _copy(original.directory, folder / name / "model")
    if "exl2" in made:
        (folder / "exl2" / "text.txt").write_text(_TEXT, encoding="utf-8")
        _evaluated(folder / "exl2")
    if "pieces" in made:
        _piece_seeds(folder / "pieces", original, rows, config, work)


class _CutOff(Exception):
    """Ends a run in its middle."""


def _piece_seeds(to: Path, original: Checkpoint, rows: CalibrationSet, config: MeasureConfig, work: Path) -> None:
    # A work directory as it is left at every stage of a run.
    _copy(original.directory, to / "model")
    rows.save(to / "rows.safetensors")
    for number, (stage, block) in enumerate((("forward", 1), ("backward", 0), ("backward", 1), ("", 0))):

        def cut(items: Sequence[Any], name: str, stage: str = stage, block: int = block) -> Iterable[Any]:
            for position, item in enumerate(items):
                if stage and stage in name and position == block:
                    raise _CutOff
                yield item

        with suppress(_CutOff):
            measure_checkpoint(original, rows, config, _makers(original), to / f"work-{number}", cut)
    measurement = Measurement.load(work / "measurement.safetensors")
    measurement.save(to / "measurement.safetensors")
    _rounded(original, measurement, to / "work-rounded")


def _makers(original: Checkpoint) -> list[CurveMaker]:
    return [Exl2Curves(), *gguf_curves_of(original.directory)]


def _rounded(original: Checkpoint, measurement: Measurement, work: Path) -> RoundedModel:
    plan = make_exl2_plan(measurement, bpw=4.5, head_bits=6)
    rounder = Exl2Rounder(plan, measurement)
    return round_model(original, measurement, plan, rounder, RoundConfig(device="cpu"), work)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _save_model(directory: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    model.half().save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def _shard(model: Path, to: Path) -> None:
    _copy(model, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, to / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter_seeds(to: Path, model: Path) -> None:
    _copy(model, to / "model")
    adapter = to / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {"mlp.up_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 4},
        "target_modules": ["q_proj", "up_proj"],
        "use_dora": False,
        "use_rslora": False,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    rng = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (32, 4, 32), "mlp.up_proj": (64, 2, 32)}
    tensors = {}
    for name, (rows, rank, columns) in shapes.items():
        prefix = f"base_model.model.model.layers.0.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=rng)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=rng)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def _tokenizer_seeds(to: Path, model: Path) -> None:
    _copy(model, to / "model")
    chat = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _TEXT}]
    (to / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 3)


def _text_seeds(to: Path, model: Path) -> None:
    _tokenizer_seeds(to, model)
    (to / "text.jsonl").write_text((json.dumps({"text": _TEXT, "id": 1}) + "\n") * 3)
    (to / "text.txt").write_text(_TEXT)


def _write_gguf(path: Path) -> None:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 1,
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 8,
        "bpwise.version": "0.1.0",
        "bpwise.calibration": "text",
        "bpwise.calibration_spans": "2:",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(264)],
        "tokenizer.ggml.bos_token_id": 1,
    }
    layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    layer |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "output_norm.weight": (32,)}
    shapes |= {"token_embd.weight": (264, 32), "output.weight": (264, 32)}
    planned = [Planned(name, ggml_type("F16" if len(shape) > 1 else "F32"), shape) for name, shape in shapes.items()]
    rng = np.random.RandomState(0)
    with path.open("wb") as file:
        file.write(header_bytes({key: entry(value) for key, value in metadata.items()}, planned, 32))
        for tensor in planned:
            dtype = np.float16 if tensor.type.name == "F16" else np.float32
            data = (rng.standard_normal(tensor.shape) * 0.2).astype(dtype).tobytes()
            file.write(data + bytes(padding(len(data), 32)))


# What reads them


def _read_plan(folder: Path, changed: Path) -> None:
    for name in ("plan.json", "types.json"):
        path = folder / name
        if path.exists():
            linear_costs(open_any(folder / "exl2"), path)
            plan = load_plan(path)
            plan.save(folder / "again.json")
            _ = (plan.bpw, plan.gap, plan.damage_nats, plan.stored_bytes, plan.shares(), plan.identity())
            if isinstance(plan, Exl2Plan):
                _ = (plan.head_code_bits, [linear.stored_groups for linear in plan.linears])
            if isinstance(plan, GgufPlan):
                _ = plan.kinds
            _run_cli("inspect", path)


def _read_measurement(folder: Path, changed: Path) -> None:
    path = folder / "measurement.safetensors"
    measurement = Measurement.load(path)
    assert measured_rows(measurement).tokens.numel()
    _run_cli("inspect", path)
    _run_cli("plan", path, "--bpw", "4.5", "--head-bits", "auto", "-o", folder / "p.json")
    if GgufCurves.name in measurement.curves:
        _run_cli("plan", path, "--bpw", "8", "--format", "gguf", "-o", folder / "t.json")
        _run_cli("plan", path, "--html", folder / "page.html")
    _run_cli("imatrix", path, "-o", folder / "i.gguf")
    quantize_model(folder / "model", folder / "out", _TO_4_5_BPW, measurement=path)


def _read_pieces(folder: Path, changed: Path) -> None:
    original = Checkpoint.open(folder / "model")
    work = folder / changed.parts[0]
    if work.name == "work-rounded":
        measurement = Measurement.load(folder / "measurement.safetensors")
        rounded = _rounded(original, measurement, work)
        rounded.drift()
        rounded.numbers("damping")
        source = language_model(original)
        for name in rounded.names:
            rounded_linear(rounded, source, name, tuned=False).dequantize()
        return
    rows = CalibrationSet.load(folder / "rows.safetensors")
    measurement = measure_checkpoint(original, rows, MeasureConfig(device="cpu"), _makers(original), work)
    assert measurement.to_bytes() == (folder / "measurement.safetensors").read_bytes(), "damage went through in silence"


def _read_imatrix(folder: Path, changed: Path) -> None:
    matrix = read_imatrix(folder / changed)
    for name in matrix.sums:
        matrix.mean_squares(name)
    base = folder / "base.gguf"
    types = {
        name: ggml_type("Q4_0") for name in read_gguf_header(base).tensors if ".attn_" in name and "norm" not in name
    }
    notes = imatrix_metadata(matrix, str(changed))
    (folder / "out.gguf").unlink(missing_ok=True)
    write_gguf(base, folder / "out.gguf", types, file_type=2, importance=matrix.mean_squares, metadata=notes)
    _run_cli("inspect", folder / "out.gguf")


def _read_exl2(folder: Path, changed: Path) -> None:
    _run_cli("inspect", folder / "exl2")
    _run_cli("verify", folder / "exl2")


def _read_exl2_unverified(folder: Path, changed: Path) -> None:
    # As evaluation does: nothing verifies before.
    model = open_any(folder / "exl2")
    linear_costs(model)
    for name in sorted(model.names):
        model.shape(name)
        model.tensor(name)
    _evaluated(folder)


def _evaluated(folder: Path) -> None:
    _run_cli(
        *("eval", folder / "model", folder / "exl2", "--text", folder / "text.txt"),
        *("-r", "1", "-l", "16", "--device", "cpu", "--no-cache"),
    )


def _read_output(folder: Path, changed: Path) -> None:
    output = folder / "exl2"
    model = open_any(output)
    stored_spans(model)
    verify_model(output)
    _run_cli("push", output, "org/name", "--dry-run")
    write_card(output, original=folder / "model")
    with suppress(BpwiseError):  # that it is another's
        output_of(output, require_format(output), "another")


def _read_checkpoint(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model")
    _ = (model.tied_embeddings, model.total_bytes, model.parameter_count)
    for name in sorted(model.names):
        model.tensor(name)
    _run_cli("inspect", folder / "model")


def _read_adapter(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model", lora=folder / "adapter")
    json.dumps(model.changes)
    for name in sorted(model.names):
        model.tensor(name)


def _read_config(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model")
    _ = (model.tied_embeddings, model.fingerprint)
    _run_cli("inspect", folder / "model")
    _run_cli("quantize", folder / "model", folder / "out", "--bpw", "4.5", "-r", "2", "-l", "32", "--dry-run")


def _read_config_and_run(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model")
    rows = CalibrationSet.load(folder / "rows.safetensors")
    measure_checkpoint(model, rows, MeasureConfig(device="cpu"), [Exl2Curves()], folder / "work")


def _read_tokenizer(folder: Path, changed: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    config = CalibrationConfig(source=str(folder / "chat.jsonl"), chat_template=True, rows=2, row_tokens=32)
    build_calibration(tokenizer, config, vocab_size=264)


def _read_template(folder: Path, changed: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    config = CalibrationConfig(source=str(folder / "chat.jsonl"), chat_template=True, rows=2, row_tokens=32)
    build_calibration(tokenizer, config, vocab_size=264)


def _read_text(folder: Path, changed: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    for name, chat in (("text.txt", False), ("text.jsonl", False), ("chat.jsonl", True)):
        config = CalibrationConfig(source=str(folder / name), chat_template=chat, rows=2, row_tokens=32)
        build_calibration(tokenizer, config, vocab_size=264).save(folder / "rows.safetensors")


def _read_calibration(folder: Path, changed: Path) -> None:
    CalibrationSet.load(folder / "rows.safetensors")
    _run_cli("inspect", folder / "rows.safetensors")


def _read_cache(folder: Path, changed: Path) -> None:
    OriginalCache(folder).load("key")


def _read_gguf(folder: Path, changed: Path) -> None:
    path = folder / "model.gguf"
    _run_cli("inspect", path)
    _run_cli("verify", path)
    model = open_any(path)
    for name in sorted(model.names):
        model.tensor(name)
    stored_spans(model)
    write_card(path)


_JSON, _TENSORS = mutations.mutated_json, mutations.mutated_safetensors

READERS: dict[str, Reader] = {
    "plan": Reader(seeds="plan", targets={"plan.json": _JSON, "types.json": _JSON}, read=_read_plan),
    "measurement": Reader(seeds="measurement", targets={"measurement.safetensors": _TENSORS}, read=_read_measurement),
    "pieces": Reader(seeds="pieces", targets={"work-*/*/*.safetensors": _TENSORS}, read=_read_pieces),
    "imatrix": Reader(
        seeds="imatrix",
        targets={"imatrix.gguf": mutations.mutated_gguf, "imatrix.dat": mutations.mutated_bytes},
        read=_read_imatrix,
    ),
    "exl2": Reader(
        seeds="exl2",
        targets={"exl2/config.json": _JSON, "exl2/bpwise.json": _JSON, "exl2/output.safetensors": _TENSORS},
        read=_read_exl2,
    ),
    "exl2-eval": Reader(
        seeds="exl2",
        targets={"exl2/config.json": _JSON, "exl2/bpwise.json": _JSON, "exl2/output.safetensors": _TENSORS},
        read=_read_exl2_unverified,
    ),
    "provenance": Reader(
        seeds="exl2",
        targets={
            "exl2/bpwise.json": _JSON,
            "exl2/report.json": _JSON,
            "exl2/config.json": _JSON,
            "exl2/README.md": mutations.mutated_text,
        },
        read=_read_output,
    ),
    "index": Reader(
        seeds="sharded",
        targets={"model.safetensors.index.json": _JSON, "model-*.safetensors": _TENSORS},
        read=_read_checkpoint,
    ),
    "adapter": Reader(
        seeds="adapter",
        targets={"adapter_config.json": _JSON, "adapter_model.safetensors": _TENSORS},
        read=_read_adapter,
    ),
    "config": Reader(seeds="model", targets={"config.json": _JSON}, read=_read_config),
    "config-run": Reader(seeds="model", targets={"config.json": _JSON}, read=_read_config_and_run),
    "tokenizer": Reader(
        seeds="tokenizer", targets={"tokenizer.json": _JSON, "tokenizer_config.json": _JSON}, read=_read_tokenizer
    ),
    "template": Reader(seeds="tokenizer", targets={"chat_template.jinja": mutations.mutated_text}, read=_read_template),
    "text": Reader(
        seeds="text",
        targets={"*.jsonl": mutations.mutated_json_lines, "text.txt": mutations.mutated_text},
        read=_read_text,
    ),
    "cache": Reader(seeds="cache", targets={"*.original.safetensors": _TENSORS}, read=_read_cache),
    "calibration": Reader(seeds="calibration", targets={"rows.safetensors": _TENSORS}, read=_read_calibration),
    "gguf": Reader(seeds="gguf", targets={"model.gguf": mutations.mutated_gguf}, read=_read_gguf),
}
"""All of them, by name."""
