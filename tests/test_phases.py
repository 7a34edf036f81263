"""The account of a start: every second in one phase, and a sum that says so."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodeploy import phases
from nanodeploy.phases import Phases, process_began, table


def test_phases_follow_one_another_without_a_gap(monkeypatch):
    now = 10.0
    monkeypatch.setattr(phases.time, "monotonic", lambda: now)
    account = Phases("first", 8.0)
    account.begin("second")
    now = 11.5
    account.begin("first")
    now = 12.0
    assert account.end() == {"first": 2.5, "second": 1.5}
    now = 13.0
    assert account.end() == {"first": 3.5, "second": 1.5}, "the last phase runs on"


@pytest.mark.skipif(not phases.STAT.exists(), reason="no /proc")
def test_a_process_knows_when_it_was_created():
    code = "import time; time.sleep(0.3); from nanodeploy.phases import process_began; print(process_began())"
    root = Path(__file__).parents[1]
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert before - 0.05 <= float(done.stdout) <= time.monotonic() - 0.3


def test_a_name_with_a_parenthesis_and_spaces_does_not_mislead(monkeypatch, tmp_path):
    ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    stat = tmp_path / "stat"
    stat.write_text(f"7 (a) b (c) S {' '.join(str(i) for i in range(4, 22))} {ticks} 0 0\n")
    monkeypatch.setattr(phases, "STAT", stat)
    assert process_began() == pytest.approx(time.monotonic(), abs=1.0)


def test_without_proc_it_is_when_first_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(phases, "STAT", tmp_path / "none")
    assert process_began() == phases.FIRST_ASKED <= time.monotonic()


@given(st.dictionaries(st.text("abc ", min_size=1), st.floats(0, 100), max_size=5), st.floats(0, 500))
def test_the_lines_add_up(seconds, total):
    lines = [line.split(" s  ") for line in table(seconds, total, "until ready")]
    assert lines[-1][1] == "until ready" and float(lines[-1][0]) == pytest.approx(total, abs=0.006)
    assert sum(float(line[0]) for line in lines[:-1]) == pytest.approx(total, abs=0.005 * len(lines) + 0.001)
    assert [line[1] for line in lines[:-1]][: len(seconds)] == list(seconds)
