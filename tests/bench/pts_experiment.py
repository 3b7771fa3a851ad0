"""Does single-token DPO on pivotal tokens help on held-out questions, and what are the pivots?

    python tests/bench/pts_experiment.py RUN [RUN ...]                        finished toy runs, one a seed
    python tests/bench/pts_experiment.py --model DIR --out DIR [--seeds 1]    another model: made first, from fine-tuning on (SmolLM2-135M-Instruct: two to three hours on one core)
    python tests/bench/pts_experiment.py --model DIR --out DIR --data FILE    the same on your questions

With --model a chat model is fine-tuned on arithmetic stories whose writers answer at once, in one expression or step by step (half, a quarter, a quarter), searched, and trained on the confirmed pivotal pairs, on the same pairs with
their labels shuffled, on whole answers of the same rollouts at the same compute, and by a judge after the pivotal pairs. What is finished in --out is not made again.
With --data the stories are JSONL rows {question, answer} or {question, choices, answer}, answer being one of the choices: of the rows, shuffled by the seed, the first --chats fine-tune, the next --questions are searched, the next --items
measure. Nobody judges them, so that arm is left out. Of a public set, ARC-Easy: `for r in datasets.load_dataset('allenai/ai2_arc', 'ARC-Easy')['test']: dict(question=r['question'], choices=r['choices']['text'], answer=r['choices']['text'][r['choices']['label'].index(r['answerKey'])])`.
For any kind of model the tables are: accuracy on held-out stories at temperature 1 with paired intervals over the questions, p(success) before the pivots and the probability of the better token before and after training,
how unlikely the pivotal tokens are, and what the search costs and finds with one setting changed. Tables are printed, and written to FILE with --table FILE.
"""
import argparse, copy, json, math, platform, statistics
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

from phi4_ref.eval.claims import percent, points
from phi4_ref.eval.harness import EVAL_ITEM, item_row, prompt_ids, replies, reply_text, sample_seed, stop_ids
from phi4_ref.eval.report import table
from phi4_ref.eval.stats import mean_interval, paired_interval
from phi4_ref.eval.tasks import Grade, grade
from phi4_ref.post import pts
from phi4_ref.post.dpo import shuffle_labels, train_dpo
from phi4_ref.post.judge import ModelChat, collect_replies, judge_pairs
from phi4_ref.records import PREFERENCE, QUESTION, load, load_json, save, save_json
from phi4_ref.run import open_checkpoint, pair_tokens
from phi4_ref.teacher import WorldTeacher
from phi4_ref.train.loop import TrainSettings
from phi4_ref.train.pretrain import finish_stage
from phi4_ref.train.sft import sft
from phi4_ref.universe import make_problems, stream
from phi4_ref.world import CHAT_WAYS, World, problem_row

ARMS = dict(sft='SFT', dpo='pivotal DPO', dpo_shuffled='pivotal, labels shuffled', dpo_full='whole answers, same compute', final='pivotal, then judge')
SEARCH = dict(n_samples=12, filter_samples=12, confirm_samples=28)  # of another model; a toy run has its own


def stories(n, seed, split='train'): return [problem_row(f'{split}-{i:04}', p) for i, p in enumerate(make_problems(n, f'experiment/{seed}', max_number=9, split=split))]


def sampler_of(folder, run, temperature=1.):
    "(sampler, tokenizer) of a checkpoint; rollouts are kept in the run."
    model, tokenizer = open_checkpoint(folder)
    return pts.stored(pts.model_sampler(model, stop_ids(tokenizer), temperature), run/'experiment.sqlite', f'{Path(folder).name}, temperature {temperature}'), tokenizer


# --- another model, from fine-tuning on

def chats(n, seed):
    "(question, reply) of arithmetic stories, each told in one of the writers' ways."
    ways = list(CHAT_WAYS), list(CHAT_WAYS.values())
    return [(p.question, p.say(stream(seed, 'way', i).choices(*ways)[0])) for i, p in enumerate(make_problems(n, f'chats/{seed}', max_number=9))]


