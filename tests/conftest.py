import io
import json
import os
import pydoc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.gguf.llama_cpp import fetch
from bpwise.errors import ConfigError
from bpwise.eval import speed
from bpwise.linalg.work import Rates
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

MakeModel = Callable[..., Path]
SaveModel = Callable[..., Path]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the pretend device unless it is asked for.

    Once a process has a second device, its backward passes run in threads, and none may run in a fork of it any more.
    """
    asked = any("device" in argument for argument in config.args)
    return True if collection_path == Path(__file__).with_name("device") and not asked else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations keep the original's side: not where the user's are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def originals_run() -> Iterator[None]:
    """Runs do not find what other tests evaluated: tests count the passes over the original."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpwise.quantize.run.original_cache", lambda: None)
        yield


@pytest.fixture(autouse=True)
def untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands do not time the machine, which takes a second for every shape of a model, nor llama.cpp."""

    def no_engine(_: object) -> None:
        raise ConfigError("llama.cpp is not timed")

    if "timed" not in request.fixturenames:
        monkeypatch.setattr(Rates, "_timed", lambda *_args, **_kwargs: [1e-3])
        monkeypatch.setattr(speed, "load_library", no_engine)


@pytest.fixture
def timed() -> None:
    """Asked for where the machine is timed all the same."""


@pytest.fixture
def make_model(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """Saves a random two-layer Llama with a byte-level tokenizer beside it."""

    def build(
        name: str,
        *,
        noise: float = 0.0,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        vocab_size: int = 264,
        **config: object,
    ) -> Path:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **config}))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim == 2 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale + (1.0 if "norm" in key else 0.0))
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=rng))
            if change is not None:
                change(dict(model.named_parameters()))
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after a BOS token."""
    return byte_level_tokenizer()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """The same for what is no test."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="session", autouse=True)
def nothing_fetched() -> Iterator[None]:
    """Keeps tests from fetching llama.cpp's converter: `make` has done so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_URL", "http://127.0.0.1:9/")
        yield


def llama_cpp_dir() -> Path:
    """Where llama.cpp's converter is; skips the test if it, or what it imports, is missing."""
    directory = fetch.fetched_converter()
    if directory is None:
        pytest.skip(f"llama.cpp's converter is not in {fetch.data_directory()}: run `make` to fetch it")
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    return directory


def convert_to_gguf(pairs: Sequence[tuple[Path, Path]], *, outtype: str = "f32") -> None:
    """Run llama.cpp's converter on model directories, all in one process: it takes seconds to start."""
    directory = llama_cpp_dir()
    code = """
import json, runpy, sys
pairs, outtype = json.loads(sys.argv[1]), sys.argv[2]
for source, target in pairs:
    sys.argv = ["convert", source, "--outfile", target, "--outtype", outtype]
    runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
    arguments = json.dumps([(str(source), str(target)) for source, target in pairs])
    # The converter has packages of its own, some with names that others have: a process and a path of its own.
    run = subprocess.run(
        [sys.executable, "-c", code, arguments, outtype],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


_GGUF_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# For the models that run on long rows, where attention is all of the time.
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}

GGUF_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gradient": (
        "llama",
        {
            **_TWO_HEADS,
            "max_position_embeddings": 1048576,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3580165449.0},
        },
    ),
    "llama3": (
        "llama",
        {
            **_TWO_HEADS,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        },
    ),
    "llama3-other": (
        "llama",
        {"rope_parameters": {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 1024}},
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "three-heads": (
        "mistral",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
"""Small random models that llama.cpp's converter converts: model types, and what differs from ``_GGUF_SIZES``."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint, and the GGUF file that llama.cpp's converter made of it in float32."""

    directory: Path
    file: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """All of ``GGUF_MODELS``, saved and converted."""
    llama_cpp_dir()
    folder = tmp_path_factory.mktemp("converted")
    models = {name: Converted(folder / name, folder / f"{name}.gguf") for name in GGUF_MODELS}
    tokenizer = _sentencepiece_model(_GGUF_SIZES["vocab_size"])
    for name, (model_type, changes) in GGUF_MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_GGUF_SIZES, **changes}))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2 + (1.0 if "norm" in key else 0.0))
        model.save_pretrained(models[name].directory)
        (models[name].directory / "tokenizer.model").write_bytes(tokenizer)
    convert_to_gguf([(model.directory, model.file) for model in models.values()])
    return models


def _sentencepiece_model(vocab_size: int) -> bytes:
    import sentencepiece

    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pydoc.__doc__.splitlines()),
        model_writer=target,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        minloglevel=2,
    )
    return target.getvalue()


@pytest.fixture(scope="session")
def save_model(byte_tokenizer: PreTrainedTokenizerFast) -> SaveModel:
    """Saves a random two-layer model with a byte-level tokenizer beside it."""

    def save(
        directory: Path,
        *,
        kind: type[PreTrainedConfig] = LlamaConfig,
        seed: int = 0,
        change: Callable[[Any], None] | None = None,
        **settings: Any,
    ) -> Path:
        sizes = {
            "vocab_size": 264,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        model = AutoModelForCausalLM.from_config(kind(**{**sizes, **settings}))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
            if change is not None:
                change(model)
        model.save_pretrained(directory)
        byte_tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_model(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test may change."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")
