"""What a person may set from outside: one frozen record a command, and the environment variables Puna reads.

What it is: the table of every flag. A field is a flag: its name is the spelling, its type what it takes, its default
the default, its `Flag` the help. The parser, `--help` and `docs/reference/cli.md` are made from it (`puna.cli.flags`).
What it is not: the hub's settings. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` belong to
huggingface_hub, which reads them itself, so that Puna and every other program on the machine agree on them. The
variables that begin with `OTEL_` are OpenTelemetry's in the same way.
What is surprising: a class's docstring is what `puna COMMAND --help` prints, its first line what `puna --help` prints.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from puna.errors import UsageError
from puna.types import DTYPES, KERNELS, KV_TYPES, QUANTS, SPECULATIONS, TYPES, Sampling

ENVIRONMENT = {
    "PUNA_HOME": "the folder where Puna keeps its state: what was pulled, and the lines typed in chats "
    "(default: `puna` in the platform's data folder)",
    "PUNA_DATABASE": "where a server keeps its keys and their use: a file, or `postgresql://…` "
    "(default: `server.db` in PUNA_HOME)",
    "PUNA_API_KEY": "the key of `puna serve` where `--api-key` is not given, which other users of the machine can see",
    "PUNA_DEBUG": "set to anything but 0: as `--debug`",
    "PUNA_CPU": "what computes on the CPU where `--kernels` is left at `auto`, by the same names: `avx2` or `scalar` "
    "simulate a smaller machine",
    "OPENAI_API_KEY": "the key that `puna bench serve` sends where `--api-key` is not given",
}
"""Every environment variable Puna reads, and what it does; none is needed."""


def typed_path(word: str) -> Path:
    """The path a person typed, `~` and `~name` filled in. Raises UsageError where there is no such home folder."""
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{word}: there is no such home folder.", remedy="Write the path out.") from error


def puna_home() -> Path:
    """The folder where Puna keeps its state: `PUNA_HOME`, else `puna` in the platform's data folder.

    The platform's data folder is `%LOCALAPPDATA%` on Windows, `~/Library/Application Support` on macOS, and
    `$XDG_DATA_HOME` or `~/.local/share` elsewhere. The folder is not created here. As the XDG base directory
    specification asks, a relative `XDG_DATA_HOME` is ignored.
    """
    if chosen := os.environ.get("PUNA_HOME"):
        return typed_path(chosen).absolute()
    if sys.platform == "win32":
        data = os.environ.get("LOCALAPPDATA", "")
        return (Path(data) if data else Path.home() / "AppData" / "Local") / "puna"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "puna"
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "puna"


def server_database(chosen: str | None = None) -> Path | str:
    """Where a server keeps its state: what was chosen, else `PUNA_DATABASE`, else `server.db` in `puna_home()`.

    A `postgresql://` URL stays one; anything else is a file.
    """
    where = chosen or os.environ.get("PUNA_DATABASE")
    if not where:
        return puna_home() / "server.db"
    return where if where.startswith(("postgresql://", "postgres://")) else typed_path(where).absolute()


def audit_file() -> Path:
    """Where it is written down who made or revoked a key, and with `--audit` each request: `audit.jsonl` in
    `puna_home()`."""
    return puna_home() / "audit.jsonl"


def traces_wanted() -> bool:
    """Whether OpenTelemetry's own variables name somebody to send traces to. The rest of them its packages read."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in endpoints) and os.environ.get("OTEL_SDK_DISABLED") != "true"


def debug_wanted() -> bool:
    """Whether `PUNA_DEBUG` asks for tracebacks."""
    return os.environ.get("PUNA_DEBUG", "0") not in ("", "0")


def server_key() -> str | None:
    """The API key that `PUNA_API_KEY` gives a server; None where it is not set."""
    return os.environ.get("PUNA_API_KEY") or None


def server_state() -> Path:
    """Where a server keeps files, batches and stored responses: `server` in `puna_home()`."""
    return puna_home() / "server"


def key_to_send() -> str | None:
    """The API key that `OPENAI_API_KEY` names for servers that are asked; None where it is not set."""
    return os.environ.get("OPENAI_API_KEY") or None


