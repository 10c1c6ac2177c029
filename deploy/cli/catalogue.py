"""``effdeploy list``: what can be exported."""

from __future__ import annotations

from deploy.cli.app import Json, Quiet, app, session


@app.command("list")
def list_systems(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show the systems, their variants, parameters, multiply-adds and inputs."""
    with session(as_json, quiet, None) as console:
        from deploy.api import systems

        systems(console=console)
