from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.errors import CalibrationError, ConfigError
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.measure.text.chats import Prompt
from bpwise.measure.text.generation import WrittenRow, sample_rows
from bpwise.measure.text.mixture import SELF
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 264
BOS, EOS = 256, 257


def written(directory: Path, **options: int) -> Tensor:
    config = CalibrationConfig(source=SELF, **options)
    rows = calibration_rows(Checkpoint.open(directory), config, device="cpu")
    assert rows.description.startswith("written by the model itself")
    assert rows.adds_bos
    return rows.tokens


@pytest.fixture
def model_directory(make_model: Callable[..., Path]) -> Path:
    return make_model("model", vocab_size=VOCAB_SIZE)


def test_rows_have_the_shape_that_was_asked_for(model_directory: Path) -> None:
    tokens = written(model_directory, rows=35, row_tokens=12)  # more rows than are written together
    assert tokens.shape == (35, 12)
    assert bool((tokens[:, 0] == BOS).all())
    # Bytes and the end of text; neither BOS inside a row nor ids that no token has.
    assert bool(((tokens[:, 1:] < BOS) | (tokens[:, 1:] == EOS)).all())
    assert len(tokens[:, 1].unique()) > 25


def test_the_seed_decides(model_directory: Path) -> None:
    first, again, other = (written(model_directory, rows=4, row_tokens=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_follow_the_models_distribution(model_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    begun = [WrittenRow([65, 65]) for _ in range(400)]
    sample_rows(model, begun, 14, range(BOS), (), torch.Generator().manual_seed(0))
    rows = torch.tensor([row.ids for row in begun])
    # Without a cache and all at once: -log p of the tokens has the distribution's entropy as its mean.
    with torch.no_grad():
        logs = model(rows).logits[:, 1:-1, :BOS].double().log_softmax(dim=-1)
    surprise = -logs.gather(2, rows[:, 2:, None])[..., 0]
    entropy = -(logs.exp() * logs).sum(dim=-1)
    excess = surprise - entropy
    error = float(excess.std()) / excess.numel() ** 0.5
    assert abs(float(excess.mean())) < 4 * error
    # Far from uniform, of which log 256 would be the mean.
    assert float(entropy.mean()) < 5.3
    # The first tokens after the same beginning: each as often as its probability says.
    counts = torch.bincount(rows[:, 2], minlength=BOS).double()
    expected = 400 * logs[0, 0].exp()
    common = expected > 5
    assert float(((counts - expected).square() / expected)[common].sum()) < int(common.sum()) + 5 * (
        2 * int(common.sum()) ** 0.5 + 1
    )


def test_chats_are_answered_one_after_another(model_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    prompts = [
        Prompt(kind="chat, en", ids=(1, 2, 3)),
        Prompt(kind="code, de", ids=(4, 5)),
        Prompt(kind="a, b", ids=(6,)),
    ]
    rows = [WrittenRow([BOS], iter(prompts * 200)), WrittenRow([BOS, 9, 9, 9, 9, 9])]
    sample_rows(model, rows, 200, range(10, 40), {10, 11, 12}, torch.Generator().manual_seed(0))
    ids = rows[0].ids
    assert len(ids) == len(rows[1].ids) == 200
    assert ids[:4] == [BOS, 1, 2, 3]
    assert rows[1].ids[:6] == [BOS, 9, 9, 9, 9, 9]
    expected, place = [], 4  # behind every end of an answer, and nowhere else, comes the next prompt
    for prompt in prompts[1:] + prompts * 200:
        length = next((n for n, token in enumerate(ids[place:]) if token in (10, 11, 12)), None)
        if length is None:
            break
        assert all(13 <= token < 40 for token in ids[place : place + length])
        place += length + 1
        expected.append(prompt.kind)
        assert tuple(ids[place : place + len(prompt.ids)]) == prompt.ids[: 200 - place]
        place += len(prompt.ids)
        if place >= 200:
            break
    assert rows[0].kinds == ["chat, en", *expected]
    assert len(expected) > 5
    assert not rows[1].kinds


def test_answers_do_not_go_on_for_ever() -> None:
    prompts = iter([Prompt(kind="first", ids=(1,)), Prompt(kind="second", ids=(2, 2))])
    row = WrittenRow([], prompts)
    for _ in range(514):
        row.write(7, ())
    assert row.ids == [1, *[7] * 512, 2]
    assert row.kinds == ["first", "second"]


def test_columns_are_those_of_texts() -> None:
    with pytest.raises(ConfigError, match="need a text"):
        CalibrationConfig(source=SELF, column="text")


def test_a_model_that_cannot_be_loaded_is_named(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: object, **_options: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 16 GB")

    monkeypatch.setattr("bpwise.measure.text.generation.whole_model", no_memory)
    with pytest.raises(CalibrationError, match=r"cannot be loaded as a whole .*not enough memory"):
        written(model_directory, rows=1, row_tokens=8)


def test_a_first_token_beyond_the_embedding(make_model: Callable[..., Path]) -> None:
    directory = make_model("model", vocab_size=BOS)
    with pytest.raises(CalibrationError, match=r"Got token id 256. Expected ids below the vocabulary size 256"):
        written(directory, rows=1, row_tokens=8)
