"""Supervised warm start: cross-entropy on the completion tokens of worked solutions, before any reinforcement.

    loss = - sum over completion tokens of log pi(token | what precedes it) / their number

RL can only strengthen what the model already does now and then, so a random model has to be shown answers first. The
built-in task shows it two habits, all answers correct: most solutions are cut down to their last line ("#### 12"),
the rest is told step by step. Which habit earns rewards is left for train.py to discover.

    python sft.py --data gsm8k_train.jsonl --out runs/warm       a new small model and its own tokenizer
    python sft.py --data FILE.jsonl --model DIR --out DIR        or an existing checkpoint
"""
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import prompts
import dist
from config import check_settings, command_line, parse_levels, refuse_torchrun
from model import ModelConfig, Transformer


@dataclass
class SFTConfig:
    data: str = "arithmetic"          # arithmetic, gsm8k, math, or a .jsonl with solutions
    out: str = "runs/warm"            # receives the checkpoint, in HF layout
    model: str = ""                   # checkpoint to start from; empty: a new model of the shape below
    hidden_size: int = 96             # of a new model
    layers: int = 4                   # of a new model
    heads: int = 4                    # of a new model; half as many key-value heads
    vocab_size: int = 512             # of a new model: the tokenizer is trained on the data
    max_length: int = 512             # longest prompt + completion in tokens; longer ones are dropped
    terse_steps: int = 0              # optimizer steps of a second stage that mixes terse answers in
    terse_share: float = 0.7          # share of its solutions that are cut down to their last line
    problems: int = 20000             # of the built-in task
    levels: str = "4-6"               # of the built-in task: fewest-most steps
    steps: int = 1000                 # optimizer steps on full solutions
    batch_size: int = 16              # sequences an optimizer step
    lr: float = 2e-3                  # peak; linear warm-up over a tenth, then cosine to a tenth
    weight_decay: float = 0.01
    template: str = "auto"            # auto, chat, plain, reasoning: see prompts.prompt_text
    seed: int = 0
    device: str = ""                  # cpu, cuda, npu; empty: the accelerator that is here
    threads: int = 0                  # CPU threads; 0: measured


def completion_text(problem, terse):
    """What the model shall write: the worked solution, or its last line alone."""
    solution = problem.get("solution") or f"#### {problem['answer']}"
    return solution.rstrip().rsplit("\n", 1)[-1] if terse else solution


def corpus(problems, tokenizer, config, terse_share=0.0):
    """Problems -> [(prompt ids, completion ids with eos)], a share of them terse, chosen by seed."""
    rng = random.Random(f"terse/{config.seed}")
    questions = prompts.encode_prompts(problems, tokenizer, config.template)
    texts = [completion_text(p, rng.random() < terse_share) for p in problems]
    completions = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pairs = [(p, c + [tokenizer.eos_token_id]) for p, c in zip(questions, completions)]
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= config.max_length]
    if len(kept) < len(pairs):
        tqdm.write(f"sft: dropped {len(pairs) - len(kept)} of {len(pairs)} solutions longer than {config.max_length} tokens")
    if not kept:
        raise ValueError(f"every solution is longer than --max-length {config.max_length} tokens")
    return kept


def batches(pairs, size, steps, seed):
    """`steps` batches. Within a window of 16 batches sequences of similar length meet, so that padding stays small."""
    rng, order = random.Random(f"sft/{seed}"), []
    ready = []
    for _ in range(steps):
        if not ready:
            while len(order) < 16 * size:
                order += rng.sample(range(len(pairs)), len(pairs))
            window, order = order[:16 * size], order[16 * size:]
            window.sort(key=lambda i: sum(map(len, pairs[i])))
            ready = [window[k:k + size] for k in range(0, len(window), size)]
            rng.shuffle(ready)
        yield [pairs[i] for i in ready.pop()]


