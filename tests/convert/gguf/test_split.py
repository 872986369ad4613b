"""Models in several files, as llama.cpp's own package writes them."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.files import operations
from bpwise.checkpoint.files.paths import reserved
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Provenance
from bpwise.convert.gguf.engine.widened import write_float32
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.metadata import DIGEST_KEY, DIGEST_ROOM, RUN_KEY
from bpwise.convert.gguf.file.split import first_path, joined, model_digest, part_path, parts_beside, read_model_header
from bpwise.convert.gguf.file.values import read_values
from bpwise.convert.gguf.file.writer import planned_parts, write_gguf
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.opening import verify_model
from bpwise.convert.registry import require_format
from bpwise.errors import FormatError, VerificationError, WorkDirectoryError
from bpwise.eval.config import EvalConfig
from bpwise.eval.models import summarize_model
from bpwise.eval.report.layers import find_plan
from bpwise.progress import silent
from bpwise.quantize.checks import check_output, files_beside, has_report, is_made, require_together

from ...quantize.runs import gguf as options_of
from ...quantize.runs import refused

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")

MakeGguf = Callable[..., Path]


def split(whole: Path, folder: Path, tensors: int) -> list[Path]:
    """Write a model again in several files with gguf-py."""
    reader = gguf.GGUFReader(whole)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop("general.architecture")
    writer = gguf.GGUFWriter(folder / whole.name, architecture, split_max_tensors=tensors)
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{whole.stem}-*.gguf"))


@pytest.fixture
def whole(make_gguf: MakeGguf) -> Path:
    return make_gguf("fused")  # of an architecture that is not checked any further


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "parts").mkdir()
    return split(whole, tmp_path / "parts", 40)


def test_parts_are_one_model(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    assert [path.name for path in parts] == [f"fused-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert parts_beside(parts[0]) == tuple(parts[1:])
    one, several = read_gguf_header(whole), read_model_header(parts[0])
    assert list(several.tensors) == list(one.tensors)
    assert not any(key.startswith("split.") for key in (*several.metadata, *several.entries))
    assert several.file_bytes == sum(path.stat().st_size for path in parts)
    for name, tensor in several.tensors.items():
        assert torch.equal(read_values(tensor), read_values(one.tensors[name]))
    assert verify_model(parts[0]).rates == verify_model(whole).rates
    assert require_format(parts[0]).companions(parts[0]) == tuple(parts[1:])
    copies = [tmp_path / name for name in ("one.gguf", "several.gguf")]
    for header, copy in zip((one, several), copies, strict=True):
        write_float32(header, copy, 4)
    assert copies[0].read_bytes()[-4096:] == copies[1].read_bytes()[-4096:]


def test_an_unquantized_model_in_parts_is_quantized_as_a_whole_one(
    whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    types = {"blk.0.attn_qkv.weight": TYPES["Q8_0"], "blk.15.ffn_down.weight": TYPES["Q8_0"]}
    made = [tmp_path / name for name in ("one.gguf", "several.gguf")]
    for base, output in zip((whole, parts[0]), made, strict=True):
        write_gguf(base, output, types, file_type=7)
    one, several = map(read_gguf_header, made)
    assert [(each.name, each.type) for each in one.tensors.values()] == [
        (each.name, each.type) for each in several.tensors.values()
    ]
    for name, tensor in several.tensors.items():
        assert torch.equal(read_values(tensor), read_values(one.tensors[name]))


def test_the_digest_is_of_all_parts(parts: list[Path]) -> None:
    before = model_digest(read_model_header(parts[0]))
    data = bytearray(parts[2].read_bytes())
    data[-100] ^= 1
    parts[2].write_bytes(data)
    assert model_digest(read_model_header(parts[0])) != before


def test_what_is_not_a_whole_model_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="part 2 of 3 of a split model"):
        read_model_header(parts[1])
    shutil.copy(parts[0], tmp_path / "first.gguf")
    with pytest.raises(FormatError, match="by another name"):
        read_model_header(tmp_path / "first.gguf")
    shutil.copy(parts[1], parts[2])
    with pytest.raises(FormatError, match="not part 3 of 3"):
        read_model_header(parts[0])
    parts[2].unlink()
    with pytest.raises(FormatError, match="1 of 3 parts are missing, the first fused-00003"):
        read_model_header(parts[0])


@pytest.mark.parametrize(
    ("number", "key", "said"),
    [(2, "split.no", "not part 3"), (2, "split.count", "not part 3"), (0, "split.tensors.count", "the parts hold")],
)
def test_lists_in_the_place_of_numbers_of_parts_are_refused(
    parts: list[Path], number: int, key: str, said: str
) -> None:
    headers = [read_gguf_header(each) for each in parts]
    listed = {**headers[number].metadata, key: np.array([1, 2], np.int32)}  # as arrays of metadata are read
    headers[number] = replace(headers[number], metadata=listed)
    with pytest.raises(FormatError, match=said):
        joined(headers)


def write(whole: Path, output: Path, size: int, **metadata: str) -> Path:
    """Write a model of F32 in parts of at most so many bytes of tensors; return the first."""
    header = read_gguf_header(whole)
    output = first_path(output, len(planned_parts(header, {}, size)))
    write_gguf(whole, output, {}, file_type=0, split_max_bytes=size, metadata=metadata)
    return output


def test_parts_are_as_llama_cpp_writes_them(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    largest = 768 * 256 * 4
    first = write(whole, tmp_path / "made.gguf", 10 * largest, **{DIGEST_KEY: DIGEST_ROOM})
    ours = [first, *parts_beside(first)]
    assert len(ours) > 2
    readers = [gguf.GGUFReader(path) for path in ours]
    kinds = {key: field.types for key, field in gguf.GGUFReader(parts[0]).fields.items() if key.startswith("split.")}
    assert len(kinds) == 3
    for number, reader in enumerate(readers):
        assert {key: field.types for key, field in reader.fields.items() if key.startswith("split.")} == kinds
        told = [reader.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert told == [number, len(ours), sum(len(each.tensors) for each in readers)]
        assert sum(tensor.n_bytes for tensor in reader.tensors) <= 10 * largest
    assert {"general.architecture"} & set(readers[1].fields) == set()
    header, one = read_model_header(first), read_gguf_header(whole)
    assert header.tensors.keys() == one.tensors.keys()
    for name, tensor in header.tensors.items():
        assert torch.equal(read_values(tensor), read_values(one.tensors[name]))
    assert verify_model(first).compared
    data = bytearray(ours[1].read_bytes())
    data[-100] ^= 1
    ours[1].write_bytes(data)
    with pytest.raises(VerificationError, match=f"{ours[1].name}: has changed"):
        verify_model(first)


def test_a_killed_run_leaves_nothing_that_loads_and_is_gone_over(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = operations.replace, tmp_path / "out"

    def killed(source: Path, target: Path) -> None:
        if "-00002-" in target.name:  # later parts get their names before the first
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(operations, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(whole, folder / "x.gguf", 1 << 23, **{RUN_KEY: "r"})
    names = [path.name for path in folder.iterdir()]
    assert names
    assert not [name for name in names if "-00001-" in name]
    monkeypatch.undo()
    with pytest.raises(WorkDirectoryError, match="in the way"):
        write(whole, folder / "x.gguf", 1 << 23, **{RUN_KEY: "another"})
    verify_model(write(whole, folder / "x.gguf", 1 << 23, **{RUN_KEY: "r"}))


def test_names() -> None:
    assert part_path(Path("a/L-4.5bpw-Q4_K_M.gguf"), 2, 3) == Path("a/L-4.5bpw-Q4_K_M-00002-of-00003.gguf")
    assert parts_beside(Path("L-00002-of-00003.gguf")) == parts_beside(Path("L.gguf")) == ()


def checked(model: Path, output: Path) -> None:
    """What a run does with its places before any work."""
    config = options_of(4.5, evaluate=EvalConfig(), card=True)
    conversion = config.conversion(Checkpoint.open(model))
    with reserved(output, files_beside(output, conversion, config.format)):
        check_output(conversion, config, output, output.with_name("work"), silent)


@pytest.mark.parametrize("ending", ["README.md", "recipe.yaml", "report.html", "report.json"])
def test_files_of_others_beside_a_first_part_are_refused_before_the_work(
    ending: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"out-00001-of-00003.{ending}"
    path.write_text("theirs")
    with pytest.raises(WorkDirectoryError, match=f"{path.name}: in the way. Got another file"):
        checked(tiny_model, tmp_path / "out.gguf")
    assert path.read_text() == "theirs"
    checked(tiny_model, tmp_path / "out-2.gguf")


def test_parts_of_others_are_refused_before_the_work(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.gguf"
    first = write(whole, output, 1 << 23, **{RUN_KEY: "another"})
    with pytest.raises(WorkDirectoryError, match=f"{first.name}: exists already and is not the output of this run"):
        checked(tiny_model, output)
    first.unlink()
    with pytest.raises(WorkDirectoryError, match=r"-00002-of-\d+\.gguf: exists already and is not the output"):
        checked(tiny_model, output)
    for part in parts_beside(first):
        part.unlink()
    write(whole, output, 1 << 23, **{RUN_KEY: f"{Checkpoint.open(tiny_model).fingerprint[:8]}of this model"})
    checked(tiny_model, output)


def test_half_made_parts_of_killed_runs_are_cleared(tiny_model: Path, tmp_path: Path) -> None:
    ours = tmp_path / ".x-00002-of-00003.gguf.partial-999999999-0123abcd"
    theirs = tmp_path / ".x2-00002-of-00003.gguf.partial-999999999-0123abcd"
    for path in (ours, theirs):
        path.write_bytes(b"half")
    checked(tiny_model, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]


def test_a_model_in_parts_is_known_to_be_made(tiny_model: Path, tmp_path: Path) -> None:
    config, output = options_of(4.5), tmp_path / "x.gguf"
    conversion = config.conversion(Checkpoint.open(tiny_model))
    huge: Any = SimpleNamespace(size=SimpleNamespace(output_bytes=1 << 60))  # more than any disk has
    (tmp_path / "x-00002-of-00002.gguf").write_bytes(b"part")  # later parts come first
    assert not is_made(output, config.format)
    with pytest.raises(WorkDirectoryError):
        require_together([(conversion, {output: huge})], tmp_path / "w", tmp_path / "m")
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(b"part")
    assert is_made(output, config.format)
    assert not has_report(output, config.format)
    (tmp_path / "x-00001-of-00002.report.json").write_text("{}")
    assert has_report(output, config.format)
    sizes = conversion.scratch(tmp_path / "w", tmp_path / "m")
    assert sum(sizes.values()) < 1 << 30
    require_together([(conversion, {output: huge})], tmp_path / "w", tmp_path / "m")


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_the_name_of_a_part_is_refused_before_the_work(
    dry_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    output = tmp_path / "x-00001-of-00003.gguf"
    said = refused("quantize", tiny_model, output, "--bpw", 9, "--device", "cpu", *dry_run)
    assert "x-00001-of-00003.gguf: the name of a part." in said
    assert said.endswith("Name it x.gguf.")
    assert not any(tmp_path.iterdir())


def test_an_evaluation_finds_the_plan_and_names_all_parts(parts: list[Path]) -> None:
    for work in ("fused.gguf.work", "parts.work/fused.gguf"):  # of one output, and of a series in that folder
        plan = (parts[0].parent if work.startswith("fused") else parts[0].parents[1]) / work / "plan.json"
        plan.parent.mkdir(parents=True)
        plan.write_text("{}")
        assert find_plan(parts[0]) == plan
        plan.unlink()
    hashes = summarize_model(GgufModel.open(parts[0]), 1000).sha256
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


def test_a_mixture_of_a_base_in_parts_is_forecast_from_all_of_them(
    whole: Path, parts: list[Path], tiny_model: Path
) -> None:
    forecasts = [
        options_of(mixture="Q8_0", base=base).conversion(Checkpoint.open(tiny_model)).forecast(None, None)
        for base in (whole, parts[0])
    ]
    assert forecasts[0].output_bytes > 16 * (768 + 3 * 256) * 256  # its 16 blocks, in at least a byte a weight
    assert forecasts[1] == forecasts[0]


def test_a_killed_mixture_in_parts_is_gone_over(
    whole: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    config = options_of(mixture="Q8_0", base=whole, split_max_size=1 << 21)
    conversion = config.conversion(Checkpoint.open(tiny_model))
    monkeypatch.setattr(type(conversion), "base", whole)  # as once it is prepared
    fingerprint = Checkpoint.open(tiny_model).fingerprint
    provenance = Provenance(version="1", run=f"{fingerprint[:8]}{0:024}", model=fingerprint)
    plan = conversion.plan(None, None, provenance)
    output = tmp_path / "out" / "x.gguf"
    first = conversion.placed(output, plan)
    assert len(parts_beside(first)) > 1
    conversion.write(None, first, plan, None, provenance, silent)
    assert RUN_KEY not in read_model_header(first).metadata  # as llama.cpp's own file
    before = first.read_bytes()
    first.unlink()  # as a run that is killed before its last step leaves it
    with reserved(output, files_beside(output, conversion, config.format)):
        check_output(conversion, config, output, output.with_name("work"), silent)
    with pytest.raises(WorkDirectoryError, match="in the way"):
        conversion.write(None, first, plan, None, replace(provenance, run="another"), silent)
    conversion.write(None, first, plan, None, provenance, silent)
    assert first.read_bytes() == before
    assert verify_model(first).quantized == len(read_model_header(whole).tensors) - 17
