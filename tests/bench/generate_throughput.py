"""Generated tokens per second on the workload of pivotal token search: our engine against transformers' `generate`.

    python tests/bench/generate_throughput.py [--quick] [--prefixes N]

Random weights of the shape of `phi4 run toy`, one checkpoint for all, float32 on the CPU. Prefixes of 30 to 90 tokens, each sampled thirty times, completions that end at random
after about 50 tokens or at 160 tokens in all, temperature 1 and top-p 1. Three rows: our model in our engine, transformers' model in our engine, and
transformers' model in its own `generate`, which pads on the left and samples a batch of 256 until its last row has ended. Only tokens up to a row's end
are counted, for all. Rounds alternate, so that a busy machine slows all three.
"""
import argparse, platform, random, statistics, tempfile, time

import torch, transformers
from transformers import AutoModelForCausalLM

from phi4_ref.config import load_config
from phi4_ref.model.generate import generate
from phi4_ref.model.pretrained import save_pretrained
from phi4_ref.model.transformer import ModelConfig, Transformer

STOPS, PAD, TOTAL, BATCH = list(range(25)), 1535, 160, 256


def engine(model, prompts): return sum(len(c.ids) for c in generate(model, prompts, max_total=TOTAL, stop_ids=STOPS, batch_size=BATCH))


@torch.no_grad()
def theirs(model, prompts):
    order, n = sorted(prompts, key=len), 0
    for at in range(0, len(order), BATCH):
        batch = order[at:at + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_length=TOTAL, eos_token_id=STOPS, pad_token_id=PAD)[:, width:]
        stop = torch.isin(out, torch.tensor(STOPS)).long()
        n += int((stop.cumsum(-1) - stop == 0).sum())
    return n


def main(prefixes, rounds):
    transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0); random.seed(0)
    ours = Transformer(ModelConfig(**load_config("toy").model.model_dump(), max_position_embeddings=1024, pad_token_id=PAD))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder + "/m")
        peer = AutoModelForCausalLM.from_pretrained(folder + "/m").eval()
    prompts = [[random.randrange(25, 1500) for _ in range(random.randint(30, 90))] for _ in range(prefixes)] * 30
    runs = {"phi4_ref": (engine, ours), "engine, their model": (engine, peer), "transformers": (theirs, peer)}
    speeds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, model) in runs.items():
            start = time.perf_counter()
            n = run(model, prompts)
            speeds[name].append(n / (time.perf_counter() - start))
    ratios = {name: [a / b for a, b in zip(speeds[name], speeds["transformers"])] for name in runs}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, {len(prompts)} rollouts")
    print(f"{'':20} {'tokens/s':>9} {'ratio':>6}")
    for name in runs: print(f"{name:20} {statistics.median(speeds[name]):9,.0f} {statistics.median(ratios[name]):6.2f}   ({', '.join(f'{s:,.0f}' for s in speeds[name])})")
    best = ratios["phi4_ref"]
    print(f"ratio: {statistics.median(best):.2f} ({min(best):.2f}-{max(best):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rollouts and rounds")
    parser.add_argument("--prefixes", type=int, help="other than 34, or 9 with --quick")
    args = parser.parse_args()
    main(args.prefixes or (9 if args.quick else 34), 3 if args.quick else 5)
