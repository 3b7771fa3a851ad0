"A stage's directory: whole or absent after a kill at any line, continued, refused, one process at a time."
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from phi4_ref import artifact, records
from phi4_ref.artifact import StageRefused, begin, build, differences, discard, fingerprint, is_disk_full, only_one, publish

LINES = {artifact.__file__, records.__file__, artifact.shutil.__file__}  # a kill comes before any line of these


def make(out, lr=0.003):
    "A stage of four steps that goes on from where it was."
    for step in range(4):
        if not (out/f"step_{step}.parquet").exists(): records.save_json(out/f"step_{step}.parquet", [lr, step])
    return {"steps": 4}


def first(run): return build(Path(run, "pretrain"), make, {"pretrain": {"lr": 0.003}}, {})
def forced(run): return build(Path(run, "pretrain"), lambda out: make(out, 0.001), {"pretrain": {"lr": 0.001}}, {}, force=True)


def contents(run): return {str(p.relative_to(run)): p.read_bytes() for p in sorted(Path(run).rglob("*")) if p.is_file() and p.name != "manifest.json"}


def killed_at(work, line):
    "Run in a child that dies before its line-th line; False if it got through."
    if pid := os.fork(): return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    left = line
    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in LINES: return None
        if event == "line":
            left -= 1
            if left < 0: os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    try: work()
    finally: os._exit(0)


@pytest.mark.parametrize("work, before", [(first, ()), (forced, (first,))])
def test_killed_before_any_line(tmp_path, work, before):
    for step in (*before, work): step(tmp_path/"whole")
    for line in range(10_000):
        run = tmp_path/str(line)
        for step in before: step(run)
        if not killed_at(lambda: work(run), line): break
        if (run/"pretrain").exists():  # then it is whole, and the next command tidies up
            assert publish(run/"pretrain") and not (run/"pretrain.old").exists(), line
        manifest = work(run)
        assert manifest["fingerprint"] == artifact.finished(tmp_path/"whole"/"pretrain")["fingerprint"] and manifest["counts"] == {"steps": 4}
        assert contents(run) == contents(tmp_path/"whole"), line
    assert line > 100  # the kills did come


def test_killed_while_begun_work_is_thrown_away(tmp_path):
    for line in range(10_000):
        partial = tmp_path/f"{line}.partial"
        begin(partial, {"config": {}, "inputs": {}}, False)
        for name in "am": (partial/f"{name}.json").write_text("1")
        (partial/"z").mkdir()
        if not killed_at(lambda: discard(partial), line): break
        assert not (partial/"started.json").exists() or len(list(partial.iterdir())) == 4, line  # what may be continued is whole
    assert line > 10 and not partial.exists()


def test_a_forced_stage_keeps_its_predecessor_until_it_is_done(tmp_path):
    first(tmp_path)
    def dies(out): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): build(tmp_path/"pretrain", dies, {"pretrain": {"lr": 0.001}}, {}, force=True)
    assert first(tmp_path)["config"] == {"pretrain": {"lr": 0.003}}
    assert forced(tmp_path)["config"] == {"pretrain": {"lr": 0.001}}


def test_begun_work_goes_on(tmp_path):
    def dies(out):
        make(out.joinpath("x").parent); (out/"step_3.parquet").unlink(); (out/"mark").write_text("1")
        raise RuntimeError("no")
    for force in (False, True):
        folder = tmp_path/str(force)
        with pytest.raises(RuntimeError): build(folder, dies, {"lr": 1}, {}, force=force)
        assert not folder.exists()
        build(folder, make, {"lr": 1}, {}, force=force)
        assert (folder/"mark").exists() and not (folder/"started.json").exists()


def test_begun_otherwise_is_refused_and_named(tmp_path):
    def dies(out): (out/"mark").write_text("1"); raise RuntimeError("no")
    with pytest.raises(RuntimeError): build(tmp_path/"sft", dies, {"sft": {"lr": 1, "tokens": 5}}, {})
    for _ in range(2):
        with pytest.raises(StageRefused, match=r"sft\.partial .*\n  sft\.lr: 1 -> 2\n") as refused: build(tmp_path/"sft", make, {"sft": {"lr": 2, "tokens": 5}}, {})
    assert "tokens" not in str(refused.value) and (tmp_path/"sft.partial"/"mark").exists()
    build(tmp_path/"sft", make, {"sft": {"lr": 2, "tokens": 5}}, {}, force=True)
    assert not (tmp_path/"sft"/"mark").exists()


