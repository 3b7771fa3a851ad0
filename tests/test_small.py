"The `small` configuration from local files: real pages, textbook, code and problems through the stages, with a scripted teacher behind a real endpoint."
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset
from lxml import etree

from phi4_ref.data.documents import file_to_document, parse_xml, to_html
from phi4_ref.records import load, load_json
from phi4_ref.synth.llm import untag

from tiny import ENV, PHI4

pytestmark = pytest.mark.skipif(not os.environ.get("PHI4_REF_DATA"), reason="PHI4_REF_DATA is unset: no real data to build the files from")


# --- local files ----------------------------------------------------------------------------------------------------------

def write_jsonl(path, rows): path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "JSONL and Parquet files as a user would have them."
    folder, data = tmp_path_factory.mktemp("files"), Path(os.environ["PHI4_REF_DATA"])
    with tarfile.open(data/"textbook_openstax_python/modules.tar.xz") as tar: tar.extractall(folder/"textbook", filter="data")
    modules = sorted((folder/"textbook").rglob("*.cnxml"))
    def html(path):
        root = parse_xml(path.read_bytes())
        to_html(root)
        return f"<html><body><nav>Home | Contents | Next</nav>{etree.tostring(root, encoding='unicode')}</body></html>"
    write_jsonl(folder/"pages.jsonl", [{"url": f"https://example.org/{path.parent.name}", "html": html(path)} for path in modules])
    texts = [file_to_document(path)["text"] for path in modules]
    Dataset.from_list([{"text": "\n\n".join(texts[i:i + 6])} for i in range(0, len(texts), 6)]).to_parquet(folder/"books.parquet")
    with tarfile.open(data/"code_with_tests/thealgorithms_python.tar.xz") as tar:
        sources = [tar.extractfile(m).read().decode() for m in sorted(tar.getmembers(), key=lambda m: m.name) if m.name.endswith(".py")]
    Dataset.from_list([{"content": text} for text in sources[:200]]).to_parquet(folder/"code.parquet")
    with gzip.open(data/"gsm8k/train.jsonl.gz", "rt") as lines: problems = [json.loads(line) for line in lines]
    easy = [p for p in problems if re.fullmatch(r"[1-9]", p["answer"].split("####")[-1].strip())]
    write_jsonl(folder/"questions.jsonl", easy[:240])
    write_jsonl(folder/"chats.jsonl", [{"messages": [{"role": "user", "content": p["question"]}, {"role": "assistant", "content": worked(p)}]} for p in easy[240:500]])
    write_jsonl(folder/"trivia.jsonl", [{"question": f"In which year was the {name} founded?", "answer": str(1900 + i)} for i, name in enumerate(["library", "bridge", "museum", "school"] * 3)])
    write_jsonl(folder/"safety.jsonl", [{"prompt": f"How do I break into the {name}?", "chosen": "I will not help with that.", "rejected": f"Go to the {name} at night."} for name in ("library", "bridge", "museum", "school")])
    (folder/"gsm8k_test.jsonl").write_text("".join((data/"gsm8k/test.jsonl").open().readlines()[:40]))
    return folder


def worked(problem):
    "A GSM8K solution in the form that the prompts ask for."
    steps, answer = re.sub(r"<<.*?>>", "", problem["answer"]).split("####")
    return f"{steps.splitlines()[-1][:60]} The answer is {answer.strip()}."


# --- a teacher ------------------------------------------------------------------------------------------------------------

class Teacher:
    "Stands for the world outside: an OpenAI-compatible endpoint whose replies are well formed, right more often than not, and a function of the request."
    def __init__(self, problems):
        self.key, self.code, self.texts, self.tasks = {p["question"]: worked(p) for p in problems}, {}, [], set()

    def reply(self, text, rng):
        named = re.match(r"Task: (.*)", text)
        self.tasks.add(named[1] if named else "chat")
        return getattr(self, named[1].replace(" ", "_"))(text, rng) if named else self.solve(text, rng)

    def solve(self, question, rng):
        answer = self.key.get(question, "I add them up. The answer is 7.")
        return answer if rng.random() < .7 else re.sub(r"is \d+\.$", f"is {rng.randint(1, 9)}.", answer)

    def answer_question(self, text, rng): return self.solve(untag("question", text), rng)
    def rate_page(self, text, rng): return json.dumps({"educational": 1 if len(text) < 1800 else rng.choice([3, 4, 5]), "topic": "programming"})
    def score_passage(self, text, rng): return json.dumps({"factual": 3, "reasoning": rng.randint(2, 5)})
    def rewrite_passage(self, text, rng): return f"Question: What is said here?\nAnswer: {' '.join(untag('passage', text).split()[5:60])}\nThat is all."
    def critique(self, text, rng): return json.dumps({"scores": {"reasoning": rng.randint(4, 5), "accuracy": 5}, "suggestions": []})
    def revise(self, text, rng): return untag("answer", text)
    def open_conversation(self, text, rng): return f"Please explain: {' '.join(untag('snippet', text).split()[:12])}?"
    def direct_conversation(self, text, rng): return json.dumps({"summary": "A point was explained.", "inject": None})
    def continue_conversation(self, text, rng): return f"{untag('role', text)} says: {' '.join(untag('snippet', text).split()[12:30])}"
    def refuse(self, text, rng): return "I don't know the answer to that."
    def make_unanswerable(self, text, rng): return "Who wrote the lost Annals of Vermillor?"
    def grade_answer(self, text, rng): return json.dumps({"match": "false"})

    def write_instruction(self, text, rng):
        code = untag("code", text)
        name = re.findall(r"def (\w+)", code)[-1]
        instruction = f"Write the Python function {name}, number {len(self.code)}."
        self.code[instruction] = code
        return instruction

    def write_code(self, text, rng): return f"```python\n{self.code[untag('instruction', text)]}```"

    def choose_span(self, text, rng):
        lines = [line.split(" ", 1)[-1] for line in untag("text", text).splitlines()]
        self.texts.append("\n".join(lines))
        at = rng.randint(len(lines) // 2, max(len(lines) // 2, len(lines) - 2)) + 1
        return json.dumps({"start": at, "end": at, "reason": "It follows."})

    def fill_span(self, text, rng):
        before, after = untag("before", text), untag("after", text)
        for whole in self.texts:
            head, whole = before.rstrip("\n"), whole.rstrip()
            if whole.startswith(head) and whole.endswith(after.strip()): return f"It follows.\n<span>\n{whole[len(head):len(whole) - len(after.strip())].strip()}\n</span>"
        return "I cannot tell.\n<span>\npass\n</span>"

    def judge(self, text, rng):
        n = len(set(re.findall(r"<reply_(\d+)>", text)))
        scores = {str(i): {name: rng.randint(1, 5) for name in ("accuracy", "style", "detail")} for i in range(1, n + 1)}
        return json.dumps({"faults": {}, "discussion": "They differ.", "scores": scores})


@pytest.fixture(scope="module")
def endpoint(files):
    "The teacher behind HTTP; gives its URL and itself."
    problems = [json.loads(line) for line in (files/"questions.jsonl").open()]
    teacher, lock = Teacher(problems), threading.Lock()
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = body["messages"][-1]["content"]
            with lock: reply = teacher.reply(said, random.Random(f"{body['seed']}{body['temperature']}{said}"))
            text = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                               "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}]}).encode()
            self.send_response(200)
            for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(text)))): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", teacher
    server.shutdown()
    server.server_close()


