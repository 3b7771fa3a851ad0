"""Benchmarks run: that of the GPU where there is none, saying what it is worth there; the others at their smallest."""
import json, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark itself is the test")
def test_a_slice_on_the_cpu():
    done = subprocess.run([sys.executable, BENCH / "gpu_slice.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No GPU" in done.stdout and "no figure below says anything about a GPU" in done.stdout
    for row in ("eager attention, float32", "bfloat16 autocast", "sdpa", "flash-attn", "compiled layers", "chunked cross-entropy", "activation checkpointing"):
        assert done.stdout.count(f"\n{row:26} ") == 2, "one row for each length"
    assert done.stdout.splitlines()[-1].startswith("ratio: ")


def test_the_cost_of_a_pair_on_trees_of_known_truth():
    done = subprocess.run([sys.executable, BENCH / "pts_cost.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:36].strip(): line[36:].split() for line in done.stdout.splitlines()[2:]}
    fixed, ours, unconfirmed = rows["fixed 50, bisection"], rows["ours, bisection"], rows["ours, not confirmed"]
    false, tokens = (lambda row: float(row[3].strip("%"))), (lambda row: int(row[5].replace(",", "")))
    assert tokens(ours) * 4 < tokens(fixed) and false(ours) < false(unconfirmed), "on a few trees, by much"


def test_the_tables_of_the_experiment_from_a_finished_run(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    done = subprocess.run([sys.executable, BENCH / "pts_experiment.py", run, "--rollouts", "2", "--table", tmp_path / "table.md"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "table.md").read_text()
    for part in ("Held-out accuracy", "The pivots after training", "Which tokens are pivotal"): assert f"**{part}**" in text
    assert all(f"| {arm} |" in text for arm in ("SFT", "pivotal DPO", "pivotal, labels shuffled", "whole answers, same compute", "pivotal, then judge"))


@pytest.mark.parametrize("bench, options, rows", [
    ("train_throughput.py", ["--size", "tiny", "--eager", "--quick"], ["| phi4_ref ", "| Trainer ", "| plain loop "]),
    ("generate_throughput.py", ["--quick", "--prefixes", "1"], ["phi4_ref ", "engine, their model ", "transformers  "]),
    ("shards.py", ["--quick", "--documents", "300"], ["    0 ", "    1 "]),
    pytest.param("dpo_step.py", ["--quick"], ["TRL's DPOTrainer ", "phi4_ref, a row for each pair "], marks=pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed: pip install phi4_ref[bench]"))])
def test_a_comparison_runs(bench, options, rows):
    done = subprocess.run([sys.executable, BENCH / bench, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert all(sum(line.startswith(row) for line in lines) == 1 for row in rows) and lines[-1].startswith("ratio: "), done.stdout


def test_questions_of_a_file_are_split_without_overlap(tmp_path):
    sys.path.insert(0, str(BENCH))
    try: from pts_experiment import split_data
    finally: sys.path.pop(0)
    rows = [dict(question=f"q{i}", answer=str(i)) if i % 2 else dict(question=f"q{i}", choices=["a", f"c{i}"], answer=f"c{i}") for i in range(30)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = split_data(tmp_path / "q.jsonl", 0, 10, 12, 8)
    assert [len(p) for p in parts] == [10, 12, 8] and len({q["id"] for p in parts for q in p}) == 30 and parts != split_data(tmp_path / "q.jsonl", 1, 10, 12, 8)
    chosen = next(q for p in parts for q in p if q["kind"] == "mcq")
    assert chosen["meta"]["choices"][chosen["meta"]["label"]] == chosen["answer"] and f"- {chosen['answer']}" in chosen["question"]
    with pytest.raises(SystemExit, match="has 30 rows"): split_data(tmp_path / "q.jsonl", 0, 20, 12, 8)