def cpu_wanted() -> str:
    """What `PUNA_CPU` names in place of `--kernels auto`; `auto` where it is not set. The name is not checked here."""
    return os.environ.get("PUNA_CPU") or "auto"


@dataclass(frozen=True)
class Flag:
    """How a settings field is typed at the command line.

    A `positional` is given by place, the others by `--name` (and by `short`, such as `-o`); a tuple may be given
    several times, a positional one takes the words that are left. `metavar` stands for the value in help; `choices` are
    all the values there are; what is `required` has no default. A `table` is a tuple of NAME=VALUE words that a
    configuration file writes as a table. `typed` is what follows the two dashes where Python keeps the field's name for
    itself (`in`).
    """

    help: str
    metavar: str = ""
    short: str = ""
    choices: tuple[str, ...] = ()
    positional: bool = False
    required: bool = False
    table: bool = False
    typed: str = ""


def _option(
    help: str,
    default: Any,
    metavar: str = "",
    *,
    short: str = "",
    choices: tuple[str, ...] = (),
    table: bool = False,
    typed: str = "",
) -> Any:
    return field(default=default, metadata={"flag": Flag(help, metavar, short, choices, table=table, typed=typed)})


def _argument(help: str, metavar: str, *, required: bool = False, default: Any = None) -> Any:
    flag = Flag(help, metavar, positional=True, required=required)
    return field(metadata={"flag": flag}) if required else field(default=default, metadata={"flag": flag})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command takes."""

    command: ClassVar[str] = ""

    json: bool = _option("print one JSON document on stdout and nothing else there", False)
    debug: bool = _option("show the traceback of an error", False)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Have a model answer a prompt, or chat with it.

    The answer is streamed to stdout; everything else goes to stderr. PROMPT is read from stdin where it is `-`, or
    where it is left out and stdin is not a terminal (one line end at its end is dropped, as the shell does). Without
    a prompt, at a terminal, a chat begins. A model without a chat format (a base model, or cria) continues the text.

    MODEL is cria (the model inside the package, and the default), a file or folder, or a short name (llama3.2:1b) or
    hub id (org/name, or org/name:Q4_K_M for a GGUF of it) that was pulled. A single argument that is `-`, or has spaces
    and is no path, is taken as PROMPT.

    A prompt that does not fit the model's context is an error. An answer that ends because of --max-tokens or because
    the context is full says so on stderr.
    """

    command: ClassVar[str] = "run"

    model: str | None = _argument("the model (default: cria)", "MODEL")
    prompt: str | None = _argument("the text to answer, or - for stdin", "PROMPT")
    system: str | None = _option("the system message", None, "TEXT")
    max_tokens: int | None = _option("tokens to make at most (default: until the end)", Sampling.max_tokens, "N")
    temperature: float = _option("0 takes the likeliest token; higher is wilder", Sampling.temperature, "X")
    top_p: float = _option("draw from the likeliest tokens that make up this share", Sampling.top_p, "X")
    top_k: int = _option("draw from this many of the likeliest tokens; 0 is off", Sampling.top_k, "N")
    min_p: float = _option("drop tokens less likely than this share of the likeliest", Sampling.min_p, "X")
    typical_p: float = _option(
        "draw from the tokens whose surprise is nearest to the expected one, up to this share", Sampling.typical_p, "X"
    )
    top_n_sigma: float = _option(
        "drop logits this many standard deviations below the largest; 0 is off", Sampling.top_n_sigma, "X"
    )
    xtc_probability: float = _option(
        "how often the likeliest tokens are left out, so that a less likely one comes", Sampling.xtc_probability, "X"
    )
    xtc_threshold: float = _option(
        "left out then: all that are as likely as this, but the least likely of them", Sampling.xtc_threshold, "X"
    )
    mirostat_tau: float = _option(
        "keep each token's surprise near this many bits, in place of the filters above; 0 is off",
        Sampling.mirostat_tau,
        "X",
    )
    mirostat_eta: float = _option("how fast mirostat adapts", Sampling.mirostat_eta, "X")
    repetition_penalty: float = _option(
        "divide the logits of tokens seen in prompt or answer; 1 is off", Sampling.repetition_penalty, "X"
    )
    presence_penalty: float = _option(
        "taken off the logits of tokens that are in the answer", Sampling.presence_penalty, "X"
    )
    frequency_penalty: float = _option("the same for each time that they are", Sampling.frequency_penalty, "X")
    penalty_range: int = _option("what penalties see of the last tokens; 0: all", Sampling.penalty_range, "N")
    dry_multiplier: float = _option(
        "DRY: the penalty for going on a repeat that is just long enough; 0 is off", Sampling.dry_multiplier, "X"
    )
    dry_base: float = _option("DRY: it grows by this factor with each token more", Sampling.dry_base, "X")
    dry_allowed_length: int = _option("DRY: the shortest repeat that counts", Sampling.dry_allowed_length, "N")
    dry_range: int = _option("DRY: what it sees of the last tokens; 0: all", Sampling.dry_range, "N")
    min_tokens: int = _option("tokens to make before the model may stop", Sampling.min_tokens, "N")
    seed: int | None = _option("repeat a run exactly (default: drawn; --json reports it)", Sampling.seed, "N")
    stop: tuple[str, ...] = _option("end the answer before this text; may be repeated", Sampling.stop, "TEXT")
    dtype: str = _option("compute with the weights as stored, or convert them", DTYPES[0], choices=DTYPES)
    quant: str | None = _option("pack the weights on load, as a GGUF file of this type is", None, choices=QUANTS)
    device: str = _option("cpu, or a torch device such as cuda", "cpu", "DEVICE")
    tokenizer: Path | None = _option("the tokenizer's file (default: beside the weights)", None, "FILE")  # noqa: RUF009
    adapter: Path | None = _option("a LoRA adapter of the model, as PEFT saves it", None, "FOLDER")  # noqa: RUF009
    kernels: str = _option("what computes on the CPU", KERNELS[0], choices=KERNELS)
    speculate: str = _option(
        "guess tokens from what the text said before, where that pays", SPECULATIONS[0], choices=SPECULATIONS
    )
    draft: str | None = _option("a smaller model of the same tokens that guesses, where that pays", None, "MODEL")
    invariant: bool = _option("compute each answer's bits alike, whatever runs beside it or is in the cache", False)
    kv_type: str = _option(
        "how the cache keeps keys and values (auto: fp32 for an fp32 model, else fp16)", KV_TYPES[0], choices=KV_TYPES
    )
    kv_memory: float | None = _option(
        "gigabytes the cache may take (default: what the model's context takes, at most half of what is available)",
        None,
        "GB",
    )
    image: tuple[str, ...] = _option("a picture that the prompt is about; may be repeated", (), "FILE")
    raw: bool = _option("apply no chat format: continue the prompt as it is", False)
    infill: bool = _option("fill the gap that the prompt has at <FILL_ME>; stdout gets what stands in it", False)
    suffix_first: bool = _option("with --infill: have the model read what stands behind the gap first", False)
    session: Path | None = _option(  # noqa: RUF009
        "go on with the chat in FILE and keep it there; what was computed for it stays in FILE.cache", None, "FILE"
    )
    verbose: bool = _option("show counts and speeds after the answer", False)

    def sampling(self) -> Sampling:
        """The sampling these flags ask for. Raises UsageError for a value out of range."""
        return Sampling(**{name: getattr(self, name) for name in SAMPLING_FLAGS})


