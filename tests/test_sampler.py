"Sampling through an endpoint: equal to the engine, through every fault of a server, and a clear refusal where a server cannot be used."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from phi4_ref.model.generate import generate, logprobs
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post.pts import model_sampler, search, stored
from phi4_ref.post.sampler import CompletionHandler, Lacking, completion_request, endpoint_sampler, read_completion, reported_tokens, serve

TOKENIZER = train_tokenizer(["three and four make seven"] * 9, 300)
END = TOKENIZER.eos_token_id


def tiny(hf=False):
    torch.manual_seed(0)
    if hf: return LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=.3, pad_token_id=0)).eval()
    return Transformer(ModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128,
        initializer_range=.3)).eval()


@pytest.fixture(scope="module")
def ours():
    with serve(tiny(), TOKENIZER, port=0) as server: yield server


def same(remote, local, atol=1e-5):
    assert [(c.ids, c.finished) for c in remote] == [(c.ids, c.finished) for c in local]
    for r, l in zip(remote, local): assert np.allclose(r.logprobs, l.logprobs, atol=atol)


# --- equal to the engine ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, top_p", [(1, 1), (.6, 1), (1, .8), (1.3, .9), (0, 1)])
def test_ids_and_logprobs_are_those_of_the_engine(ours, temperature, top_p):
    prompts, seeds = [[5, 6, 7 + i % 3] + [9] * (i % 5) for i in range(50)], [7 * i + 2**61 for i in range(50)]
    stops = (END, 17, 40, 41, 42)
    remote = endpoint_sampler("m", ours.url, stops, temperature, top_p, api_key="any", concurrency=9)(prompts, seeds, 30)
    local = generate(tiny(), prompts, max_total=30, temperature=temperature, top_p=top_p, stop_ids=stops, seeds=seeds)
    same(remote, local)
    assert any(c.finished for c in local) and not all(c.finished for c in local) or temperature == 0
    assert all(len(p) + len(c.ids) == 30 for p, c in zip(prompts, remote) if not c.finished)


def test_a_model_of_transformers_is_served_alike():
    prompts = [[5, 6], [5, 6, 7]]
    with serve(tiny(hf=True), TOKENIZER, port=0) as server:
        remote = endpoint_sampler("m", server.url, (END,), api_key="any")(prompts, [1, 2], 20)
    same(remote, generate(tiny(hf=True), prompts, max_total=20, stop_ids=(END,), seeds=[1, 2]))


def test_a_search_through_the_endpoint_finds_what_the_engine_finds(ours):
    class Numbers:
        def decode(self, ids, skip_special_tokens=False): return " ".join(map(str, ids))
    odd = lambda question, text: sum(map(int, text.split())) % 2 == 1
    model = tiny()
    model.lm_head.weight.data *= 2
    stops, settings = (*range(60), END), dict(tokenizer=Numbers(), oracle=odd, max_total=14, n_samples=12, filter_samples=12)
    questions, prompts = [dict(id=str(i)) for i in range(4)], [[i + 1, 5] for i in range(4)]
    with serve(model, TOKENIZER, port=0) as server: far = search(questions, prompts, endpoint_sampler("m", server.url, stops, api_key="any"), **settings)
    near = search(questions, prompts, model_sampler(model, stops), **settings)
    key = lambda rows: [(r["prompt_ids"], r["tokens"], r["pivots"], r["estimates"]) for r in rows]
    assert key(far[1]) == key(near[1]) and far[2] == near[2] and near[2]["pivots"] >= 2


def test_a_prompt_that_fills_the_length_is_not_sent(ours):
    full, other = endpoint_sampler("m", ours.url, (END,), api_key="any")([[1] * 8, [1] * 7], [0, 1], 8)
    assert (full.ids, full.finished) == ([], False) and len(other.ids) == 1
    assert endpoint_sampler("m", ours.url, (END,), api_key="any")([], [], 8) == []


