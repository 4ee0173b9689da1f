"""What a run leaves to be read: log.jsonl, samples.jsonl, curve.png."""
import json
import math
from pathlib import Path

import dist


def write_samples(run, problems, groups, scores):
    """Some completions of this step, to be read by a person."""
    with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as f:
        for problem, texts, rewards in zip(problems, groups, scores):
            for text, score in list(zip(texts, rewards))[:4]:
                f.write(json.dumps({"step": run.step, "problem": problem["problem"], "answer": problem["answer"],
                                    "completion": text, "reward": score}, ensure_ascii=False) + "\n")


def write_line(run, line):
    if dist.rank() == 0:
        with open(run.folder / "log.jsonl", "a") as f:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            f.write(json.dumps(finite) + "\n")             # NaN is not JSON


def draw_curve(folder):
    """curve.png from log.jsonl: accuracy, reward, completion length over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in open(Path(folder) / "log.jsonl")]
    panels = (("accuracy", ("eval_pass@1", "eval_greedy")), ("training reward", ("reward",)),
              ("completion length (tokens)", ("completion_length", "eval_length")))
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4))
    for axis, (title, keys) in zip(axes, panels):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), marker="o" if key.startswith("eval") else None, markersize=3, label=key)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "curve.png", dpi=110)
    plt.close(figure)


def warn(run, line):
    """What a beginner should see at once, each in one line."""
    if run.step == 1:
        run.say(f"first rollout: {line['pass@G']:.0%} of the prompts have a right answer among {run.c.group_size} samples")
        if line["pass@G"] == 0:
            run.say("warning: pass@G is 0: with no right answer there is nothing to learn from; "
                    "use a better start (sft.py), easier problems or a larger --group-size")
    if line["truncated_frac"] == 1:
        run.say(f"warning: step {run.step}: every completion was cut at --max-new-tokens {run.c.max_new_tokens}")
