"""The faults of the campaign: each is done to a run, and its promise is checked."""

from functools import partial

from benchmarks.faults import cluster, crowd, damage, inputs, interruptions, memory, surroundings
from benchmarks.faults.runs import Fault
from benchmarks.slurm_cluster import missing_daemon
from finetuning.runs.files import RESULT

RANK_KILLED = "the other ends within 60 s, one line, continues bit-identical"
FULL_DISK = "one line, status 1 (2 if the run has not begun, 0 for its report), continues bit-identical"
FAULTS = (
    Fault("SIGKILL", 200, "continues, bit-identical", interruptions.killed),
    Fault("signals", 60, "status 130, a checkpoint, continues bit-identical", interruptions.signalled),
    Fault("one of two ranks killed", 20, RANK_KILLED, interruptions.rank_killed),
    Fault("SLURM job", 10, "continues, one result", cluster.job_disturbed, missing_daemon),
    Fault("disk full", len(surroundings.EACH_FILE), FULL_DISK, surroundings.disk_full,
          surroundings.needs_root),
    Fault("memory runs out", 25, "one line or killed, continues bit-identical", memory.memory_runs_out),
    Fault("damaged checkpoint", 80, "falls back or refused in one line", damage.damaged_checkpoint),
    Fault("damaged settings", 80, "refused in one line", damage.damaged_settings),
    Fault("damaged cache", 80, "rebuilt or refused in one line", damage.damaged_cache),
    Fault("damaged weights", 80, "refused in one line, never used",
          partial(damage.damaged_for_predict, file="*.safetensors")),
    Fault("damaged export", 80, "refused in one line, never used", damage.damaged_export),
    Fault("damaged result", 80, "refused in one line, never used",
          partial(damage.damaged_for_predict, file=RESULT)),
    Fault("damaged predictions", 80, "refused in one line, never used", damage.damaged_predictions),
    Fault("damaged collected run", 80, "refused in one line, never used", damage.damaged_collected_run),
    Fault("one cache", 10, "all end alike", crowd.one_cache),
    Fault("one directory", 10, "one writer", crowd.one_directory),
    Fault("resumed while it ends", 10, "the finished run stays as it was", crowd.resumed_while_it_ends),
    Fault("one study", 10, "all end, each run once", crowd.one_study),
    Fault("environment", len(surroundings.ENVIRONMENTS), "works, or one line", surroundings.environment,
          surroundings.needs_root),
    Fault("clock set back", 2, "continues, bit-identical", surroundings.clock_set_back, surroundings.needs_faketime),
    Fault("command lines", 20, "status 2, one line that names the flag", inputs.wrong_command_lines),
    Fault("flags together", 20, "accepted, or one line that names a flag", inputs.flags_together),
    Fault("data files", 20, "read, or one line that names the file or flag", inputs.mutated_files),
)  # fmt: skip
