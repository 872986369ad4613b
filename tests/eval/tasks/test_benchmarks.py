"""Benchmarks by lm-eval, on questions in local files, against answers counted with Transformers alone."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.cli import cli
from bpwise.errors import BpwiseWarning, CalibrationError, ConfigError
from bpwise.eval.tasks.benchmarks import TaskConfig, evaluate_tasks, load_tasks
from bpwise.eval.tasks.scores import TaskScore, task_scores
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="benchmarks are run by lm-eval: pip install '.[tasks]'")


MakeModel = Callable[..., Path]
QUESTIONS = 24
NEW_TOKENS = 3

CHOICE = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""

GENERATE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{goal}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""

GROUP = """
group: both
task: [pick, write]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true, filter_list: none}
metadata: {version: 3.0}
"""


@dataclass(frozen=True)
class Question:
    question: str
    choices: list[str]
    answer: int
    goal: str


class Naive:
    """A model asked one question after the other, without batches, caches or lm-eval."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def picks(self, question: str, choices: Sequence[str]) -> tuple[int, int]:
        """The likeliest choice, and the likeliest for each of its letters."""
        nats = []
        for choice in choices:
            start, whole = self.tokenizer(question)["input_ids"], self.tokenizer(f"{question} {choice}")["input_ids"]
            with torch.no_grad():
                logs = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            nats.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        return int(np.argmax(nats)), int(np.argmax([nat / len(c) for nat, c in zip(nats, choices, strict=True)]))

    def writes(self, question: str) -> str:
        ids = self.tokenizer(question)["input_ids"]
        new: list[int] = []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text.split("\n", maxsplit=1)[0]


@pytest.fixture(autouse=True)
def only_own_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding lm-eval's own 14000 definitions takes 10 seconds."""
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", partial(lm_eval_tasks.TaskManager, include_defaults=False))


@pytest.fixture
def models(make_model: MakeModel) -> tuple[Path, Path]:
    return make_model("original"), make_model("quantized", noise=0.05)


@pytest.fixture
def questions(models: tuple[Path, Path]) -> list[Question]:
    """The original's own writing is the goal of every other question, so that neither score is 0 or 1."""
    naive, rng = Naive(models[0]), np.random.default_rng(0)
    made = []
    for number in range(QUESTIONS):
        words = ["".join(rng.choice(list("abcdef"), size)) for size in (6, 2, 3, 5, 4)]
        goal = naive.writes(words[0]) if number % 2 else "nothing"
        made.append(Question(words[0], words[1:], int(rng.integers(4)), goal))
    return made


