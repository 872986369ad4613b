"""Small files of every kind that bpwise reads, each as it should be: mutants are made of these."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from bpwise.checkpoint.files.digests import file_digests
from bpwise.checkpoint.files.shards import tensor_sha256
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.gguf.rows.text import map_to_text
from bpwise.convert.mlx.file.layout import Layout, StoredTensor
from bpwise.convert.mlx.file.model import MlxModel
from bpwise.convert.mlx.plan.plan import MlxPlan, TensorPlan
from bpwise.convert.rounding import RoundedModel
from bpwise.errors import FormatError
from bpwise.eval.cache import OriginalCache, OriginalState
from bpwise.eval.llama_perplexity.base_file import writing_base
from bpwise.eval.publishing.mark import MARK_NAME
from bpwise.measure.curves import CurveMaker
from bpwise.measure.measurement import Measurement
from bpwise.measure.measurement_file import HEADER_KEY
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.rounding.model import RoundConfig, round_model
from bpwise.quantize.run import quantize_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..measured import gguf_curves_of
from ..quantize.runs import arguments
from .forms import save_adapters, save_configs, save_listing, save_tokenizers, write_ggufs
from .hub import answers_of, data_set_answers_of
from .running import run_cli

__all__ = ["TO_4_5_BPW", "build_seeds", "curve_makers", "evaluated", "rounded_model"]

_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"

TO_4_5_BPW = QuantizeConfig(target=Target(bpw=4.5), evaluate=None, measure=MeasureConfig(device="cpu"))


def build_seeds(folder: Path, names: Iterable[str]) -> None:
    """Make sets of files by name, each in a folder of its own."""
    torch.set_num_threads(1)
    made = set(names)
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
        "calibration": lambda to: _unsigned_set(rows, to / "rows.safetensors"),
        "model": lambda to: (_copy(model, to / "model"), rows.save(to / "rows.safetensors"))[0],
        "configs": lambda to: (
            _copy(model, to / "llama"),
            save_configs(to, PreTrainedTokenizerFast.from_pretrained(model)),
        )[0],
        "listing": lambda to: save_listing(to, model),
        "sharded": lambda to: _shard(model, to / "model"),
        "adapter": lambda to: (_copy(model, to / "model"), save_adapters(to))[0],
        "cache": lambda to: OriginalCache(to).save("key", _state()),
        "logits": lambda to: _base_file(to / "base.kld"),
        "float8": _float8,
        "mxfp4": lambda to: _mxfp4(to / "model"),
        "card": lambda to: _copy(model, to / "model"),
        "hub": lambda to: _hub_seeds(to, model),
        "data-set": _data_set_seeds,
        "tables": lambda to: _table_seeds(to, model),
        "processor": lambda to: _write_processor(to / "processor_config.json"),
        "rowmap": lambda to: _row_map(to / "rows.json"),
        "gguf": write_ggufs,
        "mlx": _mlx_seeds,
        "imatrix": lambda to: None,
        "plan": lambda to: None,
        "measurement": lambda to: None,
        "exl2": lambda to: None,
        "exl2-foreign": lambda to: None,
        "pieces": lambda to: None,
    }
    for name in sorted(made):
        (folder / name).mkdir(parents=True)
        builders[name](folder / name)
    if made & {"imatrix", "plan", "measurement", "exl2", "exl2-foreign", "pieces"}:
        _quantized_seeds(folder, made, work, original, rows)
    shutil.rmtree(work)


def _base_file(path: Path) -> None:
    rng = torch.Generator().manual_seed(3)
    with writing_base(path, torch.randint(0, 33, (2, 16), generator=rng), 33) as add:
        add(4 * torch.randn(14, 33, generator=rng))


def _state() -> OriginalState:
    hidden = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    return OriginalState(hidden=hidden, trace=hidden[None, :, :2], floor_nats=1e-9, bfloat16_nats=1e-4, floor_tokens=8)


def _quantized_seeds(folder: Path, made: set[str], work: Path, original: Checkpoint, rows: CalibrationSet) -> None:
    config = MeasureConfig(device="cpu")
    measurement = measure_checkpoint(original, rows, config, curve_makers(original), work / "measuring")
    path = work / "measurement.safetensors"
    measurement.save(path)
    if "measurement" in made:
        _copy(path, folder / "measurement" / path.name)
        _edit_metadata(folder / "measurement" / path.name, _without_header_checksum)
        _copy(original.directory, folder / "measurement" / "model")
    if "imatrix" in made:
        for suffix in ("gguf", "dat"):
            run_cli("imatrix", path, "-o", folder / "imatrix" / f"imatrix.{suffix}")
        write_ggufs(folder / "made-ggufs")
        _copy(folder / "made-ggufs" / "model.gguf", folder / "imatrix" / "base.gguf")
        shutil.rmtree(folder / "made-ggufs")
    if "plan" in made:
        run_cli("plan", path, "--bpw", "4.5", "-o", folder / "plan" / "plan.json")
        if GgufCurves.name in measurement.curves:
            run_cli("plan", path, "--bpw", "8", "--format", "gguf", "-o", folder / "plan" / "types.json")
        _mlx_plan().save(folder / "plan" / "schemes.json")
        for plan in (folder / "plan").glob("*.json"):
            entries = json.loads(plan.read_bytes())
            del entries["sha256"]
            plan.write_text(json.dumps(entries))
    if made & {"exl2", "exl2-foreign", "plan"}:
        output = work / "exl2"
        quantize_model(original.directory, output, **arguments(TO_4_5_BPW), measurement=path)
        manifest = json.loads((output / "bpwise.json").read_text())
        del manifest["sha256"]  # which files without a checksum of their own lack
        manifest["provenance"]["changes"] = {"adapters": [{"name": "a", "sha256": "0"}]}
        (output / "bpwise.json").write_text(json.dumps(manifest))
        for name in made & {"exl2", "exl2-foreign", "plan"}:
            _copy(output, folder / name / "exl2")
            _copy(original.directory, folder / name / "model")
    if "exl2" in made:
        (folder / "exl2" / "text.txt").write_text(_TEXT, encoding="utf-8")
        evaluated(folder / "exl2")
    if "exl2-foreign" in made:  # as other programs make them: nothing says what tensors must decode to
        (folder / "exl2-foreign" / "exl2" / "bpwise.json").unlink()
        (folder / "exl2-foreign" / "exl2" / MARK_NAME).write_text("# Broken\n\nSaid so.\n")
    if "pieces" in made:
        _piece_seeds(folder / "pieces", original, rows, config, work)


def _mlx_seeds(to: Path) -> None:
    # As others write it, and as bpwise does, with experts in a stack.
    rng = torch.Generator().manual_seed(3)
    tensors = {"model.norm.weight": torch.ones(32).bfloat16()}
    for module, shape in (("model.embed_tokens", (16,)), ("model.layers.0.mlp.switch", (2, 8))):
        words = torch.randint(0, 99, (*shape, 4), generator=rng, dtype=torch.int32)
        tensors[f"{module}.weight"] = words.view(torch.uint32)
        for part in ("scales", "biases"):
            tensors[f"{module}.{part}"] = torch.randn(*shape, 1, generator=rng).bfloat16()
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    own = {"model.embed_tokens": settings, "model.layers.0.mlp.switch": settings}
    config = {"model_type": "llama", "vocab_size": 16, "quantization": {**settings, **own}}
    layout = {
        "model.embed_tokens.weight": StoredTensor(shape=(16, 32), dtype="bfloat16", linears=("embed",), outputs=(16,)),
        "model.layers.0.mlp.switch.weight": StoredTensor(
            shape=(2, 8, 32), dtype="bfloat16", linears=("e.0", "e.1"), outputs=(8, 8)
        ),
        "model.norm.weight": StoredTensor(shape=(32,), dtype="bfloat16", source="model.norm.weight"),
    }
    record = {
        "manifest_version": 1,
        "provenance": {"bpwise": "0", "run": "r", "predicted_damage_nats": 0.1, "warnings": ["w"]},
        "layout": Layout(tensors=layout).to_json(),
        "digests": {},
    }
    for folder in (to / "theirs", to / "ours"):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config))
    read = MlxModel.open(to / "theirs")
    record["digests"] = {name: tensor_sha256(read.decoded(name)) for name in layout}
    file = to / "ours" / "model.safetensors"
    record["files"] = dict(zip([file.name], file_digests([file], FormatError), strict=True))
    (to / "ours" / "bpwise.json").write_text(json.dumps(record))


def _mlx_plan() -> MlxPlan:
    own = TensorPlan(name="a.weight", shape=(16, 64), dtype="bfloat16", linears=("a",), scheme="4g64", damage_nats=0.1)
    return MlxPlan(
        tensors=(own,), other_weights=1, other_bytes=2, target_bytes=999, lower_bound_nats=0.1, measurement="m"
    )


# Files without a checksum of their own are read, too: of one with it nearly all mutants would stop there.


def _unsigned_set(rows: CalibrationSet, path: Path) -> None:
    rows.save(path)
    _edit_metadata(path, lambda metadata: metadata.pop("sha256"))


def _without_header_checksum(metadata: dict[str, str]) -> None:
    header = json.loads(metadata[HEADER_KEY])
    del header["sha256"]
    metadata[HEADER_KEY] = json.dumps(header)


def _edit_metadata(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    image = path.read_bytes()
    (size,) = struct.unpack("<Q", image[:8])
    header = json.loads(image[8 : 8 + size])
    edit(header["__metadata__"])
    raw = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + image[8 + size :])


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
            measure_checkpoint(original, rows, config, curve_makers(original), to / f"work-{number}", cut)
    measurement = Measurement.load(work / "measurement.safetensors")
    measurement.save(to / "measurement.safetensors")
    rounded_model(original, measurement, to / "work-rounded")


def curve_makers(original: Checkpoint) -> list[CurveMaker]:
    """Return what measures the curves of all formats."""
    return [Exl2Curves(), *gguf_curves_of(original.directory)]


def rounded_model(original: Checkpoint, measurement: Measurement, work: Path) -> RoundedModel:
    """Round a model to EXL2, with what is finished in a work directory."""
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
    (directory / "README.md").write_text(_CARD)
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


def _tokenizer_seeds(to: Path, model: Path) -> None:
    _copy(model, to / "model")
    save_tokenizers(to, model)
    (to / "model" / "added_tokens.json").write_text(json.dumps({"<bos>": 256, "<more>": 300}))
    chat = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _TEXT}]
    rows: tuple[dict[str, Any], ...] = (
        {"messages": chat},
        {"conversations": [{"from": "human", "value": _TEXT}, {"from": "gpt", "value": _TEXT}], "system": "Be brief."},
        {"prompt": _TEXT, "completion": _TEXT},
        {"instruction": _TEXT, "input": "a", "output": _TEXT},
        {"messages": json.dumps(chat)},
        {"messages": {"role": ["user", "assistant"], "content": [_TEXT, _TEXT]}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": _TEXT}]}, chat[1]]},
        {"messages": [chat[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
    )
    (to / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text_seeds(to: Path, model: Path) -> None:
    _tokenizer_seeds(to, model)
    (to / "text.jsonl").write_text((json.dumps({"text": _TEXT, "id": 1}) + "\n") * 3)
    (to / "text.txt").write_text(_TEXT)


def _data_set_seeds(to: Path) -> None:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [_TEXT] * 3, "id": [1, 2, 3]}), file)
    files = {"README.md": _CARD.encode(), "train-00000-of-00001.parquet": file.getvalue()}
    (to / "answers.json").write_bytes(data_set_answers_of(files))


def _table_seeds(to: Path, model: Path) -> None:
    _copy(model, to / "model")
    chat = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _TEXT}]
    table = pyarrow.table({"messages": [chat] * 3, "text": [_TEXT] * 3, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, to / "rows.parquet")
    with pyarrow.ipc.new_stream(to / "rows.arrow", table.schema) as file:
        file.write_table(table)


def _hub_seeds(to: Path, model: Path) -> None:
    names = ("config.json", "tokenizer_config.json", "README.md", "model.safetensors")
    files = {name: (model / name).read_bytes() for name in names}
    (to / "answers.json").write_bytes(answers_of(files))


_CARD = """---
license: apache-2.0
license_name: own
license_link: https://example.org
pipeline_tag: text-generation
language:
- en
- de
tags: [chat, safetensors]
base_model: org/base
---
# A model

