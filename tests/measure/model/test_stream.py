import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.errors import CheckpointError, NumericalError, UnsupportedModelError
from bpwise.measure.model.batches import check_finite, micro_batches
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.model.whole import whole_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_model(directory: Path, config: PreTrainedConfig) -> Path:
    """A random model whose norms and biases are random too."""
    model = AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(directory)
    return directory


def configs() -> dict[str, PreTrainedConfig]:
    small_window = {**SIZES, "sliding_window": 8}
    return {
        "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-rope-llama3": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500.0, **LLAMA3}),
        "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2-window-in-one-layer": Qwen2Config(**small_window, use_sliding_window=True, max_window_layers=1),
        "qwen3-wide-heads": Qwen3Config(**SIZES, head_dim=32),
        "mistral": MistralConfig(**SIZES),
        "mistral-window": MistralConfig(**small_window),
    }


@pytest.fixture(params=configs())
def model_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", configs()[request.param])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", configs()["llama"])


def tokens(rows: int = 5, length: int = 32) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def stream(directory: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint.open(directory), device=CPU, dtype=dtype)


def streamed_logits(model: StreamedModel, ids: Tensor) -> Tensor:
    hidden = model.embed(ids)
    batches = micro_batches(*ids.shape)
    with torch.no_grad():
        for index in range(model.block_count):
            with model.block(index):
                for batch in batches:
                    hidden[batch] = model.run_block(index, hidden[batch])
        with model.tail():
            return torch.cat([model.logits(hidden[batch]) for batch in batches])


