"""`make gpu` and the timing part of the kernel benchmark, with a fake clock and small parts. Needs no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import bench_gpu, bench_smoke, gpu_page, nvml
from benchmarks.gpu.clock import CudaClock, Timing
from benchmarks.gpu.facts import read
from benchmarks.kernels import bench_accuracy, bench_times, floors
from benchmarks.kernels.floors import Shape
from benchmarks.kernels.kernels_baselines import COMPILED, EAGER, PEERS
from benchmarks.kernels.operations import OPERATIONS, Contender, plain
from benchmarks.kernels.operations import timed as call_of
from benchmarks.support.timing import Spread
from benchmarks.training import bench_throughput
from engine.config import ModelShape
from tests.support.on_device import everything_on
from tests.support.pool import warm

TINY = Shape("tiny", hidden=64, ffn=96, heads=4, kv_heads=2, head_size=16, vocab=1000, tokens=64, tp=1)
CPU = torch.device("cpu")


class FakeClock:
    """Runs the call once and reports 2 ms."""

    def __call__(self, call: Callable[[], Any]) -> Timing:
        call()
        return Timing(Spread(2e-3, 1e-3, 3e-3), 7, 5 << 20, 4e-3, {"sm_mhz": 1980, "throttled": ["power cap"]})

    def launches(self, call: Callable[[], Any]) -> int:
        return 3


clock = FakeClock()


def absent(_: dict[str, Tensor]) -> Callable[[], Any]:
    raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")


def failing(_: dict[str, Tensor]) -> Tensor:
    raise RuntimeError("out of\nluck")


class Event:
    """torch.cuda.Event, with 2 ms between any two."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event) -> float:
        return 2.0


def test_number_of_timed_runs_depends_on_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that empties the cache and a sleep that hides host work precede each run; the GPU's state is returned with the times."""
    monkeypatch.setattr("benchmarks.gpu.clock.READ", 16)
    fakes = {"Event": Event, "synchronize": lambda _: None, "reset_peak_memory_stats": lambda _: None}
    slept: list[int] = []
    fakes |= {"memory_allocated": lambda _: 100, "max_memory_allocated": lambda _: 350, "_sleep": slept.append}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(nvml, "state", lambda index: {"sm_mhz": 1500})
    for seconds, runs in ((0.001, 5), (0.02, 10), (9.0, 100)):
        calls: list[int] = []
        slept.clear()
        timing = CudaClock(CPU, seconds)(partial(calls.append, 1))
        assert timing.seconds == Spread(2e-3, 2e-3, 2e-3)
        assert (timing.runs, timing.peak_bytes, timing.gpu) == (runs, 250, {"sm_mhz": 1500})
        assert len(calls) == 2 + 1 + 1 + runs + min(runs, 20)  # warm-up, memory, estimate, timed, back to back
        assert len(slept) == 1 + runs


def test_missing_nvml_is_reported_in_one_line() -> None:
    (error,) = nvml.state().values()
    assert error == "nvidia-ml-py is not installed" or "NVML" in error


def test_every_operation_has_a_floor_and_every_peer_an_operation() -> None:
    assert OPERATIONS.keys() == floors.OPERATIONS.keys()
    assert PEERS.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("name", [name for name, peers in PEERS.items() if EAGER in peers and name != "draw"])  # random
def test_ours_equals_torch_eager(name: str) -> None:
    """Outputs, up to the sign and the sum of a loss, and gradients."""
    operation = OPERATIONS[name]
    results = []
    for contender in (*operation.ours.values(), PEERS[name][EAGER]):
        torch.manual_seed(0)
        result = call_of(operation, contender, operation.draw(TINY, CPU))()
        outputs, gradients = result if operation.which == "both" else ((), result) if operation.which == "backward" else (result, ())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if "logprob" in name:  # peers return losses, with opposite sign, or their sums
            outputs, gradients = [output.abs().sum() for output in outputs], [g.double().abs() for g in gradients]
        results.append([*outputs[: 2 if name == "gae" else None], *gradients])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            scale = float(theirs.double().abs().max())
            assert float((ours.double() - theirs.double()).abs().max()) <= 2e-2 * scale


