"""The pool: order of results, limits, and lost workers. A response that crashes its worker affects no other response."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.verify import Unjudged, Verdict, worker
from engine.verify.pool import Case, Pool, alone
from tests.support.paths import ROOT
from tests.verify.verify_faults import FAULTY, INLINE


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, max_dropped=1.0) as pool:
        yield pool


def cases(*responses: str, truth: str = "fine") -> list[Case]:
    return [Case(FAULTY, response, truth) for response in responses]


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds. A zombie has ended."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_answers_come_in_order_whoever_gives_them(pool: Pool) -> None:
    responses = [f"{i}" if i % 3 else "nap" for i in range(2000)]
    patient = replace(FAULTY, limit_s=60.0)  # the machine may be busy, and none of these is to be over its limit
    asked = [Case(INLINE if i % 5 == 0 else patient, response, "4") for i, response in enumerate(responses)]
    answers = pool.verify(asked)
    assert answers == [Verdict(response == "4", "compared") for response in responses]
    with Pool(1) as single:
        assert single.verify(asked) == answers


def test_an_empty_batch_starts_nothing() -> None:
    pool = Pool(2)
    assert pool.verify([]) == []
    assert pool.verify([Case(INLINE, "a", "a")]) == [Verdict(True, "compared")]
    assert not pool._workers


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("kill", "its worker was ended by SIGKILL"),
        ("segfault", "its worker was ended by SIGSEGV"),
        ("exit", "its worker exited with status 3"),
        ("unjudged", "no room on the disk"),
        ("bug", "KeyError: 'missing'"),
        ("nan", "its verdict is nan, neither True nor False"),
        ("inf", "its verdict is inf, neither True nor False"),
    ],
)
def test_a_lost_worker_costs_one_response_which_is_named(pool: Pool, deed: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    before = pool.dropped
    answers = pool.verify(cases(*["fine"] * 20, deed, *["fine"] * 20))
    lost = answers.pop(20)
    assert isinstance(lost, Unjudged)
    assert str(lost) == why
    assert answers == [Verdict(True, "compared")] * 40
    assert pool.dropped == before + 1
    assert f"response 20 of 41 dropped: {why}" in caplog.text


@pytest.mark.parametrize("deed", ["spin", "product"])
def test_a_response_over_its_limit_is_wrong_and_no_fault_of_the_machine(pool: Pool, deed: str) -> None:
    before = pool.dropped
    answers = pool.verify(cases("fine", deed, "fine", deed, "fine"))
    over, fine = Verdict(False, "time limit of 0.5 s"), Verdict(True, "compared")
    assert answers == [fine, over, fine, over, fine]
    assert pool.dropped == before


def test_a_response_that_would_fill_the_machine_is_wrong(pool: Pool) -> None:
    assert pool.verify(cases("memory")) == [Verdict(False, "memory limit of 4 GiB")]


def test_a_worker_lost_once_is_forgiven(pool: Pool, tmp_path: Path) -> None:
    before = pool.dropped
    assert pool.verify(cases("fine", f"once {tmp_path / 'seen'}", "fine")) == [
        Verdict(True, "compared"),
        Verdict(False, "compared"),
        Verdict(True, "compared"),
    ]
    assert pool.dropped == before


@pytest.mark.parametrize("deed", ["stop", "deaf"])
def test_a_worker_that_its_own_clock_cannot_end_is_killed(deed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_S", 0.2)
    with Pool(1, max_dropped=1.0) as pool:
        answers = pool.verify(cases(deed, "fine"))
    assert str(answers[0]) == "its worker did not respond"
    assert answers[1] == Verdict(True, "compared")


def test_a_slow_start_costs_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes longer to start than a response may take, with the time to wait for an unresponsive one."""
    monkeypatch.setattr(worker, "START", f"import time; time.sleep(3); {worker.START}")
    monkeypatch.setattr(worker, "GRACE_S", 0.1)
    hurried = replace(FAULTY, limit_s=0.2)
    with Pool(2, max_dropped=0) as pool:
        assert pool.verify([Case(hurried, "fine", "fine")] * 5) == [Verdict(True, "compared")] * 5


def test_a_worker_that_never_starts_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "START", "import time; time.sleep(1000)")
    monkeypatch.setattr(worker, "START_S", 0.5)
    with Pool(1, max_dropped=1.0) as pool:
        assert [str(answer) for answer in pool.verify(cases("fine"))] == ["its worker did not respond"]


