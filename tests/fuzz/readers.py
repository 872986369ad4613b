"""What reads files that people bring: a list of readers, and mutants tried on each."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from unittest import mock

import torch
import yaml
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.hub import resolve_model, side_files
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.vocabulary import tokens_beyond
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.config import add_image_processor, require_side_files
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding.rounder import rounded_linear
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.writer import write_gguf
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.imatrix import imatrix_metadata, read_imatrix
from bpwise.convert.gguf.plan.plan import GgufPlan
from bpwise.convert.gguf.rows.text import map_from_text, map_to_text
from bpwise.convert.mlx.file.model import MlxModel
from bpwise.convert.mlx.file.writer import verify_mlx
from bpwise.convert.mlx.plan.plan import MlxPlan
from bpwise.convert.model import CardFacts
from bpwise.convert.opening import open_any, verify_model
from bpwise.convert.registry import format_named, load_plan, require_format
from bpwise.errors import BpwiseError
from bpwise.eval.cache import OriginalCache
from bpwise.eval.llama_perplexity.base_file import BaseFile
from bpwise.eval.llama_perplexity.statistics import TokenComparison, compare_tokens
from bpwise.eval.llama_perplexity.table import table_lines
from bpwise.eval.llama_perplexity.windows import read_text
from bpwise.eval.metrics.overlap import stored_spans
from bpwise.eval.publishing.base_card import read_base_card
from bpwise.eval.publishing.card import Card, render_card
from bpwise.eval.publishing.cards import write_card
from bpwise.eval.publishing.mark import read_mark
from bpwise.eval.publishing.push import Upload, upload_model
from bpwise.eval.report.layers import linear_costs
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet, build_calibration
from bpwise.measure.text.sources import read_texts
from bpwise.measure.text.tokenizer import LoadedTokenizer, end_ids, load_tokenizer
from bpwise.quantize.checks import output_of
from bpwise.quantize.run import quantize_model
from bpwise.quantize.timing.finished import finished_blocks
from huggingface_hub import constants

from ..quantize.runs import arguments
from .hub import check_answers, lying_hub, mutated_answers
from .kinds import ARROW, CARD, DAT, GGUF, JSON, JSON_LINES, LOGITS, PARQUET, TEMPLATE, TENSORS, TEXT, Kind
from .mutations import NAMES, mutated_listing
from .pool import Mutant, Outcome, run_all
from .running import Raw, Refused, is_printable, quick_templates, run_cli
from .seeds import TO_4_5_BPW, curve_makers, evaluated, rounded_model

__all__ = ["READERS", "Reader", "fuzz", "targets_of"]


_IN_PLACE = 0.98
"""Share of mutants that are files; the others are something else in a file's place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Something that reads files.

    Attributes:
        seeds: Folder of the files that it takes.
        targets: Patterns of the files that are changed, and their kinds.
        read: Reads what lies in a folder that is its own; the second path is that of the changed file in it.
        modules: Where in the package that is done.
        file: Whether bpwise itself opens the changed file, so that something else may lie in its place.
        share: How many mutants it gets for each that the slowest readers get; a fast one more.
    """

    seeds: str
    targets: dict[str, Kind]
    read: Callable[[Path, Path], None]
    modules: tuple[str, ...]
    share: int
    file: bool = True


def targets_of(reader: str, seeds: Path) -> list[tuple[str, Path]]:
    """Return patterns and files of which a reader's mutants are made, relative to its folder."""
    folder = seeds / READERS[reader].seeds
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = [(pattern, path) for pattern in READERS[reader].targets for path in files if path.match(pattern)]
    assert found, f"{reader}: nothing in {folder} is to be changed"
    return found