It was *trained*. | <b>

---
"""


def _float8(to: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    stack = torch.randn(2, 8, 16, generator=rng).to(torch.float8_e4m3fn)
    rows = {"a.weight": stack[0].clone(), "a.weight_scale": torch.full((8, 1), 0.1)}
    rows |= {"b.weight": stack[1].clone(), "b.weight_scale": torch.tensor(0.1)}
    rows |= {"experts.weight": stack, "experts.weight_scale": torch.full((2, 8, 1), 0.1)}
    _quantized(to / "rows", rows, {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    _float8_blocks(to / "model")


def _float8_blocks(directory: Path) -> None:
    codes = torch.randn(130, 140, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = {"a.weight_scale_inv": torch.full((2, 2), 0.01), "b.weight_scale_inv": torch.full((2, 2), 0.02)}
    tensors = {"a.weight": codes, "b.weight": codes.clone(), **scales, "norm.weight": torch.ones(4)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    _quantized(directory, tensors, {"model_type": "llama", "quantization_config": settings})


def _mxfp4(directory: Path) -> None:
    name = "mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (2, 3, 2, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.full((2, 3, 2), 120, dtype=torch.uint8)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = {"model_type": "gpt_oss", "num_local_experts": 2, "quantization_config": settings}
    _quantized(
        directory, {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 3)}, config
    )


def _quantized(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def _write_processor(path: Path) -> None:
    images = {"image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": 56}, "image_mean": [0.5]}
    path.write_text(json.dumps({"image_processor": images, "processor_class": "Qwen2VLProcessor"}))


def _row_map(path: Path) -> None:
    plain, turned = np.arange(16), np.arange(16)[::-1].copy()
    factors = np.linspace(0.5, 2, 16, dtype=np.float32)
    rows = {
        "a": TensorRows(("x", "y"), plain % 2, plain // 2, None, None),
        "b": TensorRows(("z",), np.zeros(16, np.int64), plain, turned, factors),
    }
    path.write_bytes(zlib.decompress(base64.b64decode(map_to_text(RowMap(rows, {"c": "unlike all"})))))


def evaluated(folder: Path) -> None:
    """Compare a folder's EXL2 model with its original, on its text."""
    run_cli(
        *("eval", folder / "model", folder / "exl2", "--text", folder / "text.txt"),
        *("-r", "1", "-l", "16", "--device", "cpu", "--no-cache"),
    )
