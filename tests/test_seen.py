"""The ratios and the clipping a page shows are those of the loss: its own metrics agree."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pyarrow import parquet

from reasonrl.cli import main
from reasonrl.loss import NAMED, LossSpec, policy_loss
from reasonrl.records import Rollout
from reasonrl.report.tokens import tokens
from reasonrl.seen import ratios, token_columns

LENGTHS = [3, 5, 1, 7]


def rollout() -> Rollout:
    logp = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1)) - 2
    return Rollout(
        problems=["p"],  # type: ignore[list-item]
        prompt_ids=[[1]],
        group=torch.zeros(4, dtype=torch.long),
        completion_ids=[list(range(n)) for n in LENGTHS],
        text=["abcdefg"[:n] for n in LENGTHS],
        finished=[True] * 4,
        logp=logp.split(LENGTHS),
        pieces=[list(range(n + 1)) for n in LENGTHS],
    )


@pytest.mark.parametrize("name", NAMED)
def test_they_are_the_metrics_of_the_loss(name):
    made = torch.Generator().manual_seed(2)
    drawn = rollout()
    old = torch.cat(list(drawn.logp))
    logp = old + 0.3 * torch.randn(len(old), generator=made)
    advantage = torch.randn(len(old), generator=made)
    fields = {"max_length": 8} if name == "dr_grpo" else {}
    spec = LossSpec.named(name, **fields)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    wanted = policy_loss(logp, old, advantage, spec, cu_seqlens=cu).metrics
    seen = ratios(drawn, logp, old, advantage, spec)
    share = seen.clipped.float().mean()
    torch.testing.assert_close(share, wanted["clip_ratio/region_mean"].float())
    if name not in ("gmpo", "reinforce"):
        torch.testing.assert_close(seen.ratio.mean(), wanted["ratio/mean"].float())


def test_rows_left_out_have_no_ratio_and_one_update_has_ratio_one():
    drawn = rollout()
    logp = torch.cat(list(drawn.logp))
    logp[3:8] = math.nan  # the second row
    for old in (None, torch.cat(list(drawn.logp))):
        seen = ratios(drawn, logp, old, torch.ones(len(logp)), LossSpec.named("dapo"))
        assert seen.ratio[:3].tolist() == [1, 1, 1] and seen.ratio[3:8].isnan().all()
        assert not seen.clipped.any()


def test_the_page_reads_what_the_run_writes():
    drawn = rollout()
    n = sum(LENGTHS)
    seen = ratios(drawn, torch.zeros(n), torch.full((n,), -0.5), torch.ones(n), LossSpec())
    columns = token_columns(drawn, seen)
    row = {name: values[1] for name, values in columns.items()}
    found = tokens(row, drawn.text[1])["tokens"]
    assert found["n"] == [1] * 5 and found["r"] == [1649] * 5 and found["c"] == [0, 1, 2, 3, 4]
    assert found["l"] == [round(-100 * v) for v in drawn.logp[1].tolist()]
    assert "token_ratios" not in token_columns(drawn)


@pytest.mark.parametrize("stored", ["true", "false"])
def test_a_run_stores_what_its_updates_saw(stored, tmp_path):
    out = tmp_path / "run"
    words = ["train", "tiny", "model_options={width: 32, layers: 1, heads: 2}", "dtype=fp32"]
    words += ["cold_start_steps=5", "steps=2", "prompts_per_step=4", "group=4", "updates=2"]
    words += ["learning_rate=0.02", "eval_problems=0", "loss.entropy_coef=0.1", "threads=1"]
    words += ["task_options={style: compact, terms: 2}", "max_completion_length=12"]
    assert main([*words, f"log.tokens={stored}", "--quiet", "--out", str(out)]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        table = parquet.read_table(out / "completions" / f"completions_{row['step']:05d}.parquet")
        if stored == "false":
            assert not {"token_logps", "token_ratios"} & {*table.column_names}
            continue
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        ratio = [v for part in columns["token_ratios"] for v in part if v is not None]
        clipped = [v for part in columns["token_clipped"] for v in part]
        assert sum(ratio) / len(ratio) == pytest.approx(row["ratio/mean"], abs=1e-3)
        assert max(ratio) > 1.0 and max(ratio) == pytest.approx(row["ratio/max"], rel=1e-3)
        share = row["clip_ratio/region_mean"]
        assert sum(clipped) / len(clipped) == pytest.approx(share, abs=1e-6)
        starts = zip(columns["completion"], columns["token_starts"], strict=True)
        assert all(at == sorted(at) and (not at or at[-1] <= len(text)) for text, at in starts)