def collate(batch, device):
    """[(prompt, completion)] -> tokens (B, T) right-padded with 0 and mask (B, T) of the completion tokens."""
    T = max(len(p) + len(c) for p, c in batch)
    tokens, mask = torch.zeros(len(batch), T, dtype=torch.int64), torch.zeros(len(batch), T)
    for row, (p, c) in enumerate(batch):
        tokens[row, :len(p) + len(c)] = torch.tensor(p + c)
        mask[row, len(p):len(p) + len(c)] = 1
    return tokens.to(device), mask.to(device)


def learning_rate(step, config):
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, config.steps // 10)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(model, pairs, config, progress=True):
    """Minimise the cross-entropy in place; returns the mean loss (nats a token) of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    # the mean batch's tokens, not this batch's: batches of similar length must not make short answers weigh more
    normalizer = config.batch_size * sum(len(c) for _, c in pairs) / len(pairs)
    losses = []
    bar = tqdm(batches(pairs, config.batch_size, config.steps, config.seed), total=config.steps, desc="warm start",
               disable=not progress)
    for step, batch in enumerate(bar):
        tokens, mask = collate(batch, model.device)
        loss = -model.token_logps(tokens, mask)[0].sum() / normalizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, config.steps // 10):]
    return sum(last) / len(last)


def build(problems, config):
    """A new tokenizer, trained on the problems and solutions, and a new random model of the configured shape."""
    texts = [t for p in problems for t in (p["problem"] + "\n", completion_text(p, False))]
    tokenizer = prompts.train_tokenizer(texts, config.vocab_size)
    shape = ModelConfig(vocab_size=len(tokenizer), hidden_size=config.hidden_size, num_hidden_layers=config.layers,
                        intermediate_size=3 * config.hidden_size, num_attention_heads=config.heads,
                        num_key_value_heads=max(1, config.heads // 2), head_dim=config.hidden_size // config.heads,
                        eos_token_id=tokenizer.eos_token_id)
    return Transformer(shape).init_weights(config.seed), tokenizer


def warm_start(config, progress=True):
    """Run the whole thing: data, model, training, checkpoint in config.out. Returns (model, tokenizer)."""
    levels, device = parse_levels(config.levels), config.device or "cpu"
    problems = data.load_problems(config.data, "train", config.seed, levels, config.problems)
    if config.model:
        model = Transformer.from_pretrained(config.model, device)
        tokenizer = prompts.load_tokenizer(config.model)
    else:
        model, tokenizer = build(problems, config)
        model.to(device)
    loss = train(model, corpus(problems, tokenizer, config), config, progress)
    if config.terse_steps:
        second = replace(config, steps=config.terse_steps, lr=config.lr / 4)
        loss = train(model, corpus(problems, tokenizer, config, config.terse_share), second, progress)
    model.save_pretrained(config.out)
    prompts.save_tokenizer(tokenizer, config.out)
    tqdm.write(f"sft: loss {loss:.3f} nats a token after {config.steps + config.terse_steps} steps, model in {config.out}")
    return model, tokenizer


def main(argv=None):
    try:
        config = SFTConfig(**command_line(SFTConfig, __doc__, argv))
        least = dict.fromkeys(("hidden_size", "layers", "heads", "vocab_size", "max_length", "problems", "steps", "batch_size"), 1)
        check_settings(config, {}, {**least, "terse_steps": 0})
        if config.hidden_size % (2 * config.heads):
            raise ValueError(f"--hidden-size {config.hidden_size} must be a multiple of 2 x --heads {config.heads}")
        if Path(config.out).exists() and any(Path(config.out).iterdir()):
            raise ValueError(f"--out {config.out} is not empty: choose another folder")
        refuse_torchrun("sft.py")
        if not (0 < config.lr < math.inf and 0 <= config.terse_share <= 1):
            raise ValueError(f"--lr {config.lr} must be above 0 and --terse-share {config.terse_share} between 0 and 1")
        config.device = str(dist.setup(config.device))
        torch.set_num_threads(config.threads or machine.choose_threads())
        warm_start(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: no checkpoint written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
