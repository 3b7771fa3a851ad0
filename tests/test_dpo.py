"Preference losses against their definitions, and their batches against the loop's demands."
import copy
import json
import math
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from phi4_ref import records, run
from phi4_ref.config import load_config
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.paper import TABLE_7
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


@pytest.mark.parametrize('single', [True, False])
def test_the_log_holds_what_was_gained_times_beta_and_the_mean_of_each_side(single):
    model, pairs = tiny(), some_pairs(6, single=single)
    references = dpo.reference_margins(tiny(1), pairs)
    gains = [m - r for m, r in zip(dpo.reference_margins(model, pairs), references)]
    sums = dpo.preference_loss(.3)(model, (dpo.collate_tokens if single else dpo.collate_answers)(rows(pairs, references)))[2]
    assert sums['margin'].item() == pytest.approx(.3 * sum(gains), rel=1e-4) and 0 < sums['accuracy'].item() == sum(g > 0 for g in gains) < 6
    for key in ('chosen', 'rejected'):
        answers = ((r['prompt_ids'], r[f'{key}_ids']) for r in pairs)
        by_hand = sum(model(torch.tensor([p + a])).log_softmax(-1)[0, len(p) - 1:-1].gather(1, torch.tensor(a)[:, None]).mean().item() for p, a in answers)
        assert sums[f'{key}_logp'].item() == pytest.approx(by_hand, rel=1e-4)


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


def test_shuffled_labels_prefer_no_token():
    pairs = [r | dict(chosen_ids=[1], rejected_ids=[2]) for r in some_pairs(41)] + [r | dict(chosen_ids=[2], rejected_ids=[1]) for r in some_pairs(10)] + some_pairs(6)
    for seed in range(20):
        wins = sum((r['chosen_ids'] == [1]) - (r['chosen_ids'] == [2]) for r in dpo.shuffle_labels(pairs, seed)[:51])
        assert abs(wins) <= 2, 'one pair over for each order of the two'


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


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
@pytest.mark.parametrize('single', [True, False])
def test_the_policy_is_its_own_reference_before_the_first_step(tmp_path, precision, single):
    "Without a KL term no second model is needed: the same bits as with a copy, from a loss of ln 2; the copy is given back as it was."
    pairs, settings, copied = some_pairs(30, single=single), TrainSettings(lr=1e-3, weight_decay=0., precision=precision, tracker='none'), tiny()
    weights, lie = copy.deepcopy(copied.state_dict()), {k: v.data_ptr() for k, v in copied.state_dict().items()}
    logs, models = [], []
    for ref in (None, copied):
        model = tiny()
        logs.append(dpo.train_dpo(model, ref, pairs, settings, tmp_path/str(len(logs)), epochs=2, batch_size=30))
        models.append(model.state_dict())
    assert all(torch.equal(v, models[1][k]) for k, v in models[0].items()) and [r['loss'] for r in logs[0]] == [r['loss'] for r in logs[1]]
    assert logs[0][0]['loss'] == pytest.approx(math.log(2), abs=1e-6 if precision == 'float32' else 1e-3) and logs[0][-1]['loss'] < .6
    assert all(torch.equal(v, weights[k]) and v.data_ptr() == lie[k] for k, v in copied.state_dict().items())


@pytest.mark.parametrize('kind', dpo.KINDS)
def test_a_model_is_lent_with_its_matrices_rounded(kind):
    "What autocast would round at every use is rounded once, which changes no bit of a margin; a failure inside gives the weights back too."
    model, pairs = tiny(), some_pairs(10) + some_pairs(4, single=False)
    before = copy.deepcopy(model.state_dict())
    plain = dpo.reference_margins(model, pairs, kind, bf16=True)
    with pytest.raises(KeyError), dpo.placed(model, 'cpu', bf16=True):
        assert {n for n, w in model.named_parameters() if w.dtype == torch.bfloat16} == {n for n, w in model.named_parameters() if n.endswith('_proj.weight')}
        assert dpo.reference_margins(model, pairs, kind, bf16=True) == plain
        raise KeyError
    assert plain != dpo.reference_margins(model, pairs, kind)
    assert all(w.dtype == torch.float32 and torch.equal(w, before[n]) for n, w in model.state_dict().items())
    with dpo.placed(model, 'cpu', bf16=False): assert all(w.dtype == torch.float32 for w in model.parameters())


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match='did the search find any'): dpo.train_dpo(tiny(), tiny(), [], TrainSettings(lr=1e-4), tmp_path)
    with pytest.raises(ValueError, match='tokens'): dpo.train_dpo(tiny(), tiny(), some_pairs(2), TrainSettings(lr=1e-4), tmp_path, kind='tokens')
    with pytest.raises(ValueError, match='pass ref'): dpo.train_dpo(tiny(), None, some_pairs(2), TrainSettings(lr=1e-4), tmp_path, kl_weight=.1)
    with pytest.raises(ValueError, match="'hinge': choose one of sigmoid, ipo"): dpo.preference_loss(.1, loss='hinge')
    for counts in (dict(a=0), dict(a=2, b=-1)):
        for call in (dpo.mixture, dpo.largest_mixture):
            with pytest.raises(ValueError, match='counts .*above 0'): call({name: [1, 2, 3] for name in counts}, counts)


