import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.measure.layers import attention
from bpwise.measure.layers.attention import MaskRule, attention_for
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LOCAL_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}


def both(kind: str, **settings: Any) -> tuple[Any, Any]:
    """The same random model with Transformers' own plain attention, and with ours."""
    config = CONFIG_MAPPING[kind](**{**SIZES, **settings})
    name = attention_for(AutoModelForCausalLM._model_mapping[type(config)])
    models = []
    for implementation in ("eager", name):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float64)
        models.append(model.eval())
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def logits_and_gradient(model: Any, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    embedded = torch.randn(rows, tokens, 32, generator=rng, dtype=torch.float64).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=rng, dtype=torch.float64))
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 7}),
        ("mistral", {"sliding_window": 40}),
        ("qwen2", {"use_sliding_window": True, **LOCAL_AND_FULL}),
        ("gemma2", {**LOCAL_AND_FULL, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4}),
        ("gemma3_text", LOCAL_AND_FULL),
        ("cohere2", LOCAL_AND_FULL),
    ],
    ids=["llama", "mistral", "window-as-long-as-the-row", "qwen2", "gemma2", "gemma3", "cohere2"],
)
@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "parts"])
def test_as_plain_attention(
    kind: str, settings: dict[str, Any], in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_parts:
        monkeypatch.setattr(attention, "_WHOLE_MASK", 0)
        monkeypatch.setattr(attention, "_MOST_QUERIES", 6)  # of 40: parts, the last of them shorter
    plain, ours = both(kind, **settings)
    for expected, got in zip(logits_and_gradient(plain, 2, 40), logits_and_gradient(ours, 2, 40), strict=True):
        # Float64 sums in another order; norms and rotary embeddings are computed in float32 on either side.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_keys_within_reach_only() -> None:
    rule = MaskRule(lambda _row, _head, query, key: (key <= query) & (key > query - 5), 3, 100, 5, "cpu")
    keys, mask = rule.seen(20, 24)
    assert keys == slice(16, 24)
    expected = torch.tensor([[q - 5 < k <= q for k in range(16, 24)] for q in range(20, 24)])
    assert mask.shape == (3, 1, 4, 8)
    assert all(torch.equal(mask[row, 0], expected) for row in range(3))


def test_classes_that_choose_for_themselves() -> None:
    from transformers import GPTJForCausalLM, LlamaForCausalLM, StableLmForCausalLM

    assert attention_for(LlamaForCausalLM) == "bpwise"
    assert attention_for(StableLmForCausalLM) == "sdpa"
    assert attention_for(GPTJForCausalLM) == "eager"


LONG = """
import resource, sys
from pathlib import Path
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.eval.comparison import EvalConfig, compare_models
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.measure.run import MeasureConfig, measure_checkpoint

torch.set_num_threads(1)
tokens = torch.randint(0, 64, (1, 34000), generator=torch.Generator().manual_seed(0))
rows = CalibrationSet(tokens=tokens, origins=("random",), description="random ids", adds_bos=False)
model, other = (open_model(Path(path)) for path in sys.argv[1:3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measured = measure_checkpoint(model, rows, MeasureConfig(device="cpu"), [Exl2Curves()], Path(sys.argv[3]))
assert measured.linears[0].token_weights.shape == (1, 34000)
found = compare_models(model, other, rows, EvalConfig(device="cpu"))
assert (found.profile.positions[-1].first, found.profile.positions[-1].last) == (32768, 33999)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_rows_beyond_32k_in_little_memory(tmp_path: Path) -> None:
    settings = {**SIZES, "max_position_embeddings": 1 << 16, "sliding_window": 4096, "head_dim": 16}
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING["mistral"](**{**settings, "hidden_size": 64, "intermediate_size": 512})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("model", "other", "work")]
    run = subprocess.run(
        [sys.executable, "-c", LONG, *arguments], capture_output=True, text=True, check=False, timeout=1200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    # A mask of 34000 x 34000 is 1.1 GB in bools alone, 4.3 GB as the kernel wants it; the scores of a head as much.
    assert int(run.stdout) < 900, f"{run.stdout} MiB"
