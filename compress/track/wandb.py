"""Weights & Biases, offline unless there is an account: `wandb sync RUN/wandb/offline-run-*` uploads later.

Group = the run's name, job type = the slot, one W&B run per stage, opened when the stage's record exists and closed at once. History:
`train/*` over `train/step`, then one row of `score/*` and `stage/*`. Summary: `verdict` and one `verdict/<limit>` with its sentence.
Weights are reference artifacts: a path and checksums, never a copy. W&B would by itself collect sys.argv, the list of packages, the git
remote (which can hold a token), the source file, the machine and the console. Secrets live there, so all of it is off.
"""

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from requests.utils import get_netrc_auth

from compress.report.records import worst
from compress.track import Tracker, slot_dir

SECONDS_TO_CONNECT, SECONDS_TO_UPLOAD = 20, 120  # after that the tracker is given up, not the run


class Wandb(Tracker):
    """`mode`: online | offline | disabled; empty means $WANDB_MODE, else online with an account and offline without."""

    def __init__(self, run_dir: Path, project: str = "compress", mode: str = "") -> None:
        super().__init__(run_dir, project)
        account = os.environ.get("WANDB_API_KEY") or get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
        self.mode: Any = mode or os.environ.get("WANDB_MODE") or ("online" if account else "offline")
        self.run: dict[str, Any] = {}

    @staticmethod
    def check() -> None:
        """ValueError with the install line when the wandb package is missing; does not import it."""
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "track=wandb needs the package wandb, which is not installed; "
                "pip install 'compress-lm[wandb]', or use track=jsonl, which needs nothing"
            )

    def start(self, run: dict[str, Any]) -> None:
        self.run = run

    def record(self, record: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        import wandb

        # wandb's caches and settings go below the run directory too, not into the home; the caller's own choice is kept.
        ours = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"), str(self.run_dir / "wandb" / "cache"))
        with mock.patch.dict(os.environ, ours | os.environ):
            run = self._open(record)
            try:
                run.define_metric("train/*", step_metric="train/step")
                for row in steps:
                    run.log({f"train/{key}": value for key, value in row.items()})
                named = {"score/{}": record["scores"], "stage/{}": record.get("metrics", {}), "stage/{}_seconds": record.get("seconds", {})}
                run.log({form.format(key): value for form, values in named.items() for key, value in values.items()})
                run.summary["verdict"] = worst([record]) or "none enforced"
                run.summary.update({f"verdict/{v['limit']}": f"{v['verdict']}: {v['sentence']}" for v in record["verdicts"]})
                weights = (slot_dir(self.run_dir, record) / "weights").resolve()
                if weights.exists():
                    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{record['recipe']}-{record['slot']}")
                    artifact = wandb.Artifact(name, "model", metadata={key: record.get(key) for key in ("digest", "parent", "technique")})
                    artifact.add_reference(weights.as_uri(), checksum=True)
                    run.log_artifact(artifact)
            finally:
                run.finish(exit_code=0)

    def finish(self, exit_code: int) -> None:
        """Wait for W&B's own process: closing a run returns some milliseconds before its file is whole."""
        import wandb

        wandb.teardown(exit_code)

    def _open(self, record: dict[str, Any]) -> Any:
        """A W&B run for the record; offline from now on when there is no connection."""
        import wandb

        name = f"{record['run']}/{record['slot']}"
        config = {k: record.get(k) for k in ("recipe", "slot", "index", "technique", "runtime", "parent", "digest", "key", "reused", "stage_config")}
        settings = wandb.Settings(
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            disable_git=True, disable_code=True, save_code=False, disable_job_creation=True, console="off",
            silent=True, host="", program="", init_timeout=SECONDS_TO_CONNECT, finish_timeout=SECONDS_TO_UPLOAD,
            root_dir=str(self.run_dir),
        )  # fmt: skip
        wandb.setup(settings=settings)  # progress lines of artifacts obey only the process-wide settings
        try:
            return wandb.init(
                project=self.project, mode=self.mode, dir=str(self.run_dir), settings=settings, name=name, group=record["run"],
                id=hashlib.sha256(name.encode()).hexdigest()[:16],  # replaying a record finds its run again
                job_type=record["slot"], config=config | {k: self.run.get(k) for k in ("git_sha", "versions", "machine")},
            )  # fmt: skip
        except (wandb.errors.Error, TimeoutError) as error:
            if self.mode != "online":
                raise
            self.mode = "offline"
            wandb.teardown(exit_code=1)  # the failed run would hold its id otherwise
            print(f"warning: W&B cannot be reached ({error}); writing offline, later: "
                  f"wandb sync {self.run_dir}/wandb/offline-run-*", file=sys.stderr)  # fmt: skip
            return self._open(record)
