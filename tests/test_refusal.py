"Refusal data follows from what the model knows."
import csv
import os
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref import paper
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.post import refusal

TOKENIZER = train_tokenizer(["It is Oslo. I don't know. Who wrote it?"] * 3, 320)
QUESTIONS = [dict(id=f'q{i}', question=f'Capital of land {i}?', answer='Oslo', kind='fact', meta={}) for i in range(3)]


class Student:
    "Right always about 0, half of the time about 1, never about 2."
    name = 'student'
    def chat(self, chats, **sampling):
        return ['It is Oslo.' if (i := int(c[-1]['content'].split()[-1][:-1])) == 0 or i == 1 and n % 2 else 'Perhaps Rome is it.' for n, c in enumerate(chats)]


class Writer:
    name = 'writer'
    def __init__(self, **replies): self.replies = {'answer question': 'It is Oslo.', 'refuse': "I don't know that.", 'make unanswerable': 'Capital of Nowhere?'} | replies
    def chat(self, chats, **sampling): return [self.replies[c[0]['content'].splitlines()[0].removeprefix('Task: ')] for c in chats]


def data(**replies):
    known = refusal.sample_knowledge(QUESTIONS, Student(), k=4)
    return known, *refusal.write_texts(QUESTIONS, Writer(**replies))


def test_what_is_known_is_measured():
    assert [r['p_right'] for r in data()[0]] == [1., .5, 0.]


def test_what_cannot_be_measured_is_named_before_a_model_is_asked():
    class Unasked:
        def chat(self, *_, **__): raise AssertionError('a model was asked')
    with pytest.raises(ValueError, match='k=0'): refusal.sample_knowledge(QUESTIONS, Unasked(), 0)
    for call in (lambda q: refusal.sample_knowledge(q, Unasked()), lambda q: refusal.write_texts(q, Unasked())):
        with pytest.raises(ValueError, match="question 'q1' has no answer"): call([QUESTIONS[0], QUESTIONS[1] | dict(answer='')])
        with pytest.raises(ValueError, match="2 questions have the id 'q0'"): call([QUESTIONS[0]] * 2)


def test_sft_answers_what_is_usually_known_and_refuses_the_rest():
    known, texts, counts = data()
    rows = refusal.refusal_sft(known, texts)
    assert [r['meta']['kind'] for r in rows] == ['answer', 'bogus', 'refusal', 'bogus', 'refusal', 'bogus'] and counts['set_aside'] == 0
    assert rows[0]['messages'][1]['content'] == 'It is Oslo.' and all("don't know" in r['messages'][1]['content'] for r in rows[1:])
    assert rows[1]['messages'][0]['content'] == 'Capital of Nowhere?' and len({r['id'] for r in rows}) == 6


def test_dpo_has_both_rules_and_five_tokens():
    known, texts, _ = data()
    rows, counts = refusal.refusal_dpo(known, texts, TOKENIZER)
    assert counts == dict(answer=2, refuse=2, same_cut=0, opposite=0) and refusal.FIRST_TOKENS == 5
    assert [(r['id'], r['meta']['kind']) for r in rows] == [('q0-answer', 'answer'), ('q1-answer', 'answer'), ('q1-refuse', 'refuse'), ('q2-refuse', 'refuse')]
    assert all(len(r[k]) <= 5 for r in rows for k in ('chosen_ids', 'rejected_ids'))
    assert 'Perhaps'.startswith(rows[3]['rejected'][:3]) and rows[3]['chosen'].startswith('I')


def test_opposite_pairs_do_not_both_stay():
    known, texts, _ = data()
    known[1]['answers'] = ['It is Oslo.', 'It is Rome.'] * 2; known[1]['grades'] = ['true', 'false'] * 2
    texts[1]['correct'] = known[1]['answers'][0] = 'The capital of land 1 is Oslo.'; known[1]['answers'][1] = 'The capital of land 1 is Rome.'
    for p_right, kept in ((.75, 'answer'), (.25, 'refuse')):
        known[1]['p_right'] = p_right
        rows, counts = refusal.refusal_dpo(known, texts, TOKENIZER)
        assert [r['meta']['kind'] for r in rows if r['id'].startswith('q1')] == [kept] and counts['opposite'] == 1
    rows = [dict(prompt_ids=[1], chosen_ids=a, rejected_ids=b, meta=dict(kind=k, p_right=.75)) for a, b, k in (([2], [3], 'answer'), ([3], [2], 'refuse'))]
    assert refusal.without_opposites(rows) == rows[:1]


