"""A rank that works on after the command has ended well: not every launcher waits for its ranks."""

from __future__ import annotations

import sys
import textwrap

from tests.cli.command import gradwatch

RANK = """
    import sys, time, torch
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    open(sys.argv[1] + "/trained", "w").close()
    time.sleep(3)
    open(sys.argv[1] + "/predicted", "w").close()
"""
LAUNCHER = """
    import os, subprocess, sys, time
    folder = sys.argv[1]
    subprocess.Popen([sys.executable, "-c", sys.argv[2], folder])
    while not os.path.exists(folder + "/trained"):
        time.sleep(0.05)
"""


def test_a_rank_that_works_on_is_waited_for(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), tmp_path, textwrap.dedent(RANK)]
    result = gradwatch("run", "--state-dir", tmp_path / "state", "--", *command)
    assert result.returncode == 0
    assert (tmp_path / "predicted").exists()
    assert "1 of its ranks still work" in result.stderr
    assert "ending them" not in result.stderr
