"The paper's tables: internally consistent, read-only, and silent where the paper is."
import copy, pickle
from pathlib import Path

import pytest

from phi4_ref import paper
from phi4_ref.paper import Table, cite, read_table

TABLES = {name: value for name, value in vars(paper).items() if isinstance(value, Table)}


def test_every_table_and_figure_is_there():
    wanted = {f'TABLE_{n}' for n in range(1, 10)} | {'FIGURE_2', 'FIGURE_3', 'FIGURE_6', 'MODEL', 'SPECIAL_TOKENS', 'PRETRAINING', 'MIDTRAINING',
              'SFT', 'DPO', 'PTS', 'REFUSAL', 'JUDGE', 'AMC', 'DECONTAMINATION', 'CURATION', 'SYNTHETIC', 'EVALUATION'}
    assert wanted <= set(TABLES)
    assert all(t.section and len(t) for t in TABLES.values())


def test_parameter_count_follows_from_the_widths():
    c = paper.MODEL
    D, F = c['hidden_size'], c['intermediate_size']
    queries, keys = c['num_attention_heads'] * c['head_dim'], c['num_key_value_heads'] * c['head_dim']
    layer = D * (queries + 2 * keys) + queries * D + 3 * D * F + 2 * D
    assert 2 * c['vocab_size'] * D + c['num_hidden_layers'] * layer + D == c['parameters'] == 14_659_507_200


def test_table_5_epochs_follow_at_10T_and_not_at_9_8T():
    def epochs(budget): return {s: round(r['fraction'] * budget / r['unique_tokens'], 1) for s, r in paper.TABLE_5.items()}
    printed = {s: r['epochs'] for s, r in paper.TABLE_5.items()}
    assert epochs(paper.PRETRAINING['tokens']) == printed
    assert epochs(9.8e12) != printed
    assert sum(r['fraction'] for r in paper.TABLE_5.values()) == pytest.approx(1)


def test_tables_agree_with_each_other():
    assert all(paper.TABLE_1[name]['phi-4'] == row['stages 1+2'] for name, row in paper.TABLE_9.items())
    for column in paper.FIGURE_6['correct']:
        assert sum(row[column] for row in paper.FIGURE_6.values()) == pytest.approx(100, abs=0.15)
    for name, row in paper.TABLE_4.items():
        values = [v for k, v in row.items() if k != 'average']
        assert len(values) == 8 and abs(sum(values) / 8 - row['average']) < 0.051, name
    simpleqa = {'SFT': 'SFT', 'DPO stage 1': 'stage 1', 'final': 'stages 1+2'}
    assert all(paper.FIGURE_6['correct'][a] == paper.TABLE_9['SimpleQA'][b] for a, b in simpleqa.items())
    assert sum(paper.TABLE_8.values()) == pytest.approx(paper.DPO['judge_pairs'], rel=0.02)


def test_single_values():
    assert paper.TABLE_9['MATH']['stage 1'] == 80.5
    assert paper.TABLE_6['16K']['Re-rank'] == 54.4
    assert paper.TABLE_7['math'] == 76_552
    assert paper.SPECIAL_TOKENS['<|im_end|>'] == 100_265
    assert (paper.DECONTAMINATION['ngram'], paper.DECONTAMINATION['overlap_ngram']) == (13, 7)
    assert (paper.PTS['p_min'], paper.PTS['p_max'], paper.FIGURE_3['boxed_change']) == (0.2, 0.8, 0.2)
    assert cite(paper.TABLE_9, 'MATH', 'stage 1') == '80.5 (phi-4 Table 9)'
    assert cite(paper.PRETRAINING, 'tokens') == '10T (phi-4 §3)'


@pytest.mark.parametrize('name', sorted(TABLES))
def test_what_the_paper_leaves_open_is_not_answered(name):
    table = TABLES[name]
    for key in table.silent:
        with pytest.raises(KeyError, match='does not state'): table[key]
        assert key not in table
    with pytest.raises(KeyError, match='it has: '): table['no such row']


def test_read_only():
    with pytest.raises(TypeError): paper.TABLE_9['MATH'] = {}
    with pytest.raises(TypeError): paper.TABLE_9['MATH']['stage 1'] = 100
    assert pickle.loads(pickle.dumps(paper.TABLE_9)) == paper.TABLE_9 == copy.deepcopy(paper.TABLE_9)


def test_read_table_refuses_a_row_with_a_number_missing():
    with pytest.raises(ValueError): read_table('phi-4 §99', 'a, b', 'row 1 2\nshort 1')
