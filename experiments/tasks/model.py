"""The model of this library for lm-evaluation-harness, whose package must be installed (see `harness`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast, final

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from experiments.config.errors import ConfigError, one_line
from experiments.tasks.arguments import ModelArguments
from experiments.tasks.generations import Generations, style_of
from experiments.tasks.likelihoods import COMBINATIONS, Likelihoods, Request, is_greedy

Result = TypeVar("Result")
NO_TEMPLATE = "models of this library have no chat template: leave out --apply_chat_template"


@final
class CaesuraLM(LM):
    """A byte-level model. Texts are bytes, with a BOS before them; contexts and continuations are scored as they are, so no space
    moves from one to the other as with models that have a tokenizer.

    Registered as `caesura`: `create_from_arg_string("path=runs/a,samples=4")` takes what `ModelArguments` has.
    """

    def __init__(self, likelihoods: Likelihoods, generations: Generations, combination: str, bytes_per_token: int):
        """`combination`: how the samples of a request become its score, a name of `COMBINATIONS`."""
        super().__init__()
        self._likelihoods, self._generations = likelihoods, generations
        self._combine, self._bytes_per_token = COMBINATIONS[combination], bytes_per_token

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, object] | None = None) -> CaesuraLM:
        """The model of `name=value` pairs with commas between them. Raises `ConfigError`, `LoadError`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, object], additional_config: dict[str, object] | None = None
    ) -> CaesuraLM:
        """The model of these arguments. The harness gives more of its own as `additional_config`. Raises `ConfigError` and
        `LoadError`."""
        arguments = ModelArguments.of({**arg_dict, **_batch_size(additional_config or {})})
        likelihoods, generations = arguments.opened()
        return cls(likelihoods, generations, arguments.combine, arguments.bytes_per_token)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability in nats of each continuation after its context, and whether every byte is the most likely one."""

        def compute(some: Sequence[Instance], advance: Callable[[int], None]) -> list[tuple[float, bool]]:
            pairs = [Request(*(_bytes(text, request) for text in request.args)) for request in some]
            found = self._likelihoods.of(pairs, advance)
            return [(self._combine(one), is_greedy(one)) for one in found]

        return self._by_task("loglikelihood", requests, compute, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each text, in windows that move by the stride of the plan."""

        def compute(some: Sequence[Instance], advance: Callable[[int], None]) -> list[float]:
            texts = [Request(b"", _bytes(request.args[0], request)) for request in some]
            return [self._combine(one) for one in self._likelihoods.of(texts, advance)]

        return self._by_task("loglikelihood_rolling", requests, compute, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first stop string, as text: U+FFFD stands for invalid UTF-8."""

        def compute(some: Sequence[Instance], advance: Callable[[int], None]) -> list[str]:
            prompts = [_bytes(request.args[0], request) for request in some]
            styles = [style_of(_settings(request), self._bytes_per_token) for request in some]
            found = self._generations.of(prompts, styles, advance)
            return [text.decode("utf-8", errors="replace") for text in found]

        return self._by_task("generate_until", requests, compute, disable_tqdm)

    @property
    def tokenizer_name(self) -> str:
        """Asked for where a chat template is to be used, which there is not. Raises `ConfigError`."""
        raise ConfigError(NO_TEMPLATE)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """None. Raises `ConfigError` where one is asked for."""
        if chat_template:
            raise ConfigError(NO_TEMPLATE)
        return None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises `ConfigError`."""
        raise ConfigError(NO_TEMPLATE)

    def _by_task(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[Sequence[Instance], Callable[[int], None]], list[Result]],
        disable_tqdm: bool,
    ) -> list[Result]:
        """The results of each task's requests. They do not depend on the other tasks; which of them are computed together may."""
        results: list[Result] = []
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            for _, some in itertools.groupby(requests, key=lambda request: request.task_name):
                own = list(some)
                new = compute(own, lambda number: _advance(bar, number))
                results += new
                for request, result in zip(own, new, strict=True):
                    self.cache_hook.add_partial(kind, request.args, result)
        return results


def _advance(bar: tqdm, number: int) -> None:
    bar.update(number)


def _settings(request: Instance) -> Mapping[str, object]:
    """The settings of a text that is to be generated. The harness says of arguments only that they are a tuple."""
    _, settings = cast("tuple[str, Mapping[str, object]]", request.args)
    return settings


def _batch_size(given: dict[str, object]) -> dict[str, object]:
    """Of what the harness gives, the number of requests beside each other. Its default, 1, and `auto` leave it to this library;
    the device is JAX's."""
    size = given.get("batch_size")
    return {} if size in (None, 1, "1", "auto") else {"batch_size": size}


def _bytes(text: object, request: Instance) -> bytes:
    """A text as UTF-8. Raises `ConfigError` for what is none."""
    try:
        return str(text).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"example {request.doc_id} of the task {one_line(str(request.task_name))} holds half a surrogate pair at character "
            f"{error.start} of a text, which UTF-8 cannot hold"
        ) from None
