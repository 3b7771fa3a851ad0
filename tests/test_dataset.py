"Pivotal pairs of any model and any questions: the command, its files, what it refuses, and that nothing drawn is lost."
import copy
import json
import math
import signal
import sqlite3
import time

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from phi4_ref.cli import KEEP_MEMORY, app
from phi4_ref.model.generate import generate
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.tokenizer import chat_example, train_tokenizer
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post import dataset
from phi4_ref.post.dataset import end_ids, load_pairs, open_model, pts_dataset, question_ids, read_questions, weights_id
from phi4_ref.post.dpo import label_noise, pair_noise, train_dpo
from phi4_ref.post.oracle import answer_oracle
from phi4_ref.records import PREFERENCE, load_json, save
from phi4_ref.synth.llm import ReplyStore
from phi4_ref.train.data import SFTBatches
from phi4_ref.train.loop import TrainSettings, train

from tiny import phi4, start


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model that says the right number after one word and a wrong one after another, and its questions."
    folder = tmp_path_factory.mktemp("pts")
    questions = [{"q": f"{i} and {i}?", "a": f"So it is #### {2 * i}", "kind": "problem" if i % 2 else "fact"} for i in range(1, 7)]
    chats = [[{"role": "user", "content": q["q"]}, {"role": "assistant", "content": reply}] for i, q in enumerate(questions, 1) for reply in (f"Surely {2 * i}.", f"Perhaps {2 * i + 1}.")]
    tokenizer = train_tokenizer([m["content"] for chat in chats for m in chat], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(len(tokenizer), 32, 2, 4, 2, 64, 64))
    train(model, SFTBatches([chat_example(tokenizer, chat) for chat in chats], 64, 12, 300, 0), TrainSettings(lr=1e-2, precision="float32", tracker="none"), folder/"log", save_every=10**6, progress=False)
    save_pretrained(model, folder/"model", tokenizer)
    (folder/"questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


def command(made, out, *more): return ["pts", "--model", made/"model", "--data", made/"questions.jsonl", "--question-column", "q", "--answer-column", "a", "--out", out, "--max-total", "48", *more]


def test_the_command_leaves_a_data_set(made, tmp_path):
    status, out, err = phi4(*command(made, tmp_path/"d", "--confirm", "40", "--seed", "1"))  # a seed whose first rollouts settle no question
    assert status == 0 and "pairs from 6 of 6 questions" in out, err
    assert sorted(p.name for p in (tmp_path/"d").iterdir()) == ["README.md", "figure3.html", "pairs.jsonl", "pairs.parquet", "rollouts.sqlite", "stats.json", "trajectories.json", "trl.parquet"]
    rows = pq.read_table(tmp_path/"d"/"pairs.parquet").to_pylist()
    assert rows == [json.loads(line) for line in (tmp_path/"d"/"pairs.jsonl").read_text().splitlines()] and len(rows) >= 5
    peers = "pivot_context pivot_token pivot_token_id prob_before prob_after prob_delta is_positive model_id query dataset_id dataset_item_id task_type timestamp prompt chosen rejected"
    model, tokenizer = open_model(str(made/"model"))
    for r in rows:
        assert set(peers.split()) <= set(r) and (r["chosen"], r["rejected"]) == ("Surely", "Perhaps") and r["q_value"] <= .05
        assert tokenizer.decode(r["prompt_ids"]) == r["prompt"] and r["prompt_ids"] == question_ids(tokenizer, r["query"])
        assert r["task_type"] == ("problem" if int(r["dataset_item_id"]) % 2 == 0 else "fact"), "each row's own"
        with torch.no_grad(): lp = model(torch.tensor([r["prompt_ids"]])).logits[0, -1].log_softmax(-1)
        assert lp[r["chosen_ids"][0]].item() == pytest.approx(r["reference_logprob_chosen"], abs=1e-4)
    card = (tmp_path/"d"/"README.md").read_text()
    assert "false discovery rate 5%" in card and "| fdr | 0.05 |" in card and "| rollouts | " in card
    load = lambda *name: datasets.load_dataset(str(tmp_path/"d"), *name, split="train", cache_dir=str(tmp_path/"cache"))
    assert load("trl").column_names == ["prompt", "chosen", "rejected"] and len(load()) == len(rows)
    assert load_json(tmp_path/"d"/"stats.json")["pairs"] == len(rows) and len(searched := load_json(tmp_path/"d"/"trajectories.json")) == 6
    [shown] = [t for t in searched if "trace" in t]
    page = (tmp_path/"d"/"figure3.html").read_text()
    assert len(shown["trace"]) == len(shown["tokens"]) + 1 and min(n for n, _ in shown["trace"][:-1]) >= 20 and shown["query"] in page and "pivotal token" in page


def test_the_search_on_nothing_comes_last_and_is_told(made, tmp_path, monkeypatch):
    status, out, err = phi4(*command(made, tmp_path/"d", "--null"))
    assert status == 0 and "by chance" in out, err
    counts, card = load_json(tmp_path/"d"/"stats.json"), (tmp_path/"d"/"README.md").read_text()
    assert counts["null_search_pairs"] <= 1 and f"it proposed {counts['null_search_candidates']} and confirmed {counts['null_search_pairs']}" in card and "near 0 by construction" in card
    def killed(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(dataset, "null_search", killed)
    model, tokenizer = open_model(str(made/"model"))
    with pytest.raises(KeyboardInterrupt):
        pts_dataset(model, tokenizer, read_questions(str(made/"questions.jsonl"), "q", "a"), tmp_path/"e", model_id="m", dataset_id="d", max_total=48, null=True, segments="complete", confirm_samples=40, trajectories=1)
    assert len(load_pairs(tmp_path/"e")) == counts["pairs"] and "`phi4 pts --null` measures that" in (tmp_path/"e"/"README.md").read_text()


def test_what_the_command_leaves_is_trained_on(made, tmp_path):
    assert phi4(*command(made, tmp_path/"d"))[0] == 0
    pairs, (model, _) = load_pairs(tmp_path/"d"), open_model(str(made/"model"))
    save(tmp_path/"again.parquet", pairs, PREFERENCE)  # PREFERENCE rows, neither more nor less
    settings = TrainSettings(lr=1e-3, precision="float32", tracker="none")
    log = train_dpo(copy.deepcopy(model), model, pairs, settings, tmp_path/"run", batch_size=4, epochs=3)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["loss"] < log[0]["loss"]
    flat = pq.read_table(tmp_path/"d"/"pairs.parquet").to_pylist()
    for loss in ("sigmoid", "cdpo"): assert train_dpo(copy.deepcopy(model), model, flat, settings, tmp_path/loss, loss=loss, batch_size=4, epochs=1)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for r, row in zip(pairs, flat):
        m = r["meta"]
        sides = [(m["n_own"], m["k_own"]), (m["n_others"], m["k_others"])][::1 if m["is_positive"] else -1]
        assert pair_noise(r) == pair_noise(row) == label_noise(*sides[0], *sides[1]) and m["question_id"] == row["dataset_item_id"]


def same(folder): return [{k: v for k, v in r.items() if k != "timestamp"} for r in pq.read_table(folder/"pairs.parquet").to_pylist()]


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_ended_inside_the_search_it_goes_on(made, tmp_path, blow):
    many, out = ("--samples", "200", "--confirm", "0"), tmp_path/"d"
    process = start(*command(made, out, *many))
    for _ in range(60000):
        if (out/"rollouts.sqlite").exists() and len(ReplyStore(out/"rollouts.sqlite")) or process.poll() is not None: break
        time.sleep(.002)
    process.send_signal(blow)
    _, err = process.communicate(timeout=300)
    before = len(ReplyStore(out/"rollouts.sqlite"))
    assert process.returncode == (130 if blow == signal.SIGINT else -blow) and "Traceback" not in err and before
    assert phi4(*command(made, out, *many))[0] == phi4(*command(made, tmp_path/"unbroken", *many))[0] == 0
    assert before < len(ReplyStore(out/"rollouts.sqlite")) == len(ReplyStore(tmp_path/"unbroken"/"rollouts.sqlite")) and same(out) == same(tmp_path/"unbroken")


def stored_keys(folder):
    with sqlite3.connect(folder/"rollouts.sqlite") as db: return {key for key, in db.execute("SELECT key FROM replies")}


def test_a_function_of_the_users_judges(made, tmp_path):
    "It sees the whole row, needs no answer, and its name is on the card."
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(dict(q=f"{i} and {i}?", first_word="Perhaps")) + "\n" for i in range(1, 7)))
    (tmp_path/"rules.py").write_text("import re\nWORD = re.compile(r'\\w+')\ndef begins(question, completion): return WORD.match(completion)[0] == question['meta']['first_word']\n")
    status, out, err = phi4(*command(made, tmp_path/"d", "--data", tmp_path/"q.jsonl", "--oracle", f"{tmp_path/'rules.py'}:begins", "--samples", "12", "--seed", "1"))
    assert status == 0, err
    pairs = load_pairs(tmp_path/"d")
    assert pairs and {pair["chosen"].split()[0] for pair in pairs} == {"Perhaps"} and "begins" in (tmp_path/"d"/"README.md").read_text() and load_json(tmp_path/"d"/"stats.json")["oracle_errors"] == 0


