"Algorithm 1: the index gives the verdicts of the literal procedure, and real benchmark questions are found."
import gzip, json, os, random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.data import decontaminate
from phi4_ref.data.decontaminate import Decontaminator, Verdict, algorithm_1, benchmark_items, common_ngrams, item_text
from phi4_ref.data.dedup import words

few_words = st.lists(st.sampled_from(['a', 'b', 'c']), max_size=35).map(' '.join)


@settings(deadline=None, max_examples=150)
@given(items=st.lists(few_words, max_size=6), texts=st.lists(few_words, max_size=4), spliced=st.booleans(),
       thresholds=st.tuples(st.sampled_from([0, 0.1, 0.3, 0.5, 1]), st.sampled_from([0, 0.1, 0.3, 0.5, 1])), allow=st.integers(0, 3))
def test_index_gives_the_verdicts_of_the_letter(items, texts, spliced, thresholds, allow):
    if spliced: texts = [f'{t} x {items[i % len(items)]} y' if items else t for i, t in enumerate(texts)]
    info, contaminated = sorted(thresholds)
    named = benchmark_items({'b': items})
    allowed = [' '.join(g) for t in items for g in decontaminate.ngrams(t, 13)][:allow]
    fast = Decontaminator({'b': items}, allowed, info, contaminated)
    assert fast.verdicts(texts) == [algorithm_1(t, named, allowed, info, contaminated) for t in texts]


def test_runs_do_not_cross_from_text_to_text():
    item = 'one two three four five six seven eight nine ten eleven twelve thirteen'
    first, second = ' '.join(item.split()[:6]), ' '.join(item.split()[6:12])
    assert [v.label for v in Decontaminator({'b': [item]}).verdicts([first, second, item])] == ['clean', 'clean', 'contaminated']


def test_many_texts_in_order():
    item = ' '.join(f'k{i}' for i in range(20))
    texts = [item if i % 7 == 0 else f'text {i}' for i in range(600)]
    labels = [v.label for v in Decontaminator({'b': [item]}).verdicts(texts)]
    assert labels == ['contaminated' if i % 7 == 0 else 'clean' for i in range(600)]


def test_ratio_and_denominator():
    item = ' '.join(f'k{i}' for i in range(26))                      # twenty 7-grams
    text = ' '.join(f'k{i}' for i in range(12)) + ' end' * 40        # shares six of them, and no 13-gram
    v = algorithm_1(text, {'i': item}, info=0.1, contaminated=0.3)
    grams = len(set(decontaminate.ngrams(text, 7)))
    assert grams == 6 + 6 + 1 and v == Verdict('contaminated', 'i', 6 / 13, '6 of 13 7-grams shared, at least 0.3')
    assert algorithm_1(text, {'i': item}, info=0.1, contaminated=0.5).label == 'partial'
    assert algorithm_1(text, {'i': item}, info=6 / 13, contaminated=0.5).label == 'clean'      # partial is *above* info
    assert algorithm_1(text, {'i': item}, info=0.1, contaminated=6 / 13).label == 'contaminated'  # contaminated is *at least*


def test_verdict_names_item_ratio_and_words():
    a, b = ' '.join(f'a{i}' for i in range(30)), ' '.join(f'b{i}' for i in range(30))
    v = Decontaminator({'x': [{'id': 'q1', 'question': a, 'meta': {}}, {'id': 'q2', 'question': b, 'meta': {}}]}).verdict('see ' + b)
    assert (v.label, v.item, v.ratio) == ('contaminated', 'x/q2', 1.0) and 'b0 b1 b2' in v.reason


def test_a_13_gram_decides_before_any_ratio():
    short, long = ' '.join(f's{i}' for i in range(9)), ' '.join(f'l{i}' for i in range(80))
    text = short + ' and ' + ' '.join(long.split()[10:24])
    for v in (algorithm_1(text, {'b/0': short, 'b/1': long}), Decontaminator({'b': [short, long]}).verdict(text)):
        assert v.item == 'b/1' and v.ratio < 1 and v.reason.startswith("13-gram 'l10 l11")
    assert algorithm_1(short, {'b/0': short, 'b/1': short}).item == 'b/0'  # the first of equals


def test_allowed_phrases():
    phrase = 'choose the one answer from the options below that best completes the sentence'
    item = phrase + ' ' + ' '.join(f'k{i}' for i in range(60))
    text = 'today ' + phrase + ' ' + ' '.join(f'm{i}' for i in range(60))
    assert Decontaminator({'b': [item]}).verdict(text).label == 'contaminated'
    v = Decontaminator({'b': [item]}, allowed=[phrase.upper() + '?']).verdict(text)
    assert v.label == 'partial' and v.ratio == 7 / 67  # the allowed 13-gram still holds seven 7-grams
    with pytest.raises(ValueError, match='has 3 words: 13 are needed'): Decontaminator({'b': [item]}, allowed=['just three words'])


def test_common_ngrams_counts_documents_not_occurrences():
    phrase = 'this page uses cookies to give you the best possible reading experience today'
    assert len(words(phrase)) == 13
    texts = [f'{phrase} {i} {phrase}' for i in range(4)]
    assert phrase in common_ngrams(texts, min_docs=4)
    assert common_ngrams(texts, min_docs=5) == [] and common_ngrams([], min_docs=2) == []
    assert common_ngrams([texts[0]] * 4 + ['other text'], min_docs=4) == sorted({' '.join(g) for g in decontaminate.ngrams(texts[0], 13)})
    with pytest.raises(ValueError, match='min_docs'): common_ngrams(texts, min_docs=1)


