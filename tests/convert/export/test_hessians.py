"""``measure --keep-hessians``: files by exllamav3's rules, with the Hessians of Transformers' own activations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.export.hessians import HessianFiles, packed_hessian
from bpwise.errors import UnsupportedModelError, WorkDirectoryError
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_to_file
from bpwise.measure.text.calibration import CalibrationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ...measured import Given
from ...tiny_models import save_family, save_with_vision

CONFIG = MeasureConfig(calibration=CalibrationConfig(rows=2, row_tokens=64), device="cpu")


def measure(model: Path, folder: Path, **changes: Any) -> Measurement:
    settings = {"formats": {"exl2": Given(Exl2Curves())}, "keeper": HessianFiles(folder / "hess", open_model(model))}
    return measure_to_file(model, folder / "m.safetensors", CONFIG, **{**settings, **changes})


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hessians")
    measure(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def exact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sums over all tokens, not over a random part of those that count little."""
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        everyone = lambda weights, _rng: (torch.arange(len(weights)), weights)  # noqa: E731
        patch.setattr("bpwise.measure.statistics.inputs.subsample_tokens", everyone)
        measure(tiny_model, folder)
    return folder


def unpacked(values: torch.Tensor, inputs: int) -> torch.Tensor:
    """A matrix from its upper triangle, row by row; padded to a multiple of 128."""
    n = -(-inputs // 128) * 128
    assert values.dtype == torch.float32 and values.shape == (n * (n + 1) // 2,)
    matrix = torch.zeros(n, n)
    matrix[tuple(torch.triu_indices(n, n))] = values
    assert not matrix[inputs:].any() and not matrix[:, inputs:].any()
    return (matrix + matrix.triu(1).T)[:inputs, :inputs]


def test_one_file_a_linear_and_the_rows(made: Path, tiny_model: Path) -> None:
    modules = AutoModelForCausalLM.from_pretrained(tiny_model).named_modules()
    linears = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert {path.name for path in (made / "hess").iterdir()} == {
        *(f"{name}.safetensors" for name in linears),
        "rows.safetensors",
    }
    rows = load_file(made / "hess" / "rows.safetensors")
    measured = Measurement.load(made / "m.safetensors")
    assert rows["input_ids"].dtype == torch.int32
    assert rows["input_ids"].numpy().tolist() == measured.tokens.tolist()
    # The converter looks at the first file whose name has "layers." in it, to learn what all hold.
    first = next(path for path in sorted((made / "hess").iterdir()) if "layers." in path.name)
    assert load_file(first).keys() == {"hin"}


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_hessian_is_that_of_the_inputs(exact: Path, tiny_model: Path, name: str) -> None:
    # Mean of x x^T with the weights of tokens that the measurement tells, x from Transformers.
    measured = Measurement.load(exact / "m.safetensors")
    (linear,) = (each for each in (*measured.linears, measured.head) if each.name == name)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.from_numpy(measured.tokens).long())
    inputs = seen[0].flatten(0, 1).double()
    weights = torch.from_numpy(linear.token_weights).flatten().double()
    expected = (inputs * weights[:, None]).T @ inputs / weights.sum()
    found = unpacked(load_file(exact / "hess" / f"{name}.safetensors")["hin"], linear.in_features).double()
    assert (found - expected).norm() < 2e-3 * expected.norm()  # the measurement keeps weights in float16


def test_the_measurement_is_the_same_without(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    measure(tiny_model, tmp_path, keeper=None)
    assert (tmp_path / "m.safetensors").read_bytes() == (made / "m.safetensors").read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_what_is_missing_is_made_again(
    made: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run without Hessians is killed, one with them goes on: the blocks that are measured lack theirs.
    save = ResumeStore.save

    def dying(store: ResumeStore, artifact: str, tensors: dict[str, torch.Tensor]) -> None:
        save(store, artifact, tensors)
        if artifact == "curves-0":
            raise Killed

    for keeper in (None, HessianFiles(tmp_path / "hess", open_model(tiny_model))):
        with monkeypatch.context() as patch:
            patch.setattr(ResumeStore, "save", dying)
            with pytest.raises(Killed):
                measure(tiny_model, tmp_path, keeper=keeper)
    assert (tmp_path / "hess" / "model.layers.0.mlp.up_proj.safetensors").exists()
    measure(tiny_model, tmp_path)
    (tmp_path / "hess" / "lm_head.safetensors").unlink()
    (tmp_path / "hess" / "model.layers.1.mlp.up_proj.safetensors").write_bytes(b"damaged")
    with pytest.raises(WorkDirectoryError, match="in the way"):
        measure(tiny_model, tmp_path)
    (tmp_path / "hess" / "model.layers.1.mlp.up_proj.safetensors").unlink()
    measure(tiny_model, tmp_path)  # which was finished but for these
    for folder in (tmp_path, made):
        assert len(list((folder / "hess").iterdir())) == 16
    for path in (made / "hess").iterdir():
        assert (tmp_path / "hess" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["mine.txt", "model.layers.0.mlp.up_proj.safetensors", "folder"])
def test_other_files_are_in_the_way(tiny_model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "hess").mkdir()
    (tmp_path / "hess" / name).mkdir() if name == "folder" else (tmp_path / "hess" / name).write_bytes(b"mine")
    with pytest.raises(WorkDirectoryError, match="in the way"):
        measure(tiny_model, tmp_path)
    assert [path.name for path in (tmp_path / "hess").iterdir()] == [name]


def test_other_rows_are_another_measurement(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    keeper = HessianFiles(made / "hess", open_model(tiny_model))
    config = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=64), device="cpu")
    with pytest.raises(WorkDirectoryError, match="not of this measurement"):
        measure_to_file(tiny_model, tmp_path / "m", config, formats={"exl2": Given(Exl2Curves())}, keeper=keeper)


def test_an_expert_that_no_token_reached() -> None:
    assert torch.equal(unpacked(packed_hessian(torch.zeros(3, 3)), 3), torch.eye(3))


# Names


@pytest.fixture
def saved(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    return lambda family: save_family(tmp_path / family, family, byte_tokenizer)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("phi3", "model.layers.0.self_attn.q_proj"),  # a part of qkv_proj: exllamav3 takes it apart, too
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2"),
        ("qwen2_moe", "model.layers.1.mlp.experts.0.gate_proj"),
    ],
)
def test_names_are_those_of_checkpoints(saved: Callable[[str], Path], tmp_path: Path, family: str, key: str) -> None:
    files = HessianFiles(tmp_path / "hess", open_model(saved(family)))
    assert files._file(key) == tmp_path / "hess" / f"{key}.safetensors"


def test_names_inside_of_another_model(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = open_model(save_with_vision(tmp_path / "model", "mistral3", byte_tokenizer))
    files = HessianFiles(tmp_path / "hess", model)
    key = files._file("model.layers.0.mlp.up_proj").name.removesuffix(".safetensors")
    assert f"{key}.weight" in model.names
    assert key != "model.layers.0.mlp.up_proj"


def test_names_that_cannot_be_mapped(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bpwise.checkpoint.source.language.LanguageModel.stored_name",
        lambda _model, parameter: parameter.replace("mlp", "feed_forward"),
    )
    with pytest.raises(UnsupportedModelError, match="feed_forward"):
        HessianFiles(tmp_path / "hess", open_model(tiny_model))
