"The generator client: tags that hold, a store that survives kill -9, and an endpoint that fails in every way."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.synth.llm import (OpenAIChat, ReplyStore, Stored, TAGS, ask, ask_json, derive_seed, occurrences, parse_json,
                                prompt, tag, untag, visible)


def user(text): return [{"role": "user", "content": text}]


class Echo:
    "Answers with the text, the seed and the occurrence index; remembers what it was asked."
    def __init__(self, name="echo"): self.name, self.calls = name, []
    def chat(self, conversations, *, temperature=1.0, top_p=1.0, max_tokens=512, seed=0):
        texts = [c[-1]["content"] for c in conversations]
        self.calls.append((texts, seed))
        return [f"{t}|{seed}|{k}" for t, k in zip(texts, occurrences(texts))]


# --- tags ---------------------------------------------------------------------------------------------------------------

hostile = st.lists(st.sampled_from(["<", "</", "\\", ">", " ", "\n", "page", "PAGE", "answer", "reply_1", "reply_x", "b", "x < y", "</page>",
                                    "<answer>", "<\\/page>"]), max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(hostile | st.text(), hostile)
def test_inputs_stay_inside_their_tags(page, answer):
    text = prompt("rate page", "Rate it.", page=page, answer=answer)
    assert text.startswith("Task: rate page\n")
    assert [text.lower().count(t) for t in ("<page>", "</page>", "<answer>", "</answer>")] == [1, 1, 1, 1]
    assert untag("page", text) == page and untag("answer", text) == answer


def test_a_name_that_is_no_tag_is_refused():
    with pytest.raises(ValueError, match=r"tag\(name, text\)"): tag("some text", "page")


@pytest.mark.parametrize("text", ["", "<page>", "</page>", "</page><page>", "<page>x</pag>"])
def test_a_missing_or_open_tag_is_an_error(text):
    with pytest.raises(ValueError, match="no <page>"): untag("page", text)


# --- JSON and asking ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ('{"a": 1}', {"a": 1}), ('```json\n{"a": 1}\n```', {"a": 1}), ('Here is [the] JSON: {"a": 1}. Bye {x}', {"a": 1}),
    ('{x} {"a": {"b": 2}}', {"a": {"b": 2}}), ("so [1, 2]", [1, 2]), ('{"a": "}{"}', {"a": "}{"}), ('{"a": NaN} {"b": 1}', {"b": 1})])
def test_json_is_found_in_prose(text, value): assert parse_json(text) == value


@pytest.mark.parametrize("text", ["", "no", '{"a": ', "{'a': 1}", "{" * 100_000, "[" * 100_000, '{"a": NaN}'])
def test_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match="no JSON"): parse_json(text)


def test_thoughts_are_not_heard():
    assert visible('<think>{"a": 0}\n</think>\n{"a": 1}') == '{"a": 1}'
    assert visible("A <think> tag in text </think> stays.") == "A <think> tag in text </think> stays."


def test_malformed_replies_are_retried_with_other_seeds_then_counted():
    llm = Echo()
    def parse(reply):
        text, seed, _ = reply.split("|")
        if text == "never" or text == "later" and seed == "5": raise ValueError
        if text == "odd": return {}["key"]
        return text
    values, counts = ask(llm, ["now", "later", "never", "odd"], parse, seed=5)
    assert values == ["now", "later", None, None]
    assert counts == {"asked": 4, "retried": 3 + 2, "malformed": 2}
    assert len({seed for _, seed in llm.calls}) == 3
    assert ask_json(llm, [], seed=1) == ([], {"asked": 0, "retried": 0, "malformed": 0})


def test_a_bug_in_the_parser_is_not_swallowed():
    with pytest.raises(ZeroDivisionError): ask(Echo(), ["x"], lambda reply: 1 / 0)


def test_derived_seeds_do_not_collide():
    assert len({derive_seed(s, "occurrence", k) for s in range(50) for k in range(50)}) == 2500
    assert derive_seed(3, "a") == derive_seed(3, "a") and 0 <= derive_seed(3, "a") < 2**31


# --- the store ------------------------------------------------------------------------------------------------------------

def test_replies_do_not_depend_on_chunks_or_on_what_was_stored(tmp_path):
    batch = [user(t) for t in ["a", "b", "a", "c", "a", "b"]]
    whole = Stored(Echo(), tmp_path / "1.db").chat(batch, seed=7)
    assert len(set(whole)) == 6
    assert Stored(Echo(), tmp_path / "2.db", chunk=1).chat(batch, seed=7) == whole
    part = Stored(Echo(), tmp_path / "3.db")
    part.chat(batch[:3], seed=7)
    assert part.chat(batch, seed=7) == whole
    assert (part.hits, part.asked) == (3, 6)


