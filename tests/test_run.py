"The whole recipe at tiny size: killed, interrupted, refused, moved, out of space; always the same bits in the end."
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from phi4_ref import artifact, cli
from phi4_ref.artifact import StageRefused
from phi4_ref.config import load_config
from phi4_ref.model import generate, pretrained
from phi4_ref.model.tokenizer import chat_ids
import phi4_ref.run as run_module
from phi4_ref.run import chosen, computed, open_checkpoint, run
from phi4_ref.train import pretrain

from tiny import ENV, TINY, phi4, start

STAGES = ["collect", "curate", "synth", "pretrain", "midtrain", "sft_data", "sft", "pts", "dpo", "dpo_shuffled", "dpo_full", "judge", "stage2_only", "final", "eval", "report"]


def manifests(folder): return {stage: json.loads((folder/stage/"manifest.json").read_text()) for stage in STAGES if (folder/stage).exists()}
def fingerprints(folder): return {stage: manifest["fingerprint"] for stage, manifest in manifests(folder).items()}
def weights(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
def config_of(folder, *changes): return load_config(folder/"config.yaml", [f"out={folder}", *changes])


def begun(tiny_run, folder, last):
    "A run directory that is finished up to a stage."
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny_run/"config.yaml", folder)
    for stage in STAGES[:STAGES.index(last) + 1]: shutil.copytree(tiny_run/stage, folder/stage)
    return folder


def wait_for(process, found, seconds=900):
    "Until something is there; fails if the process ends before."
    end = time.time() + seconds
    while not found():
        assert process.poll() is None and time.time() < end, process.communicate(timeout=60)
        time.sleep(0.01)


def complaint(work, capsys):
    "What the command says of a mistake: one message without a traceback, exit status 2."
    with pytest.raises(SystemExit) as stopped: cli.report_mistakes(work)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def complaint_of(done):
    "The one line on standard error of a command that was refused."
    status, out, err = done
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    return err


# --- one run --------------------------------------------------------------------------------------------------------------

def test_every_stage_is_there_and_nothing_else(tiny_run):
    assert {p.name for p in tiny_run.iterdir()} == {*STAGES, "config.yaml", ".lock"}
    left = ("checkpoints", "unfinished", "started.json")
    assert not [p for p in tiny_run.rglob("*") if p.name.endswith((".part", ".partial", ".old", ".tmp")) or p.name in left]
    for manifest in manifests(tiny_run).values(): assert manifest["versions"]["torch"] and manifest["seconds"] >= 0 and len(manifest["config_hash"]) == 16
    assert "Table 9" in (tiny_run/"report"/"report.md").read_text()


def test_a_second_run_skips_everything(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path/"run")
    status, out, err = phi4("run", "toy", f"out={folder}", *TINY)
    assert status == 0 and out.count("done before") == len(STAGES) and "..." not in out
    assert manifests(folder) == manifests(tiny_run)


def test_the_model_is_the_same_in_transformers(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_run/"final"), AutoTokenizer.from_pretrained(tiny_run/"final")
    model, ours = open_checkpoint(tiny_run/"final")
    for question in ("Mara has 3 plums. Mara buys 2 more. How many plums does Mara have now?", "Where does Boden live?", "Hello!", "Why does <|im_end|> end?"):
        messages = [{"role": "user", "content": question}]
        ids = torch.tensor([chat_ids(ours, messages, add_generation_prompt=True)])  # a special token in a user's words is words; apply_chat_template would make it a token
        if "<|" not in question: assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == ids[0].tolist()
        done = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(done[0, ids.shape[1]:], skip_special_tokens=True)
        assert text == cli.reply(model, ours, messages, temperature=0, seed=0, max_new_tokens=48) and text


# --- killed and interrupted -----------------------------------------------------------------------------------------------

KILLS = ["synth.partial/replies.sqlite", "pretrain.partial/log.jsonl", "pretrain.partial/checkpoints/step_00000020", "sft.partial/conversations.parquet", "pts.partial/started.json",
         "dpo_full.partial/log.jsonl", "eval.partial/parts/base.parquet"]


