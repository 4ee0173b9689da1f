r"""How often the default run's models answer tersely or step by step, and how often each is right.

    python results/default/styles.py runs/grpo-arithmetic-seed0 runs/grpo-arithmetic-seed1 \
        runs/grpo-arithmetic-seed2

Each run folder is read before RL (warm_start) and after it (model). An answer with an equation in
it counts as one step by step.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the repository
import data
import prompts
import reward
from model import Transformer
from rollout import Sampler

PROBLEMS = 200
SAMPLES = 4         # of each problem
NEW_TOKENS = 64


def answers(folder):
    """Returns [(completion, whether it is right)] of a model on the test problems."""
    model = Transformer.from_pretrained(folder)
    tokenizer = prompts.load_tokenizer(folder)
    problems = data.load_problems("arithmetic", "test", count=PROBLEMS)
    problems = prompts.tokenize_prompts(problems, tokenizer, "auto", 512)

    sampler = Sampler(model, [tokenizer.eos_token_id])
    rollout = sampler.generate([problem["prompt"] for problem in problems], SAMPLES, NEW_TOKENS,
                               seed=[(0, i) for i in range(PROBLEMS)])
    texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    return [(text, reward.verify(text, problems[row // SAMPLES]["answer"]))
            for row, text in enumerate(texts)]


def mean(values):
    return sum(values) / len(values) if values else float("nan")


for run in sys.argv[1:]:
    for name in ("warm_start", "model"):
        graded = answers(f"{run}/{name}")
        by_steps = [right for text, right in graded if "=" in text]
        terse = [right for text, right in graded if "=" not in text]
        print(f"{run}/{name}: step by step {len(by_steps) / len(graded):.2f} of the samples, "
              f"right {mean(by_steps):.3f}; terse, right {mean(terse):.3f}")
