"The whole recipe at tiny size: killed, interrupted, refused, moved, out of space; always the same bits in the end."
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from phi4_ref import artifact, cli
from phi4_ref.artifact import StageRefused
from phi4_ref.config import load_config
from phi4_ref.model import generate, pretrained
from phi4_ref.model.tokenizer import chat_ids
import phi4_ref.run as run_module
from phi4_ref.run import chosen, computed, open_checkpoint, run
from phi4_ref.train import pretrain

from tiny import TINY, phi4, start

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
    assert {p.name for p in folder.rglob("*")} == {p.name for p in tiny_run.rglob("*")}


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
    assert {p.name for p in tmp_path.rglob("*")} == {p.name for p in (tiny_run/"midtrain").iterdir()} - {"log.jsonl", "manifest.json", "mixture.json", "shards"}


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
    model, _ = open_checkpoint(tiny_run/"sft", **computed(config))
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
    assert said.startswith("phi4: ") and ("the tokenizer in" if "tokenizer" in name else name.split("/")[-1]) in said and name.split("/")[0] in said, said
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