@pytest.mark.parametrize('change, says', [(dict(prompt_ids=[]), 'no prompt_ids'), (dict(chosen_ids=[]), 'no chosen_ids'), (dict(rejected_ids=None), 'no rejected_ids'), (dict(prompt_ids='text'), "no prompt_ids .*'text'"),
    (dict(chosen_ids=[64]), 'chosen_ids .*64.*0 to 63'), (dict(rejected_ids=[-1]), 'rejected_ids .*-1.*0 to 63'), (dict(rejected_ids=[0]), 'chosen and rejected are the same')])
def test_a_pair_that_cannot_be_learnt_from_is_named(tmp_path, change, says):
    pairs = [pair([5, 6], [0], [1]), pair([5, 6], [0], [1]) | dict(id='p7') | change]
    with pytest.raises(ValueError, match=f"pair 'p7'.*{says}"): dpo.train_dpo(tiny(), tiny(), pairs, TrainSettings(lr=1e-4), tmp_path)
    with pytest.raises(ValueError, match="pair None has no prompt_ids"): dpo.train_dpo(tiny(), tiny(), [dict(prompt='Hi', chosen='a', rejected='b')], TrainSettings(lr=1e-4), tmp_path)


@pytest.mark.parametrize('setting', [dict(beta=0.), dict(beta=-1.), dict(epochs=0), dict(batch_size=0), dict(label_smoothing=.6), dict(label_smoothing='some'), dict(nll_weight=-1.), dict(kl_weight=-1.)])
def test_settings_that_cannot_be_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match='='.join(map(str, next(iter(setting.items()))))): dpo.train_dpo(tiny(), tiny(), some_pairs(2), TrainSettings(lr=1e-4), tmp_path, **setting)


def test_chat_pairs_end_with_im_end_unless_cut():
    tokenizer = train_tokenizer(['Who wrote it? It was Ada.'] * 3, 320)
    make = lambda **kw: dpo.chat_pair(tokenizer, [dict(role='user', content='Who?')], 'Ada <|im_end|> wrote it, I think.', 'No.', id='1', source='s', meta={}, **kw)
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    row, cut = make(), make(max_tokens=3)
    assert row['chosen_ids'][-1] == row['rejected_ids'][-1] == end and row['chosen_ids'].count(end) == 1 and row['prompt'].endswith('assistant<|im_sep|>')
    assert cut['chosen_ids'] == row['chosen_ids'][:3] and json.dumps(row)


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, initializer_range=.2, **kw))


def gpt2(seed=0):  # dropout everywhere, no grouped heads, learned positions
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=.2, bos_token_id=1, eos_token_id=1))


def phi(seed=0):  # its output layer has a bias
    torch.manual_seed(seed)
    model = PhiForCausalLM(PhiConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, initializer_range=.2))
    with torch.no_grad(): model.lm_head.bias.normal_()
    return model


MODELS = {'ours': tiny, 'llama': llama, 'llama tied': lambda seed=0: llama(seed, tie_word_embeddings=True), 'gpt2': gpt2, 'phi': phi}
ALL_TERMS = dict(kl_weight=1., nll_weight=.3)