def test_requests_that_wait_are_generated_together(ours, monkeypatch):
    import phi4_ref.post.sampler as module
    sizes, real = [], module.generate
    def counted(model, prompts, **settings):
        sizes.append(len(prompts))
        return real(model, prompts, **settings)
    monkeypatch.setattr(module, "generate", counted)
    endpoint_sampler("m", ours.url, (END,), api_key="any", concurrency=32)([[5, 6]] * 64, range(64), 20)
    assert sum(sizes) == 64 and max(sizes) > 4


@pytest.mark.parametrize("setting", [dict(n=2), dict(stop=["."]), dict(top_k=5), dict(repetition_penalty=1.2), dict(stream=True), dict(logprobs=5), dict(prompt=[[1], [2]]), dict(prompt=[]),
                                     dict(prompt=[10_000]), dict(temperature=-1), dict(top_p=0)])
def test_our_server_refuses_what_the_engine_cannot_do(ours, setting):
    import openai
    with pytest.raises(openai.BadRequestError, match=next(iter(setting))):
        openai.OpenAI(base_url=ours.url, api_key="any", max_retries=0).post("/completions", body=completion_request([1], 0, 9, []) | setting, cast_to=object)


def test_the_openai_client_reads_our_server(ours):
    import openai
    client = openai.OpenAI(base_url=ours.url, api_key="any")
    reply = client.completions.create(model=client.models.list().data[0].id, prompt="three and", max_tokens=3, seed=5, logprobs=1)
    assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.token_logprobs) == 3 and reply.choices[0].finish_reason == "length"


# --- a server that fails ----------------------------------------------------------------------------------------------------

@pytest.fixture
def faulty():
    "Start a server whose n-th request meets the n-th fault; gives its URL and what it saw."
    servers = []
    def start(faults=(), always=None, seconds=0.):
        faults, lock = list(faults), threading.Lock()
        seen = dict(bodies=[], now=0, most=0, closed=0)
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
            def log_message(self, *args): pass
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    seen["bodies"].append(body); seen["now"] += 1; seen["most"] = max(seen["most"], seen["now"])
                    fault = faults.pop(0) if faults else always
                try: self.reply(body, fault)
                finally:
                    with lock: seen["now"] -= 1
            def reply(self, body, fault):
                time.sleep(seconds)
                n, first = body["max_tokens"], len(body["prompt"])
                ids = [(body["seed"] + first + i) % 100 + 100 for i in range(n)]
                choice = dict(index=0, text="x" * n, finish_reason="length", token_ids=ids, logprobs=dict(tokens=["x"] * n, token_logprobs=[-float(t) for t in ids]))
                usage, status, size, kind = dict(prompt_tokens=first, completion_tokens=n), 200, None, "application/json"
                if isinstance(fault, int): status = fault
                if fault == "no ids": del choice["token_ids"]
                if fault == "no logprobs": choice["logprobs"] = None
                if fault == "null in logprobs": choice["logprobs"]["token_logprobs"][0] = None
                if fault == "some ids": choice["token_ids"] = ids[1:]
                if fault == "longer prompt": usage["prompt_tokens"] += 1
                if fault == "unknown end": choice.update(finish_reason="stop", token_ids=ids[:-1], logprobs=dict(token_logprobs=[-1.] * (n - 1))); usage["completion_tokens"] -= 1
                if fault == "aborted": choice["finish_reason"] = "abort"
                text = json.dumps(dict(choices=[choice], usage=usage) if fault != "no choices" else dict(choices=[]))
                if isinstance(fault, int): text = json.dumps(dict(error=dict(message=f"said {fault}")))
                if fault == "html": kind, text = "text/html", "<h1>bad gateway</h1>"
                if fault == "truncated json": text = text[:40]
                if fault == "cut": size = len(text) + 100
                if fault == "hang":
                    self.connection.settimeout(60)
                    try: gone = self.rfile.read(1) == b""
                    except TimeoutError: gone = False
                    except OSError: gone = True
                    with lock: seen["closed"] += gone
                    self.close_connection = True
                    return
                if fault == "drop": self.close_connection = True; return self.connection.shutdown(2)
                self.send_response(status)
                for header, value in [("Content-Type", kind), ("Content-Length", size or len(text)), ("Retry-After-Ms", 5)]: self.send_header(header, str(value))
                self.end_headers()
                try: self.wfile.write(text.encode())
                except OSError: pass
                if fault == "cut": self.close_connection = True
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.request_queue_size, server.daemon_threads = 256, True
        server.socket.listen(256)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen
    yield start
    for server in servers: server.shutdown(); server.server_close()


