import io
import subprocess
import sys

import numpy as np
import pytest
from bpwise.eval.report.drawings.svg import Drawing, series_color

pytest.importorskip("resvg_py", reason="PNG files are drawn by resvg_py: pip install '.[png]'.")
image = pytest.importorskip("matplotlib.image", reason="matplotlib reads PNG files")


def test_pixels_have_the_light_colours() -> None:
    from bpwise.eval.report.drawings.png import png_bytes

    drawing = Drawing(100, 80, "")
    drawing.rectangle(20, 30, 40, 20, color=series_color(1), hint="a bar")
    drawing.line(0, 70, 100, 70)
    pixels = (image.imread(io.BytesIO(png_bytes(drawing)), format="png")[..., :3] * 255).round().astype(int)
    # Drawings have a margin of 12 around them, and two pixels a unit.
    assert pixels.shape == (2 * 104, 2 * 124, 3)

    def at(x: float, y: float) -> tuple[int, ...]:
        return tuple(pixels[round(2 * (y + 12)), round(2 * (x + 12))])

    assert at(40, 40) == (0xC2, 0x41, 0x0C)
    assert at(80, 10) == (255, 255, 255)
    assert np.abs(np.subtract(at(50, 70), (0xE3, 0xE7, 0xEC))).max() < 16  # a line between pixels is blended


def test_renderer_is_missing() -> None:
    code = """
import sys
sys.modules["resvg_py"] = None
from bpwise.errors import BpwiseError
from bpwise.eval.report.drawings.png import check_png
try:
    check_png()
except BpwiseError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("Run: pip install '.[png]' in the folder of bpwise's source.")
