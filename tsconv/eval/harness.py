"""A converted model for lm-evaluation-harness (lm_eval), in this process: importing this registers the model "tsconv".

It answers as lm_eval's own model "hf" does for the same checkpoint: the same tokens, cut from the left where a text is
longer than the context, the same windows of a rolling text. Every text begins with the begin-of-text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_cpp import llama_cpp as library
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tsconv.errors import TsconvError
from tsconv.eval.answers import Answers
from tsconv.eval.continuations import MAX_SEQUENCES, Continuation, Continuations, Prompt
from tsconv.eval.windows import N_BATCH
from tsconv.runtime.model import SparseLlama, load

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_CONTEXT = 4096
DEFAULT_SEQUENCES = 64
MAX_NEW_TOKENS = 256  # of a generated text, where the task does not say
ROLLING_BATCHES = 4  # whose texts are computed together

# requests of lm_eval
LOG_LIKELIHOOD, ROLLING, GENERATE = "loglikelihood", "loglikelihood_rolling", "generate_until"


@register_model("tsconv")
class TsconvLM(TemplateLM):
    """
    Args:
        model: a converted model, `NAME.gguf`, or one that is loaded.
        n_ctx: the longest text in tokens. None: 4096, or what the checkpoint was trained with where that is less.
        n_batch: tokens computed together.
        n_seq: texts computed together.
        answers: those of an earlier run.
        batch_size, max_batch_size, device: of lm_eval's command line, which mean nothing here.
        **options: as for `tsconv.load`.

    Attributes:
        llama: the model.
        n_tokens, seconds: tokens computed, and the time that took.

    Raises:
        TsconvError: as `tsconv.load`; the vocabulary has no token that begins or ends a text.
    """

    def __init__(
        self,
        model: str | Path | SparseLlama,
        *,
        n_ctx: int | None = None,
        n_batch: int = N_BATCH,
        n_seq: int = DEFAULT_SEQUENCES,
        answers: Answers | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 1 <= n_seq < MAX_SEQUENCES:
            raise TsconvError("texts computed together", expected=f"1 to {MAX_SEQUENCES - 1}", found=n_seq)
        self._is_ours = not isinstance(model, SparseLlama)
        self.llama = model if isinstance(model, SparseLlama) else load(model, n_ctx=256, **options)
        trained = self.llama._model.n_ctx_train()
        self.max_length = n_ctx or min(DEFAULT_CONTEXT, trained)
        self.max_gen_toks = MAX_NEW_TOKENS
        self._answers = answers or Answers(None)
        self._n_batch = n_batch
        self._bos, self._eos = self.llama.token_bos(), self.llama.token_eos()
        if self._bos < 0 or self._eos < 0:
            raise TsconvError("the vocabulary has no begin-of-text or end-of-text token", where=self.llama.model_path)
        self.bos_text, self._eos_text = (self._text_of(token) for token in (self._bos, self._eos))
        # Vocabularies that put a blank in front of a text: a decoder takes it away again.
        self._drops_blank = self.llama.metadata.get("tokenizer.ggml.model") == "llama" and (
            self.llama.metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        )
        self._continuations = Continuations(self.llama, n_ctx=self.max_length, n_batch=n_batch, n_seq=n_seq)

    @property
    def n_tokens(self) -> int:
        return self._continuations.n_tokens

    @property
    def seconds(self) -> float:
        return self._continuations.seconds

    def close(self) -> None:
        """Frees the context, and the model where it was loaded here."""
        self._continuations.close()
        if self._is_ours:
            self.llama.close()

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        return self._bos

    @property
    def tokenizer_name(self) -> str:
        return Path(self.llama.model_path).name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Names of special tokens in a text are these tokens. Unless `add_special_tokens` says otherwise, the
        begin-of-text token comes first, and once where the text begins with its name."""
        tokens = self.llama.tokenize(string.encode("utf-8", "replace"), add_bos=False, special=True)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.bos_text)
        return [self._bos, *tokens] if add_special_tokens else tokens

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens, and without the blank that the vocabulary puts in front of a text."""
        text = self.llama.detokenize(list(tokens), prev_tokens=None, special=False).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._drops_blank else text

    def _text_of(self, token: int) -> str:
        return self.llama.detokenize([token], special=True).decode("utf-8", "replace").strip()

    # ---- log likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log likelihood, whether greedy text is the same) of each continuation; (0, True) of an empty one."""
        found: list[tuple[float, bool] | None] = [None if request.args[1] else (0.0, True) for request in requests]
        asked = [i for i, answer in enumerate(found) if answer is None]
        for i, answer in zip(asked, super().loglikelihood([requests[i] for i in asked], True), strict=True):
            found[i] = answer
        return [answer for answer in found if answer is not None]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Of (texts, tokens of the context, tokens of the continuation); texts are None for those that are a part of
        something else, whose answers are not kept."""
        found: list[tuple[float, bool] | None] = [
            (0.0, True) if not continuation else self._known(LOG_LIKELIHOOD, texts)
            for texts, _, continuation in requests
        ]
        asked = [i for i, answer in enumerate(found) if answer is None]
        wanted = [self._continuation(*requests[i][1:]) for i in asked]
        with self._bar("log likelihoods", len(requests), len(requests) - len(asked), disable_tqdm) as bar:
            for k, scored in self._continuations.score(wanted):
                texts = requests[asked[k]][0]
                found[asked[k]] = answer = scored.log_likelihood, scored.is_greedy
                if texts is not None:
                    self._keep(LOG_LIKELIHOOD, texts, answer)
                bar.update()
        return [answer for answer in found if answer is not None]

    def _continuation(self, context: list[int], continuation: list[int]) -> Continuation:
        if len(continuation) > self.max_length:
            raise TsconvError(
                "a continuation is longer than the context",
                expected=f"at most {self.max_length} tokens",
                found=len(continuation),
                fix="raise -c",
            )
        return Continuation((context + continuation)[-(self.max_length + 1) :][:-1], continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, in windows of max_length tokens."""
        found: list[float | None] = [self._known(ROLLING, request.args) for request in requests]
        asked = [i for i, answer in enumerate(found) if answer is None]
        with self._bar("texts", len(requests), len(requests) - len(asked), disable_tqdm) as bar:
            for group in self._rolling_groups([requests[i].args[0] for i in asked]):
                windows = [(None, *window) for _, windows in group for window in windows]
                values = iter(self._loglikelihood_tokens(windows, disable_tqdm=True))
                for k, mine in group:
                    found[asked[k]] = answer = sum(next(values)[0] for _ in mine)
                    self._keep(ROLLING, requests[asked[k]].args, answer)
                    bar.update()
        return [answer for answer in found if answer is not None]

    def _rolling_groups(self, texts: list[str]) -> Any:
        """Lists of (number of a text, its windows), as many as fill some batches."""
        group: list[tuple[int, list[tuple[list[int], list[int]]]]] = []
        n_tokens = 0
        for k, text in enumerate(texts):
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(tokens, self._bos, self.max_length, context_len=1)
            group.append((k, [make_disjoint_window(window) for window in windows]))
            n_tokens += len(tokens)
            if n_tokens >= ROLLING_BATCHES * self._n_batch:
                yield group
                group, n_tokens = [], 0
        if group:
            yield group

    # ---- generated text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts, each up to the first of its stop sequences or the end-of-text token."""
        found: list[str | None] = [self._known(GENERATE, request.args) for request in requests]
        asked = [i for i, answer in enumerate(found) if answer is None]
        stops, prompts = [], []
        for i in asked:
            until, prompt = self._prompt(*requests[i].args)
            stops.append(until)
            prompts.append(prompt)
        with self._bar("texts", len(requests), len(requests) - len(asked), disable_tqdm) as bar:
            for k, tokens in self._continuations.generate(prompts):
                text = postprocess_generated_text(self.tok_decode(tokens), stops[k], None)
                found[asked[k]] = text
                self._keep(GENERATE, requests[asked[k]].args, text)
                bar.update()
        return [answer for answer in found if answer is not None]

    def _prompt(self, context: str, arguments: dict[str, Any]) -> tuple[list[str], Prompt]:
        """The stop sequences of a request, and what is to be continued.

        Raises:
            TsconvError: it asks for samples, or for more than the context has room for.
        """
        kwargs = normalize_gen_kwargs(arguments, self.max_gen_toks)
        if kwargs.get("do_sample"):
            raise TsconvError("the task asks for random samples", expected="greedy text (do_sample: false)")
        until = handle_stop_sequences(list(kwargs["until"]), self._eos_text)
        most = kwargs["max_gen_toks"]
        if most >= self.max_length:
            raise TsconvError(
                "no room for a prompt",
                expected=f"a context of more than {most} tokens",
                found=self.max_length,
                fix="raise -c",
            )

        def ends(new: list[int]) -> bool:
            if library.llama_vocab_is_eog(self.llama._model.vocab, new[-1]):
                return True
            text = self.tok_decode(new)
            return any(stop and stop in text for stop in until)

        return until, Prompt(self.tok_encode(context)[-(self.max_length - most) :], most, ends)

    # ---- answers

    def _known(self, kind: str, request: tuple[Any, ...] | None) -> Any:
        answer = None if request is None else self._answers.find(kind, request)
        return tuple(answer) if isinstance(answer, list) else answer

    def _keep(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        self._answers.keep(kind, request, answer)
        self.cache_hook.add_partial(kind, request, answer)

    def _bar(self, unit: str, total: int, done: int, hidden: bool) -> Any:
        """On stderr, when that is a terminal."""
        return tqdm(total=total, initial=done, unit=f" {unit}", leave=False, disable=hidden or None)
