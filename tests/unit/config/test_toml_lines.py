"""Line numbers of keys, against documents whose lines are known because the test wrote them."""

import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from config.toml_lines import find_lines

# Values that try to look like keys, tables, comments and closing quotes.
VALUES = st.sampled_from(
    [
        "1",
        "-1.5e-3  # a = 1",
        "true",
        "1979-05-27 07:32:00Z",
        '"plain # [not.a.table]"',
        r'"escaped \" quote = 1 \\"',
        r"'literal \'",
        '"""\n[not.a.table]\nkey = 1\n"""',
        '"""one " two "" \\""" end""""',
        "'''\nkey = 'x' ''\n'''''",
        '""',
        "''",
        '""""""',
        "[]",
        "[ 1,\n  2, # ] = [\n  3,\n]",
        '[\n  ["a]", \'[b\'],\n  [ """\n]""" ],\n]',
        "{}",
        "[{ x = 1 }, { x = 2 }]",
    ]
)
INLINE_VALUES = st.sampled_from(["1", "[1, 2]", '"}, a = 1"', "'}'"])
KEY_STYLES = st.sampled_from(["{}", '"{}"', "'{}'", '"{} = 1"', "'[{}] #'"])
GAPS = st.sampled_from(["", "\n", "# x = 1\n", "  \t# [a]\n\n"])


@st.composite
def documents(draw):
    """A TOML text and the line of each of its keys and tables."""
    text, lines = "", {}

    def line() -> int:
        return text.count("\n") + 1

    def key(number: int) -> tuple[str, str]:
        written = draw(KEY_STYLES).format(f"k{number}")
        return written, tomllib.loads(f"x = {written}")["x"] if written[0] in "\"'" else written

    names = iter(range(10_000))
    for _ in range(draw(st.integers(1, 4))):
        path: tuple[str, ...] = ()
        if draw(st.booleans()) or text:
            written, name = key(next(names))
            path = (name,)
            text += draw(GAPS)
            lines[path] = line()
            text += draw(st.sampled_from(["[{}]\n", "[ {} ]  # [x]\n", "[[{}]]\n"])).format(written)
        for _ in range(draw(st.integers(0, 4))):
            text += draw(GAPS)
            written, name = key(next(names))
            leaf = (*path, name)
            lines[leaf] = line()
            if draw(st.booleans()):  # dotted
                inner, inner_name = key(next(names))
                written, leaf = f"{written} . {inner}", (*leaf, inner_name)
                lines[leaf] = line()
            if draw(st.booleans()):
                text += f"{written} = {draw(VALUES)}\n"
            else:
                inner, inner_name = key(next(names))
                lines[(*leaf, inner_name)] = line()
                text += f"{written} = {{ {inner} = {draw(INLINE_VALUES)} }}\n"
    return text + draw(st.sampled_from(["", "# end", "\n\n"])), lines


@given(documents())
@settings(deadline=None, derandomize=True, max_examples=150)
def test_every_key_is_found_on_its_line(document):
    text, lines = document
    tomllib.loads(text)
    found = find_lines(text)
    assert {path: found.get(path) for path in lines} == lines


def test_windows_line_ends_and_empty_texts():
    assert find_lines("") == {}
    assert find_lines("# only a comment") == {}
    assert find_lines("[a]\r\nb = 1 # c\r\n\r\nd = 2") == {("a",): 1, ("a", "b"): 2, ("a", "d"): 4}


def test_the_first_mention_of_a_table_counts():
    lines = find_lines("[a.b]\nc = 1\n[a]\nd = 1\n[e]\nf.g = 1\nf.h = 1\n")
    assert lines[("a",)] == 1
    assert lines[("a", "d")] == 4
    assert lines[("e", "f")] == 6
    assert lines[("e", "f", "h")] == 7