def test_a_common_phrase_is_allowed_with_its_neighbours():
    rng = random.Random(0)
    rules = 'use only the standard library and return the result instead of printing'
    some = lambda n: ' '.join(f'w{rng.randrange(5000)}' for _ in range(n))
    pages = [f'{some(20)} adds {i % 30}. {rules} {some(9)}' for i in range(60)]
    bench = {'code': [f'Write a function that adds {i}. {rules} {some(25)}' for i in range(5)]}
    labels = lambda allowed: [v.label for v in Decontaminator(bench, allowed).verdicts(pages)]
    assert labels(common_ngrams(pages)).count('contaminated') == 10
    allowed = decontaminate.allowed_ngrams(bench, common_ngrams(pages, n=9))
    assert labels(allowed).count('contaminated') == 0
    assert all(v.label == 'contaminated' for v in Decontaminator(bench, allowed).verdicts(['x ' + t for t in bench['code']]))
    assert decontaminate.allowed_ngrams(bench, []) == [] and decontaminate.allowed_ngrams({}, ['a b']) == []
    with pytest.raises(ValueError, match='one length'): decontaminate.allowed_ngrams(bench, ['a b', 'a b c'])


def test_formulas_count():
    ours, theirs = 'solve x + y = 3 and x - y = 1 for x > 0', 'solve x - y < 3 and x / y < 1 for x < 0'
    judge = Decontaminator({'b': [ours]})
    assert judge.verdict('so ' + ours).label == 'contaminated' and judge.verdict(theirs).label == 'clean'


def test_item_text_and_short_items():
    mcq = {'id': 'm', 'question': 'Which?', 'meta': {'choices': ['red', 'blue'], 'label': 0}}
    code = {'id': 'c', 'question': 'Finish: def f(x):', 'meta': {'prompt': 'def f(x):'}}
    assert item_text(mcq) == 'Which?\nred\nblue' and item_text(code) == code['question'] and item_text('plain') == 'plain'
    other = code | {'meta': {'prompt': 'def g(y):'}}
    assert benchmark_items({'b': [code, 'plain']}) == {'b/c': code['question'], 'b/1': 'plain'}
    assert benchmark_items({'b': [other]}) == {'b/c': code['question'], 'b/c prefix': 'def g(y):'}
    assert Decontaminator({'b': [mcq, 'one two three four five six seven']}).unreachable == ['b/m']


def test_nothing_to_compare():
    assert Decontaminator({}).verdicts(['a b c d e f g h i j k l m n', '']) == [Verdict('clean', None, 0.0, 'no benchmark items')] * 2
    assert Decontaminator({'b': ['']}).verdict('').label == 'clean'
    assert Decontaminator({'b': ['a b c d e f g']}).verdicts([]) == []


@pytest.mark.parametrize('info, contaminated', [(-0.1, 0.5), (0.6, 0.5), (0.1, 1.5)])
def test_impossible_thresholds_are_refused(info, contaminated):
    with pytest.raises(ValueError, match='thresholds'): Decontaminator({}, info=info, contaminated=contaminated)
    with pytest.raises(ValueError, match='thresholds'): algorithm_1('a', {}, info=info, contaminated=contaminated)


def test_real_questions_in_real_pages_are_all_found():
    if 'PHI4_REF_DATA' not in os.environ: pytest.skip('PHI4_REF_DATA is not set: no real benchmarks')
    data = Path(os.environ['PHI4_REF_DATA'])
    lines = lambda path: [json.loads(line) for line in (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8')]
    benchmarks = {'GSM8k': [r['question'] for r in lines(data/'gsm8k/test.jsonl')],
                  'HumanEval': [r['prompt'] for r in lines(data/'humaneval/HumanEval.jsonl.gz')],
                  'MBPP': [r['text'] for r in lines(data/'mbpp/mbpp.jsonl')],
                  'ARC-Challenge': [{'id': r['id'], 'question': r['question'], 'meta': {'choices': [r[k] for k in r['label']]}}
                                    for r in lines(data/'arc/arc_challenge_test.jsonl')]}
    judge, rng = Decontaminator(benchmarks), random.Random(0)
    filler = [r['question'] for r in lines(data/'gsm8k/train.jsonl.gz')[:300]]
    items = benchmark_items(benchmarks)
    assert judge.unreachable == [] and len(items) == 1319 + 164 + 974 + 1172
    verdicts = judge.verdicts([f'{rng.choice(filler)} {text} {rng.choice(filler)}' for text in items.values()])
    assert all(v.label == 'contaminated' for v in verdicts)
    assert np.mean([v.ratio == 1 for v in verdicts]) > 0.995  # else a 13-gram of the filler came first
    clean = judge.verdicts(filler)
    assert sum(v.label == 'contaminated' for v in clean) <= 3
    sample = rng.sample(sorted(items), 40)
    some = Decontaminator({'x': [items[name] for name in sample]})
    named = {f'x/{i}': items[name] for i, name in enumerate(sample)}
    texts = [f'{rng.choice(filler)} {named[name]}'[:rng.randrange(100, 2000)] for name in named]
    assert some.verdicts(texts) == [algorithm_1(t, named) for t in texts]
