"""Hardware files: every device is complete, a saved file loads unchanged, and invalid files are refused."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from engine.dryrun.hardware import OWN, Gemm, Hardware
from tests.support.paths import ROOT

DEVICES = ("a100", "b200", "h100", "h200")


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_plausible(name: str) -> None:
    device = Hardware.load(name)
    assert device.name == name
    for share in (device.streaming, device.attention, device.gemm.ceiling):
        assert 0.1 < share < 0.95
    assert device.allowance < 0.1 * device.memory
    assert device.across.bandwidth < device.inside.bandwidth < device.bandwidth
    assert 1e14 < device.peak < 3e15
    assert device.node == 8


def test_every_number_of_the_first_device_has_a_source() -> None:
    section = OWN.read_text(encoding="utf-8").split("[h100]")[1].split("[h200]")[0]
    numbers = [line for line in section.splitlines() if re.match(r"\w+ = ", line)]
    assert len(numbers) == 13 + 3 + 8
    assert [line for line in numbers if "#" not in line] == ["latency = 6.6e-6"]  # same source as the line before


def test_saved_hardware_loads_unchanged(tmp_path: Path) -> None:
    mine = replace(Hardware.load("h200"), name="mine", gemm=Gemm(0.5, 12345.0, 32.0), width=4)
    mine.save(tmp_path / "mine.toml", {"gemm.wave": "measured", "peak": "assumed"})
    assert Hardware.load(str(tmp_path / "mine.toml")) == mine
    text = (tmp_path / "mine.toml").read_text()
    assert "wave = 12345  # measured" in text
    assert re.search(r"peak = .*# assumed", text)


def test_the_file_is_part_of_the_distribution() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert OWN.name in packaged["engine.dryrun"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "it has none"),
        ("[a]\n[b]\n", "it has a, b"),
        ("[a", "is not valid TOML"),
        ("[a]\npeak = 1.0\n", "a.across is missing"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Hardware.load(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("watts = 700", 'watts = "many"', "h100.watts='many' must be a number"),
        ("fill = 128", "fill = -1", "h100.gemm.fill=-1 must be a number, at least 0"),
        ("fill = 128", "fil = 128", "h100.gemm.fil is unknown; the fields are ceiling, wave, fill"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "x.toml"
    Hardware.load("h100").save(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        Hardware.load(str(path))


def test_an_unknown_device_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"device='h10' is unknown; use a100, b200, h100, h200, or a .toml"):
        Hardware.load("h10")