def split_data(file, seed, *sizes):
    "QUESTION rows of a JSONL file, shuffled, in parts that do not overlap."
    rows = []
    for i, line in enumerate(open(file, encoding='utf-8')):
        r, kind, meta, shown = json.loads(line), 'problem', {}, ''
        if r.get('choices'): kind, meta, shown = 'mcq', dict(choices=r['choices'], label=r['choices'].index(r['answer'])), ''.join(f'\n- {c}' for c in r['choices'])
        rows.append(dict(id=str(i), question=r['question'] + shown, answer=str(r['answer']), kind=kind, meta=meta))
    stream(seed, 'split').shuffle(rows)
    if len(rows) < sum(sizes): raise SystemExit(f'pts_experiment: {file} has {len(rows)} rows, fewer than --chats, --questions and --items together ({sum(sizes)})')
    ends = np.cumsum((0, *sizes))
    return [rows[a:b] for a, b in zip(ends, ends[1:])]


def fine_tune(model, run, seed, said, tokens, lr):
    rows = [dict(messages=[dict(role='user', content=question), dict(role='assistant', content=reply)]) for question, reply in said]
    model, tokenizer = open_checkpoint(model)
    print('SFT', sft(model, rows, tokenizer, TrainSettings(lr=lr, warmup_fraction=.1, seed=seed), run/'sft', tokens=tokens, context=256, batch_size=16, seed=seed, save_every=20), flush=True)


def search(run, seed, questions):
    sampler, tokenizer = sampler_of(run/'sft', run)
    prompts = [prompt_ids(q, tokenizer, True) for q in questions]
    pairs, trajectories, counts = pts.search(questions, prompts, sampler, tokenizer, max_total=max(map(len, prompts)) + 64, seed=seed, **SEARCH)
    (run/'pts').mkdir(exist_ok=True)
    save(run/'pts'/'pairs.parquet', pairs, PREFERENCE); save_json(run/'pts'/'trajectories.json', trajectories); save_json(run/'pts'/'stats.json', counts)
    print('PTS', counts, flush=True)


def train_on(run, name, start, pairs, kind, seed, settings, epochs):
    model, tokenizer = open_checkpoint(run/start)
    log = train_dpo(model, copy.deepcopy(model), pairs, TrainSettings(lr=settings['lr'], warmup_fraction=.1, seed=seed), run/name, kind=kind, kl_weight=settings['kl_weight'], epochs=epochs, batch_size=settings['batch_size'])
    print(name, finish_stage(model, tokenizer, run/name, log, pairs=len(pairs)), flush=True)


def judged(run, seed, questions):
    "Pairs of the DPO model's replies and the teacher's, by the teacher as judge."
    model, tokenizer = open_checkpoint(run/'dpo')
    teacher, prompts = WorldTeacher(World(seed, pages=10)), [[dict(role='user', content=q['question'])] for q in questions]
    replies = collect_replies(prompts, [(teacher, 1), (ModelChat(model, tokenizer, 'dpo'), 2)], temperature=1., max_tokens=64, seed=seed)
    pairs, counts = judge_pairs(prompts, replies, teacher, tokenizer, seed)
    (run/'judge').mkdir(exist_ok=True)
    save(run/'judge'/'pairs.parquet', pairs, PREFERENCE)
    print('judge', counts, flush=True)


def asked(folder, questions, samples, temperature, seed):
    "EVAL_ITEM rows of generated replies; those to multiple choice too, which the harness would score by the choices' probabilities."
    (model, tokenizer), jobs = open_checkpoint(folder), [(q, s) for q in questions for s in range(samples)]
    ids = replies(model, [prompt_ids(q, tokenizer, True) for q, _ in jobs], [64] * len(jobs), [sample_seed(seed, 'arithmetic', q['id'], s) for q, s in jobs], stop_ids(tokenizer), temperature)
    texts = [reply_text(i, tokenizer, True) for i in ids]
    def graded(q, text):
        if q['kind'] != 'mcq': return grade([q], [text])[0]
        return Grade(1., 'correct') if pts.answer_oracle(q, text) else Grade(0., 'incorrect')
    return [item_row(q, 'arithmetic', s, temperature, graded(q, t), t, len(i), Path(folder).name) for (q, s), t, i in zip(jobs, texts, ids)]


