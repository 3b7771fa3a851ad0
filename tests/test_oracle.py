"The success oracle: exact, last answer wins, completion only, unharmed by hostile text; and grading unharmed by the oracle."
import csv
import gzip
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi4_ref.post import oracle as o
from phi4_ref.post.oracle import (answer_many, answer_oracle, choice_index, contains_answer, final_answer, grade, hash_answer, is_expression, is_refusal, isolated,
                                  last_boxed, numeric_answer, parse_number, passes_tests, quick_equal, reply_answer, same_answer, same_number)

TOWER = r'5^{5^{5^{5^5}}}'  # an integer that fits no machine


def problem(answer): return dict(id='p', kind='problem', question='?', answer=answer, meta={})
def mcq(choices, label): return dict(id='m', kind='mcq', question='?', answer='', meta=dict(choices=choices, label=label))


# -- where the answer stands

@settings(deadline=None)
@given(st.fractions(max_denominator=10**6), st.sampled_from(['{}', r'\boxed{{{}}}', 'So the answer is {}.', 'we had 99 before.\n#### {}', '**The answer is {}**', 'The answer is **{}**.']))
def test_fractions_survive_every_dress(value, dress):
    assert numeric_answer('12 and 7, ' + dress.format(value)) == value


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-10**9, max_value=10**9, places=3))
def test_decimals_are_exact_with_and_without_commas(value):
    assert parse_number(f'{value}') == Fraction(value) == parse_number(f'{value:,}')


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='0123456789.,/\\{}boxedfrac e-+$= answeri#^_%()ABC*\n', max_size=60))
def test_no_text_makes_it_raise(text):
    o.quick_verdict(problem('3'), text); o.quick_verdict(problem('x + 1'), text); o.quick_verdict(mcq(['a', 'b'], 1), text); is_refusal(text); contains_answer(text, text)
    o.key_answer(text); o.as_tex(text)


def test_the_last_answer_wins_and_cut_off_boxes_state_nothing():
    assert final_answer(r'\boxed{1} then \boxed{2}') == '2'
    assert final_answer('The answer is 1. No, the answer is 2. ok') == '2'
    assert last_boxed(r'\boxed{2}, finally \boxed{34') == '2'
    assert numeric_answer(r'I boxed it: \boxed{\frac{1}{3}}') == Fraction(1, 3)
    assert last_boxed(r'\boxed{\text{a \boxed{b} c}}') == 'b' and last_boxed(r'\boxed{\left\{ \frac{1}{2} \right\}}') == r'\left\{ \frac{1}{2} \right\}'
    assert last_boxed(r'\boxed{1} {{ } \boxed{2}') == '2' and last_boxed(r'} } \boxed{3} {') == '3'


def test_the_order_of_the_conventions():
    text = 'It is 9.\nThe answer is 1.\n#### 2\n'
    assert final_answer(text) == '2' and final_answer(text + r'\boxed{3}') == '3' and final_answer(r'\boxed{3}' + text) == '3' and final_answer('The answer is 1, or 9') == '1, or 9'
    assert [hash_answer(t) for t in ('#### 1. First', '#### Step 2', '##### 5', '#### 1,000.50', '####7', '#### $\\pi$', '#### 5 %')] == [None, None, None, '1,000.50', '7', '$\\pi$', '5 %']
    assert answer_oracle(problem('7'), '#### Step 1\n3 + 4 = 7\n#### 2. Check\nGood. The answer is 7.')


@pytest.mark.parametrize('text', ['1e' + '9' * 50, '9' * 10**5, '1/' + '0' * 60, '{' * 10**4, r'\boxed{' * 2000])
def test_hostile_numbers_are_no_numbers(text):
    assert numeric_answer('The answer is ' + text) is parse_number('1e99999 apples, 18') is None and not answer_oracle(problem('1'), r'\boxed{' + text + '}')


# -- numbers

def in_words(key, text):
    "How a problem's plain key is compared with a reply in words: with the one number of its last stated answer, of an equation its last side that is one number; else with the last number."
    stated = [re.split(r'\.(?=\s|$)|\n', part)[0].strip() for part in re.split(r'\b[Aa]nswer is\b:?', text)[1:]]
    number = r'(?<![\w.])-?\d+(?:\.\d+)?(?![\d]|\.\d|[eE]\d)'
    if not stated or not stated[-1]: return (re.findall(number, text) or [''])[-1:] != [''] and Fraction(re.findall(number, text)[-1]) == Fraction(key)
    value, sides = None, [side.split() for side in stated[-1].split('=')]
    for i, side in enumerate(sides):
        if 0 < i < len(sides) - 1 and '8,' in side: return False  # one statement ends there and another begins
        at = [j for j, token in enumerate(side) if re.search(r'\d', token)]
        signed = len(at) == 1 and at[0] and side[at[0]][0].isdigit() and side[at[0] - 1] == '-' and not set(side[:at[0] - 1]) - {'!', '+'}
        if len(at) == 1 and not (side[at[0] + 1:at[0] + 2] == ['+'] and side[at[0]][-1].isdigit()): value = Fraction(side[at[0]].strip('(),')) * (-1 if signed else 1)
        joined = all({'+', '-'} & set(side[j + 1:k]) or side[k][0] in '(-' for j, k in zip(at, at[1:]))
        if len(at) > 1 and (len(sides) == 1 or not joined and not re.search('[A-Za-z]', ''.join(side[:at[0]]))): return False
    return value is not None and value == Fraction(key)


WORDS = st.lists(st.sampled_from(['Ella', 'paid', 'has', '3', '12', '-4', '7.5', '+', '-', '=', 'coins.', 'coins', '7.', '12.', 'a', 'I', '\n', 'so', '5', '(3)', '8,', '!']), max_size=7)


