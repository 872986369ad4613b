import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.registry import format_named
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.planning.page import plan_page
from bpwise.quantize.planning.plans import PlanPoint, make_plan, plan_points
from click.testing import CliRunner

from ..measured import gguf_curves_of
from ..policed import Policed


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
    assert "GGUF" not in re.sub(r"<script>.*", "", page, flags=re.S)  # nothing was measured for it
    data = re.search(r'id="plans">(.*?)</script>', page, flags=re.S)
    assert data is not None
    assert len(json.loads(data[1])["EXL2"]) > 15
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
    assert re.search(r"head bits in EXL2.*\n?.*<td>6</td>", page)
    assert re.search(r"group size in EXL2.*\n?.*<td>32</td>", page)
    assert not list(tmp_path.glob("plan-*.json"))
    assert CliRunner().invoke(cli, command[:2]).exit_code == 2


def test_in_a_browser(measurement: Measurement, browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    points = {"exl2": points_of(measurement, "exl2"), "gguf": points_of(measurement, "gguf")}
    (tmp_path / "p.html").write_text(plan_page(points, model="m", facts={}))
    browser.get((tmp_path / "p.html").as_uri())
    assert browser.get_log("browser") == []

    def shown() -> dict[str, str]:
        names = "['bpw', 'size', 'command', 'fits']"
        script = f"return Object.fromEntries({names}.map(i => [i, document.getElementById(i).innerText]))"
        found: dict[str, str] = browser.execute_script(script)
        return found

    def act(element: str, value: str, event: str) -> None:
        change = "e.checked = true" if event == "change" else "e.value = arguments[1]"
        script = f"const e = document.querySelector(arguments[0]); {change}; e.dispatchEvent(new Event('{event}'))"
        browser.execute_script(script, element, value)

    assert shown()["bpw"] == "4.5 bpw"
    act("#slider", str(len(points["exl2"]) - 1), "input")
    assert shown()["bpw"] == f"{points['exl2'][-1].bpw:g} bpw"
    fitting = [p for p in points["exl2"] if p.plan.stored_bytes <= 80_000][-1]
    act("#memory", "0.00008", "input")
    assert shown()["bpw"] == f"{fitting.bpw:g} bpw"
    hint = "return document.querySelector('[data-map=EXL2] rect.mark title').textContent"
    first = fitting.plan.costs()[0]
    assert browser.execute_script(hint) == f"{first.name}: {round(first.bpw, 3):g} bits per weight"
    act("#memory", "0.00000001", "input")
    assert shown()["fits"] == "No plan is that small."
    act("#memory", "", "input")
    act("input[value=GGUF]", "", "change")
    assert "OUT.gguf" in shown()["command"]
    visible = "return [...document.querySelectorAll('[data-map]')].map(m => m.getBoundingClientRect().height > 0)"
    assert browser.execute_script(visible) == [False, True]
