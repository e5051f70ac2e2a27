"""Weights & Biases, offline unless there is an account: `wandb sync RUN/wandb/offline-run-*`
uploads later.

Group = the run's name, job type = the slot, one W&B run per stage, opened when the stage's record
exists and closed at once. History: `train/*` over `train/step`, the tables `flips` of answers that
changed and `open` of what was said to open prompts, then one row of `score/*` and `stage/*`.
Summary: `verdict` and one `verdict/<limit>` with its sentence. Weights are reference artifacts: a
path and checksums, never a copy, with their parent's digest. W&B would by itself collect sys.argv,
the list of packages, the git remote (which can hold a token), the source file, the machine and the
console. Secrets live there, so all of it is off.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth

from compress.errors import without_credentials
from compress.report.compare import Flip, flips
from compress.report.records import Record, Run, folder_of, load_run, worst
from compress.score.open import worst_first
from compress.track import Tracker

# Columns of the table `open`.
OPEN = ("id", "kind", "prompt", "teacher", "student", "teacher_right", "right", "loops", "ended")
# What a W&B run's config has of the record.
CONFIG_OF_RECORD = (
    *("recipe", "slot", "index", "technique", "runtime", "parent", "digest", "key", "reused"),
    "stage_config",
)
# After that the tracker is given up, not the run.
SECONDS_TO_CONNECT = 20
SECONDS_TO_UPLOAD = 30


class Wandb(Tracker):
    """`mode`: online | offline | disabled; empty means $WANDB_MODE, else online with an account
    and offline without.
    """

    def __init__(self, run_dir: Path, project: str = "compress", mode: str = "") -> None:
        super().__init__(run_dir, project)
        account = os.environ.get("WANDB_API_KEY") or get_netrc_auth(
            os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        )
        self.mode: Any = (
            mode or os.environ.get("WANDB_MODE") or ("online" if account else "offline")
        )

        # Below the run directory too, not in the home.
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            os.environ.setdefault(name, str(self.run_dir / "wandb" / "cache"))

    @staticmethod
    def check() -> None:
        """ValueError with the install line when the wandb package is missing;
        does not import it.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "track=wandb needs the package wandb, which is not installed; "
                "pip install 'compress-lm[wandb]', or use track=jsonl, which needs nothing"
            )

    def record(self, record: Record) -> None:
        recorded = load_run(self.run_dir)
        run = self._open(record, recorded.info)

        # Closed also where W&B takes only a part of it.
        try:
            run.define_metric("train/*", step_metric="train/step")
            for row in recorded.rows(record, "steps"):
                run.log({f"train/{key}": value for key, value in row.items()})
            _log_answers(run, recorded, record)
            _log_scores(run, record)
            self._log_weights(run, recorded, record)
        finally:
            run.finish(exit_code=0)

    def _log_weights(self, run: Any, recorded: Run, record: Record) -> None:
        """A slot's weights as a reference with checksums, and the parent's as what they were made
        of. Nothing where they are no longer here.
        """
        import wandb

        weights = (folder_of(self.run_dir, record) / "weights").resolve()
        if not weights.exists():
            return
        parent = next((r for r in recorded.records if r["slot"] == record["parent"]), {})
        lineage = {key: record.get(key) for key in ("digest", "key", "parent", "technique")}
        lineage["parent_digest"] = parent.get("digest")
        artifact = wandb.Artifact(_artifact(record), "model", metadata=lineage)
        artifact.add_reference(weights.as_uri(), checksum=True)

        # Offline this raises; the metadata say the same.
        if parent and self.mode == "online":
            run.use_artifact(f"{_artifact(parent)}:{parent['digest'][:12]}")
        run.log_artifact(artifact, aliases=["latest", record["digest"][:12]])

    def finish(self, exit_code: int) -> None:
        """Wait for W&B's own process: closing a run returns some milliseconds before its file is
        whole.
        """
        import wandb

        wandb.teardown(exit_code)

    def _open(self, record: Record, about: dict[str, Any]) -> Any:
        """A W&B run for the record, in place of what an earlier one wrote; offline from now on
        when there is no connection.
        """
        import wandb

        name = f"{record['run']}/{record['slot']}"
        config = {key: record.get(key) for key in CONFIG_OF_RECORD}
        config |= {key: about.get(key) for key in ("git_sha", "versions", "machine")}

        # Online, a run of the same id is replaced; offline, its files are.
        id = hashlib.sha256(name.encode()).hexdigest()[:16]
        for earlier in self.run_dir.glob(f"wandb/offline-run-*-{id}"):
            shutil.rmtree(earlier)

        # Progress lines of artifacts obey only the process-wide settings.
        settings = wandb.Settings(
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            console="off",
            silent=True,
            host="",
            program="",
            init_timeout=SECONDS_TO_CONNECT,
            finish_timeout=SECONDS_TO_UPLOAD,
            finish_timeout_raises=True,
            root_dir=str(self.run_dir),
        )
        wandb.setup(settings=settings)
        try:
            return wandb.init(
                project=self.project,
                mode=self.mode,
                dir=str(self.run_dir),
                settings=settings,
                name=name,
                group=record["run"],
                id=id,
                job_type=record["slot"],
                config=config,
            )
        except (wandb.errors.Error, TimeoutError) as error:
            if self.mode != "online":
                raise
            self.mode = "offline"
            wandb.teardown(exit_code=1)  # the failed run would hold its id otherwise
            print(
                f"warning: W&B cannot be reached ({without_credentials(str(error))}); writing"
                f" offline, later: wandb sync {self.run_dir}/wandb/offline-run-*",
                file=sys.stderr,
            )
            return self._open(record, about)


def _log_answers(run: Any, recorded: Run, record: Record) -> None:
    """Tables of what a slot answered: `flips` to tasks that its teacher answered otherwise, `open`
    to open prompts.
    """
    import wandb

    teacher = recorded.teacher
    if teacher:
        changed = flips(recorded.rows(teacher, "items"), recorded.rows(record, "items"))
        if changed:
            rows = [list(flip) for flip in changed]
            run.log({"flips": wandb.Table(list(Flip._fields), rows)})

    teacher_answers = recorded.rows(teacher, "open") if teacher else []
    if answers := worst_first(recorded.rows(record, "open"), teacher_answers):
        rows = [[row[key] for key in OPEN] for row in answers]
        run.log({"open": wandb.Table(list(OPEN), rows)})


def _log_scores(run: Any, record: Record) -> None:
    """One row of a record's numbers, and its verdicts as the run's summary."""
    row = {f"score/{key}": value for key, value in record["scores"].items()}
    row |= {f"stage/{key}": value for key, value in record.get("metrics", {}).items()}
    row |= {f"stage/{key}_seconds": value for key, value in record.get("seconds", {}).items()}
    run.log(row)

    run.summary["verdict"] = worst([record]) or "none enforced"
    run.summary.update(
        {
            f"verdict/{verdict['limit']}": f"{verdict['verdict']}: {verdict['sentence']}"
            for verdict in record["verdicts"]
        }
    )


def _artifact(record: Record) -> str:
    """The name of a slot's weights in W&B."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{record['recipe']}-{record['slot']}")