@pytest.fixture
def definitions(questions: list[Question], tmp_path: Path) -> Path:
    folder = tmp_path / "definitions"
    folder.mkdir()
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(vars(each)) for each in questions))
    for name, text in (("pick", CHOICE), ("write", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(file=file, cache=tmp_path / "cache"))
    (folder / "both.yaml").write_text(GROUP)
    return folder


def config(definitions: Path, *tasks: str, **changes: Any) -> TaskConfig:
    return TaskConfig(tasks=tasks, include_path=definitions, **{"device": "cpu", **changes})


def outcomes(directory: Path, questions: Sequence[Question]) -> dict[str, np.ndarray]:
    naive = Naive(directory)
    picked = np.array([naive.picks(each.question, each.choices) for each in questions])
    answers = np.array([each.answer for each in questions])
    wrote = [naive.writes(each.question) == each.goal for each in questions]
    return {
        "acc": (picked[:, 0] == answers).astype(float),
        "acc_norm": (picked[:, 1] == answers).astype(float),
        "exact_match": np.array(wrote, dtype=float),
    }


def use_template(directory: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


class TestScores:
    def test_questions_as_chats(self, models: tuple[Path, Path], questions: list[Question], definitions: Path) -> None:
        use_template(models[0], "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' }}")
        naive = Naive(models[0])
        asked = [{**vars(each), "goal": naive.writes(f"<user>{each.question}<assistant>")} for each in questions[:4]]
        for each in asked[::2]:
            each["goal"] = "nothing"
        (definitions / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
        loaded = load_tasks(config(definitions, "write", apply_chat_template=True))
        report = evaluate_tasks(models[0], [models[1]], loaded)
        assert report.scores[0].original.value == 0.5

    def test_agree_with_counting(self, models: tuple[Path, Path], questions: list[Question], definitions: Path) -> None:
        original, quantized = models
        report = evaluate_tasks(original, [quantized, original], load_tasks(config(definitions, "both")))
        assert (report.original, report.quantized) == ("original", ("quantized", "original"))
        assert report.engine.startswith("lm-eval 0.")
        named = {(score.task, score.metric): score for score in report.scores}
        assert list(named) == [("both", "acc"), ("pick", "acc"), ("pick", "acc_norm"), ("write", "exact_match")]
        before, after = outcomes(original, questions), outcomes(quantized, questions)
        for (task, metric), score in named.items():
            first, second = before[metric], after[metric]
            assert 0 < first.mean() < 1
            difference = second - first
            error = 1 / QUESTIONS**0.5
            got, same = score.quantized
            assert score.original.value == pytest.approx(first.mean())
            assert score.original.standard_error == pytest.approx(first.std(ddof=1) * error)
            assert got.score.value == pytest.approx(second.mean())
            assert got.difference.value == pytest.approx(difference.mean(), abs=1e-12)
            assert got.difference.standard_error == pytest.approx(difference.std(ddof=1) * error)
            assert got.changed == pytest.approx((difference != 0).mean())
            assert got.changed > 0
            assert (same.difference.value, same.difference.standard_error, same.changed) == (0, 0, 0)
            assert (score.questions, score.fewshot, score.filter) == (QUESTIONS, 0, "none")
            assert score.part_of == (None if task == "both" else "both")
        assert named["pick", "acc"].version == "1.5"

    def test_limit_and_examples(self, models: tuple[Path, Path], questions: list[Question], definitions: Path) -> None:
        loaded = load_tasks(config(definitions, "pick", limit=5, num_fewshot=0))
        (score, _) = evaluate_tasks(models[0], [models[1]], loaded).scores
        assert score.questions == 5
        assert score.original.value == pytest.approx(outcomes(models[0], questions[:5])["acc"].mean())
        shown = load_tasks(config(definitions, "write", num_fewshot=2)).content["tasks"]["write"]
        assert shown.get_config("num_fewshot") == 2

    def test_patterns_and_order(self, definitions: Path) -> None:
        assert load_tasks(config(definitions, "write", "pic*")).asked == ("write", "pick")


def result(samples: dict[str, list[Any]], reported: dict[str, float], metric: str = "acc") -> dict[str, Any]:
    """What lm-eval returns, as far as it is read."""
    return {
        "results": {
            name: {f"{metric},none": value, f"{metric}_stderr,none": "N/A"} for name, value in reported.items()
        },
        "samples": {
            name: [
                {"doc_id": number, "doc_hash": str(number), "filter": "none", metric: value}
                for number, value in enumerate(values)
            ]
            for name, values in samples.items()
        },
        "group_subtasks": {"all": list(samples)},
        "n-samples": {name: {"effective": len(values)} for name, values in samples.items()},
        "n-shot": {},
        "versions": {},
        "higher_is_better": {},
    }


class TestPairing:
    SAMPLES = ({"a": [1, 0, 1, 1], "b": [0, 1]}, {"a": [1, 1, 0, 1], "b": [0, 0]})

    def score(self, means: tuple[float, float]) -> TaskScore:
        first, second = (
            result(samples, {"all": mean, **{name: float(np.mean(values)) for name, values in samples.items()}})
            for samples, mean in zip(self.SAMPLES, means, strict=True)
        )
        group, *parts = task_scores(["all"], first, [second])
        assert [part.part_of for part in parts] == ["all", "all"]
        return group

    @pytest.mark.parametrize(
        ("means", "weights"),
        [((4 / 6, 3 / 6), (4 / 6, 2 / 6)), ((0.625, 0.375), (0.5, 0.5))],
        ids=["by-size", "equally"],
    )
    def test_groups(self, means: tuple[float, float], weights: tuple[float, float]) -> None:
        got = self.score(means).quantized[0]
        changes = [np.subtract(self.SAMPLES[1][name], self.SAMPLES[0][name]) for name in ("a", "b")]
        value = sum(w * change.mean() for w, change in zip(weights, changes, strict=True))
        variance = sum(w**2 * change.var(ddof=1) / len(change) for w, change in zip(weights, changes, strict=True))
        assert got.difference.value == pytest.approx(value)
        assert got.difference.standard_error == pytest.approx(variance**0.5)
        assert got.changed == pytest.approx(3 / 6)

    def test_no_mean_over_questions(self) -> None:
        group = self.score((0.9, 0.7))
        assert (group.original.value, group.original.standard_error) == (0.9, None)
        got = group.quantized[0]
        assert (got.difference.value, got.difference.standard_error) == (pytest.approx(-0.2), None)
        assert got.changed is None

    @pytest.mark.parametrize("odd", [[[True], [False]], ["x", "y"]], ids=["lists", "text"])
    def test_answers_without_a_number(self, odd: list[Any]) -> None:
        each = result({"a": odd}, {"a": 0.5})
        (score,) = task_scores(["a"], each, [each])
        assert score.quantized[0].changed is None

    def test_other_questions_are_not_paired(self) -> None:
        first, second = (result({"a": [1, 0]}, {"a": 0.5}) for _ in range(2))
        second["samples"]["a"][0]["doc_hash"] = "else"
        (score,) = task_scores(["a"], first, [second])
        assert score.quantized[0].changed is None


class TestRefusals:
    def test_unknown_task(self, definitions: Path) -> None:
        with pytest.raises(ConfigError, match=r"does not know 'pik'. .* Close to it are: pick"):
            load_tasks(config(definitions, "pik"))
        with pytest.raises(ConfigError, match=r"`lm-eval ls tasks` lists them"):
            load_tasks(config(definitions, "xyz"))

    def test_questions_that_are_not_there(self, definitions: Path) -> None:
        (definitions / "questions.jsonl").unlink()
        with pytest.raises(ConfigError, match=r"pick cannot be loaded .* Check the network"):
            load_tasks(config(definitions, "pick"))

    def test_twice_the_same_task(self, definitions: Path) -> None:
        with pytest.raises(ConfigError, match=r"Duplicate task 'pick'.* Ask for one of them"):
            load_tasks(config(definitions, "both", "pick"))

    def test_code_that_a_model_writes(self, definitions: Path) -> None:
        path = definitions / "write.yaml"
        path.write_text(f"{path.read_text()}\nunsafe_code: true\n")
        with pytest.raises(ConfigError, match="write runs code that the model writes"):
            load_tasks(config(definitions, "write"))

    def test_a_chat_template_that_refuses(self, models: tuple[Path, Path], definitions: Path) -> None:
        # lm-eval tries again without system turns: here that is the same chat.
        use_template(models[0], "{{ raise_exception('No ' ~ messages[0].role ~ ', please.') }}")
        loaded = load_tasks(config(definitions, "write", apply_chat_template=True, limit=1))
        with pytest.raises(CalibrationError, match=rf"^{models[0]}: .* refuses the chat \(No user, please\.\)"):
            evaluate_tasks(models[0], [models[1]], loaded)

    def test_a_chat_with_a_token_beyond_the_embedding(self, models: tuple[Path, Path], definitions: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(models[0])
        tokenizer.add_tokens([*(f"<pad{number}>" for number in range(6)), "<|im_start|>"])
        tokenizer.save_pretrained(models[0])
        use_template(models[0], "<|im_start|>{{ messages[0].content }}")
        loaded = load_tasks(config(definitions, "write", apply_chat_template=True, limit=1))
        with (
            pytest.warns(BpwiseWarning, match="im_start"),
            pytest.raises(CalibrationError, match=r"Got token id 264. .* The text has the token '<\|im_start\|>'"),
        ):
            evaluate_tasks(models[0], [models[1]], loaded)

    def test_no_chat_template(self, models: tuple[Path, Path], definitions: Path) -> None:
        loaded = load_tasks(config(definitions, "pick", apply_chat_template=True))
        with pytest.raises(ConfigError, match="no chat template"):
            evaluate_tasks(models[0], [models[1]], loaded)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tasks": ()}, "none given"),
            ({"dtype": "float64"}, "dtype"),
            ({"limit": 0}, "limit"),
            ({"num_fewshot": -1}, "num_fewshot"),
            ({"batch_size": "many"}, "batch_size"),
        ],
        ids=["tasks", "dtype", "limit", "fewshot", "batch"],
    )
    def test_config(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            TaskConfig(**{"tasks": ("pick",), **changes})

    def test_lm_eval_is_missing(self) -> None:
        code = """
import sys
sys.modules["lm_eval"] = None
from bpwise.errors import BpwiseError
from bpwise.eval.tasks.benchmarks import TaskConfig, load_tasks
try:
    load_tasks(TaskConfig(tasks=("mmlu",)))
except BpwiseError as error:
    print(error)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip().endswith("Run: pip install '.[tasks]' in the folder of bpwise's source.")


def test_command(models: tuple[Path, Path], definitions: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 400)
    options = ["--text", text, "--rows", 2, "--row-tokens", 60, "--device", "cpu", "-o", tmp_path / "report"]
    asked = ["--tasks", "both", "--include-path", definitions, "--limit", 8, "--batch-size", 4]
    run = CliRunner().invoke(cli, ["eval", *map(str, [*models, *options, *asked])])
    assert run.exit_code == 0, run.output
    content = json.loads((tmp_path / "report" / "report.json").read_text())["tasks"]
    assert [score["task"] for score in content["scores"]] == ["both", "pick", "pick", "write"]
    assert content["limit"] == 8
    assert "both acc" in run.stdout
    assert "## Benchmarks" in (tmp_path / "report" / "report.md").read_text()
    assert 'id="tasks"' in (tmp_path / "report" / "report.html").read_text()
    assert len((tmp_path / "report" / "report.tasks.csv").read_text().splitlines()) == 1 + 4 * 2


def test_comparison_is_written_before_the_tasks_run(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> None:
        raise ConfigError("the tasks fail")

    monkeypatch.setattr("bpwise.eval.tasks.benchmarks.load_tasks", lambda config: config)
    monkeypatch.setattr("bpwise.eval.tasks.benchmarks.evaluate_tasks", fail)
    text = tmp_path / "text.txt"
    text.write_text("words of the evaluation text " * 200)
    options = ["--text", text, "--rows", 2, "--row-tokens", 30, "--device", "cpu", "-o", tmp_path / "report"]
    run = CliRunner().invoke(cli, ["eval", *map(str, [*models, *options]), "--tasks", "mmlu"])
    assert (run.exit_code, "the tasks fail" in run.output) == (1, True)
    assert "comparison" in json.loads((tmp_path / "report" / "report.json").read_text())


def test_command_refuses_another_engine(models: tuple[Path, Path]) -> None:
    run = CliRunner().invoke(cli, ["eval", *map(str, models), "--engine", "llama.cpp", "--tasks", "mmlu"])
    assert run.exit_code == 2
    assert "--tasks has no effect with --engine llama.cpp" in run.output
