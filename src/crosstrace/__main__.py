"""`crosstrace` and `python -m crosstrace`: the command line, which a signal ends cleanly while it is still imported."""

from __future__ import annotations

from crosstrace.core import interrupts, machine


def main() -> None:
    """Run the command line."""
    try:
        interrupts.listen()
        machine.prepare()
        from crosstrace.cli import commands

        commands.main()
    except SystemExit:
        raise
    except BaseException as error:
        if interrupts.received() is None and not isinstance(error, KeyboardInterrupt):
            raise
        interrupts.tell()  # a module that was half imported may have made another exception of it
        raise SystemExit(interrupts.exit_code()) from None


if __name__ == "__main__":
    main()