def logits(model, ids): return model(ids) if isinstance(model, Transformer) else model(ids).logits


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('single', [True, False])
@pytest.mark.parametrize('loss', dpo.LOSSES)
def test_every_loss_on_every_model_is_its_formula(name, single, loss):
    "Each written out again, with one forward a sequence and full log-softmaxes."
    model, ref = (dpo.without_dropout(MODELS[name](seed)) for seed in (0, 1))
    pairs, beta, gamma, eps = some_pairs(4, single=single), .3, .7, .2
    references = [0.] * 4 if loss == 'simpo' else dpo.reference_margins(ref, pairs, per_token=loss in dpo.PER_TOKEN)
    batch = dpo.PairBatches(pairs, references, 4, 1, label_smoothing=[eps] * 4).batch(0)
    def formula(model, _):
        total = 0.
        for r in pairs:
            sums, means = [], []
            for m in (model, ref):
                for k in ('chosen_ids', 'rejected_ids'):
                    table = logits(m, torch.tensor([r['prompt_ids'] + r[k]])).float().log_softmax(-1)[0]
                    sums.append(sum(table[len(r['prompt_ids']) + i - 1, t] for i, t in enumerate(r[k])))
                    means.append(sums[-1] / len(r[k]))
            g, per_token = sums[0] - sums[1] - (sums[2] - sums[3]).detach(), means[0] - means[1] - (means[2] - means[3]).detach()
            sig = lambda x: -torch.nn.functional.logsigmoid(x)
            total = total + dict(sigmoid=sig(beta * g), ipo=(per_token - 1 / (2 * beta)) ** 2, cdpo=(1 - eps) * sig(beta * g) + eps * sig(-beta * g),
                                 robust=((1 - eps) * sig(beta * g) - eps * sig(-beta * g)) / (1 - 2 * eps), simpo=sig(beta * (means[0] - means[1]) - gamma))[loss] - .3 * means[0]
        return total,
    fast, plain = gradient(model.train(), dpo.preference_loss(beta, loss=loss, gamma=gamma, nll_weight=.3), batch), gradient(model, formula, batch)
    assert torch.allclose(fast, plain, rtol=1e-3, atol=1e-5 * plain.abs().max()) and plain.abs().max() > .01


def on_trajectories(n=5, seed=0):
    "Single-token pairs, one to four on a trajectory, two of them at the same place."
    g = torch.Generator().manual_seed(seed)
    out = []
    for t in range(n):
        ids = [t, *torch.randint(64, (20,), generator=g).tolist()]
        out += [pair(ids[:at], [ids[at]], [(ids[at] + 1 + j) % 64]) for j, at in enumerate(sorted([3 + t, 3 + t, 12, 20][:t % 4 + 1]))]
    return [r | dict(id=str(i)) for i, r in enumerate(out)]


@pytest.mark.parametrize('name', MODELS)
def test_pivots_of_a_trajectory_in_one_row_are_the_pairs_one_by_one(name):
    model, ref, pairs = dpo.without_dropout(MODELS[name]()), dpo.without_dropout(MODELS[name](1)), on_trajectories()
    alone, shared = dpo.reference_margins(ref, pairs), dpo.reference_margins(ref, pairs, 'trajectory')
    assert alone == pytest.approx(shared, abs=1e-4) and len(dpo.trajectories(pairs)) == 5 < len(pairs)
    batch, loss = dpo.PairBatches(pairs, alone, 5, 1, kind='trajectory').batch(0), dpo.preference_loss(.3, ref, **ALL_TERMS)
    total, n, sums = loss(model, batch)
    apart = [loss(model, dpo.collate_tokens([row])) for row in rows(pairs, alone)]
    assert n == len(pairs) and torch.allclose(total, sum(t for t, *_ in apart), rtol=1e-5)
    for k in sums: assert torch.allclose(torch.as_tensor(sums[k]).double(), sum(torch.as_tensor(s[k]).double() for *_, s in apart), rtol=1e-4, atol=1e-5), k
    together, one_by_one = gradient(model, loss, batch), sum(gradient(model, loss, dpo.collate_tokens([row])) for row in rows(pairs, alone))
    assert torch.allclose(together, one_by_one, rtol=1e-4, atol=2e-6 * one_by_one.abs().max())
    parts = sum(gradient(model, loss, {k: v[i:i + 1] for k, v in batch.items()}) for i in range(5))
    assert torch.allclose(together, parts, rtol=1e-4, atol=2e-6 * parts.abs().max())