def test_the_page_of_times(tmp_path: Path) -> None:
    peers: dict[str, dict[str, Contender]] = {"rope": {"elsewhere": absent, "broken": plain(failing), EAGER: PEERS["rope"][EAGER]}}
    saved: list[dict[str, Any]] = []
    measured = bench_times.measure([TINY], CPU, clock, peers, save=saved.append)
    assert [fact for fact in saved if "contender" in fact and "launches" not in fact] == measured["rows"]
    page = "\n".join(bench_times.page(bench_times.assembled(json.loads(json.dumps(saved))), [TINY]))
    assert "take 2.00 + 2.00 + 2.00 ms by torch.matmul" in page
    assert f"| rope | {EAGER} | 2000.0 (1000.0..3000.0) | " in page
    assert "- elsewhere: not installed (nowhere) (rope)" in page
    assert "- broken: RuntimeError: out of luck (rope)" in page
    ours = next(row for row in measured["rows"] if row["operation"] == "linear_logprob forward and backward" and row["contender"] == "ours")
    assert ours["timing"] == asdict(clock(lambda: None))
    assert ours["floor_s"] == pytest.approx(6e-3)  # the three products, 2 ms each
    assert "| linear_logprob forward and backward | ours | 2000.0 (1000.0..3000.0) | " in page
    assert "| 5 | 4000 | 3 | 1980 power cap |" in page
    assert ours["products"] == [[2e-3, 2e-3, 2e-3]] * 2 or ours["products"] == [(2e-3, 2e-3, 2e-3)] * 2


def test_a_resumed_run_keeps_earlier_measurements() -> None:
    first: list[dict[str, Any]] = []
    bench_times.measure([TINY], CPU, clock, {}, save=first.append)
    rest: list[dict[str, Any]] = []
    bench_times.measure([TINY], CPU, clock, {}, save=rest.append, known=first[:6])
    measured = [fact for fact in rest if "timing" in fact]
    assert len(measured) == sum("timing" in fact for fact in first) - 5  # the first fact is the rate of a copy
    complete, resumed = (bench_times.assembled(facts)["rows"] for facts in (first, first[:6] + rest))
    assert sorted(map(bench_times._key, complete)) == sorted(map(bench_times._key, resumed))


def test_targets_are_judged() -> None:
    def row(shape: str, who: str, seconds: float) -> dict[str, Any]:
        timing = asdict(Timing(Spread(seconds, seconds, seconds), 5, 0, seconds, {}))
        return {"operation": bench_times.OUTPUT_LAYER, "shape": shape, "contender": who, "floor_s": 1e-2, "timing": timing}

    rows = [row("8b-tp1", "ours", 1.1e-2), row("405b-tp8", "ours", 1.1e-2), row("8b-tp1", "Liger", 2.2e-2)]
    assert bench_times._verdicts(rows) == [
        "Targets:",
        "",
        "- linear_logprob forward and backward, 8b-tp1: 1.10x of the floor, target 1.12x: met",
        "- linear_logprob forward and backward, 405b-tp8: 1.10x of the floor, target 1.06x: MISSED",
        "- linear_logprob forward and backward, 8b-tp1: 2.00x faster than Liger, target 3x: MISSED",
    ]
    assert bench_times._verdicts([]) == []


def test_contenders_without_time_are_listed_as_not_measured() -> None:
    measured = bench_times.measure([TINY], CPU, clock, {}, seconds=0)
    assert {row["error"] for row in measured["rows"]} == {"not measured: out of time"}


def test_targets_are_measured_first_and_torch_compile_last() -> None:
    order = [
        ("ours", bench_times.OUTPUT_LAYER),
        ("Liger", bench_times.OUTPUT_LAYER),
        ("ours", "rope"),
        (EAGER, "rope"),
        ("Liger", "rope"),
        (COMPILED, "rope"),
    ]
    assert [bench_times._priority("8b-tp1", name, who) for who, name in order] == [0, 1, 2, 3, 4, 5]
    assert bench_times._priority("70b-tp8", bench_times.OUTPUT_LAYER, "Liger") == 4  # it has no target


def test_accuracy_of_float32_and_bfloat16_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(row["from"], row["contender"]): row for row in bench_accuracy.measure(CPU, 16, 64, vocab=3000)}
    ours, rounded = rows["hidden states", "ours"], rows["hidden states", "ours, bfloat16 logits"]
    assert ours["logp_max"] < 1e-5 < 1e-3 < rounded["logp_max"]
    assert rows["float32 logits", "ours"]["gradient"][0] < 1e-6
    assert all(error < 1e-2 for error in ours["gradient"])
    assert "error" in rows["float32 logits", "flash-attn"]
    results = {"versions": {}, "tokens": 16, "hidden": 64, "device": "cpu", "rows": list(rows.values())}
    page = "\n".join(bench_accuracy.page(results))
    assert "| float32 logits | ours | " in page
    assert "only sums" in page  # of linear_policy_loss


