"""The `tsconv` command: one thin file per subcommand, imported only when it is called."""

from __future__ import annotations

import sys

import click

from tsconv import __version__
from tsconv.cli.lazy import LazyGroup
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
    "predictor": ("tsconv.cli.predictor", "Make predictors for a converted model: train, or build without training."),
    "inspect": ("tsconv.cli.inspect", "Show what is in a converted model, sidecar or statistics."),
    "eval": ("tsconv.cli.eval", "Measure how good a model is: perplexity, KL divergence."),
    "perplexity": ("tsconv.cli.perplexity", "Another name of tsconv eval ppl."),
    "bench": ("tsconv.cli.bench", "Measure speed beside stock llama.cpp, dense."),
    "doctor": ("tsconv.cli.doctor", "Check this installation and say how to mend it."),
}


COMPUTE = ("run", "serve", "eval", "perplexity", "profile", "predictor")  # their threads wait for one another
LOOK_SECONDS = 0.1  # for which these look whether the machine is busy


@click.group(cls=LazyGroup, modules=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
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
