from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.statistics.embedding_gradients import embedding_gradients
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("kind", "settings", "factor"),
    [
        ("llama", {}, 1.0),
        ("gemma", {}, 32**0.5),
        ("gemma2", {}, 32**0.5),
        ("gemma3_text", {"sliding_window": 4}, 32**0.5),
        ("granite", {"embedding_multiplier": 12.0}, 12.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_as_autograd_through_the_whole_model(
    kind: str, settings: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **settings}))
    model.eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randperm(44, generator=torch.Generator().manual_seed(1))[:36].view(2, 18) + 4  # each once, no padding
    seen = {}
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    seen["hidden"].retain_grad()
    logits.square().sum().backward()
    at_block = seen["hidden"].grad
    expected = model.get_input_embeddings().weight.grad[ids]
    assert float(expected.abs().max()) > 0
    streamed = StreamedModel(open_model(tmp_path / "model"), device=torch.device("cpu"), dtype=torch.float32)
    got = embedding_gradients(streamed, ids, at_block)["model.embed_tokens"]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got, factor * at_block, rtol=1e-4, atol=1e-6)
    # Nothing is left behind: the model embeds as before.
    torch.testing.assert_close(streamed.embed(ids), seen["hidden"].detach())
