"Refusal data follows from what the model knows."
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


def test_sft_answers_what_is_usually_known_and_refuses_the_rest():
    known, texts, counts = data()
    rows = refusal.refusal_sft(known, texts)
    assert [r['meta']['kind'] for r in rows] == ['answer', 'bogus', 'refusal', 'bogus', 'refusal', 'bogus'] and counts['set_aside'] == 0
    assert rows[0]['messages'][1]['content'] == 'It is Oslo.' and all("don't know" in r['messages'][1]['content'] for r in rows[1:])
    assert rows[1]['messages'][0]['content'] == 'Capital of Nowhere?' and len({r['id'] for r in rows}) == 6


def test_dpo_has_both_rules_and_five_tokens():
    known, texts, _ = data()
    rows = refusal.refusal_dpo(known, texts, TOKENIZER)
    assert [(r['id'], r['meta']['kind']) for r in rows] == [('q0-answer', 'answer'), ('q1-answer', 'answer'), ('q1-refuse', 'refuse'), ('q2-refuse', 'refuse')]
    assert all(len(r[k]) <= 5 for r in rows for k in ('chosen_ids', 'rejected_ids'))
    assert 'Perhaps'.startswith(rows[3]['rejected'][:3]) and rows[3]['chosen'].startswith('I')


def test_opposite_pairs_do_not_both_stay():
    known, texts, _ = data()
    known[1]['answers'] = ['It is Oslo.', 'It is Rome.'] * 2; known[1]['grades'] = ['true', 'false'] * 2
    def begin_alike(cut): return [r['id'] for r in refusal.refusal_dpo(known, texts, TOKENIZER) if r['id'].startswith('q1')]
    ids = TOKENIZER.encode('It is Oslo.')
    assert begin_alike(5) == (['q1-refuse'] if ids[:5] == TOKENIZER.encode('It is Rome.')[:5] else ['q1-answer', 'q1-refuse'])
    rows = [dict(prompt_ids=[1], chosen_ids=a, rejected_ids=b, meta=dict(kind=k, p_right=.75)) for a, b, k in (([2], [3], 'answer'), ([3], [2], 'refuse'))]
    assert refusal.without_opposites(rows) == rows[:1]


def test_an_answer_without_the_key_is_replaced_and_a_refusal_that_answers_is_set_aside():
    _, texts, _ = data(**{'answer question': 'It is Rome.'})
    assert texts[0]['correct'] == 'The answer is Oslo.'
    known, texts, counts = data(refuse='It is Oslo.')
    assert texts == [None] * 3 and counts['set_aside'] == 3 and refusal.refusal_sft(known, texts) == refusal.refusal_dpo(known, texts, TOKENIZER) == []


def test_malformed_verdicts_count_as_uncertain():
    class Grader:
        name = 'grader'
        def chat(self, chats, **sampling): return ['maybe'] * len(chats)
    assert refusal.llm_grades(Grader())(QUESTIONS[:1], ['It is Oslo.']) == ['uncertain']
