"The success oracle: exact, last answer wins, completion only, and unharmed by hostile text."
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_ref.post.oracle import (answer_oracle, choice_index, contains_answer, final_answer, grade, is_refusal, last_boxed,
                                  numeric_answer, parse_number, passes_tests)


def problem(answer): return dict(id='p', kind='problem', question='?', answer=answer, meta={})


@given(st.fractions(max_denominator=10**6), st.sampled_from(['{}', r'\boxed{{{}}}', 'So the answer is {}.', 'we had 99 before.\n#### {}']))
def test_fractions_survive_every_dress(value, dress):
    assert numeric_answer('12 and 7, ' + dress.format(value)) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-10**9, max_value=10**9, places=3))
def test_decimals_are_exact_with_and_without_commas(value):
    assert parse_number(f'{value}') == Fraction(value) == parse_number(f'{value:,}')


@settings(max_examples=300)
@given(st.text(alphabet='0123456789.,/\\{}boxedfrac e-+$= answeri', max_size=60))
def test_no_text_makes_it_raise(text):
    answer_oracle(problem('3'), text); choice_index(text, ['a', 'b']); is_refusal(text); contains_answer(text, text)


def test_the_last_answer_wins_and_cut_off_boxes_state_nothing():
    assert final_answer(r'\boxed{1} then \boxed{2}') == '2'
    assert final_answer('The answer is 1. No, the answer is 2. ok') == '2'
    assert last_boxed(r'\boxed{2}, finally \boxed{34') == '2'
    assert numeric_answer(r'I boxed it: \boxed{\frac{1}{3}}') == Fraction(1, 3)


@pytest.mark.parametrize('text', ['1e' + '9' * 50, '9' * 10**5, '1/' + '0' * 60, '{' * 10**4, r'\boxed{' * 2000])
def test_hostile_numbers_are_no_numbers(text):
    assert numeric_answer('The answer is ' + text) is None


def test_kinds():
    assert answer_oracle(problem('1,000'), 'The answer is $1000.00.') and not answer_oracle(problem('1000'), 'The answer is 1001.')
    assert not answer_oracle(problem('4'), '')
    mcq = dict(kind='mcq', answer='Oslo', meta=dict(choices=['Rome', 'Oslo'], label=1))
    assert [answer_oracle(mcq, t) for t in ('B', '(B)', 'The answer is Oslo.', 'A', 'C', 'Be careful')] == [True] * 3 + [False] * 3
    fact = dict(kind='fact', answer='Marie Curie', meta={})
    assert answer_oracle(fact, 'It was marie  curie!') and not answer_oracle(fact, "I don't know.")
    assert answer_oracle(dict(kind='unknown', answer='', meta={}), "Sorry, I don't know.")


CODE = dict(kind='code', answer='', meta=dict(entry_point='inc', prompt='def inc(x):\n', tests='assert inc(1) == 2'))


@pytest.mark.parametrize('completion,right', [
    ('    return x + 1\n\nprint(inc(3))', True), ('Sure:\n```python\ndef inc(x):\n    return x + 1\n```\nDone.', True),
    ('    return x', False), ('    import os; os._exit(0)', False), ('```python\nraise SystemExit(0)\n```', False),
    ('```python\ndef inc(x): return 2\nprint("0" * 16)\nexit()\n```', False), ('    while True: pass', False), ('not python', False)])
def test_code_passes_only_by_passing(completion, right):
    assert passes_tests(CODE, completion, timeout_s=2.) is right


def test_an_oracle_that_raises_costs_one_rollout():
    def oracle(question, text):
        if text == 'bad': raise KeyError(text)
        return True
    assert grade(oracle, [{}] * 3, ['a', 'bad', 'c']) == ([True, False, True], 1)


def test_gsm8k_solutions():
    if not os.environ.get('PHI4_REF_DATA'): pytest.skip('PHI4_REF_DATA is unset: no GSM8K')
    rows = [json.loads(line) for line in (Path(os.environ['PHI4_REF_DATA'])/'gsm8k/test.jsonl').open()]
    keys = [problem(r['answer'].split('####')[1]) for r in rows]
    assert all(answer_oracle(k, r['answer']) for k, r in zip(keys, rows))
    assert not any(answer_oracle(k, r['answer'] + '1') for k, r in zip(keys, rows))
