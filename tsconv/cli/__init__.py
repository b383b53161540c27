"""The `tsconv` command: one thin file per subcommand, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from tsconv import __version__
from tsconv.cli.output import forget_unwritten, prepare_streams, say
from tsconv.errors import TsconvError

# subcommand -> (module, one-line help). The help stands here so that `tsconv --help` imports no subcommand.
COMMANDS = {
    "convert": ("tsconv.cli.convert", "Convert a TurboSparse checkpoint to GGUF and a predictor sidecar."),
    "run": ("tsconv.cli.run", "Generate text or chat."),
    "serve": ("tsconv.cli.serve", "Serve a web page and an OpenAI-compatible API."),
    "list": ("tsconv.cli.list", "List the models that are kept."),
    "rm": ("tsconv.cli.rm", "Remove kept models."),
    "tools": ("tsconv.cli.tools", "Run llama.cpp's own programs: llama-bench, llama-perplexity, ..."),
    "profile": ("tsconv.cli.profile", "Count which neurons are active on a text; measure this machine."),
    "reorder": ("tsconv.cli.reorder", "Put the hot neurons of a converted model first."),
    "place": ("tsconv.cli.place", "Decide which neurons live on the GPU, in RAM and on disk."),
    "inspect": ("tsconv.cli.inspect", "Show what is in a converted model, sidecar or statistics."),
    "perplexity": ("tsconv.cli.perplexity", "Measure what a conversion costs: perplexity, KL divergence."),
    "bench": ("tsconv.cli.bench", "Measure speed beside stock llama.cpp, dense."),
    "doctor": ("tsconv.cli.doctor", "Check this installation and say how to mend it."),
}


COMPUTE = ("run", "serve", "perplexity", "profile")  # their threads wait for one another
LOOK_SECONDS = 0.1  # for which these look whether the machine is busy


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called: `tsconv --help` must not pay for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        return importlib.import_module(module).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="tsconv")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """TurboSparse dReLU models to GGUF, run with neuron-level sparsity inside unmodified llama.cpp."""
    if ctx.invoked_subcommand in COMPUTE:
        from tsconv.machine.limits import MAX_BUSY_CORES, busy_cores
        from tsconv.native.threads import wait_asleep

        if (busy_cores(LOOK_SECONDS) or 0) > MAX_BUSY_CORES:
            wait_asleep()


def main() -> None:
    """Entry point: a `TsconvError` becomes one line on stderr and its exit code; Ctrl-C exits with 130.

    So does what the surroundings can do to any step: a name that is too long, a folder that goes away, a full disk.
    """
    prepare_streams()
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except TsconvError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        say(f"error: {error.format_message()}")
        sys.exit(error.exit_code)
    except (OSError, UnicodeError) as error:
        forget_unwritten()  # of --help
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        say(f"error: {TsconvError(what, where=getattr(error, 'filename', None))}")
        sys.exit(TsconvError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        sys.exit(130)
