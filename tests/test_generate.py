"""Sampling: equal to transformers and to a plain loop, the same in any batch, and from the distribution it claims."""
import copy, math, random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.stats import chisquare, kstest
from torch._subclasses.fake_tensor import FakeTensorMode
import transformers
from transformers import AutoModelForCausalLM

import phi4_ref.model.generate as module
from phi4_ref.model.generate import Decoder, batch_shape, draw, generate, in_batches, inference, logprobs, nucleus_floor, policy, refill, rows_that_fit, share_prefixes, uniform
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.transformer import PHI4_14B, ModelConfig, Transformer, sdpa_attention

QUIET = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG)


def ragged(n, longest=30, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(64) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def plain(model, prompt, seed, limit, temperature=1.0, top_p=1.0, stop_ids=()):
    "One row, no cache, the policy written out: the specification."
    ids, scores = list(prompt), []
    while len(ids) < limit:
        out = model(torch.tensor([ids]))
        logits = getattr(out, "logits", out)[0, -1].double()
        if temperature == 0: probs = torch.zeros_like(logits); probs[logits.argmax()] = 1
        else:
            probs = (logits / temperature).softmax(-1)
            order = probs.argsort(descending=True)
            kept, mass = [], 0.0
            for token in order.tolist():
                if mass >= top_p: break
                kept.append(token); mass += probs[token].item()
            probs = torch.zeros_like(probs).index_copy(0, torch.tensor(kept), probs[kept] / probs[kept].sum())
        u, total = uniform([seed], len(ids))[0], 0.0
        for token, p in enumerate(probs.tolist()):
            total += p
            if total > u: break
        ids.append(token); scores.append(math.log(probs[token].item()))
        if token in stop_ids: break
    return ids[len(prompt):], scores


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.7), dict(top_p=0.8), dict(temperature=1.5, top_p=0.9), dict(temperature=0)])
def test_batched_is_plain(model, how):
    prompts = ragged(8, 20) * 2 + [[5] * 30]
    expected = [plain(model, p, i, 30, stop_ids=[5, 6, 7], **how) for i, p in enumerate(prompts)]
    for batch_size in (1, 7, 256):
        for prompt, (ids, scores), c in zip(prompts, expected, generate(model, prompts, max_total=30, stop_ids=[5, 6, 7], batch_size=batch_size, **how)):
            assert c.ids == ids and np.allclose(c.logprobs, scores, atol=1e-4)
            assert c.finished == (bool(ids) and ids[-1] in (5, 6, 7)) and (c.finished or len(prompt) + len(ids) == 30)


def test_greedy_is_transformers(model, tmp_path):
    save_pretrained(model, tmp_path / "m")
    theirs, prompts = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), ragged(10)
    ours = generate(model, prompts, max_new_tokens=25, temperature=0, stop_ids=[1, 2])
    for prompt, c in zip(prompts, ours):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False)[0, len(prompt):].tolist()
        assert c.ids == expected


def test_batch_and_order_do_not_matter(model):
    prompts = ragged(40)
    once = generate(model, prompts, max_new_tokens=20, top_p=0.9, stop_ids=[9])
    order = random.Random(1).sample(range(40), 40)
    again = generate(model, [prompts[i] for i in order], max_new_tokens=20, top_p=0.9, stop_ids=[9], seeds=order, batch_size=5)
    alone = [generate(model, [prompts[i]], max_new_tokens=20, top_p=0.9, stop_ids=[9], seeds=[i])[0] for i in range(8)]
    for i, c in zip(order, again): assert c.ids == once[i].ids and np.allclose(c.logprobs, once[i].logprobs, atol=1e-4)
    for a, c in zip(alone, once): assert a.ids == c.ids


def test_seeds(model):
    prompt = [[1, 2, 3]]
    a, b, c = (generate(model, prompt, max_new_tokens=20, seeds=[seed])[0].ids for seed in (0, 0, 2**64 - 1))
    assert a == b != c
    assert len({tuple(x.ids) for x in generate(model, prompt * 50, max_new_tokens=20)}) == 50, "equal prompts, different samples"


def test_a_cut_completion_goes_on_as_it_was(model):
    prompt = [4, 5, 6]
    whole = generate(model, [prompt], max_total=30, seeds=[11])[0].ids
    for c, k in zip(generate(model, [prompt + whole[:k] for k in range(27)], max_total=30, seeds=[11] * 27), range(27)): assert c.ids == whole[k:]