@settings(max_examples=500, deadline=None)
@example(5, [], 'The answer is', ['3', '=', '5'])
@example(3, [], 'The answer is', ['3', '=', '5', '+', '-4'])
@example(3, [], 'The answer is', ['3', '=', '5', 'coins'])
@example(-4, [], 'The answer is', ['a', '-4'])
@example(3, [], 'The answer is', ['3', '-', 'a'])
@example(-3, [], 'The answer is', ['-', '3'])
@example(7, ['3', '+', '5'], 'The answer is', ['7', '-', '5'])
@given(st.sampled_from([3, 12, -4, 7, 5, 8, -3]), WORDS, st.sampled_from(['The answer is', 'the answer is:', '']), WORDS)
def test_a_sentence_is_the_one_number_it_states(key, before, states, after):
    text = ' '.join([*before, states, *after])
    assert answer_oracle(problem(str(key)), text) is in_words(str(key), text), reply_answer(text)


STATES = ['The answer is {}.', 'The answer is: {}\nThat took 3 steps.', 'Hence **the answer is {}**', '**Final answer:** {}. That took 3 steps.']
PLACES = [*STATES, r'So \boxed{{{}}} in 3 steps.', r'\boxed{{\text{{{}}}}}']
TWO = ['{a} or {b}', 'either {a} or {b}', 'not {a} but {b}', 'between {a} and {b}', '{a} to {b}', '{a} and {b}', '{a}, {b}', '{a}, maybe {b}', '{a}, I mean {b}', '{a} minus {b}', '{a} times {b}', '{a} dollars and {b} cents', '{a} apples and {b} pears', '{a} apples in {b} days',
       '{a} out of {b}', '{a} (or {b})', r'{a} \text{{ or }} {b}', 'x = {a} or x = {b}', 'x = {a}, y = {b}', 'x = {a} and y = {b} = z', '{a}, or perhaps {b} = x', r'{a} \pm {b}', '{a}; {b}', 'neither {a} nor {b}', '{a} for Tom, {b} for Ann', 'one of {a} and {b}', '{a} feet {b} inches']
RANGES = ['{a}-{b}', '{a} - {b}', '{a}\u2013{b}', '{a} x {b}', '{a} : {b}', '{a} + {b}']  # which a box may hold as arithmetic
BOUNDS = ['more than {a}', 'no more than {a}', 'less than {a}', 'fewer than about {a}', 'at least {a}', 'at most {a} coins', 'up to {a}', 'over {a}', 'under ${a}', 'almost {a}', '> {a}', 'x >= {a}', 'x \u2264 {a}', '{a} < x', '{a} or more', '{a} or so', '{a} and more', '{a}+', '{a} plus tax',
          'not {a}', 'not equal to {a}', "isn't exactly {a}", '{a} is not right', 'cannot be {a}', 'x != {a}', 'half of {a}', 'twice {a}', 'the square root of {a}', '{a} squared', '{a} tenths', '{a} hundredths', '{a} and a half', '{a} and three quarters', '{a} 1/2', '{a} hundred', '{a} thousand', '{a} million dollars',
          '{a}x', 'x + {a}', '{a} divided by x', 'minus {a}', 'negative {a}', '- {a}', '\u2013{a}', '\u2212{a}', '-{a}', '{a}.5', '{a}0', '0.{a}', '{a} 000', '{a}/7', r'-\frac{{{a}}}{{1}}', '17 = {a} + 1', 'not 9 * 2 = {a}', 'more than 9 * 2 = {a}']
SAME = ['{a}', '${a}', '{a} dollars', '{a} apples', '${a}.00', '**{a}** apples', '{a} = 9*2', '9 * 2 = {a} apples', 'x = {a}', '{a} = x', 'about {a}', 'a total of {a}', '{a} (9 + 9) of them', '{a}, because 9 * 2 = 18', '{a} since 20 - 2 = 18', '{a}, which is 9 + 9', '{a}, not 19', '{a} rather than 19',
        '{a} more apples', '{a} more than Ann', '{a} fewer', '{a} people who did not vote', 'the difference between the two, {a}', '{a} per day', '{a} m2', '{a} km/h', '{a} years old', '{a}%', '{a} percent', '<b>{a}</b>', '<<9+9={a}>>{a}', '9 + 9 => {a}', 'in 2 days they eat 9 + 9 = {a}', '{a} quarters', '{a} months', '{a} times', '`{a}`', '"{a}"',
        '\u20ac{a}', '{a} USD', '${a}$', r'\({a}\) apples', r'{a}\text{{ cm}}', r'{a}^\circ', r'\frac{{{a}}}{{1}}', '{a}!', '{a} (eighteen)', '+{a}', '{a} 0/5']
WHOLE = st.integers(10, 99_999).filter(lambda n: n % 10)


@settings(max_examples=300, deadline=None)
@given(WHOLE, WHOLE, st.sampled_from(TWO), st.sampled_from(PLACES))
def test_two_numbers_are_no_answer(a, b, hedge, place):
    text = place.format(hedge.format(a=a, b=b))
    assert a == b or not answer_oracle(problem(str(a)), text) and not answer_oracle(problem(str(b)), text), text


@settings(max_examples=60, deadline=None)
@given(WHOLE, WHOLE, st.sampled_from(RANGES), st.sampled_from(STATES))
def test_a_range_in_words_is_no_answer(a, b, hedge, place):
    text = place.format(hedge.format(a=a, b=b))
    assert not answer_oracle(problem(str(a)), text) and not answer_oracle(problem(str(b)), text), text