def fuzz(
    reader: str, seeds: Path, scratch: Path, *, mutants: int, seed: int = 0, first: int = 0, workers: int = 1
) -> list[Outcome]:
    """Try mutants on a reader, after the files that they are made of.

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
    targets = targets_of(reader, seeds)
    patterns = sorted({pattern for pattern, _ in targets})
    for pattern in patterns:
        # A reader that refused all would pass; and what a first reading imports is in the processes of all mutants.
        path = next(path for each, path in targets if each == pattern)
        own = _folder(seeds / tried.seeds, scratch / f"{reader}-whole")
        tried.read(own, path)
        shutil.rmtree(own)

    def make(number: int) -> Mutant:
        rng = Random(f"{seed}/{reader}/{number}")
        # Every pattern gets as many mutants, however many files there are of it.
        pattern = rng.choice(patterns)
        path = rng.choice([path for each, path in targets if each == pattern])
        own = _folder(seeds / tried.seeds, scratch / f"{reader}-{number}")
        kind = tried.targets[pattern]
        data = kind.mutated((own / path).read_bytes(), rng)
        (own / path).unlink()
        if not tried.file or rng.random() < _IN_PLACE:
            (own / path).write_bytes(data)
        else:
            data = _put_other(own / path, data, rng)

        def read() -> tuple[str, str]:
            try:
                kind, detail = _read(tried.read, own, path)
            finally:
                shutil.rmtree(own, ignore_errors=True)
            return kind, f"{path}: {detail}"

        return Mutant(read, kind.passes(data), len(data))

    return run_all(make, mutants, first=first, workers=workers)


def _put_other(path: Path, data: bytes, rng: Random) -> bytes:
    """Put in a file's place nothing, a folder, a link that leads outside, or a pointer of Git LFS."""
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("/etc/passwd")
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        data = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        path.write_bytes(data)
        return data
    return b""


def _folder(source: Path, to: Path) -> Path:
    # Links: bpwise writes files anew, and renames them.
    shutil.copytree(source, to, copy_function=os.link)
    return to


def _read(read: Callable[[Path, Path], None], folder: Path, changed: Path) -> tuple[str, str]:
    try:
        read(folder, changed)
    except Raw as error:
        return "raw", str(error)
    except (BpwiseError, Refused) as error:
        message = str(error)
        if not is_printable(message, lines=isinstance(error, Refused)):
            return "raw", f"{type(error).__name__}: {len(message)} characters, {message[:200]}"
        return "refused", message.replace(str(folder), "")[:200]
    return "ok", ""


def _read_plan(folder: Path, changed: Path) -> None:
    for name in ("plan.json", "types.json", "schemes.json"):
        path = folder / name
        if path.exists():
            linear_costs(open_any(folder / "exl2"), path)
            plan = load_plan(path)
            plan.save(folder / "again.json")
            _ = (plan.bpw, plan.gap, plan.damage_nats, plan.stored_bytes, plan.shares(), plan.identity())
            if isinstance(plan, Exl2Plan):
                _ = (plan.head_code_bits, [linear.stored_groups for linear in plan.linears])
            if isinstance(plan, GgufPlan | MlxPlan):
                _ = plan.kinds
            run_cli("inspect", path)


def _read_mlx(folder: Path, changed: Path) -> None:
    own = folder / changed.parent
    _ = (format_named("mlx").recognises(own), format_named("mlx").run_of(own))
    model = MlxModel.open(own)
    _ = (model.config, model.stored_bpw(), model.describe(), model.calibration_spans, model.predicted_damage_nats)
    for name in sorted(model.names):
        assert model.tensor(name).shape == model.shape(name)
    format_named("mlx").card(model, "org/base")
    verify_mlx(own)


def _read_measurement(folder: Path, changed: Path) -> None:
    path = folder / "measurement.safetensors"
    measurement = Measurement.load(path)
    assert measured_rows(measurement).tokens.numel()
    run_cli("inspect", path)
    run_cli("plan", path, "--bpw", "4.5", "--head-bits", "auto", "-o", folder / "p.json")
    if GgufCurves.name in measurement.curves:
        run_cli("plan", path, "--bpw", "8", "--format", "gguf", "-o", folder / "t.json")
        run_cli("plan", path, "--html", folder / "page.html")
    run_cli("export", path, "--for", "auto-round", "--bpw", "5", "-o", folder / "e.json")
    run_cli("imatrix", path, "-o", folder / "i.gguf")
    quantize_model(folder / "model", folder / "out", **arguments(TO_4_5_BPW), measurement=path)


