import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.errors import CheckpointError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.saved_decoders import save_decoder

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"

MakeModel = Callable[..., Path]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_adapter(directory: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    default = {f"{PREFIX}{Q}.lora_A.weight": normal(2, 32), f"{PREFIX}{Q}.lora_B.weight": normal(32, 2, seed=1)}
    save_file(default if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 3.0), ({"use_rslora": True}, 6 / math.sqrt(2)), ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, 0.5)],
    ids=["plain", "rank-stabilized", "alpha-pattern"],
)
def test_formula(options: dict[str, Any], scale: float, make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("base")
    merged = open_model(base, lora=make_adapter(tmp_path / "a", **options))
    plain = tensors_of(base)
    change = normal(32, 2, seed=1).double() @ normal(2, 32).double()
    # Products of float32 numbers around 1: 1e-5 is a hundred roundings.
    expected = plain[f"{Q}.weight"].double() + scale * change
    torch.testing.assert_close(merged.tensor(f"{Q}.weight").double(), expected, rtol=0, atol=1e-5)
    for name in plain.keys() - {f"{Q}.weight"}:
        assert torch.equal(merged.tensor(name), plain[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT 0.21 asks Transformers by a name that it gives up
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["v_proj", "o_proj"], "use_dora": True},
        {"target_modules": ["k_proj", "embed_tokens"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["input_layernorm"], "layers_to_transform": [1]},
    ],
    ids=["patterns", "all-linear", "dora", "embedding", "saved-head", "saved-norm"],
)
def test_as_peft_merges(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is what adapters are made with")
    from transformers import AutoModelForCausalLM

    base = make_model("base")
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * normal(*parameter.shape, seed=number))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = model.merge_and_unload().state_dict()
    merged = open_model(base, lora=tmp_path / "adapter")
    assert merged.names == expected.keys()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in tensors_of(base).items())
    for name in merged.names:
        # The same float32 formula, maybe in another order.
        torch.testing.assert_close(merged.tensor(name), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_stored_transposed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    weight = normal(3, 5, seed=2)  # (in, out)
    save_file({"h.0.c_attn.weight": weight}, base / "model.safetensors")
    parts = {f"{PREFIX}h.0.c_attn.lora_A.weight": normal(2, 3), f"{PREFIX}h.0.c_attn.lora_B.weight": normal(5, 2)}
    merged = open_model(base, lora=make_adapter(tmp_path / "a", parts, fan_in_fan_out=True))
    expected = weight + 3 * (normal(5, 2) @ normal(2, 3)).T
    torch.testing.assert_close(merged.tensor("h.0.c_attn.weight"), expected)


@pytest.mark.parametrize("name", ["gpt2", "nemotron_h_moe"])
def test_stored_under_other_names_than_in_memory(name: str, tmp_path: Path) -> None:
    # As on the Hub: gpt2 without the prefix of its class, Nemotron-H under an older one.
    changed = {"gpt2": "transformer.h.1.attn.c_attn", "nemotron_h_moe": "model.layers.1.mixer.shared_experts.up_proj"}[
        name
    ]
    model = save_decoder(tmp_path / "base", name)
    file = tmp_path / "base" / "model.safetensors"
    weights = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert f"{changed}.weight" not in weights
    outputs, inputs = model.get_parameter(f"{changed}.weight").shape[:: -1 if name == "gpt2" else 1]
    low = {"lora_A": normal(2, inputs), "lora_B": normal(outputs, 2, seed=1)}
    adapter = {f"{PREFIX}{changed}.{part}.weight": tensor for part, tensor in low.items()}
    merged = open_model(tmp_path / "base", lora=make_adapter(tmp_path / "a", adapter, fan_in_fan_out=name == "gpt2"))
    change = 3 * low["lora_B"] @ low["lora_A"]
    expected = model.get_parameter(f"{changed}.weight").float() + (change.T if name == "gpt2" else change)
    got = language_model(merged).parameter(f"{changed}.weight")
    torch.testing.assert_close(got, expected.detach().bfloat16())  # float32 in another order, then rounded
    assert merged.names == weights.keys()


class TestTiedHead:
    def test_a_saved_head_becomes_one_of_its_own(self, make_model: MakeModel, tmp_path: Path) -> None:
        base = make_model("base", tie_word_embeddings=True)
        assert HEAD not in tensors_of(base)
        head = normal(264, 32, seed=3)
        merged = open_model(base, lora=make_adapter(tmp_path / "a", {f"{PREFIX}{HEAD}": head}))
        assert not merged.tied_embeddings
        assert torch.equal(merged.tensor(HEAD), head)
        assert torch.equal(merged.tensor(EMBED), tensors_of(base)[EMBED])
        assert merged.shape(HEAD) == (264, 32)

    def test_a_low_rank_head_starts_from_the_embeddings(self, make_model: MakeModel, tmp_path: Path) -> None:
        base = make_model("base", tie_word_embeddings=True)
        parts = {f"{PREFIX}lm_head.lora_A.weight": normal(2, 32), f"{PREFIX}lm_head.lora_B.weight": normal(264, 2)}
        merged = open_model(base, lora=make_adapter(tmp_path / "a", parts))
        expected = tensors_of(base)[EMBED] + 3 * normal(264, 2) @ normal(2, 32)
        torch.testing.assert_close(merged.tensor(HEAD), expected, rtol=1e-5, atol=1e-5)
        assert not merged.tied_embeddings

    def test_changed_embeddings_stay_the_head(self, make_model: MakeModel, tmp_path: Path) -> None:
        table = normal(264, 32, seed=3)
        merged = open_model(
            make_model("base", tie_word_embeddings=True), lora=make_adapter(tmp_path / "a", {f"{PREFIX}{EMBED}": table})
        )
        assert merged.tied_embeddings
        assert torch.equal(merged.tensor(EMBED), table)


class TestBesideVision:
    """The language model's tensors have one name on the Hub, another in memory, and adapters either."""

    HUB, MEMORY = "language_model.model.", "model.language_model."

    def base(self, directory: Path, prefix: str, **more: Tensor) -> Path:
        directory.mkdir()
        config = {"model_type": "gemma3", "text_config": {"tie_word_embeddings": True}}
        (directory / "config.json").write_text(json.dumps(config))
        stored = {"layers.0.self_attn.q_proj.weight": normal(6, 4, seed=2), "embed_tokens.weight": normal(9, 4, seed=3)}
        save_file({prefix + name: x for name, x in stored.items()} | more, directory / "model.safetensors")
        return directory

    @pytest.mark.parametrize("ours", [HUB, MEMORY], ids=["hub", "memory"])
    @pytest.mark.parametrize("theirs", [HUB, MEMORY], ids=["by-hub-names", "by-names-in-memory"])
    def test_a_linear(self, tmp_path: Path, ours: str, theirs: str) -> None:
        place = f"{PREFIX}{theirs}layers.0.self_attn.q_proj"
        parts = {f"{place}.lora_A.weight": normal(2, 4), f"{place}.lora_B.weight": normal(6, 2, seed=1)}
        base = self.base(tmp_path / "base", ours)
        merged = open_model(base, lora=make_adapter(tmp_path / "a", parts))
        assert merged.names == tensors_of(base).keys()
        expected = normal(6, 4, seed=2) + 3 * normal(6, 2, seed=1) @ normal(2, 4)
        torch.testing.assert_close(merged.tensor(f"{ours}layers.0.self_attn.q_proj.weight"), expected)
        assert merged.tied_embeddings

    @pytest.mark.parametrize("stored", [False, True], ids=["not-stored", "stored"])
    @pytest.mark.parametrize("theirs", ["lm_head", "language_model.lm_head"])
    def test_the_head_of_a_tied_model(self, tmp_path: Path, stored: bool, theirs: str) -> None:
        more = {"language_model.lm_head.weight": normal(9, 4, seed=3)} if stored else {}
        base = self.base(tmp_path / "base", self.HUB, **more)
        head = normal(9, 4, seed=5)
        merged = open_model(base, lora=make_adapter(tmp_path / "a", {f"{PREFIX}{theirs}.weight": head}))
        assert not merged.tied_embeddings
        name = "language_model.lm_head.weight" if stored else "lm_head.weight"
        assert torch.equal(merged.tensor(name), head)
        assert merged.names == tensors_of(base).keys() | {name}


def test_is_read_from_both_directories(make_model: MakeModel, tmp_path: Path) -> None:
    base, adapter = make_model("base"), make_adapter(tmp_path / "a")
    assert open_model(base, lora=adapter).directories == (base, adapter)


def test_kept_in_the_dtype_of_the_base(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("base")
    half = {name: tensor.bfloat16() for name, tensor in tensors_of(base).items()}
    save_file(half, base / "model.safetensors")
    merged = open_model(base, lora=make_adapter(tmp_path / "a"))
    change = 3 * (normal(32, 2, seed=1) @ normal(2, 32))
    expected = (half[f"{Q}.weight"].float() + change).bfloat16()
    assert merged.tensor(f"{Q}.weight").dtype == torch.bfloat16
    # Sums of products in another order may round to the neighbour: one step of bfloat16 is 2**-8.
    torch.testing.assert_close(merged.tensor(f"{Q}.weight"), expected, rtol=2**-8, atol=1e-6)


def test_over_float8(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": "llama", "torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(config))
    codes = (10 * normal(32, 32)).to(torch.float8_e4m3fn)
    save_file({f"{Q}.weight": codes, f"{Q}.weight_scale": torch.tensor(0.5)}, base / "model.safetensors")
    merged = open_model(base, lora=make_adapter(tmp_path / "a"))
    expected = 0.5 * codes.float() + 3 * (normal(32, 2, seed=1) @ normal(2, 32))
    torch.testing.assert_close(merged.tensor(f"{Q}.weight"), expected)
    assert merged.names == {f"{Q}.weight"}
    assert merged.changes["adapters"][0]["name"] == "a"


class TestFingerprint:
    def test_follows_base_and_adapter(self, make_model: MakeModel, tmp_path: Path) -> None:
        base = make_model("base")
        found = {
            open_model(base).fingerprint,
            open_model(base, lora=make_adapter(tmp_path / "a")).fingerprint,
            open_model(base, lora=make_adapter(tmp_path / "b", lora_alpha=7)).fingerprint,
            open_model(make_model("other", noise=0.1), lora=tmp_path / "a").fingerprint,
        }
        assert len(found) == 4
        assert open_model(base, lora=tmp_path / "a").fingerprint in found

    def test_a_single_weight_of_the_adapter_counts(self, make_model: MakeModel, tmp_path: Path) -> None:
        base = make_model("base")
        parts = {f"{PREFIX}{Q}.lora_A.weight": normal(2, 32), f"{PREFIX}{Q}.lora_B.weight": normal(32, 2)}
        one = open_model(base, lora=make_adapter(tmp_path / "a", parts)).fingerprint
        parts[f"{PREFIX}{Q}.lora_B.weight"][7, 1] += 1
        assert open_model(base, lora=make_adapter(tmp_path / "b", parts)).fingerprint != one


def test_sizes(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("base")
    merged, plain = open_model(base, lora=make_adapter(tmp_path / "a")), Checkpoint.open(base)
    assert (merged.total_bytes, merged.parameter_count) == (plain.total_bytes, plain.parameter_count)
    assert merged.directory == base


DOWN, UP = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (None, {"peft_type": "LOHA"}, "peft_type is 'LOHA'. Expected 'LORA'"),
        (None, {"bias": "all"}, "biases of its own"),
        (None, {"init_lora_weights": "pissa"}, "began as 'pissa'"),
        (None, {"lora_bias": True}, "lora_bias set to True"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication"),
        (None, {"r": 4}, r"Got \(2, 32\). Expected \(4, 32\)"),
        (None, {"r": "two"}, r"r: not a valid value\. Got 'two'\. Expected int \| null"),
        (None, {"r": None}, "r is None and lora_alpha 6.0 for"),
        (None, {"r": 0}, r"r: not a valid value\. Got 0\. Expected int >= 1"),
        (None, {"lora_alpha": float("nan")}, r"lora_alpha: not a valid value\. Got nan\. Expected float"),
        (None, {"lora_alpha": 10**400}, "lora_alpha: Number out of range"),
        (
            None,
            {"rank_pattern": ["q_proj"]},
            r"rank_pattern: not a valid value\. Got \['q_proj'\]\. Expected object \| null",
        ),
        (None, {"r": "\ud800"}, "not valid Unicode"),
        (
            None,
            {"rank_pattern": {"q_proj": 0}},
            r"rank_pattern\[\.\.\.\]: not a valid value\. Got a value out of range\. Expected int >= 1",
        ),
        (
            None,
            {"rank_pattern": {"q_proj": "x"}},
            r"rank_pattern\[\.\.\.\]: not a valid value\. Got str\. Expected int",
        ),
        (None, {"rank_pattern": {"(": 3}}, r"'\(' is not a valid pattern"),
        (None, {"rank_pattern": {"a{99999999999}": 3}}, "is not a valid pattern"),
        (None, {"use_dora": True}, "Expected .*magnitude"),
        ({}, {}, "no tensors"),
        ({DOWN: normal(2, 32)}, {}, "has tensors for .*down"),
        ({DOWN: normal(2, 16), UP: normal(32, 2)}, {}, r"Got \(2, 16\). Expected \(2, 32\)"),
        ({DOWN.replace("q_proj", "z_proj"): normal(2, 32)}, {}, "made for another model"),
        ({f"{PREFIX}{EMBED}": normal(265, 32)}, {}, r"Got \(265, 32\). Expected \(264, 32\)"),
        ({f"{PREFIX}{Q}.lora_E": normal(2, 1)}, {}, "made for another model"),
    ],
    ids=[
        *(
            "kind",
            "bias",
            "pissa",
            "lora-bias",
            "replication",
            "rank",
            "rank-is-text",
            "no-rank",
            "rank-0",
            "alpha-nan",
        ),
        *("alpha-huge", "patterns-are-a-list", "half-a-surrogate-pair", "rank-pattern-zero", "rank-pattern-text"),
        *("pattern", "repeated-too-often"),
        *("no-magnitude", "empty"),
        *("half", "narrow", "elsewhere", "larger-vocabulary", "unknown-part"),
    ],
)
def test_refused(
    tensors: dict[str, Tensor] | None, config: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        open_model(make_model("base"), lora=adapter)


def test_pickles_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        open_model(make_model("base"), lora=adapter)


def test_no_adapter_there(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter"):
        open_model(make_model("base"), lora=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no adapter. Got a directory without adapter_config\.json"):
        open_model(make_model("base"), lora=make_model("other"))


def test_values_that_are_no_numbers(make_model: MakeModel, tmp_path: Path) -> None:
    parts = {DOWN: torch.full((2, 32), float("nan")), UP: normal(32, 2)}
    merged = open_model(make_model("base"), lora=make_adapter(tmp_path / "a", parts))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        merged.tensor(f"{Q}.weight")
