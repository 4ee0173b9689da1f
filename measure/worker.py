"""The other side of a comparison in a process of its own, which may have another environment.

    bench.py                                    measure/vllm.py, measure/llamacpp.py
    {"model": FOLDER, "prompts": ..., ...}  ->
                                            <-  {"version": ..., "check": ...}      has loaded
    {"warm": true}                          ->
                                            <-  {"seconds": 2.5, ...}               a round

Each line is one JSON object. Such a library wants its own PyTorch, or a build for this processor,
and so its own environment. `Worker` is bench.py's end and `serve` the other one, which needs
nothing but Python. Every wait is bounded. The worker's whole group of processes is killed at the
end, and by itself when its input ends.
"""
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

START_SECONDS = 900     # until the model is loaded, and compiled where the library does so
ROUND_SECONDS = 3600
# what the other Python runs: our folder stands last in its path, or our names would hide others
PROGRAM = ("import importlib, sys; sys.path.append(sys.argv[1]); "
           "importlib.import_module(sys.argv[2]).main()")


# ----------------------------------------------------------------------------------- bench.py's end

def command_of(module, python):
    """Returns the command that runs a module of measure/ by another Python."""
    root = Path(__file__).resolve().parents[1]
    return [python, "-c", PROGRAM, str(root), module]


class Worker:
    """A process that answers one line of JSON with another.

    name: of its side, for messages. environment: variables that it has beside ours. Raises
    ValueError, in one line, for a program that does not exist, an answer that is an error or does
    not come in time, and a process that has ended."""

    def __init__(self, name, command, environment=None):
        self.name = name
        if shutil.which(command[0]) is None:
            raise ValueError(f"--vs {name}: there is no program {command[0]}")

        # what the library prints is kept apart: its end says why a process has ended
        self.log = tempfile.TemporaryFile()
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            cwd=self.folder.name, env={**os.environ, **(environment or {})},
            start_new_session=True)

        self.answers = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def listen(self):
        """Queue all lines of the worker, and None behind the last one."""
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, message, seconds):
        """Returns the answer to a message, both dicts, which has to come within these seconds."""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:         # it has ended, and `listen` will see that
            pass

        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            raise ValueError(f"--vs {self.name}: no answer within {seconds} s") from None
        if line is None:
            raise ValueError(f"--vs {self.name}: its process has ended ({self.last_words()})")

        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"--vs {self.name}: an answer that is no JSON object: {line[:80]!r}")
        if "error" in answer:
            raise ValueError(f"--vs {self.name}: {answer['error']}")
        return answer

    def start(self, request):
        """Returns the worker's first answer, when it has loaded."""
        return self.ask(request, START_SECONDS)

    def round(self, warm):
        """Returns the answer of one round. warm: this round only warms up."""
        return self.ask({"warm": warm}, ROUND_SECONDS)

    def last_words(self):
        """Returns the last line that the worker printed."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 4000))
        lines = self.log.read().decode(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        return written[-1][:300] if written else "it printed nothing"

    def close(self):
        """Kill the worker and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for stream in (self.process.stdin, self.log):
            try:
                stream.close()
            except OSError:     # what was not yet written had a reader that is gone
                pass
        self.folder.cleanup()


# --------------------------------------------------------------------------------- the worker's end

def serve(load):
    """Answer line after line of standard input, until this process is killed.

    load: a function of the first message; it returns the first answer, and the function that makes
    a round. That one takes whether the round only warms up, and returns its answer. An error is
    the last answer, in one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)               # what a library prints is no answer

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    messages = queue.Queue()
    threading.Thread(target=listen_to_bench, args=(messages,), daemon=True).start()
    try:
        first, one_round = load(messages.get())
        say(first)

        before = time.process_time()
        while True:
            # a thread that polls between the rounds would slow the other side down
            message = messages.get()
            waiting = time.process_time() - before
            answer = one_round(message["warm"])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
            say({**answer, "cpu_seconds_while_waiting": waiting, "peak_memory_mb": peak})
            before = time.process_time()

    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        say({"error": kind + lines[0][:300]})


def listen_to_bench(messages):
    """Queue all messages. At their end nobody waits for an answer: this group of processes ends.

    That is so also when bench.py was killed, in the middle of a round."""
    for line in sys.stdin:
        messages.put(json.loads(line))
    os.killpg(os.getpgid(0), signal.SIGKILL)
