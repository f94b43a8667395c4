"""The verbs that work on a target without a wishlist: publish, remove, verify, receipts, gc, init, resign, snapshot."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from json import dumps
from typing import Annotated

import typer

from unpacker import report
from unpacker.cli import exits, options, output
from unpacker.errors import SettingsError, WishlistError
from unpacker.record import Published
from unpacker.wishlist import parse

_INFO_LIMIT = 1 << 20
"""The same that readers allow for the meta info of a repository."""


def publish(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="registry/repository:tag, or oci:PATH:TAG")],
    target: options.Target = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="The public name: registry/repository:tag.")
    ] = None,
    platform: Annotated[str, typer.Option("--platform", help="os/architecture[/variant]")] = "linux/amd64",
    state: options.State = None,
    config: options.Config = None,
    jobs: options.Jobs = None,
    lock_wait: options.Wait = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    log_format: options.LogFormat = "text",
) -> None:
    """Publish one image outside of any wishlist; it stays until it is removed by name."""
    from unpacker import assembly
    from unpacker.cli.run import carry_out

    settings = options.load_settings(config, target=target, state=state, jobs=jobs, lock_wait=lock_wait)
    options.configure_logs(verbose=verbose, quiet=quiet, log_format=log_format)
    layout, text = assembly.source(image, name)
    # A string of JSON is one of YAML, whatever is in it; bytes that are no letters are in no name anyway.
    text = text.encode("ascii", "backslashreplace").decode("ascii")
    wish = f"version: 2\nimages:\n- image: {dumps(text)}\n  platform: {dumps(platform)}\n"
    found = parse(wish.encode(), "the command line")
    if not found.sound:
        raise WishlistError("; ".join(fault.message for fault in found.faults))
    choice = assembly.Choice(layout=layout, anonymous=True)
    carry_out(found, "", settings, choice, json=json, quiet=quiet, report_file=None)


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Published names: registry/repository:tag")],
    target: options.Target = None,
    config: options.Config = None,
    lock_wait: options.Wait = None,
) -> None:
    """Take published names away, whoever published them; their roots stay until gc."""
    from unpacker import assembly

    settings = options.load_settings(config, target=target, lock_wait=lock_wait)
    publisher = assembly.existing(settings)
    with publisher.lock(settings.lock_wait):
        paths = options.published_names(names, publisher.published())
        with publisher.transaction(f"remove {', '.join(paths)}") as transaction:
            transaction.remove(paths, now=int(time.time()))
    for path in paths:
        print(f"removed {path}")


def verify(
    images: options.Images = None,
    target: options.Target = None,
    config: options.Config = None,
    quick: Annotated[bool, typer.Option("--quick", help="Names and metadata only, not contents.")] = False,
    json: options.Json = False,
) -> None:
    """Compare published trees with their records; exit 5 if anything differs."""
    from unpacker import assembly

    settings = options.load_settings(config, target=target)
    publisher = assembly.existing(settings)
    standing = publisher.published()
    wanted = options.published_names(images, standing)
    problems = [
        {"name": p.public_path, "path": p.path, "problem": p.what}
        for p in assembly.problems(publisher, standing, wanted, quick=quick)
    ]
    if json:
        output.print_json({"checked": len(wanted), "problems": problems})
    else:
        rows = [(p["name"], p["path"], p["problem"]) for p in problems]
        output.print_table(
            ("NAME", "PATH", "PROBLEM"), rows, f"{len(wanted)} names checked, {len(problems)} problems\n"
        )
    raise typer.Exit(exits.TARGET if problems else 0)


def receipts(
    images: options.Images = None,
    target: options.Target = None,
    config: options.Config = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    log_format: options.LogFormat = "text",
) -> None:
    """Attach the receipts of what stands published, where [receipts] asks for them; exit 1 if any could not be."""
    from unpacker import assembly, pools
    from unpacker.receipts import attach_again

    settings = options.load_settings(config, target=target)
    options.configure_logs(verbose=verbose, quiet=False, log_format=log_format)
    publisher = assembly.existing(settings)
    attach = assembly.attach(settings, publisher)
    if attach is None:
        raise SettingsError("receipts are switched off: the operator's unpacker.toml needs [receipts] enabled = true")
    standing = publisher.published()
    wanted = [standing[name] for name in options.published_names(images, standing)]
    if not images:
        # Damaged records are told by `status` and `verify`, and other tools' names have none.
        wanted = [each for each in wanted if isinstance(each, Published)]
    with pools.asking(settings.connections_per_host) as executor:
        said = list(attach_again(wanted, assembly.registry(settings), attach, executor))
    failed = [{"name": each.public_path, "error": each.error} for each in said if each.error]
    gone = [each.public_path for each in said if each.is_gone]
    attached = len(said) - len(failed) - len(gone)
    if json:
        output.print_json({"attached": attached, "gone": gone, "failed": failed})
    else:
        rows = [(each["name"], each["error"]) for each in failed]
        rest = f", {len(gone)} of images that no registry has" if gone else ""
        output.print_table(("NAME", "ERROR"), rows, f"{attached} receipts attached, {len(failed)} not{rest}\n")
    raise typer.Exit(exits.SOME_FAILED if failed else 0)


def gc(
    target: options.Target = None,
    grace: Annotated[
        float | None, typer.Option("--grace", min=0, metavar="DAYS", help="How long unreferenced roots stay.")
    ] = None,
    keep_revisions: Annotated[
        float | None,
        typer.Option("--keep-revisions", min=0, metavar="DAYS", help="How long a repository's old revisions stay."),
    ] = None,
    state: options.State = None,
    config: options.Config = None,
    lock_wait: options.Wait = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: options.Json = False,
) -> None:
    """Delete roots and contents that no name refers to, after a grace period."""
    from unpacker import assembly
    from unpacker.cache import prune
    from unpacker.gc import Collected

    settings = options.load_settings(
        config, target=target, state=state, grace_days=grace, keep_revisions_days=keep_revisions, lock_wait=lock_wait
    )
    publisher = assembly.existing(settings)
    with nullcontext() if dry_run else publisher.lock(settings.lock_wait):
        found = assembly.collect(publisher, settings, dry_run=dry_run)
    if not dry_run:
        prune(assembly.state(settings), unused_for=90 * 86_400)
    if json:
        output.print_json({"dry_run": dry_run, **asdict(found)})
        return
    for root in found.roots:
        print(f"{'would delete' if dry_run else 'deleted'} {root}")
    print(
        f"{len(found.roots)} roots and {found.contents} contents {'to delete' if dry_run else 'deleted'}, "
        f"{report.size(found.freed)}; {found.waiting} roots wait for their grace period"
        + (f"; {found.revisions} old revisions" if not isinstance(found, Collected) else "")
    )
    if not isinstance(found, Collected) and found.unlinked:
        print(
            f"{report.size(found.unlinked)} more are free when the revisions are collected that still show these roots"
        )


def init(
    repository: options.Repository,
    name: Annotated[str, typer.Option("--name", help="The repository's name, such as unpacked.example.org.")],
    keys: options.Keys = None,
    config: options.Config = None,
    compression: Annotated[
        str, typer.Option("--compression", metavar="dense|fast|stock", help="Of objects.")
    ] = "dense",
    hash_: Annotated[str, typer.Option("--hash", metavar="sha1|rmd160|shake128", help="Of objects.")] = "sha1",
    days: Annotated[int, typer.Option("--days", min=1, help="How long the whitelist is good for.")] = 30,
    info: Annotated[
        str | None, typer.Option("--info", metavar="FILE", help="JSON for clients: administrator, email, url …")
    ] = None,
) -> None:
    """Make an empty CernVM-FS repository, with keys if there are none."""
    from unpacker import assembly
    from unpacker.cvmfs.repository import Repository as Native

    directory = assembly.stratum0(repository)
    where = options.load_settings(config, keys=keys).keys or f"{directory}.keys"
    made = Native.create(
        directory,
        name,
        where,
        compression=compression,
        hash=hash_,
        days=days,
        info=None if info is None else _read(info),
        now=int(time.time()),
    )
    print(
        f"made {made.name} in {directory}; its keys are in {where}: back them up, and give {made.name}.pub to clients"
    )
    print(f"its whitelist expires in {days} days: run `unpacker resign {repository}` before that")


def resign(
    repository: options.Repository,
    keys: options.Keys = None,
    config: options.Config = None,
    days: Annotated[int, typer.Option("--days", min=1, help="How long from now on it is good for.")] = 30,
) -> None:
    """Renew the whitelist of a CernVM-FS repository, without which no client mounts it; needs the master key."""
    from unpacker import assembly
    from unpacker.cvmfs.repository import Repository as Native

    directory = assembly.stratum0(repository)
    native = Native.open(directory)
    where = options.load_settings(config, keys=keys).keys or f"{directory}.keys"
    renewed = native.resign(where, days=days, now=int(time.time()))
    print(f"the whitelist of {native.name} is good until {report.moment(renewed.expires)}")


def snapshot(
    repository: options.Repository,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="What to call the published revision.")] = None,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="What it is, for who lists them.")
    ] = "",
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the name away; gc then takes what only it kept.")
    ] = False,
    keys: options.Keys = None,
    config: options.Config = None,
    lock_wait: options.Wait = None,
    json: options.Json = False,
) -> None:
    """Name the published revision of a CernVM-FS repository, so that it stays readable; without NAME list them."""
    from unpacker import assembly
    from unpacker.publish.stratum0 import Stratum0Publisher

    settings = options.load_settings(config, keys=keys, lock_wait=lock_wait)
    publisher = Stratum0Publisher(assembly.stratum0(repository), settings.keys)
    if name is None and (remove or message):
        raise SettingsError(f"{'--remove' if remove else '--message'} needs the NAME of a snapshot")
    with publisher.lock(settings.lock_wait) if name is not None else nullcontext():
        if name is not None and remove:
            publisher.forget_snapshot(name)
        elif name is not None:
            publisher.name_snapshot(name, message)
    found = publisher.snapshots()
    if json:
        rows = [
            {
                "name": tag.name,
                "revision": tag.revision,
                "published": report.moment(tag.timestamp),
                "description": tag.description,
            }
            for tag in found
        ]
        output.print_json({"snapshots": rows})
        return
    table = [(tag.name, str(tag.revision), report.moment(tag.timestamp) or "", tag.description) for tag in found]
    output.print_table(("NAME", "REVISION", "PUBLISHED", "WHAT IT IS"), table, f"{len(table)} named snapshots\n")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_INFO_LIMIT + 1)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