def _read_pieces(folder: Path, changed: Path) -> None:
    original = Checkpoint.open(folder / "model")
    work = folder / changed.parts[0]
    if work.name == "work-rounded":
        measurement = Measurement.load(folder / "measurement.safetensors")
        rounded = rounded_model(original, measurement, work)
        rounded.drift()
        rounded.numbers("damping")
        source = language_model(original)
        for name in rounded.names:
            rounded_linear(rounded, source, name, tuned=False).dequantize()
        return
    finished_blocks(folder)
    rows = CalibrationSet.load(folder / "rows.safetensors")
    measurement = measure_checkpoint(original, rows, MeasureConfig(device="cpu"), curve_makers(original), work)
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
    run_cli("inspect", folder / "out.gguf")


def _read_exl2(folder: Path, changed: Path) -> None:
    run_cli("inspect", folder / "exl2")
    run_cli("verify", folder / "exl2")


def _read_foreign(folder: Path, changed: Path) -> None:
    read_mark(folder / "exl2")
    _read_exl2(folder, changed)


def _read_exl2_unverified(folder: Path, changed: Path) -> None:
    # As evaluation does: nothing verifies before.
    model = open_any(folder / "exl2")
    linear_costs(model)
    for name in sorted(model.names):
        model.shape(name)
        model.tensor(name)
    evaluated(folder)


def _read_output(folder: Path, changed: Path) -> None:
    output = folder / "exl2"
    model = open_any(output)
    stored_spans(model)
    verify_model(output)
    run_cli("push", output, "org/name", "--dry-run")
    write_card(output, original=folder / "model")
    with suppress(BpwiseError):  # that it is another's
        output_of(output, require_format(output), "another")


def _read_checkpoint(folder: Path, changed: Path) -> None:
    place = folder / changed.parts[0]
    model = open_model(place)
    _ = (model.tied_embeddings, model.total_bytes, model.parameter_count)
    for name in sorted(model.names):
        model.tensor(name)
        if len(model.shape(name)) > 2:
            model.entry(name, 0)
    run_cli("inspect", place)