@pytest.mark.parametrize('single', [True, False])
def test_logits_in_chunks_change_nothing_and_are_never_all_there(single, monkeypatch):
    model, ref, pairs = llama(), llama(1), some_pairs(6, single=single)
    batch = dpo.PairBatches(pairs, [.1] * 6, 6, 1).batch(0)
    loss, seen = dpo.preference_loss(.3, ref, **ALL_TERMS), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.numel()))
    whole, at_once = gradient(model, loss, batch), max(seen)
    seen.clear()
    monkeypatch.setattr(dpo, 'LOGITS', 64 * 5)
    assert torch.allclose(gradient(model, loss, batch), whole, rtol=1e-4, atol=2e-6 * whole.abs().max())
    assert max(seen) <= 64 * 5 < at_once


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', ['token', 'full'])
def test_rows_of_like_length_together_change_nothing_and_compute_less(name, kind, monkeypatch):
    model, ref, pairs = dpo.without_dropout(MODELS[name]()), dpo.without_dropout(MODELS[name](1)), some_pairs(13) + some_pairs(8, seed=1, single=False)
    pairs = pairs[:13] if kind == 'token' else pairs[13:]
    batch, loss, seen = dpo.PairBatches(pairs, [.1] * len(pairs), len(pairs), 1, kind=kind).batch(0), dpo.preference_loss(.3, ref, **ALL_TERMS), []
    plain = dpo.hidden
    monkeypatch.setattr(dpo, 'hidden', lambda model, ids: (seen.append(ids.numel()), plain(model, ids))[1])
    grads, tokens = {}, {}
    for rows_together in (1, 2, dpo.GROUP, 99):
        monkeypatch.setattr(dpo, 'GROUP', rows_together)
        grads[rows_together], tokens[rows_together] = gradient(model, loss, batch), sum(seen)
        seen.clear()
    whole = grads[99]
    assert all(torch.allclose(g, whole, rtol=1e-4, atol=2e-6 * whole.abs().max()) for g in grads.values()) and whole.abs().max() > .01
    assert sorted(tokens, key=tokens.get) == [1, 2, 8, 99]
    if kind == 'token': assert tokens[1] == 2 * sum(len(r['prompt_ids']) for r in pairs)  # policy and reference, no padding at all


def test_label_noise_is_the_beta_probability():
    from scipy.integrate import quad
    from scipy.stats import beta
    for n1, k1, n2, k2 in [(0, 0, 0, 0), (10, 7, 10, 5), (50, 45, 12, 3), (3, 0, 200, 199), (1, 1, 60, 57)]:
        exact = quad(lambda x: beta.pdf(x, k2 + 1, n2 - k2 + 1) * beta.cdf(x, k1 + 1, n1 - k1 + 1), 0, 1, limit=400)[0]
        assert dpo.label_noise(n1, k1, n2, k2) == pytest.approx(exact, abs=1e-7)
    assert dpo.label_noise(10, 7, 10, 5) + dpo.label_noise(10, 5, 10, 7) == pytest.approx(1)


def test_each_pair_is_smoothed_by_its_own_counts(tmp_path, monkeypatch):
    pairs, seen = some_pairs(3), {}
    pairs[0]['meta'], pairs[1]['meta'] = (dict(n_chosen=10, k_chosen=k, n_rejected=10, k_rejected=5) for k in (9, 6))
    monkeypatch.setattr(dpo, 'train', lambda model, batches, *args, loss: seen.update(batch=batches.batch(0)))
    def smoothed(**kw):
        dpo.train_dpo(tiny(), tiny(), pairs, TrainSettings(lr=1e-3), tmp_path, batch_size=3, **kw)
        of = dict(zip(seen['batch']['chosen'].flatten().tolist(), seen['batch']['label_smoothing'].flatten().tolist()))
        return [of[r['chosen_ids'][0]] for r in pairs]
    assert smoothed(loss='cdpo') == pytest.approx([dpo.label_noise(10, 9, 10, 5), dpo.label_noise(10, 6, 10, 5), 0.])  # no counts: taken at its word
    assert smoothed(loss='robust', label_smoothing=.07) == pytest.approx([.07] * 3)
    for r, rises in zip(pairs, (True, False)): r['meta'] |= dict(is_positive=rises, n_own=40, k_own=30 if rises else 17, n_others=50, k_others=25)
    assert smoothed(loss='cdpo') == pytest.approx([dpo.label_noise(40, 30, 50, 25), dpo.label_noise(50, 25, 40, 17), 0.])  # the test's counts, where there was one
    for r in pairs[:2]: r |= r.pop('meta')
    assert smoothed(loss='cdpo')[:2] == pytest.approx([dpo.label_noise(40, 30, 50, 25), dpo.label_noise(50, 25, 40, 17)])  # a data set's rows are flat
    assert smoothed() == [0.] * 3
    pairs[2]['meta'] = dict(n_chosen=1, k_chosen=1, n_rejected=60, k_rejected=58)
    with pytest.raises(ValueError, match='leave the pair out or set label_smoothing'): smoothed(loss='robust')


@pytest.mark.parametrize('name', MODELS)
def test_any_causal_model_is_trained_and_resumes(name, tmp_path):
    pairs, base = on_trajectories() + some_pairs(4, seed=1, single=False), MODELS[name]()
    def go(out):
        model = copy.deepcopy(base)
        log = dpo.train_dpo(model, copy.deepcopy(base), pairs, TrainSettings(lr=1e-3, weight_decay=0., precision='float32', tracker='none'), tmp_path/out, kind='trajectory', epochs=8, batch_size=4, kl_weight=.1)
        return model.state_dict(), log
    weights, log = go('a')  # the second call finds the checkpoint of the first
    assert log[0]['loss'] == pytest.approx(math.log(2), abs=1e-5) and log[-1]['loss'] < .6 and {'chosen_logp', 'rejected_logp'} < set(log[0])
    assert all(torch.equal(v, weights[k]) for k, v in go('a')[0].items())


