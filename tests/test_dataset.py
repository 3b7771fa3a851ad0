"Pivotal pairs of any model and any questions: the command, its files, what it refuses, and that nothing drawn is lost."
import json
import signal

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from phi4_ref.cli import KEEP_MEMORY, app
from phi4_ref.model.generate import generate
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.tokenizer import chat_example, train_tokenizer
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post.dataset import end_ids, open_model, question_ids, weights_id
from phi4_ref.synth.llm import ReplyStore
from phi4_ref.train.data import SFTBatches
from phi4_ref.train.loop import TrainSettings, train

from tiny import phi4, start


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model that says the right number after one word and a wrong one after another, and its questions."
    folder = tmp_path_factory.mktemp("pts")
    questions = [{"q": f"{i} and {i}?", "a": f"So it is #### {2 * i}"} for i in range(1, 7)]
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
    assert sorted(p.name for p in (tmp_path/"d").iterdir()) == ["README.md", "pairs.jsonl", "pairs.parquet", "rollouts.sqlite", "trl.parquet"]
    rows = pq.read_table(tmp_path/"d"/"pairs.parquet").to_pylist()
    assert rows == [json.loads(line) for line in (tmp_path/"d"/"pairs.jsonl").read_text().splitlines()] and len(rows) >= 5
    peers = "pivot_context pivot_token pivot_token_id prob_before prob_after prob_delta is_positive model_id query dataset_id dataset_item_id task_type timestamp prompt chosen rejected"
    model, tokenizer = open_model(str(made/"model"))
    for r in rows:
        assert set(peers.split()) <= set(r) and (r["chosen"], r["rejected"]) == ("Surely", "Perhaps") and r["q_value"] <= .05
        assert tokenizer.decode(r["prompt_ids"]) == r["prompt"] and r["prompt_ids"] == question_ids(tokenizer, r["query"])
        with torch.no_grad(): lp = model(torch.tensor([r["prompt_ids"]])).logits[0, -1].log_softmax(-1)
        assert lp[r["chosen_ids"][0]].item() == pytest.approx(r["reference_logprob_chosen"], abs=1e-4)
    card = (tmp_path/"d"/"README.md").read_text()
    assert "false discovery rate 5%" in card and "| fdr | 0.05 |" in card and "| rollouts | " in card
    load = lambda *name: datasets.load_dataset(str(tmp_path/"d"), *name, split="train", cache_dir=str(tmp_path/"cache"))
    assert load("trl").column_names == ["prompt", "chosen", "rejected"] and len(load()) == len(rows)


def test_interrupted_it_goes_on_and_more_samples_add(made, tmp_path):
    out = tmp_path/"d"
    process = start(*command(made, out, "--samples", "400", "--confirm", "0"))
    import time
    for _ in range(6000):
        if (out/"rollouts.sqlite").exists() and len(ReplyStore(out/"rollouts.sqlite")) or process.poll() is not None: break
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 130) and "Traceback" not in err
    before = len(ReplyStore(out/"rollouts.sqlite"))
    assert phi4(*command(made, out, "--samples", "400", "--confirm", "0"))[0] == 0
    whole = pq.read_table(out/"pairs.parquet").to_pylist()
    assert phi4(*command(made, tmp_path/"unbroken", "--samples", "400", "--confirm", "0"))[0] == 0
    same = lambda rows: [{k: v for k, v in r.items() if k != "timestamp"} for r in rows]
    assert same(whole) == same(pq.read_table(tmp_path/"unbroken"/"pairs.parquet").to_pylist()) and before


@pytest.mark.parametrize("change, said", [
    ({"--data": "nowhere.jsonl"}, "no file matches 'nowhere.jsonl'"), ({"--model": "no/such/model"}, "cannot load a causal language model from 'no/such/model'"),
    ({"--question-column": "qq"}, "qq"), ({"--out": None}, "--out missing"), ({"--p-gap": "0.99"}, "no pivotal pairs in 6 questions")])
def test_what_it_refuses(made, tmp_path, change, said):
    args = command(made, tmp_path/"d", "--samples", "4", "--confirm", "0", "--p-gap", "0.2")
    for key, value in change.items():
        at = args.index(key)
        args[at:at + 2] = [key, value] if value else []
    status, _, err = phi4(*args)
    assert status == 2 and said in err and "Traceback" not in err, err


ROWS = {"empty": [], "unasked": [dict(q="1 and 1?", a="2"), dict(q=None, a="3")], "number": [dict(q=3, a="3")], "unanswered": [dict(q="1 and 1?", a="2"), dict(q="2 and 2?", a=None)],
        "list": [dict(q="1 and 1?", a=["2"])], "blank": [dict(q=" ", a="2")], "broken": None}


@pytest.mark.parametrize("more, said", [
    (["--data", "empty.jsonl"], "no rows in"), (["--data", "unasked.jsonl"], "unasked.jsonl, row 1: column 'q' holds None"), (["--data", "number.jsonl"], "number.jsonl, row 0: column 'q' holds 3, not text"),
    (["--data", "unanswered.jsonl"], "unanswered.jsonl, row 1: column 'a' holds no answer"), (["--data", "list.jsonl"], "list.jsonl, row 0: column 'a' holds ['2']"), (["--data", "blank.jsonl"], "blank.jsonl, row 0: column 'q' holds ' '"),
    (["--data", "broken.jsonl"], "cannot read the data set 'broken.jsonl'"), (["--p-gap", "0"], "p_gap=0.0 must be in"), (["--max-total", "4096"], "max_total=4096 is more than the 64 tokens"), (["--out", "empty.jsonl"], "cannot make the directory empty.jsonl"),
    (["--model", "/no/such/model"], "no directory '/no/such/model'"), (["--base-url", ""], "base_url ''"), (["--base-url", "localhost:8000/v1"], "base_url 'localhost:8000/v1'"), (["--force"], "--force"), (["pts.p_gap=0.3"], "--model")])
def test_a_mistake_is_one_line(made, tmp_path, monkeypatch, capfd, more, said):
    for name in KEEP_MEMORY: monkeypatch.setenv(name, KEEP_MEMORY[name])  # already restarted with it
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.chdir(tmp_path)
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