def test_lengths(model):
    prompts = [[1] * 10, [2] * 20, [3] * 30, [4] * 31]
    assert [len(c.ids) for c in generate(model, prompts, max_total=30)] == [20, 10, 0, 0]
    assert [len(c.ids) for c in generate(model, prompts, max_new_tokens=7)] == [7] * 4
    assert [len(c.ids) for c in generate(model, prompts, max_new_tokens=15, max_total=30)] == [15, 10, 0, 0]
    assert [len(c.ids) for c in generate(model, prompts)] == [118, 108, 98, 97]
    assert [len(c.ids) for c in generate(model, prompts, max_new_tokens=0)] == [0] * 4
    assert generate(model, []) == []


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_policy(model, top_p):
    with torch.no_grad(): probs = policy(model(torch.tensor([[1, 2, 3]]))[:, -1], 1.3, top_p)[0].double().numpy()
    counts = np.bincount([c.ids[0] for c in generate(model, [[1, 2, 3]] * 6000, max_new_tokens=1, temperature=1.3, top_p=top_p)], minlength=64)
    assert not counts[probs == 0].any()
    big = probs * 6000 >= 5
    f_obs, f_exp = np.append(counts[big], counts[~big].sum()), np.append(probs[big], probs[~big].sum()) * 6000
    if f_exp[-1] == 0: f_obs, f_exp = f_obs[:-1], f_exp[:-1]
    assert chisquare(f_obs, f_exp * f_obs.sum() / f_exp.sum()).pvalue > 1e-3


def test_joint_frequencies_of_two_tokens():
    torch.manual_seed(3)
    small = Transformer(ModelConfig(4, 16, 1, 2, 1, 16, 16, initializer_range=0.5))
    pairs = np.bincount([4 * c.ids[0] + c.ids[1] for c in generate(small, [[0]] * 8000, max_new_tokens=2)], minlength=16)
    with torch.no_grad():
        first = policy(small(torch.tensor([[0]]))[:, -1])[0]
        joint = torch.stack([first[t] * policy(small(torch.tensor([[0, t]]))[:, -1])[0] for t in range(4)]).flatten().double().numpy()
    assert chisquare(pairs, 8000 * joint / joint.sum()).pvalue > 1e-3


def test_noise_is_uniform_and_unrelated():
    u = uniform(np.arange(300)[:, None], np.arange(200)[None])
    assert len(np.unique(u)) == u.size and 0 < u.min() < u.max() < 1
    assert kstest(u.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:])): assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert uniform([7], [9]) == uniform(np.arange(10)[:, None], np.arange(10))[7, 9]
    assert uniform([0], [0])[0] == uniform([0], [0])[0] and uniform([2**64 - 1], [5]).shape == (1,)


@settings(max_examples=60, **QUIET)
@given(st.integers(0, 10**6), st.floats(0.05, 0.999), st.sampled_from([0.01, 1.0, 6.0]), st.integers(1, 300))
def test_nucleus_is_the_smallest_set_of_that_mass(seed, top_p, scale, size):
    probs = (scale * torch.randn(3, size, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    floor = nucleus_floor(probs, top_p)
    assert torch.equal(floor, nucleus_floor(probs, top_p, first=size))
    for row, least in zip(probs.double(), floor[:, 0].double()):
        assert row[row >= least].sum() >= top_p - 1e-5 and row[row > least].sum() < top_p + 1e-5
    kept = policy(probs.log(), 1.0, top_p)
    assert ((kept > 0) == (probs.log().softmax(-1) >= nucleus_floor(probs.log().softmax(-1), top_p))).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(3))


def test_draw_never_takes_an_impossible_token():
    probs = torch.tensor([[0, .5, 0, .5, 0]]).repeat(1000, 1)
    u = torch.cat([torch.linspace(0, 1, 998, dtype=torch.float64)[1:-1], torch.tensor([2**-49, 0.5, 1 - 2**-49, .25], dtype=torch.float64)])
    assert set(draw(probs, u).tolist()) == {1, 3}


@pytest.mark.parametrize("size", [49_152, 100_352, 200_064])
def test_draw_is_exact_on_a_large_vocabulary(size):
    "Equal probabilities: u falls on token u * size. Sums in float32 would drift by a token, and past the last one."
    probs, u = torch.full((1, size), 1 / size), torch.tensor([*np.linspace(0.03, 0.97, 20), 1 - 2**-49], dtype=torch.float64)
    assert [draw(probs, x[None]).item() for x in u] == [int(x * size) for x in u.tolist()]
    assert draw(torch.tensor([[.5, .5]]), torch.tensor([.5]).double()) == 1, "a sum has to pass u"


def test_draw_reaches_what_float32_sums_would_swallow():
    "0.5 + (0.5 - 2**-25) is 1 in float32, and nothing would be left for the third token."
    assert draw(torch.tensor([[.5, .5 - 2**-25, 2**-26]]), torch.tensor([1 - 2**-49], dtype=torch.float64)) == 2


@settings(max_examples=100, **QUIET)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=20))
def test_prefixes_are_shared(prompts):
    hosts, host_of = share_prefixes(prompts)
    for prompt, i in zip(prompts, host_of): assert list(hosts[i][:len(prompt)]) == prompt
    for a in hosts: assert not any(a != b and b[:len(a)] == a for b in hosts)


