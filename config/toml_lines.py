"""Line numbers of the keys of a TOML text, which tomllib does not tell."""

import re
import tomllib

Path = tuple[str, ...]

_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# A multi-line string may end in up to five quotes: two of its own and the three that close it.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?!")' r"|'''.*?'''(?!')" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\r\n#]*")  # numbers, booleans, dates


class _Scanner:
    """Walks over a text that tomllib has already accepted, so nothing is checked here."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[Path, int] = {}

    def scan(self) -> None:
        table: Path = ()
        while self._skip_gap():
            if self._peek() == "[":
                brackets = 2 if self.text.startswith("[[", self.position) else 1
                self.position += brackets
                table = self._key(())
                self.position += brackets
            else:
                self._pair(table)

    def _pair(self, table: Path) -> None:
        path = self._key(table)
        self.position += 1  # =
        self._skip_gap()
        self._value(path)

    def _value(self, path: Path) -> None:
        first = self._peek()
        if first in "\"'":
            self._match(_STRING)
        elif first in "[{":
            self.position += 1
            while self._skip_gap() and self._peek() not in "]}":
                if self._peek() == ",":
                    self.position += 1
                elif first == "[":
                    self._value(path)
                else:
                    self._pair(path)
            self.position += 1
        else:
            self._match(_SCALAR)

    def _key(self, table: Path) -> Path:
        """Path of a key, dotted or not, below a table; notes the line of every prefix, ends on the character behind."""
        path = table
        while True:
            self._skip_gap()
            line = self.text.count("\n", 0, self.position) + 1
            quoted = self._peek() in "\"'"
            part = self._match(_STRING if quoted else _BARE_KEY)
            path += (tomllib.loads(f"key = {part}")["key"] if quoted else part,)
            self.lines.setdefault(path, line)
            self._skip_gap()
            if self._peek() != ".":
                return path
            self.position += 1

    def _peek(self) -> str:
        return self.text[self.position]

    def _skip_gap(self) -> bool:
        """Goes to the next thing that is neither space nor comment; False at the end."""
        self._match(_GAP)
        return self.position < len(self.text)

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match is not None, f"not TOML at character {self.position}"
        self.position = match.end()
        return match.group()


def find_lines(text: str) -> dict[Path, int]:
    """Line (from 1) on which each key and table first stands.

    Args:
        text: a TOML document that tomllib accepts.
    """
    scanner = _Scanner(text)
    scanner.scan()
    return scanner.lines
