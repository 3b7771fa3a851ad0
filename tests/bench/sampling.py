"""Generated tokens per second on the workload of pivotal token search, ours against transformers' `generate`.

    python tests/bench/sampling.py [--quick]

Toy-sized random weights, the same checkpoint for both, float32 on the CPU. Prompts of 30 to 90 tokens, each sampled ten times, completions that
end at random after about 40 tokens or at 160 tokens in all. transformers pads on the left and samples batches of 256 until the last row has ended.
Only tokens up to a row's end are counted, for both.
"""
import argparse, platform, random, statistics, tempfile, time

import torch, transformers
from transformers import AutoModelForCausalLM

from phi4_ref.model.generate import generate
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.transformer import ModelConfig, Transformer

STOPS, PAD, TOTAL = list(range(25)), 1023, 160


def ours(model, prompts): return sum(len(c.ids) for c in generate(model, prompts, max_total=TOTAL, stop_ids=STOPS))


@torch.no_grad()
def theirs(model, prompts):
    order, n = sorted(prompts, key=len), 0
    for at in range(0, len(order), 256):
        batch = order[at:at + 256]
        width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_length=TOTAL, eos_token_id=STOPS, pad_token_id=PAD)[:, width:]
        ended = torch.isin(out, torch.tensor(STOPS)).long().cumsum(-1)
        n += int((ended - torch.isin(out, torch.tensor(STOPS)).long() == 0).sum())
    return n


def main(quick):
    torch.manual_seed(0); random.seed(0)
    model = Transformer(ModelConfig(1024, 192, 6, 6, 2, 512, 1024, pad_token_id=PAD))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder + "/m")
        peer = AutoModelForCausalLM.from_pretrained(folder + "/m")
    prompts = [[random.randrange(25, 1000) for _ in range(random.randint(30, 90))] for _ in range(13 if quick else 52)] * 10
    rows, ratios = {"phi4_ref": [], "transformers": []}, []
    for _ in range(3):
        for name, run, m in (("phi4_ref", ours, model), ("transformers", theirs, peer)):
            start = time.perf_counter()
            n = run(m, prompts)
            rows[name].append(n / (time.perf_counter() - start))
        ratios.append(rows["phi4_ref"][-1] / rows["transformers"][-1])
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, {len(prompts)} rollouts")
    for name, speeds in rows.items(): print(f"{name:14} {statistics.median(speeds):8,.0f} tokens/s   ({', '.join(f'{s:,.0f}' for s in speeds)})")
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