def make_run(model, run, seed, args):
    "A run directory of another model, with the parts of a toy run that the tables read."
    run.mkdir(parents=True, exist_ok=True)
    if args.data:
        shown, train, test = split_data(args.data, seed, args.chats, args.questions, args.items)
        said = [(q['question'], q['answer']) for q in shown]
    else: said, train, test = chats(args.chats, seed), stories(args.questions, seed), stories(args.items, seed, 'test')
    for name, part in dict(questions=train, test=test).items(): save(run/f'{name}.parquet', part, QUESTION)
    token, full, judge = (dict(lr=args.lr * scale, kl_weight=.1, batch_size=16) for scale in (1, 1, .3))
    done = lambda name: (run/name/'config.json').exists()
    if not done('sft'): fine_tune(model, run, seed, said, args.tokens, args.sft_lr)
    if not (run/'pts'/'stats.json').exists(): search(run, seed, train)
    pairs, (_, tokenizer) = load(run/'pts'/'pairs.parquet'), open_checkpoint(run/'sft')
    whole = pts.full_length_pairs(load_json(run/'pts'/'trajectories.json'), tokenizer)
    if not done('dpo'): train_on(run, 'dpo', 'sft', pairs, 'token', seed, token, args.epochs)
    if not done('dpo_shuffled'): train_on(run, 'dpo_shuffled', 'sft', shuffle_labels(pairs, seed), 'token', seed, token, args.epochs)
    if not done('dpo_full'): train_on(run, 'dpo_full', 'sft', whole, 'full', seed, full, args.epochs * pair_tokens(pairs, 'token') / pair_tokens(whole, 'full'))
    if not args.data:
        if not (run/'judge'/'pairs.parquet').exists(): judged(run, seed, train[:args.prompts])
        if not done('final'): train_on(run, 'final', 'dpo', load(run/'judge'/'pairs.parquet'), 'full', seed, judge, 2)
    rows = []
    for name in filter(done, ARMS):
        part = run/'eval'/f'{name}.parquet'
        if not part.exists():
            part.parent.mkdir(exist_ok=True)
            save(part, asked(run/name, test, 4, 1., seed) + asked(run/name, test, 1, 0., seed), EVAL_ITEM)
        rows += load(part)
        own = [r['correct'] for r in rows if r['model'] == name]
        print(name, f'{np.mean(own):.3f}', flush=True)
    save(run/'eval'/'items.parquet', rows, EVAL_ITEM)


# --- tables over runs, toy or not

def accuracy_table(runs):
    "Arms on the held-out problems, the questions of all runs together."
    scores = defaultdict(lambda: defaultdict(list))  # (arm, temperature > 0) -> question -> outcomes
    for n, run in enumerate(runs):
        for r in load(run/'eval'/'items.parquet'):
            if r['benchmark'] == 'arithmetic' and r['model'] in ARMS: scores[r['model'], r['temperature'] > 0][n, r['id']].append(r['correct'])
    def flat(arm, hot): return [(float(x), q) for q, xs in sorted(scores[arm, hot].items()) for x in xs]
    rows = []
    for arm, name in ARMS.items():
        if not scores[arm, True]: continue
        own, base = flat(arm, True), flat('sft', True)
        values, clusters = zip(*own)
        each = [np.mean([x for q, xs in scores[arm, True].items() if q[0] == n for x in xs]) for n in range(len(runs))]
        rows.append([name, percent(mean_interval(values, clusters)), '' if arm == 'sft' else points(paired_interval(values, [x for x, _ in base], clusters)), ' '.join(f'{100 * x:.0f}' for x in each), percent(mean_interval([x for x, _ in flat(arm, False)]))])
    return table(['', 'accuracy at temperature 1, %', 'minus SFT, points', 'each run', 'greedy, %'], rows)


def questions_of(run):
    "id -> QUESTION row of what was searched."
    synth = run/'synth'/'questions.parquet'
    return {q['id']: q for q in load(synth if synth.exists() else run/'questions.parquet')}


