"""Names of the files that belong to a model beside its config and weights: one list for all that moves models.

Downloads, outputs, converters, dequantized checkpoints and uploads take the same ones. The names are
those that Transformers' ``save_pretrained`` and mistral-common write, and those of licences and of the notices that
licences ask to hand on.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

__all__ = ["CARD_NAME", "CONFIG_FILE", "DOWNLOADED", "NOT_DOWNLOADED", "SETTINGS", "TEMPLATE_DIRECTORY", "is_side_file"]

CONFIG_FILE = "config.json"

CARD_NAME = "README.md"
"""Model card in a model's directory."""

TEMPLATE_DIRECTORY = "additional_chat_templates"
"""Where Transformers keeps chat templates other than the default one, each as NAME.jinja."""

SETTINGS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""JSON files in which Transformers looks for the names of code too."""

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer.jsonl",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
)

_TEMPLATES = ("*.jinja", "*system_prompt.txt")

_LEGAL = (
    "license*",
    "licence*",
    "copying*",
    "copyright*",
    "eula*",
    "notice*",
    "third*notice*",
    "*use*policy*",
    "*usage*policy*",
    "*terms*of*use*",
)

_FILES = (*SETTINGS, *_VOCABULARIES, *_TEMPLATES)
_PATTERNS = (*_FILES, *_LEGAL)

_TEXTS = (".txt", ".md", ".rst", ".htm", ".html", ".pdf", ".rtf", ".doc", ".docx", ".odt")
"""Ends that the names of legal texts may have: ``license_head.bin`` is no licence."""


def is_side_file(name: str) -> bool:
    """Return whether a name, relative to the model directory and with forward slashes, is that of a side file.

    Case does not count: licences come as LICENSE and as License.txt.
    """
    folder, _, last = name.lower().rpartition("/")
    if last.startswith("."):
        return False
    if folder:
        return folder == TEMPLATE_DIRECTORY and last.endswith(".jinja")
    _, dot, end = last.rpartition(".")
    patterns = _PATTERNS if not dot or end.isdigit() or last.endswith(_TEXTS) else _FILES
    return any(fnmatchcase(last, pattern) for pattern in patterns)


def _any_case(pattern: str) -> str:
    return "".join(f"[{sign.upper()}{sign}]" if sign.isalpha() else sign for sign in pattern)


DOWNLOADED = (
    CONFIG_FILE,
    "adapter_config.json",
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    f"{TEMPLATE_DIRECTORY}/*.jinja",
    *SETTINGS,
    *_VOCABULARIES,
    *map(_any_case, (*_TEMPLATES, *_LEGAL)),
)
"""What is asked of the Hub, as patterns of ``fnmatch``, whose asterisk goes across folders."""

NOT_DOWNLOADED = (
    "*/*.safetensors",
    "*/*.safetensors.index.json",
    "consolidated*.safetensors",
)
"""The same weights in other layouts: ``original/``, ``metal/``, Mistral's own."""