def test_waiting_is_no_work(pool: Pool) -> None:
    """A response that waits, as on a busy machine, is not over its limit of CPU time; one that never ends costs its worker."""
    assert pool.verify(cases("doze")) == [Verdict(False, "compared")]
    (answer,) = pool.verify([Case(replace(FAULTY, limit_s=0.05), "doze", "fine")])
    assert str(answer) == "its worker was ended by SIGALRM"


def test_too_many_lost_stop_the_run() -> None:
    with Pool(2, max_dropped=0.1) as pool:
        assert isinstance(pool.verify(cases("bug", *["fine"] * 9))[0], Unjudged)
        with pytest.raises(
            Unjudged, match=r"2 of 10 responses could not be judged, more than max_dropped=0.1; the first is response 3: KeyErr"
        ):
            pool.verify(cases("fine", "fine", "fine", "bug", "bug", *["fine"] * 5))
        assert pool.verify(cases("fine")) == [Verdict(True, "compared")]


@pytest.mark.parametrize(("workers", "share", "field"), [(0, 0.1, "workers=0"), (1, -0.1, "max_dropped=-0.1"), (1, 1.1, "max_dropped=1.1")])
def test_a_pool_refuses_what_it_cannot_be(workers: int, share: float, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Pool(workers, share)


def test_large_responses_pass(pool: Pool) -> None:
    large = "x" * 10**6
    assert [answer == Verdict(True, "compared") for answer in pool.verify(cases(*[large, "spin", "no"] * 5, truth=large))] == [
        True,
        False,
        False,
    ] * 5


def test_workers_stay_from_batch_to_batch(pool: Pool) -> None:
    before = {process.process.pid for process in pool._workers}
    pool.verify(cases("fine"))
    assert {process.process.pid for process in pool._workers} == before


def test_a_worker_that_is_killed_while_it_waits_costs_nothing(pool: Pool) -> None:
    pool.verify(cases("fine"))
    before = pool.dropped
    for idle in pool._workers:
        idle.process.kill()
    assert pool.verify(cases(*["fine"] * 10)) == [Verdict(True, "compared")] * 10
    assert pool.dropped == before


def test_what_a_verifier_prints_is_not_the_commands_output(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    with Pool(1) as fresh:
        fresh.verify(cases("print"))
    assert capfd.readouterr().out == ""


def test_children_of_a_lost_worker_go_with_it(pool: Pool, tmp_path: Path) -> None:
    pool.verify(cases(f"child {tmp_path / 'child'}"))
    assert gone(int((tmp_path / "child").read_text()))


def test_one_response_alone_from_many_threads() -> None:
    answers: dict[str, Verdict] = {}

    def ask(response: str) -> None:
        answers[response] = alone(FAULTY, response, "fine")

    threads = [threading.Thread(target=ask, args=(response,)) for response in ("fine", "spin", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    over = Verdict(False, "time limit of 0.5 s")
    assert answers == {"fine": Verdict(True, "compared"), "spin": over, "other": Verdict(False, "compared")}
    with pytest.raises(Unjudged, match="SIGKILL"):
        alone(FAULTY, "kill", "fine")


def test_a_forked_child_asks_a_worker_of_its_own() -> None:
    here = alone(FAULTY, "pid", "").reason
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, alone(FAULTY, "pid", "").reason.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() not in ("", here)
    assert alone(FAULTY, "pid", "").reason == here


@pytest.mark.parametrize("doing", ["fine", "product"])
def test_workers_end_with_their_parent(doing: str, tmp_path: Path) -> None:
    code = (
        "import sys, time; from engine.verify.pool import Case, Pool; from tests.verify.verify_faults import FAULTY; pool = Pool(2);"
        "pool.verify([Case(FAULTY, 'fine', '')]); print(*(w.process.pid for w in pool._workers), flush=True);"
        f"pool.verify([Case(FAULTY, {doing!r}, '')] * 8); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = list(map(int, parent.stdout.readline().split()))
    assert len(workers) == 2
    time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all(map(gone, workers))


def test_an_interrupted_batch_leaves_no_answers_behind(pool: Pool) -> None:
    class Interrupting(list):  # type: ignore[type-arg]
        def __getitem__(self, index: int) -> Case:  # type: ignore[override]
            if index == 30:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        pool.verify(Interrupting(cases(*["nap"] * 40)))
    assert pool.verify(cases("fine")) == [Verdict(True, "compared")]