@settings(**QUIET)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_batches_hold_every_row_once(lengths):
    batches = in_batches([[0] * n for n in lengths], max_tokens=60)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches: assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 60


def test_equal_beginnings_are_run_once(model, monkeypatch):
    seen = []
    real = Transformer.hidden
    def count(self, ids, *rest): seen.append(ids.shape); return real(self, ids, *rest)
    monkeypatch.setattr(Transformer, "hidden", count)
    generate(model, [[1, 2, 3, 4, 5]] * 10 + [[1, 2, 3]] * 10 + [[1, 2, 9]] * 10, max_new_tokens=3)
    assert seen[0] == (2, 5) and all(shape == (30, 1) for shape in seen[1:])


def test_the_batch_stays_full(model, monkeypatch):
    rows, live = [], []
    real = module.Decoder.step
    def count(self, ids, alive): rows.append(len(ids)); live.append(len(alive)); return real(self, ids, alive)
    monkeypatch.setattr(module.Decoder, "step", count)
    done = generate(model, ragged(200), max_total=120, stop_ids=[1, 2, 3, 4], batch_size=32)
    assert sum(live) / sum(rows) > 0.85 and max(rows) == 32
    assert sum(live) == sum(len(c.ids) - 1 for c in done), "a row is run once for each of its tokens but the last"


def test_scores_are_those_of_the_samples(model):
    prompts = ragged(20)
    done = generate(model, prompts, max_new_tokens=15)
    for prompt, c, score in zip(prompts, done, logprobs(model, [p + c.ids for p, c in zip(prompts, done)])):
        assert len(score) == len(prompt) + 15 and score[0] == 0 and np.allclose(score[len(prompt):], c.logprobs, atol=1e-4)
    assert logprobs(model, [[5]]) == [[0.0]] and logprobs(model, []) == []


def test_long_scores_are_cut_in_rows(model):
    ids = ragged(1, 1)[0] * 1500
    with torch.no_grad(): whole = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)[range(1499), ids[1:]]
    assert np.allclose(logprobs(model, [ids, ids[:7]])[0][1:], whole, atol=1e-4)


def test_bfloat16_weights(model):
    rough = copy.deepcopy(model).bfloat16()
    done = generate(rough, ragged(20), max_new_tokens=10)
    assert all(len(c.ids) == 10 for c in done)
    with torch.autocast("cpu", torch.bfloat16): assert all(len(c.ids) == 10 for c in generate(model, ragged(20), max_new_tokens=10))


def test_the_policy_of_bfloat16_weights_is_float32(model):
    "What is drawn from and what is reported are of one distribution that sums to 1, not of one rounded to 8 bits."
    rough = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        decoder = Decoder(rough, 2, 8)
        decoder.admit([0, 1], [[1, 2, 3], [4]])
        ids_R, scores = decoder.sample([0, 1], 1.0, 1.0)
        assert decoder.cache.k_LBKSD.dtype == torch.bfloat16
        for row in range(2): assert scores[row] == pytest.approx(decoder.logits_RV[row].double().log_softmax(-1)[ids_R[row]].item(), abs=1e-6)
        decoder.step(ids_R, [0, 1])
        probs = policy(decoder.logits_RV, 0.7, 0.9)
    assert decoder.logits_RV.dtype == probs.dtype == torch.float32 and (probs.sum(-1) - 1).abs().max() < 1e-6
    scores = [score for c in generate(rough, ragged(20), max_new_tokens=10) for score in c.logprobs]
    assert np.mean([score == float(torch.tensor(score).bfloat16()) for score in scores]) < 0.1


