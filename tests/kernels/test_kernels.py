"""python -m benchmarks kernels: the page, the JSON file, and exit status 1 if a kernel has a fault."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from triton_kernels import aot


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> aot.AotCase:
    """SwiGLU's forward kernel, as the only case."""
    results = next(case for case in aot.all_cases() if case.name == "swiglu forward bf16")
    monkeypatch.setattr(aot, "all_cases", lambda: [results])
    return results


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "kernels", *arguments])
    return main()


def test_page_and_file_have_the_same_numbers(
    case: aot.AotCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "results" / "kernels.json"
    assert run(monkeypatch, "--shape", "70b-tp8", "--json", str(written)) == 0
    page, facts = capsys.readouterr().out, json.loads(written.read_text())
    assert "All 3 pass" in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {case.name} |"))
    assert [fact["arch"] for fact in facts["compiled"]] == [80, 90, 100]
    registers = [str(fact["registers"]) for fact in facts["compiled"]]
    assert row.split(" | ")[2] in (registers[0], " / ".join(registers))
    assert {floor["shape"] for floor in facts["floors"]} == {"70b-tp8"}
    floor = next(floor for floor in facts["floors"] if floor["operation"] == "swiglu forward")
    assert f"| {floor['floor_s']['H200'] * 1e6:.0f} memory |" in page
    assert "### 70b-tp8, 8192 tokens" in page
    assert "405b" not in page


def test_a_fault_is_named_and_fails_the_command(
    case: aot.AotCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unaligned = replace(case, divisible=("stride",))
    monkeypatch.setattr(aot, "all_cases", lambda: [unaligned])
    assert run(monkeypatch, "--shape", "8b-tp1") == 1
    assert "- swiglu forward bf16 on sm_90 has no 128-bit load though its rows are aligned" in capsys.readouterr().out


def test_an_unknown_shape_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--shape", "9b")
    assert "choose from" in capsys.readouterr().err