def test_a_run_is_not_continued_with_another_loss(tmp_path):
    settings = TrainSettings(lr=1e-3, precision='float32', tracker='none')
    dpo.train_dpo(tiny(), tiny(), some_pairs(4), settings, tmp_path, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match="'loss': 'sigmoid'.*'loss': 'ipo'"): dpo.train_dpo(tiny(), tiny(), some_pairs(4), settings, tmp_path, loss='ipo', epochs=1, batch_size=4)


def test_models_that_would_be_trained_wrongly_are_refused(tmp_path):
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=12, final_logit_softcapping=.02))
    with pytest.raises(ValueError, match='caps or scales'): dpo.train_dpo(gemma, gemma, some_pairs(2), TrainSettings(lr=1e-4), tmp_path)


needs_peft = pytest.mark.skipif(find_spec('peft') is None, reason='peft is not installed: pip install phi4_ref[peft]')
ADAPTED = {'ours': ['qkv_proj', 'o_proj', 'gate_up_proj'], 'llama': 'all-linear', 'gpt2': ['c_attn'], 'phi': ['q_proj', 'v_proj']}


@needs_peft
@pytest.mark.parametrize('name', ADAPTED)
def test_an_adapter_switched_off_is_the_reference(name, tmp_path):
    from peft import LoraConfig, get_peft_model
    pairs, base = on_trajectories() + some_pairs(3, seed=1, single=False), MODELS[name]()
    before = copy.deepcopy(base.state_dict())
    torch.manual_seed(2)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=ADAPTED[name], lora_dropout=.1))
    log = dpo.train_dpo(policy, None, pairs, TrainSettings(lr=1e-2, weight_decay=0., precision='float32', tracker='none'), tmp_path, kind='trajectory', epochs=10, batch_size=4, kl_weight=.1)
    assert log[0]['loss'] == pytest.approx(math.log(2), abs=1e-5) and log[0]['kl'] == pytest.approx(0, abs=1e-6) and log[-1]['loss'] < .6 and log[-1]['kl'] > 1e-4
    frozen = MODELS[name]()
    assert dpo.reference_margins(frozen.eval(), pairs) == pytest.approx(disabled(policy, pairs), abs=1e-5)  # the weights beneath have not moved
    a = gradient_of_trained(policy, dpo.preference_loss(.3, frozen, **ALL_TERMS), pairs)
    b = gradient_of_trained(policy, dpo.preference_loss(.3, None, **ALL_TERMS), pairs)
    assert torch.allclose(a, b, rtol=1e-4, atol=2e-6 * a.abs().max()) and a.abs().max() > 1e-3
    merged = policy.merge_and_unload()
    assert type(merged) is type(frozen) and set(merged.state_dict()) == set(before)


def disabled(policy, pairs):
    with dpo.as_reference(policy, None) as ref: return dpo.reference_margins(ref, pairs)


def gradient_of_trained(model, loss, pairs):
    model.zero_grad()
    for s in range(2): loss(model, dpo.PairBatches(pairs, [.1] * len(pairs), 4, 1, kind='trajectory').batch(s))[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@needs_peft
def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=['q_proj', 'lm_head']))
    with pytest.raises(ValueError, match='leave it out of the adapter'): dpo.train_dpo(policy, None, some_pairs(2), TrainSettings(lr=1e-4), tmp_path)