# --- where it runs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gpu, bf16, launched, then", [(False, True, None, ("cpu", torch.float32)), (True, True, None, ("cuda", torch.bfloat16)), (True, False, None, ("cuda", torch.float32)), (True, True, "true", ("cpu", torch.float32))])
def test_where_a_model_runs_that_is_not_trained(gpu, bf16, launched, then, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    if launched: monkeypatch.setenv("ACCELERATE_USE_CPU", launched)
    else: monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    found = inference()
    assert (found["device"].type, found["dtype"]) == then and found["device"].index == (3 if then[0] == "cuda" else None)


def test_rows_that_fit_into_memory():
    "phi-4 beside its 29 GB: what is taken, with what is put aside, is never more than there is, and another row would be."
    slot = 2 * 40 * 10 * 128 * 2
    for free in (8e9, 20e9, 50e9, 112e9):
        for length in (1024, 4096, 16_384):
            rows = rows_that_fit(PHI4_14B, length, int(free))
            taken = lambda rows: rows * (length * slot + 40 * 100_352) + 2 * 16_384 * slot
            assert rows == 1 or taken(rows) <= 0.9 * free < taken(rows + 1)
    assert rows_that_fit(PHI4_14B, 1024, 50 * 10**9) > 150 and rows_that_fit(PHI4_14B, 4096, 10**9) == 1
    assert rows_that_fit(PHI4_14B, 4096, 50 * 10**9, number_bytes=4) <= rows_that_fit(PHI4_14B, 4096, 50 * 10**9) // 2


def test_a_gpus_batch_is_what_fits(model, monkeypatch):
    "As many rows as fit at the greatest length, made at that length; on a CPU all rows, with a cache that grows."
    assert batch_shape(model, 256, 40, 128) == (256, 40)
    monkeypatch.setattr(module, "free_bytes", lambda device: 10**7)
    class OnGPU(Transformer):
        def parameters(self): yield torch.empty(1, device="cuda")
    with FakeTensorMode():  # tensors of a GPU, without numbers in them
        fake = OnGPU(CONFIG)
        rows, length = batch_shape(fake, 256, 40, 128)
        assert length == 128 and rows == rows_that_fit(CONFIG, 128, 10**7, 4) < 256
        assert batch_shape(fake, 3, 40, 128) == (3, 128)


def test_a_step_takes_the_layout_of_a_gpus_kernel(monkeypatch):
    "The memory-efficient kernel gives its output as (batch, query, head, dimension), transposed."
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v, mask: efficient(q, k, v, mask.expand(*q.shape[:3], -1), False)[0])
    q, k = torch.empty(2, 6, 1, 8, device="meta"), torch.empty(2, 2, 5, 8, device="meta")
    assert sdpa_attention(q, k, k, torch.zeros(2, 1, 5, device="meta")).shape == q.shape


def test_interrupting_changes_nothing(model, monkeypatch):
    before, calls = generate(model, ragged(5), max_new_tokens=10), []
    real = Transformer.hidden
    def interrupt(self, *a):
        calls.append(0)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(self, *a)
    monkeypatch.setattr(Transformer, "hidden", interrupt)
    with pytest.raises(KeyboardInterrupt): generate(model, ragged(5), max_new_tokens=10)
    monkeypatch.undo()
    assert torch.is_grad_enabled() and generate(model, ragged(5), max_new_tokens=10) == before


@pytest.mark.parametrize("message, call", [("prompt 1 is empty", dict(prompts=[[1], []])), ("ids 1 to 64", dict(prompts=[[1, 64]])),
    ("1 seeds for 2 prompts", dict(prompts=[[1], [2]], seeds=[3])), ("temperature=-1", dict(prompts=[[1]], temperature=-1)), ("top_p=0", dict(prompts=[[1]], top_p=0))])
def test_user_errors_are_named(model, message, call):
    with pytest.raises(ValueError, match=message): generate(model, **call)


def test_an_empty_sequence_is_named(model):
    with pytest.raises(ValueError, match="empty sequence"): logprobs(model, [[1], []])


def test_a_diverged_model_is_named(model):
    broken = copy.deepcopy(model)
    with torch.no_grad(): broken.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite"): generate(broken, [[1, 2]], max_new_tokens=3)


SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
PEERS = {"llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=1)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, num_key_value_heads=2))}


@pytest.fixture(scope="module", params=PEERS)
def peer(request):
    torch.manual_seed(1)
    return PEERS[request.param]().eval()


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.7, top_p=0.8), dict(temperature=0)])
def test_any_causal_model_is_sampled_as_by_a_plain_loop(peer, how):
    prompts = ragged(7, 20) * 2 + [[5] * 30, [7]]
    expected = [plain(peer, p, i, 30, stop_ids=[5, 6, 7], **how) for i, p in enumerate(prompts)]
    for batch_size in (1, 6, 256):
        for (ids, scores), c in zip(expected, generate(peer, prompts, max_total=30, stop_ids=[5, 6, 7], batch_size=batch_size, **how)):
            assert c.ids == ids and np.allclose(c.logprobs, scores, atol=1e-4)


