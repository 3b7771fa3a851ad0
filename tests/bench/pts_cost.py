"""What a confirmed pivotal pair costs: this project's search against a fixed number of samples at every step, one prefix at a time.

    python tests/bench/pts_cost.py [--run runs/toy] [--questions 120] [--seeds 3] [--quick]
    python tests/bench/pts_cost.py --model DIR-OR-NAME --data FILE.jsonl [--question-column question] [--answer-column answer] [--max-total 256] [--store FILE]

First on trees whose truth is known: recall of the true pivots of the trajectories (a change of p(success) of 0.2 or more), share of false ones among those reported, tokens for each true pivot reported.
Then on a model: the fine-tuned toy of a run, or any causal LM with questions. The fixed procedure is what published searches do: 50 fresh samples for p(success) at every prefix that is looked at,
segments halved by length, one prefix a call, the band's estimate not used again, the likeliest nine other tokens tried with 50 new samples each until one differs by 0.2. Pairs of all procedures then pass a test
(`post.pts.confirm`, margin 0.08 or as the row says, false discovery rate 5%): the fixed procedure's on 60 fresh rollouts, which are not charged to it; ours as the search does it, which is, and ours must come out at 0.2 in the end. Tokens and seconds are divided by the pairs that pass. The search is made with several seeds; a ratio is that of all tokens
over all pairs, beside it the median over the seeds with the range, and the last line is that of bisection. With --store the rollouts are kept, and what was interrupted goes on (seconds then mean nothing).
"""
import argparse, json, platform, random, statistics, time
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from phi4_ref.post import pts
from phi4_ref.post.statistics import wilson

SEARCH = dict(n_samples=12, filter_samples=16)
TESTED = SEARCH | dict(confirm_samples=28)
OURS = {'bisection': TESTED, 'every token': TESTED | dict(segments='complete'), '8 segments': TESTED | dict(segments=8), 'as `phi4 pts` does': dict(n_samples=20, filter_samples=20, confirm_samples=40, segments='complete'),
        'confirmed on 40 fresh ones': SEARCH | dict(confirm_samples=40, fresh=True), 'margin 0.1': TESTED | dict(margin=.1), 'margin 0': TESTED | dict(margin=0.), 'not confirmed': SEARCH}
SEEDS = range(200, 300)  # the settings were chosen on others
NUMBERS = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: ' '.join(map(str, ids)))
P_GAP, FIXED, MARGIN, BAND = .2, 50, .08, (.2, .8)


def fixed_search(questions, prompts, sampler, tokenizer, oracle, max_total, seed=0):
    "(pairs as (case, pair), all cases, totals) of the fixed procedure."
    sampling, found, cases, count = pts.Sampling(sampler, tokenizer, oracle, max_total, seed), [], [], iter(range(10**9))
    def fresh(question, prompt, prefix):
        "(n, k) and the next tokens of 50 new rollouts."
        completions, ok = pts.sample_and_grade([question] * FIXED, [prompt + list(prefix)] * FIXED, [list(prefix)] * FIXED, [pts.rollout_seed(seed, question['id'], prompt, next(count)) for _ in range(FIXED)], sampling)
        return (FIXED, sum(ok)), [c.ids[0] for c in completions]
    for question, prompt in zip(questions, prompts):
        estimate = cache(lambda prefix: fresh(question, prompt, prefix))
        p = lambda prefix: float(case.success) if prefix and len(prefix) == len(case.tokens) else pts.ratio(estimate(prefix)[0])
        if not BAND[0] <= pts.ratio(fresh(question, prompt, ())[0]) <= BAND[1]: continue  # the search then estimates its first prefix anew
        (completion,), (success,) = pts.sample_and_grade([question], [prompt], [[]], [pts.rollout_seed(seed, question['id'], prompt, -1)], sampling)
        case = pts.Case(question, prompt, list(completion.ids), list(completion.logprobs), success)
        cases.append(case)
        by_length = lambda logprobs: len(logprobs) // 2
        split, pts.split_point = pts.split_point, by_length
        try: segments = pts.subdivide((), tuple(case.tokens), case.logprobs, p, P_GAP)
        finally: pts.split_point = split
        for i in pts.pivotal_positions(segments, p, P_GAP):
            prefix, token = tuple(case.tokens[:i]), case.tokens[i]
            before, side = p(prefix), 1 if p(prefix + (token,)) > p(prefix) else -1
            if i + 1 == len(case.tokens): continue  # nothing can be drawn behind the last token
            tried = [t for t, _ in Counter(estimate(prefix)[1]).most_common() if t != token][:9]
            for other in tried:
                counts = fresh(question, prompt, prefix + (other,))[0]
                if side * (before - pts.ratio(counts)) >= P_GAP:
                    own = estimate(prefix + (token,))[0]
                    mine, theirs = (token, own), (other, counts)
                    chosen, rejected = (mine, theirs)[::side]
                    found.append((case, dict(position=i, before=estimate(prefix)[0], after=own, chosen=chosen, rejected=rejected)))
                    break
    return found, cases, sampling.totals