SAMPLING_FLAGS = tuple(each.name for each in fields(RunSettings) if each.name in Sampling.__dataclass_fields__)
"""The fields of `Sampling` that are flags. The others name tokens, or ask for more than one text."""


@dataclass(frozen=True, kw_only=True)
class PullSettings(Settings):
    """Fetch a model onto this machine.

    NAME is a short name (`puna models` lists them) or a hub id: org/name, or one with a GGUF of it by its type or
    its file (org/name:Q4_K_M, org/name:FILE.gguf). A pull that was cut short continues where it stopped. HF_TOKEN,
    HF_ENDPOINT and the hub's other variables are honoured. With --meta-url the model comes from Meta by the signed link
    of their mail, in Meta's own layout.
    """

    command: ClassVar[str] = "pull"

    name: str = _argument("a short name or a hub id, org/name or org/name:Q4_K_M", "NAME", required=True)
    revision: str | None = _option("a branch, tag or commit (default: the main branch)", None, "REV")
    original: bool = _option("Meta's own files (consolidated.NN.pth) in place of safetensors", False)
    meta_url: str | None = _option(
        "the signed link that Meta mailed, or - to read it from stdin (it is a secret)", None, "URL"
    )


@dataclass(frozen=True, kw_only=True)
class ListSettings(Settings):
    """List the models on this machine."""

    command: ClassVar[str] = "list"


