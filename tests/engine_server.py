"""An inference server on loopback that speaks SGLang's or vLLM's protocol and fails on request.

It holds a tiny model, samples it with our own in-process sampler, and takes new weights from the
folder that an update names. `faults`: what to do to the next replies, one each.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reasonrl import models
from reasonrl.records import Problem
from reasonrl.rollout import sample
from reasonrl.sampling import Sampling

BROKEN = {  # of a whole reply, and what it is then: a fault of both sides' understanding
    "more-logps": lambda t, p: (t, [*p, -1.0]),
    "nan": lambda t, p: (t, [float("nan"), *p[1:]]),
    "positive": lambda t, p: (t, [0.5, *p[1:]]),
    "text-ids": lambda t, p: (["a"] * len(t), p),
    "outside": lambda t, p: ([10**6, *t[1:]], p),
    "nothing": lambda t, p: ([], []),
    "too-many": lambda t, p: (t * 50, p * 50),
    "cut": lambda t, p: (t[:1], p[:1]),
}


class EngineServer:
    """`url`; `seen`: requests by path; `weights`: folders that were loaded, in order."""

    def __init__(self, kind: str, **size: int):
        self.kind, self.seen, self.weights = kind, Counter(), []
        self.faults: list[str] = []
        self.policy = models.load("tiny", dtype="fp32", seed=99, **size)
        self.version = "default"
        self.lock = threading.Lock()
        self.ready = threading.Condition(self.lock)  # told of every reply
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                outer.answer(self, json.loads(data))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> EngineServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, to: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            self.seen[to.path] += 1
            fault = self.faults.pop(0) if self.faults else ""
            if fault == "drop":
                to.close_connection = True
                return
            if fault.startswith("status-"):
                reply, status = {"error": "no"}, int(fault.removeprefix("status-"))
            else:
                reply, status = self.reply(to.path, body, fault), 200
            if fault == "hang":
                time.sleep(1.0)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.ready.notify_all()
        to.send_response(404 if reply is None else status)
        to.send_header("Content-Type", "application/json")
        to.send_header("Content-Length", str(len(data)))
        to.end_headers()
        to.wfile.write(data)

    def reply(self, path: str, body: dict[str, Any], fault: str) -> Any:
        if path == "/update_weights_from_disk" and self.kind == "sglang":
            if fault == "refuse":
                return {"success": False, "message": "another architecture"}
            self.load(body["model_path"])
            self.version = body["weight_version"]
            return {"success": True, "message": "ok"}
        if path == "/collective_rpc" and self.kind == "vllm":
            assert body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache" and self.kind == "vllm":
            return b""
        if path == "/generate" and self.kind == "sglang":
            return self.sglang(body, fault)
        if path == "/v1/completions" and self.kind == "vllm":
            return self.vllm(body, fault)
        return None

    def load(self, folder: str) -> None:
        self.weights.append(folder)
        self.policy = models.load(folder, dtype="fp32")

    def draw(self, ids: list[int], seed: int, fault: str, **how: Any):
        rollout = sample(self.policy, [Problem("0", "")], [ids], 1, Sampling(**how), [seed])
        tokens, logp = list(rollout.completion_ids[0]), rollout.logp[0].tolist()
        if fault in BROKEN:
            tokens, logp = BROKEN[fault](tokens, logp)
        if fault == "behind":
            tokens, logp = [self.policy.tokenizer.eos_token_id, *tokens][: how["max_tokens"]], logp
            logp = [-1.0, *logp][: how["max_tokens"]]
        return tokens, logp, "stop" if rollout.finished[0] else "length"

    def sglang(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        assert body["return_logprob"] is True
        how = body["sampling_params"]
        options = {key: how[key] for key in ("temperature", "top_p")}
        options |= {"max_tokens": how["max_new_tokens"], "top_k": max(0, how["top_k"])}
        tokens, logp, reason = self.draw(body["input_ids"], how["sampling_seed"], fault, **options)
        about = {
            "finish_reason": {"type": "abort" if fault == "abort" else reason},
            "output_token_logprobs": [[p, t, None] for t, p in zip(tokens, logp, strict=False)],
            "weight_version": "7000" if fault == "version" else self.version,
        }
        if fault == "more-logps":
            about["output_token_logprobs"].append([logp[-1], tokens[-1], None])
        if fault == "no-logps":
            del about["output_token_logprobs"]
        return {"text": "", "output_ids": tokens, "meta_info": about}

    def vllm(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        assert body["return_token_ids"] is True and body["logprobs"] == 0
        options = {key: body[key] for key in ("temperature", "top_p", "max_tokens")}
        options["top_k"] = max(0, body["top_k"])
        tokens, logp, reason = self.draw(body["prompt"], body["seed"], fault, **options)
        choice = {"index": 0, "text": "", "token_ids": tokens, "finish_reason": reason}
        choice |= {"logprobs": {"token_logprobs": logp}, "prompt_token_ids": body["prompt"]}
        if fault == "retokenised":
            choice["prompt_token_ids"] = body["prompt"][:-1]
        if fault == "no-ids":
            del choice["token_ids"]
        if fault == "abort":
            choice["finish_reason"] = "abort"
        return {"model": body["model"], "choices": [choice]}