def test_flops_of_a_step() -> None:
    model = ModelShape(layers=2, hidden=8, ffn=16, heads=2, kv_heads=2, vocab=10)
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8 * 10 + 8
    assert 3 * model.forward_flops(torch.tensor([3, 5]).numpy()) == 6 * matrices * 8 + 12 * 2 * 8 * (6 + 15)


def test_the_page_shows_decoding_rates_or_errors() -> None:
    rows = [
        {"case": "one", "decode": {"launched": [90.0, 100.0], "replayed": [300.0, 250.0]}},
        {"case": "two", "decode": {"error": "no room"}},
    ]
    page = "\n".join(bench_throughput._decoding(rows))
    assert "| one | 95 (90..100) | 275 (250..300) | 3.00x |" in page
    assert "- two, decoding: not measured: no room" in page
    assert bench_throughput._decoding([{"case": "three", "error": "no GPU"}]) == []


def gpu_arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_gpu.add_arguments(parser)
    return parser.parse_args(words)


def parts(**commands: tuple[tuple[str, ...], float]) -> dict[str, bench_gpu.Part]:
    return {name: bench_gpu.Part(name, command, seconds) for name, (command, seconds) in commands.items()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes the runner find a GPU. Returns the folder of facts."""
    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench_gpu, "prepared", lambda wheels, site: ({"PYTHONPATH": ":".join(sys.path)}, ["a note"]))
    monkeypatch.setattr(bench_gpu, "RESERVE", 0.4)
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path / f"gpu_h100-80gb-hbm3_{date.today().isoformat()}"


ADD = "import sys; from benchmarks.gpu.facts import Facts; facts = Facts(__import__('pathlib').Path(sys.argv[1]));"


def test_a_run_reports_failed_parts_and_continues(
    monkeypatch: pytest.MonkeyPatch, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = f"{ADD} facts.add({{'said': 1}}); print('so far', flush=True); import time; time.sleep(60)"
    three = parts(
        dies=(("-c", "import os; os.kill(os.getpid(), 11)"), 20),
        hangs=(("-c", slow, bench_gpu.FACTS), 4),
        works=(("-c", f"{ADD} facts.add({{'said': 2}})", bench_gpu.FACTS), 20),
    )
    monkeypatch.setattr(bench_gpu, "PARTS", three)
    assert bench_gpu.main(gpu_arguments()) == 1
    text = machine.with_name(f"{machine.name}.md").read_text()
    assert "- a note" in text
    assert "| dies | FAILED with status -11 |" in text
    assert "| hangs | STOPPED after 4 s | 2 |" in text
    assert "so far" in text
    assert "- said 1" in text
    assert "- said 2" in text
    capsys.readouterr()
    monkeypatch.setattr(bench_gpu, "PARTS", parts(works=(("-c", "raise SystemExit(1)"), 20)))
    assert bench_gpu.main(gpu_arguments("works")) == 0  # passed before
    assert "works: passed before" in capsys.readouterr().out
    assert bench_gpu.main(gpu_arguments("works", "--again")) == 1


def test_parts_beyond_the_budget_are_skipped(monkeypatch: pytest.MonkeyPatch, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_gpu, "PARTS", parts(first=(("-c", "import time; time.sleep(1.5)"), 20), second=(("-c", "pass"), 30)))
    assert bench_gpu.main(gpu_arguments("--budget", "2")) == 0
    assert "second: skipped: it may take 30 s, and 0 s are left" in capsys.readouterr().out
    assert bench_gpu.main(gpu_arguments("third")) == 2
    assert "third is not a part; use first, second" in capsys.readouterr().out


def test_the_three_tiers_fit_their_time() -> None:
    assert [bench_gpu.PARTS[name].seconds for name in ("smoke", "tests", "times")] == [80, 100, 150]
    assert list(bench_gpu.PARTS)[:3] == ["smoke", "tests", "times"]
    assert sum(estimate for _, estimate in bench_smoke.SECTIONS.values()) <= 80


SMOKE = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import bench_smoke
from tests.unit.test_gpu_run import FakeClock
setup = bench_smoke.Setup(torch.device("cpu"), FakeClock(), 100)
names = [name for name in bench_smoke.SECTIONS if name not in ("world_of_one", "graphs")]
sys.exit(bench_smoke.run(setup, names, Path(sys.argv[1]), 1000.0))
"""


def run_smoke(file: Path) -> None:
    """Runs SMOKE; called in a new process."""
    sys.argv = ["smoke", str(file)]
    exec(SMOKE, {})


@pytest.mark.parametrize("after", [1, 6, 20])
def test_a_killed_run_keeps_its_facts_and_resumes(tmp_path: Path, after: int) -> None:
    """It is killed as soon as it has written `after` facts, then run again to its end."""
    file = tmp_path / "smoke.jsonl"
    (process := warm().Process(target=run_smoke, args=(file,))).start()
    while process.is_alive() and len(read(file)) < after:
        time.sleep(0.005)
    process.kill()
    process.join()
    kept = read(file)
    assert len(kept) >= after
    with file.open("a") as torn:
        torn.write('{"section": "att')  # an incomplete line, as after a kill
    (process := warm().Process(target=run_smoke, args=(file,))).start()
    process.join()
    facts = read(file)
    assert facts[: len(kept)] == kept
    finished = [fact["section"] for fact in facts if fact.get("finished")]
    assert sorted(finished) == sorted(set(bench_smoke.SECTIONS) - {"world_of_one", "graphs"})
    faulty = {fact["section"] for fact in facts if not fact.get("good", True)}
    assert faulty <= {"row_bits"}  # on CPU, bits may depend on the row index
    assert process.exitcode == len(faulty)
    page = "\n".join(gpu_page.SECTIONS["smoke"](facts))
    assert "| attention | good |" in page


def test_smoke_records_failures_and_skipped_sections(tmp_path: Path) -> None:
    def bad(_: bench_smoke.Setup) -> Any:
        yield {"good": False, "error_of_product": 0.5}

    def breaks(_: bench_smoke.Setup) -> Any:
        yield from ()
        raise RuntimeError("no\nluck")

    def absent_package(_: bench_smoke.Setup) -> Any:
        yield from ()
        raise ModuleNotFoundError("No module named 'megatron'", name="megatron")

    file = tmp_path / "facts.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_smoke, "SECTIONS", {"bad": (bad, 1), "breaks": (breaks, 1), "absent": (absent_package, 1), "late": (bad, 500)})
        assert bench_smoke.run(bench_smoke.Setup(CPU, clock, 100), ["bad", "breaks", "absent", "late"], file, 80) == 1
    facts = {fact["section"]: fact for fact in read(file)}
    assert facts["bad"]["good"] is False
    assert any(fact.get("error") == "RuntimeError: no luck" for fact in read(file))
    assert facts["absent"]["left_out"] == "not installed: megatron"
    assert facts["late"]["left_out"] == "it may take 500 s, and less time is left"


def test_pytest_outcomes_are_recorded(tmp_path: Path) -> None:
    test, file = tmp_path / "test_x.py", tmp_path / "facts.jsonl"
    test.write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_not(): pass\n")
    command = ["-m", "pytest", str(test), "-p", "benchmarks.gpu.pytest_facts", "--facts", str(file), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for tests in (3, 5):  # the second time, passed tests are skipped
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, cwd=tmp_path)
        assert done.returncode == 1
        assert len(read(file)) == tests
    page = "\n".join(gpu_page.SECTIONS["tests"](read(file)))
    assert "{'passed': 1, 'failed': 1, 'skipped': 1}" in page
    assert "test_bad: " in page


@pytest.mark.parametrize("command", ["kernels", "smoke", "gpu", "accuracy", "throughput"])
def test_gpu_commands_start_without_megatron_and_gguf(command: str) -> None:
    bare = "import sys\nsys.modules['megatron'] = sys.modules['gguf'] = None\nfrom benchmarks.__main__ import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{bare}main(['{command}', '--help'])"], capture_output=True, text=True, cwd=bench_gpu.ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_wheels_and_their_pth_files_are_available_to_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("inner/brought.py", "word = 'with me'")
        wheel.writestr("brought.pth", "inner")
        wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(bench_gpu.shutil, "which", lambda name: None)
    environment, notes = bench_gpu.prepared(wheels, site)
    assert notes == ["installing 1 wheels succeeded", "the C++ extension was not built: g++ not found"]
    assert environment["NCCL_SOCKET_IFNAME"] == os.environ.get("NCCL_SOCKET_IFNAME", "lo")
    part = bench_gpu.Part("uses", ("-c", "import brought; print(brought.word)"), 20)
    assert bench_gpu.run(part, tmp_path, environment, 20) == "passed"
    assert (tmp_path / "uses.log").read_text() == "with me\n"


def test_without_a_gpu_one_line_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: None)
    assert bench_gpu.main(gpu_arguments()) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_random_numbers_are_generated_on_the_host_and_moved() -> None:
    with everything_on(torch.device("meta")):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
        assert drawn.device.type == torch.zeros(2).device.type == "meta"
    with everything_on(CPU):
        expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expected, torch.randn(3, generator=torch.Generator().manual_seed(0)))