@cache
def pivots_after(run, arm, n):
    "For each confirmed pair: successes of n new rollouts from its prefix under a checkpoint, and the probability of the two tokens there."
    asked, pairs, (sampler, tokenizer) = questions_of(run), load(run/'pts'/'pairs.parquet'), sampler_of(run/arm, run)
    model = open_checkpoint(run/arm)[0]
    sampling = pts.Sampling(sampler, tokenizer, pts.answer_oracle, max(len(p['prompt_ids']) for p in pairs) + 64, f'after {arm}')
    cases = [pts.Case(asked[p['meta']['question_id']], p['prompt_ids'][:len(p['prompt_ids']) - p['meta']['position']], p['prompt_ids'][len(p['prompt_ids']) - p['meta']['position']:]) for p in pairs]
    for c in cases: c.tokens = c.tokens + [-1]  # so that the prefix is not taken for the whole trajectory
    pts.draw([(c, p['meta']['position'], n) for c, p in zip(cases, pairs)], sampling)
    with torch.no_grad(): both = [model(torch.tensor([p['prompt_ids']]))[0, -1].softmax(-1)[[p['chosen_ids'][0], p['rejected_ids'][0]]].tolist() for p in pairs]
    return [(pts.ratio(c.counts(p['meta']['position'])), *two) for c, p, two in zip(cases, pairs, both)]


def after_table(runs, n):
    "The pivots themselves, before and after each training."
    rows, clusters = [], [(run, p['meta']['question_id']) for run in runs for p in load(run/'pts'/'pairs.parquet')]
    for arm, name in ARMS.items():
        if not all((run/arm/'config.json').exists() for run in runs): continue
        own, base = ([x for run in runs for x in pivots_after(run, a, n)] for a in (arm, 'sft'))
        column = lambda rows, k: [r[k] for r in rows]
        rows.append([name, *(f'{100 * np.mean(column(own, k)):.0f}' for k in range(3)), '' if arm == 'sft' else points(paired_interval(column(own, 0), column(base, 0), clusters))])
    return f'{len(clusters)} confirmed pairs, {n} new rollouts from each prefix.\n\n' + table(['', 'p(success) before the pivot, %', 'p(chosen token), %', 'p(rejected token), %', 'p(success) minus SFT, points'], rows)


def tokens_table(runs):
    "How unlikely the pivots are, beside all tokens of the searched answers; and which they are."
    every, found, named = [], [], Counter()
    for run in runs:
        every += [lp for t in load_json(run/'pts'/'trajectories.json') for lp in t['logprobs']]
        for p in load(run/'pts'/'pairs.parquet'):
            found.append(p['meta']['logprob'])
            named[repr(p['chosen']), repr(p['rejected'])] += 1
    rows, edges = [], [0, .1, .5, .9, 1.0001]
    for low, high in zip(edges, edges[1:]):
        inside = lambda lps: sum(low <= math.exp(lp) < high for lp in lps)
        rows.append([f'{low:g} to {min(1, high):g}', f'{inside(every):,}', f'{inside(every) / len(every):.1%}', inside(found), f'{inside(found) / max(1, len(found)):.1%}', f'{inside(found) / max(1, inside(every)):.1%}'])
    common = ', '.join(f'{a} over {b} ({n})' for (a, b), n in named.most_common(8))
    return table(['probability of the token', 'tokens', 'of all tokens', 'pivots', 'of all pivots', 'pivots among them'], rows) + f'\n\nMost frequent pairs: {common}.\n'


VARIANTS = {'as the run': {}, 'split by length': dict(split='length'), 'every token': dict(segments='complete'), 'half the rollouts a prefix': 'half', 'twice the rollouts a prefix': 'double',
            'p_gap 0.1': dict(p_gap=.1), 'p_gap 0.3': dict(p_gap=.3), 'every question (no band)': dict(band=(0., 1.)), 'confirmed on fresh rollouts alone': dict(fresh=True), 'not confirmed': dict(confirm_samples=0)}