@dataclass(frozen=True, kw_only=True)
class ShowSettings(Settings):
    """Show what a model is, and the memory it needs.

    The weights are not read, only described: this is quick for a model of any size.
    """

    command: ClassVar[str] = "show"

    model: str = _argument("the model, as for `puna run`", "MODEL", required=True)
    tokenizer: Path | None = _option("the tokenizer's file (default: beside the weights)", None, "FILE")  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class RemoveSettings(Settings):
    """Remove a model that was pulled."""

    command: ClassVar[str] = "rm"

    name: str = _argument("the model's name, as `puna list` shows it", "NAME", required=True)
    yes: bool = _option("do not ask", False, short="-y")


@dataclass(frozen=True, kw_only=True)
class ModelsSettings(Settings):
    """List the Llama models that Puna knows by name, show one whole, or compare several.

    Without a MODEL it lists the family; the filters leave some out. With one it shows all that is known of it: sizes,
    languages, licence, published scores, who hosts it for how much. With several it puts them side by side. A MODEL is
    a short name, a hub id, or one of the hosted models that people compare with (gpt-5, claude-sonnet-4.5; --hosted
    lists them).

    Prices are what their sources said on their day; nothing is fetched. Those of catalog.toml in PUNA_HOME go before
    them. --picture draws cost against context or a published score, as SVG.
    """

    command: ClassVar[str] = "models"

    models: tuple[str, ...] = _argument("the models to show or compare (default: list all)", "MODEL", default=())
    generation: str | None = _option("only this generation: llama3.1, llama4, codellama, ...", None, "NAME")
    modality: str | None = _option("only models that take pictures, or text alone", None, choices=("image", "text"))
    context: int | None = _option("only models with at least this many tokens of context", None, "N")
    max_memory: float | None = _option(
        "only models whose weights as Q4_K_M, and a cache of --context (else 8192) tokens, fit these gigabytes",
        None,
        "GB",
    )
    licence: str | None = _option("only models under this licence: llama2, llama3.1, ...", None, "NAME")
    language: str | None = _option("only models that support this language officially: de, th, ...", None, "CODE")
    hosted: bool = _option("list the hosted models that people compare with", False)
    hosts: bool = _option("list who serves models, and who rents accelerators for how much", False)
    sort: str = _option(
        "what to sort by", "family", choices=("family", "context", "memory", "price", "released", "score", "size")
    )
    picture: Path | None = _option("draw cost against --against into this SVG file", None, "FILE")  # noqa: RUF009
    against: str = _option("what --picture shows cost against", "score", choices=("score", "context"))
    benchmark: str = _option("the published score to show, to sort by and to draw", "MMLU", "NAME")


