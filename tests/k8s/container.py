"""Becomes a container's first process: container.py SPEC (a JSON file), as root, in namespaces of its own, does what a
container runtime does with what pods.py has read from a manifest, and then runs the command. Mounts, the read-only root,
the user, no capability, no new privileges are those of the manifest; seccomp profiles and cgroups are not imitated."""
import ctypes
import json
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG = 24, 38, 1


def check(rc, what):
    if rc:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind=None, flags=0, data=None):
    check(libc.mount(*[v.encode() if v else None for v in (source, target, kind)], ctypes.c_ulong(flags),
                     data.encode() if data else None), f"mount {source} on {target}")


def bind(source, target, read_only):
    mount(source, target, flags=MS_BIND)
    if read_only:
        mount(None, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID)


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    root = spec["root"]
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount(root, root, flags=MS_BIND)
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("/sys", root + "/sys", flags=MS_BIND | MS_REC)
    mount("tmpfs", root + "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k")
    for name in ("null", "zero", "full", "random", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        mount("/dev/" + name, f"{root}/dev/{name}", flags=MS_BIND)
    os.symlink("/proc/self/fd", root + "/dev/fd")
    os.mkdir(root + "/dev/shm")
    for m in sorted(spec["mounts"], key=lambda m: m["target"]):
        bind(m["source"], root + m["target"], m["read_only"])
    if spec["read_only_root"]:
        mount(None, root, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    os.chroot(root)
    os.chdir("/")
    if spec["drop_all"]:
        for cap in range(64):
            libc.prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)
    os.setgroups(spec["groups"])
    os.setresgid(spec["gid"], spec["gid"], spec["gid"])
    os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    if spec["no_new_privileges"]:
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    os.execve(spec["argv"][0], spec["argv"], spec["env"])


main()
