"Preference losses against their definitions, and their batches against the loop's demands."
import copy
import json
import math

import pytest
import torch

from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post import dpo
from phi4_ref.train.loop import TrainSettings


def tiny(seed=0, vocab=64):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab, 48, 2, 4, 2, 96, 64))
    with torch.no_grad(): model.lm_head.weight *= 20
    return model


def pair(prompt, chosen, rejected): return dict(id=str(prompt), prompt='', chosen='', rejected='', prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, source='', meta={})


def some_pairs(n, seed=0, single=True, vocab=64):
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(vocab, (k,), generator=g).tolist()
    size = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    return [pair(draw(size(2, 20)), *([[2 * i % vocab], [2 * i + 1]] if single else [draw(size(1, 9)), draw(size(1, 9))])) for i in range(n)]


def rows(pairs, references=None):
    "One pair a row, as `PairBatches` hands them to the collators."
    return [[r | dict(reference=m)] for r, m in zip(pairs, references or [0.] * len(pairs))]


def gradient(model, loss, batch):
    model.zero_grad()
    loss(model, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_definition(model, pairs, references, beta):
    "DPO with one forward per sequence and a full log-softmax."
    total = 0.
    for r, m in zip(pairs, references):
        logp = []
        for k in ('chosen_ids', 'rejected_ids'):
            ids = torch.tensor([r['prompt_ids'] + r[k]])
            table = model(ids).float().log_softmax(-1)[0]
            logp.append(sum(table[len(r['prompt_ids']) + i - 1, t] for i, t in enumerate(r[k])))
        total = total - torch.nn.functional.logsigmoid(beta * (logp[0] - logp[1] - m))
    return total


@pytest.mark.parametrize('single', [True, False])
def test_loss_and_gradient_are_those_of_ordinary_dpo(single):
    model, pairs = tiny(), some_pairs(6, single=single)
    references = dpo.reference_margins(tiny(1), pairs)
    batch = (dpo.collate_tokens if single else dpo.collate_answers)(rows(pairs, references))
    fast = gradient(model, dpo.preference_loss(.3), batch)
    plain = gradient(model, lambda m, b: (by_definition(m, pairs, references, .3),), batch)
    assert torch.allclose(fast, plain, rtol=1e-4, atol=2e-6 * plain.abs().max()) and plain.abs().max() > .01
    assert torch.allclose(dpo.preference_loss(.3)(model, batch)[0], by_definition(model, pairs, references, .3), rtol=1e-5)


def test_both_ways_give_single_tokens_the_same_gradient():
    model, pairs = tiny(), some_pairs(8)
    references = dpo.reference_margins(tiny(1), pairs)
    loss = dpo.preference_loss(.1)
    a, b = gradient(model, loss, dpo.collate_tokens(rows(pairs, references))), gradient(model, loss, dpo.collate_answers(rows(pairs, references)))
    assert torch.allclose(a, b, rtol=1e-4, atol=2e-6 * b.abs().max())


@pytest.mark.parametrize('single', [True, False])
def test_first_loss_is_ln_2_and_nothing_is_in_order_yet(single):
    model, pairs = tiny(), some_pairs(8, single=single)
    total, n, sums = dpo.preference_loss(.1, copy.deepcopy(model), 1.)(model, dpo.PairBatches(pairs, dpo.reference_margins(model, pairs), 8, 1).batch(0))
    assert abs(total.item() / n - math.log(2)) < 1e-6 and abs(sums['kl']) < 1e-6


def test_first_loss_is_exactly_ln_2_on_the_same_batch():
    model, pairs = tiny(), some_pairs(8)
    batch = dpo.collate_tokens(rows(pairs))
    with torch.no_grad(): batch['reference'] = dpo.margins(model, batch)[0][:, None]
    total, n, _ = dpo.preference_loss(.1)(model, batch)
    assert torch.equal(total / n, torch.tensor(2.).log())


def test_third_mass_is_measured_from_the_full_softmax():
    model, pairs = tiny(), some_pairs(4)
    batch = dpo.collate_tokens(rows(pairs))
    third = dpo.preference_loss(.1)(model, batch)[2]['third_mass']
    by_hand = sum(1 - model(torch.tensor([r['prompt_ids']])).softmax(-1)[0, -1, r['chosen_ids'] + r['rejected_ids']].sum() for r in pairs)
    assert abs(third - by_hand) < 1e-4


def test_drift_is_the_divergence_over_the_prefix_and_the_merged_pivot():
    model, ref, pairs = tiny(), tiny(1), some_pairs(3)
    for r in pairs:  # two tokens that matter
        likely = model(torch.tensor([r['prompt_ids']]))[0, -1].topk(2).indices.tolist()
        r['chosen_ids'], r['rejected_ids'] = likely[:1], likely[1:]
    batch = dpo.collate_tokens(rows(pairs))
    found = dpo.drift(model, ref, model.hidden(batch['input_ids']), batch['input_ids'], dpo.flat_pairs(batch))
    for r, kl in zip(pairs, found):
        p, q = (m(torch.tensor([r['prompt_ids']])).softmax(-1)[0] for m in (ref, model))
        inside = (p[:-1] * (p[:-1] / q[:-1]).log()).sum(-1).mean()
        two = r['chosen_ids'] + r['rejected_ids']
        rest = [i for i in range(64) if i not in two]
        P, R = torch.cat([p[-1, two].sum()[None], p[-1, rest]]), torch.cat([q[-1, two].sum()[None], q[-1, rest]])
        assert abs(inside + (P * (P / R).log()).sum() - kl) < 1e-3 * kl.abs() + 1e-5


def test_the_loss_is_a_sum_over_rows_however_they_are_split():
    model, ref, pairs = tiny(), tiny(1), some_pairs(8)
    loss, batch = dpo.preference_loss(.1, ref, 1.), dpo.collate_tokens(rows(pairs, [.1] * 8))
    whole = gradient(model, loss, batch)
    parts = sum(gradient(model, loss, {k: v[i:i + 2] for k, v in batch.items()}) for i in range(0, 8, 2))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=2e-6 * whole.abs().max())


