"""``python -m ebm_ppl``: run the demo and print its table; ``python -m ebm_ppl check``: see :mod:`ebm_ppl.command`."""

import argparse

from ebm_ppl import command

try:
    from ebm_ppl import demo
except ImportError as error:
    demo, _MISSING = None, str(error)


def main() -> None:
    """Parse the command line; run :func:`ebm_ppl.demo.run` or :func:`ebm_ppl.command.check`."""
    parser = argparse.ArgumentParser(
        prog="python -m ebm_ppl", description="Train, use and diagnose an EBM prior on digits."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of every random key (default 0)")
    parser.add_argument("--output", default="outputs/demo", help="folder for figures and netCDF (default outputs/demo)")
    parser.add_argument("--updates", type=int, default=2000, help="training updates (default 2000)")
    parser.add_argument("--digits", type=int, default=150, help="held-out digits to fill in (default 150)")
    parser.add_argument("--samples", type=int, default=500, help="NUTS draws per chain (default 500)")
    parser.add_argument("--particles", type=int, default=512, help="particles behind log Z (default 512)")
    commands = parser.add_subparsers(dest="command", title="instead of the demo")
    what = "what the EBM sites of a model need, and the diagnosis of a saved run"
    command.add_arguments(commands.add_parser("check", help=what, description=f"Say {what}."))
    arguments = parser.parse_args()
    if arguments.command == "check":
        raise SystemExit(command.check(arguments))
    run_demo(arguments)


def run_demo(arguments: argparse.Namespace) -> None:
    """Run the demo and print its table.

    Raises:
        SystemExit: its extras are not installed.
    """
    if demo is None:
        raise SystemExit(f"The demo needs its extras: pip install 'ebm-ppl[demo]' ({_MISSING}).")
    result = demo.run(
        arguments.seed,
        arguments.output,
        num_updates=arguments.updates,
        num_digits=arguments.digits,
        num_samples=arguments.samples,
        num_particles=arguments.particles,
    )
    print(demo.table(result))
    print(f"\nWrote digits.png, rank.png and demo.nc to {arguments.output}")


if __name__ == "__main__":
    main()
