"""A real Slurm cluster of one node, for the tests: as root, without systemd or cgroups, on free ports, in one folder.

python tests/slurm_cluster.py keeps one up until Ctrl-C. Debian and Ubuntu have it: apt-get install slurm-wlm munge
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

NODE = socket.gethostname().split(".")[0]  # as Slurm itself calls this machine
# What is not here is as Slurm has it. Of the waits, a requeued job's is cred_expire, that after SIGTERM is KillWait.
CONF = """
ClusterName={name}
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={short}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={short}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=10
OverTimeLimit=0
MinJobAge=600
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000000
PartitionName=main Nodes={node} Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes={node} PriorityTier=2
"""


def missing():
    """The reason why Slurm cannot start on this machine, one line, or None."""
    if os.geteuid() != 0:
        return "not root"
    absent = [program for program in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(program)]
    return f"not on PATH: {', '.join(absent)}" if absent else None


class Cluster:
    """A running cluster: `env`, the environment for its commands, and methods to query and disturb it."""

    def __init__(self, folder, env, name):
        self.env, self._folder, self._name = env, folder, name

    def run(self, *command, **env):
        """Output of a Slurm command; RuntimeError if it fails."""
        command = [str(word) for word in command]
        done = subprocess.run(command, env=self.env | env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def wait(self, predicate, seconds):
        """The first true value of `predicate()`; TimeoutError, with the ends of the logs, if it never is."""
        end = time.monotonic() + seconds
        while not (value := predicate()):
            if time.monotonic() > end:
                logs = [f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self._folder.glob("*.log"))]
                raise TimeoutError("\n".join([f"still not so after {seconds} s", *logs]))
            time.sleep(0.2)
        return value

    def start(self, name, *options):
        """Start a daemon, marked by a variable that Slurm itself gives to every job."""
        self.run(name, *options, SLURM_CLUSTER_NAME=self._name)

    def node_up(self):
        """Start the node, also after `node_down`, and wait until the cluster uses it."""
        self.start("slurmd")
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%t").split()[0] in ("idle", "mix", "alloc"), 60)

    def node_down(self):
        """A power cut: all processes on the node are killed, and the cluster is told."""
        self.stop(but=("munged", "slurmctld", "slurmscriptd"))
        self.run("scontrol", "update", f"nodename={NODE}", "state=down", "reason=test")

    def stop(self, but=()):
        """Kill the daemons, except those named in `but`, the jobs and whatever these have started, orphans too."""
        while pids := self._pids(but):  # one of them may have forked meanwhile
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _pids(self, but):
        mark, pids = f"SLURM_CLUSTER_NAME={self._name}".encode(), []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                marked = mark in (process / "environ").read_bytes().split(b"\0")
                if marked and (process / "comm").read_text().strip() not in but:
                    pids.append(int(process.name))
        return pids


@contextlib.contextmanager
def cluster(folder, cpus=2):
    """A `Cluster` with `cpus` CPUs, whatever the machine has; `folder`, an empty one, gets its configuration and logs.

    On leaving, nothing of it or of its jobs runs any more.
    """
    folder, name = pathlib.Path(folder), f"test{time.time_ns()}"
    # the tests may themselves be a job of another cluster
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    one = Cluster(folder, {**outer, "SLURM_CONF": str(folder / "slurm.conf")}, name)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [server.getsockname()[1] for server in free]
    (folder / "munged.key").write_bytes(os.urandom(1024))
    (folder / "munged.key").chmod(0o400)
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as short:  # a socket's path has at most 107 bytes
        conf = CONF.format(name=name, node=NODE, ports=ports, short=short, folder=folder, cpus=cpus)
        (folder / "slurm.conf").write_text(conf)
        try:
            files = [f"--{what}-file={folder}/munged.{what}" for what in ("key", "pid", "seed", "log")]
            one.start("munged", "--force", f"--socket={short}/munge", *files)
            one.start("slurmctld")
            one.node_up()
            yield one
        finally:
            one.stop()


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(KeyboardInterrupt), cluster(place) as one:
        print(f"export SLURM_CONF={one.env['SLURM_CONF']}", flush=True)
        signal.pause()
