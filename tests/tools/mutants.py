"""Which small faults do the tests not see? Mutation testing of the kernels and the modules on them.

    python tests/tools/mutants.py --count 600 --seed S

draws mutants (see `schemata.py`) from all that there are in FILES, compiles them together in one
build behind a switch, records which tests reach which mutant, and runs for each mutant the tests
that reach it until one fails. It writes tests/tools/mutants.txt: how many were killed, and every
survivor as a difference. A mutant counts as killed by an error, a crash and a hang, too.

It needs Linux, GCC and an environment in which the tests run; it is not part of CI. Everything is
kept in build/mutants, so that a run goes on where the last one stopped, and tries the survivors
again: the tests may have changed. Where the sources, the count or the seed are others it begins
anew.

A survivor is a test that is missing, or it changes nothing that a test may ask for. For those the
reasons are in tests/tools/equivalent.txt, by function and text, so that they are given once:
`equivalent: ...` where no result differs, `slower only: ...` where only speed or memory does,
`sanitizer: ...` where what stops is another run of CI: the address sanitizer, the build with every
index checked, or memcheck.

A single variant of the kernels is built. What the compiler resolves is not mutated, constants
among it: those of an `enum` can have no switch.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import schemata

CHECKOUT = Path(__file__).resolve().parents[2]
REPORT = CHECKOUT / "tests/tools/mutants.txt"
REASONS = CHECKOUT / "tests/tools/equivalent.txt"
WORK = CHECKOUT / "build/mutants"
SITE = WORK / "site"  # where the package with the mutants is installed

FILES = ["kernels/*.pxi", "kernels/kernels.pyx", "functional.pyx", "_calls.pyx", "_resources.pyx",
         "_layout.pyx", "_arguments.py", "_buffers.pyx", "layer.py", "_state.py",
         "_attributes.py"]  # fmt: skip
TESTS = ["functional", "layer", "kernels", "activation", "paths", "accuracy", "buffers", "threads",
         "same_bits", "memory", "processes", "masks", "micro_batch", "sync", "folding",
         "ghosts"]  # fmt: skip
# What sees most mutants of the kernels, though it takes seconds.
DIGESTS = "tests/test_threads.py::test_every_variant_has_the_committed_digests"

PATIENCE = 30  # seconds that a test may take, besides ten times what it takes without a mutant
LOADING = 120  # seconds until all tests are collected
POLL = 0.02  # seconds between two looks at a child
MEMORY = 8 << 30  # bytes of address space

KINDS = ["not run", "survived", "killed", "sanitizer", "equivalent", "slower only"]

# The number of the mutant in force is a constant for loops, so that they stay fast.
SWITCH = """\
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

static int bn_chosen;            /* 0: none; -1: none, and those that are reached are recorded */
static unsigned char *bn_seen;

__attribute__((visibility("default"), used)) void bn_choose(int number) { bn_chosen = number; }

__attribute__((constructor)) static void bn_begin(void) {
    const char *number = getenv("BN_CY_MUTANT"), *seen = getenv("BN_CY_MUTANTS_SEEN");
    bn_chosen = number ? atoi(number) : 0;
    if (bn_chosen < 0)
        bn_seen = mmap(NULL, %d, PROT_READ | PROT_WRITE, MAP_SHARED, open(seen, O_RDWR), 0);
}

static __attribute__((noinline)) void bn_record(int number) { bn_seen[number] = 1; }

static inline int _mutant(int number) {
    if (__builtin_expect(bn_chosen < 0, 0)) bn_record(number);
    return __builtin_expect(bn_chosen == number, 0);
}
"""

PYTHON_SWITCH = schemata.SWITCH + "def chosen(int number):\n    return _mutant(number)\n"

# The project's own build, of one variant, without what makes it slow to compile.
BUILD = """\
import platform, setup, setuptools
if platform.machine() == "x86_64":
    setup.VARIANTS, setup.GCC_VARIANTS = ("v3",), {"v3": setup.GCC_VARIANTS["v3"]}