def test_any_causal_model_scores_its_samples(peer):
    prompts = ragged(9)
    done = generate(peer, prompts, max_new_tokens=9)
    for prompt, c, score in zip(prompts, done, logprobs(peer, [p + c.ids for p, c in zip(prompts, done)])):
        assert score[0] == 0 and np.allclose(score[len(prompt):], c.logprobs, atol=1e-4)


@settings(max_examples=25, **QUIET)
@given(st.data())
def test_what_shares_the_batch_does_not_matter(model, data):
    "Prompts that extend each other, in any order, in any batch, with any company: each row is what it is alone."
    tree = [data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=12)) for _ in range(data.draw(st.integers(1, 4)))]
    prompts = [root[:data.draw(st.integers(1, len(root)))] for root in tree for _ in range(data.draw(st.integers(1, 5)))]
    seeds = [data.draw(st.integers(0, 2**64 - 1)) for _ in prompts]
    how = dict(max_total=data.draw(st.integers(2, 24)), top_p=data.draw(st.sampled_from([1.0, 0.8])), stop_ids=[3, 4, 5, 6])
    done = generate(model, prompts, seeds=seeds, batch_size=data.draw(st.integers(1, 9)), **how)
    for prompt, seed, c in zip(prompts, seeds, done):
        [alone] = generate(model, [prompt], seeds=[seed], **how)
        assert c.ids == alone.ids and c.finished == alone.finished and np.allclose(c.logprobs, alone.logprobs, atol=1e-4)


@settings(max_examples=50, **QUIET)
@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_dropping_rows_keeps_the_others(model, live):
    decoder = Decoder(model, len(live), 4)
    mark = torch.arange(1.0, len(live) + 1)
    decoder.cache.k_LBKSD += mark[:, None, None, None]
    decoder.cache.v_LBKSD -= mark[:, None, None, None]
    decoder.logits_RV += mark[:, None]
    decoder.position_R += mark.long().numpy()
    owner = refill(decoder, [i if alive else None for i, alive in enumerate(live)], [], [])
    assert sorted(i for i in owner if i is not None) == [i for i, alive in enumerate(live) if alive]
    assert None not in owner or 8 * owner.count(None) < len(owner) or len(owner) == len(live) and 8 * live.count(False) < len(live)
    for row, i in enumerate(owner):
        if i is None: continue
        assert (decoder.cache.k_LBKSD[:, row] == i + 1).all() and (decoder.cache.v_LBKSD[:, row] == -i - 1).all()
        assert (decoder.logits_RV[row] == i + 1).all() and decoder.position_R[row] == i + 1


def test_the_cache_is_made_once(model, monkeypatch):
    made, grown = [], []
    real_cache, real_grow = module.KVCache, module.grow_cache
    monkeypatch.setattr(module, "KVCache", lambda *a: made.append(a[1:3]) or real_cache(*a))
    monkeypatch.setattr(module, "grow_cache", lambda *a: grown.append(a) or real_grow(*a))
    generate(model, ragged(60), max_total=100, stop_ids=[1, 2, 3], batch_size=16)
    assert made[0] == (16, 100) and not grown, "one cache, in the size of the longest sequence"
    decoder = Decoder(model, 1, 3)
    with torch.no_grad():
        decoder.admit([0], [[1, 2, 3]])
        decoder.step(torch.tensor([4]), [0])
    assert len(grown) == 1, "a sequence that outgrows what was foreseen"


def test_models_without_slots_are_refused():
    small = SMALL | dict(num_key_value_heads=2)
    windowed = transformers.MistralForCausalLM(transformers.MistralConfig(**small, sliding_window=16)).eval()
    with pytest.raises(ValueError, match="MistralForCausalLM attends to 16 tokens at a time and sequences may have 40"): generate(windowed, [[1, 2]], max_total=40)
    prompts = ragged(6, 10)
    for i, (prompt, c) in enumerate(zip(prompts, generate(windowed, prompts, max_total=16))): assert c.ids == plain(windowed, prompt, i, 16)[0]
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    for other in (bloom, mamba):
        with pytest.raises(ValueError, match=f"{type(other).__name__} cannot be sampled by this engine"): generate(other, [[1, 2]], max_total=16)
    with pytest.raises(ValueError, match="states no context length"): generate(bloom, [[1, 2]])
    with pytest.raises(ValueError, match="training mode"): generate(PEERS["llama"]().train(), [[1]], max_new_tokens=1)
