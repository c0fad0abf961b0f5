"""What the Python suites share: running the program, counting, comparing."""
import os
import resource
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, "tests", "golden")
sys.path[:0] = [os.path.join(ROOT, "tools"), GOLDEN]

SANITIZERS = {"ASAN_OPTIONS": "exitcode=99:abort_on_error=0:detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1:exitcode=99",
              "TSAN_OPTIONS": "exitcode=99:halt_on_error=1"}


class Tally:
    """Counts checks. A failure prints one line; the last line of a suite is its counts."""
    def __init__(self, verbose=False):
        self.passed = self.failed = 0
        self.verbose = verbose

    def check(self, ok, name, detail=""):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
        if not ok or self.verbose:
            print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' + detail if detail else ''}", flush=True)
        return ok

    def end(self, suite):
        print(f"{suite}: {self.passed} passed, {self.failed} failed", flush=True)
        sys.exit(1 if self.failed else 0)


class Result:
    def __init__(self, code, out, err, seconds):
        self.code, self.out, self.err, self.seconds = code, out, err, seconds

    def lines(self):
        """stderr without the `# ` facts."""
        return [line for line in self.err.split("\n") if line and not line.startswith("#")]

    def sanitizer(self):
        return "Sanitizer" in self.err or "runtime error:" in self.err

    def tail(self):
        return f"exit {self.code}, stderr {self.err[-400:]!r}, stdout {self.out[:80]!r}"


def run(args, stdin=b"", timeout=120, env=None, cwd=ROOT):
    """Runs a command to its end. A time-out gives exit code -1000. The seconds are the processor's: machines are shared."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        p = subprocess.run(args, input=stdin, capture_output=True, timeout=timeout, cwd=cwd,
                           env={**os.environ, **SANITIZERS, **(env or {})})
    except subprocess.TimeoutExpired as e:
        return Result(-1000, e.stdout or b"", (e.stderr or b"").decode("utf-8", "replace"), timeout)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return Result(p.returncode, p.stdout, p.stderr.decode("utf-8", "replace"), seconds)


def fault_library(work, tally):
    """The environment in which system calls fail as FAULT says (tests/shim.c)."""
    lib = os.path.join(work, "shim.so")
    p = subprocess.run(["gcc", "-shared", "-fPIC", "-O1", os.path.join(ROOT, "tests", "shim.c"), "-o", lib, "-ldl"], capture_output=True)
    tally.check(p.returncode == 0, "the fault library", p.stderr.decode()[-300:])
    return {"LD_PRELOAD": lib, "ASAN_OPTIONS": SANITIZERS["ASAN_OPTIONS"] + ":verify_asan_link_order=0"}


def ids_arg(ids):
    return ",".join(map(str, ids))