@dataclass(frozen=True, kw_only=True)
class CostSettings(Settings):
    """Work out what a month of work costs: hosted by the token, on rented machines, on your own.

    MODEL is a Llama, or a hosted model (gpt-5). --requests is a month's; --in and --out are the tokens of one. For a
    Llama the work is costed at every host in the catalog, and on --gpu: rented, or bought and fed with power, with
    the utilisation at which it costs what the cheapest host charges. The arithmetic is shown.

    Speeds are bounds from bandwidth and peak times assumed efficiencies, unless --speed-in and --speed-out say what
    `puna bench` measured. Prices carry their source and day; catalog.toml in PUNA_HOME goes before them.
    """

    command: ClassVar[str] = "cost"

    model: str = _argument("a Llama, or a hosted model", "MODEL", required=True)
    requests: int = _option("requests a month", 10_000, "N")
    tokens_in: int = _option("tokens in a request", 1000, "T", typed="in")
    tokens_out: int = _option("tokens out a request", 300, "T", typed="out")
    cached: float = _option("share of the input that a cache has already, 0 to 1", 0.0, "SHARE")
    batch: float = _option("share of the requests that may wait for a batch, 0 to 1", 0.0, "SHARE")
    against: tuple[str, ...] = _option("also cost the work with this hosted model; may be repeated", (), "MODEL")
    gpu: str | None = _option(
        "the accelerator to run it on (default: the cheapest that the catalog has a rent for)", None, "NAME"
    )
    gpus: int | None = _option("how many of it serve one copy (default: as few as hold the model)", None, "N")
    rent: float | None = _option("dollars an hour for one of them (default: the catalog's cheapest)", None, "USD")
    price: float | None = _option("dollars to buy one of them, in place of renting", None, "USD")
    buy: bool = _option("buy, at the catalog's price where it has one", False)
    months: float = _option("months that what is bought is used", 36.0, "N")
    power: float | None = _option("watts of the whole machine (default: its accelerators')", None, "W")
    electricity: float | None = _option("dollars a kilowatt hour (default: the catalog's average)", None, "USD")
    utilisation: float = _option("share of its time that a machine may be busy, above 0 and up to 1", 0.5, "SHARE")
    quant: str = _option("the weights' type", "Q4_K_M", choices=("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16"))
    streams: int | None = _option("answers at a time (default: what the memory holds, at most 64)", None, "N")
    speed_in: float | None = _option("measured tokens a second of one copy, in", None, "X")
    speed_out: float | None = _option("measured tokens a second of one copy, out, all answers together", None, "X")


@dataclass(frozen=True, kw_only=True)
class RecommendSettings(Settings):
    """Recommend a Llama for a task, within a budget, a privacy and a context, and say why.

    What cannot be is ruled out with its reason; the rest is ranked by points for quality (published scores, compared
    only where two models share a benchmark and a setup), cost, privacy and knowledge. Every point is shown, and what
    speaks against a choice too. The same question gives the same answer.
    """

    command: ClassVar[str] = "recommend"

    task: str = _option(
        "what it is for",
        "chat",
        choices=("chat", "code", "infill", "reason", "summarise", "tools", "translate", "vision", "moderation"),
    )
    privacy: str = _option(
        "where text may go: nowhere, to rented machines of your own, or to any host",
        "local",
        choices=("local", "rented", "any"),
    )
    context: int = _option("tokens that one conversation must hold", 8192, "N")
    memory: float | None = _option("gigabytes of your machine that it must fit", None, "GB")
    budget: float | None = _option("dollars a month at most", None, "USD")
    requests: int = _option("requests a month", 10_000, "N")
    tokens_in: int = _option("tokens in a request", 1000, "T", typed="in")
    tokens_out: int = _option("tokens out a request", 300, "T", typed="out")
    language: str | None = _option("a language that it must support officially: de, th, ...", None, "CODE")
    region: str | None = _option("where you are, for its licence: EU, or a country's two letters", None, "CODE")
    users: int | None = _option("monthly users of all your products, for its licence", None, "N")
    show: int = _option("how many choices to explain", 5, "N")


