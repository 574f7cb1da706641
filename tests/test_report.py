"""The run page: what it holds, that nothing in it runs, and a real browser where there is one."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from reasonrl import InputError
from reasonrl.cli import main
from reasonrl.report import serve, write
from reasonrl.report.gather import _spread, embedded, gather, parts
from reasonrl.report.serve import Feed
from reasonrl.report.tokens import tokens

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)


def row(step, n, text="ab;cd", **more):
    out = {"step": step, "problem_id": f"p{n}", "prompt": f"prompt {n}", "completion": text}
    out |= {"answer": "4", "reward": 1.0, "outcome": 1.0, "reward_kind": "scored"}
    out |= {"reward_reason": "", "advantage": 0.5, "finished": True}
    out |= {"steps": [[0, 3], [3, 5]], "step_rewards": [1.0, 0.25], "step_advantages": [0.5, -1.0]}
    return out | more


def make_run(path: Path, steps=3, rows=None) -> Path:
    (path / "completions").mkdir(parents=True)
    (path / "config.yaml").write_text("model: tiny\n")
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "reward": step / 10, "time/update": 1.0, "note": "text"})
        lines[-1] |= {"warnings": ["shrinks"]} if step == 9 else {}
        table = (
            rows(step)
            if rows
            else [row(step, 1), row(step, 1, reward=0.0, outcome=0.0), row(step, 2)]
        )
        file = path / "completions" / f"completions_{step:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    evals = [{"step": 0, "eval/accuracy": 0.2, "eval/accuracy_se": 0.01}]
    (path / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evals))
    return path


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_it_holds_the_numbers_and_the_groups(tmp_path):
    run = make_run(tmp_path / "run")
    page = write([run])
    assert page == run / "report.html"
    (found,) = data_of(page.read_text())["runs"]
    assert found["metrics"][2] == {"step": 3, "reward": 0.3, "time/update": 1.0}
    assert found["evals"][0]["eval/accuracy_se"] == 0.01 and found["notes"] == []
    assert [s["step"] for s in found["steps"]] == [1, 2, 3]
    first, second = found["steps"][0]["groups"]
    assert (first["id"], len(first["rows"]), len(second["rows"])) == ("p1", 2, 1)
    assert first["rows"][0]["parts"] == [["ab;", 1.0, 0.5], ["cd", 0.25, -1.0]]
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_pictures_of_the_run_and_its_data_and_of_nothing_else(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    names = ["images/a.png", str(data / "big.png"), str(tmp_path / "secret.png"), "images/gone.png"]
    make_run(run, steps=1, rows=lambda step: [row(step, n, images=[names[n]]) for n in range(4)])
    (run / "images").mkdir()
    data.mkdir()
    (run / "config.yaml").write_text(f"model: tiny\ntask: {data / 'rows.jsonl'}\n")
    Image.new("RGB", (16, 16), (1, 2, 3)).save(run / "images/a.png")
    Image.new("RGB", (1000, 500), (9, 9, 9)).save(data / "big.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    page = write([run]).read_text()
    (found,) = data_of(page)["runs"]
    assert set(found["images"]) == {names[0], names[1]}
    small = base64.b64decode(found["images"][names[1]].partition(",")[2])
    assert Image.open(io.BytesIO(small)).size == (320, 160)
    assert found["steps"][0]["groups"][0]["images"] == [names[0]]
    notes = " ".join(found["notes"])
    assert "secret.png: an image outside the run" in notes and "gone.png" in notes


def test_parts_cover_the_text_whatever_the_spans():
    def joined(**more):
        got = parts(row(1, 1, **more))
        return "".join(p[0] for p in got), [p[1] for p in got]

    assert joined() == ("ab;cd", [1.0, 0.25])
    assert joined(steps=[]) == ("ab;cd", [None])
    assert joined(steps=[[1, 3]]) == ("ab;cd", [None, 1.0, None])
    assert joined(steps=[[0, 9], [2, 3]]) == ("ab;cd", [1.0])
    assert joined(text="") == ("", [])
    assert joined(steps=[[0, 3], "x"])[0] == "ab;cd"
    assert joined(text="\U0001f600b;cd")[0] == "\U0001f600b;cd"  # cut in characters, not units


def test_hostile_text_is_data_and_the_policy_names_one_script(tmp_path):
    rows = [row(1, 1, HOSTILE, steps=[]), row(1, 1, "x" * 1_000_000, steps=[])]
    rows += [row(1, 1, "\x00\x1b[31m\u202eright to left", steps=[])]
    page = write([make_run(tmp_path / "run", 1, lambda step: rows)]).read_text()
    assert page.count("</script>") == 2 and "<img" not in page
    assert len(page) < 200_000
    shown = data_of(page)["runs"][0]["steps"][0]["groups"][0]["rows"]
    assert shown[0]["parts"][0][0] == HOSTILE
    assert "980000 characters" in shown[1]["parts"][0][0]
    assert shown[2]["parts"][0][0].startswith("\u2400\u241b[31m")
    assert "script-src 'sha256-" in page and "default-src 'none'" in page
    assert embedded({"a": "\u2028<&>"}) == '{"a":"\\u2028\\u003c\\u0026\\u003e"}'


def test_a_run_in_any_state_opens(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "completions/completions_00002.parquet").write_bytes(b"PAR1 torn")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    (found,) = gather([run])["runs"]
    assert len(found["metrics"]) == 3 and len(found["notes"]) == 1
    assert "completions_00002.parquet: cannot be read" in found["notes"][0]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("model: tiny\n")
    assert gather([empty])["runs"][0]["steps"] == []
    write([empty, run], tmp_path / "both.html")
    older = make_run(tmp_path / "older", 1, lambda step: [{"prompt": "p", "completion": "c"}])
    (group,) = gather([older])["runs"][0]["steps"][0]["groups"]
    assert group["rows"][0]["parts"] == [["c", None, None]] and group["rows"][0]["outcome"] is None
    for bad in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="no such folder|expected a run"):
            gather([bad])


def test_older_steps_are_sampled_when_the_page_is_full(tmp_path):
    assert list(_spread([1, 2, 3, 4, 5])) == [5, 1, 3, 2, 4]
    assert list(_spread([])) == [] and list(_spread([7])) == [7]
    run = make_run(tmp_path / "run", 9)
    one = len(json.dumps(gather([run])["runs"][0]["steps"][0]["groups"]))
    (found,) = gather([run], budget=3 * one + 10)["runs"]
    assert [s["step"] for s in found["steps"]] == [1, 5, 9]
    assert found["notes"].pop() == "step 9: shrinks"  # a warning of the run itself
    assert found["notes"] == ["3 of 9 steps with completions are in this page"]


def test_a_step_too_large_for_the_page_is_cut_to_whole_completions(tmp_path):
    """Escapes count: a text of marks takes six times its length in the page."""
    rows = [row(1, n // 4, "<&>" * 200, steps=[]) for n in range(40)]
    run = make_run(tmp_path / "run", 1, lambda step: rows)
    found = gather([run], budget=40_000)["runs"][0]
    kept = sum(len(g["rows"]) for g in found["steps"][0]["groups"])
    assert 8 <= kept <= 11 and len(embedded(found["steps"])) < 40_500
    assert found["notes"] == [f"step 1: {kept} of 40 completions are in this page"]


def test_values_of_wrong_types_are_missing_and_the_page_is_still_written(tmp_path):
    odd = [None, True, math.nan, math.inf, 1e30, "x", [], [1], [[0, 2]], [None], [["a", "b"]]]
    odd += [[[0, 2**40]], [[-5, 3]], {"a": 1}, b"\xff", "\u202e"]
    names = [*row(1, 1), "images", "token_starts", "token_logps", "token_ratios", "token_clipped"]
    for i, value in enumerate(odd):
        run = tmp_path / str(i)
        (run / "completions").mkdir(parents=True)
        (run / "config.yaml").write_bytes((b"model: [", b"\xff\x00", b"future: 1\n")[i % 3])
        lines = '{"step": 1, "reward": NaN}\n{"step": 2, "kl": 1e999}\n[7]\n' + "[" * 5000
        (run / "metrics.jsonl").write_text(lines + '\n{"step": 3, "reward": 0.5}\n')
        table = pyarrow.table({n: pyarrow.array([value]) for n in names if n != "step" or i % 2})
        pyarrow.parquet.write_table(table, run / "completions/completions_00001.parquet")
        (found,) = data_of(write([run]).read_text())["runs"]
        assert found["metrics"] == [{"step": 1}, {"step": 2}, {"step": 3, "reward": 0.5}]
        assert "row 3 and 1 more: expected a JSON object with a step" in found["notes"][0]
        assert len(found["steps"][0]["groups"]) == 1


def test_runs_are_told_apart_and_long_ones_thinned(tmp_path, monkeypatch):
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [r["name"] for r in gather([one, two])["runs"]] == ["a/run", "b/run"]
    assert [r["name"] for r in gather([one, one])["runs"]] == [str(one), str(one)]
    monkeypatch.chdir(one)
    assert gather(["."])["runs"][0]["name"] == "run"
    rows = "".join(json.dumps({"step": n, "reward": 1.0}) + "\n" for n in range(1, 4502))
    (one / "metrics.jsonl").write_text(rows)
    (found,) = gather([one])["runs"]
    assert [r["step"] for r in found["metrics"]][-2:] == [4498, 4501]
    assert len(found["metrics"]) == 1501
    assert found["notes"] == ["metrics.jsonl: the curves show one row in 3 of 4501"]


def test_tokens_are_counted_as_a_browser_counts(tmp_path):
    more = {"completion": "a\U0001f600b;cd", "steps": [[0, 4], [4, 6]]}
    more |= {"token_starts": [0, 1, 3, 6], "token_logps": [-0.5, -1.25, -0.001, -2.0]}
    assert tokens(more, more["completion"]) == {
        "tokens": {"n": [1, 3, 3, 0], "l": [50, 125, 0, 200]}
    }
    ratio = more | {
        "token_ratios": [1.0, 1.3, 1.0, 0.5],
        "token_clipped": [False, True, False, True],
    }
    found = tokens(ratio, more["completion"])["tokens"]
    assert found["r"] == [1000, 1300, 1000, 500] and found["c"] == [1, 3]
    ones = more | {"token_ratios": [1.0] * 4}
    assert tokens(ones, more["completion"])["tokens"]["r"] == 1
    gone = more | {"token_ratios": [math.nan] * 4}
    assert tokens(gone, more["completion"])["tokens"]["r"] == [None] * 4
    assert tokens(more | {"token_logps": [-0.5]}, more["completion"]) == {}
    assert tokens(more | {"token_starts": [0, 9, 3, 6]}, more["completion"]) == {}


def test_served_pages_follow_the_run(tmp_path):
    run = make_run(tmp_path / "run", 1)
    server = serve([run], 0)
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        text = urllib.request.urlopen(base, timeout=30).read().decode()
        assert data_of(text)["live"] is True and "connect-src 'self'" in text
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "reward": 0.7}\n')
        news = json.load(urllib.request.urlopen(f"{base}/data.json", timeout=30))
        assert news["runs"][0]["metrics"][-1] == {"step": 2, "reward": 0.7}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/../config.yaml", timeout=30)
        elsewhere = urllib.request.Request(base, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):  # a name that leads here
            urllib.request.urlopen(elsewhere, timeout=30)
    finally:
        server.shutdown()
        server.server_close()


def test_only_what_is_new_is_sent(tmp_path):
    run = make_run(tmp_path / "run", 2)
    feed = Feed([run])

    def sent(at):
        return {s["step"]: "groups" in s for s in feed.news(at)["runs"][0]["steps"]}

    at = feed.news()["at"]
    assert sent("") == {1: True, 2: True} and sent(at) == {1: False, 2: False}
    assert feed.news(at)["at"] == at and sent("another.9") == {1: True, 2: True}
    third = run / "completions/completions_00003.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(3, 1)]), third)
    assert sent(at) == {1: False, 2: False, 3: True}
    later = feed.news(at)["at"]
    third.unlink()  # the run was started again from an earlier checkpoint
    assert sent(later) == {1: False, 2: False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(3, 2)]), third)
    assert sent(later) == {1: False, 2: False, 3: True}
    shutil.rmtree(run)
    with pytest.raises(InputError, match="no such folder"):
        feed.news(later)


def test_the_command(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder; give the --out folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "--out", str(tmp_path / "file/page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_whoever_read_the_output_has_gone(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    read, write_to = os.pipe()
    os.close(read)
    with os.fdopen(write_to, "w") as out, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)  # as in `reasonrl report RUN | head -0`
        assert main(["report", str(run)]) == 141
    assert capsys.readouterr().err == ""


BROWSER = next(
    (b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was not opened")
def test_a_browser_opens_it_and_nothing_hostile_runs(tmp_path):
    rows = [
        row(1, 1, HOSTILE + ";cd", steps=[[0, len(HOSTILE) + 1]]),
        row(1, 1, reward=0.0, outcome=0.0, step_rewards=[1.0, 0.75]),
    ]
    page = write([make_run(tmp_path / "run", 2, lambda step: rows)])
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"--user-data-dir={tmp_path / 'b'}"]
    for view in ("", "#view=credit"):
        done = subprocess.run(
            [*command, f"{page.as_uri()}{view}"], capture_output=True, text=True, timeout=120
        )
        assert "<title>run · reasonrl</title>" in done.stdout
        assert "CONSOLE" not in done.stderr
        if view:
            assert done.stdout.count('class="card"') == 2
            assert done.stdout.count(' data-n="') == 3 and "step reward: 0.75," in done.stdout
            assert done.stdout.count('class="flag">wrong, with every step marked right') == 1
        else:
            assert done.stdout.count("<svg") >= 3
