"""What a page's Content-Security-Policy says of the page itself, for tests without a browser."""

import base64
import hashlib
from html.parser import HTMLParser


class Policed(HTMLParser):
    """A page that was read.

    Attributes:
        policy: Sources by directive.
        refused: What a browser would refuse, or load from elsewhere.
    """

    def __init__(self, page: str) -> None:
        """Read it."""
        super().__init__(convert_charrefs=True)
        self.policy: dict[str, list[str]] = {}
        self.refused: list[str] = []
        self._inside = ""
        self._text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            parts = (part.split() for part in str(given["content"]).split(";"))
            self.policy = {name: values for name, *values in parts}
        self.refused += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        places = {name: given[name] for name in ("src", "href", "action") if name in given}
        self.refused += [f"{tag} {name}={place}" for name, place in places.items() if place != "data:,"]
        if tag in ("script", "style") and given.get("type") != "application/json":
            self._inside, self._text = tag, ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            digest = base64.b64encode(hashlib.sha256(self._text.encode()).digest()).decode()
            if self.policy[f"{tag}-src"] != [f"'sha256-{digest}'"]:
                self.refused.append(f"{tag} {self._text[:40]}")
            self._inside = ""
