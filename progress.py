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
    """Completions that have finished, tokens so far and tokens a second, while a Sampler draws."""

    def __init__(self, completions):
        self.bar = tqdm(total=completions, desc="  drawing", unit=" completions", delay=DELAY,
                        leave=False, disable=dist.rank() > 0)
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
        running = sum(completion is not None for completion in schedule.running)
        self.tokens += running * (schedule.time - self.steps)
        self.steps = schedule.time
        finished = self.bar.total - len(schedule.waiting) - running
        speed = self.tokens / (now - self.begin)
        self.bar.set_postfix(tokens=self.tokens, tok_s=round(speed), refresh=False)
        self.bar.update(finished - self.bar.n)

    def close(self):
        self.bar.close()
