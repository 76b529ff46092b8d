"""Becomes a container's first process: container.py SPEC (a JSON file), as root, in namespaces of its own, does what a
container runtime does with what pods.py has read from a manifest, and then runs the command. Mounts, the read-only root,
the user, no capability, no new privileges are those of the manifest. RuntimeDefault is the part of it that a server could
run into: what engines refuse to processes without capabilities (x86-64). cgroups are not imitated."""
import ctypes
import json
import os
import platform
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
SECCOMP_MODE_FILTER, RET_ALLOW, RET_ERRNO, EPERM, ENOSYS = 2, 0x7fff0000, 0x00050000, 1, 38
AUDIT_ARCH_X86_64, CLONE3 = 0xc000003e, 435
# Numbers on x86-64, in the order of the names' groups: uselib, ustat, sysfs; vhangup, pivot_root, acct, settimeofday, mount,
# umount2, swapon, swapoff, reboot, iopl, ioperm, modules, quotactl, nfsservctl; lookup_dcookie, clock_settime; mbind,
# set_mempolicy, get_mempolicy, kexec_load, keys; unshare, move_pages, perf_event_open, fanotify_init, open_by_handle_at,
# clock_adjtime, setns, kcmp, finit_module, kexec_file_load, bpf, userfaultfd; io_uring; mounts by descriptor.
REFUSED = [134, 136, 139, 153, 155, 163, 164, 165, 166, 167, 168, 169, 172, 173, 175, 176, 179, 180, 212, 227, 237, 238, 239,
           246, 248, 249, 250, 272, 279, 298, 300, 304, 305, 308, 312, 313, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431,
           432, 433, 442]


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


def seccomp_default():
    """Refuses with EPERM; clone3 with ENOSYS, as engines do, so that libc falls back on clone, whose flags they can read."""
    if platform.machine() != "x86_64":
        return
    def op(code, true, false, value):
        return struct.pack("HBBI", code, true, false, value)
    load, equal, give = 0x20, 0x15, 0x06
    steps = [op(load, 0, 0, 4), op(equal, 1, 0, AUDIT_ARCH_X86_64), op(give, 0, 0, RET_ERRNO | EPERM), op(load, 0, 0, 0)]
    for number in REFUSED:
        steps += [op(equal, 0, 1, number), op(give, 0, 0, RET_ERRNO | EPERM)]
    steps += [op(equal, 0, 1, CLONE3), op(give, 0, 0, RET_ERRNO | ENOSYS), op(give, 0, 0, RET_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")


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
    if spec["seccomp"] == "RuntimeDefault":
        seccomp_default()
    os.execve(spec["argv"][0], spec["argv"], spec["env"])


main()
