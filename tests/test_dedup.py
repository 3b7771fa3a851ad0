"Deduplication: planted copies are found, nothing else is dropped, and work stays linear."
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.data.dedup import (band_rows, exact_duplicates, near_duplicates, ngram_hashes, normal_form, shingle_sets, signatures,
                                 word_hashes, words)


def text(rng, n, vocabulary=20_000): return ' '.join(f'w{rng.randrange(vocabulary)}' for _ in range(n))


def shingles(t, width=5):
    w = words(t)
    return {tuple(w[i:i + width]) for i in range(max(1, len(w) - width + 1))} if w else set()


def jaccard(a, b): return len(a & b) / len(a | b) if a | b else 0.0


def edit(rng, t, changes):
    w = t.split()
    for i in rng.sample(range(len(w)), changes): w[i] = f'new{rng.randrange(10**9)}'
    return ' '.join(w)


def test_exact_keeps_formulas_apart_and_ignores_layout():
    texts = ['Area = x\u00b2', 'area  =\nX\u00b2', 'area = x2', 'cafe\u0301', 'caf\u00e9', 'a<b', 'a=b']
    assert exact_duplicates(texts) == [0, 0, 2, 3, 3, 5, 6]
    assert exact_duplicates([]) == []


@given(st.lists(st.text(max_size=12), max_size=30))
def test_exact_leader_is_the_first_equal_text(texts):
    forms = [normal_form(t) for t in texts]
    assert exact_duplicates(texts) == [forms.index(f) for f in forms]


@given(st.lists(st.sampled_from('abcde<=2 '), max_size=60).map(' '.join), st.lists(st.sampled_from('abcde<=2 '), max_size=60).map(' '.join),
       st.integers(1, 8))
def test_hashed_shingles_are_the_shingles(a, b, width):
    x, y = shingle_sets([a, b], width)
    plain = shingles(a, width), shingles(b, width)
    # a text shorter than the width is one shorter shingle
    assert (len(x), len(y)) == tuple(map(len, plain))
    assert len(np.intersect1d(x, y)) == len(plain[0] & plain[1])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.floats(0.6, 0.95))
def test_what_is_dropped_really_resembles_what_is_kept(seed, threshold):
    rng = random.Random(seed)
    originals = [text(rng, rng.randrange(3, 150)) for _ in range(25)]
    texts = originals + [edit(rng, t, rng.randrange(min(8, len(t.split())))) for t in originals * 2]
    rng.shuffle(texts)
    leader, sets = near_duplicates(texts, threshold), [shingles(t) for t in texts]
    for i, k in enumerate(leader):
        assert leader[k] == k
        if i != k: assert jaccard(sets[i], sets[k]) >= threshold and (-len(texts[k]), k) < (-len(texts[i]), i)


def test_planted_copies_are_found_and_look_alikes_stay():
    rng = random.Random(1)
    originals = [text(rng, 150) for _ in range(300)]
    copies = [edit(rng, t, rng.randrange(0, 3)) for t in originals]
    alike = [edit(rng, t, 12) for t in originals]
    texts = originals + copies + alike
    near = [jaccard(shingles(a), shingles(b)) >= 0.8 for a, b in zip(originals, copies)]
    leader = near_duplicates(texts)
    found = sum(leader[i] == i + 300 or leader[i + 300] == i for i in range(300) if near[i])
    assert found >= 0.97 * sum(near) and sum(near) > 250
    assert all(leader[600 + i] == 600 + i for i in range(300))


def test_no_chain_drops_a_text_unlike_the_one_kept():
    rng = random.Random(2)
    editions = [text(rng, 200)]
    for _ in range(11): editions.append(edit(rng, editions[-1], 4))
    leader = near_duplicates(editions)
    assert 1 < len(set(leader)) < 12
    assert jaccard(shingles(editions[0]), shingles(editions[-1])) < 0.5


def test_longest_then_earliest_is_kept():
    rng = random.Random(3)
    t = text(rng, 80)
    assert near_duplicates([t, t + ' more', t]) == [1, 1, 1]
    assert near_duplicates([t, t, t]) == [0, 0, 0]


def test_empty_and_short_texts():
    assert near_duplicates([]) == []
    assert near_duplicates(['', ' ', 'a', 'a b', 'a']) == [0, 1, 2, 3, 2]
    assert len(ngram_hashes(word_hashes('a b'), 3)) == 0


def test_signatures_follow_the_seed():
    sets = shingle_sets(['one two three four five six seven'])
    assert np.array_equal(signatures(sets, seed=5), signatures(sets, seed=5))
    assert not np.array_equal(signatures(sets, seed=5), signatures(sets, seed=6))


def test_same_result_whatever_the_hash_seed_of_python():
    code = ("import random; from phi4_ref.data.dedup import *; r = random.Random(0);"
            "t = [' '.join(str(r.randrange(50)) for _ in range(30)) for _ in range(40)]; t += [x + ' end' for x in t];"
            "print(near_duplicates(t), word_hashes('a b').tolist())")
    runs = {subprocess.run([sys.executable, '-c', code], env={'PYTHONHASHSEED': h, 'PATH': ''}, capture_output=True, text=True, check=True).stdout
            for h in ('1', '2')}
    assert len(runs) == 1


def test_many_copies_and_many_look_alikes_cost_linearly(monkeypatch):
    import phi4_ref.data.dedup as dedup
    compared = []
    original = dedup._copy_of
    monkeypatch.setattr(dedup, '_copy_of', lambda i, candidates, *rest: (compared.append(len(candidates)), original(i, candidates, *rest))[1])
    rng = random.Random(4)
    page = text(rng, 90)
    near_duplicates([page] * 2000)
    assert sum(compared) < 2000 * 2
    compared.clear()
    monkeypatch.setattr(dedup, '_BUCKET', 5)
    near_duplicates([text(random.Random(0), 120) + ' ' + text(rng, 25) for _ in range(1000)])
    assert 20 < max(compared) <= 5 * (128 // band_rows(0.8, 128))


def test_operators_and_cjk_characters_are_words():
    assert words('If a<b, "f(x_1)" = -2.5 \u2264 y!') == ['if', 'a', '<', 'b', 'f', 'x_1', '=', '-', '2', '5', '\u2264', 'y', '!']
    assert words('go\u5e73\u65b9 ok') == ['go', '\u5e73', '\u65b9', 'ok']


def test_bands_find_what_they_must():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        rows = band_rows(threshold, 128)
        assert 1 - (1 - threshold ** rows) ** (128 // rows) >= 0.98
        assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.98


@pytest.mark.parametrize('bad', [dict(threshold=0), dict(threshold=1.5), dict(width=0), dict(num_perm=0)])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError): near_duplicates(['a'], **bad)
