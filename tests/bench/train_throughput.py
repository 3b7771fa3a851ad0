"""Training tokens/s of our loop against the transformers `Trainer` with `Phi3ForCausalLM` of the same size, on the same rows.

    python tests/bench/train_speed.py [--quick]

Both train the toy model (2.8M weights, 32 rows of 256 tokens a step) with AdamW, clipping and bf16 autocast; rounds alternate, so that a busy machine slows both.
"""
import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings

warnings.filterwarnings('ignore')
import torch
import transformers

from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.train.data import MixtureBatches, make_store
from phi4_ref.train.loop import TrainSettings, train

SHAPE = dict(vocab_size=1024, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512, max_position_embeddings=256)
ROWS, CONTEXT = 32, 256

class Stopwatch(transformers.TrainerCallback):
    "The time of each optimiser step."
    def __init__(self): self.marks = []
    def on_step_begin(self, *args, **kw): self.marks.append(time.perf_counter())
    def on_step_end(self, *args, **kw): self.marks[-1] = time.perf_counter() - self.marks[-1]

def ours(steps):
    "Tokens/s of each step but the first."
    torch.manual_seed(0)
    store = dict(web=make_store([torch.randint(0, 1024, (200_000,)).numpy()], 1024))
    batches = MixtureBatches(store, dict(web=1.), CONTEXT, ROWS, steps + 1, seed=0)
    with tempfile.TemporaryDirectory() as out: rows = train(Transformer(ModelConfig(**SHAPE)), batches, TrainSettings(lr=1e-3, precision='bf16'), out, progress=False)
    return [r['tokens_per_s'] for r in rows[1:]]

def trainer(steps, out):
    "The same through `Trainer`; its time per step leaves its data loading out."
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SHAPE, pad_token_id=0, attn_implementation='sdpa', tie_word_embeddings=False)
    rows = [dict(input_ids=ids, labels=ids) for ids in torch.randint(0, 1024, (ROWS * (steps + 1), CONTEXT))]
    args = transformers.TrainingArguments(out, per_device_train_batch_size=ROWS, max_steps=steps + 1, learning_rate=1e-3, weight_decay=.1, max_grad_norm=1., optim='adamw_torch_fused',
                                          bf16=True, use_cpu=True, report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True)
    watch = Stopwatch()
    transformers.Trainer(transformers.Phi3ForCausalLM(config), args, train_dataset=rows, callbacks=[watch]).train()
    return [ROWS * CONTEXT / s for s in watch.marks[1:]]

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    rounds, steps = (2, 3) if parser.parse_args().quick else (6, 8)
    logging.disable(logging.WARNING); transformers.logging.set_verbosity_error()
    print(f'torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}')
    print(f'{"round":>5} {"ours":>10} {"Trainer":>10} {"ratio":>6}   tokens/s, best step')
    ratios = []
    for r in range(rounds):
        with tempfile.TemporaryDirectory() as out: a, b = max(ours(steps)), max(trainer(steps, out))
        ratios.append(a / b)
        print(f'{r:>5} {a:>10,.0f} {b:>10,.0f} {a / b:>6.2f}', flush=True)
    print(f'ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})')

if __name__ == '__main__': main()
