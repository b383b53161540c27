"""`profile`: counts which neurons of a model are active on a text. The command line is a thin shell over it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsconv.errors import HubError, OutputError, TsconvError
from tsconv.format.header import Header, read_header
from tsconv.stats import counts
from tsconv.stats import file as stats_file
from tsconv.stats.counts import Stats, Subject

if TYPE_CHECKING:
    from tsconv.runtime.model import SparseLlama
    from tsconv.stats.collect import Collected
    from tsconv.stats.text.corpus import Corpus

DEFAULT_TOKENS = 1_000_000
DEFAULT_CHUNK = 512
SUFFIX = ".stats.gguf"


@dataclass(frozen=True)
class ProfileResult:
    """What `profile` or `merge` did.

    Attributes:
        stats: of this run and of what was merged.
        outfile: where they are.
        report: the report's page, None when none was asked for.
        n_tokens, seconds: of this run, loading left out; 0 when there was only merging.
        notes: what the user should know of the text.
        stopped: why the run ended early, None when it did not. Everything that was counted before is in the file.
    """

    stats: Stats
    outfile: Path
    report: Path | None
    n_tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    stopped: TsconvError | None = None


def profile(
    model: str | Path,
    calib: str,
    outfile: str | Path | None = None,
    *,
    n_tokens: int = DEFAULT_TOKENS,
    chunk: int = DEFAULT_CHUNK,
    seed: int | None = None,
    text_field: str | None = None,
    merge_with: Iterable[str | Path] = (),
    report: str | Path | None = None,
    sparsity: str | None = None,
    predictor_path: str | Path | None = None,
    n_threads: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **gpu: Any,
) -> ProfileResult:
    """Runs a converted model over calibration text, counts its activations (tsconv.stats.counts), and writes them.

    Args:
        model: `NAME.gguf` written by `convert` or `reorder`.
        calib: the text, see tsconv.stats.text.corpus.open_corpus.
        outfile: default NAME.stats.gguf beside the model.
        n_tokens: how many to count, rounded up to whole chunks; fewer when the text is shorter.
        chunk: tokens that are computed together, from an empty context.
        seed: takes documents in a random order that the number determines; None: in the text's own.
        text_field: column or field of the text in Parquet and JSON Lines.
        merge_with: files of statistics to add.
        report: directory for figures and a page of them.
        sparsity: "predictor", "exact", or None for the model's own: the function whose activations are counted. Gate
            and up are computed for all neurons either way.
        predictor_path: the model's sidecar, when it is not beside it.
        n_threads: as for tsconv.load.
        force: replace an existing output.
        progress: called with the number of tokens counted so far.
        should_stop: asked after every chunk; what was counted until then is written.
        **gpu: n_gpu_layers, device, main_gpu, vram_budget, as for tsconv.load.

    Raises:
        TsconvError: no text, or one shorter than a chunk; files of statistics that do not belong together.
        ModelFileError: a model or statistics that are missing, damaged or too old.
        OutputError: the output exists, or cannot be written.
        HubError: the text cannot be reached.
    """
    from tsconv.runtime.model import load
    from tsconv.stats.text.corpus import open_corpus

    path = Path(model)
    output = Path(outfile) if outfile is not None else path.with_suffix(SUFFIX)
    merged = [stats_file.load(Path(name)) for name in merge_with]
    header = read_header(path)
    _check_chunk(header, chunk)
    corpus = open_corpus(calib, seed, text_field)
    llama = load(  # it counts in another context
        path,
        sparsity=sparsity,
        predictor_path=predictor_path,
        n_threads=n_threads,
        n_ctx=1,
        n_batch=1,
        header=header,
        **gpu,
    )
    try:
        subject, n_parts = _sum_of(header, llama.sparsity, merged)
        _check_outputs(output, report, subject, n_parts, force)
        warning = llama.context_warning(chunk)
        started = time.perf_counter()
        run = _counted(llama, corpus, chunk, n_tokens, progress, should_stop)
        seconds = time.perf_counter() - started
    finally:
        llama.close()
    total = counts.merge([run.stats, *merged])
    return ProfileResult(
        stats=total,
        outfile=_save(total, output, force),
        report=_report(total, report),
        n_tokens=run.stats.n_tokens,
        seconds=seconds,
        notes=(*corpus.notes, *_notes(warning, run, n_tokens)),
        stopped=run.stopped,
    )


def merge(
    files: Iterable[str | Path], outfile: str | Path, *, report: str | Path | None = None, force: bool = False
) -> ProfileResult:
    """Adds up files of statistics of one checkpoint; the result does not depend on their order.

    Args:
        files: at least one.
        outfile: where the sum goes.
        report, force: as for `profile`.

    Raises:
        TsconvError: they do not belong together.
        ModelFileError: one is missing or damaged.
        OutputError: the output exists, or cannot be written.
    """
    total = counts.merge([stats_file.load(Path(name)) for name in files])
    output = Path(outfile)
    _check_outputs(output, report, total.subject, len(total.parts), force)
    stats_file.save(total, output, force)
    return ProfileResult(stats=total, outfile=output, report=_report(total, report))


def _check_chunk(header: Header, chunk: int) -> None:
    longest = header.keys.get("llama.context_length")
    if isinstance(longest, int) and chunk > longest:
        raise TsconvError("the chunk is longer than the model's context", expected=f"at most {longest}", found=chunk)


def _check_outputs(output: Path, report: str | Path | None, subject: Subject, n_parts: int, force: bool) -> None:
    """Raises what writing would raise, before hours of counting."""
    stats_file.check_output(output, subject, n_parts, force)
    if report is not None:
        from tsconv.report.write import check_writable

        check_writable(Path(report))


def _sum_of(header: Header, sparsity: str, merged: Sequence[Stats]) -> tuple[Subject, int]:
    """Whose neurons the model and the statistics to add have, and of how many texts the sum will be.

    Raises:
        TsconvError: they do not belong together.
    """
    from tsconv.stats.collect import subject_of

    subject = counts.common_subject([subject_of(header, sparsity), *(stats.subject for stats in merged)])
    return subject, 1 + sum(len(stats.parts) for stats in merged)


def _counted(
    llama: SparseLlama,
    corpus: Corpus,
    chunk: int,
    n_tokens: int,
    progress: Callable[[int], None] | None,
    should_stop: Callable[[], bool],
) -> Collected:
    """Runs the model over the text. Raises HubError where the network failed before there was a whole chunk of it."""
    from tsconv.stats.collect import collect
    from tsconv.stats.text.chunks import chunks

    bos = llama.token_bos() if llama.token_bos() >= 0 else None
    try:
        return collect(
            llama,
            chunks(lambda text: llama.tokenize(text, add_bos=False, special=False), bos, corpus, chunk),
            source=(corpus.dataset, corpus.config, corpus.revision),
            chunk=chunk,
            n_tokens=n_tokens,
            seed=corpus.seed,
            progress=progress,
            should_stop=should_stop,
        )
    except TsconvError as error:
        if corpus.incomplete is None:
            raise
        raise HubError(f"{corpus.incomplete}; {error}", where=corpus.dataset) from None


def _notes(warning: str | None, run: Collected, n_tokens: int) -> Iterator[str]:
    """What the user should know of the run, beside what the corpus says; `warning` is of the chunk's length."""
    if warning:
        yield warning
    if run.stopped is None and run.stats.n_tokens < n_tokens:
        yield f"the text has {run.stats.n_tokens:,} tokens in whole chunks, {n_tokens:,} were asked for"


def _save(stats: Stats, output: Path, force: bool) -> Path:
    """Writes what took long to count; when that fails, to the folder for temporary files.

    Raises:
        OutputError: it could not be written to `output`; says where it is instead.
    """
    try:
        stats_file.save(stats, output, force)
    except OutputError as error:
        try:
            rescued = Path(tempfile.mkdtemp(prefix="tsconv-")) / output.name
            stats_file.save(stats, rescued)
        except (OSError, OutputError):
            raise error from None  # there is no such folder, or it is full
        raise OutputError(f"{error}; the statistics are in {rescued}") from None
    return output


def _report(stats: Stats, directory: str | Path | None) -> Path | None:
    if directory is None:
        return None
    from tsconv.report.write import write_report

    return write_report(stats, Path(directory))[0]
