"""Bars for what takes long inside of a step: they appear after two seconds, and go when it ends.

What is shown is known on the host anyway, so that no device is waited for.
"""
import time

from tqdm import tqdm

import dist

DELAY = 2.0         # seconds until a bar appears
EVERY = 1.0         # seconds between looks


def bar(items, what):
    """Returns the items of a list, with a bar over them on the first rank."""
    return tqdm(items, desc=f"  {what}", delay=DELAY, leave=False, disable=dist.rank() > 0)


class RolloutBar:
    """Finished completions, tokens, tokens a second and the time left, while a Sampler draws.

    limits: the most tokens of each completion."""

    def __init__(self, limits):
        # tqdm's own guess needs a first completion, and all may be drawn at once; and without
        # miniters=0 it would stand still between two that finish
        self.bar = tqdm(total=len(limits), desc="  drawing", unit=" completions", delay=DELAY,
                        leave=False, disable=dist.rank() > 0, miniters=0,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        self.longest = max(limits)
        self.begin = time.perf_counter()
        self.next_look = self.begin + EVERY
        self.steps = 0              # of the sampler, at the last look
        self.tokens = 0             # about: a completion counts until a look finds it finished

    def look(self, schedule):
        """Show how far an engine.batching.Schedule is, once a second."""
        now = time.perf_counter()
        if now < self.next_look:
            return
        self.next_look = now + EVERY
        running = [age for completion, age in zip(schedule.running, schedule.ages())
                   if completion is not None]
        self.tokens += len(running) * (schedule.time - self.steps)
        self.steps = schedule.time

        finished = self.bar.total - len(schedule.waiting) - len(running)
        ages = running + [0] * len(schedule.waiting)
        speed = self.tokens / (now - self.begin)
        seconds = self.tokens_left(ages, finished) / speed if speed else 0
        self.bar.set_postfix(left=self.bar.format_interval(seconds), tokens=self.tokens,
                             tok_s=round(speed), refresh=False)
        self.bar.update(finished - self.bar.n)

    def tokens_left(self, ages, finished):
        """Estimate the tokens that are still to be drawn.

        ages: of each completion that has not finished, its tokens so far. Were the chance to stop
        the same at each token, a completion would go on for tokens / finished more, the mean length
        (of all that has been drawn, so that the short ones, which finish first, do not bias it)."""
        mean = self.tokens / finished if finished else self.longest
        return sum(min(mean, max(0, self.longest - age)) for age in ages)

    def close(self):
        self.bar.close()
