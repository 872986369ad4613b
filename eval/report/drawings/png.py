"""Drawings as PNG files, for places that show no SVG."""

from __future__ import annotations

import re

from ....errors import BpwiseError, install_command
from .svg import STYLE, Drawing

__all__ = ["check_png", "png_bytes"]

_ZOOM = 2.0
"""Pixels for each unit of a drawing: sharp on a dense screen and in a document."""


def check_png() -> None:
    """Check that PNG files can be made.

    Raises:
        BpwiseError: The renderer is not installed.
    """
    try:
        import resvg_py  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise BpwiseError(
            f"PNG files are drawn by resvg, which is not installed. Run: {install_command('png')}."
        ) from error


def png_bytes(drawing: Drawing) -> bytes:
    """Return a drawing in its light colours as a PNG file.

    Raises:
        BpwiseError: The renderer is not installed.
    """
    check_png()
    import resvg_py  # noqa: PLC0415 - an extra

    # Renderers of SVG that are no browsers know neither variables nor media queries.
    light = dict(re.findall(r"(--bp-[\w]+): (#[0-9a-f]{6})", STYLE.split("@media")[0]))
    svg = drawing.render(standalone=True).replace(STYLE, re.sub(r"@media.*\} \}\n", "", STYLE, flags=re.DOTALL))
    svg = re.sub(r"var\((--bp-\w+)\)", lambda match: light[match[1]], svg)
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=_ZOOM))