def our_search(questions, prompts, sampler, tokenizer, oracle, max_total, **settings):
    return pts.search(questions, prompts, sampler, tokenizer, oracle, max_total=max_total, p_gap=P_GAP, band=BAND, **settings)


# --- known truth

def random_tree(rng, depth):
    "Skewed next-token distributions, and leaves right or wrong."
    if depth == 0 or rng.random() < .03: return rng.random() < .5
    weights = [rng.random() ** 4 + 1e-6 for _ in range(rng.randint(1, 3))]
    return {10 + i: (w / sum(weights), random_tree(rng, depth - 1)) for i, w in enumerate(weights)}


def known_truth(n, seeds):
    print(f'{n} trees, {seeds} seeds' + f'\n{"":36} {"pairs":>6} {"recall":>7} {"< 0.08":>7} {"< 0.2":>7} {"of these, 95%":>14} {"tokens / pair >= 0.08":>21}')
    arms = {'fixed 50, bisection': None, **{f'ours, {name}': settings for name, settings in OURS.items()}}
    sums = {name: [0] * 6 for name in arms}  # pairs, true pivots, found of them, below the margin, below p_gap, tokens
    for seed in SEEDS[:seeds]:
        rng, trees = random.Random(seed), {}
        while len(trees) < n:
            tree = random_tree(rng, 9)
            if not isinstance(tree, bool) and .2 < pts.tree_success(tree) < .8: trees[100 + len(trees)] = (1., tree)
        questions, prompts, sampler = [dict(id=f'q{i}') for i in trees], [[i] for i in trees], pts.tree_sampler(trees)
        at = lambda ids: pts.tree_success(pts.tree_at(trees[ids[0]][1], ids[1:]))
        oracle = lambda question, text: text.endswith(' 1')
        for name, settings in arms.items():
            if settings is None:
                found, searched, totals = fixed_search(questions, prompts, sampler, NUMBERS, oracle, 24, seed)
                pairs, cases = [(c.prompt + c.tokens[:r['position']], c.tokens[r['position']]) for c, r in found], {str(c.prompt): c.tokens for c in searched}
                tokens = totals['generated_tokens']
            else:
                rows, trajectories, counts = our_search(questions, prompts, sampler, NUMBERS, oracle, 24, seed=seed, **settings)
                pairs, cases, tokens = [(r['prompt_ids'], r['meta']['pivot_token_id']) for r in rows], {str(t['prompt_ids']): t['tokens'] for t in trajectories}, counts['generated_tokens']
            true = set()  # pivots of the trajectories before their last token, where a pair can be made
            for prompt, ids in cases.items():
                prompt = json.loads(prompt)
                for i in range(len(ids) - 2):
                    if abs(at(prompt + ids[:i + 1]) - at(prompt + ids[:i])) >= P_GAP: true.add((str(prompt + ids[:i]), ids[i]))
            reported = {(str(prefix), token): abs(at(prefix + [token]) - at(prefix)) for prefix, token in pairs if token in pts.tree_at(trees[prefix[0]][1], prefix[1:])}
            for k, x in enumerate((len(reported), len(true), len(true & set(reported)), *(sum(change < least for change in reported.values()) for least in (MARGIN, P_GAP)), tokens)): sums[name][k] += x
    for name, (pairs, true, both, below, small, tokens) in sums.items():
        print(f'{name:36} {pairs:6} {both / max(1, true):7.2f} {below / max(1, pairs):7.1%} {small / max(1, pairs):7.1%} {"{:.1%}-{:.1%}".format(*wilson((pairs, small))):>14} {tokens / max(1, pairs - below):21,.0f}')


# --- a model

