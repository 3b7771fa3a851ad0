"""The toy run over several seeds: every claim of the recipe as a mean over seeds, and pooled over the questions of all of them.

    python tests/bench/toy_seeds.py [--seeds 3] [--out runs/seeds] [--quick] [key=value ...]

A seed is a world of its own: pages, benchmarks, tokenizer, weights, samples. Seed N lies in OUT/seed-N; what is finished there is not made again, what was interrupted goes on.
The table is also written to OUT/seeds.md and its numbers to OUT/seeds.json. `ratio` is accuracy at temperature 1 after pivotal-token DPO over that of SFT.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

# --quick: the same stages in seconds; it learns next to nothing, and its numbers mean nothing
QUICK = """collect.pages=150 collect.max_number=4 collect.seed_questions=400 collect.functions=60 collect.books=60 collect.conversations=300 collect.items=12 curate.annotations=60
model.hidden_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 model.vocab_size=512 model.intermediate_size=128 pretrain.tokens=100000 pretrain.batch_size=8 pretrain.micro_batch_size=8
pretrain.lr=5e-3 midtrain.tokens=20000 midtrain.batch_size=4 midtrain.micro_batch_size=4 sft.tokens=80000 sft.batch_size=8 sft.micro_batch_size=8 sft.lr=3e-3 sft_data.questions=10
sft_data.refusal_questions=20 sft_data.refusal_samples=2 pts.questions=40 pts.low=0.01 pts.high=0.99 pts.p_gap=0.06 pts.confirm_samples=0 dpo.epochs=1 judge.prompts=12 evaluate.samples=2 evaluate.items=12
evaluate.max_new_tokens=24 synth.vote_on=120 synth.worked=100 synth.reversals=20 synth.fim=20""".split()
MAXRSS = 1 << (10 if sys.platform == 'linux' else 0)  # bytes in a unit of ru_maxrss

def make_run(folder:Path, seed:int, changes:list[str])->None:
    "Make or finish one run as a process of its own, and keep the largest memory it has needed in memory.json."
    done, path = (folder/'report/manifest.json').exists(), folder.with_name(f'{folder.name}.memory.json')
    process = subprocess.Popen([sys.executable, '-m', 'phi4_ref.cli', 'run', 'toy', f'seed={seed}', f'out={folder}', *changes])
    _, status, used = os.wait4(process.pid, 0)  # its own usage, where RUSAGE_CHILDREN would give the largest child so far
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode: raise SystemExit(f'toy_seeds: the run of seed {seed} ended with status {process.returncode}, see above; what is finished is kept')
    before = json.loads(path.read_text())['peak_bytes'] if path.exists() else 0
    if not done: path.write_text(json.dumps({'peak_bytes': max(before, used.ru_maxrss * MAXRSS)}))

def read_run(folder:Path)->dict:
    "What a finished run says: its items, minutes, peak memory, versions."
    from phi4_ref.records import load, load_json
    manifests, memory = [load_json(p) for p in sorted(folder.glob('*/manifest.json'))], folder.with_name(f'{folder.name}.memory.json')
    return dict(items=load(folder/'eval/items.parquet'), minutes=sum(m['seconds'] for m in manifests) / 60, versions=manifests[0]['versions'],
                peak_gb=json.loads(memory.read_text())['peak_bytes'] / 1e9 if memory.exists() else None)

def pool(runs:dict)->list[dict]:
    "The items of all seeds. A question belongs to its seed, and so does what a constant answer would score, which is counted by `attribute`."
    return [{**r, 'id': f"{seed}/{r['id']}", 'meta': {**r['meta'], 'attribute': f"{seed}/{r['meta'].get('attribute')}"}} for seed, run in runs.items() for r in run['items']]

def measures(items:list[dict])->dict:
    "Name -> (Interval or None, whether it is a difference), the same for one seed and for all of them together."
    from phi4_ref.eval.claims import change, claims, declined, level, pick
    from phi4_ref.eval.report import ARMS
    found = {c.text: (c.interval, True) for c in claims(items)}
    for benchmark in ('code', 'knowledge'): found[f'{benchmark}: base'] = level(pick(items, 'base', benchmark)), False
    for benchmark, length in sorted({(r['benchmark'], r['meta']['length']) for r in items if 'length' in r['meta']}):
        at = {m: [r for r in pick(items, m, benchmark) if r['meta']['length'] == length] for m in ('base', 'midtrained')}
        for m, rows in at.items(): found[f'{benchmark} {length}x: {m}'] = level(rows), False
        found[f'{benchmark} {length}x: midtrained - base'] = change(at['base'], at['midtrained']), True
    for m in ('base', 'midtrained', 'sft', 'dpo', 'final'): found[f'arithmetic, greedy: {ARMS.get(m, m)}'] = level(pick(items, m, 'arithmetic')), False
    rows = {m: pick(items, m, 'arithmetic', True) for m in ('sft', *ARMS)}
    for m in rows: found[f'arithmetic at temperature 1: {ARMS.get(m, m)}'] = level(rows[m]), False
    for m in ARMS: found[f'arithmetic at temperature 1: {ARMS[m]} - sft'] = change(rows['sft'], rows[m]), True
    for name, benchmark in (('declines unknown facts', 'unknown'), ('declines facts that exist', 'knowledge')):
        for m in ('base', 'sft', 'dpo', 'final'): found[f'{name}: {m}'] = level(pick(items, m, benchmark), declined), False
        for m, start in (('sft', 'base'), ('final', 'sft')): found[f'{name}: {m} - {start}'] = change(pick(items, start, benchmark), pick(items, m, benchmark), declined), True
    return found

def verdicts(runs:dict)->dict:
    "Claim -> its verdict on the pooled questions, and in how many seeds alone it holds."
    from phi4_ref.eval.claims import claims
    alone = Counter(c.text for run in runs.values() for c in claims(run['items']) if c.verdict == 'holds')
    return {c.text: f'**{c.verdict}** ({alone[c.text]} of {len(runs)} alone)' for c in claims(pool(runs))}

def measure_rows(runs:dict)->list[dict]:
    "One row a measure: each seed's value, the interval over seeds, the interval over the pooled questions, the verdict."
    from phi4_ref.eval.stats import seeds_interval
    by_seed, pooled = [measures(run['items']) for run in runs.values()], measures(pool(runs))
    values = {name: [m[name][0].mean if name in m and m[name][0] else None for m in by_seed] for name in pooled}
    over_seeds = {name: seeds_interval(v) if None not in v and len(v) > 1 else None for name, v in values.items()}
    verdict = verdicts(runs)
    return [dict(name=name, difference=difference, seeds=values[name], over_seeds=over_seeds[name], pooled=i, verdict=verdict.get(name)) for name, (i, difference) in pooled.items() if i]

def as_markdown(rows:list[dict], runs:dict)->str:
    "The table: percent, and points for differences."
    from phi4_ref.eval.claims import percent, points
    from phi4_ref.eval.report import table
    one = lambda v, difference: None if v is None else f'{round(100 * v):{"+" if difference else ""}d}'
    def interval(i, difference):
        text = points(i) if difference else percent(i)
        return f'**{text}**' if difference and i and i.sign else text
    body = [[r['name'], *(one(v, r['difference']) for v in r['seeds']), *(interval(r[k], r['difference']) for k in ('over_seeds', 'pooled')), r['verdict']] for r in rows]
    body += [['minutes', *(f"{run['minutes']:.1f}" for run in runs.values()), *[None] * 3],
             ['peak memory, GB', *(run['peak_gb'] and f"{run['peak_gb']:.2f}" for run in runs.values()), *[None] * 3]]
    return table(['percent, differences in points', *(f'seed {s}' for s in runs), 'mean over seeds', 'over all questions', 'verdict on all questions'], body)

def machine()->str:
    "Processor, cores, system."
    path = Path('/proc/cpuinfo')
    named = [line.split(':', 1)[1].strip() for line in path.read_text().splitlines() if line.startswith('model name')] if path.exists() else []
    return f'{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}'

def ratios(rows:list[dict])->list[float]:
    "Accuracy after pivotal-token DPO over that of SFT, one a seed; none where SFT solves nothing."
    by_name = {r['name']: r['seeds'] for r in rows}
    return [b / a for a, b in zip(by_name['arithmetic at temperature 1: sft'], by_name['arithmetic at temperature 1: pivotal pairs']) if a]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=None, help='how many, from 0 on (default 3, with --quick 2)')
    parser.add_argument('--out', type=Path, default=None, help='default runs/seeds, with --quick runs/seeds-quick')
    parser.add_argument('--quick', action='store_true', help='a tiny run of the same stages, under a minute; its numbers mean nothing')
    parser.add_argument('changes', nargs='*', metavar='key=value', help='overrides of the toy configuration')
    asked = parser.parse_intermixed_args()
    n, out = asked.seeds or (2 if asked.quick else 3), asked.out or Path('runs/seeds-quick' if asked.quick else 'runs/seeds')
    changes = (QUICK if asked.quick else []) + asked.changes
    if n < 2: parser.error(f'--seeds {n}: an interval over seeds needs at least 2')
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(n): make_run(out/f'seed-{seed}', seed, changes)
    runs = {seed: read_run(out/f'seed-{seed}') for seed in range(n)}
    rows = measure_rows(runs)
    versions = ', '.join(f'{k} {v}' for k, v in runs[0]['versions'].items())
    text = as_markdown(rows, runs) + f"\n\nToy run{' (--quick: numbers without meaning)' if asked.quick else ''}, {n} seeds. Brackets: 95%, over seeds by Student's t, over all questions paired and clustered by question; bold: a difference whose interval excludes zero. \"Alone\": seeds in which the claim holds by itself.\n{machine()}. {versions}.\n"
    found = ratios(rows) or [math.nan]
    (out/'seeds.md').write_text(text, encoding='utf-8')
    about = dict(changes=changes, machine=machine(), versions=runs[0]['versions'], minutes=[r['minutes'] for r in runs.values()], peak_gb=[r['peak_gb'] for r in runs.values()])
    (out/'seeds.json').write_text(json.dumps(dict(**about, rows=rows, ratios=found), indent=1), encoding='utf-8')
    print('\n' + text)
    print(f'ratio: {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})')

if __name__ == '__main__': main()
