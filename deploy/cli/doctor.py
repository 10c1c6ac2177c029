"""``effdeploy doctor``: what is installed and what can run here."""

from __future__ import annotations

from pathlib import Path

from deploy.cli.app import Json, Quiet, app, session


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check installation, backends, CPU, GPU and known-bad versions; exit code 12 when export cannot run."""
    with session(as_json, quiet, None) as console:
        from deploy.doctor import examine, report

        report(examine(Path("engines")), console)