def generate_sampler(model, tokenizer, stop_ids):
    "The sampler protocol over transformers' `generate`, one prefix a call."
    def sampler(prompts, seeds, max_total):
        assert len(set(map(tuple, prompts))) == 1
        torch.manual_seed(seeds[0])
        ids = torch.tensor([prompts[0]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1., num_return_sequences=len(prompts), max_length=max_total, eos_token_id=list(stop_ids),
                             pad_token_id=tokenizer.pad_token_id, output_scores=True, return_dict_in_generate=True)
        logp = torch.stack(out.scores, 1).log_softmax(-1)
        rows = []
        for row, lp in zip(out.sequences[:, ids.shape[1]:], logp):
            end = next((i + 1 for i, t in enumerate(row.tolist()) if t in stop_ids), len(row))
            rows.append(pts.Completion(row[:end].tolist(), lp[range(end), row[:end]].tolist(), row[end - 1].item() in stop_ids))
        return rows
    return sampler


def on_model(args):
    import transformers
    from phi4_ref.post.dataset import end_ids, question_ids
    from phi4_ref.post.oracle import answer_oracle
    from phi4_ref.records import QUESTION, load
    transformers.utils.logging.set_verbosity_error()
    folder = Path(args.run)/'sft' if not args.model else args.model
    if not args.model and not (folder/'config.json').exists(): raise SystemExit(f'pts_cost: no finished stage {folder}: run `phi4 run toy`, or give --model and --data')
    tokenizer, peer = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if args.model:
        model = peer
        rows = [json.loads(line) for line in open(args.data)]
        questions = [dict(id=str(i), question=r[args.question_column], answer=str(r[args.answer_column]), kind='problem', meta={}) for i, r in enumerate(rows)]
    else:
        from phi4_ref.model.pretrained import from_pretrained
        model, questions = from_pretrained(folder), [q for q in load(Path(args.run)/'synth'/'questions.parquet', QUESTION) if q['kind'] != 'code']
    questions = questions[:args.questions]
    prompts, stops = [question_ids(tokenizer, q["question"]) for q in questions], end_ids(peer, tokenizer)
    sampler = pts.model_sampler(model, stops)
    if args.store: sampler = pts.stored(sampler, args.store, str(folder))
    def timed(work): start = time.perf_counter(); return work(), time.perf_counter() - start
    few, results = max(1, len(questions) // 10), {}  # name -> [(proposed, confirmed, tokens, seconds) of each seed]
    for seed in SEEDS[:args.seeds]:
        (found, _, totals), seconds = timed(lambda: fixed_search(questions, prompts, sampler, tokenizer, answer_oracle, args.max_total, seed))
        verdicts = pts.confirm(found, pts.Sampling(sampler, tokenizer, answer_oracle, args.max_total, f'test {seed}'), 60, MARGIN, P_GAP, sure=.025, fresh=True)
        kept = sum(x <= .05 for x in pts.passing(verdicts, .05, 0)[0])
        results.setdefault('fixed 50, our engine', []).append((len(found), kept, totals['generated_tokens'], seconds))
        if seed == SEEDS[0]:
            (*_, part), spent = timed(lambda: fixed_search(questions[:few], prompts[:few], generate_sampler(peer, tokenizer, stops), tokenizer, answer_oracle, args.max_total))
        results.setdefault(f'fixed 50, generate (speed of {few})', []).append((len(found), kept, totals['generated_tokens'], totals['generated_tokens'] * spent / part['generated_tokens']))
        for name, settings in OURS.items():
            (pairs, _, counts), seconds = timed(lambda: our_search(questions, prompts, sampler, tokenizer, answer_oracle, args.max_total, seed=seed, **settings))
            results.setdefault(f'ours, {name}', []).append((counts['candidates'], len(pairs), counts['generated_tokens'], seconds))
            print(seed, name, {k: counts[k] for k in ('in_band', 'tokens', 'tested_tokens', 'candidates', 'pairs', 'confirming_tokens', 'generated_tokens')}, flush=True)
    print(f'\ntorch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, {len(questions)} questions, {args.seeds} seeds')
    print(f'{"":36} {"proposed":>8} {"confirmed":>9} {"tokens":>11} {"tokens / pair":>13} {"s / pair":>9} {"tokens ratio":>32}')
    base = results['fixed 50, our engine']
    for name, rows in results.items():
        proposed, kept, tokens, seconds = map(sum, zip(*rows))
        ratios = [b[2] / max(1, b[1]) / (r[2] / max(1, r[1])) for b, r in zip(base, rows)]
        fixed = sum(b[2] for b in base) / max(1, sum(b[1] for b in base))
        whole = f'{fixed / (tokens / max(1, kept)):.1f} (by seed {statistics.median(ratios):.1f}, {min(ratios):.1f}-{max(ratios):.1f})'
        print(f'{name:36} {proposed:8} {kept:9} {tokens:11,} {tokens / max(1, kept):13,.0f} {seconds / max(1, kept):9.2f} {"" if name == "ours, not confirmed" else whole:>32}')
        if name == 'ours, bisection': last = whole
    print(f'ratio: {last}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', default='runs/toy'); parser.add_argument('--model'); parser.add_argument('--data')
    parser.add_argument('--question-column', default='question'); parser.add_argument('--answer-column', default='answer')
    parser.add_argument('--questions', type=int, default=120); parser.add_argument('--max-total', type=int, default=160)
    parser.add_argument('--seeds', type=int, default=3); parser.add_argument('--store', type=Path, help='SQLite file that keeps the rollouts')
    parser.add_argument('--quick', action='store_true', help='few trees, and no model')
    args = parser.parse_args()
    if bool(args.model) != bool(args.data): raise SystemExit('pts_cost: --model and --data go together')
    known_truth(*(40, 1) if args.quick else (200, 6))
    if not args.quick: on_model(args)