def test_mixture_by_counts():
    sources = {name: [dict(source=name, i=i) for i in range(n // 100)] for name, n in TABLE_7.items()}
    mixed = dpo.mixture(sources, TABLE_7, size=1000, seed=1)
    by_name = Counter(r['source'] for r in mixed)
    assert len(mixed) == 1000 and all(abs(by_name[k] - 1000 * n / sum(TABLE_7.values())) <= 1 for k, n in TABLE_7.items())
    assert len({(r['source'], r['i']) for r in mixed}) == 1000 and mixed == dpo.mixture(sources, TABLE_7, size=1000, seed=1) != dpo.mixture(sources, TABLE_7, size=1000, seed=2)
    assert Counter(r['source'] for r in dpo.mixture(sources, {k: len(v) for k, v in sources.items()})) == {k: len(v) for k, v in sources.items()}
    with pytest.raises(ValueError, match='math has 765 rows of 76552') as e: dpo.mixture(sources, TABLE_7)
    largest = dpo.largest_mixture(sources, TABLE_7)
    assert f'size={largest} is the largest' in str(e.value) and len(dpo.mixture(sources, TABLE_7, size=largest)) == largest
    with pytest.raises(ValueError, match='more than there is'): dpo.mixture(sources, TABLE_7, size=largest + 200)
    with pytest.raises(ValueError, match='same names'): dpo.mixture(dict(math=[]), TABLE_7)


@example([(1, 1), (1, 2), (1, 1)])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4))
def test_the_largest_mixture_can_always_be_drawn(rows):
    sources, counts = ({i: [i] * r[0] for i, r in enumerate(rows)}, {i: r[1] for i, r in enumerate(rows)})
    largest = dpo.largest_mixture(sources, counts)
    assert largest >= 1 and len(dpo.mixture(sources, counts, largest)) == largest


# --- in a run ----------------------------------------------------------------------------------------------------------------

def dpo_stage(tiny_run, out, *changes, name='dpo', config=None):
    "A stage of stage 1 of the unbroken tiny run, with other settings: its counts, its log and its checkpoint."
    stage, config = next(s for s in run.STAGES if s.name == name), load_config(config or tiny_run/'config.yaml', list(changes))
    counts = stage.make(stage.view(config), {i: tiny_run/i for i in stage.inputs}, out)
    return counts, [json.loads(line) for line in (out/'log.jsonl').read_text().splitlines()], run.open_checkpoint(out)[0].state_dict()


@pytest.fixture(scope='module')
def started(tiny_run): return run.open_checkpoint(tiny_run/'sft')[0].state_dict()


FIRST = dict(sigmoid=math.log(2), ipo=25., cdpo=math.log(2), robust=math.log(2))  # at no gain and beta 0.1

@pytest.mark.parametrize('loss', dpo.LOSSES)
def test_a_run_trains_with_each_loss(tiny_run, tmp_path, started, loss):
    counts, log, weights = dpo_stage(tiny_run, tmp_path/'out', f'dpo.loss={loss}', 'dpo.kl_weight=0')
    if loss in FIRST: assert log[0]['loss'] == pytest.approx(FIRST[loss], rel=1e-4)
    assert all(math.isfinite(r['loss']) for r in log) and counts['pairs'] > 0 and any(not torch.equal(v, started[k]) for k, v in weights.items())
    if loss == 'simpo': assert log[0]['loss'] != dpo_stage(tiny_run, tmp_path/'gamma', 'dpo.loss=simpo', 'dpo.gamma=3', 'dpo.kl_weight=0')[1][0]['loss']


def test_the_defaults_of_a_run_are_the_papers_loss_and_each_setting_is_heard(tiny_run, tmp_path):
    plain = run.open_checkpoint(tiny_run/'dpo')[0].state_dict()
    same = lambda out, *changes, **kw: all(torch.equal(v, plain[k]) for k, v in dpo_stage(tiny_run, tmp_path/out, *changes, **kw)[2].items())
    assert same('again') and same('sigmoid', 'dpo.loss=sigmoid') and same('no smoothing', 'dpo.loss=cdpo', 'dpo.label_smoothing=0')
    for i, changes in enumerate([['dpo.loss=cdpo'], ['dpo.loss=cdpo', 'dpo.label_smoothing=0.3'], ['dpo.nll_weight=0.5'], ['dpo.counts.pts=9'], ['dpo.beta=0.5']]): assert not same(str(i), *changes), changes


def test_the_weight_of_the_divergence_in_a_run_is_the_one_given(tiny_run, tmp_path):
    logs = [dpo_stage(tiny_run, tmp_path/str(w), 'dpo.epochs=3', 'dpo.batch_size=4', 'dpo.lr=1e-2', f'dpo.kl_weight={w}')[1] for w in (0, 1, 9)]
    assert ['kl' in log[0] for log in logs] == [False, True, True] and len({log[-1]['loss'] for log in logs}) == 3


def test_a_run_counts_its_pairs_by_source(tiny_run, tmp_path):
    pairs, section = [dict(source='pts', i=i, meta=dict(kind='code' if i % 3 else 'problem')) for i in range(90)], load_config('toy').dpo
    records.save(tmp_path/'refusal_pairs.parquet', [r | dict(source='refusal') for r in some_pairs(40)], records.PREFERENCE)
    mixed = lambda **more: Counter(r['source'] for r in run.mixed(pairs, dict(sft_data=tmp_path), section.model_copy(update=more), 0))
    assert mixed() == dict(pts=90, refusal=5) and mixed(counts=dict(pts=60)) == dict(pts=60, refusal=3)
    assert mixed(counts=dict(pts=60, refusal=12), refusal_fraction=0.) == dict(pts=60, refusal=12)
    assert mixed(counts=dict(pts=6000, refusal=1200), refusal_fraction=0.) == dict(pts=90, refusal=18)  # fewer than wished: in proportion
    by_kind = run.mixed(pairs, dict(sft_data=tmp_path), section.model_copy(update=dict(counts=dict(problem=10, code=50, refusal=3), refusal_fraction=0.)), 0)
    assert Counter(r['meta']['kind'] if r['source'] == 'pts' else 'refusal' for r in by_kind) == dict(problem=10, code=50, refusal=3)
    drawn = lambda seed, **more: [r.get('i', r.get('id')) for r in run.mixed(pairs, dict(sft_data=tmp_path), section.model_copy(update=more), seed)]
    for more in (dict(counts=dict(pts=60), refusal_fraction=0.), {}): assert drawn(1, **more) == drawn(1, **more) != drawn(2, **more)
    records.save(tmp_path/'safety_pairs.parquet', [r | dict(source='safety') for r in some_pairs(30)], records.PREFERENCE)
    assert mixed(counts=dict(pts=60, refusal=9, safety=3), refusal_fraction=0.) == dict(pts=60, refusal=9, safety=3)
    shared = mixed(refusal_fraction=.4)
    assert shared['pts'] == 90 and shared['refusal'] + shared['safety'] == 60 and min(shared['refusal'], shared['safety']) > 10, 'the fraction is drawn from both'
    with pytest.raises(ValueError, match='pairs of judge_overall, and this run has none'): mixed(counts=dict(judge_overall=3, pts=4))


def test_collected_safety_pairs_are_put_into_the_models_tokens(tiny_run, tmp_path):
    "Equal replies and those beyond the context stay out, and are counted; the rest is as `chat_pair` has it."
    from phi4_ref.data.collect import PAIR
    asked = dict(messages=[dict(role='user', content='How many plums?')], source='safety')
    rows = [asked | dict(id=str(i), chosen=c, rejected=r) for i, (c, r) in enumerate([('No.', 'Five.'), ('No.', 'No.'), ('No.', 'plum ' * 1200), ('plum ' * 1200, 'No.')])]
    records.save(tmp_path/'collect'/'safety.parquet', rows, PAIR)
    inputs = dict(collect=tmp_path/'collect', midtrain=tiny_run/'midtrain')
    assert run.safety_pairs(inputs, tmp_path) == dict(kept=1, equal=1, too_long=2)
    [pair], tokenizer = records.load(tmp_path/'safety_pairs.parquet'), run.open_tokenizer(tiny_run/'midtrain')
    assert pair == dpo.chat_pair(tokenizer, asked['messages'], 'No.', 'Five.', id='0', source='safety', meta={})
    records.save(tmp_path/'collect'/'safety.parquet', [], PAIR)
    assert run.safety_pairs(inputs, tmp_path/'none') == {} and not (tmp_path/'none').exists()


def test_trajectories_in_a_run_read_fewer_tokens_for_the_same_pairs(tiny_run, tmp_path):
    pairs = on_trajectories()
    records.save(tmp_path/'pts/pairs.parquet', pairs, records.PREFERENCE)
    for part in ('sft_data', 'sft'): (tmp_path/part).symlink_to(tiny_run/part)
    logs = {rows: dpo_stage(tmp_path, tmp_path/rows, f'dpo.rows={rows}', 'dpo.epochs=1', f'dpo.batch_size={size}', 'dpo.refusal_fraction=0', config=tiny_run/'config.yaml')[1] for rows, size in (('pair', len(pairs)), ('trajectory', 5))}
    assert [len(log) for log in logs.values()] == [1, 1] and logs['pair'][0]['targets'] == logs['trajectory'][0]['targets'] == len(pairs)
    assert logs['trajectory'][0]['tokens'] < logs['pair'][0]['tokens'] and logs['pair'][0]['grad_norm'] == pytest.approx(logs['trajectory'][0]['grad_norm'], rel=1e-4)
    assert [run.pair_tokens(pairs, kind) for kind in ('token', 'trajectory')] == [sum(len(r['prompt_ids']) for r in pairs), sum(len(pairs[row[-1]]['prompt_ids']) for row in dpo.trajectories(pairs))]


@pytest.mark.parametrize('rows', ['pair', 'trajectory'])
def test_the_controls_of_a_run_read_as_much_as_the_pairs(tiny_run, tmp_path, rows):
    records.save(tmp_path/'pts/pairs.parquet', [r | dict(prompt_ids=r['prompt_ids'] * 8) for r in on_trajectories()], records.PREFERENCE)
    for part in ('sft_data', 'sft', 'pts/trajectories.json'): (tmp_path/part).symlink_to(tiny_run/part)
    def log(stage): return dpo_stage(tmp_path, tmp_path/stage, f'dpo.rows={rows}', 'dpo.epochs=2', 'dpo.batch_size=1', 'dpo.refusal_fraction=0', name=stage, config=tiny_run/'config.yaml')[1]
    pivotal, shuffled, full = map(log, ('dpo', 'dpo_shuffled', 'dpo_full'))
    assert len(shuffled) == len(pivotal) and shuffled[-1]['tokens'] == pivotal[-1]['tokens'] and [r['loss'] for r in shuffled] != [r['loss'] for r in pivotal]
    found = {t['question_id']: t for t in json.loads((tiny_run/'pts/trajectories.json').read_text())}
    costs = [2 * len(t['prompt_ids']) + len(a) + len(b) for t in found.values() for a, b in zip(t['solved'], t['failed'])]
    assert len(full) * sum(costs) / len(costs) == pytest.approx(pivotal[-1]['tokens'], abs=sum(costs) / len(costs)) and 'third_mass' not in full[0]


@pytest.mark.parametrize('stage, begun', [('stage2_only', 'sft'), ('final', 'dpo')])
def test_stage_2_begins_at_its_checkpoint_and_reads_its_own_section(tiny_run, tmp_path, stage, begun):
    counts, log, weights = dpo_stage(tiny_run, tmp_path/'out', 'judge.lr=1e-12', 'judge.epochs=3', 'judge.batch_size=4', 'judge.loss=ipo', 'judge.beta=0.5', name=stage)
    one, other = (run.open_checkpoint(tiny_run/name)[0].state_dict() for name in (begun, {'sft': 'dpo', 'dpo': 'sft'}[begun]))
    assert all(torch.allclose(v, one[k], rtol=0, atol=1e-9) for k, v in weights.items()) and not all(torch.allclose(v, other[k], rtol=0, atol=1e-9) for k, v in weights.items())
    assert len(log) == round(3 * counts['pairs'] / 4) and log[0]['loss'] == pytest.approx(1., rel=1e-3) and counts['pairs'] == len(records.load(tiny_run/'judge/pairs.parquet'))


@needs_peft
def test_an_adapter_has_the_rank_and_the_strength_asked_for_and_begins_by_its_seed():
    models = [run.with_adapter(tiny(), 4, seed) for seed in (0, 0, 1)]
    one, again, other = ({k: v for k, v in m.state_dict().items() if 'lora_A' in k} for m in models)
    assert len(one) == 8 and all(len(a) == 4 and a.equal(again[k]) and not a.equal(other[k]) for k, a in one.items())
    layers = [m for m in models[0].modules() if hasattr(m, 'get_delta_weight')]
    for m in layers: m.lora_B.default.weight.data.normal_()
    assert len(layers) == 8 and all(torch.allclose(m.get_delta_weight('default'), 2 * m.lora_B.default.weight @ m.lora_A.default.weight) for m in layers)


@needs_peft
def test_adapters_in_a_run_leave_an_ordinary_checkpoint(tiny_run, tmp_path, started):
    _, log, weights = dpo_stage(tiny_run, tmp_path/'out', 'dpo.lora_rank=2', 'dpo.lr=1e-2', 'dpo.epochs=4')
    moved = {k for k, v in weights.items() if not torch.equal(v, started[k])}
    assert set(weights) == set(started) and moved == {k for k in started if 'proj' in k} and log[0]['loss'] == pytest.approx(math.log(2), abs=1e-5)
    again = dpo_stage(tiny_run, tmp_path/'again', 'dpo.lora_rank=2', 'dpo.lr=1e-2', 'dpo.epochs=4')[2]
    assert all(torch.equal(v, again[k]) for k, v in weights.items())


def test_adapters_without_peft_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ValueError, match=r'lora_rank 4 needs peft: pip install phi4_ref\[peft\]'): run.with_adapter(tiny(), 4, 0)


@pytest.mark.skipif(find_spec('trl') is None, reason='TRL is not installed: pip install phi4_ref[bench]')
@pytest.mark.parametrize('size', ['toy', 'llama'])
def test_gradient_is_that_of_trl_without_its_end_of_text(size, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent/'bench'))
    from dpo_step import gradients
    apart = gradients(size, pivots=2, trajectories=2 if size == 'toy' else 1)
    assert apart['token'] < 1e-4 and apart['trajectory'] < 1e-4 < apart['end of text']
