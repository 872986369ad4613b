import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpwise.errors import BpwiseError, ConfigError, FormatError
from bpwise.measure.measurement import FormatCurves, MeasuredLinear, MeasuredTable, Measurement
from safetensors import safe_open
from safetensors.numpy import save_file


def linear(name: str, rows: int, columns: int, *, damping: float = 0.02, seed: int = 0) -> MeasuredLinear:
    rng = np.random.default_rng(seed)
    return MeasuredLinear(
        name=name,
        fisher=rng.random(columns, dtype=np.float32),
        input_power=rng.random(rows, dtype=np.float32),
        coupling=rng.random((columns, 0 if name == "lm_head" else 3)).astype(np.float16),
        # The head alone has weights of its own.
        token_weights=np.random.default_rng(name == "lm_head").random((3, 8)).astype(np.float16),
        damping=damping,
    )


def table(*, tied: bool = True) -> MeasuredTable:
    return MeasuredTable(
        name="model.embed",
        tokens=33,
        importance=np.linspace(0, 1, 64, dtype=np.float32),
        tied=tied,
    )


def curves(*, seed: int = 0, group_size: int = 64) -> dict[str, FormatCurves]:
    """Of two formats, one of which measures the table too and has damages that are infinite."""
    rng = np.random.default_rng(seed)
    widths = {
        name: {
            "damage_nats": rng.random((-(-size // 64), 6), dtype=np.float32),
            "order": rng.permutation(size).astype(np.int32),
        }
        for name, size in (("b.1", 96), ("a.0", 64), ("lm_head", 64))
    }
    types = {name: {"damage_nats": np.array([0.5, np.inf], dtype=np.float32)} for name in widths}
    header = {"widths": [8, 6, 5, 4, 3, 2], "group_size": group_size}
    return {
        "one": FormatCurves(version=3, header=header, linears=widths, table={}),
        "two": FormatCurves(version=1, header={"types": ["a", "b"]}, linears=types, table=types["b.1"]),
    }


def measurement(**changes: object) -> Measurement:
    settings = {
        "linears": (linear("b.1", 96, 5), linear("a.0", 64, 40, damping=float("inf"), seed=1)),
        "head": linear("lm_head", 64, 33, seed=2),
        "embedding": table(),
        "other_weights": 12,
        "tokens": np.arange(24, dtype=np.int32).reshape(3, 8),
        "curves": curves(),
        "provenance": {"model": "abc", "rows": 3, "text": "ünï", "nested": {"x": [1, None]}},
    }
    return Measurement(**{**settings, **changes})


def assert_same(one: MeasuredLinear, other: MeasuredLinear) -> None:
    assert one.name == other.name
    assert one.damping == other.damping
    for field in ("fisher", "input_power", "coupling", "token_weights"):
        a, b = getattr(one, field), getattr(other, field)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_round_trip(tmp_path: Path) -> None:
    made = measurement()
    made.save(tmp_path / "new" / "m.safetensors")
    read = Measurement.load(tmp_path / "new" / "m.safetensors")
    assert [x.name for x in read.linears] == ["b.1", "a.0"]  # model order, not the alphabet's
    for one, other in zip((*made.linears, made.head), (*read.linears, read.head), strict=True):
        assert_same(one, other)
    assert (read.embedding.name, read.embedding.tokens, read.embedding.tied) == ("model.embed", 33, True)
    assert read.embedding.hidden_size == 64
    assert np.array_equal(read.embedding.importance, made.embedding.importance)
    assert read.other_weights == 12
    assert read.curves.keys() == made.curves.keys()
    for name, own in read.curves.items():
        expected = made.curves[name]
        assert (own.version, own.header) == (expected.version, expected.header)
        for found, wanted in (
            (own.table, expected.table),
            *((own.linears[x], expected.linears[x]) for x in own.linears),
        ):
            assert found.keys() == wanted.keys()
            for field, values in found.items():
                assert values.dtype == wanted[field].dtype
                assert np.array_equal(values, wanted[field])
    assert np.array_equal(read.tokens, made.tokens)
    assert read.provenance == made.provenance
    assert read.fingerprint == made.fingerprint
    assert read.to_bytes() == made.to_bytes() == (tmp_path / "new" / "m.safetensors").read_bytes()
    assert (read.linears[0].in_features, read.linears[0].out_features) == (96, 5)


def test_any_safetensors_reader_can_open_it(tmp_path: Path) -> None:
    made = measurement()
    made.save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert np.array_equal(file.get_tensor("lm_head.fisher"), made.head.fisher)
        order = file.get_tensor("curves/one/b.1.order")
    assert np.array_equal(order, made.curves["one"].linears["b.1"]["order"])


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": curves(group_size=32)},
        {"curves": curves(seed=1)},
        {"provenance": {"model": "abd"}},
        {"head": linear("lm_head", 64, 33, seed=3)},
        {"embedding": table(tied=False)},
        {"linears": (linear("b.1", 96, 5), linear("a.0", 64, 40, damping=0.2, seed=1))},
    ],
    ids=["curves-header", "curves", "provenance", "head", "embedding", "damping"],
)
def test_fingerprint_sees(changes: dict[str, object]) -> None:
    assert measurement(**changes).fingerprint != measurement().fingerprint


def test_saving_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    measurement().save(path)
    newer = replace(measurement(), other_weights=13)
    newer.save(path)
    assert Measurement.load(path).other_weights == 13
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def damage_header(path: Path) -> None:
    image = bytearray(path.read_bytes())
    image[12] ^= 0xFF
    path.write_bytes(image)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_text(path: Path) -> None:
    path.write_text("not a measurement")


def write_weights(path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, path)


def other_version(path: Path) -> None:
    _rewrite(path, lambda header: {**header, "version": 999})


def no_version(path: Path) -> None:
    _rewrite(path, lambda header: {key: value for key, value in header.items() if key != "version"})


def only_a_version(path: Path) -> None:
    _rewrite(path, lambda header: {"version": header["version"]})


def header_of_another_type(path: Path) -> None:
    _rewrite(path, lambda _: [1, 2])


def drop_a_tensor(path: Path) -> None:
    _rewrite(path, lambda header: header, without="b.1.fisher")


def broken_json(path: Path) -> None:
    tensors, key, _ = read_file(path)
    save_file(tensors, path, metadata={key: "{"})


def read_file(path: Path) -> tuple[dict[str, np.ndarray], str, dict[str, Any]]:
    """Tensors, and the one metadata entry: its key and the JSON in it."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        ((key, text),) = file.metadata().items()
    return tensors, key, json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any], without: str | None = None) -> None:
    tensors, key, header = read_file(path)
    tensors.pop(without or "", None)
    save_file(tensors, path, metadata={key: json.dumps(change(header))})


@pytest.mark.parametrize(
    "damage",
    [
        damage_header,
        cut_off,
        cut_to_nothing,
        write_text,
        write_weights,
        other_version,
        no_version,
        only_a_version,
        header_of_another_type,
        broken_json,
        drop_a_tensor,
        Path.unlink,
    ],
    ids=lambda function: function.__name__,
)
def test_refuses_other_files(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "m.safetensors"
    measurement().save(path)
    damage(path)
    with pytest.raises(FormatError, match=r"m\.safetensors.*[Mm]easure") as caught:
        Measurement.load(path)
    assert len(str(caught.value).splitlines()) == 1


def _first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.flat[0] = value
        return values

    return change


BAD_TENSORS = {
    "infinite-fisher": ("b.1.fisher", _first(np.inf)),
    "scalar-fisher": ("b.1.fisher", lambda fisher: fisher[:1].reshape(())),
    "input-power-a-matrix": ("b.1.input_power", lambda power: power[None]),
    "coupling-of-others": ("b.1.coupling", lambda coupling: coupling[1:]),
    "nan-coupling": ("b.1.coupling", _first(np.nan)),
    "weights-of-fewer-rows": ("b.1.token_weights", lambda weights: weights[1:]),
    "negative-weight": ("b.1.token_weights", _first(-1)),
    "nan-damage": ("curves/two/lm_head.damage_nats", _first(np.nan)),
    "empty-embedding": ("model.embed.importance", lambda importance: importance[:0]),
    "token-beyond-the-vocabulary": ("calibration_tokens", _first(33)),
    "negative-token": ("calibration_tokens", _first(-1)),
    "no-tokens": ("calibration_tokens", lambda tokens: tokens[:0]),
}


@pytest.mark.parametrize(("name", "change"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_nothing_can_be_done_with(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = tmp_path / "m.safetensors"
    measurement().save(path)
    tensors, key, header = read_file(path)
    tensors[name] = np.ascontiguousarray(change(tensors[name])).reshape(change(tensors[name]).shape)
    save_file(tensors, path, metadata={key: json.dumps(header)})
    with pytest.raises(FormatError, match=rf"m\.safetensors: tensor '{re.escape(name)}' .* measure the model again"):
        Measurement.load(path)


BAD_HEADERS = {
    "no-linears": ({"linears": []}, "linears: .*length >= 1"),
    "linear-twice": ({"linears": ["b.1", "b.1"]}, ".*different names"),
    "linear-unknown": ({"linears": ["b.1", "c"]}, "token_weights must name the linears"),
    "head-a-linear": ({"head": "b.1"}, ".*different names"),
    "curves-without-version": ({"curves": {"one": {"header": {}}}}, "curves"),
    "curves-version": ({"curves": {"one": {"version": 0, "header": {}}}}, r"curves.*version: .* Expected int >= 1"),
    "curves-of-a-path": ({"curves": {"a/b": {"version": 1, "header": {}}}}, "curves must name formats"),
    "other-weights": ({"other_weights": -1}, r"other_weights: .* Got -1\. Expected int >= 0"),
    "damping-zero": ({"damping": {"b.1": 0, "a.0": None, "lm_head": 0.1}}, "damping"),
    "damping-of-one": ({"damping": {"b.1": 0.1}}, "damping must name the linears and the head"),
    "tied": ({"embedding": {"name": "model.embed", "tokens": 33, "tied": "yes"}}, r"embedding\.tied: .* Got 'yes'"),
    "chosen": ({"chosen_tokens": {"x": 1}}, "chosen_tokens must name linears"),
    "provenance": ({"provenance": []}, r"provenance: .* Got \[\]\. Expected object"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.safetensors"
    measurement().save(path)
    _rewrite(path, lambda header: {**header, **changes})
    with pytest.raises(FormatError, match=rf"m\.safetensors: bpwise_measurement: {message}.*measure the model again"):
        Measurement.load(path)


def test_curves_that_belong_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    measurement().save(path)
    tensors, key, header = read_file(path)
    tensors["curves/one/c.damage_nats"] = np.zeros(3, np.float32)
    save_file(tensors, path, metadata={key: json.dumps(header)})
    with pytest.raises(FormatError, match=r"tensor 'curves/one/c\.damage_nats' belongs to nothing\. Got 'c'"):
        Measurement.load(path)


def test_curves_of_a_format() -> None:
    made = measurement()
    found, tensors = made.curves_of("two", 1)
    assert found.header == {"types": ["a", "b"]}
    assert tensors.take("model.embed.damage_nats", np.float32, (2,), infinite=True)[0] == 0.5
    with pytest.raises(ConfigError, match=r"^measurement: curves/three: .* Got one, two\. Expected three\. Measure"):
        made.curves_of("three", 1)
    with pytest.raises(FormatError, match=r"^measurement: curves/one: .* Got 3\. Expected 1\. Measure the model again"):
        made.curves_of("one", 1)


def test_refuses_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BpwiseError, match=str(tmp_path)):
        Measurement.load(tmp_path)


def test_header_is_plain_json(tmp_path: Path) -> None:
    made = measurement()
    made.save(tmp_path / "m.safetensors")
    _, _, header = read_file(tmp_path / "m.safetensors")  # fails on Infinity, which one damping is
    assert header["provenance"] == made.provenance


def test_bytes_do_not_differ_from_process_to_process(tmp_path: Path) -> None:
    # Hash seeds differ between processes; what is written must not.
    measurement().save(tmp_path / "m.safetensors")
    code = """
import sys
from pathlib import Path
from bpwise.measure.measurement import Measurement
print(Measurement.load(Path(sys.argv[1])).fingerprint)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m.safetensors")]
    seen = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }
    assert seen == {measurement().fingerprint}


