"""Nothing of the user's outlives its last use by us: models and weights are freed when they are let go."""

from __future__ import annotations

import json

from tests.ranks import run_ranks


def test_a_model_that_is_let_go_is_freed(tmp_path):
    (tmp_path / "spool").mkdir()
    (result,) = run_ranks("tests.training.lifetimes", 1, [str(tmp_path / "freed")], spool=tmp_path / "spool")
    assert "gradwatch:" not in result.output, result.output
    freed = json.loads((tmp_path / "freed").read_text())
    assert freed == dict.fromkeys(freed, True)
    assert len(freed) == 5
