"""OpenRLHF's own executor gets its rewards from our file and from our server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from served import Served, scripted

from reasonrl.integrations import openrlhf_reward
from reasonrl.integrations.openrlhf_reward import reward_func, reward_function
from reasonrl.records import scored
from reasonrl.serve.scorers import Plan, open_scorer


@pytest.fixture
def host(require, monkeypatch):
    """The released `utils/agent.py`, from its file, with a stand-in for aiohttp (not installed
    here) that posts what it is given, and for the host's logger."""
    try:
        files = metadata.files("openrlhf") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if str(f).endswith("openrlhf/utils/agent.py")]
    require("openrlhf", None if found else "pip install --no-deps openrlhf")
    logged: list[str] = []
    logger = types.SimpleNamespace(info=logged.append, warning=logged.append)
    logs = types.ModuleType("openrlhf.utils.logging_utils")
    logs.__dict__["init_logger"] = lambda _: logger
    web = types.ModuleType("aiohttp")
    web.__dict__.update(ClientSession=Session, ClientTimeout=lambda total: total)
    web.__dict__["ClientError"] = OSError
    for name in ("openrlhf", "openrlhf.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", logs)
    monkeypatch.setitem(sys.modules, "aiohttp", web)
    spec = importlib.util.spec_from_file_location("openrlhf_agent", str(found[0].locate()))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["logged"] = logged
    return module


class Session:
    def __init__(self, timeout):
        self.timeout = timeout

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return False

    def post(self, url, json):
        return Reply(url, json)


class Reply(Session):
    def __init__(self, url, payload):
        self.url, self.payload = url, payload

    async def __aenter__(self):
        data = json.dumps(self.payload).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        opened = await asyncio.to_thread(urllib.request.urlopen, request, None, 60)
        self.body = opened.read()
        return self

    def raise_for_status(self):
        pass

    async def json(self):
        return json.loads(self.body)


class Tokenizer:
    """A character is a token; the end of a completion is written as models do."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


class Engine:
    def __init__(self, said):
        self.said = said

    async def generate(self, prompt_ids, params, multi_modal_data=None):
        ids = [ord(c) for c in self.said]
        out = types.SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
        return types.SimpleNamespace(outputs=[out])


def execute(host, url: str, said: str, label: str):
    executor = host.SingleTurnAgentExecutor(url)
    params = types.SimpleNamespace(max_tokens=64, logprobs=None)
    work = executor.execute("<|u|>1/2?<|a|>", label, params, 256, Tokenizer(), Engine(said))
    return asyncio.run(work)


@pytest.mark.parametrize(("said", "value"), [(r"\boxed{0.5}<|end|>", 1.0), ("so 3</s>", 0.0)])
def test_the_host_gets_its_reward(host, said, value):
    path = openrlhf_reward.__file__
    mine = execute(host, path, said, r"\frac{1}{2}")
    assert mine["reward"].tolist() == mine["scores"].tolist() == [value]
    with Served(open_scorer("math", Plan())) as served:
        url = f"http://127.0.0.1:{served.port}/get_reward"
        remote = execute(host, url, said, r"\frac{1}{2}")
        assert remote["reward"] == remote["scores"] == [value]
    for output in (mine, remote):  # what the host makes of it afterwards
        assert torch.tensor([output["reward"]]).flatten().tolist() == [value]
        assert torch.tensor([output["extra_logs"]["unscored"]]).flatten().tolist() == [0.0]


def test_the_host_learns_why_there_is_none(host):
    output = execute(host, openrlhf_reward.__file__, "4", "")
    assert output["reward"] is None
    assert "unscorable: the gold answer is empty" in str(host.logged[-1])


def test_the_file_by_itself():
    queries, prompts = ["2+2?####4", "2+2?####5"], ["2+2?"] * 2
    found = reward_func(queries, prompts, ["4", "4"], images=None)
    assert found["rewards"].tolist() == [1.0, 0.0] and found["scores"].dtype == torch.float32
    lenient = reward_function(unscored=-0.5)
    found = lenient(queries, prompts, ["", "5"])
    assert found["rewards"].tolist() == [-0.5, 1.0] and found["scores"].tolist() == [0.0, 1.0]
    assert found["extra_logs"]["unscored"].tolist() == [1.0, 0.0]
    code = reward_function("code", unscored=0.0)
    program = "```python\ndef f(x): return x + 1\n```"
    found = code([f"p{program}"], ["p"], ["assert f(1) == 2\nassert f(1) == 3"])
    assert found["rewards"].tolist() == [0.5] or found["extra_logs"]["unscored"].tolist() == [1.0]
    with pytest.raises(ValueError, match="expected the prompt in the query"):
        reward_func(["x"], ["y"], ["4"])
    for kind in ("maths", "prm", "math=x"):
        with pytest.raises(ValueError, match="kind: expected math, code"):
            reward_function(kind)


def test_several_urls_share_the_work(host):
    with Served(scripted(lambda r: [scored(0.25)])) as one, Served(scripted()) as two:
        urls = [f"http://127.0.0.1:{s.port}/reward" for s in (one, two)]
        executor = host.SingleTurnAgentExecutor(urls)
        got = asyncio.run(executor._fetch_rewards_via_http(["p1", "p2"], ["p", "p"], ["1", "2"]))
        assert [row["rewards"] for row in got] == [[0.25], [1.0]]