@settings(max_examples=60, deadline=None)
@given(WHOLE)
def test_a_bound_or_another_quantity_is_not_its_number(a):
    accepted = [t for bound in BOUNDS for place in PLACES if answer_oracle(problem(str(a)), t := place.format(bound.format(a=a)))]
    assert not accepted


@settings(max_examples=60, deadline=None)
@given(WHOLE)
def test_what_real_replies_say_around_a_number_leaves_it(a):
    texts = [place.format(form.format(a=a)) for form in SAME for place in STATES]
    assert not [t for t in texts if not answer_oracle(problem(str(a)), t)]
    assert not [t for t in texts if any(answer_oracle(problem(str(n)), t) for n in (a + 1, a * 10, -a))]


@settings(max_examples=60, deadline=None)
@given(WHOLE)
def test_words_of_quantity_are_read(a):
    for key, form in ((100 * a, '{} hundred'), (1000 * a, '{} thousand coins'), (10**6 * a, '${} million'), (10**5 * a, '{} hundred thousand'), (f'{a}.5', '{} and a half'), (f'{a}.25', '{} and 1/4'), (-a, 'minus {}'), (-a, 'negative {}'), (-a, '- {}'), (-a, '\u2013{}')):
        for place in PLACES: assert answer_oracle(problem(str(key)), place.format(form.format(a))), (key, form, place)
    assert answer_oracle(problem(str(-a)), rf'\boxed{{-\frac{{{a}}}{{1}}}}') and not answer_oracle(problem(str(a)), rf'\boxed{{-\frac{{{a}}}{{1}}}}')


@pytest.mark.parametrize('text, stated', [
    ('Final answer: 18. That took 3 steps.', '18'), ('**Final Answer**: 18 apples\nDone in 3.', '18 apples'), ('Answer: 18. That took 3 steps.', '18'), ('**Answer:** $x^2$. Done', '** $x^2$'), ('Answer: 18 or 19. Hm', '18 or 19'), ('The answer is 3.\nFinal answer: 4', '4'),
    ('Answer: She has 18. She eats 3, so 15', None), ('Answer: 9 + 9 = 18. Less 3 is 15', None), ('Question: 2 + 2? Answer: Let us see', None), ('the answers: 3', None), ('Answer: 4' + ' more' * 50 + ' 5', None)])
def test_answers_after_a_colon(text, stated): assert o.stated_answer(text) == stated


DRESSES = ['{}', '${}', '{} apples', 'x = {}', '{}.', '**{}**', '${}$', r'\({}\)', r'{}\text{{ cm}}^2', '{} km/h', r'\text{{{}}}', '{}.00', r'\$ {}', 'it is {}', '{}m']


@settings(deadline=None)
@given(st.integers(-10**7, 10**7), st.sampled_from(DRESSES), st.sampled_from(DRESSES), st.booleans())
def test_a_dressed_number_equals_itself_and_no_other(n, one, two, commas):
    shown = f'{n:,}' if commas else str(n)
    assert quick_equal(one.format(shown), two.format(n)) is True and answer_oracle(problem(str(n)), rf'We get \boxed{{{two.format(shown)}}}')
    assert quick_equal(one.format(shown), two.format(n + 1)) is False and quick_equal(one.format(n), two.format(-n - 1)) is False


@settings(deadline=None)
@given(st.integers(-500, 500), st.integers(1, 60), st.integers(1, 9))
def test_one_fraction_in_many_notations(a, b, k):
    forms = [f'{a}/{b}', rf'\frac{{{a}}}{{{b}}}', rf'\dfrac{{{a * k}}}{{{b * k}}}', f'{a * k} / {b * k}']
    if a >= 0: forms += [f'{a // b} {a % b}/{b}', rf'{a // b}\frac{{{a % b}}}{{{b}}}']
    assert {quick_equal(p, q) for p in forms for q in forms} == {True}
    assert {quick_equal(p, f'{a * 7 + 1}/{b * 7}') for p in forms} == {False}


def test_per_cent():
    equal = [('1/2', '50%'), (r'\frac{1}{2}', r'50\%'), ('50', r'50\%'), ('50%', '0.5'), ('50 percent', '50%'), ('12.5%', '1/8')]
    assert all(same_answer(*p) for p in equal) and not any(same_answer(*p) for p in [('50', '0.5'), ('0.5', '50'), ('50%', '5%'), ('50%', '5'), ('50%', '5000'), ('0.5', '5%')])
    assert same_number('1/2', '0.5') and not same_number('1/3', '0.333333') and not same_number('a', 'a')


# -- more than numbers

EQUAL = [('x^2+2x+1', '(x+1)^2'), ('(x+1)**2', 'x^2+2*x+1'), ('x=5', '5'), ('5', 'x = 5.0'), (r'\frac12', '0.5'), (r'2.5\times 10^3', '2500'), ('x>2', '2<x'), (r'\frac{x+1}{2}', 'x/2+1/2'),
         ('sin(x)^2+cos(x)^2', '1'), ('2^{10}', '1024'), ('1/-2', '-0.5'), ('14', '2*(3+4)'), (r'\frac{1}{\sqrt2}', r'\frac{\sqrt{2}}{2}'), ('3628800', '10!'), (r'\log_2 8', '3'), ('1,2', '2, 1'), ('1,2', '(1,2)'), ('a + 1', '1 + a'), ('a + b', 'b + a'),
         (r'x \in [1,2)', '[1,2)'), ('\u221a2', r'\sqrt{2}'), ('sqrt(2)', r'\sqrt 2'), ('x\u00b2+1', 'x^2+1'), ('pi', r'\pi'), (r'2\pi', '2pi'), ('3x', '3 x'), (r'\pm 2', r'\{2,-2\}'), (r'3\pi', r'3\pi \text{ cm}^2'),
         ('y=2x+1', '2x+1'), ('f(x)=x+1', 'x+1'), (r'\text{Tuesday}', '**tuesday**.'), ('7', '3+4=7'), (r'\left(\frac{1}{2},3\right)', '(0.5, 3)'), ('2x+3y=5', '4x+6y=10'), ('12:30', '12:30'), ('A', 'a'),
         (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}'), (r'2\sqrt{3}', r'\sqrt{12}'), (r'\infty', 'infty'), ('90', r'90^\circ'), ('-1/2', r'-\frac{1}{2}'), ('-3', '- 3'), (r'3\pi', r'\text{Area} = 3\pi'), ('18 to 20', '18 to 20'), ('x=1, y=2', 'x = 1, y = 2'), ('x^2+2x+1', 'x^2+2x+1}')]
