"""``minipuzzle report``: one page that shows a whole run, from the folders that its steps wrote."""

from __future__ import annotations

from pathlib import Path

import click

from minipuzzle.commands.options.shared import FOLDER_OR_FILE, echo_json, json_option


@click.command(short_help="Show a whole run on one page.")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=FOLDER_OR_FILE)
@click.option("-o", "--out", type=FOLDER_OR_FILE, default="report.html", show_default=True, help="The page.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier page; never any other file.")
@json_option
def report(folders: tuple[Path, ...], out: Path, overwrite: bool, as_json: bool) -> None:
    """Write one HTML file that shows what the steps of a run made, from what, and how good it is.

    FOLDERs are outputs of prune, distill, export and evaluate, in the order in which they were made. Each holds a
    report.html of its own already, which knows the steps before it; this page has the charts of all of them. It needs
    nothing beside itself and no network.
    """
    from minipuzzle.files.outputs import check_target_file, output_file
    from minipuzzle.show.page.facts import read_run
    from minipuzzle.show.page.page import check_page, render_page

    check_target_file(out, overwrite=overwrite, read=check_page, inputs=folders)
    steps = read_run(folders)
    with output_file(out) as path:
        path.write_text(render_page(steps), encoding="utf-8")
    if as_json:
        echo_json({"out": str(out), "steps": [step.command for step in steps], "num_bytes": out.stat().st_size})
    else:
        click.echo(f"written to {out}")
