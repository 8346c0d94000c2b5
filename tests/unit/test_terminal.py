"""What models and files contain cannot control the terminal."""

from __future__ import annotations

import pytest

from engine.__main__ import main
from engine.commands.terminal import printable


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[2Jgone\x1b]0;title\x07", r"\x1b[2Jgone\x1b]0;title\x07"), ("a\rb\x08", r"a\rb\x08"), ("\x9b31m", r"\x9b31m"), ("\x00", r"\x00"),
    ("\u202eevil\u2066", r"\u202eevil\u2066"), ("\ud800", r"\ud800"), ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ("naïve 你好 👩\u200d🔬", "naïve 你好 👩\u200d🔬"),
])  # fmt: skip
def test_a_terminal_has_nothing_to_obey(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_that_quotes_a_file_is_printable(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tmp_path / "\x1b[31mrecipe.py"
    assert main(["run", str(name)]) == 1
    complaint = capsys.readouterr().err
    assert r"\x1b[31mrecipe.py" in complaint
    assert "\x1b" not in complaint