DIFFERENT = [(r'\{1,2\}', '(1,2)'), ('(1,2)', '(2,1)'), ('(1,2)', '2,1'), ('[1,2]', '(1,2)'), ('[1,2]', '[1,2)'), ('3', r'3\pi'), (r'3\pi', '3'), ('3', r'\boxed{3\sqrt{2}}'), (r'\sqrt{2}', '1.414214'), (r'\sqrt{2}', '2'),
             ('x>2', 'x<2'), ('x>2', r'x \ge 2'), ('x+1', 'y+1'), ('x^2', '2^x'), ('x^{2}', 'x^{3}'), ('cat', 'act'), ('east', 'seat'), ('3x + cat', '3x + act'), ('1', 'x+1'), ('x+1', '1'), ('y=2x+1', 'y=2x+2'), ('5', 'x+3=5'), ('x=5', 'y=5'),
             ('x=5', 'x=6'), ('12', '12_3'), ('10', '1010_2'), ('x-1', '1-x'), ('2-i', '2+i'), ('2', r'\pm 2'), ('3:4', '4:3'), ('12:30', '12:45'), ('3', '3x'), ('3x', '3'), ('a + 1', '1'), ('1', 'a + 1'), ('2.5', r'2.5 \times 10^3'), ('1', '(1,2)'),
             ('1', '1,2'), ('1,2', '1,2,3'), ('5', '5!'), ('1', '1 - 2'), ('3', '3 + 4'), ('x^2+2x+1', 'x^2+2x+2'), (r'\infty', r'-\infty'), ('2', '2/3'), ('2^3', '2'), ('8', '2^2'), ('0', 'no solution'), ('no solution', '0'),
             ('A', 'B'), ('A', ''), ('a', 'the'), ('2x+3y=5', '2x+3y=6'), ('1/2', r'-\frac{1}{2}'), (r'6\pi', r'2\pi \text{ or } 3'), (r'2\pi', r'\text{more than } 2\pi'), (r'2\pi', r'\text{not } 2\pi'), ('18 to 20', '18'), ('18 to 20', '18 to 21'), ('2', 'x=1, y=2'), ('x=1, y=2', '2'), ('5', TOWER + 'x')]


@pytest.mark.parametrize('key, answer', EQUAL)
def test_equivalent_answers(key, answer):
    assert same_answer(key, answer) is True and answer_oracle(problem(key), rf'First 1, then \boxed{{{answer.rstrip("}") if answer.count("{") < answer.count("}") else answer}}}')


@pytest.mark.parametrize('key, answer', DIFFERENT[:-1])
def test_near_misses(key, answer): assert same_answer(key, answer) is False


LINEAR = st.tuples(st.integers(-9, 9), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(LINEAR, LINEAR)
def test_products_equal_their_expansion_and_not_another(p, q):
    (a, b), (c, d) = p, q
    product = f'({b}x + {a})({d}x + {c})'.replace('+ -', '- ')
    def expanded(e): return f'{b * d}x^2 + {a * d + b * c}x + {a * c + e}'.replace('+ -', '- ')
    assert same_answer(product, expanded(0)) is True and same_answer(expanded(0), product) is True and same_answer(product, expanded(1)) is False


def test_keys_are_taken_whole_or_from_what_they_state():
    keys = {'18': '18', 'x + 1': 'x + 1', r'\frac{1}{2}': r'\frac{1}{2}', '16 - 3 - 4 = 9 eggs': '9', 'Twice.\n#### 6': '6', r'So \boxed{x^2}.': 'x^2', 'no solution': 'no solution', r'\sqrt{2}': r'\sqrt{2}', '12_{3}': '12_{3}'}
    assert {k: o.key_answer(k) for k in keys} == keys
    with pytest.raises(ValueError, match="'p' has no answer"): answer_oracle(problem(' '), '3')


# -- workers

def children(): return {int(p) for p in Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()}
def gone(pid): return not Path(f'/proc/{pid}').exists()
linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


@linux
def test_a_hanging_comparison_is_killed_and_its_worker_replaced(monkeypatch):
    monkeypatch.setattr(o, 'Worker', partial(o.Worker, limit_s=.5))
    o.stop_workers(); o.tex_equal.cache_clear()
    assert o.tex_equal('x+1', '1+x') is True
    first = o.IDLE[0].process
    assert o.tex_equal(TOWER, '5') is None and first.returncode == -signal.SIGPROF and gone(first.pid) and not o.IDLE
    with pytest.raises(TimeoutError, match=r'no verdict on .* against the key'): same_answer('5', TOWER)
    assert o.tex_equal('x+2', '2+x') is True and o.IDLE[0].process.pid != first.pid
    with pytest.warns(RuntimeWarning, match="'answer_oracle' failed on question 'p': no verdict"):
        counts = Counter()
        assert grade(answer_oracle, [problem('5')] * 3, [r'\boxed{5}', rf'\boxed{{{TOWER}}}', r'\boxed{x}'], counts=counts) == ([True, False, False], 1)
    assert counts == dict(oracle_hung=1)
    o.stop_workers()
    o.tex_equal.cache_clear()


@linux
def test_workers_leave_no_zombie_and_do_not_outlive_us():
    script = ("from phi4_ref.post import oracle as o\nfrom concurrent.futures import ThreadPoolExecutor\n"
              "print(list(ThreadPoolExecutor(2).map(o.tex_equal, ['x+1', 'x^2'], ['1+x', '2^x'])), [w.process.pid for w in o.IDLE], flush=True)\n")
    for ending in ('', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)'):
        out = subprocess.run([sys.executable, '-c', script + ending], capture_output=True, text=True, timeout=300).stdout
        verdicts, pids = json.loads(out.lower().replace('] [', ']|[').split('|')[0]), json.loads(out.replace('] [', ']|[').split('|')[1])
        assert verdicts == [True, False] and pids
        deadline = time.monotonic() + 60
        while not all(map(gone, pids)) and time.monotonic() < deadline: time.sleep(.05)
        assert all(map(gone, pids)), 'a worker outlives its parent'


@linux
def test_threads_and_forks_may_compare():
    o.tex_equal.cache_clear()
    keys = [f'(x+{i})^2' for i in range(8)]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(same_answer, keys, [f'x^2+{2 * i}x+{i * i}' for i in range(8)])) == [True] * 8
    assert 1 <= len(o.IDLE) <= 4
    reader, writer = os.pipe()
    if not (child := os.fork()):  # a fork takes workers of its own, and leaves ours alone
        try: os.write(writer, b'yes' if not o.IDLE and same_answer('(x+20)^2', 'x^2+40x+400') else b'no')
        finally: o.stop_workers(); os._exit(0)
    os.close(writer)
    assert os.read(reader, 9) == b'yes' and os.waitpid(child, 0)[1] == 0 and same_answer('(x+30)^2', 'x^2+60x+900')
    os.close(reader)