def ablation_table(run, args):
    "One setting of the search changed at a time: cost, pairs, and accuracy after training on them."
    (sampler, tokenizer), asked = sampler_of(run/'sft', run), list(questions_of(run).values())
    (test, settings, epochs), base = test_items(run, args), SEARCH
    if (run/'synth').exists():
        from phi4_ref.config import load_config
        c = load_config(run/'config.yaml')
        base = dict(n_samples=c.pts.samples, filter_samples=c.pts.filter_samples, confirm_samples=c.pts.confirm_samples)
    questions, rows = [q for q in asked if q['kind'] != 'code'][:args.ablate], []
    prompts = [prompt_ids(q, tokenizer, True) for q in questions]
    for name, change in VARIANTS.items():
        if isinstance(change, str): change = dict(n_samples=round(base['n_samples'] * dict(half=.5, double=2)[change]))
        pairs, trajectories, counts = pts.search(questions, prompts, sampler, tokenizer, max_total=max(map(len, prompts)) + 64, seed=0, **base | change)
        if not rows: first = trajectories
        ids, right = score_after(run, f"{name.replace(' ', '-')}-{len(questions)}", pairs, 'token', settings, epochs, test) if pairs else ((), ())
        rows.append([name, counts['in_band'], counts['candidates'], len(pairs), f"{counts['generated_tokens']:,}", f"{counts['generated_tokens'] / max(1, len(pairs)):,.0f}", percent(mean_interval(right, ids)) if pairs else ''])
    null = pts.null_search(questions, prompts, first, sampler, tokenizer, max_total=max(map(len, prompts)) + 64, seed=0, **base)
    rows.append(['verdicts by chance', null['in_band'], null['candidates'], null['pairs'], f"{null['generated_tokens']:,}", '', ''])
    return f'{len(questions)} questions.\n\n' + table(['', 'in the band', 'candidates', 'pairs', 'tokens generated', 'tokens a pair', 'accuracy at temperature 1 after training, %'], rows)


def test_items(run, args):
    "Held-out problems, and how a run trains on pairs."
    if not (run/'synth').exists(): return load(run/'test.parquet'), dict(lr=args.lr, kl_weight=.1, batch_size=16), args.epochs
    from phi4_ref.config import load_config
    from phi4_ref.data.collect import load_benchmarks
    c = load_config(run/'config.yaml')
    return load_benchmarks(run/'collect')['arithmetic'][:args.items], dict(lr=c.dpo.lr, kl_weight=c.dpo.kl_weight, batch_size=c.dpo.batch_size), c.dpo.epochs

def score_after(run, name, pairs, kind, settings, epochs, test):
    "(question ids, outcomes) at temperature 1 of the SFT model trained on pairs; kept in the run."
    part = run/'parts'/f'{name}.json'
    if not part.exists():
        train_on(run, f'parts/{name}', 'sft', pairs, kind, 0, settings, epochs)
        save_json(part, [[r['id'], r['correct']] for r in asked(part.with_suffix(''), test, 4, 1., 0)])
    return zip(*load_json(part))


def compute_table(run, args):
    "Pivotal pairs and whole answers with the same tokens through the model, from a little to all that the run spends."
    (test, settings, epochs), pairs = test_items(run, args), load(run/'pts'/'pairs.parquet')
    whole = pts.full_length_pairs(load_json(run/'pts'/'trajectories.json'), sampler_of(run/'sft', run)[1])
    rows, cost = [], pair_tokens(pairs, 'token')
    arms = dict(token=('token', pairs, 1), full=('full', whole, 1), faster=('full', whole, 2))  # kind, pairs, learning rates of the run
    for share in (1 / 12, 1 / 6, 1 / 3, 2 / 3, 1):
        found = {name: tuple(map(tuple, score_after(run, f'{name}-{share:.2f}', of, kind, settings | dict(lr=settings['lr'] * times), epochs * share * cost / pair_tokens(of, kind), test))) for name, (kind, of, times) in arms.items()}
        ids, token = found['token']
        rows.append([f'{epochs * share * cost:,.0f}', *(percent(mean_interval(right, ids)) for _, right in found.values()), *(points(paired_interval([float(x) for x in token], [float(x) for x in found[name][1]], ids)) for name in ('full', 'faster'))])
    return table(['tokens read', 'pivotal pairs, %', 'whole answers, %', 'the same at twice the learning rate, %', 'pivotal minus whole, points', 'pivotal minus twice the rate, points'], rows)