def expected(prompts, seeds, total): return [[(s + len(p) + i) % 100 + 100 for i in range(total - len(p))] for p, s in zip(prompts, seeds)]


PROMPTS, SEEDS = [[1] * (1 + i % 3) for i in range(12)], list(range(12))


@pytest.mark.parametrize("fault", ["drop", "cut", "truncated json", "html", "no choices", "aborted", "hang", 429, 500, 502, 503])
def test_a_passing_fault_is_retried(faulty, fault):
    url, seen = faulty([None, fault, None, fault])
    done = endpoint_sampler("m", url, (2,), api_key="any", concurrency=4, timeout_s=2 if fault == "hang" else 60)(PROMPTS, SEEDS, 9)
    assert [c.ids for c in done] == expected(PROMPTS, SEEDS, 9)
    assert [c.logprobs for c in done] == [[-float(t) for t in c.ids] for c in done]
    assert len(seen["bodies"]) >= 14


@pytest.mark.parametrize("fault, says", [("no ids", "returns no token ids"), ("no logprobs", "0 log-probabilities for 8 tokens"), ("null in logprobs", "log-probabilities"), ("some ids", "7 of 8 token ids"),
    ("longer prompt", "read 2 prompt tokens where 1"), ("unknown end", "not in stop_ids"), (400, "said 400"), (422, "said 422")])
def test_what_a_server_lacks_is_named_and_not_asked_for_again(faulty, fault, says):
    url, seen = faulty(always=fault)
    with pytest.raises(ValueError, match=says): endpoint_sampler("m", url, (2,), api_key="any", concurrency=1)([[1]], [0], 9)
    assert len(seen["bodies"]) == 1


@pytest.mark.parametrize("fault, says", [(401, "key was refused"), (404, "not found"), (500, "after 2 attempts"), ("html", "2 times with something that is no completion"), ("aborted", "broke off: abort"),
    ("drop", "is the server running"), ("hang", "no reply in time")])
def test_what_does_not_pass_is_named(faulty, fault, says):
    url, _ = faulty(always=fault)
    with pytest.raises(RuntimeError, match=says): endpoint_sampler("m", url, (2,), api_key="any", retries=1, timeout_s=1 if fault == "hang" else 60)(PROMPTS, SEEDS, 9)


def test_never_more_in_flight_than_allowed(faulty):
    url, seen = faulty([500, "html", "drop"], seconds=.02)
    endpoint_sampler("m", url, (2,), api_key="any", concurrency=5)([[1]] * 60, range(60), 9)
    assert seen["most"] == 5 and len(seen["bodies"]) >= 63


def test_every_setting_of_the_policy_is_sent_and_each_rollout_has_its_seed(faulty):
    url, seen = faulty()
    endpoint_sampler("m", url, (2, 3), api_key="any")(PROMPTS, SEEDS, 9)
    assert sorted(b["seed"] for b in seen["bodies"]) == SEEDS
    for b in seen["bodies"]:
        assert (b["temperature"], b["top_p"], b["top_k"], b["min_p"], b["repetition_penalty"], b["presence_penalty"], b["frequency_penalty"]) == (1, 1, -1, 0, 1, 0, 0)
        assert b["model"] == "m" and len(b["prompt"]) + b["max_tokens"] == 9 and b["stop_token_ids"] == [2, 3] and b["return_token_ids"] is True