def test_a_dead_worker_is_replaced():
    o.stop_workers(); o.tex_equal.cache_clear()
    assert o.tex_equal('x+1', '1+x')
    o.IDLE[0].process.kill(); o.IDLE[0].process.wait()
    assert o.tex_equal('x+2', '2+x') is True


# -- letters

CHOICES = ['red', 'green', 'blue', 'dark green']


@pytest.mark.parametrize('reply, index', [
    ('B', 1), ('b', 1), ('(B)', 1), ('B.', 1), ('**B**', 1), ('B) green', 1), ('B: green, since', 1), (r'\boxed{B}', 1), (r'\boxed{\text{B}}', 1), (r'$\boxed{\mathrm{(B)}}$', 1), ('The answer is B.', 1), ('The answer is (B), not (A).', 1),
    ('Answer: B', 1), ('**Answer:** B', 1), ('The correct option is B because A is wrong.', 1), ('The correct choice is (B).', 1), ('Hm, (A) is tempting.\nThe answer is B.', 1), ('It is option B', 1), ('I would take (B).', 1), ('Some text (A)\n\nB', 1),
    ('A. Because it glows', 0), ('The answer is A', 0), ('A because it glows', 0), ('The answer is green.', 1), ('The answer is a green thing.', 1), ('Green', 1), ('The answer is dark green.', 3), ('D. dark green', 3), ('The answer is the colour blue.', 2),
    ('A dog', None), ('The answer is a dog.', None), ('A', 0), ('I think so', None), ('Be careful', None), ('CAB', None), ('A or B', None), ('A and B', None), ('A, B', None), ('A/B', None), ('(A) or (B)', None), ('The answer is A or B.', None),
    ('(A) is red and (B) is green', None), ('A) red\nB) green\nC) blue', None), ('A. red B. green C. blue', None), ('A. green', None), ('(A) green', None), ('(B) green', 1), ('(B): green', 1), ('[B]', 1), ('B. dark green', None), ('It is not (B).', None), ('B is wrong', None), ('(B) is wrong', None), ('(B) is correct', 1), ('A is the right one', 0), ('The answer is not red but blue.', None), ('E', None), ('Z.', None),
    ('', None), ('The answer is', None), ('Green is a colour, and so is blue', None), ('Both are fine', None), ('I. Kant', None), (r'\boxed{A, C}', None), (r'\boxed{AC}', None)])
def test_letters(reply, index): assert choice_index(reply, CHOICES) == index


def test_an_options_own_text_comes_first():
    options = ['I and II only', '-11', '11', '2 - e^-2', '2 + e^-2', 'S=1, R=0', 'Miranda v. Arizona', 'D.C. McClelland']
    for i, text in enumerate(options):
        for form in ('{}', 'The answer is {}.', r'\boxed{{{}}}', 'Answer: **{}**', f'{"ABCDEFGH"[i]}. {{}}', f'({"ABCDEFGH"[i]}) {{}}'):
            assert choice_index(form.format(text), options) == i, (form, text)
        assert choice_index(f'{"ABCDEFGH"[i - 1]}. {text}', options) is None
    assert choice_index('The answer is same.', ['same', 'same', 'other']) is None and choice_index('7', ['5', '7']) == 1