def test_a_finished_stage_is_skipped_or_refused(tmp_path):
    manifest = first(tmp_path)
    assert build(tmp_path/"pretrain", None, {"pretrain": {"lr": 0.003}}, {}) == manifest
    with pytest.raises(StageRefused, match=r"pretrain\.lr: 0\.003 -> 0\.001"): build(tmp_path/"pretrain", None, {"pretrain": {"lr": 0.001}}, {})
    with pytest.raises(StageRefused, match=r"pretrain\.new: 'absent' -> 1"): build(tmp_path/"pretrain", None, {"pretrain": {"lr": 0.003, "new": 1}}, {})
    assert artifact.finished(tmp_path/"pretrain") == manifest


def test_inputs_are_compared_by_content(tmp_path):
    def rows(out, text=b"a"): (out/"rows.parquet").write_bytes(text)
    def curate(text, force): build(tmp_path/"curate", lambda out: rows(out, text), {"n": force}, {}, force=force)
    def synth(): return build(tmp_path/"synth", make, {}, {"curate": tmp_path/"curate"})
    with pytest.raises(FileNotFoundError, match="stage synth needs .*curate.* run the stage curate first"): synth()
    curate(b"a", False); manifest = synth()
    curate(b"a", True)
    assert synth() == manifest  # rebuilt to the same bytes is the same
    curate(b"b", True)
    with pytest.raises(StageRefused, match="input curate: "): synth()


def test_the_fingerprint_is_of_results(tmp_path):
    def changes(name, text="x"):
        before = fingerprint(tmp_path); (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text(text)
        return fingerprint(tmp_path) != before
    assert changes("model.safetensors") and changes("benchmarks/a.parquet") and changes("tokenizer.json") and changes("model.safetensors", "y")
    assert not changes("log.jsonl") and not changes("manifest.json") and not changes("replies.sqlite")


def test_publish_without_work_changes_nothing(tmp_path):
    assert publish(tmp_path/"sft") is None and not any(tmp_path.iterdir())
    begin(tmp_path/"sft.partial", {"config": {}, "inputs": {}}, False)
    assert publish(tmp_path/"sft") is None and (tmp_path/"sft.partial"/"started.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"), RuntimeError("I/O error: No space left on device (os error 28)"),
                                   RuntimeError("File too large (os error 27)"), sqlite3.OperationalError("database or disk is full")])
def test_a_full_disk_is_named_and_work_kept(tmp_path, error):
    assert is_disk_full(error)
    def fills(out): (out/"step_0.parquet").write_text("1"); raise error
    with pytest.raises(OSError, match="the disk is full: stage sft stopped while writing .*sft.partial .*same command"): build(tmp_path/"sft", fills, {}, {})
    assert (tmp_path/"sft.partial"/"step_0.parquet").exists()


def test_seconds_add_up_over_attempts(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(artifact.time, "time", lambda: next(clock))
    def dies(out): raise RuntimeError("no")
    with pytest.raises(RuntimeError): build(tmp_path/"sft", dies, {}, {})
    assert build(tmp_path/"sft", make, {}, {})["seconds"] == 20


def test_differences_are_found_at_any_depth():
    assert differences({"a": {"b": {"c": 1, "d": [1]}}, "x": 1}, {"a": {"b": {"c": 2, "d": [1]}}, "y": None}) == ["a.b.c: 1 -> 2", "x: 1 -> 'absent'", "y: 'absent' -> None"]


def test_one_process_at_a_time_and_a_dead_one_leaves_nothing(tmp_path):
    hold = "import sys, time; from phi4_ref.artifact import only_one\nwith only_one(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is working in "):
        with only_one(tmp_path): pass
    child.kill(); child.wait()
    with only_one(tmp_path): pass