def test_killed_again_and_again_it_ends_in_the_same_bits(tiny_run, tmp_path):
    "kill -9 up to a second after each of these files appears, then the same command."
    rng, folder, died_in = random.Random(0), tmp_path/"run", []
    for mark in KILLS:
        process = start("run", "toy", f"out={folder}", *TINY)
        try: wait_for(process, lambda: (folder/mark).exists() or (folder/mark.split(".")[0]).exists())
        finally: time.sleep(rng.random()); process.kill(); process.communicate(timeout=60)
        died_in += [p.name for p in folder.glob("*.partial")]
    assert len(died_in) >= 4, died_in  # most kills came within a stage
    status, out, err = phi4("run", "toy", f"out={folder}", *TINY)
    assert status == 0, err
    assert fingerprints(folder) == fingerprints(tiny_run) and weights(folder) == weights(tiny_run)
    names = lambda run: {p.name for p in run.rglob("*") if not p.name.startswith("events.out")}  # a tracker names its files by time and process
    assert names(folder) == names(tiny_run)


@pytest.mark.parametrize("moves", range(0, 12, 3))
def test_killed_while_a_model_is_put_in_place(tiny_run, tmp_path, monkeypatch, moves):
    "The last step of a training stage, cut short after some of its files were moved."
    class Killed(BaseException): pass
    left, replace = moves, os.replace
    def dies(a, b):
        nonlocal left
        if (left := left - 1) < 0: raise Killed
        replace(a, b)
    model, tokenizer = open_checkpoint(tiny_run/"sft")
    rows = [{"tokens": 1, "seconds": 1.0, "loss": 2.0}]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.os, "replace", dies)
        try: pretrain.finish_stage(model, tokenizer, tmp_path, rows)
        except Killed: pass
    (tmp_path/".unfinished.99.tmp").mkdir()  # of one that died while it wrote
    pretrain.finish_stage(model, tokenizer, tmp_path, rows)
    assert (tmp_path/"model.safetensors").read_bytes() == (tiny_run/"sft"/"model.safetensors").read_bytes()
    assert {p.name for p in tmp_path.rglob("*")} == {p.name for p in (tiny_run/"midtrain").iterdir()} - {"log.jsonl", "manifest.json", "mixture.json", "shards", "trackers"}


@pytest.mark.parametrize("stage, mark", [("pretrain", "log.jsonl"), ("pts", "started.json")])
def test_an_interrupt_leaves_what_goes_on(tiny_run, tmp_path, stage, mark):
    folder = begun(tiny_run, tmp_path/"run", STAGES[STAGES.index(stage) - 1])
    process = start("run", folder)
    wait_for(process, lambda: (folder/f"{stage}.partial"/mark).exists())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "interrupted: what is finished is kept" in err and "Traceback" not in err, err
    assert (folder/f"{stage}.partial").exists() and not (folder/stage).exists()
    if stage == "pretrain": assert list((folder/"pretrain.partial"/"checkpoints").glob("step_*"))
    assert phi4(stage, folder)[0] == 0
    assert fingerprints(folder)[stage] == fingerprints(tiny_run)[stage]


