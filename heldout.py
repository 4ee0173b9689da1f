"""Held-out problems during a run: accuracy, greedy and of some draws. evaluate.py does more.

Where correctness is not the only reward, the rewards of the draws are measured too.
"""
import sys

import torch
from tqdm import tqdm

import dist
import report
import reward
from data import kinds_of
from rollout import draw_groups


def evaluate(sampler, tokenizer, held_out, config, rewards=()):
    """Held-out accuracy: greedy, and pass@1 of eval_samples draws; with their mean length.

    rewards: those of the run, [(name, weight, function)]. Every rank enters."""
    dist.phase("evaluation")
    with sampler.loaded():
        greedy = evaluated(sampler, tokenizer, held_out, config, 1, 0.0)
        drawn = evaluated(sampler, tokenizer, held_out, config, config.eval_samples,
                          config.temperature, rewards)

    by_kind = {f"eval_pass@1/{name}": drawn[f"right/{name}"] / drawn[f"rows/{name}"]
               for name in report.names_of(kinds_of(held_out))}
    for name, total in drawn.items():
        rows = drawn.get(f"rows/{name}", drawn["rows"])     # of a reward: where it applies
        if name.partition("/")[0] in ("reward", "rewards") and rows:
            by_kind[f"eval_{name}"] = total / rows
    return {"eval_pass@1": drawn["right"] / drawn["rows"],
            "eval_greedy": greedy["right"] / greedy["rows"],
            "eval_length": drawn["tokens"] / drawn["rows"],
            **by_kind}


def evaluated(sampler, tokenizer, held_out, config, samples, temperature, rewards=()):
    """Counts of right completions, of all, and of their tokens, and sums of rewards, over ranks."""
    mine = dist.split(len(held_out))
    problems = [held_out[i] for i in mine]
    rollout, groups = draw_groups(sampler, tokenizer, problems, samples, config.max_new_tokens,
                                  temperature, [(0, i) for i in mine])
    right = reward.correct(problems, groups)

    of_kind = {}
    others = any((name, weight) != ("correct", 1) for name, weight, _ in rewards)
    if others or rewards and config.overlong_buffer:
        correct = torch.tensor(right, dtype=torch.float64).view(len(problems), samples)
        of_kind = rewarded(rewards, problems, groups, correct, rollout, config)
    for name, chosen in report.indices_by_kind(problems, kinds_of(held_out)).items():
        of_kind[f"right/{name}"] = sum(sum(right[i]) for i in chosen)
        of_kind[f"rows/{name}"] = samples * len(chosen)
    return dist.all_reduce({
        **of_kind,
        "right": sum(map(sum, right)),
        "rows": len(rollout.lengths),
        "tokens": (rollout.lengths - rollout.prompt_lengths).sum()}, sampler.model.device)


def rewarded(rewards, problems, groups, correct, rollout, config):
    """Sums of what each reward function says, and of the weighted sum; correct (N, G) is known.

    A function that fails here is only shown to fail: training, which it would end, says so."""
    others = [function for function in rewards if function[0] != "correct"]
    try:
        found = dist.each(
            lambda: reward.parts(others, problems, groups, correct.shape[1], rollout))
    except dist.Agreed as error:
        if dist.rank() == 0:
            tqdm.write(f"warning: evaluation: {error}", file=sys.stderr)
        return {}

    found["correct"] = correct
    weights = {name: weight for name, weight, _ in rewards}
    if config.overlong_buffer:
        found["overlong"] = reward.overlong_of(rollout, correct, config)
        weights["overlong"] = 1.0
    sums = {f"rewards/{name}": found[name].nansum() for name in weights}
    sums["reward"] = sum(weight * sums[f"rewards/{name}"] for name, weight in weights.items())
    return {**sums, **{f"rows/rewards/{name}": report.applies(found[name]) for name in weights}}


def evaluate_run(run):
    """The same of a run of train.py; nothing with --eval-every 0."""
    if run.learner.config.eval_every == 0:
        return {}
    return evaluate(run.sampler_of_pi, run.tokenizer, run.held_out, run.learner.config,
                    run.reward_functions)