def test_padding_changes_nothing():
    model, pairs = tiny(), some_pairs(4)
    alone = [dpo.margins(model, dpo.collate_tokens([[r]]))[0].item() for r in pairs]
    assert torch.allclose(dpo.margins(model, dpo.collate_tokens(rows(pairs)))[0], torch.tensor(alone), atol=1e-4)


def test_batches_are_a_function_of_seed_and_step_and_visit_every_pair_each_epoch():
    pairs = some_pairs(10) + some_pairs(4, seed=1, single=False)
    batches = dpo.PairBatches(pairs, list(range(14)), 2, epochs=3, seed=5)
    assert len(batches) == 15 + 6
    again = dpo.PairBatches(pairs, list(range(14)), 2, epochs=3, seed=5)
    for s in reversed(range(len(batches))):
        assert all(torch.equal(v, again.batch(s)[k]) for k, v in batches.batch(s).items())
    seen = sorted(int(m) for s in range(len(batches)) for m in batches.batch(s)['reference'].flatten())
    assert seen == sorted(3 * list(range(14)))
    assert all(batches.batch(s)['input_ids'].dim() == (2 if batches.batch(s)['reference'].max() < 10 else 3) for s in range(len(batches)))


def test_shuffled_labels_swap_half():
    pairs = some_pairs(20)
    turned = dpo.shuffle_labels(pairs, seed=3)
    swapped = [a['chosen_ids'] == b['rejected_ids'] for a, b in zip(pairs, turned)]
    assert sum(swapped) == 10 and turned == dpo.shuffle_labels(pairs, seed=3) != dpo.shuffle_labels(pairs, seed=4)


def test_mixture_fraction():
    assert len(dpo.mix([1] * 95, [2] * 50, .05)) == 100 and len(dpo.mix([1] * 95, [2] * 3, .05)) == 98
    with pytest.raises(ValueError, match='fraction=1'): dpo.mix([1], [2], 1)


def test_training_prefers_the_chosen_and_resumes_bit_for_bit(tmp_path):
    pairs, base = some_pairs(12) + some_pairs(4, seed=1, single=False), tiny()
    settings = TrainSettings(lr=1e-3, weight_decay=0., precision='float32')
    def go(out, pairs=pairs, **kw):
        model = copy.deepcopy(base)
        log = dpo.train_dpo(model, copy.deepcopy(base), pairs, settings, tmp_path/out, epochs=8, batch_size=4, kl_weight=.1, **kw)
        return model.state_dict(), log
    weights, log = go('a')
    assert log[0]['loss'] == pytest.approx(math.log(2), abs=1e-5) and log[-1]['loss'] < .6 and log[-1]['accuracy'] == 1
    assert len(log) == 32 and all(torch.equal(v, weights[k]) for k, v in go('a')[0].items())
    full = go('full', kind='full')[1]
    assert 'third_mass' not in full[0] and full[-1]['accuracy'] == 1


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match='did the search find any'): dpo.train_dpo(tiny(), tiny(), [], TrainSettings(lr=1e-4), tmp_path)
    with pytest.raises(ValueError, match='tokens'): dpo.train_dpo(tiny(), tiny(), some_pairs(2), TrainSettings(lr=1e-4), tmp_path, kind='tokens')
    with pytest.raises(ValueError, match='pass ref'): dpo.train_dpo(tiny(), None, some_pairs(2), TrainSettings(lr=1e-4), tmp_path)
    with pytest.raises(ValueError, match="'hinge': choose one of sigmoid, ipo"): dpo.preference_loss(.1, loss='hinge')


def test_chat_pairs_end_with_im_end_unless_cut():
    tokenizer = train_tokenizer(['Who wrote it? It was Ada.'] * 3, 320)
    make = lambda **kw: dpo.chat_pair(tokenizer, [dict(role='user', content='Who?')], 'Ada <|im_end|> wrote it, I think.', 'No.', id='1', source='s', meta={}, **kw)
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    row, cut = make(), make(max_tokens=3)
    assert row['chosen_ids'][-1] == row['rejected_ids'][-1] == end and row['chosen_ids'].count(end) == 1 and row['prompt'].endswith('assistant<|im_sep|>')
    assert cut['chosen_ids'] == row['chosen_ids'][:3] and json.dumps(row)
