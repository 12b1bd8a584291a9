"""What a program in the sandbox may ask of the kernel: files, memory, threads, clocks and signals of its own process.

A list of what is allowed, as Docker's and systemd's are: what a later kernel adds is refused until it is looked at.
Numbers of calls and the filter's code are libseccomp's. Left out on purpose: new processes, sockets, namespaces,
mounts, tracing, keys, BPF, io_uring, shared memory between processes, and whatever needs a privilege.
"""

import ctypes
import errno
import termios
from collections.abc import Sequence

ALLOWED = """
access brk chdir chmod clock_getres clock_gettime clock_nanosleep close close_range copy_file_range dup dup2 dup3
epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd eventfd2 execve exit exit_group faccessat
faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fcntl fdatasync fgetxattr flistxattr fstat fstatfs fsync
ftruncate futex futex_waitv get_robust_list getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups
getitimer getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid
gettimeofday getuid getxattr kill lgetxattr link linkat listxattr llistxattr lseek lstat madvise membarrier mincore
mkdir mkdirat mmap mprotect mremap msync munmap nanosleep newfstatat open openat pause pipe pipe2 poll ppoll pread64
preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename renameat
renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity
sched_getparam sched_getscheduler sched_yield select sendfile set_robust_list set_tid_address setgroups setitimer
setresgid setresuid setrlimit sigaltstack stat statfs statx symlink symlinkat sysinfo tgkill time timer_create
timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill
truncate umask uname unlink unlinkat utime utimensat utimes wait4 waitid write writev
arch_prctl
""".split()  # noqa: SIM905
THREAD = 0x10000  # CLONE_THREAD: a thread of this process, and no other
# Of ioctl, what Python asks of any file: is it a terminal, is it inherited, how much is there to read.
REQUESTS = (termios.TCGETS, termios.FIOCLEX, termios.FIONCLEX, termios.FIONREAD, termios.FIONBIO)
# libseccomp's constants
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EQUAL, MASKED_EQUAL = 4, 7
BAD_ARCHITECTURE = 2


class Argument(ctypes.Structure):
    """`scmp_arg_cmp`: a condition on one argument of a call."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def allow(library: ctypes.CDLL, names: Sequence[str], file: int) -> None:
    """Write a filter to a file descriptor that lets these calls through, threads and a few requests of ioctl.

    All else fails as if the kernel had none (ENOSYS), which the C library knows how to go on from; calls by another
    architecture's table end the process.
    """
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(REFUSE | errno.ENOSYS)))
    done = library.seccomp_attr_set(context, BAD_ARCHITECTURE, ctypes.c_uint32(KILL))
    for name in names:
        done |= _rule(library, context, name)
    done |= _rule(library, context, "clone", Argument(0, MASKED_EQUAL, THREAD, THREAD))
    for request in REQUESTS:
        done |= _rule(library, context, "ioctl", Argument(1, EQUAL, request, 0))
    done |= library.seccomp_export_bpf(context, file)
    library.seccomp_release(context)
    if done:
        raise OSError(f"libseccomp made no filter (status {done})")


def _rule(library: ctypes.CDLL, context: ctypes.c_void_p, name: str, *arguments: Argument) -> int:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # not a call of this architecture, or newer than the library
        return 0
    conditions = (Argument * len(arguments))(*arguments)
    return library.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, len(arguments), conditions)