@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupt_that_a_callback_ignores_comes_again(kept):
    script = f"""
import weakref, threading, signal, time
from contextlib import nullcontext
from phi4_ref import cli
if not {kept}: cli.interrupts_kept = nullcontext
def work():
    thing = threading.Event()
    watch = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(2)
cli.report_mistakes(work)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == (130 if kept else 0), done.stderr


def test_how_the_model_is_computed_may_change_between_stages(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "midtrain")
    status, out, err = phi4("sft", folder, "compute.activation_checkpointing=true", "compute.attention=eager")
    assert status == 0, err
    one, other = (open_checkpoint(path/"sft")[0].state_dict() for path in (tiny_run, folder))
    assert all(torch.allclose(one[k], other[k], atol=5e-3) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)
    err = complaint_of(phi4("pts", folder, "compute.attention=flash"))
    assert "flash-attn" in err


def test_what_compute_says_is_what_a_model_gets(tiny_run, tmp_path, monkeypatch):
    config = config_of(tiny_run, "compute.attention=eager", "compute.activation_checkpointing=true")
    model, _ = open_checkpoint(tiny_run/"sft", **computed(config, "sft"))
    assert (model.attention, model.activation_checkpointing) == ("eager", True)
    class Reached(Exception): pass
    def reached(model, *args, **kw): raise Reached(model.attention, model.activation_checkpointing)
    monkeypatch.setattr(pretrain, "train", reached)
    (stage,) = chosen(config, "pretrain")
    with pytest.raises(Reached) as found: stage.make(stage.view(config), {name: tiny_run/name for name in stage.inputs}, tmp_path)
    assert found.value.args == ("eager", True)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed, so nothing is refused")
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("collect", "curate", "synth", "report")])
def test_every_stage_with_a_model_reads_compute(tiny_run, tmp_path, stage):
    "An attention that this machine lacks is refused by each of them."
    config = config_of(tiny_run, "compute.attention=flash")
    stage = next(s for s in run_module.STAGES if s.name == stage)
    shutil.copytree(tiny_run/"pretrain"/"shards", tmp_path/"shards")
    with pytest.raises(ValueError, match="flash-attn"): stage.make(stage.view(config), {name: tiny_run/name for name in stage.inputs}, tmp_path)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("collect", "curate", "synth", "pretrain", "report")])
def test_what_generates_runs_where_inference_says(tiny_run, tmp_path, monkeypatch, stage):
    "And what trains reads float32 weights on the host."
    class Reached(Exception): pass
    def reached(folder, **how): raise Reached(how)
    monkeypatch.setattr(generate, "inference", lambda: dict(device="meta", dtype=torch.bfloat16))
    monkeypatch.setattr(pretrained, "from_pretrained", reached)
    stage = next(s for s in run_module.STAGES if s.name == stage)
    shutil.copytree(tiny_run/"pretrain"/"shards", tmp_path/"shards")
    with pytest.raises(Reached) as found: stage.make(stage.view(config_of(tiny_run)), {name: tiny_run/name for name in stage.inputs}, tmp_path)
    assert ("dtype" in found.value.args[0]) == (found.value.args[0].get("device") == "meta") == (stage.name in ("sft_data", "pts", "judge", "eval"))


def test_a_stage_saved_in_bfloat16_is_rounded_and_nothing_else(tiny_run, tmp_path):
    "Half the bytes; the next stage reads the rounded weights as float32."
    folder = begun(tiny_run, tmp_path/"run", "midtrain")
    status, out, err = phi4("sft", folder, "compute.save_dtype=bfloat16")
    assert status == 0, err
    half, whole = (path/"sft"/"model.safetensors" for path in (folder, tiny_run))
    assert half.stat().st_size < 0.6 * whole.stat().st_size and json.loads((folder/"sft"/"config.json").read_text())["dtype"] == "bfloat16"
    rounded, exact = (open_checkpoint(path/"sft")[0].state_dict() for path in (folder, tiny_run))
    assert all(w.dtype == torch.float32 and torch.equal(w, exact[name].bfloat16().float()) for name, w in rounded.items())


def test_two_processes_in_one_directory(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "collect")
    with artifact.only_one(folder): assert f"another process is working in {folder}" in complaint_of(phi4("curate", folder))
    assert not (folder/"curate.partial").exists()


# --- other settings, other inputs, other places ---------------------------------------------------------------------------

def test_a_changed_field_is_refused_before_any_work(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path/"run")
    shutil.rmtree(folder/"report")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    for verb in ("run", "eval", "report"):  # whatever the verb is about
        with pytest.raises(StageRefused, match=r"pretrain was made with different settings:\n  pretrain\.lr: 0\.005 -> 0\.001\n"): run(config_of(folder, "pretrain.lr=1e-3"), verb)
    with pytest.raises(StageRefused, match="seed: 0 -> 1"): run(config_of(folder, "seed=1"))
    status, out, err = phi4("run", folder, "judge.beta=0.3", "dpo.lr=1")
    assert status == 2 and "dpo.lr: 3e-05 -> 1.0" in err and "--force" in err and "Traceback" not in err and not out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


def test_begun_with_other_settings_is_refused(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "collect")
    config = config_of(folder)
    (folder/"sft.partial").mkdir()
    (folder/"sft.partial"/"started.json").write_text(json.dumps({"config": {"seed": 0, "sft": {"lr": 9.0}}, "inputs": {}, "seconds": 0}))
    with pytest.raises(StageRefused, match=r"sft\.lr: 9\.0 -> 0\.003"): run(config, "curate")
    assert not (folder/"curate").exists()


def test_force_makes_again_what_differs_and_what_follows(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path/"run")
    run(config_of(folder, "evaluate.items=2"), force=True)
    out = capsys.readouterr().out
    assert out.count("done before") == len(STAGES) - 2 and "eval         ..." in out and "report       ..." in out
    assert manifests(folder)["eval"]["config"]["evaluate"]["items"] == 2 and config_of(folder).evaluate.items == 2
    run(config_of(folder), "report", force=True)
    assert "[1/1] report       ..." in capsys.readouterr().out
    assert weights(folder) == weights(tiny_run)


def test_a_changed_input_is_refused(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "pretrain")
    run(config_of(folder, "curate.min_quality=3.5"), "curate", force=True)
    with pytest.raises(StageRefused, match="synth was made with different settings:\n  input curate: "): run(config_of(folder))
    assert not (folder/"midtrain.partial").exists()


def test_a_stage_whose_input_is_missing(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "collect")
    with pytest.raises(FileNotFoundError, match="stage synth needs .*curate, which is not finished: run the stage curate first"): run(config_of(folder), "synth")


def test_a_run_directory_can_be_moved(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path/"a b"/"moved")
    status, out, err = phi4("report", "moved", "--force", cwd=tmp_path/"a b")
    assert status == 0 and "report       ..." in out and not (tmp_path/"a b"/"runs").exists(), err
    assert (folder/"report"/"report.md").exists() and config_of(folder).out == str(folder)
    run(config_of(folder))
    assert manifests(folder)["final"] == manifests(tiny_run)["final"]


# --- broken files, no space -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["pretrain/model.safetensors", "pretrain/config.json", "pretrain/tokenizer.json", "curate/documents.parquet", "synth/manifest.json", "config.yaml"])
def test_a_truncated_file_is_named(tiny_run, tmp_path, capsys, name):
    folder = begun(tiny_run, tmp_path/"run", "pretrain")
    data = (folder/name).read_bytes()
    (folder/name).write_bytes(data[:len(data) // 2])
    said = complaint(lambda: run(cli.find_config(str(folder), []), "midtrain"), capsys)
    assert said.startswith("phi4: ") and name.split("/")[-1] in said and name.split("/")[0] in said, said
    assert not (folder/"midtrain").exists()


def test_a_truncated_checkpoint_is_one_line(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "pretrain")
    path = folder/"pretrain"/"model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in complaint_of(phi4("midtrain", folder))


@pytest.fixture
def small_disk(tmp_path):
    "A file system of its own, as large as asked for."
    def mount(size, *more): return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs", disk], capture_output=True).returncode == 0
    disk = tmp_path/"disk"
    disk.mkdir()
    if not mount("16m"): pytest.skip("needs the right to mount a tmpfs")
    yield disk, lambda size: mount(size, "remount")
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("stage", ["curate", "pretrain"])
def test_a_full_disk(tiny_run, small_disk, stage):
    (disk, resize), before = small_disk, STAGES[:STAGES.index(stage)]
    folder = begun(tiny_run, disk/"run", before[-1])
    used = sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))
    assert resize(used + 24 * 1024)
    said = complaint_of(phi4(stage, folder))
    assert f"the disk is full: stage {stage} stopped while writing" in said and "the same command" in said
    assert list(manifests(folder)) == before
    assert resize("32m") and phi4(stage, folder)[0] == 0
    assert fingerprints(folder)[stage] == fingerprints(tiny_run)[stage]


def test_a_limit_on_file_size_is_named_like_a_full_disk(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "synth")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    said = complaint_of(phi4("pretrain", folder, preexec_fn=limit))
    assert "the disk is full: stage pretrain stopped" in said and "File too large" in said
    assert list(manifests(folder)) == ["collect", "curate", "synth"]


def test_training_that_diverges_is_one_message(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "synth")
    assert "loss" in complaint_of(phi4("pretrain", folder, "pretrain.lr=1e30"))


# --- told in the first second ---------------------------------------------------------------------------------------------

AHEAD = {
    "pretrain.tracker=abacus": "pretrain.tracker: tracker 'abacus' is not installed: choose",
    "sft.tracker=abacus": "sft.tracker: tracker 'abacus' is not installed",
    "pretrain.tokenizer=/nowhere": "pretrain.tokenizer: '/nowhere' is no directory with a tokenizer",
    "model.vocab_size=100": "model.vocab_size 100 has no room for 256 bytes and the special tokens: give at least",
    "synth.rewrites=0": "pretrain.fractions wants web_rewrite, and neither collect nor synth makes any",
    "synth.vote_on=0": "pts will have no questions: raise synth.vote_on",
}


@pytest.mark.parametrize("change", AHEAD)
def test_what_a_later_stage_would_stumble_over(tmp_path, change):
    with pytest.raises(ValueError, match=f"^{AHEAD[change]}"): run(load_config("toy", [f"out={tmp_path/'run'}", *TINY, change]))
    assert [p.name for p in (tmp_path/"run").iterdir()] == [".lock"]  # nothing was made, nor the configuration kept


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed, so nothing is refused")
def test_an_attention_that_is_missing_is_told_ahead(tmp_path):
    with pytest.raises(ValueError, match="flash-attn"): run(load_config("toy", [f"out={tmp_path/'run'}", *TINY, "compute.attention=flash"]))
    assert not (tmp_path/"run"/"collect").exists()


def test_a_missing_compiler_is_told_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("CXX", "clang++-99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no clang"): run(load_config("toy", [f"out={tmp_path/'run'}", *TINY]))


def test_what_is_done_is_not_asked_for_again(tiny_run, tmp_path):
    "A tracker, a library or a tokenizer that has served its turn may be gone."
    folder = begun(tiny_run, tmp_path/"run", "final")
    run(config_of(folder, "pretrain.tracker=abacus"), "eval")
    run(config_of(folder, "pretrain.tracker=abacus"), "pretrain")


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    "Its client alone tries again for most of a minute."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ValueError, match="pretrain.tokenizer: 'nobody/nothing' is no directory with a tokenizer, nor can it be had from the hub"): run(load_config("toy", [f"out={tmp_path/'run'}", *TINY, "pretrain.tokenizer=nobody/nothing"]))
    assert not waits


def test_a_tokenizer_that_does_not_fit_the_model(tiny_run, tmp_path):
    for change, said in (("model.vocab_size=300", "has 512 tokens, and model.vocab_size 300 has no room for them"), ("model.vocab_size=512", None)):
        config = load_config("toy", [f"out={tmp_path/'run'}", *TINY, f"pretrain.tokenizer={tiny_run/'pretrain'}", change])
        if said is None: run_module.check_ahead(config, chosen(config, "run"), False)
        else:
            with pytest.raises(ValueError, match=said): run(config)


def test_data_sets_are_opened_before_any_is_read(tmp_path):
    (tmp_path/"web.jsonl").write_text('{"text": "a page"}\n')
    (tmp_path/"none.jsonl").write_text("")
    (tmp_path/"asked.jsonl").write_text('{"question": "1 + 1?"}\n')
    web, source = f"web: {{path: {tmp_path}/web.jsonl}}", lambda text: load_config("small", [f"out={tmp_path/'run'}", f"collect={{kind: files, {text}}}"])
    for text, said in ((f"documents: {{{web}, code: {{path: {tmp_path}/no.jsonl}}}}", "collect.documents.code: no file matches"),
                       (f"documents: {{{web}}}, questions: {{path: {tmp_path}/none.jsonl}}", "collect.questions: .*none.jsonl"),
                       (f"documents: {{{web}}}, trivia: {{path: {tmp_path}/asked.jsonl, text: question}}", "collect.trivia: .*asked.jsonl has no column 'answer'; it has question"),
                       (f"documents: {{{web}}}, conversations: {{path: {tmp_path}/asked.jsonl}}", "collect.conversations: .*asked.jsonl has no column 'messages'"),
                       (f"documents: {{{web}}}, benchmarks: {{mine: {{path: {tmp_path}/asked.jsonl}}}}", "collect.benchmarks.mine: .*asked.jsonl has no column 'text'")):
        with pytest.raises(ValueError, match=said): run(source(text))
    assert not (tmp_path/"run"/"collect.partial").exists()
    with pytest.raises(ValueError, match="pretrain.fractions wants code, acquired, and neither"): run(source(f"documents: {{{web}}}"))


def test_a_teacher_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for change, said in (("teacher={kind: openai, model: m}", "no API key"), ("teacher={kind: transformers, model: /nowhere}", "teacher.model: '/nowhere' is no directory with a model")):
        with pytest.raises(ValueError, match=said): run(load_config("toy", [f"out={tmp_path/'run'}", *TINY, change]))
    assert not (tmp_path/"run"/"collect").exists()


# --- fields that do not enter the result ----------------------------------------------------------------------------------

def test_a_stage_goes_on_with_another_micro_batch_and_tracker(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "synth")
    process = start("pretrain", folder)
    checkpoint = folder/"pretrain.partial"/"checkpoints"/"step_00000010"
    try: wait_for(process, checkpoint.exists)
    finally: process.kill(); process.communicate(timeout=60)
    before = (folder/"pretrain.partial"/"log.jsonl").read_text().splitlines()[:10]
    status, out, err = phi4("pretrain", folder, "pretrain.micro_batch_size=4", "pretrain.tracker=none", "pretrain.save_every=7")
    assert status == 0, err
    assert (folder/"pretrain"/"log.jsonl").read_text().splitlines()[:10] == before  # not trained again
    one, other = (open_checkpoint(path/"pretrain")[0].state_dict() for path in (tiny_run, folder))
    assert all(torch.allclose(one[k], other[k], atol=2e-2) for k in one)
    run(config_of(folder, "pretrain.micro_batch_size=8"), "midtrain")  # nor is what was built on it


# --- damaged or misused ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, verb", [("eval/items.parquet", "report"), ("sft/model.safetensors", "run"), ("final/tokenizer_config.json", "run")])
def test_a_finished_run_with_a_damaged_file_is_not_called_done(tiny_run, tmp_path, name, verb):
    folder = shutil.copytree(tiny_run, tmp_path/"run")
    (folder/name).write_bytes((folder/name).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{name} is 100 bytes long and was .* put it back, or delete .*{name.split('/')[0]} and run its stage again"): run(config_of(folder), verb)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_checkpoint_without_its_tokenizer(tiny_run, tmp_path, name):
    folder = shutil.copytree(tiny_run/"final", tmp_path/"final")
    (folder/name).unlink()
    with pytest.raises(ValueError, match=f"the tokenizer in .*final lacks {name}"): open_checkpoint(folder)
    (folder/name).write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer in .*final (cannot be read|names no bos_token)"): open_checkpoint(folder)


def test_a_manifest_written_by_hand_is_one_line(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "curate")
    (folder/"curate"/"manifest.json").write_text("{}")
    for verb in ("run", "synth"):
        with pytest.raises(ValueError, match="curate/manifest.json does not say how its stage was made"): run(config_of(folder), verb)


def test_chats_that_are_all_too_long(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "sft_data")
    with pytest.raises(ValueError, match="none of the .* chats fits in context=8 tokens, the shortest has"): run(config_of(folder, "sft.context=8"), "sft")


def test_a_search_without_a_question_of_its_kinds(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "sft")
    with pytest.raises(ValueError, match="no question of the kinds code among those of .*synth: widen pts.kinds"): run(config_of(folder, "pts.kinds=[code]"), "pts")


# --- the command's own options --------------------------------------------------------------------------------------------

OWN = ["pts", "--model", "m", "--data", "d.jsonl", "--out", "o"]


@pytest.mark.parametrize("args, said", [
    (["pts", "r", "--samples", "5"], "--samples and 'r' do not go together: .* a run takes settings"),
    (["pts", "r", "--model", "m", "--p-gap", "0.2"], "--model, --p-gap and 'r' do not go together"),
    ([*OWN, "pts.samples=5"], "--model, --data, --out and 'pts.samples=5' do not go together"),
    ([*OWN, "--force"], "--force is for a run: .* to begin anew, delete o"),
    ([*OWN, "--base-url", ""], "--base-url '' is no address: give http://HOST:PORT/v1, or leave it out"),
    ([*OWN, "--base-url", "localhost:8000"], "--base-url 'localhost:8000' is no address"),
    ([*OWN, "--served-name", "x"], "--served-name x is a name at an endpoint: give its --base-url"),
    ([*OWN, "--segments", "all"], "--segments all: give a number above 0, or complete"),
    ([*OWN, "--segments", "0"], "--segments 0: give a number above 0"),
    ([*OWN, "--p-gap", "1"], "--p-gap 1: "),
    ([*OWN[:-1], "file"], "--out file is a file: name a directory"),
    (["chat", "nowhere"], "no directory nowhere: give a run directory, such as runs/toy"),
    (["chat", "file"], "no directory file"),
    (["chat", "empty"], "no model in empty: give a checkpoint directory"),
    (["chat", "begun"], "no model in begun: finish the run with `phi4 run begun`"),
])
def test_options_that_make_nothing(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    (tmp_path/"file").write_text("x")
    for name in ("empty", "begun"): (tmp_path/name).mkdir()
    (tmp_path/"begun"/"config.yaml").write_text("name: toy")
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 2 and re.match(f"phi4: {said}", done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr


def test_seeds_out_of_range_are_refused():
    for verb in (["chat", "r"], OWN):
        for seed in ("-1", str(2**31)):
            done = CliRunner().invoke(cli.app, [*verb, "--seed", seed])
            assert done.exit_code == 2 and "--seed" in done.stderr and not isinstance(done.exception, OverflowError)


def test_a_directory_called_like_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"toy").mkdir()
    assert cli.find_config("toy", []).name == "toy"
    (tmp_path/"mine").mkdir()
    with pytest.raises(ValueError, match="mine is not a run directory"): cli.find_config("mine", [])


def test_chat_reads_what_is_no_utf8(tiny_run):
    done = subprocess.run([sys.executable, "-m", "phi4_ref.cli", "chat", tiny_run], input=b"\xff\xfe hello\n", capture_output=True, env={**ENV, "PYTHONIOENCODING": "utf-8:surrogateescape"})
    assert done.returncode == 0 and done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "phi4_ref.cli", "chat", tiny_run], input=b"\xff\xfe hello\n", capture_output=True, env={**ENV, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 2 and done.stderr.startswith(b"phi4: the input is not UTF-8")


def test_a_terminal_that_lacks_a_letter():
    done = subprocess.run([sys.executable, "-m", "phi4_ref.cli", "plan", "toy"], capture_output=True, text=True, env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "phi-4 ?3" in done.stdout, done.stderr


def test_a_reader_that_goes_away(tiny_run, tmp_path):
    folder = begun(tiny_run, tmp_path/"run", "collect")
    process = start("curate", folder)
    process.stdout.close()
    assert "nobody reads the output any more: what is finished is kept" in process.communicate(timeout=120)[1] and process.returncode == 141
    assert phi4("curate", folder)[0] == 0
