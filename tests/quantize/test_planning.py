import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.gguf.llama_cpp.vram import room_for_weights
from bpwise.convert.registry import format_named
from bpwise.errors import ConfigError
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.planning.page import plan_page, write_plan_page
from bpwise.quantize.planning.plans import PlanPoint, make_plan, plan_points
from click.testing import CliRunner

from ..measured import gguf_curves_of
from ..policed import Policed

LARGE = 1 << 50


@pytest.fixture(scope="module")
def measurement(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    ids = torch.randint(0, 264, (4, 32), generator=torch.Generator().manual_seed(1))
    rows = CalibrationSet(tokens=ids, origins=("random",) * 4, description="<random> ids", adds_bos=False)
    folder = tmp_path_factory.mktemp("measured")
    made = measure_checkpoint(
        Checkpoint.open(tiny_model),
        rows,
        MeasureConfig(device="cpu"),
        [Exl2Curves(), *gguf_curves_of(tiny_model)],
        folder,
    )
    made.save(folder / "m.safetensors")
    return Measurement.load(folder / "m.safetensors")


def points_of(measurement: Measurement, name: str, **options: Any) -> list[PlanPoint]:
    format_ = format_named(name)
    return plan_points(format_, measurement, format_.Options(**options))


def falls(points: list[PlanPoint]) -> bool:
    sizes, damages = [p.plan.stored_bytes for p in points], [p.damage_nats for p in points]
    return sizes == sorted(sizes) and damages == sorted(damages, reverse=True)


def test_exl2_plans_are_those_of_single_sizes(measurement: Measurement) -> None:
    points = points_of(measurement, "exl2")
    assert len(points) > 15
    assert falls(points)
    point = next(point for point in points if point.bpw == 4.5)
    plan = make_exl2_plan(measurement, bpw=4.5, head_bits=6)
    assert plan.head is not None
    assert point.plan == plan == make_plan(measurement, bpw=4.5, options=Exl2Options())
    assert point.damage_nats == plan.damage_nats
    assert len(plan.costs()) == 15
    # Embeddings of 264 x 64 and five norms of 64 stay in float16.
    carried = 2 * (264 * 64 + 5 * 64)
    assert point.plan.stored_bytes == (sum(p.stored_bits for p in plan.linears) + plan.head.stored_bits) // 8 + carried
    whole = next(p for p in points_of(measurement, "exl2", head_bits=16) if p.bpw == 4.5)
    assert whole.plan.stored_bytes == sum(p.stored_bits for p in plan.linears) // 8 + carried + 2 * 264 * 64


def test_gguf_plans(measurement: Measurement) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    points = points_of(measurement, "gguf")
    assert len(points) > 12
    assert falls(points)
    weights = sum(p.numel() for p in (torch.empty(264, 64), torch.empty(264, 64)))
    assert all(8 * p.plan.stored_bytes / weights > p.bpw for p in points)  # there is more than head and embeddings
    assert points[-1].bpw == 8.5


def test_page_escapes_what_it_shows(measurement: Measurement) -> None:
    page = plan_page({"exl2": points_of(measurement, "exl2"), "gguf": []}, model="<b>m</b>", facts={"text": "<i>&"})
    assert "<b>m" not in page
    assert "<i>" not in page
    assert "Not measured: GGUF." in page
    assert 'value="GGUF"' not in page
    data = re.search(r'id="plans">(.*?)</script>', page, flags=re.S)
    assert data is not None
    assert len(json.loads(data[1])["points"]["EXL2"]) > 15
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    policed = Policed(page)
    assert policed.refused == []
    assert policed.policy["default-src"] == ["'none'"]


def test_command_writes_it(measurement: Measurement, tmp_path: Path) -> None:
    measurement.save(tmp_path / "m.safetensors")
    command = ["plan", str(tmp_path / "m.safetensors"), "--html", str(tmp_path / "p.html")]
    run = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    page = (tmp_path / "p.html").read_text()
    assert "&lt;random&gt; ids" in page
    assert "<h1>Plans for m</h1>" in page
    assert re.search(r"head bits in EXL2.*\n?.*<td>6</td>", page)
    assert re.search(r"group size in EXL2.*\n?.*<td>32</td>", page)
    assert not list(tmp_path.glob("plan-*.json"))
    assert CliRunner().invoke(cli, command[:2]).exit_code == 2


class Opened:
    """The page in a browser."""

    def __init__(self, browser: Any, measurement: Measurement, path: Path) -> None:
        write_plan_page(measurement, path, model="m s")
        browser.get(path.as_uri())
        assert browser.get_log("browser") == []
        self.browser = browser

    def __getitem__(self, name: str) -> str:
        """The text of an element."""
        text: str = self.browser.execute_script("return document.getElementById(arguments[0]).innerText", name)
        return text

    def act(self, element: str, value: str, event: str = "input") -> None:
        change = "e.checked = true" if element.endswith("]") else "e.value = arguments[1]"
        script = f"const e = document.querySelector(arguments[0]); {change}; e.dispatchEvent(new Event('{event}'))"
        self.browser.execute_script(script, element, value)

    def marked(self) -> str:
        """What the point under the marker says."""
        hint: str = self.browser.execute_script(
            "const m = document.querySelector('.marker'), at = c => c.getAttribute('cx') + ' ' + c.getAttribute('cy');"
            "return [...document.querySelectorAll('.charts circle.mark')].find(d => at(d) === at(m)).textContent"
        )
        return hint


@pytest.fixture
def opened(measurement: Measurement, browser: Any, tmp_path: Path) -> Opened:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    return Opened(browser, measurement, tmp_path / "p.html")


def test_a_size_is_chosen_in_a_browser(measurement: Measurement, opened: Opened) -> None:
    points = points_of(measurement, "exl2")
    assert opened["bpw"] == "4.5 bpw"
    assert opened["command"] == "bpwise quantize 'm s' 'm s-4.5bpw-exl2' --bpw 4.5 --measurement 'm s.safetensors'"
    example = float(
        opened.browser.find_element("id", "memory").get_attribute("placeholder")
    )  # in MB, as its label says
    assert points[0].plan.stored_bytes < 1e6 * example < points[-1].plan.stored_bytes
    assert opened.marked().startswith("EXL2")
    assert "at 4.5 bpw" in opened.marked()
    opened.act("#slider", str(len(points) - 1))
    assert opened["bpw"] == f"{points[-1].bpw:g} bpw"
    assert f"at {points[-1].bpw:g} bpw" in opened.marked()
    fitting = [p for p in points if p.plan.stored_bytes <= 80_000][-1]
    assert opened["size"] == f"{next(p for p in points if p.bpw == 4.5).plan.stored_bytes / 1e6:.1f} MB"
    opened.act("#memory", "0.08")  # MB, as the largest plan is below 1 GB
    assert opened["bpw"] == f"{fitting.bpw:g} bpw"
    hint = "return document.querySelector('[data-map=EXL2] rect.mark title').textContent"
    first = fitting.plan.costs()[0]
    assert opened.browser.execute_script(hint) == f"{first.name}: {round(first.bpw, 3):g} bits per weight"
    opened.act("#memory", "0.00001")
    assert opened["fits"] == "No plan is that small."


def test_a_context_takes_its_memory(measurement: Measurement, opened: Opened) -> None:
    points = points_of(measurement, "gguf")
    opened.act("input[value=GGUF]", "", "change")
    assert ".gguf' --bpw" in opened["command"]
    assert opened.marked().startswith("GGUF")
    visible = "return [...document.querySelectorAll('[data-map]')].map(m => m.getBoundingClientRect().height > 0)"
    assert opened.browser.execute_script(visible) == [False, True]
    assert opened["beside"] == ""
    # Keys and values of 2 blocks, 2 heads and 16 channels in float16, and what computing takes.
    taken = LARGE - room_for_weights(LARGE, measurement.config, 128)
    assert taken > 2 * 2 * 2 * 2 * 16 * 128
    opened.act("#context", "128", "change")
    # llama.cpp keeps the embeddings in main memory; the file's tensors without them are in the GPU's.
    (table,) = (tensor for tensor in points[3].plan.tensors if tensor.name == "token_embd.weight")
    needed = (points[3].plan.stored_bytes - table.stored_bytes + taken) / 1e6
    opened.act("#memory", f"{needed:.9f}")
    assert f"With a context of 128 tokens: {needed:.1f} MB of GPU memory" in opened["beside"]
    assert opened["bpw"] == f"{points[3].bpw:g} bpw"
    opened.act("#memory", f"{taken / 1e6:.9f}")
    assert opened["fits"] == "No plan is that small."


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", None), ("num_hidden_layers", 1e300), ("hidden_size", "32"), ("layer_types", [{}])],
)
def test_sizes_of_a_measured_config_are_checked(measurement: Measurement, key: str, value: object) -> None:
    damaged = replace(measurement, config={**measurement.config, key: value})
    for name in ("exl2", "gguf"):
        format_ = format_named(name)
        with pytest.raises(ConfigError, match=rf"config.json.*{key}.*Measure the model again"):
            format_.beside_in_vram(damaged, format_.Options(), LARGE, 128)