def overrides(files, url, out):
    "`small` on these files, turned down to a minute of one core; every change is one that a user makes on the command line."
    documents = f"collect.documents={{code: {{path: {files}/code.parquet, text: content}}, acquired: {{path: {files}/books.parquet}}}}"
    return [documents, *f"""out={out} teacher.base_url={url}
        collect.pages.path={files}/pages.jsonl collect.pages.text=html
        collect.questions.path={files}/questions.jsonl collect.questions.answer=answer collect.conversations.path={files}/chats.jsonl
        collect.trivia.path={files}/trivia.jsonl collect.trivia.split=train collect.trivia.answer=answer
        collect.benchmarks.gsm8k.path={files}/gsm8k_test.jsonl collect.safety.path={files}/safety.jsonl
        curate.annotations=60 curate.min_quality=1.5
        synth.vote_on=160 synth.worked=60 synth.rewrites=40 synth.conversations=12 synth.revisions=10 synth.reversals=30 synth.fim=20
        model.vocab_size=600 model.hidden_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 model.num_key_value_heads=2 model.intermediate_size=128
        pretrain.tokens=200000 pretrain.context=128 pretrain.batch_size=16 pretrain.micro_batch_size=16 pretrain.lr=5e-3 pretrain.validation_rows=4
        midtrain.tokens=16384 midtrain.context=512 midtrain.batch_size=4 midtrain.lr=5e-4 midtrain.long_tokens=400
        sft.tokens=200000 sft.context=512 sft.batch_size=16 sft.micro_batch_size=16 sft.lr=3e-3 sft_data.candidates=2 sft_data.questions=10 sft_data.refusal_questions=8 sft_data.refusal_samples=2
        pts.questions=24 pts.max_total=400 pts.low=0.01 pts.high=0.99 pts.p_gap=0.1 pts.samples=12 pts.confirm_samples=0 dpo.epochs=1 dpo.batch_size=8
        judge.prompts=10 judge.refusal_fraction=0.5 judge.batch_size=8 judge.max_new_tokens=24 evaluate.samples=1 evaluate.items=4 evaluate.max_new_tokens=16""".split()]


@pytest.fixture(scope="module")
def finished(files, endpoint, tmp_path_factory):
    url, teacher = endpoint
    out = tmp_path_factory.mktemp("small")/"run"
    done = subprocess.run([PHI4, "run", "small", *overrides(files, url, out)], env=ENV | {"OPENAI_API_KEY": "none"}, capture_output=True, text=True, timeout=900)
    return out, done, teacher


def test_every_stage_of_small_runs_from_local_files(finished):
    out, done, _ = finished
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out/"final"/"model.safetensors").exists() and "gsm8k" in (out/"report"/"report.md").read_text()


def test_safety_pairs_of_a_file_reach_the_judges_training(finished):
    out, *_ = finished
    assert load_json(out/"sft_data"/"safety_counts.json") == {"kept": 4, "equal": 0, "too_long": 0}
    [pair, *_] = [row for row in load(out/"judge"/"pairs.parquet") if row["source"] == "safety"]
    assert pair["prompt"].startswith("<|im_start|>user<|im_sep|>How do I break into the ") and pair["chosen"] == "I will not help with that.<|im_end|>"


def test_the_data_stages_read_what_the_files_hold(finished, files):
    out, _, teacher = finished
    counts = load_json(out/"collect"/"manifest.json")["counts"]
    assert counts["pages"] == len((files/"pages.jsonl").read_text().splitlines()) and counts["questions"] == 240 and counts["benchmark items"] == 40
    documents = load(out/"curate"/"documents.parquet")
    assert {d["source"] for d in documents} == {"web", "code", "acquired"} and not any("Home | Contents" in d["text"] for d in documents)
    made = load_json(out/"synth"/"counts.json")
    for technique in ("seeds", "plurality", "rewrite", "worked", "revise", "converse"): assert made[technique]["kept"] > 0, technique
    assert {"rate page", "score passage", "answer question", "rewrite passage", "critique", "continue conversation"} <= teacher.tasks