@dataclass(frozen=True, kw_only=True)
class LicenceSettings(Settings):
    """Say what a model's licence and use policy allow in your case, with the clause's place and its words.

    It reads Meta's agreement of the model's own version: the limit of 700 million monthly users, what must be shown and
    how a derivative is named, whether outputs may train other models, and the clause on the European Union. It is a
    reading aid and not legal advice.
    """

    command: ClassVar[str] = "licence"

    model: str = _argument("a Llama by its name, or a folder or file of one", "MODEL", required=True)
    users: int | None = _option(
        "monthly users of all your products in the month before the version's release", None, "N"
    )
    region: str | None = _option("where you are domiciled: EU, or a country's two letters", None, "CODE")
    use: tuple[str, ...] = _option(
        "what you want to do: outputs-to-train, distribute or multimodal; may be repeated (default: all)", (), "USE"
    )
    notice: bool = _option("print the Notice file that a copy must carry, and nothing else", False)


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Write a model in another format.

    SRC is a model as for `puna run`. The output appears whole or not at all: a folder, or for gguf one file, with the
    tokenizer inside. safetensors and meta hold F32, BF16 and F16; gguf holds all types. A packed type is that of most
    matrices; as in other programs, some keep more bits (the head Q6_K, in the _M mixes half of the values and the
    feed-forward outputs too), and vectors stay F32.
    """

    command: ClassVar[str] = "convert"

    source: str = _argument("the model to read", "SRC", required=True)
    to: str = field(
        metadata={"flag": Flag("the format to write", choices=("safetensors", "meta", "gguf"), required=True)}
    )
    output: Path = field(
        metadata={"flag": Flag("the folder to write, or the file (gguf)", "PATH", short="-o", required=True)}
    )
    type: str | None = _option("the type of the weights (default: as stored)", None, choices=TYPES)
    tokenizer: Path | None = _option("the tokenizer's file (default: beside the weights)", None, "FILE")  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Work out what a model takes and how fast it will be, before it is fetched.

    MODEL is a short name of the catalog (`puna models`), pulled or not, or a model that is here. Without --quant the
    usual types stand side by side. The machine is this one, whose memory and products are measured for a second, or
    --machine: a card of the catalog (h100, rtx4090; 2xh100 for two), whose data sheet is taken, or one that --memory,
    --bandwidth and --peak describe.
    """

    command: ClassVar[str] = "plan"

    model: str = _argument("the model: a short name, a hub id or a path", "MODEL", required=True)
    context: int | None = _option("tokens of prompt and answer of each user (default: 8192 at most)", None, "N")
    users: int = _option("users at once", 1, "N")
    quant: str | None = _option("only this type of weights", None, choices=TYPES)
    kv_type: str = _option("how the cache keeps keys and values", KV_TYPES[0], choices=KV_TYPES)
    machine: str | None = _option("a card of the catalog, or NxCARD (default: this machine)", None, "NAME")
    memory: float | None = _option("gigabytes of memory, in place of the machine's", None, "GB")
    bandwidth: float | None = _option("gigabytes a second read from memory, in place of the machine's", None, "GB/S")
    peak: float | None = _option("10^12 operations a second, in place of the machine's", None, "TOPS")
    disk: float = _option("gigabytes a second read from the disk", 1.0, "GB/S")