def test_without_feedback() -> None:
    assert measurement().without_feedback == ("a.0",)


def test_how_many_tokens_chose_an_expert_is_kept(tmp_path: Path) -> None:
    few, many = (
        replace(linear(f"model.layers.0.experts.{number}.w1", 64, 40), chosen_tokens=tokens)
        for number, tokens in enumerate((99, 100))
    )
    made = measurement(linears=(linear("b.1", 96, 5), few, many), curves={})
    made.save(tmp_path / "m.safetensors")
    again = Measurement.load(tmp_path / "m.safetensors")
    assert [x.chosen_tokens for x in (*again.linears, again.head)] == [None, 99, 100, None]
    assert again.experts_sentence == (
        "1 of 2 were chosen by fewer than 100 tokens, least: model.layers.0.experts.0 by 99"
    )
    assert measurement().experts_sentence is None


@pytest.mark.parametrize(
    "module", ["bpwise", "bpwise.cli", "bpwise.measure.measurement", "bpwise.convert.exl2.plan.plan"]
)
def test_no_torch_needed(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_planning_works_without_torch(tmp_path: Path) -> None:
    made = measurement()
    replace(made, curves={"exl2": replace(made.curves["one"], version=1)}).save(tmp_path / "m.safetensors")
    code = """
import sys
from pathlib import Path
sys.modules["torch"] = None  # importing it fails
from bpwise.measure.measurement import Measurement
from bpwise.convert.exl2.plan.making import make_exl2_plan
make_exl2_plan(Measurement.load(Path(sys.argv[1])), bpw=9.5, head_bits=6)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors")], check=True)