def test_the_options_of_mmlu():
    if not os.environ.get('PHI4_REF_DATA'): pytest.skip('PHI4_REF_DATA is unset: no MMLU')
    rows = []
    with tarfile.open(Path(os.environ['PHI4_REF_DATA'])/'mmlu/mmlu_csv.tar.xz') as archive:
        for member in archive:
            if '/dev/' in member.name and member.isfile(): rows += csv.reader(io.TextIOWrapper(archive.extractfile(member), 'utf-8'))
    assert len(rows) == 285
    for form in ('{0}', '({0})', 'The answer is ({0}).', '{0}. {1}', '{0}) {1}', 'It may be (A), but no.\n**Answer: {0}) {1}**', 'The answer is {1}.'):
        wrong = [row for row in rows for i in range(4) if choice_index(form.format('ABCD'[i], row[1 + i]), row[1:5]) != i and row[1:5].count(row[1 + i]) == 1]
        assert len(wrong) <= 2, (form, wrong)
        assert '{1}' in form or not wrong


@settings(deadline=None)
@given(st.text(alphabet='ABCD abcd.,()\n', max_size=25), st.integers(0, 3))
def test_a_stated_letter_wins_over_what_went_before(before, i):
    assert choice_index(f'{before}\nThe answer is ({"ABCD"[i]}).', CHOICES) == i


@settings(deadline=None)
@given(st.sampled_from('ABCD'), st.sampled_from('ABCD'), st.sampled_from([' or ', ' and ', ', ', '/', ' & ']), st.sampled_from(['{}', '({})', 'The answer is {}.', r'\boxed{{{}}}']))
def test_two_letters_are_no_answer(one, two, between, dress):
    assert one == two or choice_index(dress.format(one + between + two), CHOICES) is None


def test_the_key_of_a_choice():
    row = dict(id='m', kind='mcq', question='?', answer='(B)', meta=dict(choices=CHOICES))
    assert answer_oracle(row, 'B') and answer_oracle({**row, 'answer': 'green'}, 'B') and not answer_oracle(row, 'A') and not answer_oracle(row, '')
    with pytest.raises(ValueError, match="'m'.*'purple' is none of"): answer_oracle({**row, 'answer': 'purple'}, 'B')
    with pytest.raises(ValueError, match='no list `choices`'): answer_oracle({**row, 'meta': {}}, 'B')


@pytest.mark.parametrize('change, says', [
    (dict(answer=''), "'q7' has no answer"), (dict(answer=None), "'q7'.* answer is None, not text"), (dict(question=['a']), "'q7'.* question is .'a'., not text"),
    (dict(kind='fact', answer=' '), "'q7' has no answer"), (dict(kind='mcq'), "'q7'.*no list `choices`"), (dict(kind='mcq', meta=dict(choices=CHOICES, label=9)), "'q7'.*label 9"),
    (dict(kind='mcq', meta=dict(choices=CHOICES, label='B')), "'q7'.*label 'B'"), (dict(kind='code'), "'q7'.*no text `tests`"), (dict(meta='{}'), "'q7'.*meta is '{}', not a dict")])
def test_a_question_that_no_reply_could_answer_is_named(change, says):
    row = dict(id='q7', kind='problem', question='1 + 1?', answer='2', meta={})
    for good in (row, row | dict(kind='unknown', answer=''), row | dict(kind='mcq', meta=dict(choices=CHOICES, label=0)), row | dict(kind='code', answer='', meta=dict(tests='assert True'))): o.check_question(good)
    with pytest.raises(ValueError, match=says): o.check_question(row | change)
    with pytest.raises(ValueError, match="None lacks id, answer"): o.check_question({k: row[k] for k in ('kind', 'question', 'meta')})


def test_kinds():
    assert answer_oracle(problem('1,000'), 'The answer is $1000.00.') and not answer_oracle(problem('1000'), 'The answer is 1001.')
    assert not answer_oracle(problem('4'), '')
    oslo = dict(kind='mcq', answer='Oslo', meta=dict(choices=['Rome', 'Oslo'], label=1))
    assert [answer_oracle(oslo, t) for t in ('B', '(B)', 'The answer is Oslo.', 'A', 'C', 'Be careful')] == [True] * 3 + [False] * 3
    fact = dict(kind='fact', answer='Marie Curie', meta={})
    assert answer_oracle(fact, 'It was marie  curie!') and not answer_oracle(fact, "I don't know.")
    assert answer_oracle(dict(kind='unknown', answer='', meta={}), "Sorry, I don't know.")


# -- code

CODE = dict(kind='code', answer='', meta=dict(entry_point='inc', prompt='def inc(x):\n', tests='assert inc(1) == 2'))
PROGRAMS = [('    return x + 1\n\nprint(inc(3))', True), ('Sure:\n```python\ndef inc(x):\n    return x + 1\n```\nDone.', True),
            ('    return x', False), ('    import os; os._exit(0)', False), ('```python\nraise SystemExit(0)\n```', False),
            ('```python\ndef inc(x): return 2\nprint("0" * 16)\nexit()\n```', False), ('    while True: pass', False), ('not python', False)]


@pytest.mark.parametrize('completion,right', PROGRAMS)
def test_code_passes_only_by_passing(completion, right):
    assert passes_tests(CODE, completion, timeout_s=2.) is right


def test_many_answers_are_graded_in_order_and_equal_ones_once(monkeypatch):
    runs = []
    monkeypatch.setattr(o, 'run_python', lambda code, timeout_s: runs.append(code) or ORIGINAL(code, timeout_s=timeout_s))
    rows = [(CODE, c, r) for c, r in PROGRAMS[:3]] * 3 + [(problem('(x+1)^2'), r'\boxed{x^2+2x+1}', True), (problem('4'), 'It is 4', True), (mcq(CHOICES, 1), 'A', False)]
    questions, texts, right = map(list, zip(*rows))
    assert grade(answer_oracle, questions, texts) == (right, 0) and len(runs) == 3
    assert answer_many([problem('')], ['3'])[0].args[0].startswith("question 'p' has no answer") and answer_many([], []) == []
    with pytest.raises(ValueError): answer_many([CODE], [])