def test_everything_that_determines_a_reply_is_in_its_key(tmp_path):
    llm = Echo(); stored = Stored(llm, tmp_path / "s.db")
    for settings_ in [{}, {"seed": 1}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 9}]: stored.chat([user("a")], **settings_)
    stored.chat([[{"role": "system", "content": "be brief"}, *user("a")]])
    Stored(Echo("other"), tmp_path / "s.db").chat([user("a")])
    assert len(stored.store) == 7
    stored.chat([user("a")], temperature=1, seed=0)
    assert len(llm.calls) == 6


def test_an_empty_reply_is_not_kept(tmp_path):
    class Mute(Echo):
        def chat(self, conversations, **sampling): return ["" for _ in conversations]
    Stored(Mute(), tmp_path / "s.db").chat([user("a")])
    assert Stored(Echo(), tmp_path / "s.db").chat([user("a")]) == ["a|0|0"]


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "s.db").write_text("not a database, but long enough to be read as one" * 50)
    with pytest.raises(ValueError, match="s.db is not a reply store"): ReplyStore(tmp_path / "s.db")


def test_threads_and_a_renamed_directory(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    (tmp_path / "a").mkdir()
    stored = Stored(Echo(), tmp_path / "a" / "s.db", chunk=5)
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda i: stored.chat([user(f"{i % 7} {k}") for k in range(20)]), range(14)))
    assert len(stored.store) == 7 * 20
    (tmp_path / "a").rename(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["s.db"]
    assert len(ReplyStore(tmp_path / "b" / "s.db")) == 7 * 20


SLOW = """
import sys, time
from phi4_ref.synth.llm import Stored
class Slow:
    name = "slow"
    def chat(self, conversations, **sampling):
        time.sleep(.1)
        return [c[-1]["content"] + "!" for c in conversations]
print("ready", flush=True)
Stored(Slow(), sys.argv[1], chunk=10).chat([[{"role": "user", "content": f"m{i}"}] for i in range(1000)])
"""


def test_kill_9_loses_at_most_one_chunk(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "s.db")], stdout=subprocess.PIPE)
    job.stdout.readline()
    while not (tmp_path / "s.db").exists() or len(ReplyStore(tmp_path / "s.db")) < 30: time.sleep(.05)
    job.send_signal(signal.SIGKILL); job.wait()
    class Second:
        name = "slow"
        def chat(self, conversations, **sampling): return [c[-1]["content"] + "!" for c in conversations]
    stored = Stored(Second(), tmp_path / "s.db", chunk=10)
    assert stored.chat([user(f"m{i}") for i in range(1000)]) == [f"m{i}!" for i in range(1000)]
    assert 0 < stored.hits < 1000 and stored.hits % 10 == 0


# --- an endpoint that fails -------------------------------------------------------------------------------------------------

@pytest.fixture
def endpoint():
    "Start a server whose n-th request meets the n-th fault; gives its URL and the bodies it received."
    servers = []
    def start(faults, api_key="right"):
        seen, lock = [], threading.Lock()
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock: seen.append(body); fault = faults.pop(0) if faults else None
                text = json.dumps({"choices": [{"message": {"role": "assistant", "content": f"{body['messages'][-1]['content']}|{body['seed']}"}}]})
                status, kind, size = 200, "application/json", None
                if self.headers["Authorization"] != f"Bearer {api_key}": fault = 401
                if isinstance(fault, int): status, text = fault, "{}"
                if fault == "slow": time.sleep(6)
                if fault == "html": kind, text = "text/html", "<h1>bad gateway</h1>"
                if fault == "broken json": text = text[:20]
                if fault == "cut": size = len(text) + 100
                if fault == "null": text = json.dumps({"choices": []})
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(size or len(text)))
                self.send_header("Retry-After-Ms", "5")
                self.end_headers()
                try: self.wfile.write(text.encode())
                except OSError: pass
                if fault == "cut": self.close_connection = True
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen
    yield start
    for server in servers: server.shutdown(); server.server_close()


@pytest.mark.parametrize("fault", [500, 503, 429, "html", "broken json", "cut", "null", "slow"])
def test_a_fault_is_retried(endpoint, fault):
    url, seen = endpoint([fault, fault])
    llm = OpenAIChat("m", url, "right", concurrency=4, timeout_s=3 if fault == "slow" else 60)
    assert llm.chat([user(f"q{i}") for i in range(6)]) == [f"q{i}|0" for i in range(6)]
    assert len(seen) >= 8  # more where a loaded machine is slow to answer


def test_copies_are_sent_with_seeds_of_their_own(endpoint):
    url, seen = endpoint([])
    assert len(set(OpenAIChat("m", url, "right").chat([user("q")] * 5, seed=3))) == 5
    assert OpenAIChat("m", url, "right").chat([user("q")], seed=3) == ["q|3"]
    assert seen[0]["model"] == "m" and seen[0]["max_tokens"] == 512


def test_a_refused_conversation_is_empty_and_does_not_stop_the_batch(endpoint):
    url, _ = endpoint([400])
    with pytest.warns(RuntimeWarning, match="refuses 1 of 2 conversations"): assert OpenAIChat("m", url, "right", concurrency=1).chat([user("too long"), user("q")]) == ["", "q|0"]