def test_the_command_is_copied(opened: Opened) -> None:
    opened.browser.execute_script("document.addEventListener('copy', () => { window.taken = String(getSelection()); })")
    opened.browser.find_element("id", "copy").click()
    assert opened["copy"] == "Copied"
    assert opened.browser.execute_script("return window.taken") == opened["command"]
    opened.act("#slider", "0")
    assert opened["copy"] == "Copy"


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
def test_fits_the_screen(opened: Opened, width: int, mode: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": mode}
    opened.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.browser.refresh()
    assert opened.browser.execute_script("return document.documentElement.scrollWidth") <= width
    heights = (
        "return [...document.querySelectorAll('.controls label, #copy')].map(e => e.getBoundingClientRect().height)"
    )
    assert max(opened.browser.execute_script(heights)) < 80  # no column of single letters
    wide = "t => t.offsetWidth > t.parentNode.clientWidth"
    assert opened.browser.execute_script(f"return [...document.querySelectorAll('table')].filter({wide}).length") == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (0.0108, "very close to the original; about llama.cpp's Q5_K_M"),
        (0.0305, "close to the original; about llama.cpp's Q4_K_M"),
        (0.0001, "indistinguishable in use"),
        (9.0, "badly damaged"),
    ],
)
def test_damage_in_words(measurement: Measurement, damage: float, words: str) -> None:
    point = replace(points_of(measurement, "exl2")[0], damage_nats=damage)
    assert f'<td data-label="in words">{words.replace(chr(39), "&#39;")}</td>' in plan_page(
        {"exl2": [point]}, model="m", facts={}
    )