ORIGINAL = o.run_python


# -- oracles that fail

def hang_asleep(question, text): time.sleep(60)
def hang_busy(question, text):
    while True: pass
def hang_in_a_pattern(question, text): return bool(re.match('(a+)+$', 'a' * 60 + 'b'))
def hang_stubborn(question, text):
    while True:
        try: time.sleep(60)
        except Exception: pass


@pytest.mark.parametrize('hang', [hang_asleep, hang_busy, hang_in_a_pattern, hang_stubborn])
def test_an_oracle_that_hangs_costs_one_rollout(hang):
    def oracle(question, text): return hang(question, text) if text == 'bad' else True
    counts, handler = Counter(), signal.getsignal(signal.SIGALRM)
    with pytest.warns(RuntimeWarning, match=r"oracle .*oracle' failed on question 'q': no verdict within 0.2 s.*oracle_hung"):
        assert grade(oracle, [dict(id='q')] * 4, ['a', 'bad', 'c', 'bad'], timeout_s=.2, counts=counts) == ([True, False, True, False], 2)
    assert counts == dict(oracle_hung=2) and signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_oracle_that_hangs_in_a_thread_costs_one_rollout_too():
    stop = threading.Event()
    def oracle(question, text): return stop.wait(60) if text == 'bad' else True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert ThreadPoolExecutor(1).submit(grade, oracle, [{}] * 3, ['a', 'bad', 'c'], .2).result() == ([True, False, True], 1)
    stop.set()


def test_an_alarm_that_was_set_still_rings():
    rung, before = [], signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, .4)
        assert grade(lambda q, t: True, [{}] * 5, list('abcde')) == ([True] * 5, 0) and not rung
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= .4
        deadline = time.monotonic() + 20
        while not rung and time.monotonic() < deadline: time.sleep(.01)
        assert rung == [1]
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)


def test_an_oracle_that_raises_costs_one_rollout():
    def oracle(question, text):
        if text == 'bad': raise KeyError(text)
        if text == 'exit': raise SystemExit(3)
        return True
    with pytest.warns(RuntimeWarning, match=r"oracle .*costs_one_rollout.*oracle' failed on question None: KeyError: 'bad' \(oracle, line \d+\).*oracle_raised") as caught:
        assert grade(oracle, [{}] * 4, ['a', 'bad', 'c', 'exit']) == ([True, False, True, False], 2)
    assert len(caught) == 1  # the first of a kind is shown, the others counted


@pytest.mark.parametrize('value', [None, 'True', 'no', float('nan'), .7, 2, -1, [], [True], (), object(), np.array([True, False]), np.nan, b'1', Exception])
def test_nonsense_is_no_verdict(value):
    counts = Counter()
    with pytest.warns(RuntimeWarning, match="it returned .*, which is neither true nor false.*oracle_nonsense"):
        assert grade(lambda q, t: value if t == 'bad' else True, [{}] * 3, ['a', 'bad', 'c'], counts=counts) == ([True, False, True], 1)
    assert counts == dict(oracle_nonsense=1)


@pytest.mark.parametrize('yes, no', [(True, False), (1, 0), (1., 0.), (np.True_, np.False_), (np.float32(1), np.float32(0)), (Fraction(1), Fraction(0))])
def test_what_counts_as_yes_and_no(yes, no):
    results, errors = grade(lambda q, t: yes if t else no, [{}] * 2, ['a', ''])
    assert (results, errors) == ([True, False], 0) and all(type(r) is bool for r in results)


def test_each_kind_is_shown_once_for_a_counter_and_the_oracle_named():
    class Judge:
        def __call__(self, question, text): return {'r': 1 / 0} if text == 'r' else None
    counts = Counter(rollouts=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3): grade(partial(Judge()), [dict(id=4)] * 3, ['n', 'r', 'r'], counts=counts)
    assert counts == dict(rollouts=7, oracle_raised=6, oracle_nonsense=3) and len(caught) == 2 and all("Judge' failed on question 4" in str(w.message) for w in caught)
    assert caught[0].filename == __file__  # the warning points at the caller


def test_an_interrupt_is_no_failure_of_the_oracle():
    def oracle(question, text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): grade(oracle, [{}], ['a'])
    with pytest.raises(ValueError): grade(lambda q, t: True, [{}], [])


def test_the_oracle_sees_the_completion_and_its_question():
    seen = []
    assert grade(lambda q, t: seen.append((q['id'], t)) or True, [dict(id=1), dict(id=2)], ['a', 'b'])[1] == 0 and seen == [(1, 'a'), (2, 'b')]


class Batched:
    "An oracle with a batched form, which says yes to 'a'."
    def __init__(self, many): self.batched, self.asked = many, []
    def __call__(self, question, text):
        self.asked.append(text)
        if text == 'bad': raise KeyError(text)
        return text == 'a'
    def many(self, questions, texts): return self.batched(self, questions, texts)


def each(self, questions, texts): return [t == 'a' for t in texts]
def raises(self, questions, texts): return [self(q, t) for q, t in zip(questions, texts)]
def exits(self, questions, texts): raise SystemExit(1)
def hangs(self, questions, texts): time.sleep(60)
def breaks_off(self, questions, texts):
    yield True
    raise RuntimeError('the line is dead')