def test_a_server_that_refuses_every_conversation_is_not_taken_for_a_silent_one(endpoint, tmp_path):
    url, _ = endpoint([None] * 8 + [400] * 8)
    llm = Stored(OpenAIChat("m", url, "right"), tmp_path / "s.db", chunk=8)
    with pytest.raises(RuntimeError, match="refuses 8 of 8 conversations: .*400.*max_tokens"): llm.chat([user(f"q{i}") for i in range(16)])
    assert len(llm.store) == 8


def test_a_model_that_gives_too_few_replies_is_named():
    class Short:
        name = "short"
        def chat(self, conversations, **sampling): return ["one"]
    with pytest.raises(ValueError, match="'short' gave 1 replies to 2 conversations"): ask(Short(), ["a", "b"])


def test_a_full_disk_is_named_and_keeps_what_was_stored(tmp_path):
    code = f"""
import resource
from phi4_ref.synth.llm import ReplyStore
store = ReplyStore({str(tmp_path / "s.db")!r})
store.put([b"first"], ["kept"])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))  # no file grows further, as on a full disk
try: store.put([b"second"], ["x" * 10**6])
except OSError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "s.db" in done.stdout and "is the disk full" in done.stdout, done.stderr
    assert ReplyStore(tmp_path / "s.db").get([b"first", b"second"]) == ["kept", None]
    with pytest.raises(ValueError, match="cannot make the directory"): ReplyStore(tmp_path / "s.db" / "below" / "t.db")


@pytest.mark.parametrize("fault, says", [(401, "the key was refused"), (404, "not found"), ("html", "no completion"), (500, "after 2 attempts")])
def test_what_cannot_be_mended_says_what_to_change(endpoint, fault, says):
    url, _ = endpoint([fault] * 100)
    with pytest.raises(RuntimeError, match=says): OpenAIChat("m", url, "right", retries=1).chat([user("q")] * 3)


def test_a_wrong_key_a_missing_server_and_no_key(endpoint, monkeypatch):
    url, seen = endpoint([])
    with pytest.raises(RuntimeError, match="api_key"): OpenAIChat("m", url, "wrong").chat([user("q")])
    assert len(seen) == 1
    for address in ("http://127.0.0.1:9/v1", "http://nowhere.invalid/v1"):  # nobody waits a thousand times for a server that was never there
        with pytest.raises(RuntimeError, match="is the server running"): OpenAIChat("m", address, "k", retries=1000).chat([user("q")])
    for address in ("", "localhost:8000/v1", "http:///v1"):
        with pytest.raises(ValueError, match=f"base_url '{address}' is no address"): OpenAIChat("m", address, "k")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"): OpenAIChat("m")


def test_what_was_answered_before_the_server_died_is_stored(endpoint, tmp_path):
    url, seen = endpoint([None] * 20 + [500] * 1000)
    batch = [user(f"q{i}") for i in range(40)]
    with pytest.raises(RuntimeError): Stored(OpenAIChat("m", url, "right", retries=0), tmp_path / "s.db", chunk=10).chat(batch)
    url, seen = endpoint([])
    assert Stored(OpenAIChat("m", url, "right"), tmp_path / "s.db", chunk=10).chat(batch) == [f"q{i}|0" for i in range(40)]
    assert len(seen) == 20


# --- a local model ----------------------------------------------------------------------------------------------------------

def test_local_replies_do_not_depend_on_the_batch():
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from phi4_ref.synth.llm import LocalChat
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, eos_token_id=0))
    with pytest.raises(ValueError, match="no chat template"): LocalChat(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [user("hi " * n) for n in (1, 7, 3, 1, 4)]
    for sampling in [dict(temperature=0), dict(temperature=1.0), dict(temperature=0.7, top_p=0.5)]:
        whole = LocalChat(model, tokenizer).chat(chats, max_tokens=6, **sampling)
        assert LocalChat(model, tokenizer, batch_size=2).chat(chats, max_tokens=6, **sampling) == whole
        assert (whole[0] == whole[3]) == (sampling["temperature"] == 0)
    assert LocalChat(model, tokenizer).chat(chats, max_tokens=6, seed=1) != LocalChat(model, tokenizer).chat(chats, max_tokens=6, seed=2)
    with pytest.warns(RuntimeWarning, match="1 of 2 conversations do not fit in the 2048 tokens"): assert [bool(r) for r in LocalChat(model, tokenizer).chat([user("x" * 3000), user("hi")], max_tokens=4)] == [False, True]
    assert LocalChat(model, tokenizer).chat([]) == []
    for wrong in (dict(temperature=-1), dict(top_p=0.0), dict(max_tokens=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"): LocalChat(model, tokenizer).chat(chats, **wrong)
    with pytest.raises(ValueError, match="cannot load a language model .* '/no/such/model'"): LocalChat("/no/such/model")