def test_what_was_answered_before_the_server_failed_is_stored(faulty, tmp_path):
    (broken, _), (mended, seen) = faulty([None] * 20, always=500), faulty()
    prompts, seeds = [[1] * (1 + i % 3) for i in range(50)], list(range(50))
    def through(url): return stored(endpoint_sampler("m", url, api_key="any", concurrency=4, retries=0), tmp_path/"r.sqlite", "m")
    with pytest.raises(RuntimeError): through(broken)(prompts, seeds, 8)
    found = through(mended)(prompts, seeds, 8)
    assert [c.ids for c in found] == expected(prompts, seeds, 8) and len(seen["bodies"]) == 50 - 16, "two slices of eight were whole"


def test_a_first_failure_stops_the_rest(faulty):
    url, seen = faulty([None] * 10 + [400], seconds=.02)
    with pytest.raises(ValueError, match="said 400"): endpoint_sampler("m", url, (2,), api_key="any", concurrency=2)([[1]] * 500, range(500), 9)
    assert len(seen["bodies"]) < 20


def test_inside_a_running_event_loop(faulty):
    import asyncio
    url, _ = faulty()
    async def cell(): return endpoint_sampler("m", url, (2,), api_key="any")(PROMPTS, SEEDS, 9)  # as a notebook's cell does
    assert [c.ids for c in asyncio.run(cell())] == expected(PROMPTS, SEEDS, 9)


def test_ctrl_c_ends_it_and_closes_the_connections(faulty):
    url, seen = faulty(always="hang")
    code = f"from phi4_ref.post.sampler import endpoint_sampler; print('ready', flush=True); endpoint_sampler('m', {url!r}, (2,), api_key='any', concurrency=6)([[1]] * 50, range(50), 9)"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, start_new_session=True)
    job.stdout.readline()
    until = time.monotonic() + 120
    while len(seen["bodies"]) < 6 and time.monotonic() < until: time.sleep(.02)
    os.kill(job.pid, signal.SIGINT)
    _, err = job.communicate(timeout=50)  # the server would hang for longer
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt" and "never retrieved" not in err
    while seen["closed"] < 6 and time.monotonic() < until: time.sleep(.02)
    assert seen["closed"] == 6 and len(seen["bodies"]) == 6


# --- shapes and policies ----------------------------------------------------------------------------------------------------

def test_three_shapes_and_nothing_else():
    ids, logs = [4, 5, 2], [-1., -2., -.5]
    assert reported_tokens(dict(token_ids=ids, logprobs=dict(tokens=["a", "b", ""], token_logprobs=logs))) == (ids, logs)
    assert reported_tokens(dict(logprobs=dict(tokens=["token_id:4", "token_id:5", "token_id:2"], token_logprobs=logs))) == (ids, logs)
    assert reported_tokens(dict(logprobs=dict(content=[dict(id=i, token="x", logprob=l) for i, l in zip(ids, logs)]))) == (ids, logs)
    assert reported_tokens(dict(text="abc", logprobs=dict(tokens=["4", "5", "2"], token_logprobs=logs)))[0] == []
    assert reported_tokens(dict(text="abc", logprobs=None)) == ([], [])


def test_what_follows_a_stop_id_or_the_length_is_cut():
    reply = dict(choices=[dict(token_ids=[4, 2, 9, 9], finish_reason="length", logprobs=dict(token_logprobs=[-1., -2., -3., -4.]))])
    cut = read_completion(reply, completion_request([1], 0, 5, [2]))
    assert (cut.ids, cut.logprobs, cut.finished) == ([4, 2], [-1., -2.], True)
    longer = read_completion(reply, completion_request([1], 0, 4, [7]))
    assert (longer.ids, longer.finished) == ([4, 2, 9], False)
    with pytest.raises(Lacking, match="max-model-len"): read_completion(reply, completion_request([1], 0, 9, [7]))