def reference_logits(directory: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_same_logits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    # Float32, the same operations; other batch sizes may sum in another order.
    assert float((got - expected).abs().max()) < 3e-6 * float(expected.abs().max())


def test_logits_are_those_of_transformers(model_directory: Path) -> None:
    ids = tokens()
    assert_same_logits(streamed_logits(stream(model_directory), ids), reference_logits(model_directory, ids))


def test_whole_model_is_that_of_transformers(model_directory: Path) -> None:
    ids = tokens()
    source = Checkpoint.open(model_directory)
    model = whole_model(source, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        assert_same_logits(model(ids).logits, reference_logits(model_directory, ids))
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) == source.tied_embeddings


@pytest.mark.parametrize("rows", [1, 4, 5], ids=["one-row", "whole-batches", "short-last-batch"])
def test_micro_batches(llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", 64)
    assert [batch.stop - batch.start for batch in micro_batches(rows, 32)] == [2] * (rows // 2) + [1] * (rows % 2)
    ids = tokens(rows)
    assert_same_logits(streamed_logits(stream(llama), ids), reference_logits(llama, ids))


@pytest.mark.parametrize(
    ("rows", "row_tokens", "expected"),
    [
        (1, 2048, [(0, 1)]),
        (3, 2048, [(0, 1), (1, 2), (2, 3)]),
        (3, 5000, [(0, 1), (1, 2), (2, 3)]),
        (7, 600, [(0, 3), (3, 6), (6, 7)]),
        (4, 1, [(0, 4)]),
    ],
)
def test_cutting_into_micro_batches(rows: int, row_tokens: int, expected: list[tuple[int, int]]) -> None:
    assert [(batch.start, batch.stop) for batch in micro_batches(rows, row_tokens)] == expected


def test_windows_matter_here(tmp_path: Path) -> None:
    # Else the tests with windows would prove nothing.
    directory = save_model(tmp_path / "model", configs()["mistral-window"])
    ids = tokens()
    windowed = reference_logits(directory, ids)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert float((reference_logits(directory, ids) - windowed).abs().max()) > 0.1


def test_rope_keys_of_older_checkpoints(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", configs()["llama-rope-llama3"])
    ids = tokens()
    expected = reference_logits(directory, ids)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": LLAMA3}))
    assert_same_logits(streamed_logits(stream(directory), ids), expected)


def test_rotary_frequencies_stay_in_float32(llama: Path) -> None:
    ids = tokens()
    expected = reference_logits(llama, ids, torch.bfloat16).float()
    got = streamed_logits(stream(llama, torch.bfloat16), ids)
    assert got.dtype == torch.bfloat16
    # The same operations in bfloat16; another order of summation shows as single roundings (2^-8), rarely.
    assert float((got.float() - expected).abs().mean()) < 1e-3 * float(expected.abs().mean())


def real_parameters() -> dict[int, int]:
    """Elements of every parameter that is alive and holds data, by identity."""
    gc.collect()
    return {id(thing): thing.numel() for thing in gc.get_objects() if type(thing) is nn.Parameter and not thing.is_meta}


@contextmanager
def loaded_elements() -> Iterator[Any]:
    """Counts the elements of real parameters that have been made since."""
    before = real_parameters()
    yield lambda: sum(size for key, size in real_parameters().items() if key not in before)


def test_one_block_in_memory_at_a_time(llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(llama)
    block_size = sum(p.numel() for p in reference.model.layers[0].parameters())
    tail_size = sum(p.numel() for part in (reference.model.norm, reference.lm_head) for p in part.parameters())
    del reference
    ids = tokens(2)
    with loaded_elements() as loaded:
        model = stream(llama)
        assert loaded() == 0
        hidden = model.embed(ids)
        assert loaded() == 0
        for index in range(model.block_count):
            with torch.no_grad(), model.block(index) as block:
                seen = []
                handle = block.register_forward_hook(lambda *_, seen=seen: seen.append(loaded()))
                hidden = model.run_block(index, hidden)
                handle.remove()
                assert seen == [block_size]
            assert loaded() == 0
        with torch.no_grad(), model.tail() as head:
            assert head.weight.shape == (SIZES["vocab_size"], SIZES["hidden_size"])
            model.logits(hidden)
            assert loaded() == tail_size + SIZES["hidden_size"]  # and one embedding
        assert loaded() == 0


def test_weights_go_after_an_exception(llama: Path) -> None:
    model = stream(llama)
    with pytest.raises(ZeroDivisionError), model.block(1) as block:
        weight = weakref.ref(block.self_attn.q_proj.weight)
        raise ZeroDivisionError
    gc.collect()
    assert weight() is None
    assert block.self_attn.q_proj.weight.is_meta


def test_only_what_is_needed_is_read(llama: Path) -> None:
    read: list[str] = []

    class Watched(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            read.append(name)
            return super().tensor(name)

    model = StreamedModel(Watched.open(llama), device=CPU, dtype=torch.float32)
    assert read == []
    model.embed(tokens(1))
    assert read == ["model.embed_tokens.weight"]
    read.clear()
    with model.block(1):
        assert read
        assert all(name.startswith("model.layers.1.") for name in read)
    read.clear()
    with model.block(0, 1):  # on a CPU none is read ahead: the cores that would are those that compute
        assert all(name.startswith("model.layers.0.") for name in read)
    assert not any(name.startswith("model.layers.1.") for name in read)
    read.clear()
    with model.tail():
        model.logits(torch.zeros(1, 2, SIZES["hidden_size"]))
        assert sorted(read) == ["lm_head.weight", "model.norm.weight"]


def test_backward_goes_through_a_block(llama: Path) -> None:
    ids = tokens(2)
    reference = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="sdpa")
    inputs: list[Tensor] = []

    def keep_input(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        inputs[-1].retain_grad()

    reference.model.layers[1].register_forward_pre_hook(keep_input, with_kwargs=True)
    outputs: list[Tensor] = []
    reference.model.layers[1].register_forward_hook(lambda _m, _a, output: outputs.append(output))
    reference(input_ids=ids, use_cache=False)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    outputs[0].backward(direction)

    model = stream(llama)
    model.embed(ids)
    start = inputs[0].detach().requires_grad_()
    with model.block(1):
        model.run_block(1, start).backward(direction)
    assert inputs[0].grad is not None and start.grad is not None
    assert torch.allclose(start.grad, inputs[0].grad, atol=1e-5)  # values around 1, float32


@pytest.mark.parametrize("model_type", ["no_such_model", None])
def test_unknown_model_type(llama: Path, model_type: str | None) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=rf"does not know model_type '?{model_type}'?"):
        stream(llama)


def test_model_type_that_only_transformers_lacks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpwise.checkpoint.model import families

    monkeypatch.setitem(families._FAMILIES, "llama99", families._FAMILIES["llama"])
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "llama99"}))
    with pytest.raises(UnsupportedModelError, match="does not know model_type 'llama99'"):
        stream(llama)


def test_weights_that_the_config_contradicts(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(
        CheckpointError, match=r"Got shape \(96, 64\) for \S+mlp\.gate_proj\.weight. Expected \(128, 64\)"
    ):
        stream(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_names_the_place(value: float) -> None:
    tensor = torch.zeros(3, 4)
    check_finite(tensor, "model.layers.7")
    tensor[1, 2] = value
    with pytest.raises(NumericalError, match=r"^model\.layers\.7: NaN or infinity"):
        check_finite(tensor, "model.layers.7")