@dataclass(frozen=True, kw_only=True)
class BenchServeSettings(Settings):
    """Put a load on a server that speaks OpenAI's protocol, and measure how long its clients wait.

    URL is the server's, with or without /v1. With --rate requests arrive as a Poisson process, whatever the server
    does, and each one's waiting counts from when it was due; without it --clients ask again as soon as they are
    answered. Prompts are made of common words, about a token each, the first --shared of them the same in all. The
    tokens that are reported are those that the server counts.
    """

    command: ClassVar[str] = "bench serve"

    url: str = _argument("the server, such as http://127.0.0.1:8080", "URL", required=True)
    model: str | None = _option("the model (default: the first that the server lists)", None, "NAME")
    api_key: str | None = _option("the key to send (default: OPENAI_API_KEY's)", None, "KEY")
    endpoint: str = _option(
        "which protocol: texts to continue, or conversations", "chat", choices=("chat", "completions")
    )
    requests: int = _option("how many requests are measured", 100, "N")
    warmup: int = _option("requests before them that do not count", 4, "N")
    clients: int = _option("clients that ask one request after another", 8, "N")
    rate: float = _option("requests a second in place of --clients", 0.0, "X")
    prompt: int = _option("words of a prompt", 256, "N")
    shared: int = _option("those at its beginning that are the same in all prompts", 0, "N")
    new: int = _option("tokens of an answer at most", 64, "N")
    ignore_eos: bool = _option("ask for answers of exactly that length, where the server knows `ignore_eos`", False)
    seed: int = _option("draws the words and the arrivals", 0, "N")
    ttft_ms: float | None = _option("an answer is good where its first piece came within so many ms", None, "MS")
    itl_ms: float | None = _option("and where the mean time between two pieces is at most so many ms", None, "MS")
    timeout: float = _option("seconds after which a request has failed", 600.0, "SECONDS")
    plot: Path | None = _option("write the distributions as a picture", None, "FILE.svg")  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Measure how fast a model is here, beside other engines.

    MODEL is as for `puna run` (default: cria). --shape measures random weights of a model's shape instead, written to
    PUNA_HOME/bench once and kept there. Reading a prompt, decoding one stream and eight, loading, a cold start and the
    peak of memory are measured, beside what this machine's memory and arithmetic reach in the same run.

    --against runs other engines in processes of their own, in turns: llama.cpp, transformers, openvino, ctranslate2.
    They must be installed, here or in the environment whose Python --peer-python names.
    """

    command: ClassVar[str] = "bench"

    model: str | None = _argument("the model (default: cria)", "MODEL")
    shape: str | None = _option("random weights of this shape: llama3.2:1b, stories15M, cria, ...", None, "NAME")
    type: str | None = _option("the type of the random weights (default: Q4_K_M)", None, "TYPE")
    against: str | None = _option("the engines to compare with, commas between them", None, "PEER,...")
    peer_python: Path | None = _option("the Python that has the peers (default: Puna's own)", None, "FILE")  # noqa: RUF009
    full: bool = _option("longer prompts and contexts too, which takes much longer", False)
    only: str | None = _option("measure only these: decode, prefill_512, decode_8_streams, ...", None, "WORK,...")
    pairs: int = _option("how many times each engine that comes near is measured", 11, "N")
    threads: int | None = _option("threads of every engine (default: the cores that may be used)", None, "N")


@dataclass(frozen=True, kw_only=True)
class KeysSettings(Settings):
    """Make, list and revoke the API keys of a server.

    `puna keys add NAME` makes a key and prints it once: only its hash is kept. `puna keys list` shows all, `puna keys
    revoke NAME` ends one. A server that runs takes changes in within a second. Once there is a key, nobody is let in
    without one. The flags but --database are for `add`. A day's tokens are counted from midnight UTC.
    """

    command: ClassVar[str] = "keys"

    action: str = field(
        metadata={
            "flag": Flag(
                "add, list or revoke", "ACTION", choices=("add", "list", "revoke"), positional=True, required=True
            )
        }
    )
    name: str | None = _argument("what the key is called", "NAME")
    scopes: str | None = _option(
        "what it may do, commas between: infer, batch, manage, observe (default: infer)", None, "SCOPE,..."
    )
    models: str | None = _option("the models it may use, commas between (default: all)", None, "MODEL,...")
    requests_per_minute: int | None = _option("requests a minute at most", None, "N")
    tokens_per_minute: int | None = _option("tokens a minute at most, prompts' and answers'", None, "N")
    tokens_per_day: int | None = _option("tokens a day at most", None, "N")
    priority: int | None = _option("whose requests go first: a larger number (default: 0)", None, "N")
    expires: str | None = _option("the day it ends, or the time: 2030-01-31, 2030-01-31T12:00Z", None, "DATE")
    database: str | None = _option("a file, or postgresql://... (default: PUNA_DATABASE's)", None, "WHERE")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """Show what this machine has, and which implementation each operation uses, and why."""

    command: ClassVar[str] = "doctor"

    kernels: str = _option("as for `puna run`: show the table for this choice", KERNELS[0], choices=KERNELS)
    device: str = _option("also try this torch device", "cpu", "DEVICE")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """Serve models over HTTP, to clients of OpenAI, Anthropic and Ollama, with a page to talk to them.

    MODEL is as for `puna run`; the first is the default. Models that are named are loaded at the start and stay. With
    none, every model that was pulled, and cria, is loaded when somebody asks for it, and unloaded when it was idle for
    --keep-alive seconds or its memory is needed; --on-demand says the same of models that are named.

    --config names a TOML file that says what flags say, under their names (`port = 8000`, `keep-alive = 60`); a flag
    that is typed goes before the file. --alias, --option and --guard-category are tables there: [alias] NAME = "MODEL",
    [option.MODEL] KEY = VALUE and [guard-category] NAME = "TEXT". The options of a model are dtype, quant, tokenizer,
    adapter, speculate, draft, kv-type and kv-memory, as for `puna run`; MODEL * stands for all.

    Without a key it answers this machine only; `puna keys add` makes keys, which a running server takes in at once, and
    from then on nobody is let in without one. --no-key lets everybody in who can reach it. SIGTERM (and Ctrl-C) lets
    answers end first; a second one does not. One process runs all models: there are no workers.
    """

    command: ClassVar[str] = "serve"

    models: tuple[str, ...] = _argument("the models (default: all that were pulled, and cria)", "MODEL", default=())
    host: str = _option("the address to listen at; 0.0.0.0 or :: for all of this machine's", "127.0.0.1", "HOST")
    port: int = _option("the port to listen at; 0 takes a free one", 8080, "N")
    config: Path | None = _option("a TOML file that says what flags say", None, "FILE")  # noqa: RUF009
    print_config: bool = _option("print what holds as such a file, and end", False)
    memory: float | None = _option(
        "gigabytes that all models together may take (default: most of what is available)", None, "GB"
    )
    on_demand: bool = _option("load the models that are named when they are asked for, not at the start", False)
    keep_alive: float = _option(
        "seconds that a model loaded on demand stays without use; below 0: for good", 300.0, "SECONDS"
    )
    alias: tuple[str, ...] = _option("another name for a model; may be repeated", (), "NAME=MODEL", table=True)
    option: tuple[str, ...] = _option("an option of a model; may be repeated", (), "MODEL.KEY=VALUE", table=True)
    device: str = _option("cpu, or a torch device such as cuda, for all models", "cpu", "DEVICE")
    kernels: str = _option("what computes on the CPU, for all models", KERNELS[0], choices=KERNELS)
    invariant: bool = _option("compute each answer's bits alike, whatever runs beside it or is in the cache", False)
    guard: str | None = _option(
        "a Llama Guard that judges what is asked and answered; it is served too, and stays loaded", None, "MODEL"
    )
    guard_judges: str = _option(
        "with --guard: what is judged; unsafe answers are kept back", "both", choices=("both", "asked", "answered")
    )
    guard_off: tuple[str, ...] = _option(
        "with --guard: a category that is not judged, such as S6; may be repeated", (), "CODE"
    )
    guard_category: tuple[str, ...] = _option(
        "with --guard: a further category, and what belongs to it; may be repeated", (), "NAME=TEXT", table=True
    )
    api_key: str | None = _option("one key that may do everything, beside those of `puna keys`", None, "KEY")
    no_key: bool = _option("let everybody in who can reach it; needed where others can and there is no key", False)
    database: str | None = _option(
        "where the keys are: a file, or postgresql://... (default: PUNA_DATABASE's)", None, "WHERE"
    )
    allow_host: tuple[str, ...] = _option(
        "a name that clients call this server by, beside its addresses; may be repeated", (), "NAME"
    )
    allow_origin: tuple[str, ...] = _option(
        "a web page that may call it, such as https://chat.example; may be repeated", (), "ORIGIN"
    )
    image_hosts: tuple[str, ...] = _option(
        "hosts that pictures in requests may be fetched from by https, with commas between; may be repeated",
        (),
        "NAME",
    )
    log: str = _option("how requests are told on stderr", "off", choices=("off", "line", "json"))
    audit: bool = _option("write each request to audit.jsonl in PUNA_HOME: who, which model, how much, no text", False)
    log_prompts: bool = _option("put prompts into these two as well", False)
    drain_seconds: float = _option("how long answers may go on after SIGTERM", 30.0, "SECONDS")
    connections: int = _option("connections at most; a further one is told that the server is busy", 2048, "N")


COMMANDS: dict[str, type[Settings]] = {
    settings.command: settings
    for settings in (
        RunSettings, ServeSettings, KeysSettings, PullSettings, ListSettings, ShowSettings, RemoveSettings,
        ModelsSettings, PlanSettings, CostSettings, RecommendSettings, LicenceSettings, ConvertSettings, BenchSettings,
        BenchServeSettings, DoctorSettings,
    )
}  # fmt: skip
"""Every command, by its name, in the order of `puna --help`."""