def test_a_batch_is_one_call():
    oracle = Batched(lambda self, questions, texts: np.array(each(self, questions, texts)))
    assert grade(oracle, [{}] * 3, ['a', 'b', 'a']) == ([True, False, True], 0) and not oracle.asked and grade(oracle, [], []) == ([], 0)
    taken = Batched(lambda self, questions, texts: [texts.pop(0) == 'a' for _ in list(texts)])
    assert grade(taken, [{}] * 3, texts := ['a', 'b', 'a']) == ([True, False, True], 0) and len(texts) == 3
    with pytest.raises(ValueError): grade(oracle, [{}], [])


@pytest.mark.parametrize('many', [raises, exits, hangs, breaks_off, lambda *_: None, lambda *_: 3])
def test_a_batch_that_fails_costs_only_the_rollouts_concerned(many):
    oracle, counts = Batched(many), Counter()
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2): assert grade(oracle, [dict(id='q')] * 4, ['a', 'bad', 'b', 'a'], timeout_s=.02, counts=counts) == ([True, False, False, True], 1)
    assert counts == dict(oracle_batch=2, oracle_raised=2) and oracle.asked[-4:] == ['a', 'bad', 'b', 'a']
    first, second = (str(w.message) for w in caught)
    assert "`many` of the oracle 'Batched' failed on 4 completions: " in first and 'one by one' in first and "'Batched' failed on question 'q': KeyError: 'bad'" in second and {w.filename for w in caught} == {__file__}


def test_a_batch_that_fails_in_a_thread_too():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for many in (raises, lambda *_: threading.Event().wait(2)): assert ThreadPoolExecutor(1).submit(grade, Batched(many), [{}] * 2, ['a', 'bad'], .02).result() == ([True, False], 1)


@pytest.mark.parametrize('many, kind, what', [(exits, 'raised', 'SystemExit: 1'), (hangs, 'hung', 'no verdict within'), (breaks_off, 'raised', 'the line is dead')])
def test_a_batch_that_fails_and_cannot_be_asked_again_costs_all_its_rollouts(many, kind, what):
    class Only: pass
    Only.many, counts = Batched(many).many, Counter()
    with pytest.warns(RuntimeWarning, match=f"'{Only.__qualname__}' failed on question 'q': .*{what}") as caught: assert grade(Only(), [dict(id='q')] * 3, ['a', 'b', 'a'], timeout_s=.02, counts=counts) == ([False] * 3, 3)
    assert counts == {f'oracle_{kind}': 3} and len(caught) == 1


@pytest.mark.parametrize('returned, says', [([], '0'), ([True], '1'), ((True, True), '2'), ([True] * 4, 'more than 3'), (itertools.repeat(True), 'more than 3'), ('', '0')])
def test_a_batch_that_miscounts_costs_all_its_rollouts(returned, says):
    oracle, counts = Batched(lambda *_: returned), Counter()
    with pytest.warns(RuntimeWarning, match=f"'Batched' failed on question 'q': its `many` returned {says} verdicts for 3 completions"): assert grade(oracle, [dict(id='q')] * 3, ['a', 'b', 'a'], counts=counts) == ([False] * 3, 3)
    assert counts == dict(oracle_nonsense=3) and not oracle.asked


def test_single_verdicts_of_a_batch_are_read_like_any():
    counts = Counter()
    with pytest.warns(RuntimeWarning) as caught: assert grade(Batched(lambda *_: [True, 'no', ValueError('x'), 0]), [{}] * 4, list('abcd'), counts=counts) == ([True, False, False, False], 2)
    assert counts == dict(oracle_nonsense=1, oracle_raised=1) and len(caught) == 2


def test_an_interrupt_ends_a_batch():
    def interrupt(*_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): grade(Batched(interrupt), [{}], ['a'])


@linux
def test_isolated_oracles_cannot_outlive_their_time():
    def oracle(question, text):
        if text == 'c code': return 10 ** 10 ** 10 > 0  # no signal handler of Python's runs in there
        if text == 'dies': os._exit(1)
        if text == 'raises': return {}[text]
        return None if text == 'nonsense' else text == 'right'
    before, counts = children(), Counter()
    with pytest.warns(RuntimeWarning, match="oracle' failed on question 'q'"):
        results = grade(isolated(oracle, .5), [dict(id='q')] * 6, ['right', 'c code', 'dies', 'raises', 'nonsense', 'wrong'], counts=counts)
    assert results == ([True, False, False, False, False, False], 4) and counts == dict(oracle_hung=1, oracle_raised=3) and children() <= before


# -- real data

def gsm8k():
    if not os.environ.get('PHI4_REF_DATA'): pytest.skip('PHI4_REF_DATA is unset: no GSM8K')
    folder = Path(os.environ['PHI4_REF_DATA'])/'gsm8k'
    solutions = [json.loads(line)['answer'] for line in [*(folder/'test.jsonl').open(), *gzip.open(folder/'train.jsonl.gz', 'rt')]]
    return [problem(s.split('####')[1]) for s in solutions], solutions


def test_gsm8k_solutions():
    keys, solutions = gsm8k()
    assert all(answer_oracle(k, s) for k, s in zip(keys, solutions))
    assert not any(answer_oracle(k, s + '1') for k, s in zip(keys, solutions))
    assert all(o.key_answer(k['answer']) == o.key_answer(s).strip() or same_number(k['answer'], o.key_answer(s)) for k, s in zip(keys, solutions))
    boxed = [rf'{s.split("####")[0]} So we get $\boxed{{{k["answer"].strip()}}}$ in 99 steps.' for k, s in zip(keys, solutions)]
    assert all(answer_oracle(k, t) for k, t in zip(keys, boxed))
    guessed = sum(answer_oracle(k, s.split('####')[0]) for k, s in zip(keys, solutions)) / len(keys)
    assert guessed > .97  # the last number of a solution that states no answer: 97.2% are right