class Reporting(CompletionHandler):
    "Our server, reporting log-probabilities of the model, or of the policy without top-p."
    kind = "raw"
    def answer(self, status, value):
        choice = value.get("choices", [{}])[0]
        if status == 200 and "token_ids" in choice:
            prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
            if self.kind == "raw": choice["logprobs"]["token_logprobs"] = logprobs(tiny(), [prompt + ids])[0][len(prompt):]
            else:
                with torch.no_grad(): logits = tiny()(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1] / self.temperature
                choice["logprobs"]["token_logprobs"] = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
        super().answer(status, value)
    def do_POST(self):
        read = self.rfile.read
        def remember(n):
            body = read(n)
            self.temperature = json.loads(body)["temperature"]
            return body
        self.rfile.read = remember
        try: super().do_POST()
        finally: self.rfile.read = read


@pytest.mark.parametrize("kind, temperature, top_p, says", [("raw", 1, 1, None), ("raw", 0, 1, None), ("raw", .7, 1, "before temperature and top-p"), ("raw", 1, .9, "temperature and top-p"), ("raw", 1.5, .9, "processed_logprobs"),
    ("no top-p", .7, 1, None), ("no top-p", 1, .9, "before top-p"), ("no top-p", .7, .9, "before top-p")])
def test_log_probabilities_of_another_policy_are_refused(kind, temperature, top_p, says):
    with serve(tiny(), TOKENIZER, port=0) as server:
        server.RequestHandlerClass = type("Handler", (Reporting,), dict(kind=kind))
        sampler = endpoint_sampler("m", server.url, (END,), temperature, top_p, api_key="any")
        if says:
            with pytest.raises(Lacking, match=says): sampler([[5, 6]], [0], 12)
        else: same(sampler([[5, 6]], [0], 12), generate(tiny(), [[5, 6]], max_total=12, temperature=temperature, top_p=top_p, stop_ids=(END,), seeds=[0]))


# --- a real server, where one is named ----------------------------------------------------------------------------------------

REAL = os.environ.get("PHI4_REF_ENDPOINT", "").split()


@pytest.mark.skipif(len(REAL) != 3, reason='set PHI4_REF_ENDPOINT="URL MODEL CHECKPOINT" to a running vLLM, SGLang or llama.cpp and the directory of the weights that it serves')
def test_a_real_server():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    url, name, path = REAL
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [tokenizer.encode(text) for text in ("What is 7 + 5?", "Name one planet.", "Water is") for _ in range(5)]
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id, *np.atleast_1d(model.generation_config.eos_token_id or []).tolist()} - {None}
    sample = endpoint_sampler(name, url, sorted(stops), api_key="any", concurrency=8)
    done, again = (sample(prompts, range(15), max(map(len, prompts)) + 24) for _ in range(2))
    assert all(c.finished or len(p) + len(c.ids) == max(map(len, prompts)) + 24 for p, c in zip(prompts, done))
    assert len({tuple(c.ids) for c in done}) > 8 and sum(a.ids == b.ids for a, b in zip(done, again)) > 10  # a seed each; batches may round differently
    scored = logprobs(model, [p + c.ids for p, c in zip(prompts, done)])
    apart = np.array([a - b for p, c, row in zip(prompts, done, scored) for a, b in zip(c.logprobs, row[len(p):], strict=True)])
    print(f"{name}: {len(apart)} tokens; server minus transformers: median size {np.median(np.abs(apart)):.5f}, mean {apart.mean():+.5f}")
    assert np.median(np.abs(apart)) < .1 and abs(apart.mean()) < .05  # quantised kernels differ by hundredths; another policy differs by tenths