# --- what a user's hand or a disk did to it -------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '{"fingerprint": 3}', '{"config": [], "inputs": {}, "fingerprint": "x"}', '{"config": {}, "fingerprint": "x"}'])
def test_a_manifest_that_says_nothing_is_named(tmp_path, text):
    first(tmp_path)
    (tmp_path/"pretrain"/"manifest.json").write_text(text)
    for work in (lambda: first(tmp_path), lambda: build(tmp_path/"sft", make, {}, {"pretrain": tmp_path/"pretrain"})):
        with pytest.raises(ValueError, match="pretrain/manifest.json does not say how its stage was made .*delete .*pretrain and run its stage again"): work()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"config": {}, "inputs": {}}', '{"config": 3, "inputs": {}, "seconds": 1}'])
def test_a_note_that_says_nothing_is_named(tmp_path, text):
    begin(tmp_path/"sft.partial", {"config": {}, "inputs": {}}, False)
    (tmp_path/"sft.partial"/"started.json").write_text(text)
    with pytest.raises(ValueError, match="sft.partial/started.json does not say"): build(tmp_path/"sft", make, {}, {})


@pytest.mark.parametrize("damage, said", [(lambda path: path.unlink(), "step_2.parquet is gone"), (lambda path: path.write_bytes(path.read_bytes()[:-3]), "step_2.parquet is .* bytes long and was")])
def test_a_damaged_result_is_named_before_work_is_built_on_it(tmp_path, damage, said):
    first(tmp_path)
    def after(force=False): return build(tmp_path/"sft", make, {}, {"pretrain": tmp_path/"pretrain"}, force=force)
    done = after()
    damage(tmp_path/"pretrain"/"step_2.parquet")
    for work in (lambda: first(tmp_path), after, lambda: after(True)):
        with pytest.raises(ValueError, match=said): work()
    forced(tmp_path)  # mends it
    assert artifact.finished(tmp_path/"sft") == done


def test_an_artifact_from_before_sizes_were_kept(tmp_path):
    manifest = first(tmp_path)
    old = {name: value for name, value in manifest.items() if name != "files"}
    records.save_json(tmp_path/"pretrain"/"manifest.json", old)
    assert first(tmp_path) == old


@pytest.mark.parametrize("name", ["sft", "sft.partial"])
def test_a_file_where_a_stage_should_be(tmp_path, name):
    (tmp_path/name).write_text("notes")
    def never(out): raise AssertionError("worked before it looked")
    with pytest.raises(ValueError, match=f"{name} is a file, and stage sft needs that name"): build(tmp_path/"sft", never, {}, {})
    assert (tmp_path/name).read_text() == "notes"


def test_fields_that_do_not_enter_the_result_may_change(tmp_path):
    def dies(out): (out/"mark").write_text("1"); raise RuntimeError("no")
    with pytest.raises(RuntimeError): build(tmp_path/"sft", dies, {"sft": {"lr": 1, "micro_batch_size": 8, "tracker": "auto", "save_every": 5}}, {})
    other = {"sft": {"lr": 1, "micro_batch_size": 2, "tracker": "none", "save_every": 9}}
    for force in (False, True):
        made = build(tmp_path/"sft", make, other, {}, force=force)
        assert made["config"] == other
    assert build(tmp_path/"sft", None, {"sft": {"lr": 1, "micro_batch_size": 4, "tracker": "none", "save_every": 9}}, {}) == made


def test_begun_work_goes_on_with_a_smaller_micro_batch(tmp_path):
    def dies(out): (out/"mark").write_text("1"); raise RuntimeError("out of memory")
    for force in (False, True):
        folder = tmp_path/str(force)
        with pytest.raises(RuntimeError): build(folder, dies, {"sft": {"micro_batch_size": 8}}, {})
        build(folder, make, {"sft": {"micro_batch_size": 2}}, {}, force=force)
        assert (folder/"mark").exists()


@pytest.mark.parametrize("place, said", [("file", r"it is a file"), ("file/run", "Not a directory"), ("/proc/run", "No such file")])
def test_where_nothing_can_be_written(tmp_path, place, said):
    (tmp_path/"file").write_text("x")
    with pytest.raises(ValueError, match=rf"cannot work in .*{place} \({said}.*\): choose another directory with out="):
        with only_one(tmp_path/place): pass
