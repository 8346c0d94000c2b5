"""What a report prints can be read back, what it writes tells one story, and ranks that are no writer stay silent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.algorithms.sft import SFT
from engine.config import Logging, Model, ModelShape, Optim, Parallel, Run
from engine.data.rows import Source
from engine.reporting import header as run_header
from engine.reporting.console import Chips, Report, StepCost, read_metrics

LINE = re.compile(
    r"step +(?P<step>\d+)/(?P<steps>\d+)  loss (?P<loss>\S+) +grad_norm (?P<grad_norm>\S+) +lr (?P<lr>\S+) +"
    r"(?P<rate>[\d,]+) tok/s/device  mfu +(?P<mfu>[\d.]+)% +(?P<seconds>[\d.]+) s +(?P<memory>[\d.]+) GB  eta (?P<eta>.+)"
)
CHIPS = Chips(4, peak=1e12)
HEADLINE = ("policy/loss", "policy/grad_norm", "policy/lr", "reward/mean", "policy/kl")


def report_to(
    out: Path,
    *,
    start: int = 0,
    is_writer: bool = True,
    tensorboard: bool = False,
    wandb_project: str = "",
    every: float = 0.0,
    chips: Chips = CHIPS,
) -> Report:
    run = Run(Model(path="somewhere"), None, Optim(lr=1e-5), logging=Logging(tensorboard, wandb_project, every=every))
    return Report(run, out, chips, HEADLINE, is_writer=is_writer, start=start)


def cost(tokens: int = 10, seconds: float = 1.0, flops: float = 2e12, memory_gb: float = 0.0) -> StepCost:
    return StepCost(tokens, seconds, flops, memory_gb)


def tell(report: Report, *steps: int, of: int = 200, loss: float = 2.5, seconds: float = 2.0) -> None:
    for step in steps:
        metrics = {"policy/loss": loss - step / 100, "policy/grad_norm": 1.25, "policy/lr": 1e-5}
        report.step(step, of, metrics, cost(40_960, seconds, memory_gb=12.34))


def test_a_plain_line_says_all_there_is_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path) as report:
        tell(report, 9)
    line = LINE.fullmatch(capsys.readouterr().out.rstrip("\n"))
    assert line
    assert line.groupdict() == {
        "step": "10", "steps": "200", "loss": "2.4100", "grad_norm": "1.2500", "lr": "1.000e-05",
        "rate": "5,120", "mfu": "25.0", "seconds": "2.00", "memory": "12.3", "eta": "0:06:20",
    }  # fmt: skip


def test_plain_lines_are_aligned_and_hold_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path) as report:
        tell(report, 0, seconds=130.0)
        tell(report, 99, loss=1e9)
        tell(report, 199, loss=float("nan"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("  eta") for line in lines] == [1, 1, 1]
    for word in ("loss", "grad_norm", "lr", "tok/s", " s ", "GB", "eta"):
        assert len({line.index(word) for line in lines}) == 1, word
    assert all(line.isprintable() for line in lines)


def test_the_line_shows_the_headline_in_its_order_and_an_evaluation_its_policy_and_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with report_to(tmp_path, chips=Chips(4)) as report:
        metrics = {"policy/kl": 1e-4, "reward/mean": 0.25, "rollout/length": 7.0, "policy/loss": 1.0}
        report.step(0, 5, metrics, cost())
        report.evaluation(1, {"policy/loss": 1.234, "reward/accuracy": 0.5, "logps/chosen": -3.0})
        report.note("resumed from step 20")
    step, evaluation, note = capsys.readouterr().out.splitlines()
    assert re.match(r"step 1/5  loss 1\.0000 +reward/mean 0\.2500 +kl 1\.000e-04 +2 tok/s/device +0\.5 TFLOP/s/device ", step)
    assert evaluation == "after step 1  held-out loss 1.2340  held-out reward/accuracy 0.5000"
    assert note == "resumed from step 20"


def test_lines_are_printed_now_and_then_and_the_last_always(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path, every=3600.0) as report:
        tell(report, *range(50), of=50)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/50", "50/50"]
    assert len(read_metrics(tmp_path)) == 50


def test_eta_is_the_median_of_recent_steps_times_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path) as report:
        tell(report, 0, of=10, seconds=600.0)  # compiles
        tell(report, 1, 2, of=10, seconds=30.0)
        tell(report, 3, of=10, seconds=600.0)  # a hiccup
        tell(report, 4, 5, 6, 7, 8, of=10, seconds=30.0)
        tell(report, 9, of=10, seconds=30.0)
    etas = [line.rpartition("eta ")[2] for line in capsys.readouterr().out.splitlines()]
    assert etas[0] == "1:30:00"
    assert etas[2] == "0:03:30"
    assert etas[-2:] == ["0:00:30", "0:00:00"]


def test_eta_forgets_how_the_run_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path) as report:
        tell(report, *range(50), seconds=60.0)
        tell(report, *range(50, 70), seconds=1.0)
    assert capsys.readouterr().out.rstrip().endswith("eta 0:02:10")


def test_records_hold_every_number_in_full(tmp_path: Path):
    before = time.time()
    with report_to(tmp_path / "new") as report:
        report.step(3, 10, {"loss": 1 / 3, "reward": float("inf")}, cost(100, 0.5, memory_gb=1.5))
        report.evaluation(4, {"loss": 2 / 3})
        step, evaluation = read_metrics(tmp_path / "new")  # readable while the run goes on
    assert before - 1 < step.pop("time") <= evaluation.pop("time") < before + 60
    assert step == {
        "kind": "step", "step": 3, "loss": 1 / 3, "reward": None, "tokens": 100, "memory_gb": 1.5, "time/step": 0.5,
        "time/tokens_per_second": 200.0, "time/tokens_per_second_per_device": 50.0, "time/tflops_per_device": 1.0, "time/mfu": 1.0,
    }  # fmt: skip
    assert evaluation == {"kind": "evaluation", "step": 4, "loss": 2 / 3}


def test_a_metric_cannot_overwrite_what_the_report_says_itself(tmp_path: Path):
    with report_to(tmp_path) as report, pytest.raises(AssertionError, match="tokens"):
        report.step(0, 1, {"tokens": 1.0}, cost())


def story(out: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_metrics(out)]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path):
    with report_to(tmp_path) as report:
        report.evaluation(0, {"policy/loss": 3.0})
        tell(report, 0, 1)
        report.evaluation(2, {"policy/loss": 2.9})
        tell(report, 2, 3)
    with report_to(tmp_path, start=2) as report:
        assert story(tmp_path) == [("evaluation", 0), ("step", 0), ("step", 1)]
        report.evaluation(2, {"policy/loss": 2.8})
        tell(report, 2, loss=1.0)
    assert story(tmp_path) == [("evaluation", 0), ("step", 0), ("step", 1), ("evaluation", 2), ("step", 2)]
    assert [record["policy/loss"] for record in read_metrics(tmp_path)] == [3.0, 2.5, 2.49, 2.8, 0.98]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_a_new_story(tmp_path: Path):
    for _ in range(2):
        with report_to(tmp_path) as report:
            tell(report, 0, 1)
    assert story(tmp_path) == [("step", 0), ("step", 1)]


@pytest.mark.parametrize("torn", [b'{"kind": "step", "st', b"\0\0\0\0", b'{"kind": "step", "step": 2, "note": "\xc3'])
def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path, torn: bytes):
    with report_to(tmp_path) as report:
        tell(report, 0, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert story(tmp_path) == [("step", 0), ("step", 1)]
    with report_to(tmp_path, start=2) as report:
        tell(report, 2)
    assert story(tmp_path) == [("step", 0), ("step", 1), ("step", 2)]


def test_damage_in_the_middle_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 0}\n{"ki\n{"kind": "step", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a JSON record; remove"):
        read_metrics(tmp_path)


def test_no_file_no_records(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_a_rank_that_is_no_writer_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with report_to(tmp_path / "out", is_writer=False, tensorboard=True, wandb_project="absent") as report:
        tell(report, 0, 1)
        report.evaluation(2, {"policy/loss": 1.0})
        report.note("resumed from step 20")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


def test_on_a_terminal_lines_stay_whole_above_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with report_to(tmp_path) as report:
        tell(report, 0, of=3)
        report.note("[a note] in brackets")
    shown = capsys.readouterr().out
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in shown.splitlines()]
    assert any(LINE.fullmatch(line) for line in lines)
    assert "[a note] in brackets" in lines
    assert any("━" in line for line in lines)


def test_tensorboard_tells_the_same_story(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with report_to(tmp_path, tensorboard=True) as report:
        tell(report, 0, 1, 2)
    with report_to(tmp_path, tensorboard=True, start=1) as report:
        tell(report, 1, loss=1.0)
        report.evaluation(2, {"policy/loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("step/policy/loss")] == [(0, 2.5), (1, 0.99)]
    assert [event.step for event in events.Scalars("evaluation/policy/loss")] == [2]
    assert "step/time/tokens_per_second" in events.Tags()["scalars"]


def test_without_tensorboard_the_run_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with report_to(tmp_path, tensorboard=True) as report:
        tell(report, 0)
    assert "tensorboard is not installed" in capsys.readouterr().out
    assert story(tmp_path) == [("step", 0)]


def test_wandb_gets_the_run_and_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logged: list[Any] = []
    logger = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: logged.append(given) or logger))
    with report_to(tmp_path / "first", wandb_project="trivet") as report:
        report.evaluation(0, {"policy/loss": 3.0})
    started, record, end = logged
    assert (started["project"], started["name"]) == ("trivet", "first")
    assert json.loads(json.dumps(started["config"]))["optim"]["lr"] == 1e-5
    assert record == (0, {"evaluation/policy/loss": 3.0})
    assert end == "finished"


def test_wandb_that_is_not_installed_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with report_to(tmp_path) as report:
        tell(report, 0)
    with pytest.raises(ValueError, match=r"^logging\.wandb_project='trivet' needs the package wandb; pip install wandb"):
        report_to(tmp_path, wandb_project="trivet").__enter__()
    assert story(tmp_path) == [("step", 0)]  # nothing was dropped before the error


def test_the_header_says_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelShape(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=256)
    world = SimpleNamespace(size=8, on_gpu=False)
    policy: Any = SimpleNamespace(model=model, world=world, dtype=torch.float32, grid=SimpleNamespace(dp=2))
    run = Run(Model(path="some/model"), SFT((Source("rows.jsonl"),)), Optim(lr=1e-5), Parallel(tp=2, pp=2, vpp=3), out="runs/x", gpus=8)
    monkeypatch.setattr(run_header, "_commit", lambda: "abc1234")
    assert run_header.header(run, policy, 20, 100) == [
        f"trivet abc1234: SFT of some/model, {model.parameters / 1000:.1f}K parameters, float32",
        "tp2 pp2 vpp3 dp2 on 8 ranks, recompute=none",
        "attention: torch, one sequence at a time; kernels: torch references (no GPU)",
        f"steps 20 to 100, {run.tokens_per_microbatch} tokens per microbatch; output: runs/x",
    ]


def test_the_version_of_an_installed_package_is_not_the_commit_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*around, *words], check=True)
    monkeypatch.setattr(run_header, "__file__", str(tmp_path / "site-packages/engine/reporting/header.py"))
    monkeypatch.setattr(run_header, "version", lambda name: f"{name} 1.2")
    assert run_header._commit() == "trivet 1.2"
    monkeypatch.setattr(run_header, "__file__", str(tmp_path / "engine/reporting/header.py"))
    assert re.fullmatch(r"[0-9a-f]{7,}", run_header._commit())