LOSSES = {'pivotal pairs, KL to the reference': ('token', None), 'pivotal pairs, plain loss (the paper\'s)': ('token', 0.), 'whole answers, KL to the reference': ('full', None), 'whole answers, plain loss': ('full', 0.)}

def losses_table(run, args):
    "Accuracy after training with and without the KL term, over learning rates: no arm is left at a rate that suits another."
    (test, settings, epochs), pairs = test_items(run, args), load(run/'pts'/'pairs.parquet')
    whole, rates = pts.full_length_pairs(load_json(run/'pts'/'trajectories.json'), sampler_of(run/'sft', run)[1]), (1 / 10, 1 / 3, 1, 2, 4)
    rows, passes = [], dict(token=epochs, full=epochs * pair_tokens(pairs, 'token') / pair_tokens(whole, 'full'))
    for name, (kind, kl) in LOSSES.items():
        kl = settings['kl_weight'] if kl is None else kl
        cells = []
        for rate in rates:
            ids, right = score_after(run, f'{kind}-kl-{kl:g}-rate-{rate:.2f}', dict(token=pairs, full=whole)[kind], kind, settings | dict(lr=settings['lr'] * rate, kl_weight=kl), passes[kind], test)
            cells.append(percent(mean_interval(right, ids)))
        rows.append([name, *cells])
    return f'{len(pairs)} pivotal pairs, {len(whole)} pairs of whole answers at the same compute; accuracy at temperature 1, %. KL weight {settings["kl_weight"]:g}.\n\n' + table(['learning rate', *(f'{settings["lr"] * rate:.0e}' for rate in rates)], rows)


def report(runs, args):
    parts = [f'torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}; runs: {len(runs)}. Brackets: 95% over questions.', '**Held-out accuracy**', accuracy_table(runs),
             '**The pivots after training**', after_table(runs, args.rollouts), '**Which tokens are pivotal**', tokens_table(runs)]
    if args.compute: parts += ['**At less compute**', compute_table(runs[0], args)]
    if args.losses: parts += ['**With and without the KL term**', losses_table(runs[0], args)]
    if args.ablate: parts += ['**One setting changed**', ablation_table(runs[0], args)]
    text = '\n\n'.join(parts)
    print(text)
    if args.table: args.table.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', type=Path)
    parser.add_argument('--model'); parser.add_argument('--data', type=Path, help='JSONL of questions'); parser.add_argument('--out', type=Path); parser.add_argument('--seeds', type=int, default=1)
    parser.add_argument('--chats', type=int, default=600); parser.add_argument('--tokens', type=int, default=60_000); parser.add_argument('--sft-lr', type=float, default=1e-4)
    parser.add_argument('--questions', type=int, default=150); parser.add_argument('--items', type=int, default=150); parser.add_argument('--prompts', type=int, default=60)
    parser.add_argument('--lr', type=float, default=1e-5); parser.add_argument('--epochs', type=float, default=6)
    parser.add_argument('--rollouts', type=int, default=20, help='from each pivot and checkpoint'); parser.add_argument('--compute', action='store_true', help='the table of accuracy against compute, on the first run')
    parser.add_argument('--losses', action='store_true', help='the table of losses and learning rates, on the first run'); parser.add_argument('--ablate', type=int, default=0, help='questions for the table of changed settings, on the first run; 0: no such table')
    parser.add_argument('--table', type=Path, help='file that the tables are written to')
    args = parser.parse_args()
    if bool(args.model) == bool(args.runs) or args.model and not args.out: parser.error('give finished runs, or --model and --out')
    runs = [args.out/f'seed-{seed}' for seed in range(args.seeds)] if args.model else args.runs
    if args.model:
        for seed, run in enumerate(runs): make_run(args.model, run, seed, args)
    report(runs, args)