def test_more_samples_add_to_those_there_are(made, tmp_path):
    few, more = ("--samples", "20", "--confirm", "0", "--seed", "1"), ("--samples", "40", "--confirm", "0", "--seed", "1")
    assert phi4(*command(made, tmp_path/"d", *few))[0] == 0
    first = stored_keys(tmp_path/"d")
    assert phi4(*command(made, tmp_path/"d", *more))[0] == phi4(*command(made, tmp_path/"anew", *more))[0] == 0
    both, anew = stored_keys(tmp_path/"d"), stored_keys(tmp_path/"anew")
    assert same(tmp_path/"d") == same(tmp_path/"anew") and both == first | anew
    assert len(first & anew) >= 6 * 20 and len(both - first) <= len(anew) - 6 * 20, "at least the filter's twenty of each question were not drawn again"


@pytest.mark.parametrize("change, said", [
    ({"--data": "nowhere.jsonl"}, "no file matches 'nowhere.jsonl'"), ({"--model": "no/such/model"}, "cannot load a causal language model from 'no/such/model'"),
    ({"--question-column": "qq"}, "qq"), ({"--out": None}, "--out missing"), ({"--p-gap": "0.99"}, "no pivotal pairs in 6 questions"),
    ({"--band": "0.8 0.2"}, "band=(0.8, 0.2) must be"), ({"--band": "0.1 2"}, "Invalid value for '--band'"), ({"--fdr": "5"}, "Invalid value for '--fdr'"), ({"--margin": "1"}, "Invalid value for '--margin'")])
