"""How often the default run's models answer tersely or step by step, and how often each is right, before and after RL.

    python results/default/styles.py runs/grpo-arithmetic-seed0 runs/grpo-arithmetic-seed1 runs/grpo-arithmetic-seed2
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the repository
import data
import prompts
import reward
from model import Transformer
from rollout import Sampler

for run in sys.argv[1:]:
    for name in ("warm_start", "model"):
        model, tokenizer = Transformer.from_pretrained(f"{run}/{name}"), prompts.load_tokenizer(f"{run}/{name}")
        problems = prompts.tokenize_prompts(data.load_problems("arithmetic", "test", count=200), tokenizer, "auto", 512)
        rollout = Sampler(model, [tokenizer.eos_token_id]).generate(
            [p["prompt"] for p in problems], 4, 64, seed=[(0, i) for i in range(200)])
        texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
        right = {True: [], False: []}
        for i, text in enumerate(texts):
            right["=" in text].append(reward.verify(text, problems[i // 4]["answer"]))
        mean = {steps: sum(x) / len(x) if x else float("nan") for steps, x in right.items()}
        print(f"{run}/{name}: step by step {len(right[True]) / len(texts):.2f} of the samples, right {mean[True]:.3f}; "
              f"terse, right {mean[False]:.3f}")