def _read_adapter(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model", lora=folder / changed.parts[0])
    json.dumps(model.changes)
    for name in sorted(model.names):
        model.tensor(name)


def _read_config(folder: Path, changed: Path) -> None:
    place = folder / changed.parts[0]
    model = open_model(place)
    _ = (model.tied_embeddings, model.fingerprint)
    run_cli("inspect", place)
    run_cli("quantize", place, folder / "out", "--bpw", "4.5", "-r", "2", "-l", "32", "--dry-run")


def _read_config_and_run(folder: Path, changed: Path) -> None:
    model = open_model(folder / "model")
    rows = CalibrationSet.load(folder / "rows.safetensors")
    measure_checkpoint(model, rows, MeasureConfig(device="cpu"), [Exl2Curves()], folder / "work")


def _read_tokenizer(folder: Path, changed: Path) -> None:
    place = folder / changed.parts[0]
    tokenizer = load_tokenizer(place)
    end_ids(place, tokenizer)
    tokens_beyond(Checkpoint.open(place))
    if place.name == "model":  # which has a chat template
        _rows_of(tokenizer, folder / "chat.jsonl", chat=True)


def _read_template(folder: Path, changed: Path) -> None:
    _rows_of(load_tokenizer(folder / "model"), folder / "chat.jsonl", chat=True)


def _read_text(folder: Path, changed: Path) -> None:
    chat = changed.name == "chat.jsonl"
    _rows_of(load_tokenizer(folder / "model"), folder / changed, chat=chat).save(folder / "rows.safetensors")
    read_text(folder / changed)


def _read_tables(folder: Path, changed: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    for chat in (False, True):
        _rows_of(tokenizer, folder / changed, chat=chat)


def _rows_of(tokenizer: LoadedTokenizer, source: Path, *, chat: bool) -> CalibrationSet:
    config = CalibrationConfig(source=str(source), chat_template=chat, rows=2, row_tokens=32)
    with quick_templates():
        return build_calibration(tokenizer, config, vocab_size=264)


def _read_row_map(folder: Path, changed: Path) -> None:
    text = base64.b64encode(zlib.compress((folder / changed).read_bytes(), 1)).decode()
    map_to_text(map_from_text(text, "rows"))


def _read_processor(folder: Path, changed: Path) -> None:
    require_side_files(folder)
    add_image_processor(folder)


def _read_card(folder: Path, changed: Path) -> None:
    facts = CardFacts(name="a", kind="b", library="c", made=(("d", "e"),), limits=(), loading="f")
    card = Card(facts=facts, format="exl2", base_name="g", base=read_base_card(folder / "model"))
    text = render_card(card)
    front = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(front, dict), text[:500]


def _read_hub(folder: Path, changed: Path) -> None:
    with lying_hub(folder / changed, folder / "cache"):
        directory = resolve_model("org/name")
    assert directory.is_relative_to(folder / "cache"), directory
    for path in directory.rglob("*"):
        assert path.resolve().is_relative_to((folder / "cache").resolve()), path
    open_model(directory)


def _read_data_set(folder: Path, changed: Path) -> None:
    import datasets

    with lying_hub(folder / changed, folder / "cache"):
        settings = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": folder / "cache"}
        with mock.patch.multiple(datasets.config, **settings):
            assert all(isinstance(document.text, str) for document in read_texts("org/data").documents())


def _read_push(folder: Path, changed: Path) -> None:
    files = tuple((name, folder / name) for name in ("config.json", "README.md"))
    for _, path in files:
        path.write_bytes(b"{}")
    with lying_hub(folder / changed, folder / "cache"):
        link = upload_model(Upload(output=folder / "a", repo="org/name", branch=None, files=files, left_out=()))
    if not is_printable(link):
        raise Raw(f"printed {link[:200]!r}")


def _read_calibration(folder: Path, changed: Path) -> None:
    CalibrationSet.load(folder / "rows.safetensors")
    run_cli("inspect", folder / "rows.safetensors")


def _read_cache(folder: Path, changed: Path) -> None:
    OriginalCache(folder).load("key")


def _read_logits(folder: Path, changed: Path) -> None:
    base = BaseFile.open(folder / "base.kld")
    with base.reading() as read:
        found = [read(7) for _ in base.tokens]
    model = torch.zeros(7, base.vocab_size)
    targets = base.tokens[:, -7:]
    parts = [compare_tokens(model, each, target) for each, target in zip(found, targets, strict=True)]
    for line in table_lines(TokenComparison.joined(parts)):
        if not is_printable(line):
            raise Raw(f"printed {line!r}")


def _read_gguf(folder: Path, changed: Path) -> None:
    path = folder / changed.name.replace("00002-of", "00001-of")
    run_cli("inspect", path)
    run_cli("verify", path)
    model = open_any(path)
    if model.stands_alone:
        for name in sorted(model.names):
            model.tensor(name)
    _ = model.own_map
    stored_spans(model)
    write_card(path)


def _read_listing(folder: Path, changed: Path) -> None:
    made = folder / "folder"
    for name, content in json.loads((folder / changed).read_bytes()).items():
        target = made / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if content in NAMES:
            os.link(folder / "content" / content, target)
        else:
            target.mkdir()
    open_model(made)
    side_files(made)
    load_tokenizer(made)
    run_cli("inspect", made)


READERS: dict[str, Reader] = {
    "plan": Reader(
        seeds="plan",
        share=20,
        targets={"plan.json": JSON, "types.json": JSON},
        read=_read_plan,
        modules=("checkpoint/files/schemas", "convert/registry", "convert/exl2/plan/plan", "convert/gguf/plan/plan"),
    ),
    "measurement": Reader(
        seeds="measurement",
        share=5,
        targets={"measurement.safetensors": TENSORS},
        read=_read_measurement,
        modules=(
            "checkpoint/model/structure_json",
            "convert/exl2/plan/measured",
            "convert/export/units",
            "convert/gguf/plan/layout",
            "convert/gguf/plan/measured",
            "measure/measurement_file",
        ),
    ),
    "pieces": Reader(
        seeds="pieces",
        share=1,
        targets={"work-*/*/*.safetensors": TENSORS, "work-*/*/identity.json": JSON},
        read=_read_pieces,
        modules=("checkpoint/files/resume", "quantize/timing/finished"),
    ),
    "imatrix": Reader(
        seeds="imatrix",
        share=150,
        targets={"imatrix.gguf": GGUF, "imatrix.dat": DAT},
        read=_read_imatrix,
        modules=("convert/gguf/llama_cpp/imatrix",),
    ),
    "exl2": Reader(
        seeds="exl2",
        share=5,
        targets={"exl2/config.json": JSON, "exl2/bpwise.json": JSON, "exl2/output.safetensors": TENSORS},
        read=_read_exl2,
        modules=("convert/exl2/file/reader", "convert/exl2/file/tensors", "convert/exl2/file/verify"),
    ),
    "exl2-foreign": Reader(
        seeds="exl2-foreign",
        share=15,
        targets={"exl2/config.json": JSON, "exl2/output.safetensors": TENSORS},
        read=_read_foreign,
        modules=("convert/exl2/file/linear", "convert/exl2/file/store", "convert/exl2/file/verify"),
    ),
    "exl2-eval": Reader(
        seeds="exl2",
        share=1,
        targets={"exl2/config.json": JSON, "exl2/bpwise.json": JSON, "exl2/output.safetensors": TENSORS},
        read=_read_exl2_unverified,
        modules=("convert/exl2/file/reader", "convert/exl2/file/store"),
    ),
    "provenance": Reader(
        seeds="exl2",
        share=3,
        targets={
            "exl2/bpwise.json": JSON,
            "exl2/report.json": JSON,
            "exl2/config.json": JSON,
            "exl2/README.md": TEXT,
        },
        read=_read_output,
        modules=(
            "convert/exl2/file/manifest",
            "eval/metrics/overlap",
            "eval/publishing/cards",
            "eval/publishing/mark",
        ),
    ),
    "index": Reader(
        seeds="sharded",
        share=30,
        targets={"model.safetensors.index.json": JSON, "model-*.safetensors": TENSORS},
        read=_read_checkpoint,
        modules=("checkpoint/files/safetensors_file", "checkpoint/source/checkpoint", "checkpoint/source/index"),
    ),
    "listing": Reader(
        seeds="listing",
        share=20,
        file=False,
        targets={"listing.json": Kind(mutated_listing, json.loads)},
        read=_read_listing,
        modules=("checkpoint/source/checkpoint", "checkpoint/source/hub", "checkpoint/source/index"),
    ),
    "float8": Reader(
        seeds="float8",
        share=30,
        targets={"*/config.json": JSON, "*/model.safetensors": TENSORS},
        read=_read_checkpoint,
        modules=("checkpoint/source/float8",),
    ),
    "mxfp4": Reader(
        seeds="mxfp4",
        share=50,
        targets={"config.json": JSON, "model.safetensors": TENSORS},
        read=_read_checkpoint,
        modules=("checkpoint/source/mxfp4",),
    ),
    "adapter": Reader(
        seeds="adapter",
        share=30,
        targets={"*/adapter_config.json": JSON, "*/adapter_model.safetensors": TENSORS},
        read=_read_adapter,
        modules=("checkpoint/source/lora",),
    ),
    "config": Reader(
        seeds="configs",
        share=5,
        targets={"*/config.json": JSON},
        read=_read_config,
        modules=("checkpoint/model/config",),
    ),
    "config-run": Reader(seeds="model", share=1, targets={"config.json": JSON}, read=_read_config_and_run, modules=()),
    "tokenizer": Reader(
        seeds="tokenizer",
        share=5,
        targets=dict.fromkeys(
            ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "generation_config.json"),
            JSON,
        ),
        read=_read_tokenizer,
        modules=("checkpoint/source/vocabulary", "measure/text/tokenizer"),
    ),
    "template": Reader(
        seeds="tokenizer",
        share=5,
        targets={"chat_template.jinja": TEMPLATE},
        read=_read_template,
        modules=("measure/text/chat_template",),
    ),
    "text": Reader(
        seeds="text",
        share=20,
        targets={"*.jsonl": JSON_LINES, "text.txt": TEXT},
        read=_read_text,
        modules=("eval/llama_perplexity/windows", "measure/text/chat_rows", "measure/text/sources"),
    ),
    "tables": Reader(
        seeds="tables",
        share=5,
        targets={"rows.parquet": PARQUET, "rows.arrow": ARROW},
        read=_read_tables,
        modules=("measure/text/sources",),
    ),
    "cache": Reader(
        seeds="cache", share=800, targets={"*.original.safetensors": TENSORS}, read=_read_cache, modules=("eval/cache",)
    ),
    "logits": Reader(
        seeds="logits",
        share=800,
        targets={"base.kld": LOGITS},
        read=_read_logits,
        modules=("eval/llama_perplexity/base_file",),
    ),
    "calibration": Reader(
        seeds="calibration",
        share=800,
        targets={"rows.safetensors": TENSORS},
        read=_read_calibration,
        modules=("measure/text/calibration", "measure/text/mixture"),
    ),
    "gguf": Reader(
        seeds="gguf",
        share=150,
        targets={"*.gguf": GGUF},
        read=_read_gguf,
        modules=(
            "convert/gguf/file/digest",
            "convert/gguf/file/header",
            "convert/gguf/file/values",
            "convert/gguf/model/reader",
            "convert/gguf/model/verify",
        ),
    ),
    "mlx": Reader(
        seeds="mlx",
        share=40,
        targets={"config.json": JSON, "bpwise.json": JSON, "model.safetensors": TENSORS},
        read=_read_mlx,
        modules=(
            "convert/mlx/file/layout",
            "convert/mlx/file/manifest",
            "convert/mlx/file/model",
            "convert/mlx/file/writer",
            "convert/mlx/format",
        ),
    ),
    "processor": Reader(
        seeds="processor",
        share=20,
        targets={"processor_config.json": JSON},
        read=_read_processor,
        modules=("convert/exl2/file/config",),
    ),
    "row-map": Reader(
        seeds="rowmap",
        share=150,
        file=False,
        targets={"rows.json": JSON},
        read=_read_row_map,
        modules=("convert/gguf/rows/text",),
    ),
    "card": Reader(
        seeds="card", share=30, targets={"README.md": CARD}, read=_read_card, modules=("eval/publishing/base_card",)
    ),
    "hub": Reader(
        seeds="hub",
        share=5,
        file=False,
        targets={"answers.json": Kind(mutated_answers, check_answers)},
        read=_read_hub,
        modules=("checkpoint/source/hub",),
    ),
    "data-set": Reader(
        seeds="data-set",
        share=5,
        file=False,
        targets={"answers.json": Kind(partial(mutated_answers, endless=False), check_answers)},
        read=_read_data_set,
        modules=("measure/text/sources",),
    ),
    "push": Reader(
        seeds="hub",
        share=5,
        file=False,
        targets={"answers.json": Kind(mutated_answers, check_answers)},
        read=_read_push,
        modules=("eval/publishing/push",),
    ),
}
"""All of them, by name."""