def test_what_it_refuses(made, tmp_path, change, said):
    args = command(made, tmp_path/"d", "--samples", "4", "--confirm", "0", "--p-gap", "0.2")
    for key, value in change.items():
        if key not in args: args += [key, *value.split()]; continue
        at = args.index(key)
        args[at:at + 2] = [key, value] if value else []
    status, _, err = phi4(*args)
    assert status == 2 and said in err and "Traceback" not in err, err
    if "--p-gap" in change: assert load_json(tmp_path/"d"/"stats.json")["candidates"] == 0 and len(load_json(tmp_path/"d"/"trajectories.json")) > 0 and f"kept in {tmp_path/'d'}" in err


def test_the_choices_of_a_search_are_options(made, tmp_path):
    status, _, err = phi4(*command(made, tmp_path/"d", "--band", "0", "1", "--fdr", "0.2", "--margin", "0.01"))
    card = (tmp_path/"d"/"README.md").read_text()
    assert status == 0 and "| band | (0.0, 1.0) |" in card and "| fdr | 0.2 |" in card and "| margin | 0.01 |" in card, err
    assert {r["margin"] for r in same(tmp_path/"d")} == {.01}


def test_a_column_of_choices_makes_multiple_choice(tmp_path):
    def read(*rows):
        (tmp_path/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return read_questions(str(tmp_path/"q.jsonl"), "q", "a")
    for answer in ("rain", "B", 1):
        [row] = read(dict(q="What falls?", a=answer, choices=["sand", "rain"]))
        assert row["kind"] == "mcq" and row["question"] == "What falls?\nA. sand\nB. rain" and row["meta"]["choices"] == ["sand", "rain"] and row["meta"]["label"] == 1
        assert [answer_oracle(row, text) for text in ("B", "The answer is A.", "The answer is rain.", "sand")] == [True, False, True, False]
    assert read(dict(q="How many?", a=4, choices=["4", "8"]))[0]["meta"]["label"] == 0, "words before indices"
    assert [r["kind"] for r in read(dict(q="1 and 1?", a="2", choices=None), dict(q="One?", a="A", choices=["a", "b"]))] == ["problem", "mcq"]
    for answer, choices, said in (("snow", ["sand", "rain"], "'snow' is none of"), (2, ["sand", "rain"], "2 is no index"), ("A", dict(text=["a"], label=["A"]), "no list of texts")):
        with pytest.raises(ValueError, match=said): read(dict(q="What falls?", a=answer, choices=choices))


ROWS = {"empty": [], "unasked": [dict(q="1 and 1?", a="2"), dict(q=None, a="3")], "number": [dict(q=3, a="3")], "unanswered": [dict(q="1 and 1?", a="2"), dict(q="2 and 2?", a=None)],
        "list": [dict(q="1 and 1?", a=["2"])], "blank": [dict(q=" ", a="2")], "broken": None}


@pytest.mark.parametrize("more, said", [
    (["--data", "empty.jsonl"], "no rows in"), (["--data", "unasked.jsonl"], "unasked.jsonl, row 1: column 'q' holds None"), (["--data", "number.jsonl"], "number.jsonl, row 0: column 'q' holds 3, not text"),
    (["--data", "unanswered.jsonl"], "unanswered.jsonl, row 1: column 'a' holds no answer"), (["--data", "list.jsonl"], "list.jsonl, row 0: column 'a' holds ['2']"), (["--data", "blank.jsonl"], "blank.jsonl, row 0: column 'q' holds ' '"),
    (["--data", "broken.jsonl"], "cannot read the data set 'broken.jsonl'"), (["--p-gap", "0"], "p_gap=0.0 must be in"), (["--max-total", "4096"], "max_total=4096 is more than the 64 tokens"), (["--out", "empty.jsonl"], "--out empty.jsonl is a file"),
    (["--model", "/no/such/model"], "no directory '/no/such/model'"), (["--base-url", ""], "--base-url '' is no address"), (["--base-url", "localhost:8000/v1"], "--base-url 'localhost:8000/v1' is no address"), (["--oracle", "is_right"], "give a file and a function"), (["--oracle", "none.py:f"], "there is no file none.py"), (["--oracle", "rules.py:f"], "rules.py has no function f"), (["--oracle", "rules.py:g"], "g must take a question"),
    (["--oracle", "broken.jsonl:f"], "broken.jsonl cannot be run (SyntaxError"), (["--force"], "--force"), (["pts.p_gap=0.3"], "--model")])
def test_a_mistake_is_one_line(made, tmp_path, monkeypatch, capfd, more, said):
    for name in KEEP_MEMORY: monkeypatch.setenv(name, KEEP_MEMORY[name])  # already restarted with it
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.chdir(tmp_path)
    (tmp_path/"rules.py").write_text("def g(completion): return True\n")
    for name, rows in ROWS.items(): (tmp_path/f"{name}.jsonl").write_text('{"q": "cut' if rows is None else "".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(SystemExit) as end: app([str(a) for a in command(made, tmp_path/"d", "--samples", "4", "--confirm", "0", *more)])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("phi4: ") and said in lines[0], lines


def test_a_reply_ends_where_any_of_the_models_own_ends_stands(made):
    model, tokenizer = open_model(str(made/"model"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_ids(model, tokenizer)
    assert all(c.finished for c in generate(model, [question_ids(tokenizer, "3 and 3?")] * 8, max_new_tokens=20, stop_ids=end_ids(model, tokenizer)))


def test_other_weights_under_the_same_name_are_another_model(made):
    model, _ = open_model(str(made/"model"))
    before = weights_id(model)
    assert weights_id(open_model(str(made/"model"))[0]) == before
    with torch.no_grad():
        for p in model.parameters(): p += 1e-3
    assert weights_id(model) != before


def test_an_own_oracle_may_have_an_answer_of_any_shape(tmp_path):
    "It reads the row; a list of answers is no mistake then, and without an own oracle it is."
    rows = [dict(q="How many?", a=["4", "four"]), dict(q="And now?", a=None), dict(q="Then?", a=["5"])]
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_questions(str(tmp_path/"q.jsonl"), "q", "a", own_oracle=True)
    assert [r["answer"] for r in read] == [""] * 3 and [r["meta"]["a"] for r in read] == [row["a"] for row in rows]
    with pytest.raises(ValueError, match="neither text nor a number"): read_questions(str(tmp_path/"q.jsonl"), "q", "a")
