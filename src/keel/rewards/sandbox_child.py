"""What stands between `sandbox` and a program that nobody trusts: a small process that locks every door and starts it.

Run as a script, by the standard library alone: sandbox_child.py FOLDER STATUS_FD. It reads FOLDER/order.json, says on the status
pipe how far it came ("started", then how the program ended), and closes that pipe to the program.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 4096, 16384, 1 << 18, 2, 4
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 36, 38
MOUNT_SETATTR, RECURSIVELY, READ_ONLY = 442, 0x8000, 1
INSIDE = 1000  # the program's user id in a user namespace
OUTSIDE = 0x70000000  # first of the user ids that root hands out, one a run, so that its processes can be counted


def main() -> None:
    folder, status = sys.argv[1], int(sys.argv[2])
    os.set_inheritable(status, False)
    with open(os.path.join(folder, "order.json"), encoding="utf-8") as file:
        order = json.load(file)
    os.unlink(os.path.join(folder, "order.json"))
    try:
        _parent_dies(signal.SIGKILL)
        if order["isolation"] != "bare":
            _leave(order["isolation"] == "full")
            _become_first(status)
        home = _room(order, folder) if order["isolation"] == "full" else _corner(order, folder)
        program = _start(order, home, status)
    except Exception as fault:  # whatever it was, the program did not run: say so
        _say(status, {"failed": f"{type(fault).__name__}: {fault}"})
        os._exit(1)
    _watch(program, status)


def _watch(program: int, status: int) -> None:
    """Reap until the program has ended, tell how, and take everything that it left behind along."""
    if sys.platform == "linux":
        _libc().prctl(SET_DUMPABLE, 0, 0, 0, 0)
    ended = [False]
    signal.signal(signal.SIGTERM, lambda *_: ended.__setitem__(0, True))
    while not ended[0]:
        pid, how = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            _say(status, {"status": os.waitstatus_to_exitcode(how), "cpu_s": used.ru_utime + used.ru_stime})
            break
        if pid == 0:
            time.sleep(0.002)
    if os.getpid() != 1:  # the first process of a namespace takes the others with it
        _end_descendants()
    os._exit(0)


def _end_descendants() -> None:
    """Kill what is left below this process, which inherits orphans: sessions of their own do not help them."""
    for _ in range(100):
        mine = [pid for pid in _children() if pid != os.getpid()]
        if not mine:
            return
        for pid in mine:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        time.sleep(0.002)


def _children() -> list[int]:
    """Processes whose parent is this one, where the system tells by /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == os.getpid():
                found.append(int(name))
    return found


# ---- namespaces ------------------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _leave(mounts: bool) -> None:
    """No network, no other processes, no shared memory, and (if `mounts`) file systems of its own."""
    apart = NEW_NET | NEW_PIDS | NEW_IPC | NEW_UTS | (NEW_MOUNTS if mounts else 0)
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _libc().unshare(apart) == 0:
        return
    _must(_libc().unshare(apart | NEW_USER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _become_first(status: int) -> None:
    """Go on as process 1 of the new namespace, whose end is the end of all others in it; the old process only waits."""
    child = os.fork()
    if child:
        _let_go()
        os.close(status)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.waitpid(child, 0)
        os._exit(0)
    _parent_dies(signal.SIGKILL)


def _parent_dies(signal_number: int) -> None:
    if sys.platform == "linux":
        _libc().prctl(SET_DEATH_SIGNAL, int(signal_number), 0, 0, 0)


# ---- files -----------------------------------------------------------------------------------------------------------


def _room(order: dict, root: str) -> str:
    """A root folder with the interpreter and the system's libraries, read-only, and a small /tmp: nothing else is there."""
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for name in ("tmp", "work"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _mount("tmpfs", f"{root}/tmp", "tmpfs", NO_SUID | NO_DEVICES, f"size={order['file_mb']}m,mode=1777,nr_inodes=1024")
    for path in order["shown"]:  # after /tmp, for an environment may stand below it
        _show(path, root)
    for device in ("null", "zero", "urandom"):
        _show(f"/dev/{device}", root)
    _write(order["files"], f"{root}/work")
    _set_attributes(root, RECURSIVELY, (READ_ONLY, 0, 0, 0))
    _set_attributes(f"{root}/tmp", 0, (0, READ_ONLY, 0, 0))
    os.chroot(root)
    os.chdir("/tmp")
    return "/work"


def _set_attributes(path: str, flags: int, change: tuple[int, int, int, int]) -> None:
    """Of a mount: attributes to set, to clear, its propagation, and a user namespace."""
    attributes = (ctypes.c_uint64 * 4)(*change)
    _must(_libc().syscall(MOUNT_SETATTR, -100, path.encode(), flags, attributes, 32), f"mount_setattr {path}")


def _show(path: str, root: str) -> None:
    inside = root + path
    if os.path.lexists(inside) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.makedirs(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    _mount(path, inside, "", BIND | RECURSIVE)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _must(_libc().mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()), f"mount {target}")


def _corner(order: dict, folder: str) -> str:
    """Without file systems of its own: the program's files, not to be written, and a folder that may be."""
    os.chmod(folder, 0o755)
    work, scratch = os.path.join(folder, "work"), os.path.join(folder, "tmp")
    for path in (work, scratch):
        os.mkdir(path)
    _write(order["files"], work)
    os.chmod(scratch, 0o1777)
    os.chdir(scratch)
    return work


def _write(files: dict[str, str], folder: str) -> None:
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
        os.chmod(os.path.join(folder, name), 0o444)
    os.chmod(folder, 0o555)


# ---- the program -----------------------------------------------------------------------------------------------------


def _start(order: dict, work: str, status: int) -> int:
    """Fork and exec the program under its limits. "started" goes out right before it runs."""
    if sys.platform == "linux":
        _libc().prctl(SET_SUBREAPER, 1, 0, 0, 0)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ready)
            _become_nobody(order["number"])
            _limit(order["limits"])
            words = [word.replace("{work}", work) for word in order["argv"]]
            environment = {name: text.replace("{tmp}", os.getcwd()) for name, text in order["environment"].items()}
            os.execve(words[0], words, environment)
        except BaseException as fault:
            os.write(told, f"{type(fault).__name__}: {fault}".encode())
        finally:
            os._exit(127)
    os.close(told)
    _let_go()
    with os.fdopen(ready, "rb") as pipe:  # ends when exec has closed the other end
        fault = pipe.read()
    if fault:
        raise RuntimeError(fault.decode(errors="replace"))
    _say(status, {"started": True})
    return child


def _become_nobody(number: int) -> None:
    """Root becomes a user that owns nothing, and that nobody else is."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(OUTSIDE + number)
        os.setuid(OUTSIDE + number)


def _limit(limits: dict[str, int]) -> None:
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        _libc().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _let_go() -> None:
    """Of what the program reads and writes: its readers see the end when the program's own ends are closed."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)


def _say(status: int, said: dict) -> None:
    os.write(status, (json.dumps(said) + "\n").encode())


if __name__ == "__main__":
    main()