def test_an_answer_without_the_key_is_replaced_and_a_refusal_that_answers_is_set_aside():
    _, texts, _ = data(**{'answer question': 'It is Rome.'})
    assert texts[0]['correct'] == 'The answer is Oslo.'
    known, texts, counts = data(refuse='It is Oslo.')
    assert texts == [None] * 3 and counts['set_aside'] == 3 and refusal.refusal_sft(known, texts) == refusal.refusal_dpo(known, texts, TOKENIZER)[0] == []
    assert data(**{'make unanswerable': 'capital of land 1'})[2]['set_aside'] == 1  # the question itself is no bogus variant of it


def test_replies_that_begin_alike_make_no_pair_and_are_counted():
    known, texts, _ = data()
    known[2]['answers'] = ["I don't know that. But Rome, I think."] * 4  # graded false: more than five tokens of the refusal come first
    rows, counts = refusal.refusal_dpo(known, texts, TOKENIZER)
    assert counts == dict(answer=2, refuse=1, same_cut=1, opposite=0) and not [r for r in rows if r['id'] == 'q2-refuse']


grades = st.lists(st.sampled_from(paper.REFUSAL['grades']), min_size=1, max_size=6)

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(grades, st.sampled_from(['It is Oslo.', 'Oslo.', "I don't know. Oslo?"]), st.sampled_from(['It is Rome.', 'Rome.', "I don't know. Rome?"])), min_size=1, max_size=4))
def test_rows_follow_the_rules(cases):
    known, texts = [], []
    for i, (grade, right, wrong) in enumerate(cases):
        words = dict(true=right, false=wrong, uncertain="I don't know.")
        known.append(dict(question=dict(id=f'q{i}', question=f'Who wrote {i}?'), answers=[words[g] for g in grade], grades=grade, p_right=grade.count('true') / len(grade)))
        texts.append(dict(correct=right, refusal="I don't know. Oslo, or Rome.", bogus=f'Who was {i}?', bogus_refusal="I don't know."))
    rows, counts = refusal.refusal_dpo(known, texts, TOKENIZER)
    wanted = sum(('true' in g) + ('false' in g) for g, *_ in cases)
    assert wanted == sum(counts.values()) and len(rows) == counts['answer'] + counts['refuse']
    refused = TOKENIZER.encode("I don't know. Oslo, or Rome.")[:5]
    said = {(tuple(r['prompt_ids']), tuple(r['chosen_ids']), tuple(r['rejected_ids'])) for r in rows}
    for r in rows:
        grade, right, wrong = cases[int(r['id'][1:].split('-')[0])]
        assert ('true' if r['meta']['kind'] == 'answer' else 'false') in grade and len(r['chosen_ids']) <= 5 >= len(r['rejected_ids']) and r['chosen_ids'] != r['rejected_ids']
        assert (r['rejected_ids'] if r['meta']['kind'] == 'answer' else r['chosen_ids']) == refused
        assert (tuple(r['prompt_ids']), tuple(r['rejected_ids']), tuple(r['chosen_ids'])) not in said
    kinds = {r['id']: r['meta']['kind'] for r in refusal.refusal_sft(known, texts)}
    assert kinds == {f"q{i}-{k}": k for i, (g, *_) in enumerate(cases) for k in ('answer' if g.count('true') > len(g) / 2 else 'refusal', 'bogus')}


SIMPLEQA = Path(os.environ.get('PHI4_REF_DATA', ''))/'simpleqa/simple_qa_test_set.csv'

@pytest.mark.skipif(not SIMPLEQA.is_file(), reason='needs SimpleQA: set PHI4_REF_DATA to the folder of real data')
def test_grades_on_simpleqa():
    "All 4,326 questions: the key in a sentence is right, another question's key is wrong unless it holds this one's, a refusal is a refusal whatever it names."
    with SIMPLEQA.open(encoding='utf-8') as file: rows = list(csv.DictReader(file))
    questions = [dict(id=str(i), question=r['problem'], answer=r['answer'], kind='fact', meta={}) for i, r in enumerate(rows)]
    other = [q['answer'] for q in questions[1:] + questions[:1]]
    right = refusal.exact_grades(questions, [f"I believe it was {q['answer']}." for q in questions])
    wrong = refusal.exact_grades(questions, [f'I believe it was {a}.' for a in other])
    refused = refusal.exact_grades(questions, [f"I'm sorry, I don't know: {q['question']}" for q in questions])
    assert len(questions) == 4326 and right.count('true') == 4326
    assert wrong.count('false') >= .99 * 4326 and refused.count('uncertain') >= .98 * 4326


def test_malformed_verdicts_count_as_uncertain():
    class Grader:
        name = 'grader'
        def chat(self, chats, **sampling): return ['maybe'] * len(chats)
    assert refusal.llm_grades(Grader())(QUESTIONS[:1], ['It is Oslo.']) == ['uncertain']
