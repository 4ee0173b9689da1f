"""The machine under a run, and the frame of a program on it.

Memory that is free or was used, the fastest number of threads, and how errors and Ctrl-C end a
program. Every program imports this file first, before torch, because it says how OpenMP's threads
wait for each other.
"""
import os
import re
import resource
import signal
import sys
import timeit
import traceback
from contextlib import contextmanager

os.environ.setdefault("GOMP_SPINCOUNT", "3000")    # waiting threads soon sleep (LOG.md)
import torch

import dist

# Linux' control groups, version 2 and 1: where they are, their limit, what is used, and what of it
# can be dropped at once
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_inactive_file"))


def peak_memory_mb(device):
    """Largest memory so far in MB: of the accelerator's allocator, or of the process on CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10     # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_bytes(device):
    """Memory that a new tensor could take.

    It is that of the device, or on the CPU this process's share of the machine."""
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        unused = backend.memory_reserved() - backend.memory_allocated()
        return backend.mem_get_info()[0] + unused

    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    except (OSError, StopIteration):        # macOS
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    free = min([free, *group_bytes()])      # a container, or a job of a scheduler, may have less
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def group_bytes():
    """Returns what each control group around this process leaves it, a list of bytes.

    A container or a scheduler's job is such a group, and groups are nested. Files that were read
    and not used since (inactive_file) do not count as used, because they give way."""
    paths = [""]
    for line in text_of("/proc/self/cgroup").splitlines():
        _, _, membership = line.partition(":")      # "4:memory:/a/b", or in version 2 "0::/a/b"
        controllers, _, path = membership.partition(":")
        if controllers == "" or "memory" in controllers.split(","):
            inner = ""
            for part in path.strip("/").split("/"):
                inner += "/" + part
                paths.append(inner)

    left = []
    for root, limit_file, used_file, dropped in CGROUPS:
        for path in dict.fromkeys(paths):
            folder = f"{root}{path}/"
            limit = text_of(folder + limit_file).strip()
            if limit.isdecimal():       # version 2 says "max" where there is none
                used = number_in(folder + used_file)
                used -= min(used, number_in(folder + "memory.stat", dropped))
                left.append(max(0, int(limit) - used))
    return left


def number_in(file, name=""):
    """Returns the number in a file of the system, the one behind a name if one is given, or 0."""
    found = re.search(rf"^{name}\s*(\d+)$", text_of(file), re.MULTILINE)
    return int(found[1]) if found else 0


def text_of(file):
    """Returns the text of a file of the system, or none where it cannot be read."""
    try:
        with open(file) as opened:
            return opened.read()
    except (OSError, ValueError):
        return ""


def choose_threads(large=False):
    """The fastest CPU thread count, by a short measurement of a small or a large model's work.

    More threads are taken only for a clear gain: they lose most when others compute. At most
    PyTorch's own choice, which follows OMP_NUM_THREADS (torchrun sets it to 1)."""
    limit = torch.get_num_threads()
    counts = [2 ** k for k in range(7) if 2 ** k < limit] + [limit]
    seconds = dict.fromkeys(counts, float("inf"))
    for threads in 3 * counts:          # in turns: others may compute for a moment
        torch.set_num_threads(threads)
        seconds[threads] = min(seconds[threads], median_seconds(large))

    best = 1
    for threads in counts:
        if seconds[threads] < 0.75 * seconds[best]:
            best = threads
    torch.set_num_threads(best)
    return best


def median_seconds(large=False):
    """Seconds of a little work such as a model's, the median of five measurements."""
    rows, width = (128, 1024) if large else (2048, 128)
    x, w = torch.randn(rows, width), torch.randn(width, 3 * width)

    def work():
        return (torch.nn.functional.silu(x @ w) @ w.T).softmax(-1)
    return sorted(timeit.repeat(work, number=4, repeat=6)[1:])[2]


@contextmanager
def program(stopped=lambda: "interrupted: nothing was written"):
    """The frame around a program: an error of the user's is one line, Ctrl-C ends with code 130.

    stopped() gives the line that says after Ctrl-C how to go on. Every rank leaves the process
    group at the end."""
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w")             # for a stream that was closed before the start
    sys.stdout, sys.stderr = Shown(sys.stdout or nowhere), Shown(sys.stderr or nowhere)
    try:
        yield

    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # this one is being answered
        if os.environ.get("RANK", "0") == "0":
            print(stopped(), file=sys.stderr)
        sys.exit(130)

    except (ValueError, OSError) as error:
        dist.fail(error)

    except Exception as error:
        if dist.world() == 1:
            raise
        lost = dist.lost_contact(error)
        if not lost:        # of this rank, and before it ends: its others would wait for it
            traceback.print_exc()
        dist.fail(lost or f"rank {dist.rank()}: {dist.first_line(error)}")

    finally:
        dist.close()
        sys.stdout, sys.stderr = before


class Shown:
    """A stream for what is shown, which never ends what is computed.

    Letters that the terminal does not have are written as escapes. When nobody takes the text any
    more (`| tee` after Ctrl-C, a full disk, a closed terminal), it is dropped from then on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            self.drop()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.drop()

    def drop(self):
        """Send the rest nowhere, also what Python flushes when it ends."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):       # closed, or no file at all
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Interrupt:
    """While open, Ctrl-C and SIGTERM only ask: `asked` counts them. Ctrl-C after one stops at once.

    SIGTERM is what schedulers and torchrun send, sometimes twice; SIGHUP is a closed terminal,
    unless nohup has it ignored."""

    def __enter__(self):
        self.asked = 0
        self.before = signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self.on_signal)
        return self

    def on_signal(self, number, _):
        self.asked += 1
        if number == signal.SIGINT and self.asked > 1:
            raise KeyboardInterrupt
        print("\ninterrupted: finishing this step, then saving (Ctrl-C again to stop at once)",
              file=sys.stderr)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
