"""One bit is flipped at random places of every piece that is stored: it is noticed and told, or it changes nothing.

The places come from a seed. `make test` tries a few of each piece, `make test-slow` two hundred.
"""

import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.original import open_model
from bpwise.cli import cli
from bpwise.convert.gguf import base as gguf_base
from bpwise.convert.gguf.file.metadata import DIGEST_KEY, DIGEST_ROOM, RUN_KEY
from bpwise.convert.gguf.file.writer import write_gguf
from bpwise.convert.opening import verify_model
from bpwise.convert.registry import load_plan
from bpwise.errors import BpwiseError, BpwiseWarning
from bpwise.eval.cache import OriginalCache, OriginalState
from bpwise.measure.measurement import Measurement
from bpwise.measure.text.calibration import CalibrationSet
from click.testing import CliRunner
from safetensors.numpy import load_file

from .conftest import Converted

PLACES = [pytest.param(24, id="few"), pytest.param(200, id="all", marks=pytest.mark.slow)]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stored file.

    Attributes:
        path: The file.
        use: Uses what is stored, and returns all that it gives; raises a BpwiseError or warns of damage.
    """

    path: Path
    use: Callable[[], Any]


def flip_and_use(piece: Piece, places: int) -> tuple[int, int]:
    """Flip a bit at each place; returns how often that was noticed, and how often nothing had changed."""
    content = piece.path.read_bytes()
    beside = {path: path.read_bytes() for path in piece.path.parent.iterdir() if path.is_file()}
    expected = piece.use()
    rng = random.Random(piece.path.name)
    noticed = harmless = 0
    for _ in range(places):
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        piece.path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", BpwiseWarning)
                found = piece.use()
        except (BpwiseError, BpwiseWarning) as told:
            assert str(told).isprintable()
            noticed += 1
        else:
            assert found == expected, (
                f"bit {bit} of byte {at} of {piece.path.name} changes what is used, and is not noticed"
            )
            harmless += 1
        for path, data in beside.items():  # what is damaged may be deleted
            path.write_bytes(data)
    return noticed, harmless


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of a safetensors file, as its own library reads them."""
    return {name: (str(each.dtype), each.shape, each.tobytes()) for name, each in load_file(path).items()}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measurement, a plan and an output."""
    folder = tmp_path_factory.mktemp("run")
    rows = ["--rows", "2", "--row-tokens", "32"]
    for command in (
        ["measure", str(tiny_model), "-o", str(folder / "m.safetensors"), "--formats", "exl2", *rows],
        ["plan", str(folder / "m.safetensors"), "--bpw", "4", "-o", str(folder / "plan.json")],
        [
            "quantize",
            str(tiny_model),
            str(folder / "out"),
            "--bpw",
            "4",
            "-m",
            str(folder / "m.safetensors"),
            "--no-eval",
        ],
    ):
        result = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("places", PLACES)
class TestFlippedBits:
    def test_measurement(self, run: Path, tmp_path: Path, places: int) -> None:
        path = shutil.copy(run / "m.safetensors", tmp_path / "m.safetensors")
        noticed, _ = flip_and_use(Piece(path=path, use=lambda: Measurement.load(path).to_bytes()), places)
        assert noticed > 0.9 * places

    def test_calibration_set(self, run: Path, tmp_path: Path, places: int) -> None:
        path = shutil.copy(run / "out.work" / "calibration.safetensors", tmp_path / "c.safetensors")

        def use() -> Any:
            rows = CalibrationSet.load(path)
            return rows.tokens.tolist(), rows.fingerprint, rows.description

        flip_and_use(Piece(path=path, use=use), places)

    def test_plan(self, run: Path, tmp_path: Path, places: int) -> None:
        path = shutil.copy(run / "plan.json", tmp_path / "plan.json")
        noticed, _ = flip_and_use(Piece(path=path, use=lambda: load_plan(path)), places)
        assert noticed > 0.9 * places

    def test_resume_artifact(self, tmp_path: Path, places: int) -> None:
        rng = torch.Generator().manual_seed(0)
        ResumeStore(tmp_path, "step", {"a": 1}).save("block", {"x": torch.randn(20, generator=rng), "y": torch.ones(3)})
        (path,) = tmp_path.glob("step-*/block.safetensors")

        def use() -> Any:
            loaded = ResumeStore(tmp_path, "step", {"a": 1}).load("block")
            return {name: tensor.tolist() for name, tensor in loaded.items()}

        flip_and_use(Piece(path=path, use=use), places)

    def test_cached_passes_of_the_original(self, tmp_path: Path, places: int) -> None:
        rng = torch.Generator().manual_seed(0)
        state = OriginalState(
            hidden=torch.randn(2, 4, 8, generator=rng),
            trace=torch.randn(3, 2, 2, 8, generator=rng),
            floor_nats=1e-6,
            bfloat16_nats=1e-3,
            floor_tokens=8,
        )
        OriginalCache(tmp_path).save("key", state)
        (path,) = tmp_path.iterdir()

        def use() -> Any:
            found = OriginalCache(tmp_path).load("key")
            if found is None:  # computed again
                raise BpwiseError("damaged")
            numbers = found.floor_nats, found.bfloat16_nats, found.floor_tokens
            return found.hidden.tolist(), found.trace.tolist(), numbers

        flip_and_use(Piece(path=path, use=use), places)

    @pytest.mark.parametrize("name", ["output.safetensors", "bpwise.json"])
    def test_exl2_output(self, name: str, run: Path, tmp_path: Path, places: int) -> None:
        output = shutil.copytree(run / "out", tmp_path / "out")

        def use() -> Any:
            verify_model(output)
            return stored(output / "output.safetensors")

        noticed, _ = flip_and_use(Piece(path=output / name, use=use), places)
        assert noticed > 0.8 * places

    def test_gguf_output(self, converted: dict[str, Converted], tmp_path: Path, places: int) -> None:
        gguf = pytest.importorskip("gguf", reason="reads GGUF files")
        path = tmp_path / "out.gguf"
        metadata = {RUN_KEY: "0" * 32, DIGEST_KEY: DIGEST_ROOM}
        write_gguf(converted["mistral"].file, path, {}, file_type=0, metadata=metadata)

        def use() -> Any:
            assert verify_model(path).compared
            reader = gguf.GGUFReader(path)
            return {tensor.name: np.array(tensor.data).tobytes() for tensor in reader.tensors}

        noticed, _ = flip_and_use(Piece(path=path, use=use), places)
        assert noticed > 0.9 * places

    def test_unquantized_gguf_file(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int
    ) -> None:
        def make(_checkpoint: Any, path: Path, *, check: Callable[[Path], object], **_: Any) -> None:
            path.write_bytes(bytes(range(256)) * 4)
            check(path)

        monkeypatch.setattr(gguf_base, "make_base", make)
        monkeypatch.setattr(gguf_base, "check_base", lambda *_args, **_kwargs: [])
        monkeypatch.setattr(gguf_base, "converter_digest", lambda _: "0" * 32)
        checkpoint = open_model(str(tiny_model))
        path = gguf_base.base_path(checkpoint, tmp_path, None)
        gguf_base.converted(checkpoint, path, None)
        piece = Piece(path=path, use=lambda: gguf_base.base_path(checkpoint, tmp_path, None).read_bytes())
        assert flip_and_use(piece, places) == (places, 0)
