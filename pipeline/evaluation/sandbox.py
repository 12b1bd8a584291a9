"""Generated Python runs here and harms nothing: bubblewrap's namespaces, a seccomp filter, resource limits.

Nothing of this is our own security: the kernel refuses, bubblewrap and libseccomp ask it to. A program is one process. It
sees the interpreter, its libraries and the packages it may import, all read-only, and one small folder in memory; no
network, no other process, no `/proc`, no environment. Where this cannot be had, nothing is run.
"""

import ctypes
import fcntl
import itertools
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.evaluation.syscalls import ALLOWED, allow
from schemas.errors import UserError

GIB, MIB = 1 << 30, 1 << 20
PACKAGES = Path(sysconfig.get_path("purelib"))  # of this environment
SETUP_SECONDS = 60  # a sandbox that has not begun by then never will
# Where root starts sandboxes each gets a user of its own, from the range that systemd keeps for just that (DynamicUser).
# Root's own number would not do: the kernel does not count root's threads, and files of root would be the program's.
USERS = range(61184, 65520)
DEVICES = ("null", "zero", "full", "random", "urandom")
LIBRARIES = ("lib", "lib64")
PYTHON = "/python/bin/python"
THREADS = 64
ENVIRONMENT = {
    "HOME": "/tmp",
    "PYTHONHOME": "/python",
    "LD_LIBRARY_PATH": "/python/lib",
    "PYTHONHASHSEED": "0",  # the same program prints the same, twice
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "1",  # others reserve 64 MiB of address space a thread
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# What the process does before the program: gives up the rest of its rights, says that it stands, becomes the program.
BOOT = """
def become_program():
    import json, os, resource, site, sys
    user, started, packages, limits = json.loads(sys.argv[1])
    site.setquit()
    sys.argv[:] = ["program.py"]
    if packages:
        sys.path.append("/packages")
    with open("/program.py", "rb") as file:
        source = file.read()
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for kind, limit in limits:
        resource.setrlimit(kind, (limit, limit))
    os.write(started, b"1")
    os.close(started)
    return source
exec(compile(become_program(), "program.py", "exec"))
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program did. Its outputs are cut at the sandbox's `output` bytes each.

    reason: empty if it ended by itself with status 0 (`ok`), else `time`, `exit <status>` or `signal <name>`.
    seconds: wall-clock time of the program, the sandbox's own start left out.
    """

    stdout: str
    stderr: str
    ok: bool
    reason: str
    seconds: float


class Sandbox:
    """Runs programs, each in a fresh process of its own; from several threads at once if wanted."""

    def __init__(
        self,
        seconds: float = 10,
        memory: int = GIB,
        disk: int = 64 * MIB,
        output: int = MIB // 4,
        packages: Path | None = PACKAGES,
    ):
        """Limits of a program: `seconds` by the clock and of CPU time, bytes of address space, of its folder, of output.

        `packages`: folder of what it may import beyond the standard library. Raises
        UserError where there is no bubblewrap or libseccomp, or where the kernel lets them make no sandbox.
        """
        self.seconds, self.output = seconds, output
        self.bwrap = shutil.which("bwrap")
        if self.bwrap is None:
            raise UserError(
                "generated programs run in a sandbox by bubblewrap alone, and there is none here",
                "install it (Debian, Ubuntu: `apt-get install bubblewrap libseccomp2`)",
            )
        self.rules = seccomp_rules()
        self.limits = [
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, max(1, round(seconds))),
            (resource.RLIMIT_FSIZE, disk),
            (resource.RLIMIT_NPROC, THREADS),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ]
        self.tree = tree(packages, disk)
        self.packages = packages is not None
        self.root = os.geteuid() == 0 and has_users()
        self._users = itertools.cycle(USERS)
        for _ in range(os.getpid() % len(USERS)):  # another process's sandboxes begin elsewhere
            next(self._users)
        self.run("")

    def run(self, code: str, stdin: str = "") -> Outcome:
        """Run a program to its end or to a limit, with `stdin` to read; nothing of it is left when this returns.

        Raises UserError if the sandbox cannot be made; whatever the program does is an `Outcome`.
        """
        with ExitStack() as stack:
            program, rules, text = (
                stack.enter_context(_sealed(data))
                for data in (code.encode(errors="replace"), self.rules, stdin.encode(errors="replace"))
            )
            started, tell_started = _pipe(stack)
            ended, tell_ended = _pipe(stack)
            process = subprocess.Popen(
                self._command(program.fileno(), rules.fileno(), tell_started.fileno(), tell_ended.fileno()),
                stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, bufsize=0,
                pass_fds=[file.fileno() for file in (program, rules, tell_started, tell_ended)],
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            tell_started.close()
            tell_ended.close()
            return self._watch(process, started, ended.fileno())

    def _watch(self, process: "subprocess.Popen[bytes]", started: IO[bytes], ended: int) -> Outcome:
        """Read what comes until the first process of the namespace, which is its last, has ended or is out of time."""
        assert process.stdout and process.stderr
        kept = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        begun, late = 0.0, False
        until = time.monotonic() + SETUP_SECONDS
        with selectors.DefaultSelector() as selector:
            for file in (*kept, started, ended):
                selector.register(file, selectors.EVENT_READ)
            while selector.get_map():
                left = until - time.monotonic()
                if left <= 0 and not late:
                    process.kill()
                    late = True
                    if not begun:  # half made it could outlive bubblewrap: it shall find that nobody waits for it
                        selector.unregister(started)
                        started.close()
                for key, _ in selector.select(max(0, left) if not late else None):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                    elif key.fileobj is started:
                        begun = time.monotonic()
                        until = begun + self.seconds
                    elif key.fd in kept:
                        kept[key.fd] += data[: self.output - len(kept[key.fd])]
        seconds = time.monotonic() - begun
        status = process.wait()
        out, err = (bytes(kept[file]).decode(errors="replace") for file in kept)
        if not begun:
            raise UserError(
                f"no sandbox can be made here: {err.strip().splitlines()[-1] if err.strip() else f'status {status}'}",
                "let bubblewrap make namespaces (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker:"
                " --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
            )
        reason = "time" if late else reason_of(status)
        return Outcome(out, err, not reason, reason, seconds)

    def _command(self, program: int, rules: int, started: int, ended: int) -> list[str]:
        nobody = ("--unshare-user", "--uid", "65534", "--gid", "65534")
        rights = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if self.root else nobody
        told = json.dumps([next(self._users) if self.root else 0, started, self.packages, self.limits])
        return [
            str(self.bwrap), "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc",
            "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox", "--cap-drop", "ALL", *rights,
            "--clearenv", *(part for name, value in ENVIRONMENT.items() for part in ("--setenv", name, value)),
            *self.tree, "--perms", "0444", "--file", str(program), "/program.py", "--remount-ro", "/", "--chdir", "/tmp",
            "--seccomp", str(rules), "--sync-fd", str(ended),
            "--", PYTHON, "-s", "-P", "-S", "-B", "-c", BOOT, told,
        ]  # fmt: skip


def tree(packages: Path | None, disk: int) -> list[str]:
    """Bubblewrap's options for all that a program sees: interpreter, libraries, packages, devices, a folder of `disk` bytes.

    Only the last can be written to. The interpreter lies at a place of its own, so that nobody's home is named.
    """
    prefix = Path(sys.base_prefix).resolve()
    shown = {Path(PYTHON): Path(os.path.realpath(sys.executable)), Path("/etc/ld.so.cache"): Path("/etc/ld.so.cache")}
    shown |= {Path("/python", name): prefix / name for name in LIBRARIES}
    shown |= {Path("/", place, name): Path("/", place, name) for place in ("", "usr") for name in LIBRARIES}
    shown |= {Path("/packages"): packages} if packages else {}
    options: list[str] = []
    for folder in ("/python", "/python/bin", "/usr", "/etc", "/dev"):
        options += ["--perms", "0755", "--dir", folder]  # which would else be root's alone
    for path, source in shown.items():
        if source.is_symlink() and source == path:
            options += ["--symlink", str(source.readlink()), str(path)]
        elif source.exists():
            options += ["--ro-bind", str(source), str(path)]
    for name in DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [*options, "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]


def seccomp_rules() -> bytes:
    """The filter as a program for the kernel: what is not in `ALLOWED` does not exist. Raises UserError without libseccomp."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise UserError("generated programs run under libseccomp's filters alone, and it is not here",
                        "install it (Debian, Ubuntu: `apt-get install libseccomp2`)") from error  # fmt: skip
    with tempfile.TemporaryFile() as file:
        allow(library, ALLOWED, file.fileno())
        file.seek(0)
        return file.read()


def has_users() -> bool:
    """Whether numbers of `USERS` can be taken here; not in a container that knows root alone."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ranges = [(int(start), int(count)) for start, _, count in map(str.split, lines)]
    return any(start <= USERS.start and USERS.stop <= start + count for start, count in ranges)


def reason_of(status: int) -> str:
    """Why a program that ended with this status is not `ok`; empty if it is. Bubblewrap says 128 + n for signal n."""
    names = {128 + number: f"signal {signal.Signals(number).name}" for number in signal.valid_signals() if number < 32}
    return "" if status == 0 else names.get(status, f"exit {status}")


def _sealed(data: bytes) -> IO[bytes]:
    """A file in memory that holds `data`, read from its beginning and written by nobody."""
    file = os.fdopen(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b", buffering=0)
    file.write(data)
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """A pipe's two ends, to read and to write."""
    ends = os.pipe()
    return stack.enter_context(open(ends[0], "rb", 0)), stack.enter_context(open(ends[1], "wb", 0))