setup.GCC_INLINING = []
setup.GCC_TUNING = []
setuptools.setup(
    long_description=setup.long_description(), long_description_content_type="text/markdown",
    ext_modules=setup.extensions(), cmdclass={"build_ext": setup.BuildExtensions},
    script_args=["build", "--build-base", "objects", "--build-lib", "../site"])
"""


# The build


def all_mutants():
    """Return every mutant of the files."""
    found = []
    for pattern in FILES:
        for path in sorted((CHECKOUT / "bn_cy").glob(pattern)):
            name = path.relative_to(CHECKOUT).as_posix()
            found += schemata.mutants_of(name, path.read_text())
    return found


def write_sources(chosen):
    """Lay a copy of the package in which each mutant stands behind its number, from 1 on."""
    copy = WORK / "source"
    for path in (CHECKOUT / "bn_cy").rglob("*.*"):
        if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".h", ".txt"):
            text = path.read_text()
            name = path.relative_to(CHECKOUT).as_posix()
            mine = [(n, mutant) for n, mutant in enumerate(chosen, 1) if mutant.file == name]
            if mine:
                text = schemata.rewrite(text, mine)
            if mine or path.name == "kernels.pyx":  # which declares the switch for its rooms
                text = text if path.suffix == ".pxi" else schemata.with_switch(name, text)
            write(copy / name, text)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        write(copy / name, (CHECKOUT / name).read_text())
    write(copy / "build.py", BUILD)
    write(copy / "mutants.h", SWITCH % (len(chosen) + 1))
    write(copy / "bn_cy/_mutants.pyx", PYTHON_SWITCH)
    return copy


def write(path, text):
    """Write a file, unless it is as it should be: what has not changed is not compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(mutants, count):
    """Compile the first mutants of a list; return those that are built. What is refused by Cython
    or by the C compiler makes room for the next."""
    refused = set()
    while True:
        chosen = [mutant for mutant in mutants if mutant not in refused][:count]
        copy = write_sources(chosen)
        done = subprocess.run(
            [sys.executable, "build.py"],
            cwd=copy,
            env={**os.environ, "CFLAGS": f"-I{copy} -w"},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return chosen
        wrong = blamed(done.stdout + done.stderr, copy, chosen)
        if not wrong:
            raise SystemExit(done.stdout + done.stderr)
        print(f"{len(wrong)} mutants do not compile")
        refused |= wrong


def blamed(output, copy, chosen):
    """Return the mutants on the lines that errors name."""
    places = re.findall(r"^(bn_cy/\S+\.p(?:yx|xi)):(\d+):\d+:", output, re.MULTILINE)
    for name, row in re.findall(r"^(\S+\.c):(\d+):\d+: error", output, re.MULTILINE):
        above = (copy / name).read_text().splitlines()[: int(row)]
        places += re.findall(r'/\* "(bn_cy/.+)":(\d+)$', "\n".join(above), re.MULTILINE)[-1:]
    found = set()
    for name, row in places:
        lines = (copy / name).read_text().splitlines()[: int(row)]
        switches = [line for line in lines if "_mutant(" in line][-1:]  # the one at it or above
        found |= {chosen[int(n) - 1] for n in re.findall(r"_mutant\((\d+)\)", "".join(switches))}
    return found


# Running tests, in processes that collect them once and are forked again for each mutant


class Recorder:
    """Runs all tests whose file has changed; notes how long each takes and what it reaches.

    What is reached before the first test, by imports, is reached by all.
    """

    def __init__(self, path, size):
        with open(path, "w+b") as file:
            file.truncate(size)
            self.seen = mmap.mmap(file.fileno(), size)
        self.failed = set()

    def take(self):
        numbers = [number for number, byte in enumerate(self.seen[:]) if byte]
        self.seen[:] = bytes(len(self.seen))
        return numbers

    def pytest_runtestloop(self, session):
        signal.alarm(0)
        at_import, tests = self.take(), {}
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            start = time.perf_counter()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            tests[item.nodeid] = [round(time.perf_counter() - start, 3), self.take()]
        tests = {test: found for test, found in tests.items() if test not in self.failed}
        save("reached", {"at_import": at_import, "tests": tests, "failed": sorted(self.failed)})
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


class Hunter:
    """Runs for each mutant the tests that reach it, in a child of its own, until one fails."""

    def __init__(self, files, passed, kills, budget):
        self.files, self.passed = files, passed  # by number: its file, what it survived
        self.budget = budget
        self.reached = load("reached")
        self.kills = Counter(kills)  # by file of the mutant and test
        self.failed = False

    def pytest_runtestloop(self, session):
        if session.testsfailed:
            return None  # of tests that cannot be collected pytest makes an error
        signal.alarm(0)
        items = {item.nodeid: item for item in session.items}
        for number, file in self.files.items():
            tests = [test for test in self.order(number) if test in items]
            within = self.within_budget(tests)
            outcome, test = self.hunt(number, [items[test] for test in within])
            self.kills[file, test.partition("[")[0]] += outcome != "survived"
            note(number, outcome, test, within == tests)
        return True

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def order(self, number):
        """Return the tests of a mutant: first those that are quick or killed others of its file,
        and one case of every test before the next. Not those that it survived already."""
        file, passed = self.files[number], self.passed.get(number, {})
        at_import, scored, cases = number in self.reached["at_import"], [], Counter()
        tests = list(self.reached["tests"].items())
        random.Random(number).shuffle(tests)
        for test, (seconds, numbers) in tests:
            path = test.partition("::")[0]
            if (at_import or number in numbers) and passed.get(path) != stamp(path):
                name = test.partition("[")[0]
                cases[name] += 1
                expected = 1 if name == DIGESTS and "kernels/" in file else 0.1
                worth = (self.kills[file, name] + expected) / math.sqrt(seconds + 0.01)
                scored.append((worth / cases[name], test))
        return [test for _, test in sorted(scored, reverse=True)]

    def within_budget(self, tests):
        """Return the tests that fit, in their order; one that does not leaves room for others."""
        found, spent = [], 0
        for test in tests:
            seconds = self.reached["tests"][test][0]
            if spent + seconds < self.budget:
                found.append(test)
                spent += seconds
        return found

    def hunt(self, number, items):
        """Return how a mutant ended, and in which test."""
        if not items:
            return "survived", ""
        at = multiprocessing.Value("i", 0, lock=False)
        child = os.fork()
        if child == 0:
            self.run(number, items, at)
        waited, running = 0, 0  # counted, not timed: somebody may stop all this for a while
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            waited, running = (waited + POLL if running == at.value else 0), at.value
            if waited > PATIENCE + 10 * self.reached["tests"][items[running].nodeid][0]:
                os.killpg(child, signal.SIGKILL)
            time.sleep(POLL)
        outcome = {0: "survived", 1: "failed", -signal.SIGKILL: "hung"}
        code = os.waitstatus_to_exitcode(ended[1])
        return outcome.get(code, "crashed"), items[at.value].nodeid if code else ""

    def run(self, number, items, at):
        os.setpgid(0, 0)
        end_with_parent()
        choose(number)
        status = 1
        try:
            for at.value, item in enumerate(items):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if self.failed:
                    break
            else:
                status = 0
        finally:
            os._exit(status)


def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def choose(number):
    """Put a mutant in force, in this process and in those that it starts."""
    os.environ["BN_CY_MUTANT"] = str(number)
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(str(SITE)) and path.endswith(".so"):
            library = ctypes.CDLL(path)
            if hasattr(library, "bn_choose"):
                library.bn_choose(number)
    # The fork came before the first thread, so that the child may have threads, too.
    sys.modules["bn_cy._cpu"].stay_serial(False)


def start(plugin, seed, tests, **environment):
    """Run pytest in a child; return its process number."""
    child = os.fork()
    if child:
        return child
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.update(environment, PYTHONPATH=str(SITE))
    sys.path.insert(0, str(SITE))
    signal.alarm(LOADING)
    with open(WORK / "pytest.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(CHECKOUT)
    options = ["-q", "-p", "no:cacheprovider", f"--seed={seed % 2**32}"]
    os._exit(pytest.main([*options, *tests], [plugin]))


# What is kept from run to run, in build/mutants


def save(name, value):
    write(WORK / f"{name}.json", json.dumps(value))


def load(name):
    path = WORK / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def note(number, outcome, test, all_run=False):
    """Add how a mutant ended; of one that survived all tests, which these were, by file."""
    with open(WORK / "results.jsonl", "a") as file:
        all_passed = outcome == "survived" and all_run
        passed = {path: stamp(path) for path in test_files()} if all_passed else {}
        print(json.dumps([number, outcome, test, passed]), file=file)


def results():
    """Return by number how each mutant ended in every run: lists of (outcome, test, passed)."""
    path = WORK / "results.jsonl"
    found = {}
    for number, *rest in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        found.setdefault(number, []).append(rest)
    return found


def test_files():
    return [f"tests/test_{name}.py" for name in TESTS]


@functools.cache
def stamp(path):
    """Return a hash of a test file, and of what the test files share."""
    tests = (CHECKOUT / "tests").glob("*.*")
    shared = sorted(file for file in tests if not file.name.startswith("test_"))
    return digest(b"".join(file.read_bytes() for file in [CHECKOUT / path, *shared]))


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def sources(count, seed):
    """Return a hash of all that a build depends on."""
    paths = [
        *sorted((CHECKOUT / "bn_cy").rglob("*.p*")),
        CHECKOUT / "setup.py",
        Path(schemata.__file__),
    ]
    texts = [path.read_bytes() for path in paths if path.is_file() and path.suffix != ".pyc"]
    return digest(b"\0".join([*texts, f"{count} {seed}".encode()]))


# The run


def drawn(count, seed):
    """Return the mutants of this draw, which are built and recorded."""
    mutants = all_mutants()
    random.Random(seed).shuffle(mutants)
    key = sources(count, seed)
    built = load("built")
    if built is None or built["key"] != key:
        shutil.rmtree(SITE, ignore_errors=True)
        for name in ("built.json", "reached.json", "results.jsonl"):
            (WORK / name).unlink(missing_ok=True)
        chosen = build(mutants, count)
        save("built", {"key": key, "mutants": [mutants.index(mutant) for mutant in chosen]})
    return len(mutants), [mutants[i] for i in load("built")["mutants"]]


def record(seed, count):
    """Run the test files that have changed once without a mutant."""
    before = load("reached") or {"stamps": {}, "tests": {}}
    stamps = {path: stamp(path) for path in test_files()}
    changed = [path for path in stamps if before["stamps"].get(path) != stamps[path]]
    if not changed:
        return
    print(f"recording what {', '.join(changed)} reach")
    seen = WORK / "seen"
    save("reached", before)
    child = start(
        Recorder(seen, count + 1), seed, changed, BN_CY_MUTANT="-1", BN_CY_MUTANTS_SEEN=str(seen)
    )
    os.waitpid(child, 0)
    after = load("reached")
    if "failed" not in after:
        raise SystemExit(f"the tests did not run: see {WORK / 'pytest.log'}")
    for test in after.pop("failed"):
        print(f"left out, as it fails without a mutant: {test}")
    kept = {t: r for t, r in before["tests"].items() if t.partition("::")[0] not in changed}
    save("reached", {**after, "tests": kept | after["tests"], "stamps": stamps})


def hunt_all(chosen, seed, jobs, budget):
    """Run the tests for every mutant that is not known to be killed, or to be equivalent."""
    known, reasons = {number: runs[-1] for number, runs in results().items()}, reasons_given()
    at_import = set(load("reached")["at_import"])
    passed = {number: last[2] for number, last in known.items()}
    files = {
        number: mutant.file
        for number, mutant in enumerate(chosen, 1)
        if str(mutant) not in reasons and known.get(number, ["survived"])[0] == "survived"
    }
    kills = Counter(
        (chosen[number - 1].file, test.partition("[")[0])
        for number, (outcome, test, _) in known.items()
        if outcome != "survived"
    )
    print(f"{len(files)} mutants to be tried")
    later = [number for number in files if number not in at_import]
    servers = [
        start(
            Hunter({n: files[n] for n in later[job::jobs]}, passed, kills, budget),
            seed,
            test_files(),
        )
        for job in range(jobs)
    ]
    for server in servers:
        if os.waitpid(server, 0)[1]:
            raise SystemExit(f"pytest failed: see {WORK / 'pytest.log'}")
    for number in at_import & files.keys():  # each in a process that imports it
        if not is_imported(number):
            note(number, "failed", "import")
            continue
        hunter = Hunter({number: files[number]}, passed, kills, budget)
        server = start(hunter, seed, test_files(), BN_CY_MUTANT=str(number))
        status = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
        if status == pytest.ExitCode.INTERNAL_ERROR:
            raise SystemExit(f"pytest failed: see {WORK / 'pytest.log'}")
        if status:
            note(number, "failed", "import")


def is_imported(number):
    """Tell whether the package can be imported with a mutant in force."""
    environment = {**os.environ, "PYTHONPATH": str(SITE), "BN_CY_MUTANT": str(number)}
    command = [sys.executable, "-c", "import bn_cy"]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True).returncode == 0


def reasons_given():
    """Return the reasons of equivalent.txt by the text of a mutant."""
    entries = REASONS.read_text().split("\n\n")[1:] if REASONS.exists() else []
    return {
        mutant.strip(): reason.strip()
        for mutant, _, reason in (entry.strip().rpartition("\n") for entry in entries)
    }


def report(chosen, total, count, seed):
    """Return the text of the report."""
    known, reasons = results(), reasons_given()
    rows, ways, entries = {}, Counter(), []
    for number, mutant in enumerate(chosen, 1):
        runs = [(outcome, test) for outcome, test, _ in known.get(number, [["not run", "", {}]])]
        outcome, test = runs[-1]
        if str(mutant) in reasons:
            kind, note = reasons[str(mutant)].partition(":")[0], reasons[str(mutant)]
        elif outcome in ("survived", "not run"):
            kind = note = outcome
        else:
            kind, note = "killed", f"killed in a later run by {test}" if len(runs) > 1 else ""
            ways[outcome] += 1
        rows.setdefault(mutant.file, Counter())[kind] += 1
        if note:
            entries.append((KINDS.index(kind), f"{mutant}\n{note}"))
    whole = sum(rows.values(), Counter())
    killed = whole["killed"] + whole["sanitizer"]
    counted = killed + whole["survived"]
    lines = [
        f"python tests/tools/mutants.py --count {count} --seed {seed}",
        f"of {total} mutants, at commit {git('describe', '--always', '--dirty')}",
        "",
        f"killed: {killed} of {counted} that are neither equivalent nor only slower, "
        f"{100 * killed / max(counted, 1):.1f} %",
        f"({ways['failed']} by a test that failed, {ways['crashed']} by a crash, {ways['hung']} as "
        "they hung)",
        "",
        f"{'':28}{'drawn':>12}" + "".join(f"{kind:>12}" for kind in KINDS),
    ]
    for name, row in [*sorted(rows.items()), ("all", whole)]:
        lines.append(f"{name:28}{row.total():12}" + "".join(f"{row[kind]:12}" for kind in KINDS))
    return "\n".join([*lines, "", "\n\n".join(text for _, text in sorted(entries)), ""])


def git(*arguments):
    return subprocess.check_output(["git", "-C", CHECKOUT, *arguments], text=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32), help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="mutants to be tried at a time")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds of tests that a mutant may take"
    )
    options = parser.parse_args()
    print(f"--count {options.count} --seed {options.seed}")
    WORK.mkdir(parents=True, exist_ok=True)
    total, chosen = drawn(options.count, options.seed)
    record(options.seed, len(chosen))
    hunt_all(chosen, options.seed, options.jobs, options.budget)
    text = report(chosen, total, options.count, options.seed)
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
