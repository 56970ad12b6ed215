"""Prompt pairs from any server that speaks the OpenAI chat protocol (vLLM, Ollama, TGI), through the `openai` client.

Completions are not streamed token by token: an answer is a few hundred tokens and is judged as a whole, its token count
comes in the same message on every server, and the client can then retry a connection that breaks in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping

from safetydpo.config.endpoints import checked_base_url
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.writer_messages import write_messages
from safetydpo.pairs.writers import Reply, UnansweredError, WriteRequest

NO_KEY = "none"
"""Sent when no key is named. Without it the client would send the key of its own environment variable to any server."""
CONTENT_FILTER = "content_filter"
"""What servers call the end of an answer, or an error, by which their filter declines."""


class EndpointWriter:
    """One client with its pool of connections."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        api_key: str | None,
        temperature: float,
        max_tokens: int,
        seed: int,
        timeout_seconds: float,
        max_retries: int,
    ) -> None:
        """Prepare the client; nothing is sent.

        Args:
            model: Name of the model as the server knows it.
            base_url: Address up to and with `/v1`.
            api_key: Sent as a bearer token; None for servers that ask for none. It is never logged or stored.
            temperature: Of the sampling.
            max_tokens: Of one answer.
            seed: Of the run; each request derives its own, for servers that take one.
            timeout_seconds: Until the next byte of an answer.
            max_retries: Of one request: 408, 409, 429 (waits as long as Retry-After says), 5xx, time-outs and broken
                connections.

        Raises:
            UsageError: if the address is no http address or holds a password or query, or the client is not installed.
        """
        self._base_url = checked_base_url(base_url, what="a base URL", key_setting="--api-key-env")
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise UsageError(
                "expected the openai package for this writer, found none: pip install 'safetydpo[writer]'"
            ) from error
        self._model, self._temperature, self._max_tokens, self._seed = model, temperature, max_tokens, seed
        self._api_key = api_key or NO_KEY
        self._client = AsyncOpenAI(
            base_url=base_url, api_key=self._api_key, timeout=timeout_seconds, max_retries=max_retries
        )
        # The client takes these from the environment; they say who somebody is at another service.
        self._client.organization = self._client.project = None

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """Model and sampling; where the server stands changes nothing."""
        return {
            "writer": "endpoint",
            "model": self._model,
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "seed": self._seed,
        }

    async def write(self, request: WriteRequest) -> Reply:
        """Ask the server; the client retries transient faults. A filter that declines the question is a refusal.

        Raises:
            UnansweredError: if retries did not help, or what came is no chat completion.
            SafetyDPOError: if the server refuses the request itself (400, 401, 404 and the like).
        """
        import openai

        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=write_messages(request),  # type: ignore[arg-type]
                temperature=self._temperature,
                max_tokens=self._max_tokens,
                seed=request.seed(self._seed),
            )
            return self._read(raw.parse(), num_retries=raw.retries_taken)
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise UnansweredError(self._told(f"{error.status_code} {error.message}")) from None
            if error.status_code == 400 and error.code == CONTENT_FILTER:
                # Azure's way to decline: about this one question, not about the request's form.
                return Reply(text="", finish_reason=CONTENT_FILTER, refused=True)
            raise self._refused(error.status_code, error.message) from None
        except openai.APITimeoutError:
            raise UnansweredError(f"no answer from {self._base_url} in time") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise UnansweredError(self._told(f"{type(cause).__name__}: {cause}")) from None
        except (ValueError, openai.APIResponseValidationError) as error:
            raise UnansweredError(self._told(f"an answer that is no chat completion: {error}")) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _read(self, completion: object, *, num_retries: int) -> Reply:
        from openai.types.chat import ChatCompletion

        # The client does not check what servers send: every field may be missing or something else.
        choices = completion.choices if isinstance(completion, ChatCompletion) else None
        message = getattr(choices[0], "message", None) if choices else None
        if message is None or not isinstance(message.content, str | None):
            # Not its content: written texts stand in no error line.
            raise ValueError(f"expected choices with a message, found none in a {type(completion).__name__}")
        assert isinstance(completion, ChatCompletion)  # for the type checker
        finish_reason = str(choices[0].finish_reason) if choices else ""
        refusal = getattr(message, "refusal", None)
        # What a server's filter lets through of an answer is not kept.
        filtered = finish_reason == CONTENT_FILTER
        usage = completion.usage
        return Reply(
            text="" if filtered else _encodable(str(refusal or message.content or "")),
            finish_reason=finish_reason,
            refused=filtered or bool(refusal),
            prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
            completion_tokens=_count(getattr(usage, "completion_tokens", None)),
            model=str(completion.model),
            num_retries=num_retries,
        )

    def _told(self, text: str) -> str:
        """Return one line about the server without the key, which servers like to repeat."""
        line = " ".join(text.split())[:300]
        return f"{self._base_url}: {line.replace(self._api_key, '***') if self._api_key != NO_KEY else line}"

    def _refused(self, status: int, message: str) -> SafetyDPOError:
        todo = {
            400: "correct the model's settings (--model, --max-tokens, --temperature)",
            401: "name the variable that holds a valid key with --api-key-env",
            403: "ask for the right to use this model, or name another key with --api-key-env",
            404: "correct --model or --base-url (it ends in /v1 on most servers)",
        }.get(status, "see to the server")
        return SafetyDPOError(
            f"expected the server to take a request for {self._model!r}, found {status} from "
            f"{self._told(message)}; {todo}, then run the same command again"
        )


def _encodable(text: str) -> str:
    """Replace halves of a surrogate pair, which JSON can hold and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
