"""The verbs for those who run images: use, modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpacker import report
from unpacker.cli import exits, options, output
from unpacker.errors import SettingsError, WishlistError

if TYPE_CHECKING:
    from unpacker.lookup import Asked
    from unpacker.readers import Found, Missing, Reader
    from unpacker.settings import Settings


def use(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="As you know it: alpine:3.10, docker://…, a URL, a path, a digest.")
    ],
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Only the lines for apptainer, prun, ganga, htcondor, glideinwms, parsl, reana, podman, module.",
        ),
    ] = None,
    target: options.Target = None,
    wishlist: Annotated[
        str | None, typer.Option("--wishlist", metavar="WISHLIST", help="Look there whether it is asked for.")
    ] = None,
    state: options.State = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Print the lines that run a published image; exit 1 if it is not published."""
    from unpacker import assembly
    from unpacker.consumers import CONSUMERS
    from unpacker.lookup import read
    from unpacker.readers import Missing, find

    if consumer is not None and consumer not in CONSUMERS:
        raise SettingsError(f"--for is one of {', '.join(CONSUMERS)}, not {consumer!r}")
    settings = options.load_settings(config, target=target, state=state)
    reader = assembly.reader(settings)
    try:
        asked = read(image, reader.mounts)
    except ValueError as error:
        raise WishlistError(str(error)) from None
    found = find(asked, reader)
    if isinstance(found, Missing):
        _print_missing(asked, found, reader, settings, wishlist, json=json)
        raise typer.Exit(exits.SOME_FAILED)
    _print_found(found, reader, settings, consumer, json=json)


def _print_found(found: Found, reader: Reader, settings: Settings, consumer: str | None, *, json: bool) -> None:
    from unpacker.consumers import CONSUMERS, Usable, lines
    from unpacker.modulefiles import module_name
    from unpacker.multiarch import MULTIARCH

    image = Usable(
        path=f"{reader.mount.rstrip('/')}/{found.name}",
        gpu=found.record is not None and found.record.gpu,
        apptainer=settings.modules.apptainer,
        module="" if found.name.startswith(f"{MULTIARCH}/") else module_name(found.name),
    )
    texts: dict[str, tuple[str, ...]] = {}
    for name in (consumer,) if consumer is not None else CONSUMERS:
        try:
            texts[name] = lines(name, image)
        except ValueError as error:
            if consumer is not None:
                raise SettingsError(str(error)) from None
            output.complain(str(error))
    if json:
        value: dict[str, Any] = {
            "name": found.name,
            "path": image.path,
            "gpu": image.gpu,
            "platforms": list(found.platforms),
            "published": None if found.record is None else found.record.to_json(),
            "lines": {name: list(text) for name, text in texts.items()},
        }
        output.print_json(value)
    elif consumer is not None:
        print("\n".join(texts[consumer]))
    else:
        platforms = f"  ({', '.join(found.platforms)})" if found.platforms else ""
        print(f"{image.path}{platforms}")
        for name, text in texts.items():
            print(f"\n{name}:")
            print("\n".join(f"    {line}" for line in text))


def _print_missing(
    asked: Asked, missing: Missing, reader: Reader, settings: Settings, wishlist: str | None, *, json: bool
) -> None:
    from unpacker.pending import pending

    found = pending(asked, reader, settings, None if wishlist is None else options.read_wishlist(wishlist))
    if json:
        value = {
            "name": found.name or None,
            "state": found.state,
            "since": report.moment(found.since),
            "error": found.error or None,
            "near": list(missing.near),
        }
        output.print_json(value)
        return
    # Nothing of this goes to stdout, where scripts look for lines to run.
    output.complain(f"{asked.text} is not published in {reader.mount}: {found.told}")
    if missing.near:
        output.complain("\n  ".join(("did you mean one of these?", *missing.near)))


def modules(
    directory: Annotated[str, typer.Option("--output", metavar="DIR", help="Where modulefiles/ and bin/ are written.")],
    target: options.Target = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Write Lmod modulefiles and their wrapper for all published images; exit 5 if files of others are in the way."""
    from unpacker import assembly
    from unpacker.modules import write_for

    settings = options.load_settings(config, target=target)
    done = write_for(directory, assembly.reader(settings), settings.modules)
    if json:
        output.print_json(
            {
                "written": list(done.written),
                "removed": list(done.removed),
                "unchanged": done.unchanged,
                "foreign": list(done.foreign),
                "changed": list(done.changed),
            }
        )
    else:
        for word, paths in (("wrote", done.written), ("removed", done.removed)):
            for path in paths:
                print(f"{word} {path}")
        print(f"{len(done.written)} written, {len(done.removed)} removed, {done.unchanged} as they were")
    output.warn(f"{path} is not ours and stays as it is: move it away" for path in done.foreign)
    output.warn(f"{path} was changed by somebody and stays, though its image is gone" for path in done.changed)
    if done.foreign:
        raise typer.Exit(exits.TARGET)
